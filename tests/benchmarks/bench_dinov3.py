"""How fast 01_embed runs DINOv3 ViT-S/16 (random weights) at 256 px, as ratios measured in one run.

    .venv/bin/python tests/benchmarks/bench_dinov3.py [--memory]

40 JPEGs of 1024 x 682 made from the demo's photographs. Against imatch, which writes synced shards and hashes:
a plain loop (batch 1, fp32, one pass for the global vector and another for the patches, full decode, one .npy each) and
Hugging Face transformers' image-feature-extraction pipeline (batch 8, fp32, full decode, results dropped). The share of
the machine's matrix-product rate is of the best side, in the precision it used. `--memory` embeds 200 and 5,000
photographs at 64 px in processes of their own and compares their peak memory and time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[2]))

import imatch
from imatch.cli import demo
from imatch.core import compute, settings
from imatch.core.compute import ComputeOptions
from imatch.core.step import open_step
from imatch.core.types import ImatchWarning
from imatch.data import images
from imatch.features import base, dinov3
from imatch.steps import checks
from tests import random_weights

PHOTOGRAPHS, SIZE, SIDE, REPEATS = 40, (1024, 682), 256, 3


def main() -> None:
    """Make the photographs and the weights, run the sides in turn, print the best of each."""
    settings.share_cores()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["WEIGHTS_ROOT"], os.environ["XDG_CACHE_HOME"] = str(folder / "weights"), str(folder / "cache")
        data_key = random_weights.write(folder / "weights", ["vits16"])
        if "--memory" in sys.argv:
            memory(folder, data_key)
            return
        photographs = write_photographs(folder / "photographs", PHOTOGRAPHS)
        plain_model, pipeline = plain(data_key), transformers_pipeline(data_key)
        sides = {
            "plain loop": lambda to: loop(photographs, plain_model, to),
            "transformers": lambda _: [None for _ in pipeline(photographs)],
            "imatch.embed": lambda to: embed(photographs, data_key, to, "auto"),
            "imatch fp32": lambda to: embed(photographs, data_key, to, "fp32"),
        }
        precision = "bf16" if dinov3.computes_in_bf16(compute.resolved("auto")) else "fp32"
        if precision == "fp32":
            del sides["imatch fp32"]  # that is what auto means here
        best = dict.fromkeys(sides, float("inf"))
        rates = []
        for turn in range(1 + REPEATS):  # the first turn imports, and brings the files into memory
            for name, side in sides.items():
                start = time.perf_counter()
                side(folder / f"{turn} {name}")
                took = time.perf_counter() - start
                best[name] = min(best[name], took) if turn else best[name]
            checks.rate.cache_clear()
            rates.append(checks.rate("cpu", precision))
        report(best, max(rates), precision)


def report(best: dict[str, float], rate: float, precision: str) -> None:
    """Print the table."""
    print(f"{PHOTOGRAPHS} JPEGs of {SIZE[0]} x {SIZE[1]}, ViT-S/16 at {SIDE} px, {settings.cores()} cores")
    print(f"{'':<14}{'seconds':>9}{'photographs/s':>15}{'imatch.embed is':>18}")
    for name, took in best.items():
        times = f"{took / best['imatch.embed']:.2f} times as fast"
        print(f"{name:<14}{took:>9.2f}{PHOTOGRAPHS / took:>15.1f}{times:>24}")
    flop = checks.cost("dinov3_vits16", (SIDE, SIDE)).flop * PHOTOGRAPHS
    done = flop / best["imatch.embed"]
    print(
        f"\n{precision}: {done / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s of matrix products, a share of {done / rate:.2f}"
    )
    print(f"{Path(sys.executable).name} {' '.join(sys.argv)}")


@contextmanager
def at_hand(count: int) -> Iterator[tuple[Path, Path, Path]]:
    """A folder for results, so many photographs, and the registry of a ViT-S/16 with random weights."""
    settings.share_cores()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["WEIGHTS_ROOT"], os.environ["XDG_CACHE_HOME"] = str(folder / "weights"), str(folder / "cache")
        data_key = random_weights.write(folder / "weights", ["vits16"])
        yield folder, write_photographs(folder / "photographs", count), data_key


def write_photographs(folder: Path, count: int) -> Path:
    """Cuts of the demo's photographs, each a little elsewhere."""
    names = demo.PHOTOGRAPHS
    demo.write(folder / "demo")
    for i in range(count):
        with Image.open(folder / "demo" / names[i % len(names)]) as image:
            middle = (0.5, (i // len(names)) / max(1, count // len(names)))
            cut = ImageOps.fit(image.convert("RGB"), SIZE, Image.Resampling.BICUBIC, centering=middle)
        (folder / "jpegs").mkdir(exist_ok=True)
        cut.save(folder / "jpegs" / f"{i:05d}.jpg", quality=90)
    return folder / "jpegs"


def plain(data_key: Path) -> dinov3.Dinov3:
    """The model that the plain loop uses."""
    backbone = base.create_backbone("vits16", {"precision": "fp32"}, data_key=str(data_key))
    assert isinstance(backbone, dinov3.Dinov3)
    return backbone


def loop(photographs: Path, backbone: dinov3.Dinov3, to: Path) -> None:
    """What one writes first: one photograph after the other, once for the global vector and once for the patches."""
    to.mkdir()
    for path in sorted(photographs.iterdir()):
        with Image.open(path) as image:
            pixels = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.asarray(pixels).copy())[None]
        np.save(to / f"{path.stem}_global.npy", backbone.features(x).cls.numpy())
        np.save(to / f"{path.stem}_patches.npy", backbone.features(x).grid.numpy())


def transformers_pipeline(data_key: Path) -> Callable[[Path], object]:
    """Hugging Face's pipeline at batch 8, with its own image processor."""
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel, pipeline

    config = DINOv3ViTConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6, num_hidden_layers=12, num_register_tokens=4
    )
    processor = DINOv3ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    extract = pipeline(
        "image-feature-extraction", model=DINOv3ViTModel(config).eval(), image_processor=processor, batch_size=8
    )
    assert data_key

    def run(photographs: Path) -> object:
        paths = [str(path) for path in sorted(photographs.iterdir())]
        return extract(paths, batch_size=8, return_tensors=True)

    return run


def embed(
    photographs: Path,
    data_key: Path,
    to: Path,
    precision: str,
    side: int = SIDE,
    engine: str = "auto",
    resources: ComputeOptions = ComputeOptions(),
    *,
    weight: str = "vits16",
    keep: str = "float16",
    shard_size: int = 64,
) -> dict[str, float]:
    """The notebook's calls; what they took (`step.Step.work`)."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("error", ImatchWarning)
        settings.use_exports(str(to))
        step = imatch.steps.start_embed(
            str(photographs),
            data_key=str(data_key),
            run="bench",
            weight=weight,
            backbone_options={"precision": precision, "engine_forward": engine},
            resize=images.Resize("stretch", long_side=side),
            storage=imatch.StorageOptions(keep=keep, shard_size=shard_size),
        )
        embeddings = imatch.steps.embed(step, resources)
        imatch.steps.finish_embed(step, embeddings)
    return open_step(step.folder).work


def memory(folder: Path, data_key: Path) -> None:
    """Peak memory and time of embedding few and many photographs, each in a process of its own."""
    few = write_photographs(folder / "few", 200)
    many = folder / "many"
    many.mkdir()
    for i in range(5000):
        os.link(few / f"{i % 200:05d}.jpg", many / f"{i:05d}.jpg")
    peaks, ms = {}, {}
    for name, photographs in (("first", few), ("200", few), ("5000", many)):  # the first one converts the model
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
            "from tests.benchmarks import bench_dinov3 as b\n"
            "work = b.embed(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), 'auto', side=64)\n"
            "print(work['seconds'] / work['photographs'])\n"
            # not ru_maxrss, which begins with the memory of the process that started this one
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        )
        root = str(Path(__file__).parents[2])
        command = [sys.executable, "-c", code, root, str(photographs), str(data_key), str(folder / f"to {name}")]
        seconds, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        peaks[name], ms[name] = int(peak) / 1024, 1000 * float(seconds)
    for what, unit, found in (("peak memory", "MB", peaks), ("a photograph", "ms", ms)):
        said = {name: round(found[name], 1) for name in ("200", "5000")}
        print(f"{what}: {json.dumps(said)} {unit}, a ratio of {found['5000'] / found['200']:.2f}")


if __name__ == "__main__":
    main()
