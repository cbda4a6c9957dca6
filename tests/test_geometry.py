"""Correspondences to geometry, on planted transformations."""

import math

import cv2
import numpy as np
import pytest

from imatch.core.types import ImatchError
from imatch.matching import geometry
from imatch.matching.two_view import METHODS, Estimator

SIZE = (300, 400)
TURNED = np.array(
    [[0.8 * math.cos(0.5), 0.8 * math.sin(0.5), 20], [-0.8 * math.sin(0.5), 0.8 * math.cos(0.5), 150], [0, 0, 1]]
)
TILTED = TURNED + np.array([[0.05, 0, 0], [0, 0.1, 0], [0, 0, 0]])
PERSPECTIVE = TILTED + np.array([[0, 0, 0], [0, 0, 0], [2e-4, -1e-4, 0]])


def planted(matrix, n=200, outliers=0.0, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.uniform([0, 0], [399, 299], (n, 2))
    b = geometry.transform(matrix, a) + rng.normal(0, noise, (n, 2))
    wrong = rng.random(n) < outliers
    b[wrong] = rng.uniform([0, 0], [399, 299], (wrong.sum(), 2))
    return a, b, ~wrong


@pytest.mark.parametrize(
    ("model", "matrix"),
    [("similarity", TURNED), ("affine", TILTED), ("homography", PERSPECTIVE)],
    ids=lambda x: str(x)[:9],
)
@pytest.mark.parametrize("outliers", [0.0, 0.6])
def test_planted_transformation_is_found(model, matrix, outliers):
    a, b, true = planted(matrix, 400, outliers)
    found = Estimator(model)(a, b, SIZE, SIZE)
    assert found.verified, found.reason
    assert (found.inliers == true).mean() > 0.97
    assert geometry.corner_error(found.matrix, matrix, SIZE) < 1
    assert found.error < 1
    again = Estimator(model)(a, b, SIZE, SIZE)
    assert again.matrix.tobytes() == found.matrix.tobytes()


@pytest.mark.parametrize("model", ["similarity", "affine", "homography"])
def test_chance_is_not_verified(model):
    for seed in range(10):
        a, b, _ = planted(np.eye(3), 150, outliers=1.0, seed=seed)
        found = Estimator(model)(a, b, SIZE, SIZE)
        assert not found.verified, found.reason


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_too_few_correspondences(n):
    a, b, _ = planted(np.eye(3), n)
    found = Estimator()(a, b, SIZE, SIZE)
    assert found.matrix is None
    assert found.reason == f"0 inliers of {n} correspondences, 10 are needed"
    assert math.isnan(found.error)


@pytest.mark.parametrize("model", ["similarity", "affine", "homography"])
def test_points_on_a_line_or_all_the_same_have_a_clear_answer(model):
    line = np.column_stack([np.linspace(0, 300, 50)] * 2)
    for xy in (line, np.full((50, 2), 7.0)):
        found = Estimator(model)(xy, xy, SIZE, SIZE)
        assert found.reason
        if found.verified:  # a similarity is fixed by two points of the line
            assert geometry.corner_error(found.matrix, np.eye(3), SIZE) < 0.1


def test_off_gives_no_geometry():
    a, b, _ = planted(np.eye(3))
    found = Estimator("off")(a, b, SIZE, SIZE)
    assert found.matrix is None
    assert not found.verified
    assert found.reason == "geometry is off"


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (np.diag([-1.0, 1, 1]), "mirrors or folds"),
        (np.diag([0.01, 0.01, 1]), "0.01 times as large"),
        (np.diag([50.0, 50, 1]), "50 times as large"),
        (np.array([[1, 0, 0], [0, 1, 0], [-0.004, 0, 1]]), "mirrors or folds"),
        (np.eye(3), ""),
        (np.eye(3) * -2, ""),  # the same transformation, another scale of the matrix
    ],
)
def test_degenerate_hulls(matrix, reason):
    found = geometry.degenerate(matrix, geometry.corners(SIZE))
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize("angle", [-170, -90, 0, 30, 90, 180])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_rotation_and_scale(angle, scale):
    from imatch.data.references import turn

    found = geometry.rotation_scale(np.diag([scale, scale, 1]) @ turn(angle), SIZE)
    assert (found[0] - angle + 180) % 360 - 180 == pytest.approx(0, abs=1e-6)
    assert found[1] == pytest.approx(scale)


def test_corner_error_of_the_horizon_is_infinite():
    assert geometry.corner_error(np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]]), np.eye(3), SIZE) == math.inf


@pytest.mark.parametrize(
    "wrong",
    [{"model": "rigid"}, {"threshold": 0.0}, {"confidence": 1.0}, {"iterations": 0}, {"min_share": 1.0}],
    ids=str,
)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ImatchError):
        Estimator(**wrong)


@pytest.mark.parametrize(("model", "matrix"), [("affine", TILTED), ("homography", PERSPECTIVE)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_the_same_to_a_pixel(model, matrix, method):
    a, b, true = planted(matrix, 300, outliers=0.5)
    found = Estimator(model, method=method)(a, b, SIZE, SIZE)
    assert found.verified, found.reason
    assert (found.inliers == true).mean() > 0.97
    assert geometry.corner_error(found.matrix, matrix, SIZE) < 1


@pytest.mark.parametrize(
    ("model", "method"),
    [(model, method) for model in ("affine", "homography") for method in METHODS] + [("similarity", "ransac")],
)
def test_equal_input_gives_equal_bytes_whatever_was_drawn_before(model, method):
    a, b, _ = planted(TURNED, 200, outliers=0.7)
    estimator = Estimator(model, method=method)
    first = estimator(a, b, SIZE, SIZE)
    cv2.setRNGSeed(7)
    cv2.randu(np.zeros((5, 5)), 0, 1)
    Estimator("homography")(b, a, SIZE, SIZE)
    second = estimator(a, b, SIZE, SIZE)
    assert second.matrix.tobytes() == first.matrix.tobytes()
    assert second.inliers.tobytes() == first.inliers.tobytes()
    assert second.error == first.error


@pytest.mark.parametrize(
    ("model", "method"), [("similarity", "ransac"), ("affine", "accurate"), ("homography", "poselib")]
)
def test_auto_is_the_best_method_that_a_model_has(model, method):
    rng = np.random.default_rng(4)
    a = rng.uniform(0, 200, (60, 2))
    b = np.where(np.arange(60)[:, None] % 3, a + 7 + rng.normal(0, 0.5, a.shape), rng.uniform(0, 200, a.shape))
    auto, named = (Estimator(model, method=name)(a, b, (200, 200), (220, 220)) for name in ("auto", method))
    assert auto.matrix.tobytes() == named.matrix.tobytes()
    assert auto.inliers.sum() >= 40


@pytest.mark.parametrize("wrong", [{"method": "lmeds"}, {"model": "similarity", "method": "magsac"}], ids=str)
def test_a_method_that_is_not_to_be_had_is_refused(wrong):
    with pytest.raises(ImatchError, match="use"):
        Estimator(**wrong)


def test_fewer_than_four_inliers_are_refused_however_low_the_bar():
    a, b, _ = planted(np.eye(3), 3, noise=0)
    found = Estimator("similarity", min_inliers=1, min_share=0.0)(a, b, SIZE, SIZE)
    assert not found.verified
    assert found.reason == "0 inliers of 3 correspondences, 4 are needed"
