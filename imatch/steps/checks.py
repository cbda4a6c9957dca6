"""Is everything there, and will it fit? `imatch weights` asks for all of a registry, 01_embed for its own run."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from imatch.core import compute, settings
from imatch.core.compute import ComputeOptions
from imatch.core.rows import Parameters
from imatch.core.step import Step
from imatch.core.types import ImatchError, PhotographError
from imatch.data import datasets, images, registry, store
from imatch.data.images import Resize
from imatch.features.base import create_backbone, stride_of
from imatch.features.weights import Cost, check_name, cost, find, patch_side
from imatch.steps.embedding import chosen, devices_of

SHARE = {"fp32": 0.6, "bf16": 0.5}
"""Share of a device's rate of matrix products that a forward pass reaches (`make bench` measures it)."""
SAMPLE = 256
"""Photographs whose headers are read for the size that a run will see."""
WORKERS = (1, 8, 64)
"""Machines like this one that hours are told for."""
LISTED = 600
"""Bytes of a photograph's row in the lists of a step (images.jsonl, seen.jsonl)."""


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
    sizes = sorted(_sizes(root, ids, resize, patch), key=math.prod)
    size = sizes[len(sizes) // 2]
    one, problems = _model(parameters, size, used, resources.batch_size)
    pace = sum(rate(device, options["precision"]) for device in {*used})  # several processes of a CPU share it
    pixels = sum(h * w for h, w in sizes) / len(sizes)
    share = pixels / math.prod(size)
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
    options = parameters["backbone"]
    hub_entry, precision = options["hub_entry"], options["precision"]
    one, weights = cost(hub_entry, size, precision), create_backbone(parameters["weight"], options, device=used[0]).held
    processes = max(Counter(used).values())  # each has a model of its own
    free = min(compute.free_memory(device) for device in used)
    together = max(1, min(batch_size, int((free / processes - weights) // one.working)))
    needed = processes * (weights + together * one.working)
    path, stride = find(options["filename"]), stride_of(parameters["variant"])
    h, w = size
    kept = "" if stride == 1 else f", {parameters['variant']} keeps one in {stride**2}"
    print(
        f"weights      {path.name}, {path.stat().st_size / 2**20:.1f} MB, SHA-256 {parameters['weights_digest'][:8]}\n"
        f"model        {hub_entry}, {one.parameters / 1e6:.1f} million parameters, normalises as {options['family']}\n"
        f"work         {one.flop / 1e9:.1f} GFLOP a photograph of {w} x {h}, {one.tokens} tokens{kept}\n"
        f"memory       {_gb(needed)} of {_gb(free)} free on {', '.join(used)} ({precision}, batches of {together})"
    )
    if needed <= free:
        return one, []
    less = "engine_forward torch" if options["engine_forward"] == "openvino" else "precision bf16"
    refused = f"{hub_entry} at {w} x {h} needs {_gb(needed)}, {used[0]} has {_gb(free)} free"
    return one, [f"{refused}: use a smaller model or size, or {less}"]


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
    free = compute.free_memory(device)
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
