"""What a GPU makes of DINOv3: its forward passes, and 01_embed from decoded photographs to synced shards.

    .venv/bin/python tests/benchmarks/bench_gpu.py [--keys vits16 ...] [--sides 256 ...] [--photographs N]

Forward passes of random weights in bf16, of each model at each size of photograph: as they are, by torch.compile, and
of ConvNeXts with the channels last in memory. Shares are of the GPU's rate of bf16 matrix products
(`checks.rate`), measured in the same run. `imatch.steps.embed` reads photographs that need no decoding (PPM files of
just the size that the model sees), hashes them, and writes what `keep` says; its share is of the bare forward pass.
The bars are ViT-L at 512 px: 0.50 of the matrix products in the forward pass, 0.85 of that end to end, so these come
first. `--device cpu --keys vits16 --sides 64 --photographs 70` runs without a GPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from imatch.core import settings
from imatch.core.compute import ComputeOptions
from imatch.features import base
from imatch.features.dinov3 import Dinov3
from imatch.steps import checks
from tests import random_weights
from tests.benchmarks import bench_dinov3

KEYS, SIDES = ("vitl16", "vits16", "vitb16", "vith16+", "cxBase"), (512, 256, 1024)
BATCH = {256: 128, 512: 32, 1024: 8}
SECONDS = 1.0
"""How long each pace is measured."""


def main() -> None:
    """Write the weights, measure each model at each size, then 01_embed."""
    parser = argparse.ArgumentParser(description="DINOv3 on a GPU: forward passes, and 01_embed end to end")
    parser.add_argument("--device", default="cuda", help='where (default "cuda")')
    parser.add_argument("--keys", nargs="+", default=list(KEYS), help=f"models (default {' '.join(KEYS)})")
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES), help="pixels (default 512 256 1024)")
    parser.add_argument("--photographs", type=int, default=4000, help="that 01_embed gets (default 4000)")
    options = parser.parse_args()
    device: str = options.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("no GPU that torch can use: nothing to measure")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["WEIGHTS_ROOT"], os.environ["XDG_CACHE_HOME"] = str(folder / "weights"), str(folder / "cache")
        data_key = random_weights.write(folder / "weights", options.keys)
        rate = checks.rate(device, "bf16")
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
        print(f"{name}, {settings.cores()} cores, {datetime.datetime.now():%Y-%m-%d}, torch {torch.__version__}")
        print(f"bf16 matrix products: {rate / 1e12:.3g} TFLOP/s\n")
        head = "| model | px | batch | | photographs/s | share of the matrix products | GB at most |"
        print(f"{head}\n|---|---:|---:|---|---:|---:|---:|")
        key, side = options.keys[0], options.sides[0]
        bare = told(key, data_key, device, "as it is", side, rate)
        photographs = written(folder / "photographs", options.photographs, side)
        print(f"\n| imatch.embed, {key} at {side} px | photographs/s | share of the forward pass | of its seconds |")
        print("|---|---:|---:|---|")
        for keep in ("float16", "int8", "global"):
            resources = ComputeOptions(devices=device, batch_size=BATCH.get(side, 8))
            given = {"keep": keep, "shard_size": 256, "resources": resources}
            work = bench_dinov3.embed(photographs, data_key, folder / keep, "bf16", side, "torch", weight=key, **given)
            pace = work["photographs"] / work["seconds"]
            spent = ", ".join(f"{part} {work[part]:.1f}" for part in ("decode", "wait", "forward", "write"))
            print(f"| keep {keep} | {pace:.1f} | {pace / bare:.2f} | {spent} of {work['seconds']:.1f} |", flush=True)
        print(f"\n{head}\n|---|---:|---:|---|---:|---:|---:|")
        for way in ("as it is", "channels last", "compiled"):
            for key in options.keys:
                for side in options.sides if way != "channels last" or key.startswith("cx") else ():
                    told(key, data_key, device, way, side, rate)
    print(f"\npython {' '.join(sys.argv)}")


def told(key: str, data_key: Path, device: str, way: str, side: int, rate: float) -> float:
    """Measure one forward pass and print its row; photographs a second."""
    batch = BATCH.get(side, 8)
    try:
        pace, peak, flop = forward(key, data_key, device, way, side, batch)
    except RuntimeError as error:  # out of memory, or no compiler here: the others are still wanted
        print(f"| {key} | {side} | {batch} | {way} | {type(error).__name__}: {str(error)[:200]!r} | | |", flush=True)
        return float("nan")
    print(f"| {key} | {side} | {batch} | {way} | {pace:.1f} | {pace * flop / rate:.2f} | {peak:.1f} |", flush=True)
    return pace


def forward(key: str, data_key: Path, device: str, way: str, side: int, batch: int) -> tuple[float, float, float]:
    """Photographs a second, gigabytes that were taken at most, FLOP of a photograph."""
    torch._dynamo.reset()  # else the graphs of another model or size count as this one's
    given = {"precision": "bf16", "compile": way == "compiled", "engine_forward": "torch"}
    backbone = base.create_backbone(key, given, data_key=str(data_key), device=device)
    assert isinstance(backbone, Dinov3)
    backbone.load()
    if way == "channels last":
        backbone.model.to(memory_format=torch.channels_last)  # its inputs follow at the first convolution
    on_gpu = device.startswith("cuda")
    if on_gpu:
        gc.collect()  # the compiled model before holds itself
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    x = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8).to(device)
    for _ in range(3 if on_gpu else 1):  # the first compile, choose and allocate
        backbone.features(x)
    started = synchronised(device)
    backbone.features(x)
    passes = max(1, round(SECONDS / (synchronised(device) - started)))
    started = synchronised(device)
    for _ in range(passes):
        backbone.features(x)
    seconds = synchronised(device) - started
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else float("nan")
    return passes * batch / seconds, peak, checks.cost(backbone.hub_entry, (side, side)).flop


def synchronised(device: str) -> float:
    """The time when all that was asked of the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def written(folder: Path, count: int, side: int) -> Path:
    """Photographs of noise that need no decoding."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (side + count, side, 3), dtype=np.uint8)
    for i in range(count):
        Image.fromarray(noise[i : i + side]).save(folder / f"{i:05d}.ppm")
    return folder


if __name__ == "__main__":
    main()
