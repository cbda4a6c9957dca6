"""References: a view shows what its matrix says it shows, to 0.05 px, and a kind keeps its word on scale and corners.

Two measures that share nothing. Bright blobs at known points: their centroids in the view against the matrix, inside.
And plane waves, which are known everywhere: what is left of them after the matrix is an affine slip, fitted over all
pixels (Lucas and Kanade, "An iterative image registration technique", IJCAI 1981), so that it is known at the corners
of the photograph, where no blob has room.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from PIL import Image

import imatch
from imatch.core import files
from imatch.core.types import ImatchError, StepError, View
from imatch.data import images, references
from imatch.data.store import Stored
from imatch.matching import geometry
from imatch.viz import figures
from tests import grouped, test_steps
from tests.grouped import by

SIZES = [(120, 180), (181, 121)]
CROPS = [1.0, 0.75, 0.5]
ANGLES = [0.0, 15.0, 45.0, 90.0, 120.0, 180.0, 225.0, 270.0, 330.0]
TOLERANCE = 0.05


@pytest.fixture(params=itertools.product(references.REFERENCES, (False, True)), ids="{0[0]}-resized={0[1]}".format)
def reference(request):
    kind, resized = request.param
    return partial(references.REFERENCES[kind], resize_to_original=resized)


def waves(x, y):
    """A photograph that can be sampled anywhere: three plane waves of 16 px, one a channel, 60 degrees apart."""
    directions = np.radians([0, 60, 120])
    return 128 + 100 * np.sin(0.4 * (x[..., None] * np.cos(directions) + y[..., None] * np.sin(directions)))


def paint(function, size):
    y, x = np.mgrid[: size[0], : size[1]]
    return np.clip(function(x, y), 0, 255).round().astype(np.uint8)


def slip(view, size, points):
    """How far the view's content lies from where its matrix says: (n, 2) pixels of the view at (n, 2) points of it."""
    v, u = np.mgrid[: view.mask.shape[0], : view.mask.shape[1]]
    back = geometry.transform(np.linalg.inv(view.matrix), np.column_stack([u.ravel(), v.ravel()]))
    x, y = back.T.reshape(2, *u.shape)
    expected = waves(x, y)
    down, right = np.gradient(expected, axis=(0, 1))
    inner = view.mask & (x > 3) & (y > 3) & (x < size[1] - 4) & (y < size[0] - 4)  # past it, bicubic sees the border
    border = math.ceil(2 * max(1, math.sqrt(np.linalg.det(view.matrix[:2, :2]))))
    inner[:border] = inner[-border:] = inner[:, :border] = inner[:, -border:] = False

    def affine(u, v):
        return np.stack([u / 100, v / 100, np.ones(u.shape)], -1)

    # content moved by s: pixels = expected - gradient . s, times a gain, for an enlargement or a reduction softens
    some = np.flatnonzero(inner)
    some = np.random.default_rng(0).permutation(some)[:6000]  # enough; every n-th one would beat with the waves
    right, down, expected, pixels = (a.reshape(-1, 3)[some] for a in (right, down, expected, view.pixels))
    at = affine(u.ravel(), v.ravel())[some][:, None]
    known = np.concatenate([right[..., None] * at, down[..., None] * at, (expected - 128)[..., None]], -1)
    found, *_ = np.linalg.lstsq(known.reshape(-1, 7), (expected - pixels).ravel(), rcond=None)
    return affine(*np.asarray(points).T) @ found[:6].reshape(2, 3).T


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crop", CROPS)
def test_matrix_is_exact_at_the_corners_and_at_random_points(reference, size, crop):
    photograph, rng = paint(waves, size), np.random.default_rng(0)
    for angle in ANGLES:
        view = reference(photograph, angle, crop)
        h, w = view.mask.shape
        corners = geometry.transform(view.matrix, geometry.corners(size))
        corners = corners[((corners >= -0.5) & (corners <= [w - 0.5, h - 0.5])).all(axis=1)]
        points = rng.uniform(-0.5, [w - 0.5, h - 0.5], (50, 2))
        worst = np.linalg.norm(slip(view, size, [*corners, *points]), axis=1).max()
        assert worst < TOLERANCE, (angle, worst)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("angle", [0.0, 45.0, 90.0])
def test_a_wrong_matrix_is_measured(reference, crop, angle):
    """Half the tolerance beside it is seen as half the tolerance: the test above can fail."""
    view = reference(paint(waves, SIZES[1]), angle, crop)
    h, w = view.mask.shape
    centre = np.array([[(w - 1) / 2, (h - 1) / 2]])
    for shift in ([0.025, 0], [0, -0.1], [0.3, 0.3]):
        wrong = View(view.pixels, view.mask, references.shift(*shift) @ view.matrix)
        before, after = slip(view, SIZES[1], centre), slip(wrong, SIZES[1], centre)
        assert after - before == pytest.approx(-np.array([shift]), rel=0.1, abs=0.004)
    wrong = View(view.pixels, view.mask, np.diag([1.002, 1, 1]) @ view.matrix)
    ends = np.array([[0.0, 0], [100, 0]])
    after, before = slip(wrong, SIZES[1], ends), slip(view, SIZES[1], ends)
    assert np.diff(after - before, axis=0)[0] == pytest.approx([-0.2, 0], abs=0.02)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crop", CROPS)
def test_matrix_maps_a_blob_to_its_centroid(reference, size, crop):
    """Gaussians of 2.5 px, 24 px apart so that none sees another, at other places in each channel."""
    rng, radius = np.random.default_rng(1), 10
    cells = np.stack(np.meshgrid(np.arange(12, size[1] - 11, 24), np.arange(12, size[0] - 11, 24)), -1).reshape(-1, 2)
    centres = cells[:, None] + rng.uniform(-2, 2, (len(cells), 3, 2)) + [[0, 0], [8, 8], [-8, 8]]

    def blobs(x, y):
        distance = (x[..., None, None] - centres[..., 0]) ** 2 + (y[..., None, None] - centres[..., 1]) ** 2
        return 255 * np.exp(-distance / (2 * 2.5**2)).sum(axis=-2)

    photograph, measured = paint(blobs, size), 0
    inside = ((centres >= radius) & (centres <= np.array(size[::-1]) - 1 - radius)).all(axis=-1)
    for angle in ANGLES:
        view = reference(photograph, angle, crop)
        h, w = view.mask.shape
        reach = radius * math.sqrt(np.linalg.det(view.matrix[:2, :2]))
        for channel in range(3):
            for x, y in geometry.transform(view.matrix, centres[inside[:, channel], channel]):
                if not (reach <= x <= w - 1 - reach and reach <= y <= h - 1 - reach):
                    continue
                left, top = math.ceil(x - reach), math.ceil(y - reach)
                v, u = np.mgrid[top : math.floor(y + reach) + 1, left : math.floor(x + reach) + 1]
                weight = view.pixels[v, u, channel] * ((u - x) ** 2 + (v - y) ** 2 <= reach**2)
                centroid = np.array([(weight * u).sum(), (weight * v).sum()]) / weight.sum()
                assert np.linalg.norm(centroid - [x, y]) < TOLERANCE, (angle, channel, centroid, x, y)
                measured += 1
    assert measured >= 20


def scale(view):
    return math.sqrt(np.linalg.det(view.matrix[:2, :2]))


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_isometric_keeps_its_scale_and_has_no_empty_pixel(size, crop, resized):
    make = partial(references.isometric, resize_to_original=resized)
    views = [make(np.full((*size, 3), 200, np.uint8), angle, crop) for angle in ANGLES]
    short = min(size)
    side = math.floor(crop * short / math.sqrt(2))
    for view in views:
        assert view.mask.shape == view.pixels.shape[:2] == ((short, short) if resized else (side, side))
        assert view.mask.all()
        assert (view.pixels == 200).all()
        assert scale(view) == pytest.approx(short / side if resized else 1, rel=1e-9)


@pytest.mark.parametrize(("angle", "zoom"), [(0, 1.0), (30, 0.83), (90, 1.5), (180, 1.0)])
def test_legacy_scale_changes_with_the_angle(angle, zoom):
    photograph = np.zeros((200, 300, 3), np.uint8)
    view = references.legacy(photograph, angle, 0.5)
    assert view.mask.shape == (100, 150)
    assert scale(view) == pytest.approx(zoom, abs=0.01)
    enlarged = references.legacy(photograph, angle, 0.5, resize_to_original=True)
    assert enlarged.mask.shape == (200, 300)
    assert scale(enlarged) == pytest.approx(2 * scale(view))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("crop", CROPS)
def test_isometric_at_right_angles_copies_pixels(size, crop):
    photograph = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    upright = references.isometric(photograph, 0, crop)
    side, (x, y) = len(upright.mask), -upright.matrix[:2, 2].round().astype(int)
    assert np.array_equal(upright.pixels, photograph[y : y + side, x : x + side])
    for quarter in (1, 2, 3):
        turned = references.isometric(photograph, 90 * quarter, crop)
        assert np.array_equal(turned.pixels, np.rot90(upright.pixels, quarter))


def test_legacy_at_0_degrees_is_the_photograph_with_its_corners():
    photograph = paint(waves, SIZES[1])
    view = references.legacy(photograph, 0, 1.0)
    assert view.pixels.tobytes() == photograph.tobytes()
    assert np.allclose(view.matrix, np.eye(3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_legacy_resized_has_the_photographs_own_size(size):
    """Where sides are odd, the two ratios differ a little: the matrix has both."""
    view = references.legacy(np.zeros((*size, 3), np.uint8), 0, 0.5, resize_to_original=True)
    assert view.pixels.shape == (*size, 3)
    ratios = [side / round(side / 2) for side in size[::-1]]
    assert np.diag(view.matrix) == pytest.approx([*ratios, 1])


def test_mask_and_pixels_agree(reference):
    white = np.full((90, 140, 3), 255, np.uint8)
    for angle in (0, 30, 90, 135, -22.5):
        view = reference(white, angle, 1.0)
        assert view.pixels.shape == (*view.mask.shape, 3)
        shown = view.pixels[..., 0] > 127
        assert (shown == view.mask).mean() > 0.985
        assert view.pixels[..., 0][view.mask].mean() > 250


def test_mask_of_an_enlarged_view_agrees_with_its_pixels():
    view = references.legacy(np.full((90, 140, 3), 255, np.uint8), 45, 0.75, resize_to_original=True)
    assert 0.5 < view.mask.mean() < 0.99
    assert ((view.pixels[..., 0] > 127) == view.mask).mean() > 0.985


def test_angles_are_counter_clockwise(reference):
    photograph = np.zeros((101, 101, 3), np.uint8)
    photograph[45:56, 60:71] = 255  # to the right of the centre
    view = reference(photograph, 90, 1.0)
    y, x = np.nonzero(view.pixels[..., 0] > 127)
    centre = (np.array(view.mask.shape) - 1) / 2
    assert abs(x.mean() - centre[1]) < 1  # now above the centre
    assert y.mean() < centre[0] - 10


def test_view_of_a_single_pixel(reference):
    view = reference(np.full((1, 1, 3), 9, np.uint8), 45, 0.5)
    assert view.pixels.shape == (1, 1, 3)


# --- the step


@pytest.fixture(scope="module")
def embedded(few_photographs, tmp_path_factory):
    step = grouped.start_embed(
        str(few_photographs),
        exports=str(tmp_path_factory.mktemp("exports")),
        run="r",
        weight="sift",
        backbone_options={},
        resize=imatch.Resize(),
        shard_size=3,
        tag="",
        on_change="refuse",
    )
    imatch.steps.finish_embed(step, imatch.steps.embed(step, resources=by(workers=0)))
    return step


@pytest.fixture(params=sorted(references.REFERENCES))
def reference_kind(request):
    return request.param


def made(embedded, tag, kind="legacy", resize_to_original=False, file_type="jpg"):
    views = imatch.steps.start_references(
        str(embedded.folder),
        kind=kind,
        angles=[0, 30, 90],
        crops=[0.75, 0.5],
        resize_to_original=resize_to_original,
        file_type=file_type,
        quality=95,
        tag=tag,
        on_change="refuse",
    )
    return views, imatch.steps.make_references(views, resources=by(workers=0))


@pytest.mark.parametrize("resized", [False, True])
def test_png_is_lossless_and_rows_are_those_of_the_final_view(embedded, reference_kind, resized):
    views, rows = made(embedded, f"png{resized:d}", reference_kind, resized, "png")
    assert len(rows) == 4 * 3 * 2
    make = partial(references.REFERENCES[reference_kind], resize_to_original=resized)
    for row in rows:
        view = make(images.decode(views.linked("photographs") / row["source"]).pixels, row["angle"], row["crop"])
        with Image.open(views.folder / row["id"]) as image:
            assert image.format == "PNG"
            assert np.array_equal(np.asarray(image), view.pixels)
        assert row["id"].endswith(".png")
        assert (tuple(row["size"]), row["matrix"]) == (view.mask.shape, view.matrix.tolist())
        assert row["scale"] == pytest.approx(scale(view))
        assert row["covered"] == pytest.approx(view.mask.mean())
        if resized:
            h, w = row["source_size"]
            assert row["size"] == ([h, w] if reference_kind == "legacy" else [min(h, w)] * 2)


def test_jpeg_keeps_its_colours(embedded):
    views, rows = made(embedded, "jpg")
    with Image.open(views.folder / rows[0]["id"]) as image:
        assert image.format == "JPEG"
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # no channel is stored smaller than another


def test_what_a_file_is_made_of_belongs_to_the_step(embedded):
    made(embedded, "one")
    with pytest.raises(
        StepError, match=r"(?s)file_type: \"jpg\" -> \"png\".*resize_to_original: false -> true.*set another tag"
    ):
        made(embedded, "one", resize_to_original=True, file_type="png")
    with pytest.raises(ImatchError, match="unknown kind of reference 'isometry': did you mean 'isometric'"):
        made(embedded, "other", kind="isometry")
    with pytest.raises(ImatchError, match="file_type must be 'jpg' or 'png', got 'gif'"):
        made(embedded, "other", file_type="gif")
    with pytest.raises(ImatchError, match=r"resize_to_original must be a valid boolean, got 'yes'"):
        made(embedded, "other", resize_to_original="yes")


# --- figures


def test_both_kinds_are_shown_whichever_was_made(embedded, reference_kind):
    views, rows = made(embedded, "shown", reference_kind)
    figure = figures.reference_kinds(views.linked("photographs"), rows)
    titles = [axis.get_title() for axis in figure.axes]
    assert [title.split(" deg")[0] for title in titles] == [
        f"{kind}, {angle}" for kind in references.REFERENCES for angle in (0, 30, 90)
    ]
    assert "scale 1.00, 100% covered" in titles[0]
    magenta = [(np.asarray(axis.images[0].get_array()) == figures.EMPTY).all(axis=2).mean() for axis in figure.axes]
    assert magenta[0] == 0 < magenta[1] < 0.2
    assert magenta[3:] == [0, 0, 0]


def test_a_reference_is_seen_at_the_scale_of_its_photograph(few_photographs, tmp_path):
    """By itself it would fit below the limit at full size."""
    data = test_steps.embedded(few_photographs, tmp_path, weight="dsift", resize=imatch.Resize(limit=80))
    views, tokens = test_steps.referenced(data)
    views = {row["id"]: row for row in files.read_rows(views.folder / "references.jsonl")}
    for row in Stored(tokens.folder).rows:
        size, factor = views[row["id"]]["size"], 80 / max(views[row["id"]]["source_size"])
        assert factor < 80 / max(size)
        assert list(row["grid"]) == [max(1, round(side * factor / 16)) for side in size]
