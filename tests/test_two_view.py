"""The candidate for the geometry: what explains two photographs, and what nothing explains."""

import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests import rendered
from tests.benchmarks import two_view
from tests.benchmarks.two_view import Pair, epipolar_distance, median_similarity
from tools.sift_vocabulary import dead_leaves

SIZE = (600, 800)


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    return rendered.textures(tmp_path_factory.mktemp("demo"))


def test_a_scene_of_depth(textures, tmp_path):
    """Its kind, its epipolar geometry, and with a focal length its pose."""
    scene = rendered.scene(textures, 11, 15)
    a, b = (
        rendered.save(pixels, tmp_path / f"{name}.jpg") for name, pixels in zip("ab", scene.photographs, strict=True)
    )
    found = two_view.match(a, b)
    assert found.verified, found.reason
    assert found.kind == "general"
    assert np.median(epipolar_distance(found.fundamental, *scene.points)) < 1
    (r, t), (true_r, true_t) = found.pose, scene.relative
    assert math.degrees(math.acos((np.trace(r.T @ true_r) - 1) / 2)) < 0.5
    assert math.degrees(math.acos(t @ true_t)) < 3
    for name, pixels in zip("ab", scene.photographs, strict=True):
        rendered.save(pixels, tmp_path / f"{name}.jpg", focal=False)
    two_view.focal_length.cache_clear()
    unknown = two_view.match(a, b)
    assert (unknown.kind, unknown.pose) == ("general", None)


def test_a_camera_that_only_rotates(textures, tmp_path):
    scene = rendered.turned_only(textures, 4, 12)
    a, b = (
        rendered.save(pixels, tmp_path / f"{name}.jpg") for name, pixels in zip("ab", scene.photographs, strict=True)
    )
    found = two_view.match(a, b)
    assert (found.verified, found.kind) == (True, "rotation"), found.reason
    turned, shift = found.pose
    assert math.degrees(math.acos((np.trace(turned) - 1) / 2)) == pytest.approx(12, abs=0.3)
    assert not shift.any()


def captioned(seed):
    """A drawn scene with the bar that a trail camera burns in."""
    photograph = Image.fromarray(dead_leaves(np.random.default_rng(seed), side=800)[:600])
    draw = ImageDraw.Draw(photograph)
    draw.rectangle((0, 560, 800, 600), fill="black")
    draw.ellipse((10, 566, 38, 594), fill="white")
    draw.text((80, 565), "TRAILCAM 4K  Forest-07", font=ImageFont.load_default(26), fill="white")
    draw.text((500, 568), "2026-05-01 06:10:12  4 C", font=ImageFont.load_default(22), fill="white")
    return np.asarray(photograph)


def test_a_caption_verifies_nothing():
    found = two_view.match(captioned(1), captioned(2))
    assert not found.verified
    assert found.kind == "watermark"
    assert "stand still in a small part of the picture" in found.reason


def test_a_caption_does_not_hide_what_is_right():
    """The camera moved on, its caption did not; and a camera that stood still is right, too."""
    wide = dead_leaves(np.random.default_rng(3), side=900)
    one, other = captioned(3).copy(), captioned(3).copy()
    one[:560], other[:560] = wide[:560, :800], wide[20:580, 60:860]
    moved = two_view.match(one, other)
    assert (moved.verified, moved.kind) == (True, "planar")
    assert np.allclose(moved.matrix[:2, 2], [-60, -20], atol=0.5)
    darker = np.clip(one * 0.7, 0, 255).astype(np.uint8)
    assert two_view.match(one, darker).verified


def spread(n=80, seed=0):
    return np.random.default_rng(seed).uniform((0, 0), SIZE[::-1], (n, 2))


@pytest.mark.parametrize("model", ["auto", "fundamental", "homography"])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((0, 2)), np.zeros((0, 2))),
        (spread(3), spread(3)),
        (spread(7), spread(7)),
        (np.full((50, 2), 7.0), np.full((50, 2), 9.0)),
        (np.full((50, 2), 7.0), spread(50)),
        (np.column_stack([np.linspace(0, 300, 50)] * 2), np.column_stack([np.linspace(0, 300, 50)] * 2) + 9),
        (spread(), spread(seed=1)),
        (spread(), spread() * [-1, 1] + [SIZE[1], 0]),
    ],
    ids=["none", "three", "seven", "one place", "one place in A", "a line", "chance", "mirrored"],
)
def test_what_fixes_no_geometry_has_a_reason(model, a, b):
    found = two_view.explained(Pair(a, b, SIZE, SIZE), model)
    assert found.reason
    assert not found.verified


@pytest.mark.parametrize("zoom", [0.25, 1.0, 3.0])
def test_zoom_alone_is_a_plane(zoom):
    a = spread()
    found = two_view.explained(Pair(a, zoom * a, SIZE, tuple(round(zoom * side) for side in SIZE)))
    assert (found.verified, found.kind) == (True, "planar")


def test_keypoints_of_several_directions_count_once():
    a = np.repeat(spread(12), 3, axis=0)
    found = two_view.explained(Pair(a, a + 5, SIZE, SIZE), "homography")
    assert found.inliers.sum() == 12


def test_beyond_what_is_shared_a_plane_may_fold():
    """The horizon of a street is in the picture, and the sky above it folds: the houses below are right."""
    horizon = np.array([[1, 0, 0], [0, 1, 0], [0, -0.01, 1.0]])  # of 100 pixels down
    a = np.random.default_rng(0).uniform((0, 0), (300, 80), (60, 2))
    found = two_view.explained(Pair(a, two_view.transform(horizon, a), (400, 300), (2000, 2000)))
    assert (found.verified, found.kind) == (True, "planar")
    mirrored = two_view.explained(Pair(a, a * [-1, 1] + [300, 0], (400, 300), (400, 300)))
    assert not mirrored.verified


def test_rotation_and_scale_of_depth_are_medians():
    a = spread(400)
    angle, scale = math.radians(30), 1.5
    turn = scale * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    b = a @ turn.T + [5, 9]
    b[:100, 0] += np.random.default_rng(0).uniform(20, 90, 100)  # parallax of what is near
    found = median_similarity(a, b)
    assert np.hypot(*found[:2, 0]) == pytest.approx(scale, rel=0.03)
    assert math.degrees(math.atan2(found[0, 1], found[0, 0])) == pytest.approx(30, abs=2)


def test_a_panorama_of_one_to_ten():
    wide = cv2.resize(dead_leaves(np.random.default_rng(5), side=1200), (3000, 300))
    assert two_view.match(wide, wide[:, 700:2600]).verified
    assert not two_view.match(wide, cv2.resize(dead_leaves(np.random.default_rng(6), side=1200), (3000, 300))).verified


def test_focal_lengths_of_a_header(tmp_path):
    def written(name, tags, size=(400, 300)):
        header = Image.Exif()
        header.get_ifd(0x8769).update(tags)
        Image.new("RGB", size).save(tmp_path / name, exif=header)
        return two_view.focal_length(tmp_path / name)

    assert written("film.jpg", {0xA405: 24}) == pytest.approx(24 / math.hypot(36, 24) * 500)
    plane = {
        0x920A: 8.8,
        0xA20E: 4000.0,
        0xA210: 3,
        0xA002: 4000,
        0xA003: 3000,
    }  # 400 pixels a millimetre, made smaller
    assert written("plane.jpg", plane) == pytest.approx(8.8 * 400 / 10, rel=1e-3)
    for name, tags in (("none.jpg", {}), ("zero.jpg", {0xA405: 0}), ("half.jpg", {0x920A: 8.8})):
        assert written(name, tags) is None
    (tmp_path / "text.jpg").write_text("no photograph")
    assert two_view.focal_length(tmp_path / "text.jpg") is None
