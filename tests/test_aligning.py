"""A pair of photographs from tokens to geometry."""

from functools import cache

import cv2
import numpy as np
import pytest

from imatch.core.types import ImatchError, Tokens
from imatch.data import rotations
from imatch.data.images import Decoded
from imatch.data.references import isometric
from imatch.features.sift import DenseSift, Sift
from imatch.matching import geometry, matchers
from imatch.matching.align import Aligner
from imatch.matching.two_view import Estimator
from tests.leaves import dead_leaves


@cache
def leaves(seed=0):
    return cv2.GaussianBlur(dead_leaves(seed, 320), None, 1)[:304, :320]


def aligner(backbone, refinement="pixel"):
    coarse = 3.0 if isinstance(backbone, Sift) else 8.0
    fine = 3.0 if refinement == "pixel" else coarse
    search = Estimator("similarity", threshold=coarse)
    return Aligner(matchers.create_matcher("mutual"), search, Estimator("homography", threshold=fine), refinement)


def posed(backbone, pixels):
    """The tokens in every pose that the backbone needs."""
    h, w = pixels.shape[:2]
    upright = Decoded(pixels, (h, w), "", None, (0.0, 0.0, float(w), float(h)))
    found = []
    for pose in rotations.poses(1 if isinstance(backbone, Sift) else 8):
        decoded = rotations.turned(upright, pose.turn, backbone.patch)
        (tokens,) = backbone(decoded.pixels[None])
        found.append((pose, rotations.placed(tokens, decoded) if pose.turn else tokens))
    return found


def aligned(backbone, a, b, refinement="pixel"):
    (b_tokens,) = backbone(b[None])
    sizes = a.shape[:2], b.shape[:2]
    return aligner(backbone, refinement)(posed(backbone, a), b_tokens, *sizes, lambda: (a, b))


def few(n, grid=None):
    """n tokens that are all different, on a line."""
    xy = np.column_stack([np.arange(n), np.arange(n)]).astype("f4") * 10
    return Tokens(np.ones(1), np.eye(max(n, 1), 60, dtype="f4")[:n], xy, grid)


@pytest.mark.parametrize("backbone", [Sift(), DenseSift()], ids=["sift", "dsift"])
def test_a_photograph_lies_on_itself(backbone):
    found = aligned(backbone, leaves(), leaves())
    assert found.geometry.verified, found.geometry.reason
    assert geometry.corner_error(found.geometry.matrix, np.eye(3), (304, 320)) < 0.1
    assert found.pose == rotations.UPRIGHT


@pytest.mark.parametrize("backbone", [Sift(), DenseSift()], ids=["sift", "dsift"])
@pytest.mark.parametrize("angle", [30, 90, 200])
def test_a_turned_copy_has_its_angle(backbone, angle):
    view = isometric(leaves(), angle, 1.0)
    pixels = np.ascontiguousarray(view.pixels[:208, :208])
    found = aligned(backbone, pixels, leaves())
    assert found.geometry.verified, found.geometry.reason
    turned, scale = geometry.rotation_scale(found.geometry.matrix, pixels.shape[:2])
    assert geometry.turned_apart(turned, -angle) < 1
    assert scale == pytest.approx(1, abs=0.01)
    assert geometry.corner_error(found.geometry.matrix, np.linalg.inv(view.matrix), (208, 208)) < 1
    again = aligned(backbone, pixels, leaves())
    assert again.geometry.matrix.tobytes() == found.geometry.matrix.tobytes()


def test_every_refinement_is_finer_than_the_one_before():
    view = isometric(leaves(), 0, 0.97)
    pixels = np.ascontiguousarray(view.pixels[5:197, 3:195])
    truth = np.linalg.inv(view.matrix) @ np.array([[1.0, 0, 3], [0, 1, 5], [0, 0, 1]])
    away = []
    for refinement in ("off", "patch", "pixel"):
        found = aligned(DenseSift(), pixels, leaves(), refinement)
        true = found.geometry.inliers
        there = geometry.transform(truth, found.xy_a[true])
        away.append(np.linalg.norm(there - found.xy_b[true], axis=1).mean())
    assert away[2] < away[1] < away[0]
    assert away[2] < 0.2


@pytest.mark.parametrize("backbone", [Sift(), DenseSift()], ids=["sift", "dsift"])
def test_unrelated_photographs_are_refused(backbone):
    found = aligned(backbone, np.ascontiguousarray(leaves(1)[:208, :208]), leaves())
    assert not found.geometry.verified, found.geometry.reason


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("refinement", ["off", "patch", "pixel"])
def test_too_few_correspondences_are_refused_and_said(n, refinement):
    tokens = few(n, grid=(1, n))
    found = aligner(DenseSift(), refinement)(
        [(rotations.UPRIGHT, tokens)], tokens, (99, 99), (99, 99), lambda: (leaves(), leaves())
    )
    assert not found.geometry.verified
    assert found.geometry.reason
    assert len(found.xy_a) == len(found.xy_b) == len(found.geometry.inliers) == n


def test_points_on_a_line_are_no_homography():
    tokens = few(30)
    found = aligner(Sift(), "off")([(rotations.UPRIGHT, tokens)], tokens, (300, 300), (300, 300))
    assert not found.geometry.verified
    assert found.geometry.reason


def test_photographs_are_asked_for_only_when_pixels_are_compared():
    def never():
        pytest.fail("nothing to compare")

    tokens = few(3)
    for refinement in ("off", "patch", "pixel"):  # three points are too few to begin from
        aligner(Sift(), refinement)([(rotations.UPRIGHT, tokens)], tokens, (99, 99), (99, 99), never)


def test_of_equal_poses_the_first_is_kept():
    tokens = few(30)
    found = aligner(Sift(), "off")(
        [(rotations.UPRIGHT, tokens), (rotations.Pose(90), tokens)], tokens, (300, 300), (300, 300)
    )
    assert found.pose == rotations.UPRIGHT


def test_photographs_that_do_not_confirm_are_said():
    tokens = Tokens(np.ones(1), np.eye(40, dtype="f4"), np.random.default_rng(0).uniform(20, 280, (40, 2)).astype("f4"))
    flat = np.full((300, 300, 3), 90, np.uint8)
    found = aligner(Sift())([(rotations.UPRIGHT, tokens)], tokens, (300, 300), (300, 300), lambda: (flat, flat))
    assert not found.geometry.verified
    assert "the photographs do not confirm 40 inliers" in found.geometry.reason


def test_what_cannot_be_done_is_refused():
    search, mutual = Estimator("similarity"), matchers.create_matcher("mutual")
    with pytest.raises(ImatchError, match="starts from a geometry"):
        Aligner(mutual, search, Estimator("off"), "pixel")
