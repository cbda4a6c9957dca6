"""Correspondences -> the transformation that explains them, and what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import cv2
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from imatch.core import config
from imatch.core.types import Geometry, ImatchError

MODELS = {"off": 1, "similarity": 2, "affine": 3, "homography": 4}
"""The models, and how many correspondences the smallest sample of each needs."""
METHODS = {"accurate": cv2.USAC_ACCURATE, "magsac": cv2.USAC_MAGSAC, "ransac": cv2.RANSAC}
"""The robust estimators, by OpenCV's number."""
FEWEST = 4
"""Fewer inliers than this say nothing, whatever `min_inliers` is: any two points fit a similarity."""


@dataclass(frozen=True)
class Estimator:
    """Robust estimation with OpenCV. Every method has a seed of its own, so equal input gives equal bytes.

    Attributes:
        model: "off", "similarity" (4 degrees of freedom), "affine" (6) or "homography" (8).
        method: "accurate" (USAC_ACCURATE: LO-RANSAC with graph cut; Ivashechkin, Barath and Matas, "USACv20", 2021),
            "magsac" (Barath et al., "MAGSAC++", CVPR 2020) or "ransac" (Fischler and Bolles, CACM 1981; with local
            refinement; many times slower where most correspondences are wrong). "auto" is accurate, but ransac
            for a similarity, for which OpenCV has no other.
        threshold: reprojection error in pixels of B up to which a correspondence is an inlier, above 0.
        confidence: wanted probability that the best sample was found, in (0, 1).
        iterations: at most so many samples.
        min_inliers, min_share: verified takes more than min_inliers + min_share * n inliers, where n counts the
            correspondences that the transformation puts inside B. The form is Brown and Lowe's ("Automatic
            panoramic image stitching using invariant features", IJCV 2007; they use 8 and 0.3). With mutual
            neighbours and no ratio test true pairs of vegetation keep as few as a tenth of theirs, wrong ones
            hardly reach 8, so the share is 0.1. Fewer than 4 inliers are never enough.

    Raises:
        ImatchError: unknown model or method, a method that the model does not have, or a number out of its range.

    >>> xy = np.random.default_rng(0).uniform(0, 99, (40, 2))
    >>> geometry = Estimator(model="similarity")(xy, 2 * xy + 5, (100, 100), (210, 210))
    >>> geometry.verified, geometry.matrix.round(3).tolist()
    (True, [[2.0, 0.0, 5.0], [-0.0, 2.0, 5.0], [0.0, 0.0, 1.0]])
    """

    model: str = "homography"
    threshold: PositiveFloat = 3.0
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    iterations: PositiveInt = 10_000
    min_inliers: NonNegativeInt = 8
    min_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    method: str = "auto"

    def __post_init__(self) -> None:
        config.check(self)
        if self.model not in MODELS:
            raise ImatchError(f"geometry {self.model!r} is not known: use {', '.join(MODELS)}")
        if self.method not in ("auto", *METHODS):
            raise ImatchError(f"method {self.method!r} is not known: use auto, {', '.join(METHODS)}")
        if self.model == "similarity" and self.method not in ("auto", "ransac"):
            raise ImatchError(
                f"OpenCV estimates a similarity by ransac, not by {self.method}: use method auto, or another model"
            )

    def __call__(
        self, xy_a: np.ndarray, xy_b: np.ndarray, size_a: tuple[int, int], size_b: tuple[int, int]
    ) -> Geometry:
        """Estimate A -> B.

        Args:
            xy_a: (m, 2) pixels in A.
            xy_b: (m, 2) pixels in B, row by row the partners.
            size_a, size_b: (h, w) of the two; A's outline must stay an outline in B.

        Returns:
            The geometry; `verified` says whether to believe it, `reason` why.
        """
        m = len(xy_a)
        nothing = np.zeros(m, bool)
        if self.model == "off":
            return Geometry(None, nothing, math.nan, False, "geometry is off")
        if m < MODELS[self.model]:
            return Geometry(None, nothing, math.nan, False, f"{m} correspondences are too few for {self.model}")
        matrix, inliers = self._estimate(np.asarray(xy_a, np.float64), np.asarray(xy_b, np.float64))
        if matrix is None or not np.isfinite(matrix).all():
            return Geometry(None, nothing, math.nan, False, f"no {self.model} found")
        mapped = transform(matrix, xy_a)
        distance = np.linalg.norm(mapped - xy_b, axis=1)
        n = int(inliers.sum())
        error = float(distance[inliers].mean()) if n else math.nan
        flaw = degenerate(matrix, size_a)
        if flaw:
            return Geometry(matrix, inliers, error, False, flaw)
        shared = int(((mapped >= -0.5) & (mapped <= np.array(size_b[::-1]) - 0.5)).all(axis=1).sum())
        if n < FEWEST:
            return Geometry(matrix, inliers, error, False, f"{n} inliers are fewer than {FEWEST}")
        needed = self.min_inliers + self.min_share * shared
        said = f"{n} inliers of {shared} correspondences in the shared area"
        return Geometry(
            matrix, inliers, error, n > needed, f"{said}, {'more' if n > needed else 'not more'} than {needed:.1f}"
        )

    @property
    def _robust(self) -> str:
        """The method that "auto" stands for."""
        if self.method != "auto":
            return self.method
        return "ransac" if self.model == "similarity" else "accurate"

    def _estimate(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        estimate = {
            "similarity": cv2.estimateAffinePartial2D,
            "affine": cv2.estimateAffine2D,
            "homography": cv2.findHomography,
        }[self.model]
        found, mask = estimate(
            a,
            b,
            method=METHODS[self._robust],
            ransacReprojThreshold=self.threshold,
            maxIters=self.iterations,
            confidence=self.confidence,
        )
        inliers = np.zeros(len(a), bool) if mask is None else mask.ravel().astype(bool)
        if found is not None and len(found) == 2:
            found = np.vstack([found, [0, 0, 1]])
        return found, inliers


def transform(matrix: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Map points by a (3, 3) matrix.

    >>> transform(np.diag([2.0, 3, 1]), np.array([[1.0, 1]])).tolist()
    [[2.0, 3.0]]
    """
    mapped = np.column_stack([xy, np.ones(len(xy))]) @ matrix.T
    with np.errstate(divide="ignore", invalid="ignore"):  # a point on the horizon is at infinity
        return mapped[:, :2] / mapped[:, 2:]


def corners(size: tuple[int, int]) -> np.ndarray:
    """The centres of a photograph's four corner pixels, clockwise from the top left: (4, 2).

    >>> corners((3, 5)).tolist()
    [[0.0, 0.0], [4.0, 0.0], [4.0, 2.0], [0.0, 2.0]]
    """
    h, w = size
    return np.array([[0.0, 0], [w - 1, 0], [w - 1, h - 1], [0, h - 1]])


def degenerate(matrix: np.ndarray, size: tuple[int, int]) -> str:
    """Why a matrix is no view of a flat scene ("" if it may be one): a mirrored, folded or collapsed outline.

    >>> degenerate(np.diag([-1.0, 1, 1]), (10, 10))
    'the outline is mirrored or folded'
    """
    outline = transform(matrix, corners(size))
    w = np.column_stack([corners(size), np.ones(4)]) @ matrix[2]
    edges = np.roll(outline, -1, axis=0) - outline
    after = np.roll(edges, -1, axis=0)
    turns = edges[:, 0] * after[:, 1] - edges[:, 1] * after[:, 0]
    if not np.isfinite(outline).all() or (np.sign(w) != np.sign(w[0])).any() or (turns <= 0).any():
        return "the outline is mirrored or folded"
    x, y = outline.T
    area = 0.5 * abs(x @ np.roll(y, -1) - y @ np.roll(x, -1))
    growth = math.sqrt(area / (size[0] * size[1]))
    if not 1 / 20 < growth < 20:
        return f"the outline is {growth:.2g} times as large: collapsed or blown up"
    return ""


def rotation_scale(matrix: np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """How much A is turned and enlarged in B, at the centre of A.

    Returns:
        angle in degrees counter-clockwise in (-180, 180], and scale (1 is equal size).

    >>> rotation_scale(np.array([[0.0, 2, 0], [-2, 0, 0], [0, 0, 1]]), (10, 10))
    (90.0, 2.0)
    """
    centre = (np.array([size[1], size[0]]) - 1) / 2
    step = 0.5
    around = centre + step * np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    right, down, left, up = transform(matrix, around)
    jacobian = np.column_stack([right - left, down - up]) / (2 * step)
    angle = math.degrees(math.atan2(jacobian[0, 1] - jacobian[1, 0], jacobian[0, 0] + jacobian[1, 1]))
    return angle, math.sqrt(abs(np.linalg.det(jacobian)))


def corner_error(estimate: np.ndarray, truth: np.ndarray, size: tuple[int, int]) -> float:
    """Mean distance in pixels of B between A's corners mapped by the estimate and by the truth.

    Source: DeTone, Malisiewicz and Rabinovich, "SuperPoint", CVPR workshops 2018 (homography estimation on HPatches).

    >>> corner_error(np.eye(3), np.array([[1.0, 0, 3], [0, 1, 4], [0, 0, 1]]), (10, 10))
    5.0
    """
    difference = transform(estimate, corners(size)) - transform(truth, corners(size))
    error = float(np.linalg.norm(difference, axis=1).mean())
    return error if math.isfinite(error) else math.inf


def matching_accuracy(
    xy_a: np.ndarray, xy_b: np.ndarray, truth: np.ndarray, pixels: Sequence[float]
) -> list[float] | None:
    """The share of correspondences that lie within so many pixels of where the truth puts them.

    Source: Mikolajczyk and Schmid, "A performance evaluation of local descriptors", PAMI 2005; as "mean matching
    accuracy" over pairs: Dusmanu et al., "D2-Net", CVPR 2019.

    Args:
        xy_a, xy_b: (m, 2) correspondences in pixels of A and of B.
        truth: (3, 3) A -> B.
        pixels: thresholds, in pixels of B.

    Returns:
        A share for each threshold; None without correspondences.

    >>> xy = np.zeros((2, 2))
    >>> matching_accuracy(xy, np.array([[0.0, 2], [0, 4]]), np.eye(3), [1, 3, 5])
    [0.0, 0.5, 1.0]
    """
    if not len(xy_a):
        return None
    away = np.linalg.norm(transform(truth, xy_a) - xy_b, axis=1)
    return [float((away <= limit).mean()) for limit in pixels]


def turned_apart(angle: float, other: float) -> float:
    """How far two directions lie apart, in degrees from 0 to 180.

    >>> turned_apart(-170, 170)
    20.0
    """
    return abs((angle - other + 180.0) % 360.0 - 180.0)
