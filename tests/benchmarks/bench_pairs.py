"""How exactly one pair is aligned: a reference against its own photograph, and real drone frames against each other.

    .venv/bin/python tests/benchmarks/bench_pairs.py                 # 18 photographs x 24 angles x 3 crops: 1,296 pairs
    .venv/bin/python tests/benchmarks/bench_pairs.py --every 12      # every 12th of them
    .venv/bin/python tests/benchmarks/bench_pairs.py --backbones vits16 --every 37    # random numbers for weights

Each reference is also aligned with the next photograph, which it does not show; that has to be refused. A pair without
geometry counts as failed, with an infinite corner error.
Pairs of different photographs are judged by `bench_real.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from imatch.cli import demo
from imatch.core.types import Matches, Tokens
from imatch.data import images, references, rotations
from imatch.evaluation import metrics
from imatch.features import base
from imatch.matching import align, geometry, matchers
from imatch.matching.align import REFINEMENTS, Aligner
from tests import random_weights

ANGLES, CROPS = range(0, 360, 15), (1.0, 0.75, 0.5)


@dataclass(frozen=True)
class Remembered(matchers.Matcher):
    """A matcher that answers the same question once: refinements share it."""

    matcher: matchers.Matcher
    known: dict[tuple[bytes, bytes], Matches]

    def __post_init__(self) -> None:
        """Nothing: the matcher has checked its own fields."""

    def __call__(self, a: Tokens, b: Tokens, sizes: matchers.Sizes | None = None) -> Matches:
        """See `Matcher`."""
        key = a.descriptors.tobytes(), b.descriptors.tobytes()
        if key not in self.known:
            self.known[key] = self.matcher(a, b, sizes)
        return self.known[key]


def main() -> None:
    """The table of references, then the lines of the drone's frames."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every n-th pair")
    parser.add_argument("--backbones", nargs="+", default=["sift", "dsift"], help="sift, dsift, vits16")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        demo.write(folder / "demo")
        print("backbone refinement pairs  median px  within 8 px  AUC@5  AUC@1  verified  others refused")
        for weight in given.backbones:
            if weight not in base.CLASSICAL:
                os.environ["WEIGHTS_ROOT"] = str(folder)
                random_weights.write(folder, [weight])
            work = partial(photograph, folder=folder, weight=weight, every=given.every)
            with ProcessPoolExecutor(given.workers, get_context("spawn"), quiet) as pool:
                told = [row for rows in pool.map(work, range(len(demo.PHOTOGRAPHS))) for row in rows]
            for refinement in dict.fromkeys(row[0] for row in told):
                _, errors, verified, fooled = zip(*(row for row in told if row[0] == refinement), strict=True)
                aucs = "  ".join(f"{metrics.corner_auc(errors, pixels):5.3f}" for pixels in (5, 1))
                print(
                    f"{weight:8} {refinement:10} {len(errors):5} {np.median(errors):10.2f}  "
                    f"{np.mean(np.array(errors) <= 8):11.3f}  {aucs} "
                    f"{np.mean(verified):9.3f} {1 - np.mean(fooled):15.4f}",
                    flush=True,
                )


def quiet() -> None:
    """One thread a process."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def backbone(folder: Path, weight: str) -> base.Backbone:
    """The backbone of a weight, on the CPU."""
    return base.create_backbone(weight, data_key=str(folder / "data_key.json"), device="cpu")


def aligner(weight: str, refinement: str, b: Tokens, known: dict[tuple[bytes, bytes], Matches]) -> Aligner:
    """What 04_match aligns with by default."""
    geometry = {"threshold": 0.0, "min_share": 0.0}
    matcher = base.matcher_for(weight)
    made = align.aligner({"matcher": matcher, "matcher_options": {}, "refine": refinement, "geometry": geometry}, b)
    return dataclasses.replace(made, matcher=Remembered(made.matcher, known))


def photograph(number: int, folder: Path, weight: str, every: int) -> list[tuple[str, float, bool, bool]]:
    """One photograph's references: (refinement, corner error, verified, another photograph verified) for each."""
    sees = backbone(folder, weight)
    paths = [folder / "demo" / demo.PHOTOGRAPHS[i % len(demo.PHOTOGRAPHS)] for i in (number, number + 1)]
    gallery = [(images.decode(path).pixels, shown(sees, path, rotations.UPRIGHT)) for path in paths]
    turns = 1 if weight == "sift" else 8
    told = []
    for i, (crop, angle) in enumerate((crop, angle) for crop in CROPS for angle in ANGLES):
        if (i + number * len(CROPS) * len(ANGLES)) % every:
            continue
        view = references.isometric(gallery[0][0], angle, crop)
        path, size = folder / f"{weight}_{number}_{i}.png", view.pixels.shape[:2]
        Image.fromarray(view.pixels).save(path)
        posed = [(pose, shown(sees, path, pose)) for pose in rotations.poses(turns)]
        known: dict[tuple[bytes, bytes], Matches] = {}
        truth = np.linalg.inv(view.matrix)
        for refinement in REFINEMENTS:
            if weight == "sift" and refinement == "patch":
                continue
            found, other = (
                aligner(weight, refinement, b, known)(
                    posed, b, size, pixels.shape[:2], partial(pair, view.pixels, pixels)
                ).geometry
                for pixels, b in gallery
            )
            error = math.inf if found.matrix is None else geometry.corner_error(found.matrix, truth, size)
            told.append((refinement, error, found.verified, other.verified))
    return told


def pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two photographs."""
    return a, b


def shown(sees: base.Backbone, path: Path, pose: rotations.Pose) -> Tokens:
    """A photograph's tokens in a pose, xy in pixels of the upright one, as 01_embed makes them."""
    upright = images.decode(path, images.Resize(), sees.patch, sees.resampling)
    decoded = rotations.turned(upright, pose.turn, sees.patch) if pose.turn else upright
    (tokens,) = sees(np.stack([decoded.pixels]))
    if pose.turn:
        return rotations.placed(tokens, decoded)
    return Tokens(tokens.vector, tokens.descriptors, decoded.to_original(tokens.xy), tokens.grid)


if __name__ == "__main__":
    main()
