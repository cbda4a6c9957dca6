"""A geometry that knows depth, before it moves into imatch: two photographs -> what explains them.

RootSIFT, the ratio test asked of both photographs, one keypoint in each place; a fundamental matrix and a homography by
PoseLib, classified as COLMAP does. `bench_real.py` judges it beside what imatch does today.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import poselib
from PIL import ExifTags, Image

from imatch.core.types import Tokens
from imatch.data import images
from imatch.features.sift import root_sift
from imatch.matching import matchers
from imatch.matching.geometry import transform

KEYPOINTS, CLOSER, SIDE = 4000, 8000, 3200
"""Keypoints of a first and of a second look, and the longer side in pixels that a photograph is looked at."""
MAX_RATIO = 0.85
"""Of two angles, asked of both photographs; it keeps about as many as Lowe's 0.8 asked of one."""
PLANAR, GENERAL = 10, 15
"""Inliers that verify a plane and a scene of depth, of keypoints matched by ratio: of 529 pairs of unrelated
photographs (the demo's, and a drone's that share no ground; `bench_real.py`) none has more than 4 and 12, at a second
look 13. 15 is COLMAP's number, too."""
FEWEST = 4
"""Correspondences of the smallest sample of a homography; a fundamental matrix wants 8."""
EPIPOLAR = 2 / 3
"""What an epipolar distance may be of a reprojection error: it has one coordinate of the two."""
PLANE = 0.8
"""From this share of the fundamental matrix' inliers on a plane explains them (COLMAP's `max_H_inlier_ratio`)."""
STILL, CELLS, INNER = 3.0, 10, 0.1
"""Pixels that a caption moves by at most; the picture's cells a side, its outermost ring left out; the share of the
inner cells below which what stands still is a caption, a date stamp, a logo or a part of the aircraft: photographs of
one view agree all over."""
AGREEMENT = 0.5
"""Length of the mean direction of rotation of inliers, from 0 (any) to 1 (the same), that a scene of depth has."""
TURNED = 0.03
"""How far K^-1 H K may be from a rotation in any number."""


SHARE = 0.01
"""Inliers that are asked for, in addition, for each correspondence: more of them agree by chance."""
DRAWS = {"max_iterations": 10_000, "success_prob": 0.9999, "seed": 0}
DIAGONAL_35MM = math.hypot(36, 24)
"""Millimetres, which a focal length "in 35 mm film" is for (CIPA DCG-001)."""
MILLIMETRES = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
"""Of EXIF's units of resolution."""


@dataclass(frozen=True)
class Found:
    """What explains a pair.

    Attributes:
        matrix: (3, 3) float64, A (x, y, 1) -> B up to scale; None when none was found. Of kind "general" it is a
            similarity that says roughly where A lies.
        inliers: (m,) bool, which correspondences agree.
        verified: whether the two photographs show the same thing.
        reason: why it is, or is not, verified.
        kind: "planar", "rotation" (of the camera alone), "general" (a scene of depth), "watermark" (only what stands
            still agrees), "degenerate", or "" where nothing was found.
        fundamental: (3, 3) float64, x_b^T F x_a = 0, of kind "general".
        pose: how the camera moved, where focal lengths are known: R (3, 3) and the direction t (3,) of norm 1 (of norm
            0 for a rotation), x_b ~ R x_a + t in coordinates of the cameras (x right, y down, z ahead).
    """

    matrix: np.ndarray | None
    inliers: np.ndarray
    verified: bool
    reason: str
    kind: str = ""
    fundamental: np.ndarray | None = None
    pose: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Pair:
    """Correspondences of two photographs, (m, 2) each, the strongest first; their sizes (h, w), and their focal lengths
    in pixels where known."""

    a: np.ndarray
    b: np.ndarray
    size_a: tuple[int, int]
    size_b: tuple[int, int]
    focal: tuple[float, float] | None = None


def match(a: Path | np.ndarray, b: Path | np.ndarray) -> Found:
    """Match two photographs, files or (h, w, 3) uint8 RGB; what does not verify gets a second look."""
    found = explained(correspondences(a, b, KEYPOINTS))
    if not found.verified and max(len(tokens(side, KEYPOINTS)[0].xy) for side in _hashed(a, b)) >= KEYPOINTS:
        found = explained(correspondences(a, b, CLOSER))
    return found


def correspondences(a: Path | np.ndarray, b: Path | np.ndarray, n: int) -> Pair:
    """Match n keypoints of each photograph."""
    (of_a, size_a), (of_b, size_b) = (tokens(side, n) for side in _hashed(a, b))
    found = matchers.create_matcher("ratio", {"max_ratio": MAX_RATIO, "apart": 0.0})(of_a, of_b)
    focal = None
    if isinstance(a, Path) and isinstance(b, Path):
        both = focal_length(a), focal_length(b)
        focal = (both[0], both[1]) if both[0] and both[1] else None
    return Pair(of_a.xy[found.index_a], of_b.xy[found.index_b], size_a, size_b, focal)


class _Pixels:
    """An array that a cache may hold."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels


def _hashed(*photographs: Path | np.ndarray) -> list[Path | _Pixels]:
    return [one if isinstance(one, Path) else _Pixels(one) for one in photographs]


@lru_cache(maxsize=64)
def tokens(photograph: Path | _Pixels, n: int) -> tuple[Tokens, tuple[int, int]]:
    """The n strongest keypoints with RootSIFT descriptors, found once, in pixels of the photograph; and its (h, w)."""
    pixels = images.decode(photograph).pixels if isinstance(photograph, Path) else photograph.pixels
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    h, w = grey.shape
    factor = min(1.0, SIDE / max(h, w))
    if factor < 1:
        grey = cv2.resize(grey, (round(w * factor), round(h * factor)), interpolation=cv2.INTER_AREA)
    detector = cv2.SIFT_create(nfeatures=n, contrastThreshold=0.02, enable_precise_upscale=True)
    found, descriptors = detector.detectAndCompute(grey, None)
    told = [(-k.response, *k.pt, k.angle, k.size) for k in found]
    order = sorted(range(len(found)), key=told.__getitem__)[:n]
    xy = np.array([found[i].pt for i in order], np.float64).reshape(-1, 2)
    xy = (xy + 0.5) * (w / grey.shape[1], h / grey.shape[0]) - 0.5
    described = root_sift(descriptors[order]) if len(found) else np.zeros((0, 128), np.float32)
    return Tokens(np.ones(1, np.float32), described, xy.astype(np.float32)), (h, w)


def explained(pair: Pair, model: str = "auto", threshold: float = 3.0) -> Found:
    """Say what explains a pair: equal input gives equal bytes.

    Source of the classification: Schönberger and Frahm, "Structure-from-motion revisited", CVPR 2016, section 4.1.

    Args:
        pair: its correspondences.
        model: "auto", or "homography" or "fundamental" alone.
        threshold: reprojection error in pixels of B up to which a correspondence is an inlier; two thirds of it for the
            distance from an epipolar line.
    """
    rows = _distinct(pair.a, pair.b)
    still = _caption(replace(pair, a=pair.a[rows], b=pair.b[rows]))
    used = rows[~still]
    moving = replace(pair, a=np.asarray(pair.a[used], np.float64), b=np.asarray(pair.b[used], np.float64))
    planar = _planar(moving, threshold) if model != "fundamental" else None
    general = _general(moving, threshold) if model != "homography" else None
    if planar is None or general is None:
        found = planar or general
    elif planar.verified == general.verified:
        found = planar if planar.inliers.sum() >= PLANE * general.inliers.sum() else general
    else:
        found = planar if planar.verified else general
    assert found is not None
    inliers = np.zeros(len(pair.a), bool)
    inliers[used[found.inliers]] = True
    found = replace(found, inliers=inliers)
    if still.any() and not found.verified:
        what = "stand still in a small part of the picture, as a caption or a logo does"
        reason = f"{still.sum()} of {len(rows)} correspondences {what}; without them {found.reason}"
        return replace(found, kind="watermark", reason=reason)
    return found


def _planar(pair: Pair, threshold: float) -> Found:
    """What a plane explains."""
    if len(pair.a) < FEWEST:
        return _said(Found(None, np.zeros(len(pair.a), bool), False, ""), PLANAR)
    matrix, told = poselib.estimate_homography(pair.a, pair.b, {"max_reproj_error": threshold, **DRAWS})
    inliers = np.array(told["inliers"], bool)
    if not np.isfinite(matrix).all() or not matrix[2, 2]:
        return _said(Found(None, np.zeros(len(pair.a), bool), False, ""), PLANAR)
    matrix = matrix / matrix[2, 2]
    found = _said(Found(matrix, inliers, False, "", "planar"), PLANAR)
    if found.verified and (flaw := degenerate(matrix, pair.a[inliers]) or _narrow(pair, inliers, threshold)):
        return replace(found, verified=False, kind="degenerate", reason=flaw)
    return replace(found, **_rotation(matrix, pair)) if found.verified and pair.focal else found


def _general(pair: Pair, threshold: float) -> Found:
    """What a scene of depth explains."""
    nothing = _said(Found(None, np.zeros(len(pair.a), bool), False, ""), GENERAL)
    if len(pair.a) < 8:
        return nothing
    options = {"max_epipolar_error": EPIPOLAR * threshold, **DRAWS}
    fundamental, told = poselib.estimate_fundamental(pair.a, pair.b, options)
    inliers = np.array(told["inliers"], bool)
    if inliers.sum() < 8 or not np.isfinite(fundamental).all():
        return nothing
    a, b = pair.a[inliers], pair.b[inliers]
    found = _said(Found(median_similarity(a, b), inliers, False, "", "general", fundamental), GENERAL)
    if found.verified and (flaw := _narrow(pair, inliers, threshold) or _disagreeing(a, b)):
        return replace(found, verified=False, kind="degenerate", reason=flaw)
    return replace(found, pose=_pose(a, b, pair, options)) if found.verified and pair.focal else found


def _pose(a: np.ndarray, b: np.ndarray, pair: Pair, options: dict[str, float]) -> tuple[np.ndarray, np.ndarray] | None:
    """How the camera moved; None where the focal lengths do not explain most of these inliers."""
    cameras = [
        {"model": "SIMPLE_PINHOLE", "width": w, "height": h, "params": [f, (w - 1) / 2, (h - 1) / 2]}
        for (h, w), f in zip((pair.size_a, pair.size_b), pair.focal or (), strict=True)
    ]
    pose, told = poselib.estimate_relative_pose(a, b, *cameras, options)
    if np.sum(told["inliers"]) < PLANE * len(a):
        return None
    return np.array(pose.R), np.array(pose.t) / np.linalg.norm(pose.t)


def _said(found: Found, least: int) -> Found:
    """Whether there are inliers enough, and the reason."""
    n, m = int(found.inliers.sum()), len(found.inliers)
    needed = least + int(SHARE * m)
    return replace(found, verified=n >= needed, reason=f"{n} inliers of {m} correspondences, {needed} are asked for")


def _narrow(pair: Pair, inliers: np.ndarray, threshold: float) -> str:
    """Why inliers fix no geometry ("" if they do): in a photograph they lie in one place or on one line."""
    for xy in (pair.a[inliers], pair.b[inliers]):
        wide, narrow = np.linalg.svd(xy - xy.mean(axis=0), compute_uv=False) / math.sqrt(len(xy))
        if narrow < threshold:
            return f"all {len(xy)} inliers lie {'in one place' if wide < 2 * threshold else 'on one line'}"
    return ""


def _distinct(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The rows that are the first, and so the strongest, at their place in A and in B: a keypoint of several directions
    is no further witness."""
    firsts = (np.unique(np.round(xy, 1), axis=0, return_index=True)[1] for xy in (a, b))
    return np.intersect1d(*firsts)


def _caption(pair: Pair) -> np.ndarray:
    """(n,) bool: what lies at the same pixels of both photographs, if that covers only a small part of them."""
    still = np.linalg.norm(pair.a - pair.b, axis=1) <= STILL
    cells = np.floor(pair.a[still] / (np.array(pair.size_a[::-1]) / CELLS)).astype(int)
    inner = np.unique(cells[((cells > 0) & (cells < CELLS - 1)).all(axis=1)], axis=0)
    small = pair.size_a == pair.size_b and still.sum() > FEWEST and len(inner) < INNER * (CELLS - 2) ** 2
    return still & small


def _disagreeing(a: np.ndarray, b: np.ndarray) -> str:
    """Why inliers are no view of one scene ("" if they are): parallax moves them, but does not rotate them all round.
    A mirror image does, and chance: they have epipolar lines, too."""
    agreement = abs((ratios := way_ratios(a, b)) @ (1 / np.abs(ratios))) / max(1, len(ratios))
    return "" if agreement >= AGREEMENT else f"its {len(a)} inliers agree on no rotation ({agreement:.2f} of 1)"


def _rotation(matrix: np.ndarray, pair: Pair) -> dict[str, Any]:
    """What changes of a planar geometry if a camera that only rotates, about another axis than its own, sees it so."""
    of_a, of_b = (
        np.array([[f, 0, (w - 1) / 2], [0, f, (h - 1) / 2], [0, 0, 1.0]])
        for (h, w), f in zip((pair.size_a, pair.size_b), pair.focal or (), strict=True)
    )
    rays = np.linalg.inv(of_b) @ matrix @ of_a
    rays /= np.cbrt(np.linalg.det(rays))
    u, _, v = np.linalg.svd(rays)
    aside = math.degrees(math.acos(np.clip((u @ v)[2, 2], -1, 1)))
    if np.abs(rays - u @ v).max() > TURNED or aside < 1:
        return {}
    return {"kind": "rotation", "pose": (u @ v, np.zeros(3))}


def degenerate(matrix: np.ndarray, points: np.ndarray) -> str:
    """Why a matrix is no view of a flat scene as far as these points reach ("" if it may be one).

    Beyond them it may be anything: a right homography of a street folds the sky, for the horizon is in the picture.

    Args:
        matrix: (3, 3) A -> B.
        points: (n, 2) pixels of A; their convex hull is looked at.
    """
    if len(points) < 3:
        return ""
    hull = cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)
    w = np.column_stack([hull, np.ones(len(hull))]) @ matrix[2]
    mapped = transform(matrix, hull)
    if not np.isfinite(mapped).all() or (np.sign(w) != np.sign(w[0])).any():
        return "it mirrors or folds what the two share"
    before, after = (cv2.contourArea(xy.astype(np.float32), oriented=True) for xy in (hull, mapped))
    if before * after < 0:
        return "it mirrors or folds what the two share"
    growth = math.sqrt(abs(after / before)) if before else 1.0
    return "" if 1 / 20 < growth < 20 else f"it makes what the two share {growth:.2g} times as large"


def epipolar_distance(fundamental: np.ndarray, xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    """How far correspondences are from each other's epipolar lines: (n,) float64, the mean of the two photographs.

    Args:
        fundamental: (3, 3), x_b^T F x_a = 0.
        xy_a, xy_b: (n, 2) pixels.
    """
    a, b = (np.column_stack([xy, np.ones(len(xy))]) for xy in (xy_a, xy_b))
    in_b, in_a = a @ fundamental.T, b @ fundamental
    off = np.abs((b * in_b).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (off / np.hypot(*in_b[:, :2].T) + off / np.hypot(*in_a[:, :2].T)) / 2


def way_ratios(xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    """How the way between points is rotated and enlarged from A to B, of pairs drawn by a seed: (k,) complex."""
    a, b = (np.asarray(xy, np.float64) @ [1, 1j] for xy in (xy_a, xy_b))
    order = np.random.default_rng(0).permutation(len(a))
    pairs = [(order, np.roll(order, shift)) for shift in (1, 2, 3)]  # in all directions
    way_a, way_b = (np.concatenate([xy[i] - xy[j] for i, j in pairs]) for xy in (a, b))
    apart = (way_a != 0) & (way_b != 0)
    return np.asarray(way_b[apart] / way_a[apart])


def median_similarity(xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    """The similarity A -> B that correspondences of a scene of depth have in the middle: (3, 3) float64.

    Rotation and scale are the medians over pairs of points, the shift is that of the median point.

    Args:
        xy_a, xy_b: (n, 2) pixels, n >= 2.
    """
    ratios = way_ratios(xy_a, xy_b)
    if not len(ratios):
        return np.eye(3)
    middle = np.angle((ratios / np.abs(ratios)).mean())
    angle = middle + np.median(np.angle(ratios * np.exp(-1j * middle)))
    zoomed = np.median(np.abs(ratios)) * np.exp(1j * angle)
    c, s = zoomed.real, zoomed.imag
    linear = np.array([[c, -s], [s, c]])
    shift = np.median(np.asarray(xy_b) - np.asarray(xy_a) @ linear.T, axis=0)
    return np.vstack([np.column_stack([linear, shift]), [0, 0, 1]])


@lru_cache(maxsize=4096)
def focal_length(path: Path) -> float | None:
    """Read the focal length in pixels of the photograph in full; None where its EXIF does not say it.

    That is the length in 35 mm film by the diagonal, else the length in millimetres by the pixels of a millimetre of
    the sensor. A photograph that was cropped afterwards says what was true before.
    """
    try:
        with Image.open(path) as photograph:
            size, exif = photograph.size, photograph.getexif().get_ifd(ExifTags.IFD.Exif)
        tags = {name: _number(exif.get(ExifTags.Base[name])) for name in _READ}
    except (OSError, ValueError, SyntaxError):  # a broken header says nothing; decoding names it
        return None
    if tags["FocalLengthIn35mmFilm"]:
        return tags["FocalLengthIn35mmFilm"] / DIAGONAL_35MM * math.hypot(*size)
    unit = MILLIMETRES.get(int(tags["FocalPlaneResolutionUnit"] or 2))
    if not (tags["FocalLength"] and tags["FocalPlaneXResolution"] and unit):
        return None
    taken = max(tags["ExifImageWidth"], tags["ExifImageHeight"]) or max(size)
    return tags["FocalLength"] * tags["FocalPlaneXResolution"] / unit * max(size) / taken


_READ = (
    "FocalLengthIn35mmFilm",
    "FocalLength",
    "FocalPlaneXResolution",
    "FocalPlaneResolutionUnit",
    "ExifImageWidth",
    "ExifImageHeight",
)


def _number(value: object) -> float:
    """0 for what is not there, or not a number that counts."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError):
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
