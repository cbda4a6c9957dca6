"""Finer positions: planted shifts between patches and between pixels."""

from functools import cache

import cv2
import numpy as np
import pytest

from imatch.core.types import Matches, Tokens, grid_xy
from imatch.matching import geometry, refine
from tests.leaves import dead_leaves


@cache
def leaves(seed=0):
    return cv2.GaussianBlur(dead_leaves(seed, 240), None, 1)


def moved(x, y, scale=1.0):
    return np.array([[scale, 0, x], [0, scale, y], [0, 0, 1]])


def smooth(xy, grid=None):
    """Tokens whose descriptors change smoothly with the position, as those of overlapping patches do."""
    rng = np.random.default_rng(0)
    phase = np.asarray(xy, float) @ rng.normal(0, 1 / 25, (2, 256)) + rng.uniform(0, 2 * np.pi, 256)
    return Tokens(np.ones(1), np.cos(phase).astype("f4"), np.asarray(xy, "f4"), grid)


def nearest(a, b):
    away = np.linalg.norm(a.xy[:, None] - b.xy, axis=2)
    rows = np.arange(len(a.xy))
    return Matches(rows, away.argmin(axis=1), np.ones(len(rows), "f4"))


def test_patches_are_refined_between_their_centres():
    b = smooth(grid_xy((10, 12), (160, 192)), (10, 12))
    a = smooth(np.random.default_rng(1).uniform(32, 120, (50, 2)))
    matches = nearest(a, b)
    before, after = (
        np.linalg.norm(xy - a.xy, axis=1).mean() for xy in (b.xy[matches.index_b], refine.by_patch(a, b, matches))
    )
    assert after < before / 2


def test_the_border_of_the_grid_does_not_pull_inwards():
    b = smooth(grid_xy((3, 6), (48, 96)), (3, 6))
    a = smooth(b.xy)
    refined = refine.by_patch(a, b, nearest(a, b))
    rows, columns = np.divmod(np.arange(18), 6)
    edge = (rows == 0) | (rows == 2)
    assert refined[edge, 1] == pytest.approx(b.xy[edge, 1])
    edge = (columns == 0) | (columns == 5)
    assert refined[edge, 0] == pytest.approx(b.xy[edge, 0])
    assert np.abs(refined - b.xy).max() < 1


@pytest.mark.parametrize("grid", [(1, 1), None], ids=str)
def test_what_has_no_neighbours_stays(grid):
    b = smooth([[7.5, 7.5]], grid)
    assert refine.by_patch(b, b, nearest(b, b)).tolist() == [[7.5, 7.5]]
    none = np.zeros(0, np.int64)
    assert refine.by_patch(b, b, Matches(none, none, np.zeros(0, "f4"))).shape == (0, 2)


@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_pixels_are_found_between_pixels(scale):
    size = (round(240 * scale), round(240 * scale))
    truth = geometry.transform(moved(4.3 * scale, -2.6 * scale), np.zeros((1, 2)))[0]
    truth = moved(*truth, scale)
    b = cv2.warpAffine(
        cv2.GaussianBlur(leaves(), None, max(0.1, 0.5 / scale)), truth[:2], size, borderMode=cv2.BORDER_REFLECT_101
    )
    a = np.random.default_rng(1).uniform(60, 180, (60, 2))
    first = moved(*(truth[:2, 2] + [5 * scale, -4 * scale]), scale)
    start = geometry.transform(first, a)
    xy, found = refine.by_pixels(leaves(), b, a, start, first)
    error = np.linalg.norm(xy - geometry.transform(truth, a), axis=1) / max(1, scale)
    assert found.mean() > 0.8
    assert np.median(error[found]) < 0.1
    assert (xy[~found] == start[~found].astype("f4")).all()
    again, _ = refine.by_pixels(leaves(), b, a, start, first)
    assert again.tobytes() == xy.tobytes()


def test_what_lies_outside_or_is_flat_is_not_found():
    outside, found = refine.by_pixels(leaves(), leaves(), np.array([[5.0, 5]]), np.array([[1.0, 2]]), moved(-400, 0))
    assert not found.any()
    assert outside.tolist() == [[1, 2]]
    flat = np.full((100, 120, 3), 90, np.uint8)
    assert not refine.by_pixels(flat, flat, np.array([[50.0, 50]]), np.array([[50.0, 50]]), np.eye(3))[1].any()
    assert refine.by_pixels(flat, flat, np.zeros((0, 2)), np.zeros((0, 2)), np.eye(3))[0].shape == (0, 2)


def test_other_pictures_are_seldom_found():
    xy = grid_xy((15, 15), (240, 240))
    _, same = refine.by_pixels(leaves(), leaves(), xy, xy, moved(2, 1))
    _, wrong = refine.by_pixels(leaves(), leaves(7), xy, xy, moved(2, 1))
    assert wrong.mean() < same.mean() / 3
