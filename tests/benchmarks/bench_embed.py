"""How fast 01_embed is against a plain loop over the same photographs, as a ratio measured in one run.

    .venv/bin/python tests/benchmarks/bench_embed.py

Photographs: the demo's 18, and 12 JPEGs of 12 megapixels made from them. Both sides shrink them to 640 pixels and
describe them by `sift`. The loop decodes each in full, resizes it, describes it and saves one .npy; imatch
checks headers, decodes at a reduced size in worker processes, batches, hashes and writes synced shards.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import imatch
from imatch.cli import demo
from imatch.core import settings
from imatch.data import images
from imatch.features import base

SIZE = imatch.Resize("long_side", long_side=640)
LARGE, LONG_SIDE, QUALITY = 12, 4000, 90
REPEATS = 2


@dataclass(frozen=True)
class Time:
    """Seconds on the clock and of the CPU, ended worker processes included."""

    wall: float
    cpu: float


def main() -> None:
    """Make the photographs, run both sides in turn, print the best of each."""
    settings.share_cores()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        photographs = write_photographs(folder / "photographs")
        ids = images.list_photographs(photographs)
        megabytes = sum((photographs / id).stat().st_size for id in ids) / 1e6
        sides = {
            "plain loop": lambda to: loop(photographs, ids, to),
            "imatch.embed": lambda to: embed(photographs, to),
        }
        times: dict[str, list[Time]] = {name: [] for name in sides}
        for turn in range(1 + REPEATS):  # the first turn imports, and brings the files into memory
            for name, side in sides.items():
                took = measure(side, folder / f"{turn} {name}")
                times[name] += [took] if turn else []
    best = {name: Time(min(t.wall for t in found), min(t.cpu for t in found)) for name, found in times.items()}
    print(f"{len(ids)} photographs, {megabytes:.0f} MB: {len(demo.PHOTOGRAPHS)} small, {LARGE} of 12 megapixels")
    print(f"{settings.cores()} cores ({os.uname().machine}), best of {REPEATS} turns each, in turn\n")
    print(f"{'':<14}{'seconds':>9}{'photographs/s':>15}{'CPU seconds':>13}")
    for name, took in best.items():
        print(f"{name:<14}{took.wall:>9.2f}{len(ids) / took.wall:>15.1f}{took.cpu:>13.2f}")
    plain, ours = best.values()
    print(
        f"\nimatch.embed is {plain.wall / ours.wall:.2f} times as fast, with {ours.cpu / plain.cpu:.2f} of the CPU time"
    )
    print(f"{Path(sys.executable).name} {' '.join(sys.argv)}")


def measure(side: Callable[[Path], None], to: Path) -> Time:
    """Run one side with a folder of its own."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    side(to)
    return Time(time.perf_counter() - wall, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def write_photographs(folder: Path) -> Path:
    """The demo's photographs, and 4:3 cuts of the first twelve enlarged to 4000 x 3000."""
    demo.write(folder)
    for name in demo.PHOTOGRAPHS[:LARGE]:
        with Image.open(folder / name) as image:
            large = ImageOps.fit(image.convert("RGB"), (LONG_SIDE, LONG_SIDE * 3 // 4), Image.Resampling.BICUBIC)
        large.save(folder / f"{Path(name).stem}_large.jpg", quality=QUALITY)
    return folder


def loop(photographs: Path, ids: list[str], to: Path) -> None:
    """What one writes first: one photograph after the other."""
    to.mkdir()
    backbone = base.create_backbone("sift")
    for id in ids:
        with Image.open(photographs / id) as image:
            pixels = ImageOps.exif_transpose(image).convert("RGB")
        h, w = SIZE.target((pixels.height, pixels.width), backbone.patch)
        pixels = np.asarray(pixels.resize((w, h), Image.Resampling.BICUBIC))
        (tokens,) = backbone(pixels[None])
        np.save(to / f"{id}.npy", {"vector": tokens.vector, "xy": tokens.xy, "descriptors": tokens.descriptors})


def embed(photographs: Path, to: Path) -> None:
    """The notebook's calls."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("error")
        settings.use_exports(str(to))
        step = imatch.steps.start_embed(str(photographs), run="bench", resize=SIZE)
        imatch.steps.finish_embed(step, imatch.steps.embed(step))


if __name__ == "__main__":
    main()
