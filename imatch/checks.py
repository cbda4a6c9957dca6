"""Is everything there, and will it fit? Looked at before a run starts.

    python -m imatch.registry

prints a table of every data set and every weight of params/data_key.json: found or not, size, checksum, parameters,
memory on this device, photographs a second to expect. 01_embed looks at its own run in the same way, and refuses one
that cannot fit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from imatch import devices, images, registry
from imatch.backbones import dinov3, dinov3_weights
from imatch.images import Resize
from imatch.records import ImatchError, PhotographError
from imatch.runs import Step
from imatch.steps.embed import chosen, devices_of

SHARE = {"fp32": 0.6, "bf16": 0.35}
"""Share of a device's rate of matrix products that a forward pass reaches (`make bench` measures it)."""
SAMPLE = 256
"""Photographs whose headers are read for the size that a run will see."""


@dataclass(frozen=True)
class Cost:
    """What an architecture costs at one size of photograph.

    Attributes:
        parameters: how many numbers the model has.
        flop: floating-point operations of one photograph's forward pass, a multiplication and an addition being two.
        tokens, dimension: n and d of its local descriptors.
        weights: bytes of the model in memory.
        working: bytes that one photograph of a batch needs beside it.
    """

    parameters: int
    flop: int
    tokens: int
    dimension: int
    weights: int
    working: int

    @property
    def stored(self) -> int:
        """Bytes of one photograph on disk: local descriptors in float16 and a global vector in float32."""
        return 2 * self.tokens * self.dimension + 4 * self.dimension


@cache
def cost(hub_entry: str, size: tuple[int, int], precision: str = "fp32") -> Cost:
    """What an architecture costs, counted on a model without memory; no weights are needed.

    Args:
        hub_entry: such as "dinov3_vits16".
        size: (h, w) of a photograph as the backbone sees it.
        precision: "fp32" or "bf16".

    >>> small = cost("dinov3_vits16", (256, 256))
    >>> round(small.parameters / 1e6, 1), round(small.flop / 1e9, 1), small.tokens, small.dimension
    (21.6, 12.5, 256, 384)
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model: Any = dinov3_weights.skeleton(hub_entry)
    matrices = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for parameter in module.parameters(recurse=False)
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    widest = 0

    def watch(_: Any, given: Any, made: Any) -> None:
        nonlocal widest
        together = sum(x.numel() for x in (*given, made) if isinstance(x, torch.Tensor))
        widest = max(widest, together)

    for module in model.modules():
        module.register_forward_hook(watch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        seen = model.forward_features(torch.empty(1, 3, *size, device="meta"))
    patch = dinov3_weights.patch(hub_entry)
    tokens = (size[0] // patch) * (size[1] // patch)
    dimension = int(seen.shape[1] if "convnext" in hub_entry else seen.shape[2])
    weights = 4 * parameters - (2 * matrices if precision == "bf16" else 0)
    # the widest step's input and output, the residual beside them, and what goes in and comes out
    working = 4 * (2 * widest + 3 * size[0] * size[1] + 4 * tokens * dimension)
    return Cost(parameters, counter.get_total_flops(), tokens, dimension, weights, working)


@cache
def rate(device: str, precision: str) -> float:
    """Matrix products of a device in FLOP/s, measured for a fifth of a second on 1024 x 1024 (GPU: 8192 x 8192)."""
    import torch

    gpu = torch.device(device).type == "cuda"
    n = 8192 if gpu else 1024
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)

    def product() -> None:
        a @ a
        if gpu:
            torch.cuda.synchronize(device)

    product()
    start, products = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        product()
        products += 1
    return 2 * n**3 * products / (time.perf_counter() - start)


def free_memory(device: str) -> int:
    """Bytes that are free on a device: a GPU's own memory, or the machine's."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()  # what torch keeps for later is free, too
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def preflight(step: Step, *, batch_size: int, devices: str = "auto") -> None:
    """Look at what a started 01_embed is about to do, print it, and refuse what cannot fit.

    Args:
        step: from `start_embed`; a finished one is there already and takes nothing more.
        batch_size, devices: as `embed` will be given them.

    Raises:
        ImatchError: the model does not fit into the device's memory, or the result not onto the disk; the message says
            by how much, and what would fit.
    """
    ids = sorted(chosen(step))
    root = step.linked("photographs")
    megabytes = sum((root / id).stat().st_size for id in ids if (root / id).is_file()) / 2**20
    lines = [f"photographs  {len(ids)} in {root}, {megabytes:.1f} MB"]
    if step.finished:
        print("\n".join([*lines, "all of it    is there already"]))
        return
    parameters = step.parameters
    problems: list[str] = []
    if "hub_entry" in parameters["backbone"]:
        used = devices_of(step, devices)
        patch = dinov3_weights.patch(parameters["backbone"]["hub_entry"])
        sizes = _sizes(root, ids, Resize(**parameters["resize"]), patch)
        size, together = _heaviest(sizes, len(ids), batch_size)
        said, problems, stored = _model(parameters, size, used, together)
        share = sum(h * w for h, w in sizes) / len(sizes) / (size[0] * size[1])  # of the heaviest, on average
        free, wanted = _disk(step, round(stored * share * len(ids)))
        lines += [
            *said,
            f"disk         {stored * share / 2**20:.2f} MB a photograph, {_gb(wanted)} of {_gb(free)} free",
        ]
        if wanted > free:
            problems.append(
                f"the result takes {_gb(wanted)} and {step.folder} has {_gb(free)} free: choose another disk with "
                "--exports, a smaller size, or a variant such as sub2"
            )
    print("\n".join(lines))
    if problems:
        raise ImatchError("this run cannot fit:\n  " + "\n  ".join(problems))


def _model(
    parameters: dict[str, Any], size: tuple[int, int], used: Sequence[str], batch_size: int
) -> tuple[list[str], list[str], int]:
    """Lines about the model, what does not fit, and bytes a photograph on disk."""
    options = parameters["backbone"]
    hub_entry, precision = options["hub_entry"], options["precision"]
    one = cost(hub_entry, size, precision)
    needed = one.weights + batch_size * one.working
    path = dinov3_weights.find(options["filename"])
    pace = sum(rate(device, precision) for device in used)
    expected = SHARE[precision] * pace / one.flop
    free = min(free_memory(device) for device in used)
    h, w = size
    stride = 1 if parameters["variant"] == "raw" else int(parameters["variant"][3:])
    kept = "" if stride == 1 else f", {parameters['variant']} keeps one in {stride**2}"
    lines = [
        f"weights      {path.name}, {path.stat().st_size / 2**20:.1f} MB, SHA-256 {parameters['weights_digest'][:8]}",
        f"model        {hub_entry}, {one.parameters / 1e6:.1f} million parameters, normalises as {options['family']}",
        f"work         {one.flop / 1e9:.1f} GFLOP a photograph of {w} x {h}, {one.tokens} tokens{kept}",
        f"memory       {_gb(needed)} of {_gb(free)} free on {', '.join(used)} ({precision}, batches of {batch_size})",
        f"speed        about {expected:.1g} photographs/s ({pace / 1e9:.0f} GFLOP/s of matrix products measured)",
    ]
    problems = []
    if needed > free:
        fitting = int((free - one.weights) // one.working)
        remedy = f"-p batch_size {fitting}" if fitting > 0 else "a smaller model or size, or precision bf16"
        problems.append(f"{hub_entry} at {w} x {h} needs {_gb(needed)}, {used[0]} has {_gb(free)} free: use {remedy}")
    return lines, problems, 2 * one.tokens * one.dimension // stride**2 + 4 * one.dimension


def _sizes(root: Path, ids: Sequence[str], resize: Resize, patch: int) -> list[tuple[int, int]]:
    """The (h, w) that the backbone will see, of some photographs evenly spread, by their headers."""
    sizes = []
    for id in ids[:: -(-len(ids) // SAMPLE)]:
        try:
            sizes.append(resize.target(images.check_header(root / id), patch))
        except PhotographError:  # it will be skipped and reported when its turn comes
            continue
    return sizes or [resize.target((1080, 1920), patch)]


def _heaviest(sizes: Sequence[tuple[int, int]], count: int, batch_size: int) -> tuple[tuple[int, int], int]:
    """The batch that takes most memory: the (h, w) of its photographs and how many there are, for a batch has one size.

    >>> _heaviest([(64, 64)] * 9 + [(128, 128)], count=10, batch_size=8)
    ((64, 64), 8)
    """
    batches = {size: min(batch_size, -(-n * count // len(sizes))) for size, n in Counter(sizes).items()}
    return max(batches.items(), key=lambda batch: (batch[0][0] * batch[0][1] * batch[1], batch))


def _disk(step: Step, whole: int) -> tuple[int, int]:
    """Bytes free where the step writes, and bytes that it still has to write."""
    written = sum(path.stat().st_size for path in (step.folder / "local").glob("*.npy"))
    return shutil.disk_usage(step.folder).free, max(0, whole - written)


def _gb(amount: float) -> str:
    return f"{amount / 2**30:.2f} GB"


def table(data_key: str, side: int = 512, batch_size: int = 8) -> str:
    """Every data set and weight of a registry: there or not, and what to expect on this machine.

    Args:
        data_key: the registry's file.
        side: of the square photographs that memory and speed are told for, in pixels.
        batch_size: photographs a forward pass.
    """
    known = registry.load(data_key)
    lines = [f"{'data set':14} {'photographs':>11}  where"]
    for key, dataset in sorted(known.datasets.items()):
        lines.append(f"{key:14} {_photographs(dataset):>11}  {dataset.root}")
    device = devices.resolved("auto")
    precision = "bf16" if dinov3.computes_in_bf16(device) else "fp32"
    free = free_memory(device)
    lines += [
        "",
        f"weights in {registry.root('WEIGHTS_ROOT')}; {device} with {_gb(free)} free, {precision}, "
        f"{side} x {side} px, batches of {batch_size}; per s and disk MB are of photographs",
        f"{'key':12} {'family':6} {'file':>9} {'MB':>8} {'params M':>8} {'GFLOP':>7} {'memory':>9} {'per s':>6} "
        f"{'disk MB':>7}  SHA-256",
    ]
    for weight in known.weights:
        one = cost(weight.hub_entry, (side, side), precision)
        needed = one.weights + batch_size * one.working
        there, size, said = weight_file(weight.filename)
        said = said if needed <= free else f"{said}; does not fit into memory"
        pace = SHARE[precision] * rate(device, precision) / one.flop
        lines.append(
            f"{weight.key:12} {weight.family:6} {there:>9} {size:>8} {one.parameters / 1e6:8.1f} {one.flop / 1e9:7.0f} "
            f"{_gb(needed):>9} {pace:6.1g} {one.stored / 2**20:7.2f}  {said}"
        )
    return "\n".join(lines)


def _photographs(dataset: registry.Dataset) -> str:
    if not dataset.root.is_dir():
        return "not there"
    try:
        return str(len(dataset.select(images.list_photographs(dataset.root))))
    except ImatchError as error:
        return str(error)


def weight_file(filename: str) -> tuple[str, str, str]:
    """Looks for a weight file.

    Returns:
        "found", "missing" or "WRONG", megabytes, and what is to be said of its checksum or its absence.

    >>> weight_file("no-such-file.pth")
    ('missing', '', 'no-such-file.pth')
    """
    try:
        path = dinov3_weights.find(filename)
    except ImatchError as error:
        return "missing", "", str(error) if ", but " in str(error) else filename
    megabytes = f"{path.stat().st_size / 2**20:.1f}"
    try:
        digest = dinov3_weights.check_name(path)[:8]
        return "found", megabytes, f"{digest} as its name says" if digest in filename else f"{digest}, not in its name"
    except ImatchError as error:
        return "WRONG", megabytes, str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 when a file is not what its name says, 2 for a bad request."""
    parser = argparse.ArgumentParser(prog="python -m imatch.registry", description="What is there, and will it fit?")
    parser.add_argument("--data-key", default=registry.DATA_KEY, help="registry of data sets and weights")
    parser.add_argument("--side", type=int, default=512, help="pixels of square photographs (default 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="photographs a forward pass (default 8)")
    options = parser.parse_args(arguments)
    try:
        text = table(options.data_key, options.side, options.batch_size)
    except ImatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 1 if " WRONG " in text else 0
