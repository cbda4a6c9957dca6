"""Photographs in several poses, and what they and the other options add to a search."""

import shutil

import numpy as np
import pytest

import imatch
from imatch.core import files
from imatch.core.types import ImatchError, StepError
from imatch.data import images, rotations, store
from imatch.data.images import Decoded
from imatch.data.rotations import Pose
from imatch.data.store import Stored
from imatch.evaluation import tables
from imatch.features.sift import keypoints
from imatch.retrieval import ranking as retrieval_ranking
from imatch.retrieval.ranking import token_score
from imatch.steps.embedding import embed_poses, worth_trying
from tests.grouped import by
from tests.leaves import dead_leaves
from tests.test_steps import embedded, indexed, judged, matched, referenced, searched, with_toys, write_leaves


def photograph(h, w):
    pixels = dead_leaves(3, max(h, w))[:h, :w]
    return Decoded(pixels, (2 * h, 2 * w), "", None, (0.0, 0.0, 2.0 * w, 2.0 * h))


# --- pixels and positions


@pytest.mark.parametrize("degrees", [45.0, 90.0, 135.0, 180.0, 270.0, 315.0])
def test_a_turned_photograph_knows_where_its_pixels_were(degrees):
    """Keypoints of the turned pixels lie where those of the upright ones do. Its size on disk is twice as large."""
    upright = photograph(150, 210)
    turned = rotations.turned(upright, degrees, patch=16)
    if degrees % 90:
        assert not any(side % 16 for side in turned.pixels.shape[:2])
    there = upright.to_original(keypoints(upright.pixels, 50, 0.02)[0])
    back = turned.to_original(keypoints(turned.pixels, 2000, 0.0)[0])
    nearest = np.linalg.norm(there[:, None] - back[None], axis=2).min(axis=1)
    assert np.median(nearest) < (0.3 if degrees % 90 else 0.02)


def test_right_angles_change_no_pixel():
    upright = photograph(32, 48)
    for degrees in (90, 180, 270):
        turned = rotations.turned(upright, degrees, patch=16).pixels
        assert np.array_equal(turned, np.rot90(upright.pixels, degrees // 90))


def test_tokens_outside_the_photograph_are_dropped():
    from imatch.features.sift import DenseSift

    turned = rotations.turned(photograph(96, 160), 45, patch=16)
    (tokens,) = DenseSift()(turned.pixels[None])
    placed = rotations.placed(tokens, turned)
    assert placed.grid is None
    assert len(placed.xy) == pytest.approx(
        96 * 160 / 16**2, rel=0.15
    )  # one a patch of the photograph, not of the canvas
    assert (placed.xy >= -0.5).all()
    assert (placed.xy <= [319.5, 191.5]).all()
    nearest = np.linalg.norm(placed.xy[:, None] - placed.xy[None], axis=2) + 1e9 * np.eye(len(placed.xy))
    assert np.allclose(nearest.min(axis=1), 32, atol=1e-3)  # the original is twice as large


def test_only_sensible_poses():
    with pytest.raises(ImatchError, match="rotations is 5: use 1"):
        rotations.poses(5)
    with pytest.raises(ImatchError, match="zooms"):
        rotations.poses(4, [0.0])
    assert len(rotations.poses(8, [1.0, 2.0])) == 16
    assert rotations.poses(1) == [rotations.UPRIGHT]


# --- steps


def test_poses_are_steps_beside_the_upright_one(few_photographs, tmp_path, capsys):
    folder = tmp_path / "photographs"
    shutil.copytree(few_photographs, folder)
    step = embedded(folder, tmp_path / "exports", weight="dsift")
    wanted = [*rotations.poses(4), Pose(0.0, 2.0)]
    found = embed_poses(Stored(step.folder), wanted, resources=by(workers=0))
    assert sorted(path.name for path in step.folder.parent.iterdir()) == [
        "scale1_raw",
        *(f"scale1_raw_{pose}" for pose in ("rot000_x2", "rot090", "rot180", "rot270")),
    ]
    upright = Stored(step.folder)
    for row, meta in enumerate(upright.rows):
        tokens = dict(found.tokens(row))
        assert list(tokens) == wanted
        assert len(tokens[Pose(0.0, 2.0)].xy) == pytest.approx(4 * meta["n"], rel=0.3)
        h, w = meta["size"]
        for one in tokens.values():
            assert (one.xy <= [w - 0.5, h - 0.5]).all()
            assert one.xy.max(axis=0) == pytest.approx([w, h], rel=0.2)
    assert [len(vectors) for _, vectors in found.vectors(slice(1, 3))] == [2] * 5
    capsys.readouterr()
    embed_poses(Stored(step.folder), wanted, resources=by(workers=0))
    assert capsys.readouterr().out.count("there already") == 4
    images.Image.fromarray(dead_leaves(9, 96)).save(folder / "a.png")
    with pytest.raises(StepError, match=r"changed: a\.png"):
        embed_poses(Stored(step.folder), wanted, resources=by(workers=0))
    with pytest.raises(StepError, match=r"a\.png has changed since .*: run 01_embed again"):
        embed_poses(Stored(step.folder), [rotations.UPRIGHT, Pose(45.0)], resources=by(workers=0))


def test_a_photograph_that_broke_since_is_no_photograph_without_texture(few_photographs, tmp_path):
    folder = tmp_path / "photographs"
    shutil.copytree(few_photographs, folder)
    step = embedded(folder, tmp_path / "exports", weight="dsift")
    (folder / "b.png").unlink()
    with pytest.raises(StepError, match=r"1 photographs of .* cannot be read any more, such as b\.png"):
        embed_poses(Stored(step.folder), rotations.poses(4), resources=by(workers=0))


def test_a_zoom_that_fits_no_patch_is_said_before_anything_is_written(few_photographs, tmp_path):
    long_side = imatch.Resize("long_side", long_side=96)
    step = embedded(few_photographs, tmp_path, weight="dsift", resize=long_side)
    with pytest.raises(ImatchError, match=r"zoom 1\.25: long_side 120 is not a multiple of patch 16"):
        embed_poses(Stored(step.folder), rotations.poses(1, [1.25]), resources=by(workers=0))
    assert [path.name for path in step.folder.parent.iterdir()] == [step.folder.name]
    with pytest.raises(ImatchError, match="zooms"):
        rotations.poses(1, ["a"])


def test_a_backbone_that_turns_needs_no_poses(few_photographs, tmp_path, capsys):
    step = embedded(few_photographs, tmp_path)
    assert worth_trying(step, rotations.poses(8)) == [rotations.UPRIGHT]
    assert "sift turns and zooms with its photographs" in capsys.readouterr().out
    data, references = step, referenced(step)[1]
    started = indexed(data, references, "reference-data", rotations=8)
    assert started.parameters["ranking"]["rotations"] == 1


# --- 1:1 matching of turned queries


@pytest.fixture(scope="module")
def large_photographs(tmp_path_factory):
    """Three procedural photographs of some 500 patches."""
    folder = tmp_path_factory.mktemp("photographs") / "large"
    folder.mkdir()
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        leaves = dead_leaves(seed, 416)[: 320 + 16 * seed]
        images.Image.fromarray(leaves).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def turned_queries(large_photographs, tmp_path_factory):
    """References at angles that dense SIFT does not bear, retrieved from their photographs."""
    data = embedded(large_photographs, tmp_path_factory.mktemp("exports"), weight="dsift")
    _, references = referenced(data, angles=(0, 30, 90, 200), file_type="png")
    return searched(data, references, "reference-data", k=3)[0]


def own(rows):
    """The rows of references with their own photographs."""
    return [row for row in rows if row["has_truth"]]


def test_turned_queries_are_matched_in_the_pose_that_fits(turned_queries):
    upright, turned = (
        own(matched(turned_queries, rotations=n, refine="pixel", candidates=3, outputs=["npy"], tag=f"r{n}")[1])
        for n in (1, 8)
    )
    assert len(upright) == len(turned) == 12
    assert {row["turn"] for row in upright} == {0.0}
    missed = [row["corner_error"] is None or row["corner_error"] > 1 for row in turned]
    assert sum(missed) <= 1
    assert sum(row["corner_error"] is not None and row["corner_error"] <= 1 for row in upright) <= 6  # 0 and 30 degrees
    for row, fails in zip(turned, missed, strict=True):
        if not fails:
            off = (row["turn"] + row["angle"] + 180) % 360 - 180  # turned back, to the nearest eighth of the circle
            assert abs(off) <= 22.5
            assert row["rotation"] is None or (row["rotation"] + row["angle"] + 180) % 360 - 180 == pytest.approx(
                0, abs=1
            )


def test_a_saved_pair_is_read_in_its_pose(turned_queries):
    step, rows, _ = matched(turned_queries, rotations=4, candidates=1, outputs=["npy"], tag="read")
    matches = imatch.steps.open_match(step)
    for row in rows:
        pair, (a, b) = matches.pair(row), matches.tokens(row)
        assert np.array_equal(pair.xy_a, a.xy[pair.matches.index_a])
        assert (a.grid is None) == (row["turn"] != 0)
        assert len(matches.upright(row).xy) >= len(b.xy) / 4
    again, *_ = matched(turned_queries, rotations=4, candidates=1, outputs=["npy"], tag="again")
    assert (step.folder / "pairs.jsonl").read_bytes() == (again.folder / "pairs.jsonl").read_bytes()


def test_a_photograph_that_is_gone_ends_no_run(large_photographs, tmp_path):
    folder = tmp_path / "photographs"
    shutil.copytree(large_photographs, folder)
    data = embedded(folder, tmp_path / "exports", weight="dsift")
    index = searched(data, referenced(data)[1], "reference-data", k=3)[0]
    (folder / "a.png").unlink()
    rows = matched(index, refine="pixel", candidates=3, outputs=["npy"])[1]
    gone = [row for row in rows if row["candidate"] == "a.png"]
    assert {row["verified"] for row in gone} == {False}
    assert any("the photographs cannot be compared: No such file" in row["reason"] for row in gone)
    assert any(row["verified"] for row in rows if row["candidate"] != "a.png")


def test_an_enlarged_query_finds_a_larger_place(large_photographs, tmp_path):
    """Queries of half the size: zoomed by 2 they look like their photographs."""
    small = tmp_path / "small"
    small.mkdir()
    for path in large_photographs.glob("*.png"):
        picture = images.Image.open(path)
        half = picture.resize((picture.width // 2, picture.height // 2), images.Image.Resampling.BOX)
        half.save(small / path.name)
    data = embedded(large_photographs, tmp_path / "exports", weight="dsift")
    queries = embedded(small, tmp_path / "exports", weight="dsift", tag="query")
    index = searched(data, queries, "reference-data", k=3)[0]
    given = {"candidates": 3, "outputs": ["npy"], "zooms": [1.0, 2.0], "refine": "pixel"}
    rows = matched(index, **given)[1]
    same = [row for row in rows if row["query"] == row["candidate"]]
    assert len(same) == 3
    assert [row["zoom"] for row in same] == [2.0] * 3
    assert all(row["verified"] and row["scale"] == pytest.approx(2, rel=0.05) for row in same)


def test_what_cannot_be_matched_so_is_refused(turned_queries):
    for given, said in (
        ({"rotations": 3}, "rotations is 3"),
        ({"zooms": [-1.0]}, "zooms"),
        ({"refine": "pixels"}, "did you mean 'pixel'"),
        ({"refine": "pixel", "model": "off"}, "starts from a geometry"),
        ({"model": "similarity", "method": "magsac"}, "ransac"),
    ):
        with pytest.raises(ImatchError, match=said):
            matched(turned_queries, tag="never", **given)
    assert not list(turned_queries.folder.parents[5].rglob("*_never"))


# --- a better search, or a worse one


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Twelve procedural photographs known by their pixels, and each turned by right angles."""
    with_toys(monkeypatch)
    data = embedded(write_leaves(tmp_path / "leaves"), tmp_path / "exports", weight="pixels")
    return data, referenced(data, angles=(0, 90, 180, 270))[1]


def test_rotations_find_what_was_turned_and_say_by_how_much(drawn):
    step = indexed(*drawn, "reference-data", rotations=4, tag="turned")
    _, _, ranking, rows, metrics = judged(step)
    plain, turned = imatch.steps.index_stages(step)
    assert (plain["stage"], turned["stage"]) == ("plain", "4 rotations")
    assert plain["hit_at_1"]["value"] < 0.5
    assert turned["hit_at_1"]["value"] == metrics["hit_at_1"] == 1.0
    assert tables.difference_said(turned["difference"]) == "better"
    assert metrics["stages"] == [plain, turned]
    angles = [row["angle"] for row in rows]
    assert ranking.turn[:, 0].tolist() == [(-angle) % 360 for angle in angles]
    record = files.read_json(next((step.folder / "queries").glob("*rot090*")))
    assert record["hits"][0]["turn"] == 270.0
    assert (step.folder / "hits.csv").read_text().splitlines()[0].endswith(",turn")


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_whitening_expansion_and_tokens_against_loops(few_photographs, tmp_path):
    """Each stage of the search, recomputed without an index, a block or a store."""
    data = embedded(few_photographs, tmp_path / "exports")
    _, references = referenced(data, angles=(0, 90, 200))
    step = indexed(data, references, "data-reference", whiten=5, expand=2, rerank=4, tokens=16, k=6, tag="better")
    query, gallery, ranking, _, _ = judged(step)
    q, g = np.asarray(query.vectors, float), np.asarray(gallery.vectors, float)
    centred = g - g.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)
    matrix = axes[2][:5].T / axes[1][:5]
    q, g = unit((q - g.mean(axis=0)) @ matrix), unit(centred @ matrix)
    first = np.argsort(-q @ g.T, axis=1)[:, :2]
    weights = np.take_along_axis(q @ g.T, first, 1).clip(0) ** 3
    expanded = unit(q + (weights[:, :, None] * g[first]).sum(axis=1))
    order = np.argsort(-expanded @ g.T, axis=1)[:, :6]
    for row, hits in enumerate(order):
        own = store.aggregate(query.tokens(row).descriptors, 16)
        there = np.stack([store.aggregate(gallery.tokens(hit).descriptors, 16) for hit in hits[:4]])
        again = np.argsort(-token_score(own, there), kind="stable")
        assert ranking.rows[row].tolist() == [*hits[:4][again], *hits[4:]]
        assert ranking.scores[row] == pytest.approx((expanded @ g.T)[row, ranking.rows[row]], abs=1e-4)
    names = [stage["stage"] for stage in imatch.steps.index_stages(step)]
    assert names == ["plain", "whitened to 5", "expanded by 2", "4 by 16 tokens"]
    assert ranking.turn is None


def test_what_hurts_is_said(drawn):
    """Whitening to one dimension leaves two places to be in."""
    step = indexed(*drawn, "reference-data", whiten=1, rotations=4, tag="hurt")
    judged(step)
    stages = {row["stage"]: row for row in imatch.steps.index_stages(step)}
    searched(*drawn, "reference-data", rotations=4, tag="unhurt")
    assert stages["4 rotations"]["hit_at_1"]["value"] < 1
    assert "whitened to 1" in tables.stage_table(list(stages.values()))


def test_the_first_score_without_an_answer_is_of_the_first_wrong_hit(drawn):
    """After re-ranking the order is no longer that of the scores."""
    step = indexed(*drawn, "reference-data", rotations=4, rerank=5, tag="order")
    _, _, ranking, rows, _ = judged(step)
    for q, row in enumerate(rows):
        wrong = np.flatnonzero(~ranking.right[q] & (ranking.rows[q] >= 0))
        assert row["score_without"] == pytest.approx(ranking.scores[q, wrong[0]])


def test_what_is_found_without_the_answers_is_not_led_by_them(drawn):
    """Queries are expanded anew without their right answers: as if these were not in the gallery at all."""
    step = indexed(*drawn, "data-reference", expand=3, k=3, tag="without")
    query, gallery, ranking, _, _ = judged(step)
    q, g = np.asarray(query.vectors, float), np.asarray(gallery.vectors, float)
    for row, shown in enumerate(query.shows):
        others = g[[i for i, of in enumerate(gallery.shows) if of != shown]]
        scores = others @ q[row]
        near = np.argsort(-scores, kind="stable")[:3]
        expanded = q[row] + (scores[near].clip(0)[:, None] ** 3 * others[near]).sum(axis=0)
        assert ranking.without[row] == pytest.approx((others @ expanded).max() / np.linalg.norm(expanded), abs=1e-5)


def test_a_query_that_finds_nothing_is_ranked_and_counted(few_photographs, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    shutil.copy(few_photographs / "a.png", folder)
    data = embedded(folder, tmp_path / "exports")
    step = indexed(data, None, "data-data", rerank=5, expand=2, tag="alone")
    _, _, ranking, _, metrics = judged(step)
    step.finish(metrics)
    assert ranking.rows[0].tolist() == [-1] * 5
    (row,) = matched(step)[1]
    assert (row["candidate"], row["reason"]) == (None, "nothing was found")


def test_a_better_search_goes_on_where_it_was_killed(drawn, monkeypatch):
    given = {"whiten": 4, "rotations": 4, "expand": 1, "rerank": 3}
    whole = indexed(*drawn, "reference-data", tag="whole", **given)
    judged(whole)
    killed = indexed(*drawn, "reference-data", tag="killed", **given)
    query, gallery = imatch.steps.open_embeddings(killed)
    index = imatch.steps.build_index(killed, gallery)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retrieval_ranking, "token_score", stop)
        with pytest.raises(KeyboardInterrupt):
            imatch.steps.search(killed, index, query, gallery)
    before = (killed.folder / "tokens" / "00000.npy").stat().st_mtime_ns
    judged(indexed(*drawn, "reference-data", tag="killed", **given))
    assert (killed.folder / "tokens" / "00000.npy").stat().st_mtime_ns == before
    for name in ("ranking.npz", "whitened.npy", "hits.csv"):
        assert (killed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_bad_options_are_refused_before_anything_is_written(drawn):
    for given, said in (
        ({"rotations": 3}, "rotations is 3"),
        ({"whiten": -1}, "whiten must be greater than or equal to 0"),
        ({"tokens": 0}, "tokens must be greater than 0"),
    ):
        with pytest.raises(ImatchError, match=said):
            indexed(*drawn, "reference-data", tag="never", **given)
    with pytest.raises(ImatchError, match="at most 11 axes"):
        indexed(*drawn, "reference-data", whiten=12, tag="wide")
