"""Pictures of a pair whose truth was planted: what is warped fits, what is hot is the true patch."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from imatch.core.types import Geometry, ImatchError, Matches, Pair, Tokens, grid_xy
from imatch.data.store import read_ranking
from imatch.matching import geometry
from imatch.steps import match
from imatch.steps.chain import open_embeddings
from imatch.viz import figures, pictures
from tests.test_steps import embedded, matched, referenced, searched

TURN = np.array([[0.8, -0.6, 70.0], [0.6, 0.8, -20.0], [0, 0, 1]])
"""A -> B: what is planted."""
HOMOGRAPHY = TURN + np.array([[0, 0, 0], [0, 0, 0], [3e-4, 2e-4, 0]])


def planted(folder: Path, matrix: np.ndarray, size=(160, 200)) -> Pair:
    """A smooth photograph A, and B, which is A seen through the matrix."""
    noise = np.random.default_rng(0).uniform(0, 255, (*size, 3)).astype(np.float32)
    a = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 4), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    b = cv2.warpPerspective(a, matrix, size[::-1], flags=cv2.INTER_CUBIC)
    paths = folder / "a.png", folder / "b.png"
    for path, pixels in zip(paths, (a, b), strict=True):
        Image.fromarray(pixels).save(path)
    xy = np.random.default_rng(1).uniform(60, 110, (20, 2)).astype(np.float32)
    found = Geometry(matrix, np.ones(20, bool), 0.0, True, "planted")
    matches = Matches(np.arange(20), np.arange(20), np.linspace(1, 0.7, 20, dtype=np.float32))
    row = {
        "query": "a.png",
        "candidate": "b.png",
        "verified": True,
        "reason": "planted",
        "rotation": None,
        "inliers": 20,
        "matches": 20,
        "scale": None,
        "corner_error": None,
    }
    return Pair(row, paths, (size, size), xy, geometry.transform(matrix, xy).astype(np.float32), matches, found)


def on_grid(descriptors: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> Tokens:
    return Tokens(np.ones(1, np.float32), descriptors, grid_xy(grid, size), grid)


def inside(pair: Pair, margin: int = 6) -> np.ndarray:
    """Where A lies on B, without its rim."""
    seen = cv2.warpPerspective(np.ones(pair.sizes[0], np.uint8), pair.geometry.matrix, pair.sizes[1][::-1])
    return cv2.erode(seen, np.ones((margin, margin), np.uint8), borderValue=0) > 0


def photograph(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("matrix", [TURN, HOMOGRAPHY], ids=["similarity", "homography"])
@pytest.mark.parametrize("draw", [pictures.checkerboard, pictures.blend])
def test_what_is_warped_by_the_truth_fits(tmp_path, matrix, draw):
    pair = planted(tmp_path, matrix)
    b, part = photograph(pair.paths[1]), inside(pair)
    assert part.mean() > 0.3
    assert np.abs(draw(pair) - b)[part].mean() < 2
    shift = np.array([[1, 0, 4.0], [0, 1, 0], [0, 0, 1]])
    wrong = replace(pair, geometry=replace(pair.geometry, matrix=shift @ matrix))
    assert np.abs(draw(wrong) - b)[part].mean() > 5


def test_a_photograph_that_shrinks_lies_on_its_centres(tmp_path):
    """A is decoded a quarter as large, so its centres lie elsewhere: forgetting that shifts it by 3/8 of a pixel."""
    pair = planted(tmp_path, np.array([[0.25, 0, 60], [0, 0.25, 50], [0, 0, 1]]))
    b, part = photograph(pair.paths[1]), inside(pair)
    assert part.sum() > 1000
    assert np.abs(pictures.checkerboard(pair) - b)[part].mean() < 2


def test_a_checkerboard_alternates_and_shows_b_where_a_does_not_reach(tmp_path):
    pair = planted(tmp_path, np.diag([0.5, 0.5, 1]))
    for path, colour in zip(pair.paths, ((255, 0, 0), (0, 0, 255)), strict=True):
        Image.new("RGB", (200, 160), colour).save(path)
    drawn = pictures.checkerboard(pair)
    red, blue = ((drawn == colour).all(axis=2) for colour in ((255, 0, 0), (0, 0, 255)))
    assert red[5, 5]
    assert blue[5, 25]
    assert blue[25, 5]
    assert red[25, 25]
    assert blue[85:, :].all()
    assert blue[:, 105:].all()
    mixed = pictures.blend(pair)
    assert np.abs(mixed[20, 20] - np.array([127, 0, 127])).max() <= 1
    assert mixed[150, 150].tolist() == [0, 0, 255]


@pytest.mark.parametrize("draw", [pictures.lines, pictures.checkerboard, pictures.blend])
def test_the_outline_is_where_the_truth_puts_it(tmp_path, draw):
    pair = planted(tmp_path, np.array([[0.5, 0, 40], [0, 0.5, 30], [0, 0, 1]]))
    shown = np.zeros(20, bool)
    drawn = pictures.lines(pair, shown=shown)[pictures.BAR :, 208:] if draw is pictures.lines else draw(pair)
    doubted = replace(pair, geometry=replace(pair.geometry, verified=False))
    red = pictures.lines(doubted, shown=shown)[pictures.BAR :, 208:] if draw is pictures.lines else draw(doubted)
    changed = (drawn.astype(int) != red).any(axis=2)
    x, y = np.flatnonzero(changed.any(axis=0)), np.flatnonzero(changed.any(axis=1))
    corners = geometry.transform(pair.geometry.matrix, geometry.corners(pair.sizes[0]))
    assert np.abs([x[0] - corners[0, 0], y[0] - corners[0, 1]]).max() <= 2
    assert np.abs([x[-1] - corners[2, 0], y[-1] - corners[2, 1]]).max() <= 3
    assert not changed[40:100, 50:130].any()


def test_the_outline_in_a_scene_of_depth_is_dashed(tmp_path):
    pair = planted(tmp_path, np.array([[0.5, 0, 40], [0, 0.5, 30], [0, 0, 1]]))
    shown, plane = np.zeros(20, bool), replace(pair.geometry, kind="planar")
    green = [
        (pictures.lines(replace(pair, geometry=found), shown=shown)[pictures.BAR :, 208:] == pictures.GREEN).all(axis=2)
        for found in (plane, replace(plane, kind="general"))
    ]
    assert 0.3 * green[0].sum() < green[1].sum() < 0.7 * green[0].sum()
    assert green[0][green[1]].mean() > 0.95  # at the same place


RIGHT_AND_AHEAD = np.array([0.8, 0.0, 0.6])


@pytest.mark.parametrize(
    ("kind", "verified", "pose", "said"),
    [
        ("planar", True, None, ["a plane, rotated -36.9 degrees, 1.00 times as large"]),
        ("", True, None, ["rotated -36.9 degrees, 1.00 times as large"]),
        ("planar", False, None, []),
        ("watermark", False, None, ["a watermark"]),
        (
            "general",
            True,
            (np.eye(3), -RIGHT_AND_AHEAD),
            [
                "a scene with depth, rotated about -36.9 degrees, about 1.00 times as large",
                "the camera rotated by 0.0 degrees and moved to the right and ahead, (0.80, 0.00, 0.60)",
            ],
        ),
        (
            "general",
            True,
            (TURN_ONLY := np.array([[0, 0, -1.0], [0, 1, 0], [1, 0, 0]]), -TURN_ONLY @ [0, -1, 0]),
            [
                "a scene with depth, rotated about -36.9 degrees, about 1.00 times as large",
                "the camera rotated by 90.0 degrees and moved up, (0.00, -1.00, 0.00)",
            ],
        ),
        (
            "rotation",
            True,
            (TURN_ONLY, np.zeros(3)),
            [
                "a camera that only rotates, rotated -36.9 degrees, 1.00 times as large",
                "the camera rotated by 90.0 degrees",
            ],
        ),
    ],
)
def test_words_say_what_was_found(kind, verified, pose, said):
    found = Geometry(TURN, np.ones(20, bool), 0.5, verified, "", kind, pose=pose)
    assert pictures.told(found, (160, 200)) == said


@pytest.mark.parametrize(
    ("matrix", "reason"), [(None, "3 correspondences are too few"), (np.diag([-1.0, 1, 1]), "it mirrors")]
)
def test_what_cannot_be_warped_is_refused_with_the_reason(tmp_path, matrix, reason):
    pair = planted(tmp_path, TURN)
    pair = replace(pair, geometry=replace(pair.geometry, matrix=matrix, verified=False, reason=reason))
    for draw in (pictures.checkerboard, pictures.blend):
        with pytest.raises(ImatchError, match=f"A cannot be warped onto B: .*{reason}"):
            draw(pair)


def test_the_most_similar_are_drawn_and_no_photograph_is_enlarged(tmp_path):
    pair = planted(tmp_path, TURN)
    empty = pictures.lines(pair, shown=np.zeros(20, bool))
    changed = [(pictures.lines(pair, shown=np.arange(20) < n) != empty).any(axis=2) for n in (1, 20)]
    assert 0 < changed[0].sum() < changed[1].sum() / 5
    yellow = (pictures.lines(pair, shown=np.arange(20) < 1) == pictures.COLOURS[255]).all(axis=2)
    assert yellow.any()  # of similarity 1
    assert pictures.lines(pair, 100).shape == (80 + pictures.BAR, 208, 3)
    assert pictures.lines(pair, 10_000).shape == empty.shape


def test_the_most_similar_is_the_true_patch_and_its_rival_no_neighbour():
    """B's grid holds A's descriptors in another order, with noise: each patch of A is most similar to where its own
    went, and its rival is no neighbour of that."""
    random = np.random.default_rng(0)
    values = random.normal(size=(80, 16)).astype(np.float32)
    order = random.permutation(80)
    a = on_grid(values, (8, 10), (160, 200))
    moved = 3 * values[order] + random.normal(0, 0.1, (80, 16)).astype(np.float32)
    for patch in (0, 37, 79):
        true = int(np.flatnonzero(order == patch)[0])
        around = moved.copy()
        around[true + (1 if true % 10 < 9 else -1)] += 9 * values[patch]  # its neighbour sees much the same
        b = on_grid(around, (8, 10), (160, 200))
        similarity = pictures.similarities(a, b, [patch])[0]
        best, rival = pictures.best_two(similarity, b)
        assert best == true
        assert np.argsort(-similarity)[1] == true + (1 if true % 10 < 9 else -1)
        apart = np.abs(np.subtract(divmod(best, 10), divmod(rival, 10))).max()
        assert apart > 1
        assert similarity[rival] == max(
            s for i, s in enumerate(similarity) if np.abs(np.subtract(divmod(best, 10), divmod(i, 10))).max() > 1
        )


def test_the_rival_of_a_keypoint_lies_elsewhere():
    xy = np.array([[30.0, 30], [31, 31], [100, 80], [170, 130]], np.float32)
    b = Tokens(np.ones(1), np.array([[1.0, 0], [0.99, 0.1], [0.7, 0.7], [0, 1]]), xy)
    assert pictures.best_two(pictures.similarities(b, b, [0])[0], b) == (0, 2)
    lone = Tokens(np.ones(1), np.ones((2, 2)), xy[:2] * 0)
    assert pictures.best_two(np.array([0.2, 0.5]), lone) == (1, None)


def test_a_grid_lies_where_its_cells_are():
    """A photograph embedded as a crop has tokens in its middle only."""
    xy = grid_xy((4, 4), (40, 40)) + np.array([20, 0], np.float32)
    tokens = Tokens(np.ones(1), np.random.default_rng(0).normal(size=(16, 8)), xy, (4, 4))
    assert pictures.extent(tokens, (40, 80)) == (19.5, 59.5, 39.5, -0.5)


def test_the_same_pictures_twice_and_grey_for_lost_photographs(tmp_path):
    pair = planted(tmp_path, TURN)

    def drawn():
        pictures._from_disk.cache_clear()
        yield from (draw(pair) for draw in (pictures.lines, pictures.checkerboard, pictures.blend))

    first, again = [*drawn()], [*drawn()]
    for one, two in zip(first, again, strict=True):
        assert one.dtype == np.uint8
        assert pictures.encode(one) == pictures.encode(two)
    for path in pair.paths:
        path.unlink()
    lost = [*drawn()]
    assert [one.shape for one in lost] == [one.shape for one in first]
    assert lost[2][80, 100].tolist() == [160, 160, 160]


def test_the_sink_writes_the_lines(tmp_path):
    pair = planted(tmp_path, TURN)
    match.create_output("png")(tmp_path / "pair", pair)
    assert (tmp_path / "pair.png").read_bytes() == pictures.encode(pictures.lines(pair))


# --- figures of steps -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sift", "dsift"])
def steps(request, few_photographs, tmp_path_factory):
    """A finished 03_index and the 04_match after it."""
    data = embedded(few_photographs, tmp_path_factory.mktemp("exports"), weight=request.param)
    _, references = referenced(data, kind="isometric", angles=(0, 90), crops=(0.8,))
    index, *_ = searched(data, references, "reference-data", k=5)
    step, pairs, _ = matched(index, candidates=1, outputs=["npy"])
    return index, step, pairs


def test_a_pair_is_seen_in_all_views(steps):
    _, step, pairs = steps
    row = max(pairs, key=lambda row: row["inliers"])
    found = match.open_match(step)
    axes = figures.pair_views(found, pairs).axes
    pair, (a, b) = found.pair(row), found.tokens(row)
    said = [
        "where it lies in B",
        "every other square",
        "half transparent",
        "strongest",
        "its similarity",
        "of A",
        "of B",
    ]
    said = said if a.grid else said[:5]
    assert [words in axis.get_title() for axis, words in zip(axes, said, strict=True)] == [True] * len(said)
    assert all(axis.images for axis in axes)
    assert np.array_equal(pair.xy_a, a.xy[pair.matches.index_a])
    moved = np.abs(pair.xy_b - b.xy[pair.matches.index_b])  # by refinement, less than a patch
    assert moved.max() < max(b.spacing) if b.grid else not moved.any()
    patch = pair.matches.index_a[pair.geometry.inliers.argmax()]
    similarity = pictures.similarities(a, b, [patch])[0]
    best, rival = pictures.best_two(similarity, b)
    here, there = axes[3:5]
    assert here.collections[0].get_offsets().tolist() == a.xy[[patch]].tolist()
    assert there.collections[0].get_offsets().tolist() == b.xy[[best, rival]].tolist()
    assert f"best {similarity[best]:.2f}, elsewhere {similarity[rival]:.2f}" in there.get_title()
    if b.grid:
        heat = there.images[-1]
        assert np.array_equal(heat.get_array(), similarity.reshape(b.grid))
        assert tuple(heat.get_extent()) == pictures.extent(b, pair.sizes[1])
    else:
        dots = there.collections[1]
        assert dots.get_array()[-1] == similarity.max()  # the most similar on top
        assert dots.get_offsets()[-1].tolist() == b.xy[best].tolist()


def test_what_a_pair_has_not_is_not_drawn(steps):
    """No geometry, no correspondence: the photographs alone, and why."""
    _, step, pairs = steps
    found = match.open_match(step)
    row = max(pairs, key=lambda row: row["inliers"])
    pair, nothing = found.pair(row), np.zeros((0, 2), np.float32)
    lost = Geometry(None, np.zeros(0, bool), np.nan, False, "0 correspondences are too few")
    matches = Matches(np.zeros(0, int), np.zeros(0, int), np.zeros(0, np.float32))
    pair = replace(pair, geometry=lost, matches=matches, xy_a=nothing, xy_b=nothing)
    stand_in = SimpleNamespace(pair=lambda _: pair, tokens=found.tokens, upright=found.upright)
    lines, *components = figures.pair_views(stand_in, [row]).axes
    assert lines.get_title() == "A cannot be warped onto B: 0 correspondences are too few"
    assert len(components) == (0 if found.tokens(row)[0].grid is None else 2)


def test_a_sentence_stands_where_a_pair_cannot_be_shown(steps):
    _, step, pairs = steps
    found = match.open_match(step)
    nothing = figures.pair_views(found, [{**pairs[0], "candidate": None, "reason": "the backbone found nothing"}])
    unsaved = figures.pair_views(found, [{**pairs[0], "rank": 77}])
    none = figures.pair_views(found, [])
    for said, words in (
        (nothing, "found nothing"),
        (unsaved, "outputs that have 'npy'"),
        (none, "there was no pair"),
    ):
        assert words in said


def test_the_contact_sheet_says_angle_score_and_metres(steps):
    index, *_ = steps
    query, gallery = open_embeddings(index)
    ranking = read_ranking(index)
    metres = np.full(ranking.rows.shape, 1234.5)
    metres[:, 1] = np.nan
    figure = figures.hit_sheet(query, gallery, replace(ranking, metres=metres), n=2, k=3)
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 8
    assert titles[0].startswith("query, turned by 0 deg\n")
    assert titles[4].startswith("query, turned by 90 deg\n")
    assert titles[1].startswith(f"1: {ranking.scores[0, 0]:.3f}, 1234 m, right\n")
    assert "m," not in titles[2]
    frames = [axis.patches[0].get_edgecolor() for axis in figure.axes[1:4]]
    assert len({*frames}) == 2
    widths = figure.axes[0].get_subplotspec().get_gridspec().get_width_ratios()
    assert widths[0] > max(widths[1:])
    found = int((ranking.rows[0] >= 0).sum())
    assert len(figures.hit_sheet(query, gallery, ranking, n=1, k=50).axes) == 1 + found
