"""What a transformation does to points: where it puts them, how it rotates and enlarges, how far it is off."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np


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


def degenerate(matrix: np.ndarray, points: np.ndarray) -> str:
    """Say why a matrix is no view of a flat scene as far as these points reach ("" if it may be one).

    Beyond them it may be anything: a right homography of a street folds the sky.

    Args:
        matrix: (3, 3) A -> B.
        points: (n, 2) pixels of A; their convex hull is looked at.

    >>> degenerate(np.diag([-1.0, 1, 1]), corners((10, 10)))
    'it mirrors or folds what the two share'
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
    """Measure how far correspondences are from each other's epipolar lines.

    Args:
        fundamental: (3, 3), x_b^T F x_a = 0.
        xy_a, xy_b: (n, 2) pixels.

    Returns:
        (n,) float64 pixels, the mean of the two photographs; NaN at an epipole.

    >>> sideways = np.array([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # the camera moved along its rows
    >>> epipolar_distance(sideways, np.array([[3.0, 5]]), np.array([[9.0, 7]])).tolist()
    [2.0]
    """
    a, b = (np.column_stack([xy, np.ones(len(xy))]) for xy in (xy_a, xy_b))
    in_b, in_a = a @ fundamental.T, b @ fundamental
    off = np.abs((b * in_b).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (off / np.hypot(*in_b[:, :2].T) + off / np.hypot(*in_a[:, :2].T)) / 2


def epipolar_line(fundamental: np.ndarray, xy: np.ndarray, size: tuple[int, int]) -> np.ndarray | None:
    """Give the line of B on which a point of A lies, as far as it crosses B's pixels.

    Args:
        fundamental: (3, 3), x_b^T F x_a = 0; its transpose gives the line of A on which a point of B lies.
        xy: (2,) pixel of A.
        size: (h, w) of B.

    Returns:
        (2, 2) its ends; None where it does not cross B.

    >>> sideways = np.array([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # the camera moved along its rows
    >>> epipolar_line(sideways, np.array([3.0, 5.0]), (10, 20)).tolist()
    [[19.5, 5.0], [-0.5, 5.0]]
    """
    h, w = size
    rim = np.array([[0, 0], [w, 0], [w, h], [0, h]]) - 0.5
    line = fundamental @ [*xy, 1.0]
    off = rim @ line[:2] + line[2]
    following, off_there = np.roll(rim, -1, axis=0), np.roll(off, -1)
    crossed = (off > 0) != (off_there > 0)  # of none or two of the four edges
    share = off[crossed] / (off - off_there)[crossed]
    return rim[crossed] + share[:, None] * (following - rim)[crossed] if crossed.any() else None


def vector_ratios(xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    """Divide the vectors between points in B by those in A: how each is rotated and enlarged.

    Args:
        xy_a, xy_b: (n, 2) pixels.

    Returns:
        (k,) complex, for k <= 3 n pairs of points that a seed draws; the angle of each runs clockwise on the screen.

    >>> xy = np.array([[0.0, 0], [4, 0], [0, 4]])
    >>> vector_ratios(xy, 2 * xy).real.tolist()
    [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    a, b = (np.asarray(xy, np.float64) @ [1, 1j] for xy in (xy_a, xy_b))
    order = np.random.default_rng(0).permutation(len(a))
    pairs = [(order, np.roll(order, shift)) for shift in (1, 2, 3)]  # in all directions
    way_a, way_b = (np.concatenate([xy[i] - xy[j] for i, j in pairs]) for xy in (a, b))
    apart = (way_a != 0) & (way_b != 0)
    return np.asarray(way_b[apart] / way_a[apart])


def median_similarity(xy_a: np.ndarray, xy_b: np.ndarray) -> np.ndarray:
    """Find the similarity A -> B with the median rotation, scale and shift of correspondences of a scene of depth.

    Args:
        xy_a, xy_b: (n, 2) pixels, n >= 2.

    Returns:
        (3, 3) float64; the identity where all points lie in one place.

    >>> xy = np.array([[0.0, 0], [4, 0], [0, 4]])
    >>> np.allclose(median_similarity(xy, 2 * xy + 1), [[2, 0, 1], [0, 2, 1], [0, 0, 1]])
    True
    """
    ratios = vector_ratios(xy_a, xy_b)
    if not len(ratios):
        return np.eye(3)
    middle = np.angle((ratios / np.abs(ratios)).mean())
    angle = middle + np.median(np.angle(ratios * np.exp(-1j * middle)))
    zoomed = np.median(np.abs(ratios)) * np.exp(1j * angle)
    c, s = zoomed.real, zoomed.imag
    linear = np.array([[c, -s], [s, c]])
    shift = np.median(np.asarray(xy_b) - np.asarray(xy_a) @ linear.T, axis=0)
    return np.vstack([np.column_stack([linear, shift]), [0, 0, 1]])


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

    Source: DeTone, Malisiewicz and Rabinovich, "SuperPoint", CVPR workshops 2018.

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

    Source: Mikolajczyk and Schmid, PAMI 2005; as "mean matching accuracy" over pairs: Dusmanu et al., CVPR 2019.

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
