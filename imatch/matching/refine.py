"""Correspondences to a fraction of a patch in the descriptors, and to a fraction of a pixel in the photographs."""

from __future__ import annotations

import math

import cv2
import numpy as np

from imatch.core.types import Matches, Tokens, normalise
from imatch.matching.geometry import rotation_scale, transform

TEMPERATURE = 0.05
"""Of the softmax over the tokens around a partner; the smaller, the nearer to the most similar one."""
WINDOW, LEVELS = 15, 2
"""Side of the square that the flow compares; how often its pyramid halves: it reaches about 30 pixels."""
RETURNS = 1.0
"""By how many pixels of the coarser photograph a point may miss its beginning on the way back."""


def by_patch(a: Tokens, b: Tokens, matches: Matches) -> np.ndarray:
    """Where between the tokens of B's grid each correspondence lies: a soft-argmax of the cosine over the partner and
    its eight neighbours; at the border fewer, for a lopsided window would pull inwards.

    Source: Luvizon, Tabia and Picard, 2019 (soft-argmax); around a coarse match: Sun et al., "LoFTR", CVPR 2021.

    Args:
        a: A's tokens, on a grid or not.
        b: B's tokens. Keypoints lie where they lie: without a grid their positions are the answer.
        matches: between the two.

    Returns:
        (m, 2) float32 pixels of B.

    >>> xy = np.array([[8, 8], [24, 8], [40, 8]], np.float32)
    >>> b = Tokens(np.ones(1), np.array([[0.0, 1], [1, 1], [1, 0]]), xy, grid=(1, 3))
    >>> a = Tokens(np.ones(1), np.array([[1.0, 0.8]]), np.zeros((1, 2)))
    >>> by_patch(a, b, Matches(np.array([0]), np.array([1]), np.ones(1))).astype(int).tolist()
    [[24, 8]]
    """
    if b.grid is None or not len(matches):
        return b.xy[matches.index_b].astype(np.float32)
    h, w = b.grid
    row, column = (place[:, None, None] for place in np.divmod(matches.index_b, w))
    right = np.arange(-1, 2)
    down = right[:, None]
    inside = (abs(down) <= np.minimum(row, h - 1 - row)) & (abs(right) <= np.minimum(column, w - 1 - column))
    window = np.where(inside, (row + down) * w + column + right, 0).reshape(len(matches), -1)
    of_a = normalise(a.descriptors[matches.index_a].astype(np.float32))
    of_b = normalise(b.descriptors.astype(np.float32))
    cosine = np.einsum("md,mwd->mw", of_a, of_b[window])
    score = np.where(inside.reshape(window.shape), cosine / TEMPERATURE, -np.inf)
    weight = np.exp(score - score.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    return np.einsum("mw,mwc->mc", weight, b.xy[window]).astype(np.float32)


def by_pixels(
    photograph_a: np.ndarray,
    photograph_b: np.ndarray,
    xy_a: np.ndarray,
    xy_b: np.ndarray,
    matrix: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Where in B each point of A lies, by optical flow on the photographs, starting where a first geometry puts it.

    What the matrix leaves is tracked at the resolution of the coarser one, by pyramidal Lucas-Kanade (Bouguet, Intel,
    2001), there and back (Kalal, Mikolajczyk and Matas, "Forward-backward error", ICPR 2010).

    Args:
        photograph_a, photograph_b: (h, w, 3) uint8 RGB, of any two sizes.
        xy_a: (m, 2) pixels of A.
        xy_b: (m, 2) pixels of B: the answer for points that are not found.
        matrix: (3, 3) A -> B; from it the flow starts.

    Returns:
        xy_b (m, 2) float32, and found (m,) bool: not outside B, and not where there is no texture.

    >>> noise = np.random.default_rng(0).integers(0, 255, (80, 90, 1), np.uint8)
    >>> b = cv2.GaussianBlur(np.repeat(noise, 3, axis=2), None, 2)
    >>> a, xy = b[4:, 7:], np.array([[40.0, 30.0]])
    >>> there, found = by_pixels(a, b, xy, xy, np.array([[1.0, 0, 5], [0, 1, 3], [0, 0, 1]]))
    >>> there.round(1).tolist(), found.tolist()
    ([[47.0, 34.0]], [True])
    """
    h, w = photograph_b.shape[:2]
    start = transform(matrix, xy_a)
    refined, found = np.array(xy_b, np.float32), ((start >= 0) & (start <= (w - 1, h - 1))).all(axis=1)
    if not found.any():
        return refined, found
    _, scale = rotation_scale(matrix, photograph_a.shape[:2])
    factor = min(1.0, 1 / scale)
    margin = WINDOW * 2**LEVELS
    low = start[found].min(axis=0) * factor - margin
    width, height = np.ceil(start[found].max(axis=0) * factor + margin - low).astype(int) + 1
    frame = np.array([[factor, 0, -low[0]], [0, factor, -low[1]], [0, 0, 1]])  # B -> what is compared
    of_a, of_b = (
        _brought(photograph, into, reduction, (width, height))
        for photograph, into, reduction in (
            (photograph_a, frame @ matrix, 1 / (scale * factor)),
            (photograph_b, frame, 1 / factor),
        )
    )
    rows, here = np.flatnonzero(found), transform(frame, start[found]).astype(np.float32)
    flow = {"winSize": (WINDOW, WINDOW), "maxLevel": LEVELS}
    there, seen, _ = cv2.calcOpticalFlowPyrLK(of_a, of_b, here, None, **flow)
    back, again, _ = cv2.calcOpticalFlowPyrLK(of_b, of_a, there, None, **flow)
    moved = transform(np.linalg.inv(frame), there)
    good = (seen & again).ravel() > 0
    good &= np.linalg.norm(back - here, axis=1) <= RETURNS
    good &= ((moved >= 0) & (moved <= (w - 1, h - 1))).all(axis=1)
    found[rows] = good
    refined[rows[good]] = moved[good]
    return refined, found


def _brought(photograph: np.ndarray, into: np.ndarray, reduction: float, size: tuple[int, int]) -> np.ndarray:
    """A photograph in grey, warped; smoothed first, against aliasing, where it becomes smaller."""
    grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
    if reduction > 1:
        grey = cv2.GaussianBlur(grey, None, max(0.1, 0.5 * math.sqrt(reduction**2 - 1)))
    return cv2.warpPerspective(grey, into, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
