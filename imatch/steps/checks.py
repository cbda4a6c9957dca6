"""Is everything there, and will it fit? `imatch weights` asks for all of a registry, 01_embed for its own run."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from imatch.core import compute, settings
from imatch.core.compute import ComputeOptions
from imatch.core.rows import Parameters
from imatch.core.step import Step
from imatch.core.types import ImatchError, PhotographError
from imatch.data import datasets, images, registry, store
from imatch.data.images import Resize
from imatch.features.base import stride_of
from imatch.features.weights import check_name, find, patch_side, skeleton
from imatch.steps.embedding import chosen, devices_of

SHARE = {"fp32": 0.6, "bf16": 0.5}
"""Share of a device's rate of matrix products that a forward pass reaches (`make bench` measures it)."""
SAMPLE = 256
"""Photographs whose headers are read for the size that a run will see."""
WORKERS = (1, 8, 64)
"""Machines like this one that hours are told for."""
LISTED = 600
"""Bytes of a photograph's row in the lists of a step (images.jsonl, seen.jsonl)."""


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


def hours(photographs: int, flop: int, rate: float, precision: str, workers: int = 1) -> float:
    """Hours of a network's forward passes, photographs x flop / (share x rate x workers x 3600).

    Args:
        photographs: how many.
        flop: of one of them.
        rate: matrix products of one worker in FLOP/s.
        precision: "fp32" or "bf16".
        workers: how many.

    >>> round(hours(1_000_000, 12_500_000_000, 57e9, "fp32"), 1)
    101.5
    """
    return photographs * flop / (SHARE[precision] * rate * workers * 3600)


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

    model: Any = skeleton(hub_entry)
    matrices = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for parameter in module.parameters(recurse=False)
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    widest = 0

    def watch(_: torch.nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        nonlocal widest
        together = sum(x.numel() for x in (*given, made) if isinstance(x, torch.Tensor))
        widest = max(widest, together)

    for module in model.modules():
        module.register_forward_hook(watch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        seen = model.forward_features(torch.empty(1, 3, *size, device="meta"))
    patch = patch_side(hub_entry)
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
    # numbers as they come, for a GPU that multiplies ones needs less power, and is faster
    a = torch.rand(n, n, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)

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


def preflight(step: Step, resources: ComputeOptions = ComputeOptions()) -> None:
    """Look at what a started 01_embed is about to do, print it, and refuse what cannot fit.

    Args:
        step: from `start_embed`; a finished one is there already and takes nothing more.
        resources: as `embed` will be given them.

    Raises:
        ImatchError: the model does not fit into the device's memory, or the result not onto the disk; the message says
            by how much, and what would fit.
    """
    found, left_out = chosen(step)
    ids = sorted(found)
    root = step.linked("photographs")
    megabytes = sum((root / id).stat().st_size for id in ids if (root / id).is_file()) / 2**20
    print(f"photographs  {len(ids)} in {root}, {megabytes:.1f} MB{left_out}")
    if step.finished:
        print("all of it    is there already")
        return
    problems = _network(step, ids, resources) if "hub_entry" in step.parameters["backbone"] else []
    if problems:
        raise ImatchError("this run cannot fit:\n  " + "\n  ".join(problems))


def _network(step: Step, ids: Sequence[str], resources: ComputeOptions) -> list[str]:
    """Print what a network's run takes, and say what does not fit."""
    parameters, root = step.parameters, step.linked("photographs")
    options, resize = parameters["backbone"], Resize(**parameters["resize"])
    used, patch = devices_of(parameters, resources.devices), patch_side(options["hub_entry"])
    sizes = _sizes(root, ids, resize, patch)
    size, together = _heaviest(sizes, len(ids), resources.batch_size)
    one, problems = _model(parameters, size, used, together)
    pace = sum(rate(device, options["precision"]) for device in {*used})  # several processes of a CPU share it
    pixels = sum(h * w for h, w in sizes) / len(sizes)
    share = pixels / (size[0] * size[1])  # of the heaviest
    network = 3600 * hours(1, one.flop, pace, options["precision"]) * share
    to_decode = decoding([root / id for id in ids[:: -(-len(ids) // 3)]], resize, patch)
    print(f"time         {_time(len(ids), network, to_decode, used)}")
    stored = _stored(parameters, round(one.tokens * share), one.dimension)
    written = sum(path.stat().st_size for path in (step.folder / "local").glob("*.npy"))
    free, wanted = shutil.disk_usage(step.folder).free, max(0, stored * len(ids) - written)
    kept = store.KEEPS[store.keep_of(parameters)]
    print(f"disk         {stored / 2**20:#.2g} MB a photograph, {_gb(wanted)} of {_gb(free)} free; stored is {kept}")
    if wanted > free:
        problems.append(
            f"the result takes {_gb(wanted)} and {step.folder} has {_gb(free)} free: choose another disk for "
            "exports, a smaller size, a storage.variant such as sub2, or storage.keep int8, aggregated or global"
        )
    return problems


def _model(
    parameters: Parameters, size: tuple[int, int], used: Sequence[str], batch_size: int
) -> tuple[Cost, list[str]]:
    """Print what the model is and what memory it takes; what a photograph costs, and what does not fit."""
    from imatch.features import openvino

    options = parameters["backbone"]
    hub_entry, precision = options["hub_entry"], options["precision"]
    one = cost(hub_entry, size, precision)
    by_openvino = options["engine_forward"] == "openvino"
    weights = openvino.HELD * 4 * one.parameters if by_openvino else one.weights
    processes = max(Counter(used).values())  # each has a model of its own
    needed = processes * (weights + batch_size * one.working)
    free = min(free_memory(device) for device in used)
    path, stride = find(options["filename"]), stride_of(parameters["variant"])
    h, w = size
    kept = "" if stride == 1 else f", {parameters['variant']} keeps one in {stride**2}"
    print(
        f"weights      {path.name}, {path.stat().st_size / 2**20:.1f} MB, SHA-256 {parameters['weights_digest'][:8]}\n"
        f"model        {hub_entry}, {one.parameters / 1e6:.1f} million parameters, normalises as {options['family']}\n"
        f"work         {one.flop / 1e9:.1f} GFLOP a photograph of {w} x {h}, {one.tokens} tokens{kept}\n"
        f"memory       {_gb(needed)} of {_gb(free)} free on {', '.join(used)} ({precision}, batches of {batch_size})"
    )
    if needed <= free:
        return one, []
    fitting = int((free / processes - weights) // one.working)
    less = "engine_forward torch" if by_openvino else "precision bf16"
    remedy = f"compute.batch_size {fitting}" if fitting > 0 else f"a smaller model or size, or {less}"
    return one, [f"{hub_entry} at {w} x {h} needs {_gb(needed)}, {used[0]} has {_gb(free)} free: use {remedy}"]


def _stored(parameters: Parameters, tokens: int, dimension: int) -> int:
    """Bytes of one photograph on disk."""
    kept = store.kept_bytes(store.keep_of(parameters), tokens // stride_of(parameters["variant"]) ** 2, dimension)
    return kept + 4 * dimension * len(parameters["backbone"]["pooling"].split("+")) + LISTED


def _time(photographs: int, network: float, decoding: float, used: Sequence[str]) -> str:
    """Hours here and by several workers; a GPU leaves the cores to the decoding."""
    cores = settings.cores()
    each = max(network, decoding / cores) if {*used} != {"cpu"} else network + decoding / cores
    here, *others = (f"{figure(photographs * each / workers / 3600)} h" for workers in WORKERS)
    parts = f"forward {figure(1000 * network)} ms and decoding {figure(1000 * decoding / cores)} ms a photograph"
    more = ", ".join(f"{other} with {workers}" for other, workers in zip(others, WORKERS[1:], strict=True))
    return f"about {here} here ({parts}), {more} such workers"


def decoding(paths: Sequence[Path], resize: Resize, patch: int) -> float:
    """Seconds of one core's work to decode a photograph, the mean of some; 0 if none can be decoded."""
    taken = []
    for path in paths:
        begun = time.process_time()
        try:
            images.decode(path, resize, patch, by="torch")
        except PhotographError:  # it will be skipped and reported when its turn comes
            continue
        taken.append(time.process_time() - begun)
    return sum(taken) / max(1, len(taken))


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
    """The batch that takes most memory: the (h, w) of its photographs, and how many.

    >>> _heaviest([(64, 64)] * 9 + [(128, 128)], count=10, batch_size=8)
    ((64, 64), 8)
    """
    batches = {size: min(batch_size, -(-n * count // len(sizes))) for size, n in Counter(sizes).items()}
    return max(batches.items(), key=lambda batch: (batch[0][0] * batch[0][1] * batch[1], batch))


def _gb(amount: float) -> str:
    return f"{amount / 2**30:.2f} GB"


def figure(value: float) -> str:
    """Two digits, or all before the point; what is next to nothing only so.

    >>> figure(0.01234), figure(12345.6), figure(1e-5)
    ('0.012', '12,346', '< 0.01')
    """
    if value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def table(data_key: str, side: int = 512, batch_size: int = 8) -> str:
    """Every data set and weight of a registry: there or not, and what to expect on this machine.

    Args:
        data_key: the registry's file.
        side: of the square photographs that memory and speed are told for, in pixels.
        batch_size: photographs a forward pass.
    """
    from imatch.features.dinov3 import computes_in_bf16

    known = registry.load(data_key)
    lines = [f"{'data set':14} {'photographs':>11}  where"]
    for key, dataset in sorted(known.datasets.items()):
        lines.append(f"{key:14} {_photographs(dataset):>11}  {dataset.root}")
    device = compute.resolved("auto")
    precision = "bf16" if computes_in_bf16(device) else "fp32"
    free = free_memory(device)
    lines += [
        "",
        f"weights in {settings.root('WEIGHTS_ROOT')}; {device} with {_gb(free)} free, {precision}, "
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


def _photographs(dataset: datasets.Dataset) -> str:
    if not dataset.root.is_dir():
        return "not there"
    try:
        ids = images.list_photographs(dataset.root)
        return f"{len(dataset.select(ids))}{ids.left_out}"
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
        path = find(filename)
    except ImatchError as error:
        return "missing", "", str(error) if ", but " in str(error) else filename
    megabytes = f"{path.stat().st_size / 2**20:.1f}"
    try:
        digest = check_name(path)[:8]
        return "found", megabytes, f"{digest} as its name says" if digest in filename else f"{digest}, not in its name"
    except ImatchError as error:
        return "WRONG", megabytes, str(error)
