"""Where torch computes."""

from __future__ import annotations

from imatch.records import ImatchError


def resolved(device: str) -> str:
    """A device by name: "auto" is the GPU, if there is one.

    Raises:
        ImatchError: it is not there, or no device that imatch knows.

    >>> resolved("cpu")
    'cpu'
    """
    if device == "cpu":
        return device
    import torch  # which takes a second, and only a GPU needs it

    if device == "auto":  # device_count, for is_available would keep processes forked later from using the GPU
        return "cuda" if torch.cuda.device_count() else "cpu"
    try:
        kind = torch.device(device or "none")
    except RuntimeError as error:
        raise ImatchError(f"device {device!r} is not known: use auto, cpu, cuda or cuda:1") from error
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ImatchError(f"device {device} is not there, torch sees {torch.cuda.device_count()} GPUs: use auto or cpu")
    if kind.type not in ("cpu", "cuda") or device.startswith("cpu:"):
        raise ImatchError(f"device {device!r} is not known: use auto, cpu, cuda or cuda:1")
    return device
