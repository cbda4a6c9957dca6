"""DINOv3's forward pass by torch and by OpenVINO, and what 01_embed makes of it, measured in turns in one run.

    .venv/bin/python tests/benchmarks/bench_fast.py [--photographs N] [--turns N]

200 JPEGs of 1024 x 682, ViT-S/16 at 256 px with random weights, on the CPU, in bf16 where it computes in that. The bare
forward pass has its photographs decoded in memory, in batches of 8; its share is of the machine's rate of matrix
products (`checks.rate`). `imatch.steps.embed` reads, decodes, hashes and writes; its share is of the bare forward pass
of the same engine. The plain loop is bench_dinov3's (batch 1, fp32, two passes, full decode) on every fifth photograph.
Each side's best turn counts, without the start of its model; CPU milliseconds (of all processes, those of 01_embed's
start included) say the same where others use the machine, too.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from imatch.core import settings
from imatch.data import images
from imatch.features import base, dinov3, openvino
from imatch.steps import checks
from tests.benchmarks import bench_dinov3

BATCH, FIFTH, HELD, SIDE = 8, 5, 64, bench_dinov3.SIDE
PRODUCT, PRODUCTS = 1024, 100


@dataclass(frozen=True)
class Took:
    """Seconds on the clock and of the CPU, a photograph."""

    wall: float
    cpu: float


def main() -> None:
    """Make photographs and weights, run the sides in turn, print the table."""
    parser = argparse.ArgumentParser(description="DINOv3's forward pass by torch and by OpenVINO, and 01_embed by both")
    parser.add_argument("--photographs", type=int, default=200, help="how many JPEGs (default 200)")
    parser.add_argument("--turns", type=int, default=3, help="of which the best counts (default 3)")
    options = parser.parse_args()
    count: int = options.photographs
    with bench_dinov3.at_hand(count) as (folder, photographs, data_key):
        fifth = folder / "fifth"
        fifth.mkdir()
        for path in sorted(photographs.iterdir())[::FIFTH]:
            os.link(path, fifth / path.name)
        precision = "bf16" if dinov3.computes_in_bf16("cpu") else "fp32"
        engines = [name for name in ("torch", "openvino") if name == "torch" or openvino.installed()]
        sides: dict[str, tuple[int, Callable[[Path], object]]] = {
            "matrix products": (PRODUCTS, lambda _: products(precision))
        }
        pixels = decoded(photographs)
        for engine in engines:
            given = {"engine_forward": engine, "precision": precision}
            backbone = base.create_backbone("vits16", given, data_key=str(data_key), device="cpu")
            assert isinstance(backbone, dinov3.Dinov3)
            sides[f"forward, {engine}"] = (len(pixels), partial(forward, backbone, pixels))
            sides[f"imatch.embed, {engine}"] = (
                count,
                partial(bench_dinov3.embed, photographs, data_key, precision=precision, engine=engine),
            )
        plain = bench_dinov3.plain(data_key)
        sides["plain loop"] = (len(list(fifth.iterdir())), lambda to: bench_dinov3.loop(fifth, plain, to))
        took: dict[str, list[Took]] = {name: [] for name in sides}
        for turn in range(1 + options.turns):  # the first turn imports, converts and brings the files into memory
            for name, (photos, side) in sides.items():
                wall, cpu = time.perf_counter(), cpu_seconds()
                work = side(folder / f"{turn} {name}")
                wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
                start = work["start"] if isinstance(work, dict) else 0
                if turn:
                    took[name].append(Took((wall - start) / photos, cpu / photos))
        report(took, precision, count)


def report(took: dict[str, list[Took]], precision: str, count: int) -> None:
    """Print the table, in Markdown."""
    best = {
        name: Took(min(turn.wall for turn in turns), min(turn.cpu for turn in turns)) for name, turns in took.items()
    }
    flop, product = checks.cost("dinov3_vits16", (SIDE, SIDE)).flop, best.pop("matrix products")
    ideal = Took(*(flop * each / (2 * PRODUCT**3) for each in (product.wall, product.cpu)))
    print(f"{platform.machine()}, {cpu_name()}, {settings.cores()} cores, {datetime.datetime.now():%Y-%m-%d}")
    print(
        f"{count} JPEGs of {' x '.join(map(str, bench_dinov3.SIZE))}, ViT-S/16 at {SIDE} px, {precision}, batches of 8"
    )
    clock, busy = (flop / each / 1e9 for each in (ideal.wall, ideal.cpu))
    print(f"matrix products of {PRODUCT} x {PRODUCT}: {clock:.0f} GFLOP/s, {busy:.0f} a CPU second")
    print("\n| | photographs/s | CPU ms each | share by the clock | by CPU time | of | plain loops | by CPU time |")
    print("|---|---:|---:|---:|---:|---|---:|---:|")
    plain = best["plain loop"]
    for name, one in best.items():
        what, _, engine = name.partition(", ")
        of = {"forward": ideal, "imatch.embed": best.get(f"forward, {engine}")}.get(what)
        said = {"forward": "matrix products", "imatch.embed": "forward pass"}.get(what, "")
        shares = f"{of.wall / one.wall:.2f} | {of.cpu / one.cpu:.2f}" if of else " | "
        print(
            f"| {name} | {1 / one.wall:.1f} | {one.cpu * 1e3:.0f} | {shares} | {said} "
            f"| {plain.wall / one.wall:.1f} | {plain.cpu / one.cpu:.1f} |"
        )
    print(f"\n{Path(sys.executable).name} {' '.join(sys.argv)}")


def cpu_name() -> str:
    """As /proc/cpuinfo has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def products(precision: str) -> None:
    """Matrix products, as `checks.rate` multiplies."""
    n = PRODUCT
    a = torch.rand(n, n).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    for _ in range(PRODUCTS):
        a @ a


def decoded(photographs: Path) -> list[np.ndarray]:
    """The first photographs, squeezed into squares."""
    resize = images.Resize("stretch", long_side=SIDE)
    return [images.decode(path, resize, 16, by="torch").pixels for path in sorted(photographs.iterdir())[:HELD]]


def batches(pixels: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """(8, h, w, 3) uint8."""
    for first in range(0, len(pixels), BATCH):
        yield torch.from_numpy(np.stack(pixels[first : first + BATCH]))


def forward(backbone: dinov3.Dinov3, pixels: list[np.ndarray], _: Path) -> None:
    """The bare forward pass."""
    for batch in batches(pixels):
        backbone.features(batch)


if __name__ == "__main__":
    main()
