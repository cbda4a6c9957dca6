"""One contract for each table of plug-ins; a new line in a table is under test at once."""

import dataclasses
import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from imatch.core.types import ImatchError, Pair, StepError, Tokens, normalise
from imatch.features import base
from imatch.features.xfeat import XFeat
from imatch.matching import matchers
from imatch.matching.two_view import Estimator
from imatch.retrieval import index as searcher
from imatch.retrieval import kinds
from imatch.retrieval.index import IndexOptions
from imatch.steps import match
from tests.leaves import dead_leaves

TABLES = [
    (base.NAMED, base.create_backbone),
    (kinds.INDEXES, kinds.create_kind),
    (matchers.MATCHERS, matchers.create_matcher),
    (match.OUTPUTS, match.create_output),
]


@pytest.mark.parametrize(("table", "create"), TABLES, ids=lambda x: getattr(x, "__module__", ""))
def test_unknown_name_gets_the_nearest(table, create):
    for name in table:
        assert create(name) is not None
        with pytest.raises(ImatchError, match=f"did you mean {name!r}"):
            create(f"{name}x")


@pytest.mark.parametrize(
    ("create", "table"),
    [
        (base.create_backbone, base.NAMED),
        (matchers.create_matcher, matchers.MATCHERS),
    ],
)
def test_unknown_and_mistyped_options_raise(create, table):
    for name in table:
        with pytest.raises(ImatchError, match="unknown option"):
            create(name, {"nothing": 1})
        option = dataclasses.fields(create(name))[0].name
        with pytest.raises(ImatchError, match=f"option {option} must be"):
            create(name, {option: "text"})


# --- backbones


@pytest.fixture(params=[*base.NAMED, "vits16", "cxTiny"])
def backbone(request):
    weights = request.getfixturevalue("weights")
    return base.create_backbone(request.param, data_key=str(weights / "data_key.json"))


def test_every_backbone_is_under_contract():
    assert set(base.BACKBONES) == {*base.NAMED, "dinov3"}


def leaves(h, w, seed=0):
    return dead_leaves(seed, max(h, w))[:h, :w]


def test_backbone_shapes(backbone):
    h, w = 6 * backbone.patch * (16 // backbone.patch or 1), 10 * backbone.patch * (16 // backbone.patch or 1)
    batch = np.stack([leaves(h, w, seed) for seed in range(2)])
    for tokens in backbone(batch):
        n, d = tokens.descriptors.shape
        assert n > 10
        assert tokens.vector.dtype == np.float32
        assert np.linalg.norm(tokens.vector) == pytest.approx(1, abs=1e-5)
        assert np.isfinite(tokens.descriptors.astype(np.float32)).all()
        assert tokens.xy.shape == (n, 2)
        assert (tokens.xy >= -0.5).all()
        assert (tokens.xy <= [w - 0.5, h - 0.5]).all()
        if tokens.grid:
            assert tokens.grid == (h // backbone.patch, w // backbone.patch)
            assert tokens.as_grid().shape == (*tokens.grid, d)
            assert np.shares_memory(tokens.as_grid(), tokens.descriptors)


def test_backbone_is_deterministic_and_independent_of_the_batch(backbone):
    batch = np.stack([leaves(96, 128, seed) for seed in range(3)])
    together, options = backbone(batch), base.backbone_identity(backbone)
    for one, photograph in zip(together, batch, strict=True):
        (alone,) = pickle.loads(pickle.dumps(backbone))(photograph[None])
        for name in ("vector", "descriptors", "xy"):
            a, b = getattr(one, name).astype(np.float32), getattr(alone, name).astype(np.float32)
            # a network's matrix products are rounded otherwise in another batch
            assert np.allclose(a, b, rtol=0, atol=1e-2 * np.abs(b).max() if "filename" in options else 0)
    assert [t.descriptors.tobytes() for t in backbone(batch)] == [t.descriptors.tobytes() for t in together]


@pytest.mark.parametrize("weight", base.NAMED)
def test_classical_backbone_sees_nothing_in_an_even_grey(weight):
    (tokens,) = base.create_backbone(weight)(np.full((1, 64, 64, 3), 127, np.uint8))
    assert not tokens.vector.any()
    assert not tokens.descriptors.any()


def test_descriptor_positions_turn_with_the_photograph(backbone):
    """A quarter turn of the pixels must turn the positions exactly: a slip of half a pixel shows here as one."""
    if isinstance(backbone, XFeat):
        pytest.skip("its keypoints do not rotate with the photograph; test_xfeat.py moves one")
    photograph = leaves(128, 128)
    (upright,), (turned,) = backbone(photograph[None]), backbone(np.rot90(photograph)[None])
    expected = np.column_stack([upright.xy[:, 1], 127 - upright.xy[:, 0]])
    distance = np.linalg.norm(expected[:, None] - turned.xy[None], axis=2).min(axis=1)
    assert np.median(distance) < 0.02


def test_dense_descriptor_sits_at_the_centre_of_its_patch():
    """Mirrored pixels give mirrored patches: the descriptors of the two must be each other's mirror."""
    from imatch.features.sift import DenseSift

    photograph = leaves(96, 128)
    (upright,), (mirrored,) = DenseSift()(photograph[None]), DenseSift()(photograph[None, :, ::-1].copy())
    # mirroring x reverses the columns of the 4 x 4 cells and maps the orientation bin b to 4 - b
    cells = mirrored.as_grid()[:, ::-1].reshape(6, 8, 4, 4, 8)[:, :, :, ::-1][..., (4 - np.arange(8)) % 8]
    cosine = (upright.as_grid() * cells.reshape(6, 8, 128)).sum(axis=2)
    assert np.median(cosine[1:-1, 1:-1]) > 0.9995  # half a pixel beside it, 0.9988


# --- indexes


OPTIONS = {"factory": {"key": "IVF16,SQ8", "search": "nprobe=8"}, "ivf_pq": {"parts": 8}, "hnsw": {"construction": 40}}
FLOOR = {"flat": 1.0, "ivf_flat": 0.95, "hnsw": 0.95, "ivf_pq": 0.9, "ivf_rabitq": 0.9, "factory": 0.9}
"""Recall@10 on clustered vectors that each kind reaches once it is tuned."""


@pytest.fixture(params=sorted(kinds.INDEXES))
def kind(request):
    return request.param


def unit(n, d=16, seed=0):
    return normalise(np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def clustered(n, d=32, seed=0):
    """As photographs of places are: near a few centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, d))
    return normalise(centres[rng.integers(0, 40, n)] + 0.4 * rng.normal(size=(n, d))).astype(np.float32)


def built(folder, vectors, kind, options=None, shard_rows=0, **given):
    asked = IndexOptions(kind, OPTIONS.get(kind, {}) if options is None else options, **given)
    return searcher.build(folder, vectors, searcher.digest(vectors), asked, shard_rows=shard_rows)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "index.json"}


def test_index_builds_saves_loads_and_reaches_its_recall(kind, tmp_path):
    vectors, queries = clustered(3000), clustered(60, seed=1)
    index = built(tmp_path / "one", vectors, kind)
    points = index.curve(queries, 10)
    chosen = index.tune(points, FLOOR[kind])
    assert chosen == next((point for point in points if point.recall >= FLOOR[kind]), None)
    assert [point.effort for point in points] == (index.kind.efforts(3000) or [None])[: len(points)]
    hits, exact = index.search(queries, 10), index.exact(queries, 10)
    recall = np.mean([len({*a} & {*b}) / 10 for a, b in zip(hits.rows.tolist(), exact.rows.tolist(), strict=True)])
    assert recall >= FLOOR[kind]
    again = built(tmp_path / "one", vectors, kind)
    assert again.effort == index.effort
    assert again.search(queries, 10).rows.tobytes() == hits.rows.tobytes()
    assert again.search(queries, 10).scores.tobytes() == hits.scores.tobytes()
    one_by_one = np.concatenate([again.search(query[None], 10).scores for query in queries])
    assert np.allclose(one_by_one, hits.scores, atol=1e-6)
    built(tmp_path / "two", vectors, kind)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_index_scores_are_cosines_best_first(kind, tmp_path):
    vectors, queries = clustered(3000), clustered(20, seed=1)
    index = built(tmp_path / "index", vectors, kind)
    hits = index.search(queries, 5, 64 if index.kind.effort else None)
    assert np.allclose(hits.scores, np.einsum("qd,qkd->qk", queries, vectors[hits.rows]), atol=1e-6)
    assert (np.diff(hits.scores, axis=1) <= 0).all()


def test_index_shards_search_as_one(kind, tmp_path):
    vectors, queries = clustered(3000), clustered(20, seed=1)
    one, several = built(tmp_path / "one", vectors, kind), built(tmp_path / "three", vectors, kind, shard_rows=1100)
    assert (len(one.shards), len(several.shards)) == (1, 3)
    effort = 1024 if one.kind.effort == "efSearch" else 4096 if one.kind.effort else None
    if kind != "factory":  # its search string looks into some of its lists alone
        exact = one.exact(queries, 5)
        floor = 0.9 if one.kind.refine > 1 else 1.0
        assert (several.search(queries, 5, effort).rows == exact.rows).mean() >= floor
    assert (several.search(queries, 5, effort).rows == one.search(queries, 5, effort).rows).mean() >= 0.9


def test_index_follows_its_gallery(kind, tmp_path):
    """Photographs come and go: it is built again, byte by byte the index of the new gallery; else it stays."""
    before, queries = clustered(3000), clustered(20, seed=1)
    folder = tmp_path / "index"
    built(folder, before, kind, shard_rows=1000)
    made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    built(folder, before, kind, shard_rows=1000)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    for after in (
        np.concatenate([clustered(7, seed=5), before[20:1500], before[1501:]]),  # gone, come, and all rows moved
        np.roll(before, 1, axis=0),  # the same vectors in other rows
    ):
        updated = built(folder, after, kind, shard_rows=1000)
        fresh = built(tmp_path / f"fresh {len(after)}", after, kind, shard_rows=1000)
        assert files(folder) == files(fresh.folder)
        assert (
            updated.exact(queries, 5).rows.tolist() == np.argsort(-queries @ after.T, 1, kind="stable")[:, :5].tolist()
        )


def test_an_update_killed_inside_a_shard_mixes_nothing(kind, tmp_path, monkeypatch):
    vectors, queries = clustered(3000), clustered(20, seed=1)
    folder, after = tmp_path / "index", np.concatenate([vectors[20:1500], clustered(20, seed=5), vectors[1500:]])
    built(folder, vectors, kind, shard_rows=1500)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(searcher, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            built(folder, after, kind, shard_rows=1500)
    index = built(folder, after, kind, shard_rows=1500)
    effort = 1024 if index.kind.effort == "efSearch" else 16 if index.kind.effort else None
    assert (index.search(queries, 10, effort).rows[:, 0] == index.exact(queries, 1).rows[:, 0]).mean() >= 0.9


def test_a_graph_by_the_factory_is_the_same_every_time(tmp_path):
    vectors = clustered(3000)
    for name in ("one", "two"):
        built(tmp_path / name, vectors, "factory", {"key": "HNSW16,Flat"})
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_index_memory_is_as_the_formula_says(kind, tmp_path):
    vectors = unit(20_000, d=64)
    few = {"factory": {"key": "IVF16,Flat"}, "ivf_pq": {"parts": 2, "centroids": 8}, "hnsw": {"construction": 8}}
    options = few.get(kind, {})
    if kind.startswith("ivf") and "centroids" not in options:
        options = {**options, "centroids": 32}
    stored = built(tmp_path / "index", vectors, kind, options).stored()
    assert stored == pytest.approx(kinds.create_kind(kind, options).memory(*vectors.shape), rel=0.05)


def test_memory_counts_what_a_refinement_keeps(tmp_path):
    vectors, options = unit(5000, d=64), {"key": "IVF16,PQ8x4,RFlat"}
    stored = built(tmp_path / "index", vectors, "factory", options).stored()
    assert stored == pytest.approx(kinds.create_kind("factory", options).memory(*vectors.shape), rel=0.01)


def test_index_breaks_ties_by_row(kind, tmp_path):
    vectors = np.repeat(clustered(100), 30, axis=0)
    hits = built(tmp_path / "index", vectors, kind, shard_rows=1300).search(vectors[:1], 3, 64)
    found = hits.rows[0].tolist()
    assert found == ([0, 1, 2] if kind in ("flat",) else sorted(found))
    assert len({*found}) == 3
    assert max(found) < 30


def test_index_answers_less_than_asked_with_minus_one(tmp_path):
    for kind in ("flat", "ivf_flat", "hnsw"):
        hits = built(tmp_path / kind, unit(2), kind).search(unit(1, seed=1), 4, 16)
        assert hits.rows[0, 2:].tolist() == [-1, -1]
        assert np.isneginf(hits.scores[0, 2:]).all()
        assert hits.scores.dtype == np.float32


def test_index_refuses_what_is_wrong(kind, tmp_path):
    folder, vectors = tmp_path / "index", clustered(600)
    with pytest.raises(ImatchError, match="at least one"):
        built(folder, np.zeros((0, 4), np.float32), kind)
    bad = vectors.copy()
    bad[1, 0] = np.nan
    with pytest.raises(ImatchError, match="vector 1 has norm nan"):
        built(folder, bad, kind)
    with pytest.raises(ImatchError, match=r"more than 0\.00 MB"):
        built(folder, vectors, kind, memory_gb=1000 / 2**30)
    index = built(folder, vectors, kind)
    with pytest.raises(ImatchError, match="same backbone"):
        index.search(unit(1, d=8), 1)
    with pytest.raises(ImatchError, match="at least 1"):
        index.search(vectors[:1], 0)
    with pytest.raises(ImatchError, match="not finite"):
        index.search(bad[1:2], 1)
    with pytest.raises(ImatchError, match="no GPU" if kind in ("flat", "ivf_flat", "ivf_pq") else "GPU"):
        built(folder, vectors, kind, device="cuda")
    with pytest.raises(ImatchError, match=r"device .* is not known: use auto, cpu"):
        built(folder, vectors, kind, device="gpu")
    whole = (folder / "00000.faiss").read_bytes()
    (folder / "00000.faiss").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StepError, match="is not a whole FAISS index"):
        built(folder, vectors, kind)
    (folder / "00000.faiss").unlink()
    assert built(folder, vectors, kind).search(vectors[:1], 1, 64).rows.tolist() == [[0]]


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("flat", {"parts": 4}, "unknown option of index flat 'parts'"),
        ("ivf_pq", {"part": 4}, "did you mean 'parts'"),
        ("ivf_pq", {"parts": 5}, r"no index 'IVF\d+,PQ5' of 32 numbers: The dimension of the vector .* multiple"),
        ("ivf_flat", {"centroids": -1}, "index ivf_flat: option centroids must be greater than or equal to 0, got -1"),
        ("hnsw", {"neighbours": "many"}, "index hnsw: option neighbours must be a valid integer, got 'many'"),
        ("hnsw", {"neighbours": 1}, "index hnsw: option neighbours must be greater than or equal to 2, got 1"),
        ("factory", {"key": "NSG32,Flat"}, "FAISS cannot tell how large an index 'NSG32,Flat' will be"),
        ("factory", {"key": "IVF4,Flat", "seen": 0}, "option seen"),
        ("factory", {"key": "Fl{at"}, "could not parse index string Fl{at"),
        ("factory", {"key": "IVF4,SQ8", "search": "nprob=3"}, "with 'nprob=3': .*could not set parameter nprob"),
    ],
)
def test_options_of_an_index_that_do_not_fit_are_refused(kind, options, said, tmp_path):
    vectors = clustered(600)
    with pytest.raises(ImatchError, match=said):
        built(tmp_path / "index", vectors, kind, options)


def test_too_few_vectors_to_learn_from(tmp_path):
    built(tmp_path / "index", clustered(600), "ivf_pq")
    before = files(tmp_path / "index")
    with pytest.raises(ImatchError, match="wants as many vectors; there are 40: use flat"):
        built(tmp_path / "index", clustered(40), "ivf_pq")
    assert files(tmp_path / "index") == before
    few = clustered(40)
    with pytest.raises(ImatchError, match=r"40 vectors are too few to learn from \(.*\): use flat"):
        built(tmp_path / "other", few, "factory", {"key": "IVF64,Flat"})


def test_what_cannot_be_deleted_is_no_shard_of_another_gallery(tmp_path, monkeypatch):
    built(tmp_path / "index", clustered(600), "flat", shard_rows=200)
    unlink = os.unlink

    def busy(path, *given, **more):
        if str(path).endswith("00001.faiss"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        unlink(path, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        with pytest.raises(OSError, match="busy"):
            built(tmp_path / "index", clustered(600, seed=4), "flat", shard_rows=200)
    after = clustered(600, seed=4)
    assert built(tmp_path / "index", after, "flat", shard_rows=200).search(after, 1).rows[:, 0].tolist() == [
        *range(600)
    ]


def test_automatic_choice_explains_itself(tmp_path):
    assert searcher.choose(40_000, 384, 2**33) == ("flat", "flat takes 58.59 MB of 8.00 GB")
    kind, why = searcher.choose(10_000_000, 384, 2**35)
    assert kind == "ivf_flat"
    assert "flat takes 14.31 GB, but compares 3.8e+09 numbers a query" in why
    assert searcher.choose(10_000_000, 384, 2**31)[0] == "ivf_pq"
    assert searcher.choose(10_000_000, 384, 900 * 2**20)[0] == "ivf_rabitq"
    with pytest.raises(
        ImatchError, match=r"no index of 10000000 .* fits: flat takes .*; ivf_rabitq takes .* index\.memory_gb"
    ):
        searcher.choose(10_000_000, 384, 2**28)
    vectors = clustered(2000)
    index = built(tmp_path / "index", vectors, "auto", memory_gb=2000 * 4 * 32 / 2 / 2**30)
    assert index.plan["kind"] == "ivf_pq"
    assert "flat takes 0.24 MB, more than 0.12 MB" in index.plan["reason"]


def test_small_batches_take_matrix_products(tmp_path):
    import faiss

    vectors = unit(50, d=384)
    index = built(tmp_path / "index", vectors, "flat")
    for search in (index.search, index.exact):
        faiss.cvar.distance_compute_blas_threshold = 128_000
        search(vectors[:8], 1)
        assert faiss.cvar.distance_compute_blas_threshold == 8 * 384


def test_a_memory_map_is_read_in_blocks(tmp_path, monkeypatch):
    np.save(tmp_path / "vectors.npy", clustered(3000))
    vectors = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    monkeypatch.setattr(searcher, "BLOCK", 32 * 100)
    mapped = built(tmp_path / "index", vectors, "ivf_flat", shard_rows=700)
    queries = clustered(9, seed=1)
    exact = np.argsort(-queries @ np.asarray(vectors).T, 1, kind="stable")[:, :5]
    assert mapped.exact(queries, 5).rows.tolist() == exact.tolist()
    assert mapped.search(queries, 5, 4096).rows.tolist() == exact.tolist()


# --- matchers


@pytest.fixture(params=sorted({*matchers.MATCHERS} - {"lighterglue"}))  # that takes xfeat's alone: test_xfeat.py
def matcher(request):
    return request.param


def tokens(descriptors, grid=None):
    """Descriptors at places 16 pixels apart, row by row of a grid or, without one, of a square."""
    n = len(descriptors)
    columns = grid[1] if grid else max(1, round(n**0.5))
    xy = 16 * np.column_stack(np.divmod(np.arange(n), columns)[::-1]) + 7.5
    return Tokens(np.ones(1, np.float32), descriptors, xy.astype(np.float32), grid)


def pairs(matches):
    return list(zip(matches.index_a.tolist(), matches.index_b.tolist(), strict=True))


def photographs_tokens():
    """Sixty descriptors of A, of which forty recur in B, a little changed and in another order, among thirty others."""
    rng = np.random.default_rng(3)
    a, order = unit(60, d=64, seed=1), rng.permutation(60)[:40]
    b = np.concatenate([a[order] + rng.normal(0, 0.02, (40, 64)), unit(30, d=64, seed=2)])
    return tokens(a), tokens(normalise(b).astype(np.float32)), {(int(i), j) for j, i in enumerate(order)}


def test_matcher_finds_what_recurs(matcher):
    a, b, truth = photographs_tokens()
    matches = matchers.create_matcher(matcher)(a, b)
    assert set(pairs(matches)[: len(truth)]) == truth
    assert (matches.index_a.dtype, matches.index_b.dtype, matches.similarity.dtype) == (np.int64, np.int64, np.float32)
    cosine = (a.descriptors[matches.index_a] * b.descriptors[matches.index_b]).sum(axis=1)
    assert np.allclose(matches.similarity, cosine, rtol=0, atol=1e-6)
    assert (np.diff(matches.similarity) <= 0).all()
    fewer = matchers.create_matcher(matcher, {"max_matches": 5})(a, b)
    assert pairs(fewer) == pairs(matches)[:5]


def test_matcher_treats_both_sides_alike(matcher):
    a, b, _ = photographs_tokens()
    there, back = matchers.create_matcher(matcher)(a, b), matchers.create_matcher(matcher)(b, a)
    assert pairs(there) == [(i, j) for j, i in pairs(back)]


def test_matcher_takes_grids_keypoints_half_floats_and_any_length(matcher):
    a, b, truth = photographs_tokens()
    grids = tokens(7 * a.descriptors.astype(np.float16), (6, 10)), tokens(b.descriptors.astype(np.float64), (7, 10))
    for one, other in (grids, (grids[0], b), (a, grids[1])):
        assert set(pairs(matchers.create_matcher(matcher)(one, other))[: len(truth)]) == truth


def test_matcher_has_an_answer_without_descriptors(matcher):
    none = tokens(np.zeros((0, 8), np.float32))
    for a, b in ((none, tokens(unit(3, d=8))), (tokens(unit(3, d=8)), none), (none, none)):
        matches = matchers.create_matcher(matcher)(a, b)
        assert len(matches) == len(matches.index_a) == len(matches.index_b) == 0
        assert matches.index_a.dtype == np.int64


def test_matcher_has_an_answer_for_one_descriptor_and_for_what_differs(matcher):
    one = tokens(unit(1, d=8), (1, 1))
    assert pairs(matchers.create_matcher(matcher)(one, one)) == [(0, 0)]
    many = tokens(np.concatenate([unit(5, d=8, seed=4), one.descriptors]))
    assert pairs(matchers.create_matcher(matcher)(one, many)) == [(0, 5)]
    eye = np.eye(8, dtype=np.float32)
    apart = matchers.create_matcher(matcher)(tokens(eye[:4]), tokens(eye[4:]))
    assert len(apart) == 0


def test_matcher_never_matches_nothing(matcher):
    """Where a photograph is even, dense SIFT's descriptors are zeros."""
    nothing = tokens(np.zeros((1, 8), np.float32), (1, 1))
    some = tokens(np.concatenate([np.zeros((3, 8), np.float32), unit(2, d=8)]))
    assert len(matchers.create_matcher(matcher)(nothing, nothing)) == 0
    assert pairs(matchers.create_matcher(matcher)(some, some)) == [(3, 3), (4, 4)]


def test_matcher_refuses_two_kinds_of_descriptors(matcher):
    with pytest.raises(ImatchError, match="same backbone"):
        matchers.create_matcher(matcher)(tokens(unit(3, d=8)), tokens(unit(3, d=4)))


def test_matcher_refuses_fewer_than_no_matches(matcher):
    with pytest.raises(ImatchError, match=r"max_matches must be .*, got -1"):
        matchers.create_matcher(matcher, {"max_matches": -1})


# --- sinks


@pytest.fixture
def pair(few_photographs):
    descriptors = unit(30, d=8)
    xy = np.random.default_rng(0).uniform(5, 90, (30, 2)).astype(np.float32)
    matches = matchers.create_matcher("mutual")(tokens(descriptors), tokens(descriptors))
    size = (96, 128)
    geometry = Estimator()(xy, xy, size, size)
    row = {
        "query": "a.png",
        "candidate": "a.png",
        "verified": True,
        "inliers": 30,
        "matches": 30,
        "descriptors": [30, 30],
        "rotation": 0.0,
        "scale": 1.0,
        "corner_error": 0.0,
    }
    path = Path(few_photographs / "a.png")
    return Pair(row, (path, path), (size, size), xy, xy, matches, geometry)


@pytest.mark.parametrize("sink", sorted(match.OUTPUTS))
def test_sink_writes_the_same_bytes_twice(sink, pair, tmp_path):
    for name in ("one", "two"):
        match.create_output(sink)(tmp_path / "pairs" / name, pair)
    one, two = sorted((tmp_path / "pairs").iterdir())
    assert one.suffix == f".{sink}"
    assert one.read_bytes() == two.read_bytes() != b""


def test_picture_shows_what_was_matched(pair):
    from dataclasses import replace

    from imatch.viz.pictures import lines

    drawn, empty = lines(pair), lines(pair, shown=np.zeros(30, bool))
    assert drawn.shape == empty.shape
    assert (drawn != empty).any(axis=2).sum() > 500
    nothing = lines(replace(pair, geometry=replace(pair.geometry, matrix=None)), shown=np.zeros(30, bool))
    assert (nothing != empty).any()
