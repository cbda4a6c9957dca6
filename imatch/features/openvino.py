"""DINOv3's forward pass by OpenVINO on the CPU: timm's model, converted once, for batches of any size.

One model with open batch, height and width is as fast as one for each shape, and is compiled in a second. Only the
table of rotary angles differs between shapes; it goes in beside the photographs. The two halves of a batch run side by
side, each on half of the threads, which so wait for one another half as often.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from imatch.core import settings
from imatch.core.types import ImatchError
from imatch.features.weights import remembered, timm_tokens

if TYPE_CHECKING:
    from openvino import CompiledModel, Core, Model

ENOUGH = 0.999
"""From which `agreement` on OpenVINO's answer is taken for torch's."""
KEPT = 2**31
"""Bytes of weights up to which "auto" takes OpenVINO, and a converted model is kept in the cache folder."""
HELD = 5
"""So many times the weights in fp32 are in memory while a model is converted, looked at and compiled."""
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
FORM = 2
"""Of the converted model: what an older imatch kept in another form is not read."""
HALVES, FEW = 2, 4
"""A batch of fewer than `FEW` photographs is not halved: halves of unlike sizes cost too much."""


class Network(Protocol):
    """What this file asks of the backbone that it computes for: a frozen dataclass, `dinov3.Dinov3`."""

    device: str
    source: str
    compile: bool
    hub_entry: str
    filename: str
    precision: str
    bytes: int
    patch: int
    digest: str
    model: Any

    def normalised(self, pixels: Tensor) -> Tensor:
        """Photographs as the network wants them."""

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens before and after the last norm."""


@dataclass(frozen=True)
class Forward:
    """A compiled forward pass.

    Attributes:
        compiled: OpenVINO's compiled model, photographs and rotary table -> tokens before and after the last norm, for
            so many requests side by side.
        periods: (p,) float32 periods of the position embedding; (0,) for a ConvNeXt, which has none.
        prefix: tokens before those of the patches, which are not rotated.
        patch: pixels.
    """

    compiled: Callable[[int], Any]
    periods: np.ndarray
    prefix: int
    patch: int

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of (B, 3, h, w) float32 normalised pixels: (B, m, D) float32, before and after the last norm."""
        table = []
        if self.periods.size:
            table = [rotary(self.periods, self.prefix, x.shape[2] // self.patch, x.shape[3] // self.patch)]
        parts = 1 if len(x) < FEW else HALVES
        compiled, asked = self.compiled(parts), []
        for half in x.contiguous().tensor_split(parts):
            asked.append(compiled.create_infer_request())  # of its own, for several threads may ask at once
            asked[-1].start_async([half.numpy(), *table], share_inputs=True)
        for request in asked:
            request.wait()
        before, normalised = zip(*(request.results.to_tuple() for request in asked), strict=True)
        return torch.from_numpy(np.concatenate(before)), torch.from_numpy(np.concatenate(normalised))


def rotary(periods: np.ndarray, prefix: int, h: int, w: int) -> np.ndarray:
    """Sines, then cosines, of the angles that rotate the queries and keys of h x w patches, as timm lays them out.

    Args:
        periods: (p,) float32.
        prefix: tokens before those of the patches: angles of 0.
        h, w: patches.

    Returns:
        (1, 1, prefix + h * w, 8 p) float32. Source: Simeoni et al., "DINOv3", 2025 (axial angles of coordinates from -1
        to 1).

    >>> rotary(np.array([1.0, 10.0], np.float32), 5, 2, 3).shape
    (1, 1, 11, 16)
    """
    sides = [(np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1 for n in (h, w)]
    places = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = (2 * np.pi * places / periods).astype(np.float32).reshape(h * w, -1)
    angles = np.pad(angles, ((prefix, 0), (0, 0)))[None, None]
    return np.concatenate([np.tile(np.sin(angles), 2), np.tile(np.cos(angles), 2)], axis=-1)


def texture(h: int = 64, w: int = 96) -> np.ndarray:
    """A photograph with texture at every scale: (1, h, w, 3) uint8 RGB, always the same.

    >>> texture().shape
    (1, 64, 96, 3)
    """
    random = np.random.default_rng(0)
    layers = [
        np.kron(random.normal(size=(-(-h // side), -(-w // side), 3)), np.ones((side, side, 1)))[:h, :w]
        for side in (1, 2, 4, 8, 16, 32)
    ]
    return np.clip(127 + 30 * sum(layers), 0, 255).astype(np.uint8)[None]


def chosen(backbone: Network) -> str:
    """What engine_forward "auto" becomes: "openvino" where it is there, faster and gives torch's tokens, else "torch".

    It is faster for ViTs on the CPU; for ConvNeXts both are alike, and the largest ViTs would take too much memory.
    Whether the tokens are torch's is looked at once for each weight file, version of OpenVINO and CPU, and remembered.

    Raises:
        ImatchError: the weight file is not what it should be. (Without one there is nothing to choose: "torch".)
    """
    fits = backbone.device == "cpu" and backbone.source == "timm" and not backbone.compile
    faster = "convnext" not in backbone.hub_entry
    weights = settings.root("WEIGHTS_ROOT") / backbone.filename
    if not (fits and faster and installed() and weights.is_file()):
        return "torch"
    # a file may be half of what it is in fp32, which takes a moment to count
    if weights.stat().st_size > KEPT // 2 and max(weights.stat().st_size, backbone.bytes) > KEPT:
        return "torch"
    return "openvino" if agreement(backbone) >= ENOUGH else "torch"


def installed() -> bool:
    """Whether the package is there; it is not imported.

    >>> isinstance(installed(), bool)
    True
    """
    return importlib.util.find_spec("openvino") is not None


def check(backbone: Network) -> None:
    """Refuse what OpenVINO cannot do.

    Raises:
        ImatchError: it is not installed, or a backbone on a GPU, of Meta's own code or of torch.compile.
    """
    for what, wanted, given in (
        ("device", "cpu", backbone.device),
        ("source", "timm", backbone.source),
        ("compile", False, backbone.compile),
    ):
        if given != wanted:
            raise ImatchError(
                f"engine_forward openvino wants {what} {wanted}, got {given}: change it, or use engine_forward torch"
            )
    if not installed():
        raise ImatchError(
            "engine_forward openvino needs the package openvino, which is not installed: pip install -c "
            "constraints.txt -e '.[openvino]' in imatch's folder, or use engine_forward torch"
        )


def checked(backbone: Network) -> Forward:
    """The forward pass of a backbone, if its tokens are torch's.

    Raises:
        ImatchError: they are not, or the weight file is not what it should be.
    """
    made = forward(backbone)
    if (cosine := agreement(backbone, made)) < ENOUGH:
        raise ImatchError(
            f"OpenVINO's tokens of {backbone.filename} in {backbone.precision} are not torch's in fp32: their lowest "
            f"cosine is {cosine:.4f}, less than {ENOUGH}: use engine_forward torch, or precision fp32"
        )
    return made


def agreement(backbone: Network, made: Forward | None = None) -> float:
    """The lowest cosine between a normalised token of `texture()` by OpenVINO and by torch in fp32, remembered.

    Args:
        backbone: of timm's model on the CPU, with either engine.
        made: its `forward`, where it is made already.
    """

    def measure() -> float:
        x = backbone.normalised(torch.from_numpy(texture()))
        _, exact = _exact(backbone).tokens(x)
        _, ours = (made or forward(backbone))(x)
        cosines = nn.functional.cosine_similarity(exact, ours, dim=-1)
        return float(cosines.nan_to_num(-1).min())  # broken weights agree with nothing

    return remembered(_kept(backbone, ".json"), f"{backbone.precision} {_cpu()}", measure)


def forward(backbone: Network) -> Forward:
    """The compiled forward pass of a backbone, unchecked, on as many threads as torch has in this process."""
    core = _core()
    kept = _kept(backbone) / "model.xml"
    model = core.read_model(kept) if kept.is_file() else _converted(backbone)
    threads = torch.get_num_threads()

    @cache
    def compiled(parts: int) -> CompiledModel:
        asked = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[backbone.precision],
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": False,  # processes that share the cores would all take the first ones
            "NUM_STREAMS": min(parts, threads),
        }
        return core.compile_model(model, "CPU", asked)

    prefix, *periods = model.get_rt_info(["imatch", "rotary"]).astype(str).split()
    return Forward(compiled, np.array(periods, np.float32), int(prefix), backbone.patch)


class _Traced(nn.Module):
    """timm's model with its rotary table as an input: timm works that out in Python, which no trace follows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        for block in model.blocks if hasattr(model, "rope") else ():
            block.attn.forward = partial(_attention, block.attn)

    def forward(self, x: Tensor, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if table is not None:
            self.model.rope.get_embed = lambda shape: table.chunk(2, dim=-1)  # noqa: ARG005
        return timm_tokens(self.model, self.model.forward_features(x))


def _attention(timms: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], attn_mask: None, is_causal: bool) -> Tensor:  # noqa: ARG001
    """timm's attention of a DINOv3, rotated in the words that OpenVINO knows for one operation (its RoPEFusion): all
    tokens, of four dimensions each side, and times -1 where timm has a minus."""
    sines, cosines = rope
    b, n, d = x.shape
    half = timms.head_dim // 2

    def rotated(y: Tensor) -> Tensor:
        return y * cosines + torch.cat([y[..., half:] * -1.0, y[..., :half]], dim=-1) * sines

    bias = None if timms.q_bias is None else torch.cat((timms.q_bias, timms.k_bias, timms.v_bias))
    qkv = nn.functional.linear(x, timms.qkv.weight, bias)
    q, k, v = qkv.reshape(b, n, 3, timms.num_heads, timms.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    seen = nn.functional.scaled_dot_product_attention(rotated(q), rotated(k), v)
    return timms.proj(seen.transpose(1, 2).reshape(b, n, d))


def _converted(backbone: Network) -> Model:
    """OpenVINO's model of a backbone, in fp32; kept in the cache folder if it is not too large."""
    openvino, model = _openvino(), _exact(backbone).model
    rotates, example = hasattr(model, "rope"), [torch.zeros(2, 3, 64, 96)]
    prefix, periods = 0, np.zeros(0, np.float32)
    if rotates:
        prefix, periods = model.num_prefix_tokens, model.rope.periods.numpy()
        example.append(torch.from_numpy(rotary(periods, prefix, 64 // backbone.patch, 96 // backbone.patch)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that tracing, which OpenVINO does, is deprecated
        converted = openvino.convert_model(_Traced(model).eval(), example_input=tuple(example))
    if rotates:  # the fusion wants to know the ranks
        shapes = ([-1, 3, -1, -1], [1, 1, -1, 8 * len(periods)])
        converted.reshape(dict(zip(converted.inputs, shapes, strict=True)))
    converted.set_rt_info(" ".join(map(repr, [prefix, *periods.tolist()])), ["imatch", "rotary"])
    if backbone.bytes <= KEPT:
        _keep(converted, _kept(backbone))
    return converted


def _keep(model: Model, folder: Path) -> None:
    """Write a converted model whole or not at all, in place of those of other versions of OpenVINO."""
    with contextlib.suppress(OSError):  # a home that cannot be written to, or another process was first
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _openvino().save_model(model, Path(temporary, "new", "model.xml"), compress_to_fp16=False)
            for old in {*folder.parent.glob(f"{folder.name.partition('@')[0]}@*/")} - {folder}:
                shutil.rmtree(old)
            Path(temporary, "new").rename(folder)


def _kept(backbone: Network, suffix: str = "") -> Path:
    version = f"{_openvino().__version__.partition('-')[0]}-{FORM}"
    return settings.cache_folder() / "openvino" / f"{backbone.hub_entry}-{backbone.digest[:16]}@{version}{suffix}"


def _exact(backbone: Network) -> Network:
    return replace(backbone, engine_forward="torch", precision="fp32")  # type: ignore[type-var]


def _cpu() -> str:
    name, can = (_core().get_property("CPU", what) for what in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES"))
    return " ".join([name, *can])


@cache
def _core() -> Core:
    # one for good: when several end in the order of their making, OpenVINO 2026.4 leaves the process with a stack for
    # signals that is unmapped, and the next signal (a worker that ends) kills it
    return _openvino().Core()


def _openvino() -> ModuleType:
    # its import and its conversion would send usage data to Intel, unasked; openvino goes on without this package
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
