"""Which pairs of real photographs verify: a drone's frames, scenes of depth, one view twice, and unrelated photographs.

    .venv/bin/python tests/benchmarks/bench_real.py                          # what is at hand; brighton from ../shared
    .venv/bin/python tests/benchmarks/bench_real.py --sets brighton rendered
    .venv/bin/python tests/benchmarks/bench_real.py --folder PHOTOGRAPHS     # all its pairs are right
    .venv/bin/python tests/benchmarks/bench_real.py --folder PHOTOGRAPHS --pairs PAIRS.csv  # query,candidate,label

Labels of a CSV: `right`, `neighbour` and `further` are to be verified, `wrong` and `none` refused, others are not
judged. Beside `imatch.match` as it comes stand, on the same photographs, what a tutorial does (OpenCV's SIFT, ratio
0.75, a homography of at least 10 inliers) and COLMAP's own rule (its two-view geometry from 15 inliers on, where
pycolmap is installed). False accepts have a bound of 95 %: by pairs, and by photographs as if each were in one pair
alone, for the pairs of one photograph are not independent.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).parents[2]))

from imatch.api import match as api
from imatch.cli import demo
from imatch.core import settings
from imatch.data import images, references
from imatch.evaluation import metrics
from imatch.features import base
from imatch.matching.geometry import corner_error, epipolar_distance
from tests import rendered

DRONE = Path(__file__).parents[3] / "shared" / "data" / "brighton_beach"
SETS = ("brighton", "unrelated", "captions", "one view", "rendered", "rendered unrelated", "references")
RIGHT, WRONG = ("right", "neighbour", "further"), ("wrong", "none")
BASELINES, SCENES = (5, 10, 15, 20, 25, 30), 12
ANYHOW, UPRIGHT = range(0, 360, 15), (0, 90, 180)
"""Angles of references."""
NEAR = 8
"""Pixels that the corners of a reference may be off."""


@dataclass(frozen=True)
class Job:
    """Two photographs, what is known of them, and of which set they are."""

    a: Path
    b: Path
    label: str
    of: str
    truth: rendered.Scene | None = field(default=None, repr=False, compare=False)
    matrix: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Told:
    """What one method says of a pair."""

    verified: bool
    inliers: int
    ms: float
    kind: str = ""
    errors: tuple[float, float, float] | None = None  # of a scene: pixels, degrees of rotation and of direction
    off: float | None = None  # of a reference: pixels of its corners


def main() -> None:
    """Print a table for each set, then the false accepts and the rendered scenes' errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", default=None, choices=SETS, help="those at hand")
    parser.add_argument("--folder", type=Path, help="photographs of one's own")
    parser.add_argument("--pairs", type=Path, help="their pairs: query,candidate,label")
    parser.add_argument("--weight", default="auto")
    parser.add_argument("--methods", nargs="*", default=["imatch", "tutorial", "colmap"])
    parser.add_argument("--every", type=int, default=1, help="take every n-th unrelated pair")
    parser.add_argument("--worst", type=int, default=0, help="name so many pairs of each set that went wrong")
    given = parser.parse_args()
    sets = given.sets if given.sets is not None else [] if given.folder else list(SETS)
    methods = [name for name in given.methods if name != "colmap" or _has_pycolmap()]
    with tempfile.TemporaryDirectory() as temporary:
        jobs = collected(Path(temporary), sets, given.folder, given.pairs, given.every)
        ways = [(way, given.weight) for way in methods]
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), quiet) as pool:
            told = list(pool.map(judged, jobs, itertools.repeat(ways), chunksize=4))
        report(jobs, told, methods, given.worst)
    print(f"{Path(sys.executable).name} {' '.join(sys.argv)}")


def quiet() -> None:
    """One thread a process."""
    settings.take_cores(1)
    cv2.setNumThreads(1)


def _has_pycolmap() -> bool:
    try:
        import pycolmap  # noqa: F401
    except ModuleNotFoundError:
        print("pycolmap is not installed: COLMAP's own rule is left out (.venv/bin/pip install pycolmap)")
        return False
    return True


def collected(folder: Path, sets: Sequence[str], own: Path | None, listed: Path | None, every: int) -> list[Job]:
    """The pairs of each set; what is drawn is written to the folder."""
    demo.write(folder / "demo")
    pictures = sorted((folder / "demo").iterdir())
    frames = sorted(DRONE.glob("*.jpg"))
    jobs: list[Job] = []
    if "brighton" in sets and frames:
        jobs += read_pairs(DRONE, DRONE / "pairs.csv", "brighton")
    if "unrelated" in sets:
        across = [*itertools.combinations(pictures, 2), *itertools.product(pictures, frames)]
        jobs += [Job(a, b, "wrong", "unrelated") for a, b in across[::every]]
    if {"rendered", "rendered unrelated"} & {*sets}:
        scenes = written(folder / "rendered", rendered.textures(folder / "demo"))
        jobs += scenes if "rendered" in sets else []
        across = list(itertools.product(frames, (job.a for job in scenes))) if "rendered unrelated" in sets else []
        jobs += [Job(a, b, "wrong", "rendered unrelated") for a, b in across[::every]]
    if "captions" in sets:
        jobs += captioned(folder / "captions", pictures)
    if "one view" in sets:
        jobs += one_view(folder / "one view", [*pictures, *frames][::2])
    if "references" in sets:
        jobs += made(folder / "references", pictures, ANYHOW, 36)
        jobs += made(folder / "upright", pictures, UPRIGHT, 108)
    if own is not None:
        photographs = [own / name for name in images.list_photographs(own)]
        jobs += (
            read_pairs(own, listed, own.name)
            if listed
            else [Job(a, b, "right", own.name) for a, b in itertools.combinations(photographs, 2)]
        )
        across = list(itertools.product(photographs, [*pictures, *frames]))
        jobs += [Job(a, b, "wrong", f"{own.name}, strangers") for a, b in across[::every]]
    return jobs


def read_pairs(folder: Path, table: Path, of: str) -> list[Job]:
    """The pairs of a CSV that are judged."""
    with table.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] in RIGHT + WRONG]
    return [Job(folder / row["query"], folder / row["candidate"], row["label"], of) for row in rows]


def written(folder: Path, textures: list[np.ndarray]) -> list[Job]:
    """The rendered scenes: each baseline `SCENES` times, with other depths, textures and cameras."""
    folder.mkdir()
    jobs = []
    for number, (baseline, turn) in enumerate(itertools.product(BASELINES, range(SCENES))):
        scene = rendered.scene(textures, 1000 + number, baseline, boards=3 + turn % 3)
        a, b = (
            rendered.save(photograph, folder / f"{number:03d}_{side}.jpg")
            for side, photograph in zip("ab", scene.photographs, strict=True)
        )
        jobs.append(Job(a, b, "right", f"rendered {baseline}", scene))
    return jobs


def made(folder: Path, photographs: Sequence[Path], angles: Sequence[float], n: int) -> list[Job]:
    """References of both kinds drawn at random, each with its own photograph."""
    folder.mkdir()
    every = list(itertools.product(photographs, references.REFERENCES, angles, (1.0, 0.75, 0.5)))
    jobs = []
    for number in np.random.default_rng(0).choice(len(every), n, replace=False):
        path, kind, angle, crop = every[number]
        view = references.REFERENCES[kind](images.decode(path).pixels, angle, crop)
        there = folder / f"{path.stem}_{kind}_{angle}_{crop}.png"
        Image.fromarray(view.pixels).save(there)
        jobs.append(Job(there, path, "right", f"references, {folder.name}", matrix=np.linalg.inv(view.matrix)))
    return jobs


def one_view(folder: Path, photographs: Sequence[Path]) -> list[Job]:
    """A photograph beside itself: encoded again, relit, with one object moved."""
    folder.mkdir()
    jobs = []
    for number, path in enumerate(photographs[:10]):
        before = Image.fromarray(images.decode(path).pixels)
        relit = ImageEnhance.Brightness(ImageEnhance.Color(before).enhance(0.6)).enhance(0.6)
        moved, (w, h) = before.copy(), before.size
        patch = before.crop((w // 8, h // 8, w // 8 + w // 4, h // 8 + h // 4)).transpose(Image.Transpose.ROTATE_180)
        moved.paste(patch, (w // 2, h // 2))
        for name, other in (("again", before), ("relit", relit), ("moved", moved)):
            there = folder / f"{number}_{name}.jpg"
            other.convert("RGB").save(there, quality=60 if name == "again" else 90)
            jobs.append(Job(path, there, "right", f"one view, {name}"))
    return jobs


def captioned(folder: Path, photographs: Sequence[Path]) -> list[Job]:
    """Photographs under one caption of each kind: of each a third of the pairs, and each beside its own, moved."""
    folder.mkdir()
    jobs, moved = [], np.array([[1.02, -0.05, 24], [0.05, 0.98, -11], [0, 0, 1.0]])
    for kind in rendered.CAPTIONS:
        there = [(folder / f"{kind}_{path.stem}.jpg", folder / f"{kind}_{path.stem}_moved.jpg") for path in photographs]
        for path, names in zip(photographs, there, strict=True):
            pixels = np.asarray(ImageOps.fit(Image.fromarray(images.decode(path).pixels), (800, 600)))
            shifted = cv2.warpPerspective(pixels, moved, (800, 600), borderMode=cv2.BORDER_REFLECT)
            for name, one in zip(names, (pixels, shifted), strict=True):
                rendered.caption(Image.fromarray(one), kind).save(name, quality=92)
        across = list(itertools.combinations([one for one, _ in there], 2))[::3]
        jobs += [Job(a, b, "wrong", f"captions, {kind}") for a, b in across]
        jobs += [Job(a, b, "right", f"moved under a {kind}", matrix=moved) for a, b in there]
    return jobs


def judged(job: Job, ways: Sequence[tuple[str, str]]) -> list[Told]:
    """What each method says of a pair."""
    methods: dict[str, Callable[[Job, str], Told]] = {
        "imatch": imatch,
        "tutorial": tutorial,
        "colmap": colmap,
    }
    return [methods[way](job, weight) for way, weight in ways]


@lru_cache(maxsize=64)
def seen(path: Path, weight: str) -> api.Described:
    """A photograph as `imatch.match` sees it."""
    (found,), _ = api.describe({path.name: path}, backbone(weight), weight)
    return found


@lru_cache(maxsize=4)
def backbone(weight: str) -> base.Backbone:
    """As `imatch.match` makes it."""
    return base.create_backbone(weight, {"max_keypoints": api.CLOSER} if weight == "sift" else {})


def imatch(job: Job, weight: str) -> Told:
    """`imatch.match` as it comes, less decoding and detecting."""
    ms = 0.0
    for one in api.weights_of(weight)[0]:
        a, b = seen(job.a, one), seen(job.b, one)
        started = time.process_time()
        found = api.look_twice(a, b)
        ms += 1000 * (time.process_time() - started)
        if found.verified:
            break
    off = None
    if job.matrix is not None:
        off = math.inf if found.matrix is None else corner_error(found.matrix, job.matrix, found.sizes[0])
    return Told(found.verified, found.inliers, ms, found.kind, job.truth and errors(found, job.truth), off)


def errors(found: api.Match, truth: rendered.Scene) -> tuple[float, float, float]:
    """Of a rendered scene: the median distance of true points from epipolar lines, and how far the pose is off."""
    away = math.nan
    if found.fundamental is not None:
        away = float(np.median(epipolar_distance(found.fundamental, *truth.points)))
    if found.pose is None:
        return away, math.nan, math.nan
    (r, t), (true_r, true_t) = found.pose, truth.relative
    turned = math.degrees(math.acos(np.clip((np.trace(r.T @ true_r) - 1) / 2, -1, 1)))
    return away, turned, math.degrees(math.acos(np.clip(t @ true_t, -1, 1)))


@lru_cache(maxsize=64)
def keypoints(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """OpenCV's SIFT as a tutorial takes it, at no more than 3,200 pixels: positions and descriptors."""
    grey = cv2.cvtColor(images.decode(path).pixels, cv2.COLOR_RGB2GRAY)
    factor = min(1.0, 3200 / max(grey.shape))
    small = cv2.resize(grey, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else grey
    found, descriptors = cv2.SIFT_create(4000).detectAndCompute(small, None)
    xy = np.array([k.pt for k in found], np.float64).reshape(-1, 2) / factor
    return xy, descriptors if descriptors is not None else np.zeros((0, 128), np.float32)


def by_ratio(job: Job, ratio: float, mutual: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Correspondences of the tutorial; COLMAP also asks B (its `cross_check`)."""
    (xy_a, a), (xy_b, b) = keypoints(job.a), keypoints(job.b)
    if len(a) < 2 or len(b) < 2:
        return np.zeros((0, 2)), np.zeros((0, 2))
    two = cv2.BFMatcher().knnMatch(a, b, k=2)
    kept = [best for best, rival in two if best.distance < ratio * rival.distance]
    if mutual:
        back = {(m.trainIdx, m.queryIdx) for m in cv2.BFMatcher().match(b, a)}
        kept = [m for m in kept if (m.queryIdx, m.trainIdx) in back]
    return xy_a[[m.queryIdx for m in kept]].reshape(-1, 2), xy_b[[m.trainIdx for m in kept]].reshape(-1, 2)


def tutorial(job: Job, _: str) -> Told:
    """SIFT, ratio 0.75, a homography of at least 10 inliers."""
    a, b = by_ratio(job, 0.75)
    started = time.process_time()
    mask = cv2.findHomography(a, b, cv2.RANSAC, 5.0)[1] if len(a) >= 4 else None
    n = 0 if mask is None else int(mask.sum())
    return Told(n >= 10, n, 1000 * (time.process_time() - started))


def colmap(job: Job, _: str) -> Told:
    """Ratio 0.8, and what COLMAP's mapper would take: a two-view geometry of at least 15 inliers, no watermark."""
    import pycolmap

    a, b = by_ratio(job, 0.8, mutual=True)
    options = pycolmap.TwoViewGeometryOptions(filter_stationary_matches=True)
    options.ransac.random_seed = 0
    cameras = []
    for path in (job.a, job.b):
        h, w = images.check_header(path)
        cameras.append(
            pycolmap.Camera(model="SIMPLE_PINHOLE", width=w, height=h, params=[1.2 * max(h, w), w / 2, h / 2])
        )
    rows = np.stack([np.arange(len(a))] * 2, axis=1).astype(np.uint32)
    started = time.process_time()
    found = pycolmap.estimate_two_view_geometry(cameras[0], a, cameras[1], b, rows, options)
    n = len(found.inlier_matches)
    return Told(n >= 15 and found.config not in (0, 1, 7), n, 1000 * (time.process_time() - started), str(found.config))


def report(jobs: Sequence[Job], told: Sequence[Sequence[Told]], methods: Sequence[str], worst: int) -> None:
    """Print, for each set and label, how many verify; of the wrong ones the bound of false accepts."""
    print(f"{'set':<20} {'label':<10} {'pairs':>6}" + "".join(f"{name:>28}" for name in methods))
    print(f"{'':<38}" + f"{'verified   median ms / max':>28}" * len(methods))
    groups = sorted({(job.of, job.label) for job in jobs}, key=lambda group: (group[1] in WRONG, group))
    for of, label in groups:
        rows = [row for job, row in zip(jobs, told, strict=True) if (job.of, job.label) == (of, label)]
        cells = ""
        for way in range(len(methods)):
            one = [row[way] for row in rows]
            ms = [row.ms for row in one]
            cells += f"{sum(row.verified for row in one):>8} {np.median(ms):>9.1f} / {max(ms):>6.1f}"
        print(f"{of:<20} {label:<10} {len(rows):>6}{cells}")
        wrong = [
            (job, row[0])
            for job, row in zip(jobs, told, strict=True)
            if (job.of, job.label) == (of, label) and row[0].verified != (label in RIGHT)
        ]
        for job, one in wrong[:worst]:
            print(f"    {job.a.name} {job.b.name}: {one.inliers} inliers, {one.kind}")
    for of in sorted({job.of for job in jobs if job.matrix is not None}):
        off, sure = zip(
            *((row[0].off, row[0].verified) for job, row in zip(jobs, told, strict=True) if job.of == of), strict=True
        )
        far = sum(verified and px > NEAR for px, verified in zip(off, sure, strict=True))
        print(
            f"{of}: within {NEAR} px {np.mean(np.array(off) <= NEAR):.3f}, median {np.median(off):.2f} px, AUC@5 "
            f"{metrics.corner_auc(off, 5):.3f}; verified yet further off: {far} of {len(off)}"
        )
    of_scenes = [one for row in told for one in row if one.errors]
    if of_scenes:
        kinds_of = ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(one.kind for one in of_scenes).items()))
        off = np.array([one.errors for one in of_scenes])
        known = np.isfinite(off[:, 1])
        print(
            f"rendered: {kinds_of}; medians: {np.nanmedian(off[:, 0]):.2f} px from epipolar lines; of {known.sum()} "
            f"with a pose {np.median(off[known, 1]):.2f} degrees of rotation, {np.median(off[known, 2]):.2f} of "
            "direction"
        )
    wrong = [(job, row) for job, row in zip(jobs, told, strict=True) if job.label in WRONG]
    if wrong:
        photographs = {path for job, _ in wrong for path in (job.a, job.b)}
        for way, name in enumerate(methods):
            false = sum(row[way].verified for _, row in wrong)
            most = {
                kind: max(row[way].inliers for _, row in wrong if row[way].kind == kind) for kind in kinds(wrong, way)
            }
            by_pairs, by_photographs = bound(false, len(wrong)), bound(min(false, n := len(photographs) // 2), n)
            print(
                f"{name}: {false} of {len(wrong)} wrong pairs accepted, at most {by_pairs:.2%}, by {len(photographs)} "
                f"photographs at most {by_photographs:.1%}; most inliers "
                + ", ".join(f"{n} {kind}".strip() for kind, n in most.items())
            )


def kinds(rows: Sequence[tuple[Job, Sequence[Told]]], way: int) -> list[str]:
    """What a method says of the pairs."""
    return sorted({row[way].kind for _, row in rows})


def bound(false: int, n: int) -> float:
    """The share that is not passed at 95 % (Clopper and Pearson, 1934)."""
    from scipy.stats import beta

    return float(beta.ppf(0.95, false + 1, n - false)) if n > false else math.nan


if __name__ == "__main__":
    main()
