"""One contract for each table of plug-ins; a new line in a table is under test at once."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from imatch import backbones, indexes, matching, references, sinks
from imatch.backbones.sift_vocabulary import dead_leaves
from imatch.geometry import Estimator
from imatch.pooling import normalise
from imatch.records import ImatchError, Pair, Tokens

TABLES = [
    (backbones.CLASSICAL, backbones.create),
    (references.REFERENCES, references.create),
    (indexes.INDEXES, indexes.create),
    (matching.MATCHERS, matching.create),
    (sinks.SINKS, sinks.create),
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
        (backbones.create, backbones.CLASSICAL),
        (references.create, references.REFERENCES),
        (matching.create, matching.MATCHERS),
    ],
)
def test_unknown_and_mistyped_options_raise(create, table):
    for name in table:
        with pytest.raises(ImatchError, match="unknown option"):
            create(name, {"nothing": 1})
        option = next(iter(create(name).__dataclass_fields__))
        with pytest.raises(ImatchError, match=f"option {option} of .* wants"):
            create(name, {option: "text"})


# --- backbones


@pytest.fixture(params=[*backbones.CLASSICAL, "vits16", "cxTiny"])
def backbone(request):
    weights = request.getfixturevalue("weights")
    return backbones.create(request.param, data_key=str(weights / "data_key.json"))


def test_every_backbone_is_under_contract():
    assert set(backbones.BACKBONES) == {*backbones.CLASSICAL, "dinov3"}


def leaves(h, w, seed=0):
    return dead_leaves(np.random.default_rng(seed), side=max(h, w))[:h, :w]


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
    together, options = backbone(batch), backbones.identity(backbone)
    for one, photograph in zip(together, batch, strict=True):
        (alone,) = pickle.loads(pickle.dumps(backbone))(photograph[None])
        for name in ("vector", "descriptors", "xy"):
            a, b = getattr(one, name).astype(np.float32), getattr(alone, name).astype(np.float32)
            # a network's matrix products are rounded otherwise in another batch
            assert np.allclose(a, b, rtol=0, atol=1e-2 * np.abs(b).max() if "filename" in options else 0)
    assert [t.descriptors.tobytes() for t in backbone(batch)] == [t.descriptors.tobytes() for t in together]


@pytest.mark.parametrize("weight", backbones.CLASSICAL)
def test_classical_backbone_sees_nothing_in_an_even_grey(weight):
    (tokens,) = backbones.create(weight)(np.full((1, 64, 64, 3), 127, np.uint8))
    assert not tokens.vector.any()
    assert not tokens.descriptors.any()


def test_descriptor_positions_turn_with_the_photograph(backbone):
    """A quarter turn of the pixels must turn the positions exactly: a slip of half a pixel shows here as one."""
    photograph = leaves(128, 128)
    (upright,), (turned,) = backbone(photograph[None]), backbone(np.rot90(photograph)[None])
    expected = np.column_stack([upright.xy[:, 1], 127 - upright.xy[:, 0]])
    distance = np.linalg.norm(expected[:, None] - turned.xy[None], axis=2).min(axis=1)
    assert np.median(distance) < 0.02


def test_dense_descriptor_sits_at_the_centre_of_its_patch():
    """Mirrored pixels give mirrored patches: the descriptors of the two must be each other's mirror."""
    from imatch.backbones.dsift import DenseSift

    photograph = leaves(96, 128)
    (upright,), (mirrored,) = DenseSift()(photograph[None]), DenseSift()(photograph[None, :, ::-1].copy())
    # mirroring x reverses the columns of the 4 x 4 cells and maps the orientation bin b to 4 - b
    cells = mirrored.as_grid()[:, ::-1].reshape(6, 8, 4, 4, 8)[:, :, :, ::-1][..., (4 - np.arange(8)) % 8]
    cosine = (upright.as_grid() * cells.reshape(6, 8, 128)).sum(axis=2)
    assert np.median(cosine[1:-1, 1:-1]) > 0.9995  # half a pixel beside it, 0.9988


# --- indexes


@pytest.fixture(params=sorted(indexes.INDEXES))
def kind(request):
    return request.param


def unit(n, d=16, seed=0):
    return normalise(np.random.default_rng(seed).normal(size=(n, d))).astype(np.float32)


def test_index_finds_saves_and_loads(kind, tmp_path):
    vectors, queries = unit(200), unit(7, seed=1)
    index = indexes.create(kind)
    index.build(vectors)
    hits = index.search(queries, 5)
    expected = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :5]
    assert hits.rows.tolist() == expected.tolist()
    assert np.allclose(hits.scores, np.take_along_axis(queries @ vectors.T, expected, 1), atol=1e-5)
    index.save(tmp_path / "index.faiss")
    again = indexes.create(kind)
    again.load(tmp_path / "index.faiss")
    assert again.search(queries, 5).scores.tobytes() == hits.scores.tobytes()
    index.save(tmp_path / "second.faiss")
    assert (tmp_path / "index.faiss").read_bytes() == (tmp_path / "second.faiss").read_bytes()


def test_index_breaks_ties_by_row(kind):
    vectors = np.repeat(unit(3), 4, axis=0)
    index = indexes.create(kind)
    index.build(vectors)
    assert index.search(vectors[:1], 3).rows.tolist() == [[0, 1, 2]]


def test_index_answers_less_than_asked_with_minus_one(kind):
    index = indexes.create(kind)
    index.build(unit(2))
    hits = index.search(unit(1, seed=1), 4)
    assert hits.rows[0, 2:].tolist() == [-1, -1]
    assert np.isneginf(hits.scores[0, 2:]).all()
    assert hits.scores.dtype == np.float32


def test_index_refuses_what_is_wrong(kind, tmp_path):
    index = indexes.create(kind)
    with pytest.raises(ImatchError, match="empty"):
        index.search(unit(1), 1)
    with pytest.raises(ImatchError, match="at least one"):
        index.build(np.zeros((0, 4), np.float32))
    with pytest.raises(ImatchError, match="vector 1 has norm"):
        index.build(np.array([[1, 0], [np.nan, 0]], np.float32))
    index.build(unit(4))
    with pytest.raises(ImatchError, match="same backbone"):
        index.search(unit(1, d=8), 1)
    with pytest.raises(ImatchError, match="at least 1"):
        index.search(unit(1), 0)
    (tmp_path / "broken").write_bytes(b"no index at all")
    with pytest.raises(ImatchError, match="is not a FAISS index"):
        index.load(tmp_path / "broken")
    with pytest.raises(ImatchError, match="is not a FAISS index"):
        index.load(tmp_path / "absent")


# --- matchers


@pytest.fixture(params=sorted(matching.MATCHERS))
def matcher(request):
    return request.param


def tokens(descriptors):
    return Tokens(np.ones(1, np.float32), descriptors, np.zeros((len(descriptors), 2), np.float32))


def test_matcher_agrees_with_brute_force(matcher):
    rng = np.random.default_rng(3)
    a = unit(60, d=8, seed=1)
    b = normalise(np.concatenate([a[rng.permutation(60)[:40]] + rng.normal(0, 0.1, (40, 8)), unit(30, d=8, seed=2)]))
    b = b.astype(np.float32)
    similarity = a @ b.T
    brute = [
        (float(similarity[i, j]), i, int(j))
        for i, j in enumerate(similarity.argmax(axis=1))
        if similarity[:, j].argmax() == i and similarity[i, j] >= 0.7
    ]
    brute.sort(key=lambda pair: (-pair[0], pair[1]))
    matches = matching.create(matcher, {"min_similarity": 0.7})(tokens(a), tokens(b))
    assert list(zip(matches.index_a.tolist(), matches.index_b.tolist(), strict=True)) == [(i, j) for _, i, j in brute]
    assert len({*matches.index_a.tolist()}) == len({*matches.index_b.tolist()}) == len(matches)
    fewer = matching.create(matcher, {"min_similarity": 0.7, "max_matches": 5})(tokens(a), tokens(b))
    assert fewer.index_a.tolist() == matches.index_a[:5].tolist()


def test_matcher_has_an_answer_without_descriptors(matcher):
    none = tokens(np.zeros((0, 8), np.float32))
    for a, b in ((none, tokens(unit(3, d=8))), (tokens(unit(3, d=8)), none), (none, none)):
        assert len(matching.create(matcher)(a, b)) == 0


def test_matcher_refuses_two_kinds_of_descriptors(matcher):
    with pytest.raises(ImatchError, match="same backbone"):
        matching.create(matcher)(tokens(unit(3, d=8)), tokens(unit(3, d=4)))


# --- sinks


@pytest.fixture
def pair(few_photographs):
    descriptors = unit(30, d=8)
    xy = np.random.default_rng(0).uniform(5, 90, (30, 2)).astype(np.float32)
    matches = matching.create("mutual")(tokens(descriptors), tokens(descriptors))
    size = (96, 128)
    geometry = Estimator()(xy, xy, size, size)
    row = {
        "query": "a.png",
        "candidate": "a.png",
        "verified": True,
        "inliers": 30,
        "matches": 30,
        "rotation": 0.0,
        "scale": 1.0,
        "corner_error": 0.0,
    }
    path = Path(few_photographs / "a.png")
    return Pair(row, (path, path), (size, size), xy, xy, matches, geometry)


@pytest.mark.parametrize("sink", sorted(sinks.SINKS))
def test_sink_writes_the_same_bytes_twice(sink, pair, tmp_path):
    for name in ("one", "two"):
        sinks.create(sink)(tmp_path / "pairs" / name, pair)
    one, two = sorted((tmp_path / "pairs").iterdir())
    assert one.suffix == f".{sink}"
    assert one.read_bytes() == two.read_bytes() != b""


def test_picture_shows_what_was_matched(pair):
    from dataclasses import replace

    from imatch.sinks.png import draw

    drawn, empty = draw(pair), draw(pair, shown=np.zeros(30, bool))
    assert drawn.shape == empty.shape
    assert (drawn != empty).any(axis=2).sum() > 500
    nothing = draw(replace(pair, geometry=replace(pair.geometry, matrix=None)), shown=np.zeros(30, bool))
    assert (nothing != empty).any()
