"""Correspondences -> what explains them: a plane, a camera that only rotates, a scene of depth, or nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import cv2
import numpy as np
import poselib
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from imatch.core import config
from imatch.core.types import Geometry, ImatchError, PhotographError
from imatch.matching.geometry import degenerate, epipolar_distance, median_similarity, transform, vector_ratios

MODELS = ("auto", "homography", "fundamental", "affine", "similarity", "off")
METHODS = {"accurate": cv2.USAC_ACCURATE, "magsac": cv2.USAC_MAGSAC, "ransac": cv2.RANSAC}
"""The robust estimators of OpenCV, by its number."""
FEWEST, SAMPLE = 4, 8
"""Fewer inliers say nothing, for any two points fit a similarity; the smallest sample of a fundamental matrix."""
PLANAR, GENERAL = 10, 15
"""Inliers that verify a plane and a scene of depth, of keypoints matched by ratio: of 529 pairs of unrelated
photographs (the demo's, and a drone's that share no ground; `bench_real.py`) none has more than 4 and 12, at a second
look 13. 15 is COLMAP's number, too."""
SURE = 2 * GENERAL
"""Inliers from which on a pose is stated: of 21 between a drone's frames 6 were wrong, and it was off by 90 degrees."""
EPIPOLAR = 2 / 3
"""What an epipolar distance may be of a reprojection error: it has one coordinate of the two."""
PLANE = 0.8
"""From this share of the fundamental matrix' inliers on a plane explains them (COLMAP's `max_H_inlier_ratio`)."""
CELLS, PART, SMALL = 10, 0.5, 0.1
"""The picture's cells a side; the share of the inner cells with anything in them below which what stands still may be
a caption or a part of the aircraft, and below which it is one, where pixels cannot be asked."""
SIDE, TEXTURED, ALIKE, UNLIKE = 160, 6.0, 0.1, 0.12
"""Thumbnails' pixels a side; the deviation in grey levels of a cell that shows something; the correlation of two that
may show the same; the share of others from which on two photographs are not of one view: copies, however dark or
coarse, have 0.07 at most, strangers 0.14 at least, whatever frame or display they share."""
AGREEMENT = 0.5
"""Length of the mean direction of rotation of inliers, from 0 (any) to 1 (the same), that a scene of depth has."""
TURNED = 0.03
"""How far K^-1 H K may be from a rotation in any number."""


@dataclass(frozen=True)
class GeometryOptions:
    """What two photographs must agree on.

    Attributes:
        model: "auto" is a homography or, of a scene with depth, a fundamental matrix; or "similarity", "affine",
            "homography", "fundamental", "off".
        method: robust estimator of planar models: "auto", "poselib", "accurate", "magsac" or "ransac".
        threshold: reprojection error of an inlier in pixels; 0 is half a patch on a grid, else 3.
        confidence: wanted probability that the best sample was found.
        iterations: at most so many samples.
        min_inliers: a pair is verified by so many inliers; 0 is 10 on a plane, 15 where there is depth, 20 of grids;
        min_share: and by this share of its matches more; 0 is 0.01 by ratio or lighterglue, else 0.1, 0.3 on a grid.

    Raises:
        ImatchError: unknown model or method, a method that the model does not have, or a number out of its range.
    """

    model: str = "auto"
    method: str = "auto"
    threshold: NonNegativeFloat = 0.0
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    iterations: PositiveInt = 10_000
    min_inliers: NonNegativeInt = 0
    min_share: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        config.check(self, "geometry")
        if self.model not in MODELS:
            raise ImatchError(config.unknown("model", self.model, MODELS))
        if self.method != "auto" and self.method not in _methods(self.model):
            known = ", ".join(_methods(self.model))
            raise ImatchError(f"{self.model} is estimated by {known}, not by {self.method!r}: use method auto")


Photographs = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Gives the pixels of A and of B, upright (h, w, 3) uint8 RGB in full size, once they are wanted."""


@dataclass(frozen=True)
class _Points:
    """Correspondences (m, 2) float64, the strongest first, and what else `Estimator` is told."""

    a: np.ndarray
    b: np.ndarray
    size_a: tuple[int, int]
    size_b: tuple[int, int]
    focal: tuple[float, float] | None


@dataclass(frozen=True)
class Estimator(GeometryOptions):
    """Robust estimation by PoseLib and OpenCV. Every method has a seed of its own, so equal input gives equal bytes.

    Source of the classification: Schönberger and Frahm, "Structure-from-motion revisited", CVPR 2016, section 4.1.

    Attributes:
        model: "auto" is a homography where it explains what a fundamental matrix does, else that.
        method: "auto" is "poselib" for a homography (LO-RANSAC; Larsson, "PoseLib", 2020), "ransac" for a similarity,
            for which OpenCV has no other, "accurate" for an affine one (USAC_ACCURATE: LO-RANSAC with graph cut;
            Ivashechkin, Barath and Matas, "USACv20", 2021). "magsac" is of Barath et al., "MAGSAC++", CVPR 2020.
            Fundamental matrices are always PoseLib's.
        threshold: reprojection error in pixels of B up to which a correspondence is an inlier, above 0; from an
            epipolar line it is two thirds of that.
        min_inliers, min_share: verified takes min_inliers + min_share * n inliers, where n counts the correspondences,
            of a planar model those that it puts inside B. The form is Brown and Lowe's (IJCV 2007; they use 8 and 0.3).
            min_inliers 0 is 10 for planar models and 15 for the fundamental one, both times `caution`.
        caution: how many times as many inliers the correspondences have by chance as those of the ratio test.

    >>> xy = np.random.default_rng(0).uniform(0, 99, (40, 2))
    >>> found = Estimator()(xy, 2 * xy + 5, (100, 100), (210, 210))
    >>> found.verified, found.kind, found.matrix.round(3).tolist()
    (True, 'planar', [[2.0, 0.0, 5.0], [0.0, 2.0, 5.0], [0.0, 0.0, 1.0]])
    """

    threshold: PositiveFloat = 3.0
    min_share: Annotated[float, Field(ge=0, lt=1)] = 0.01
    caution: PositiveFloat = 1.0

    def __call__(
        self,
        xy_a: np.ndarray,
        xy_b: np.ndarray,
        size_a: tuple[int, int],
        size_b: tuple[int, int],
        focal: tuple[float, float] | None = None,
        everywhere: np.ndarray | None = None,
        photographs: Photographs | None = None,
    ) -> Geometry:
        """Estimate A -> B.

        Args:
            xy_a: (m, 2) pixels in A, the strongest correspondence first.
            xy_b: (m, 2) pixels in B, row by row the partners.
            size_a, size_b: (h, w) of the two.
            focal: their focal lengths in pixels, where known.
            everywhere: (n, 2) where A and B have local descriptors at all, from 0 to 1 across the photograph; None
                stands for all over it.
            photographs: asked once something stands still in a part of that alone, which is a caption unless the rest
                agrees, too. None, or where they cannot be read: a small part is a caption.
        """
        if self.model == "off":
            return Geometry(None, np.zeros(len(xy_a), bool), math.nan, False, "geometry is off")
        a, b = (np.asarray(xy, np.float64) for xy in (xy_a, xy_b))
        whole = _Points(a, b, size_a, size_b, focal)
        rows = _distinct(a, b)
        found, near = self._of(whole, rows), self.threshold
        still, part = _standing(whole, rows, everywhere, near)
        if 2 * found.inliers[rows[still]].sum() < found.inliers.sum():
            return found  # these few stand still by chance
        if part >= PART:  # so seems what moved by a pixel or two
            near /= 3
            still, finer = _standing(whole, rows, everywhere, near)
            if finer >= PART:
                return found
        rest = self._of(whole, rows[~still])
        told_apart = part < PART or rest.error < near / 2  # centres of patches are not exact to a pixel
        if rest.verified and told_apart and not _explains(rest, whole, rows[still], near):
            return rest
        agreeing = found.inliers[rows]
        alike = part >= SMALL or agreeing[still].sum() < agreeing[~still].sum()
        if photographs and found.verified and part < PART:
            with contextlib.suppress(PhotographError):  # one is gone or broken by now
                alike = _agree(*photographs(), found.matrix, whole, rows[still])
        if alike:
            return found
        told = f"{still.sum()} of {len(rows)} correspondences stand still in one part of the picture"
        reason = f"{told}, as a caption, a logo or a frame does; without them {rest.reason}"
        return replace(rest, verified=False, kind="watermark", reason=reason)

    def _of(self, points: _Points, rows: np.ndarray) -> Geometry:
        """What explains these rows, and which of all agree with it."""
        found = self._explained(replace(points, a=points.a[rows], b=points.b[rows]))
        inliers = np.zeros(len(points.a), bool)
        inliers[rows[found.inliers]] = True
        return replace(found, inliers=inliers)

    def _explained(self, points: _Points) -> Geometry:
        if self.model != "auto":
            return self._general(points) if self.model == "fundamental" else self._planar(points, self.model)
        planar = self._planar(points, "homography")
        if planar.verified and planar.inliers.sum() >= PLANE * len(points.a):  # a scene of depth cannot have more
            return planar
        general = self._general(points)
        if planar.verified != general.verified:
            return planar if planar.verified else general
        return planar if planar.inliers.sum() >= PLANE * general.inliers.sum() else general

    def _planar(self, points: _Points, model: str) -> Geometry:
        """What a plane explains."""
        m = len(points.a)
        if m < FEWEST:
            return self._judged(None, np.zeros(m, bool), m)
        matrix, inliers = self._estimated(points.a, points.b, model)
        if matrix is None or not np.isfinite(matrix).all() or not inliers.any():
            return self._judged(None, np.zeros(m, bool), m)
        mapped = transform(matrix, points.a)
        shared = ((mapped >= -0.5) & (mapped <= np.array(points.size_b[::-1]) - 0.5)).all(axis=1)
        found = self._judged(matrix, inliers, int((shared | inliers).sum()))
        found = replace(found, error=float(np.linalg.norm(mapped - points.b, axis=1)[inliers].mean()))
        if found.verified and (flaw := degenerate(matrix, points.a[inliers]) or self._narrow(points, inliers)):
            return replace(found, verified=False, kind="degenerate", reason=flaw)
        return _rotation(found, matrix, points) if found.verified and points.focal else found

    def _general(self, points: _Points) -> Geometry:
        """What a scene of depth explains."""
        m = len(points.a)
        options = {**self._draws, "max_epipolar_error": EPIPOLAR * self.threshold}
        fundamental, inliers = None, np.zeros(m, bool)
        if m >= SAMPLE:
            fundamental, told = poselib.estimate_fundamental(points.a, points.b, options)
            inliers = np.array(told["inliers"], bool)
        if fundamental is None or inliers.sum() < SAMPLE or not np.isfinite(fundamental).all():
            return self._judged(None, np.zeros(m, bool), m, GENERAL)
        a, b = points.a[inliers], points.b[inliers]
        by_chance = 4 * EPIPOLAR * self.threshold / min(points.size_b)  # of a photograph lies so near to a line
        found = self._judged(None, inliers, m, GENERAL, by_chance)
        found = replace(found, error=float(epipolar_distance(fundamental, a, b).mean()))
        about = median_similarity(a, b)
        flaw = self._narrow(points, inliers) or _disagreeing(a, b) or degenerate(about, a)
        if found.verified and flaw:
            return replace(found, verified=False, kind="degenerate", reason=flaw)
        if not found.verified:
            return found
        sure = len(a) >= self.caution * SURE
        pose = _pose(a, b, points, options) if points.focal and sure else None
        return replace(found, matrix=about, fundamental=fundamental, kind="general", pose=pose)

    def _judged(
        self, matrix: np.ndarray | None, inliers: np.ndarray, m: int, least: int = PLANAR, share: float = 0.0
    ) -> Geometry:
        """Whether there are inliers enough, and the reason."""
        n = int(inliers.sum())
        fixed = self.min_inliers or round(self.caution * least)
        needed = max(FEWEST, fixed + int(max(self.min_share, share) * m))
        reason = f"{n} inliers of {m} correspondences, {needed} are needed"
        return Geometry(matrix, inliers, math.nan, n >= needed, reason, "planar" if n >= needed else "")

    def _narrow(self, points: _Points, inliers: np.ndarray) -> str:
        """Why inliers fix no geometry ("" if they do)."""
        for xy in (points.a[inliers], points.b[inliers]):
            wide, narrow = np.linalg.svd(xy - xy.mean(axis=0), compute_uv=False) / math.sqrt(len(xy))
            if narrow < self.threshold:
                where = "in one place" if wide < 2 * self.threshold else "on one line"
                return f"all {len(xy)} inliers lie {where}"
        return ""

    @property
    def _draws(self) -> dict[str, float]:
        return {"max_iterations": self.iterations, "success_prob": self.confidence, "seed": 0}

    def _estimated(self, a: np.ndarray, b: np.ndarray, model: str) -> tuple[np.ndarray | None, np.ndarray]:
        method = _methods(model)[0] if self.method == "auto" else self.method
        if method == "poselib":
            options = {**self._draws, "max_reproj_error": self.threshold}
            matrix, told = poselib.estimate_homography(a, b, options)
            return matrix / (matrix[2, 2] or 1), np.array(told["inliers"], bool)
        estimate = {
            "similarity": cv2.estimateAffinePartial2D,
            "affine": cv2.estimateAffine2D,
            "homography": cv2.findHomography,
        }[model]
        limits = {"maxIters": self.iterations, "confidence": self.confidence}
        limits["ransacReprojThreshold"] = self.threshold
        try:
            found, mask = estimate(a, b, method=METHODS[method], **limits)
        except cv2.error:  # an assertion of OpenCV's USAC, where points fix no matrix
            found, mask = None, None
        inliers = np.zeros(len(a), bool) if mask is None else mask.ravel().astype(bool)
        if found is not None and len(found) == 2:
            found = np.vstack([found, [0, 0, 1]])
        return found, inliers


def _methods(model: str) -> tuple[str, ...]:
    """What estimates a model, the best first."""
    return {
        "similarity": ("ransac",),
        "affine": tuple(METHODS),
        "fundamental": ("poselib",),
    }.get(model, ("poselib", *METHODS))


def _distinct(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rows that are the first at their place in A and in B: keypoints of several directions count once."""
    firsts = (np.unique(np.round(xy, 1), axis=0, return_index=True)[1] for xy in (a, b))
    return np.intersect1d(*firsts)


def _standing(
    points: _Points, rows: np.ndarray, everywhere: np.ndarray | None, near: float
) -> tuple[np.ndarray, float]:
    """Which of these rows keep their place, and in what part of the picture; 1 where they are too few to matter.

    A place is counted from an edge or from the middle, in pixels or as the photograph's size.
    """
    sizes = [np.array(size[::-1], float) for size in (points.size_a, points.size_b)]
    a, b = points.a[rows], points.b[rows]
    still = np.zeros(len(rows), bool)
    for scale in {1.0, *(sizes[1] / sizes[0])}:
        off = [np.abs(b - share * sizes[1] - scale * (a - share * sizes[0])) for share in (0, 0.5, 1)]
        still |= (np.min(off, axis=0) <= near).all(axis=1)
    if still.sum() <= FEWEST:
        return still, 1.0
    all_over = (CELLS - 2) ** 2 if everywhere is None else _inner_cells(everywhere)
    covered = max(_inner_cells(xy[still] / size) for xy, size in zip((a, b), sizes, strict=True))
    return still, covered / max(1, all_over)


def _explains(found: Geometry, points: _Points, rows: np.ndarray, near: float) -> bool:
    """Whether a geometry puts most of these rows where they are, or as near to that as its own inliers on a grid."""
    if found.matrix is None:
        return False
    off = np.linalg.norm(transform(found.matrix, points.a) - points.b, axis=1)
    return bool(np.median(off[rows]) <= max(near, 2 * np.median(off[found.inliers])))


def _inner_cells(xy: np.ndarray) -> int:
    """In how many cells of a photograph, its outermost ring left out, these points lie, from 0 to 1 across it."""
    cells = np.floor(xy * CELLS).astype(int)
    return len(np.unique(cells[((cells > 0) & (cells < CELLS - 1)).all(axis=1)], axis=0))


def _agree(a: np.ndarray, b: np.ndarray, matrix: np.ndarray | None, points: _Points, rows: np.ndarray) -> bool:
    """Whether A, mapped by a matrix, looks like B wherever the two show something and none of these rows lies."""
    a, b = (
        cv2.cvtColor(cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for one in (a, b)
    )
    into = [np.diag([SIDE / w, SIDE / h, 1]) for h, w in (points.size_a, points.size_b)]
    onto = into[1] @ (np.eye(3) if matrix is None else matrix) @ np.linalg.inv(into[0])
    mapped, shared = (cv2.warpPerspective(one, onto, (SIDE, SIDE)) for one in (a, np.ones_like(a)))
    away = _in_cells(shared).min(axis=2) > 0
    x, y = (points.b[rows] / points.size_b[::-1] * CELLS).astype(int).clip(0, CELLS - 1).T
    away[y, x] = False
    of_a, of_b = (cells - cells.mean(axis=2, keepdims=True) for cells in map(_in_cells, (mapped, b)))
    spread = of_a.std(axis=2), of_b.std(axis=2)
    away &= np.maximum(*spread) > TEXTURED
    unlike = away & ((of_a * of_b).mean(axis=2) <= ALIKE * spread[0] * spread[1])
    return bool(unlike.sum() <= max(FEWEST, UNLIKE * away.sum()))


def _in_cells(thumbnail: np.ndarray) -> np.ndarray:
    """(CELLS, CELLS, n) float64: the pixels of each cell."""
    n = SIDE // CELLS
    return thumbnail.astype(np.float64).reshape(CELLS, n, CELLS, n).swapaxes(1, 2).reshape(CELLS, CELLS, n * n)


def _disagreeing(a: np.ndarray, b: np.ndarray) -> str:
    """Why inliers are no view of one scene ("" if they are): chance and mirrors rotate them all round."""
    ratios = vector_ratios(a, b)
    agreement = abs((ratios / np.abs(ratios)).sum()) / max(1, len(ratios))
    if agreement >= AGREEMENT:
        return ""
    return f"its {len(a)} inliers agree on no rotation ({agreement:.2f} of 1)"


def _cameras(points: _Points) -> list[np.ndarray]:
    """(3, 3) of A and of B: the focal lengths, and the middle of each photograph."""
    return [
        np.array([[f, 0, (w - 1) / 2], [0, f, (h - 1) / 2], [0, 0, 1.0]])
        for (h, w), f in zip((points.size_a, points.size_b), points.focal or (), strict=True)
    ]


def _rotation(planar: Geometry, matrix: np.ndarray, points: _Points) -> Geometry:
    """A planar geometry, of kind "rotation" if a camera only rotated, about another axis than its own."""
    of_a, of_b = _cameras(points)
    rays = np.linalg.inv(of_b) @ matrix @ of_a
    rays /= np.cbrt(np.linalg.det(rays))
    u, _, v = np.linalg.svd(rays)
    aside = math.degrees(math.acos(np.clip((u @ v)[2, 2], -1, 1)))
    if np.abs(rays - u @ v).max() > TURNED or aside < 1:
        return planar
    return replace(planar, kind="rotation", pose=(u @ v, np.zeros(3)))


def _pose(
    a: np.ndarray, b: np.ndarray, points: _Points, options: dict[str, float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """How the camera moved (`Geometry.pose`); None where the focal lengths do not explain most inliers."""
    cameras = [
        {"model": "SIMPLE_PINHOLE", "width": w, "height": h, "params": [k[0, 0], k[0, 2], k[1, 2]]}
        for (h, w), k in zip((points.size_a, points.size_b), _cameras(points), strict=True)
    ]
    pose, told = poselib.estimate_relative_pose(a, b, *cameras, options)
    if np.sum(told["inliers"]) < PLANE * len(a):
        return None
    return np.array(pose.R), np.array(pose.t) / np.linalg.norm(pose.t)
