"""Better rankings: each method against loops over everything, where it must help, and where it must hurt."""

from types import SimpleNamespace

import faiss
import numpy as np
import pytest

from imatch.core.types import ImatchError, normalise
from imatch.data.store import aggregate
from imatch.retrieval import ranking
from imatch.retrieval.ranking import Found, Whitening, best_turn, expand, token_score


def hit_at_1(queries, gallery):
    """The share of queries whose nearest row of the gallery is their own."""
    return np.mean((queries @ gallery.T).argmax(axis=1) == np.arange(len(queries)))


def turned(degrees):
    """Unit vectors of the plane."""
    angle = np.deg2rad(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


# --- whitening


@pytest.mark.parametrize(("n", "d"), [(200, 12), (40, 40), (30, 90)], ids=["N > D", "N = D", "N < D"])
def test_whitening_against_svd(n, d):
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(n, d)) * np.geomspace(5, 1, d) + 3).astype(np.float32)
    whitening = Whitening.fit(vectors, 7)
    assert whitening.mean.dtype == whitening.matrix.dtype == np.float32
    assert whitening.mean == pytest.approx(vectors.mean(axis=0, dtype=float), rel=1e-6)
    _, spread, axes = np.linalg.svd(vectors - vectors.mean(axis=0, dtype=float), full_matrices=False)
    for column, axis, s in zip(whitening.matrix.T, axes, spread, strict=False):
        sign = 1 if axis[np.abs(axis).argmax()] > 0 else -1
        np.testing.assert_allclose(column, sign * axis / s * np.sqrt(n - 1), atol=1e-5)
    projected = (vectors - whitening.mean) @ whitening.matrix
    np.testing.assert_allclose(np.cov(projected.T), np.eye(7), atol=1e-4)
    np.testing.assert_allclose(whitening(vectors), normalise(projected), atol=1e-5)
    assert whitening(vectors).dtype == np.float32


def test_both_ways_to_the_axes_agree():
    """Dimensions of zeros change nothing, but leave fewer vectors than dimensions."""
    vectors = np.random.default_rng(1).normal(size=(50, 20))
    narrow, wide = Whitening.fit(vectors, 9), Whitening.fit(np.pad(vectors, ((0, 0), (0, 80))), 9)
    np.testing.assert_allclose(wide.matrix[:20], narrow.matrix, atol=1e-6)
    assert not wide.matrix[20:].any()


def test_whitening_of_few_long_vectors():
    """A million dimensions, whose scatter no memory would hold."""
    vectors = np.random.default_rng(9).normal(size=(4, 1_000_000)).astype(np.float32)
    assert np.cov((vectors @ Whitening.fit(vectors, 3).matrix).T) == pytest.approx(np.eye(3), abs=1e-2)


def test_whitening_helps_when_something_common_dominates():
    """Light, say, moves every vector along one direction by more than the photographs differ."""
    rng = np.random.default_rng(2)
    content, light = rng.normal(size=(200, 16)), np.zeros(16)
    light[3] = 5
    gallery, queries = (
        normalise(content + rng.normal(size=(200, 1)) * light + 0.2 * rng.normal(size=(200, 16))) for _ in range(2)
    )
    whitening = Whitening.fit(gallery, 16)
    assert hit_at_1(whitening(queries), whitening(gallery)) > hit_at_1(queries, gallery) + 0.25


def test_whitening_hurts_when_the_narrow_axes_are_noise():
    """Photographs differ along 4 wide axes; on the 28 narrow ones, query and gallery have nothing in common."""
    rng = np.random.default_rng(3)
    content = np.pad(rng.normal(size=(200, 4)), ((0, 0), (0, 28)))
    gallery, queries = (normalise(content + 0.02 * rng.normal(size=(200, 32))) for _ in range(2))
    whole, wide = Whitening.fit(gallery, 32), Whitening.fit(gallery, 4)
    before = hit_at_1(queries, gallery)
    assert before > 0.8
    assert hit_at_1(whole(queries), whole(gallery)) < before - 0.5
    assert hit_at_1(wide(queries), wide(gallery)) > before - 0.1


def test_whitening_is_fitted_on_evenly_spaced_rows_of_a_map(tmp_path, monkeypatch):
    """Every second row; the others, which are NaN, are never looked at."""
    vectors = np.random.default_rng(4).normal(size=(101, 6)).astype(np.float32)
    vectors[1::2] = np.nan
    np.save(tmp_path / "vectors.npy", vectors)
    monkeypatch.setattr(ranking, "FITTED", 51 * 6)
    found = Whitening.fit(np.load(tmp_path / "vectors.npy", mmap_mode="r"), 4)
    expected = Whitening.fit(vectors[::2], 4)
    assert found.matrix.tobytes() == expected.matrix.tobytes()
    assert found.mean.tobytes() == expected.mean.tobytes()


@pytest.mark.parametrize("d", [5, 100], ids=["N > D", "N < D"])
def test_twins_give_no_axes_of_noise(d):
    """Three different vectors, twenty times each, span two axes; a query off them must not be judged by the others."""
    rng = np.random.default_rng(6)
    three = normalise(rng.normal(size=(3, d)))
    whitening = Whitening.fit(np.repeat(three, 20, axis=0).astype(np.float32), 4)
    assert whitening.matrix.any(axis=0).tolist() == [True, True, False, False]
    assert np.abs(whitening.matrix).max() < 10
    queries = normalise(three + 0.1 * normalise(rng.normal(size=(3, d))))
    assert hit_at_1(whitening(queries), whitening(three)) == 1
    assert len(np.unique(whitening(np.repeat(three, 20, axis=0))[:20], axis=0)) == 1


def test_one_axis_and_what_lies_on_the_mean():
    whitening = Whitening.fit(np.array([[0.0, 1], [0, 3], [0, 5]]), 1)
    assert whitening.matrix.tolist() == [[0], [0.5]]
    assert whitening(np.array([[7.0, 4], [7, 2], [7, 3]])).tolist() == [[1], [-1], [0]]
    assert whitening(np.zeros((1, 2))).tolist() == [[0]]  # what is absent stays absent
    assert whitening(np.zeros((0, 2))).shape == (0, 1)


def test_whitening_refuses():
    vectors = np.random.default_rng(7).normal(size=(6, 4))
    for few, dimension in ((vectors, 5), (vectors[:3], 3), (vectors, 0), (vectors[:1], 1), (vectors[:0], 1)):
        largest = max(0, min(4, len(few) - 1))
        with pytest.raises(ImatchError, match=f"at most {largest} axes: ask for no more, or leave it out"):
            Whitening.fit(few, dimension)
    Whitening.fit(vectors[:3], 2)
    for d in (3, 300):
        for one in (vectors[:1, :1], vectors[:1, :1].astype(np.float32)):
            with pytest.raises(ImatchError, match="all equal"):
                Whitening.fit(np.tile(one, (37, d)), 2)
    vectors[4, 1] = np.nan
    with pytest.raises(ImatchError, match="vector 4 is not finite"):
        Whitening.fit(vectors, 3)


# --- query expansion


def test_expansion_against_a_loop():
    rng = np.random.default_rng(10)
    queries, neighbours = normalise(rng.normal(size=(5, 8))), normalise(rng.normal(size=(5, 4, 8)))
    scores = rng.uniform(-0.5, 1, (5, 4))
    scores[1, 2:] = scores[3] = -np.inf
    found = expand(queries, neighbours, scores)
    assert found.dtype == np.float32
    for q in range(5):
        total = queries[q].copy()
        for neighbour, score in zip(neighbours[q], scores[q], strict=True):
            if score > 0:
                total += score**3 * neighbour
        assert found[q] == pytest.approx(total / np.linalg.norm(total), abs=1e-6)
    assert found[3] == pytest.approx(queries[3], abs=1e-6)


def test_expansion_finds_the_neighbour_of_the_neighbour_or_is_led_astray():
    """On a circle, the first hit at 30 degrees draws the query away from -50 towards 60: good if that is right."""
    query, gallery = turned([0]), turned([30, 60, -50])
    before = (query @ gallery.T)[0]
    assert np.argsort(-before).tolist() == [0, 2, 1]
    after = (expand(query, gallery[None, :1], before[None, :1]) @ gallery.T)[0]
    assert np.argsort(-after).tolist() == [0, 1, 2]


def test_expansion_of_nothing():
    assert expand(turned([0, 90]), np.zeros((2, 0, 2)), np.zeros((2, 0))) == pytest.approx(turned([0, 90]), abs=1e-6)
    assert expand(np.zeros((1, 2)), np.ones((1, 1, 2)), np.full((1, 1), -np.inf)).tolist() == [[0, 0]]
    assert expand(np.zeros((0, 2)), np.zeros((0, 3, 2)), np.zeros((0, 3))).shape == (0, 2)


# --- turned queries


def of_turns(rows, scores):
    """What queries found at several rotations, which are told by their number: (R, Q, n) each."""
    return [
        Found(row, score, np.full(row.shape, turn)) for turn, (row, score) in enumerate(zip(rows, scores, strict=True))
    ]


def by_hand(rows, scores, k):
    """One query's hits of several rotations, by a dictionary."""
    best = {}
    for turn, (row_of_turn, score_of_turn) in enumerate(zip(rows, scores, strict=True)):
        for row, score in zip(row_of_turn.tolist(), score_of_turn.tolist(), strict=True):
            if row >= 0 and (row not in best or score > best[row][0]):
                best[row] = (score, turn)
    hits = sorted(((row, *found) for row, found in best.items()), key=lambda hit: (-hit[1], hit[0]))
    return [*hits, *[(-1, -np.inf, -1)] * k][:k]


@pytest.mark.parametrize(("turns", "n"), [(4, 10), (1, 5), (3, 4), (2, 1)])
def test_best_turn_against_a_dictionary(turns, n):
    """Few rows and few scores, so that ties of both kinds are common."""
    rng = np.random.default_rng(11)
    rows = np.stack([[rng.permutation(12)[:n] for _ in range(60)] for _ in range(turns)])
    scores = (rng.integers(0, 6, rows.shape) / 8).astype(np.float32)
    gone = rng.random(rows.shape) < 0.2
    rows[gone], scores[gone] = -1, -np.inf
    found = best_turn(of_turns(rows, scores))
    assert (found.rows.dtype, found.scores.dtype) == (np.int64, np.float32)
    for q in range(60):
        hits = zip(found.rows[q].tolist(), found.scores[q].tolist(), np.nan_to_num(found.turn[q], nan=-1), strict=True)
        assert list(hits) == by_hand(rows[:, q], scores[:, q], turns * n)


def test_the_turn_found_is_the_right_one():
    """A quarter turn of a photograph moves the numbers of its vector on by two; queries are turned back three ways."""
    rng = np.random.default_rng(12)
    gallery = normalise(rng.normal(size=(30, 8)))
    wanted = np.arange(30) % 4
    queries = np.stack([np.roll(vector, -2 * turn) for vector, turn in zip(gallery, wanted, strict=True)])
    scores = np.stack([np.roll(queries, 2 * turn, axis=1) @ gallery.T for turn in range(4)])
    order = np.argsort(-scores, axis=2)[..., :5]
    found = best_turn(of_turns(order, np.take_along_axis(scores, order, 2)))
    assert found.rows[:, 0].tolist() == list(range(30))
    assert found.turn[:, 0].tolist() == wanted.tolist()
    assert found.scores[:, 0] == pytest.approx(1)
    assert np.mean(order[0, :, 0] == np.arange(30)) < 0.6  # unturned


def test_turning_hurts_what_was_upright():
    """The right hit at 0.8 is upright; upside down, something else scores 0.9."""
    found = best_turn(of_turns(np.array([[[3, 5]], [[5, 3]]]), np.array([[[0.8, 0.1]], [[0.9, 0.2]]])))
    assert found.rows[:, :2].tolist() == [[5, 3]]
    assert found.turn[:, :2].tolist() == [[1, 0]]


def test_embedding_the_rotated_queries_counts_as_time_of_that_stage():
    """And it asks nothing anew: its search is not repeated without the right answers."""
    posed = SimpleNamespace(posed={pose: SimpleNamespace(work={"seconds": 2.5}) for pose in range(3)})
    asked = {"whiten": 0, "rotations": 4, "expand": 0, "rerank": 0}
    ways = ranking.Ways(None, {"ranking": asked}, None, None, None, 5, 5, None, lambda *_: posed)
    plain, rotated = ways.stages()
    assert (plain.seconds, rotated.seconds) == (0.0, 7.5)
    assert [plain.asks_again, rotated.asks_again] == [False, False]


# --- tokens


def test_tokens_are_the_means_of_their_descriptors():
    """Half of them lie close together, half anywhere: each token is the mean direction of those nearest by cosine."""
    rng = np.random.default_rng(0)
    descriptors = rng.normal(size=(200, 24))
    descriptors[:100] = descriptors[0] + 0.1 * descriptors[:100]
    descriptors *= rng.uniform(1, 9, (200, 1))
    tokens = aggregate(descriptors, 5)
    assert tokens.shape == (5, 24)
    assert tokens.dtype == np.float32
    directions = normalise(descriptors)
    nearest = (directions @ tokens.T).argmax(axis=1)
    for i, token in enumerate(tokens):
        assert token == pytest.approx(normalise(directions[nearest == i].sum(axis=0)), abs=1e-4)


def test_one_token_is_the_mean_of_all_descriptors():
    """1,000 for one centre are more than FAISS takes unless told to."""
    descriptors = np.random.default_rng(14).normal(size=(1000, 6)) + 0.5
    assert aggregate(descriptors, 1)[0] == pytest.approx(normalise(normalise(descriptors).sum(axis=0)), abs=1e-5)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_few_descriptors_are_their_own_tokens(n):
    descriptors = np.random.default_rng(15).normal(size=(n, 3)).astype(np.float16)
    with_nothing = np.insert(descriptors, 0, 0, axis=0)
    for given in (descriptors, with_nothing):
        tokens = aggregate(given, 4)
        assert tokens[:n] == pytest.approx(normalise(descriptors.astype(float)), abs=1e-3)
        assert tokens.shape == (4, 3)
        assert not tokens[n:].any()


def test_many_equal_descriptors():
    assert aggregate(np.tile([3.0, 4.0], (50, 1)), 4) == pytest.approx(np.tile([0.6, 0.8], (4, 1)), abs=1e-2)


def test_aggregation_is_quiet(capfd):
    aggregate(np.random.default_rng(16).normal(size=(9, 4)), 8)
    assert capfd.readouterr() == ("", "")


def test_aggregation_is_deterministic():
    """Whatever the number of threads, and whatever was aggregated before."""
    rng = np.random.default_rng(17)
    photographs = [rng.normal(size=(n, 64)).astype(np.float32) for n in (700, 33, 196)]
    threads, found = faiss.omp_get_max_threads(), []
    try:
        for many, order in ((1, (0, 1, 2)), (2, (0, 1, 2)), (2, (2, 0, 1))):
            faiss.omp_set_num_threads(many)
            tokens = {i: aggregate(photographs[i], 32).tobytes() for i in order}
            found.append([tokens[i] for i in range(3)])
    finally:
        faiss.omp_set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_aggregation_refuses():
    descriptors = np.ones((5, 3))
    with pytest.raises(ImatchError, match="tokens is 0"):
        aggregate(descriptors, 0)
    descriptors[3, 1] = np.nan
    for tokens in (2, 9):
        with pytest.raises(ImatchError, match="descriptor 3 is not finite"):
            aggregate(descriptors, tokens)


def test_token_score_against_loops():
    """With tokens missing on both sides, of which one candidate has none; some best cosines are below 0."""
    rng = np.random.default_rng(18)
    query, candidates = normalise(rng.normal(size=(6, 3))), normalise(rng.normal(size=(20, 5, 3)))
    query[4:] = 0
    candidates[rng.random((20, 5)) < 0.4] = 0
    candidates[0], candidates[1, 1:], candidates[1, 0] = 0, 0, -normalise(query[:4].sum(axis=0))
    query, candidates = query.astype(np.float32), candidates.astype(np.float32)
    found = token_score(query, candidates)
    assert found.dtype == np.float32
    for score, candidate in zip(found, candidates, strict=True):
        ours, theirs = [t for t in query if t.any()], [t for t in candidate if t.any()]
        expected = 0.0
        if ours and theirs:
            there = np.mean([max(a @ b for b in theirs) for a in ours])
            expected = (there + np.mean([max(a @ b for a in ours) for b in theirs])) / 2
        assert score == pytest.approx(expected, abs=1e-6)
    assert found[0] == 0
    assert found[1] < 0


def test_token_score_of_nothing():
    tokens = np.eye(2, dtype=np.float32)
    assert token_score(0 * tokens, tokens[None]).tolist() == [0]
    assert token_score(tokens, np.zeros((3, 4, 2), np.float32)).tolist() == [0, 0, 0]
    assert token_score(tokens, np.zeros((0, 4, 2), np.float32)).shape == (0,)


def first_by(query, candidates):
    """Of photographs (n, 3) of descriptors: the best candidate by the mean descriptor, then reordered by tokens."""
    query_mean, *means = (normalise(one.mean(axis=0)) for one in (query, *candidates))
    scores = (np.stack(means) @ query_mean)[None]
    hits = np.argsort(-scores, axis=1)
    query_tokens, *tokens = (aggregate(one, 3) for one in (query, *candidates))
    return hits[0, 0], hits[0, token_score(query_tokens, np.stack(tokens)[hits[0]]).argmax()]


def test_tokens_help_where_the_means_are_alike():
    """The right one shows the query's three patterns in other shares; the blend has their mean, and none of them."""
    rng = np.random.default_rng(20)
    query, right, blend = (
        np.repeat(patterns, counts, axis=0) + 0.01 * rng.normal(size=(60, 3))
        for patterns, counts in ((np.eye(3), (30, 20, 10)), (np.eye(3), (10, 20, 30)), (np.full((1, 3), 1 / 3), 60))
    )
    assert first_by(query, [right, blend]) == (1, 0)


def test_tokens_hurt_where_the_shares_tell():
    """The query is nearly all of one pattern, as is the right one; the other shares its two small patches.

    A token says what there is, not how much of it.
    """
    patterns = np.eye(4, dtype=np.float32)
    query, right, wrong = np.array([50, 3, 3, 0]), np.array([50, 0, 0, 20]), np.array([0, 30, 30, 0])
    means = normalise(np.stack([query, right, wrong]).astype(float))
    assert means[0] @ means[1] > means[0] @ means[2]
    score = token_score(patterns[query > 0], np.stack([patterns[right > 0], patterns[wrong > 0]]))
    assert score[0] < score[1]
