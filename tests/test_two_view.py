"""What explains two photographs, and what nothing explains."""

import math

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

import imatch
from imatch.core.types import PhotographError
from imatch.data import exif
from imatch.data.rotations import UPRIGHT
from imatch.features.sift import Sift
from imatch.matching.align import aligner
from imatch.matching.geometry import epipolar_distance, epipolar_line, median_similarity, transform
from imatch.matching.two_view import MODELS, Estimator
from tests import rendered
from tests.leaves import dead_leaves

SIZE = (600, 800)


@pytest.fixture(scope="module")
def textures(tmp_path_factory):
    return rendered.textures(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def scene(textures):
    return rendered.scene(textures, 11, 15)


def test_a_scene_of_depth(scene, tmp_path):
    """Its kind, its epipolar geometry, and with a focal length its pose."""
    a, b = (
        rendered.save(pixels, tmp_path / f"{name}.jpg") for name, pixels in zip("ab", scene.photographs, strict=True)
    )
    found = imatch.match(a, b)
    assert found.verified, found.reason
    assert found.kind == "general"
    assert np.median(epipolar_distance(found.fundamental, *scene.points)) < 1
    for fundamental, (here, there) in ((found.fundamental, scene.points), (found.fundamental.T, scene.points[::-1])):
        lines = [epipolar_line(fundamental, xy, rendered.SIZE) for xy in here[::50]]
        assert np.median([off_line(*line, xy) for line, xy in zip(lines, there[::50], strict=True)]) < 1
    (r, t), (true_r, true_t) = found.pose, scene.relative
    assert math.degrees(math.acos((np.trace(r.T @ true_r) - 1) / 2)) < 0.5
    assert math.degrees(math.acos(t @ true_t)) < 3
    for name, pixels in zip("ab", scene.photographs, strict=True):
        rendered.save(pixels, tmp_path / f"{name}.jpg", focal=False)
    unknown = imatch.match(a, b)
    assert (unknown.kind, unknown.pose) == ("general", None)


def off_line(start, end, xy):
    return abs(np.linalg.det([end - start, xy - start])) / np.linalg.norm(end - start)


def test_an_epipolar_line_is_all_that_the_photograph_shows_of_it():
    random, (h, w), lengths = np.random.default_rng(0), (30, 40), []
    for _ in range(200):
        start, angle = random.uniform(-40, 60, 2), random.uniform(0, 2 * math.pi)
        way = np.array([math.cos(angle), math.sin(angle)])
        fundamental = np.column_stack([np.zeros((3, 2)), np.cross([*start, 1], [*(start + way), 1])])
        found = epipolar_line(fundamental, np.array([7.0, 8.0]), (h, w))
        along = start + np.linspace(-200, 200, 40_001)[:, None] * way
        inside = along[((along > -0.5) & (along < (w - 0.5, h - 0.5))).all(axis=1)]
        lengths.append(0 if found is None else np.linalg.norm(found[1] - found[0]))
        assert lengths[-1] == pytest.approx(0.01 * len(inside), abs=0.02)
        assert found is None or max(off_line(start, start + way, xy) for xy in found) < 1e-9
    assert 50 < np.count_nonzero(lengths) < 150
    assert epipolar_line(np.zeros((3, 3)), np.zeros(2), (h, w)) is None


def test_a_camera_that_only_rotates(textures, tmp_path):
    scene = rendered.turned_only(textures, 4, 12)
    a, b = (
        rendered.save(pixels, tmp_path / f"{name}.jpg") for name, pixels in zip("ab", scene.photographs, strict=True)
    )
    found = imatch.match(a, b)
    assert (found.verified, found.kind) == (True, "rotation"), found.reason
    turned, shift = found.pose
    assert math.degrees(math.acos((np.trace(turned) - 1) / 2)) == pytest.approx(12, abs=0.3)
    assert not shift.any()


def captioned(seed):
    """A drawn scene with the bar that a trail camera burns in."""
    photograph = Image.fromarray(dead_leaves(seed, 800)[:600])
    return np.asarray(rendered.caption(photograph, "bar"))


def under(kind, pixels, size=None):
    """A photograph with a caption, made smaller with it."""
    burned = rendered.caption(Image.fromarray(pixels), kind)
    return np.asarray(burned if size is None else burned.resize(size, Image.Resampling.BOX))


@pytest.mark.parametrize("kind", rendered.CAPTIONS)
def test_real_photographs_under_one_caption(demo_photographs, kind):
    """Two scenes do not match, at two sizes neither; one scene does, from one place or from two."""
    one, other = (
        np.asarray(ImageOps.fit(Image.open(demo_photographs / name).convert("RGB"), (600, 450)))
        for name in ("coffee.png", "moon.png")
    )
    for size in (None, (480, 360)):
        found = imatch.match(under(kind, one), under(kind, other, size), "sift")
        assert not found.verified, found.reason
        assert kind not in ("strip", "logo", "frame") or found.kind == "watermark"
    darker = np.clip(one * 0.6, 0, 255).astype(np.uint8)
    assert np.allclose(imatch.match(under(kind, one), under(kind, darker), "sift").matrix, np.eye(3), atol=0.2)
    moved = cv2.warpAffine(one, np.array([[1.0, 0, 20], [0, 1, 9]]), (600, 450), borderMode=cv2.BORDER_REFLECT)
    found = imatch.match(under(kind, one), under(kind, moved), "sift")
    assert found.verified, found.reason
    assert np.allclose(found.matrix[:2, 2], [20, 9], atol=0.6)


def test_a_caption_verifies_nothing():
    found = imatch.match(captioned(1), captioned(2))
    assert not found.verified
    assert found.kind == "watermark"
    assert "stand still in one part of the picture" in found.reason


def test_a_caption_does_not_hide_what_is_right():
    """The camera moved on, its caption did not; and a camera that stood still is right, too."""
    wide = dead_leaves(3, 900)
    one, other = captioned(3).copy(), captioned(3).copy()
    one[:560], other[:560] = wide[:560, :800], wide[20:580, 60:860]
    moved = imatch.match(one, other)
    assert (moved.verified, moved.kind) == (True, "planar")
    assert np.allclose(moved.matrix[:2, 2], [-60, -20], atol=0.5)
    darker = np.clip(one * 0.7, 0, 255).astype(np.uint8)
    assert imatch.match(one, darker).verified


def spread(n=80, seed=0):
    return np.random.default_rng(seed).uniform((0, 0), SIZE[::-1], (n, 2))


def strip(n=60):
    """Where a caption along the lower edge has keypoints."""
    return spread(n, 7) * [0.5, 0.1] + [0, 540]


@pytest.mark.parametrize(
    ("other", "there"),
    [((300, 400), strip() / 2), ((900, 1200), strip() * 1.5), ((900, 1200), strip() - [0, -300])],
    ids=["half", "larger", "at its edge"],
)
def test_a_caption_in_photographs_of_other_sizes(other, there):
    a, b = np.concatenate([strip(), spread(50)]), np.concatenate([there, spread(50, seed=1) / 2])
    assert Estimator()(a, b, SIZE, other).kind == "watermark"


def test_what_stands_still_all_over_one_photograph_is_right():
    """A strip, cut out of a photograph; a zoom, whose middle stays; a weak copy."""
    cut = spread(60, 7) * [1, 0.1]
    assert Estimator()(cut - [0, -540], cut, SIZE, (60, 800)).verified
    middle = np.array(SIZE[::-1]) / 2
    for zoom in (1.003, 1.01, 1.03, 1.1):
        found = Estimator()(spread(500), middle + zoom * (spread(500) - middle), SIZE, SIZE)
        assert found.inliers.all()
    noisy = spread(500) + np.random.default_rng(3).normal(0, 1, (500, 2))
    assert Estimator()(spread(500), noisy, SIZE, SIZE).inliers.sum() > 450


def test_a_caption_does_not_hold_back_what_moved_by_two_pixels():
    a = np.concatenate([strip(300), spread(100)])
    b = np.concatenate([strip(300), spread(100) - [-2, 1]])
    found = Estimator()(a, b, SIZE, SIZE)
    assert np.allclose(found.matrix[:2, 2], [2, -1], atol=0.1)


def test_the_rest_of_two_photographs_says_whether_it_is_a_caption():
    """Copies that agree at few places, for one is dark; where one cannot be read, a small part is a caption."""
    scene, stranger = captioned(1), captioned(2)
    few = 100 + 0.1 * spread(20, 3)

    def gone():
        raise PhotographError("it is gone")

    def told(photographs, xy=few):
        return Estimator()(xy, xy, SIZE, SIZE, photographs=photographs)

    assert told(lambda: (scene, scene // 5)).verified
    assert told(lambda: (scene, stranger)).kind == "watermark"
    assert told(gone).kind == "watermark"
    assert told(gone, 4 * few - 300).verified


@pytest.mark.parametrize("model", MODELS)
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
    found = Estimator(model)(a, b, SIZE, SIZE)
    assert found.reason
    assert not found.verified


@pytest.mark.parametrize("zoom", [0.25, 1.0, 3.0])
def test_zoom_alone_is_a_plane(zoom):
    a = spread()
    found = Estimator()(a, zoom * a, SIZE, tuple(round(zoom * side) for side in SIZE))
    assert (found.verified, found.kind) == (True, "planar")


def test_keypoints_of_several_directions_count_once():
    a = np.repeat(spread(12), 3, axis=0)
    found = Estimator("homography")(a, a + 5, SIZE, SIZE)
    assert found.inliers.sum() == 12


def test_beyond_what_is_shared_a_plane_may_fold():
    """The horizon of a street is in the picture, and the sky above it folds: the houses below are right."""
    horizon = np.array([[1, 0, 0], [0, 1, 0], [0, -0.01, 1.0]])  # of 100 pixels down
    a = np.random.default_rng(0).uniform((0, 0), (300, 80), (60, 2))
    found = Estimator()(a, transform(horizon, a), (400, 300), (2000, 2000))
    assert (found.verified, found.kind) == (True, "planar")
    mirrored = Estimator()(a, a * [-1, 1] + [300, 0], (400, 300), (400, 300))
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
    wide = cv2.resize(dead_leaves(5, 1200), (3000, 300))
    assert imatch.match(wide, wide[:, 700:2600]).verified
    assert not imatch.match(wide, cv2.resize(dead_leaves(6, 1200), (3000, 300))).verified


def test_focal_lengths_of_a_header(tmp_path):
    def written(name, tags, size=(400, 300)):
        header = Image.Exif()
        header.get_ifd(0x8769).update(tags)
        Image.new("RGB", size).save(tmp_path / name, exif=header.tobytes())
        return exif.focal_length(tmp_path / name)

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
    assert exif.focal_length(tmp_path / "text.jpg") is None
    assert written("film.tif", {0xA405: 24}) == written("film.jpg", {0xA405: 24})
    assert written("film.jpg", {0xA405: 48}) == 2 * written("film.tif", {0xA405: 24})  # another file now


def test_a_static_camera_with_little_to_see_is_right():
    """A caption stands still in a small part of what there is to see; the moon is all there is."""
    night = np.full((600, 800, 3), 20, np.uint8)
    night[240:360, 330:450] = dead_leaves(2, 120)
    assert imatch.match(night, night).verified
    assert imatch.match(night, np.clip(night * 0.8 + 3, 0, 255).astype(np.uint8)).verified


def test_comparing_pixels_does_not_flatten_a_scene(scene):
    a, b = scene.photographs
    sizes = a.shape[:2], b.shape[:2]
    (of_a,), (of_b,) = (Sift()(one[None]) for one in (a, b))
    geometry = {"threshold": 0, "min_share": 0}
    pixel = {"matcher": "ratio", "matcher_options": {}, "refine": "pixel", "geometry": geometry}
    found = aligner(pixel, of_b)([(UPRIGHT, of_a)], of_b, *sizes, lambda: (a, b)).geometry
    assert (found.verified, found.kind) == (True, "general")
    assert "pixels were not compared" in found.reason


def test_what_is_not_verified_has_no_geometry_of_depth():
    found = Estimator("fundamental", min_inliers=200)(spread(), spread(seed=1), SIZE, SIZE)
    assert not found.verified
    assert (found.matrix, found.fundamental, found.pose, found.kind) == (None, None, None, "")


def test_chance_counts_more_in_small_photographs():
    """An epipolar line with its threshold covers more of them."""
    asked = [
        Estimator("fundamental", min_inliers=60)(a, b, size, size).reason
        for size in ((900, 1600), (120, 160))
        for a, b in [[np.random.default_rng(seed).uniform((0, 0), size[::-1], (100, 2)) for seed in (1, 2)]]
    ]
    assert "61 are needed" in asked[0]
    assert "66 are needed" in asked[1]


@pytest.fixture(scope="module")
def photograph(demo_photographs):
    return np.asarray(Image.open(demo_photographs / "coffee.png").convert("RGB"))


def test_a_photograph_against_itself_and_its_mirror_image(photograph):
    assert imatch.match(photograph, photograph).kind == "planar"
    mirrored = imatch.match(photograph, np.ascontiguousarray(photograph[:, ::-1]), "sift")
    assert not mirrored.verified
    assert mirrored.reason


def test_windows_that_repeat_are_refused_in_words(photograph):
    """A facade, seen from one window further on: it looks the same."""
    facade = np.tile(photograph[100:220, 200:300], (5, 12, 1))
    found = imatch.match(facade[:, :900], facade[:, 100:1000], "sift")
    assert not found.verified
    assert "show repeats" in found.reason


def test_photographs_that_share_nothing_are_refused_in_words(photograph):
    found = imatch.match(photograph[:, :300], photograph[:, 300:])
    assert not found.verified
    assert "are needed" in found.reason
