"""Matchers beside brute force in plain numpy; tiles that change nothing; memory."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import special

from imatch.core.types import ImatchError, Tokens, grid_xy
from imatch.data import images
from imatch.features.sift import DenseSift, Sift
from imatch.matching import matchers
from imatch.matching.matchers import spacing


def tokens(descriptors, grid=None, xy=None):
    xy = np.random.default_rng(0).uniform(0, 99, (len(descriptors), 2)) if xy is None else xy
    xy = xy if grid is None else grid_xy(grid, (16 * grid[0], 16 * grid[1]))
    return Tokens(np.ones(1, np.float32), descriptors, xy.astype(np.float32), grid)


def random(n, d=16, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def repeated(n, seed=0):
    """Descriptors of which most occur several times, as in a façade, with a few zeros among them. Four of their six
    numbers are as large as each other, so that their cosines are quarters, exactly, and equal ones many."""
    rng = np.random.default_rng(seed)
    places = rng.permuted(np.tile([1, 1, 1, 1, 0, 0], (n, 1)), axis=1)
    return (places * rng.choice([-1, 1], (n, 6)) * rng.integers(0, 4, (n, 1))).astype(np.float32)


def pairs(matches):
    return list(zip(matches.index_a.tolist(), matches.index_b.tolist(), strict=True))


def cosines(a, b):
    """The full matrix, one product a pair: no matrix product, no tiles."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (a.astype(float), b.astype(float)))
    return np.array([[(x * y).sum() for y in b] for x in a]).astype(np.float32)


def brute_force(a, b, k=1, min_similarity=-1.0, min_relative=0.0, min_norm=0.0, one_to_one=True, max_matches=0):
    """Loops over candidates, best first: of equals the smaller index of A, then of B."""
    similarity = cosines(a, b)
    strong = []
    for side in (a, b):
        norms = np.linalg.norm(side.astype(float), axis=1)
        strong.append([i for i, norm in enumerate(norms) if norm > 0 and norm >= min_norm * norms.max()])
    of_a = {i: sorted(strong[1], key=lambda j: (-similarity[i, j], j))[:k] for i in strong[0]}
    of_b = {j: sorted(strong[0], key=lambda i: (-similarity[i, j], i))[:k] for j in strong[1]}
    found = sorted((-similarity[i, j], i, j) for i in of_a for j in of_a[i] if i in of_b[j])
    least = max(min_similarity, -found[0][0] * min_relative) if min_relative and found else min_similarity
    kept, used_a, used_b = [], set(), set()
    for negative, i, j in found:
        if -negative >= least and not (one_to_one and (i in used_a or j in used_b)):
            kept.append((i, j))
            used_a.add(i)
            used_b.add(j)
    return kept[: max_matches or None]


# --- mutual


@pytest.mark.parametrize(
    "options",
    [
        {"min_similarity": -1.0},
        {"min_similarity": 0.6},
        {"k": 3, "min_similarity": -1.0},
        {"k": 5, "min_similarity": 0.0, "one_to_one": False},
        {"k": 100, "min_similarity": -1.0},
        {"k": 2, "min_similarity": -1.0, "min_relative": 0.7},
        {"k": 2, "min_similarity": 0.0, "min_norm": 0.5, "max_matches": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [random, repeated], ids=lambda make: make.__name__)
def test_mutual_agrees_with_brute_force(options, make):
    a, b = make(50, seed=1), make(40, seed=2)
    b[:20] = a[10:30] + (0.3 * random(20, a.shape[1], 3) if make is random else 0)
    matches = matchers.create_matcher("mutual", {"max_matches": 0, **options})(tokens(a), tokens(b))
    expected = brute_force(a, b, **options)
    assert set(pairs(matches)) == set(expected)
    assert make is random or pairs(matches) == expected  # where no cosine is rounded, in the same order
    assert len(matches) > 3
    assert (np.diff(matches.similarity) <= 0).all()
    assert np.allclose(matches.similarity, cosines(a, b)[matches.index_a, matches.index_b], rtol=0, atol=1e-6)


def test_mutual_finds_what_it_found_before_there_were_options(demo_photographs):
    """Strict mutual neighbours of plain float32 products."""
    for a, b in on_photographs(demo_photographs, Sift()):
        x, y = (torch.nn.functional.normalize(torch.from_numpy(side.descriptors.astype(np.float32))) for side in (a, b))
        best, in_b = (x @ y.T).max(dim=1)
        in_a = (x @ y.T).argmax(dim=0)
        kept = torch.nonzero((in_a[in_b] == torch.arange(len(in_b))) & (best >= 0.8)).ravel()
        matches = matchers.create_matcher("mutual")(a, b)
        assert set(pairs(matches)) == set(zip(kept.tolist(), in_b[kept].tolist(), strict=True))
        assert np.allclose(np.sort(matches.similarity), np.sort(best[kept].numpy()), rtol=0, atol=1e-6)


def test_a_second_chance_for_what_repeats():
    """A's first and second are both nearest to B's first; with k = 2 the second takes what it likes next."""
    angles = np.radians([0, 4]), np.radians([-1, 9.5])
    a, b = (tokens(np.column_stack([np.cos(x), np.sin(x)])) for x in angles)
    assert pairs(matchers.create_matcher("mutual")(a, b)) == [(0, 0)]
    assert pairs(matchers.create_matcher("mutual", {"k": 2})(a, b)) == [(0, 0), (1, 1)]
    every = matchers.create_matcher("mutual", {"k": 2, "one_to_one": False})(a, b)
    assert pairs(every) == [(0, 0), (1, 0), (1, 1), (0, 1)]


@pytest.mark.parametrize(
    ("matcher", "options"),
    [
        ("mutual", {"k": 0}),
        ("mutual", {"min_similarity": 1.1}),
        ("mutual", {"min_relative": -0.1}),
        ("mutual", {"min_norm": 2.0}),
        ("ratio", {"max_ratio": 0.0}),
        ("ratio", {"apart": -1.0}),
        ("dual_softmax", {"temperature": 0.0}),
        ("dual_softmax", {"min_probability": float("nan")}),
    ],
)
def test_numbers_out_of_range_are_refused(matcher, options):
    with pytest.raises(ImatchError, match=next(iter(options))):
        matchers.create_matcher(matcher, options)


# --- ratio


def ratio_brute_force(a, b, max_ratio, apart):
    similarity = cosines(a.descriptors, b.descriptors).astype(float)
    angle = np.arccos(np.clip(similarity, -1, 1))
    radius = [apart * spacing(side.xy) for side in (a, b)]

    def rival(angles, side, best, radius):
        elsewhere = np.linalg.norm(side.xy - side.xy[best], axis=1) > radius
        elsewhere = np.arange(len(side.xy)) != best if side.grid is None else elsewhere
        return min(angles[elsewhere].min(initial=np.pi), np.pi / 2)

    found = []
    for i, j in brute_force(a.descriptors, b.descriptors):
        rivals = rival(angle[i], b, j, radius[1]), rival(angle[:, j], a, i, radius[0])
        if angle[i, j] < max_ratio * min(rivals):
            found.append((i, j))
    return found


@pytest.mark.parametrize("grid", [None, (5, 8)], ids=["keypoints", "grid"])
@pytest.mark.parametrize("apart", [0.0, 1.5, 100.0])
def test_ratio_agrees_with_brute_force(grid, apart):
    descriptors = random(40, seed=1)
    near = np.roll(descriptors, 1, axis=0) + random(40, seed=2)
    a, b = tokens(descriptors, grid), tokens(near, grid)
    matches = matchers.create_matcher("ratio", {"apart": apart})(a, b)
    assert pairs(matches) == ratio_brute_force(a, b, 0.85, apart)
    assert 3 < len(matches) <= len(brute_force(descriptors, near))


def test_rivals_beside_the_best_do_not_count_and_far_ones_do():
    """A smooth photograph's tokens: each resembles its neighbours. A copy elsewhere is what makes it ambiguous."""
    columns = np.linspace(0, np.pi / 2, 12)
    smooth = tokens(np.column_stack([np.cos(columns), np.sin(columns)]), (1, 12))
    shifted = tokens(np.column_stack([np.cos(columns + 0.068), np.sin(columns + 0.068)]), (1, 12))
    assert len(matchers.create_matcher("ratio", {"apart": 0.0})(smooth, shifted)) == 0
    assert pairs(matchers.create_matcher("ratio", {"apart": 1.5})(smooth, shifted)) != []
    twice = tokens(np.tile(smooth.descriptors, (2, 1)), (1, 24))
    assert len(matchers.create_matcher("ratio", {"apart": 1.5})(smooth, twice)) == 0


def test_spacing_is_a_grids_cell_turned_or_not_and_none_of_one_place():
    xy = grid_xy((5, 7), (80, 112))
    turn = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
    assert spacing(xy) == 16
    assert spacing(xy @ turn) == pytest.approx(16, abs=1e-4)
    assert spacing(np.repeat(xy, 2, axis=0)) == 16
    assert spacing(xy[:1]) == spacing(xy[:0]) == 0


# --- dual softmax


@pytest.mark.parametrize("temperature", [0.001, 0.05, 1.0])
def test_dual_softmax_agrees_with_brute_force(temperature):
    a, b = random(50, seed=1), random(40, seed=2)
    b[:20] = a[10:30] + 0.3 * random(20, seed=3)
    scaled = cosines(a, b).astype(float) / temperature
    probability = np.exp(special.log_softmax(scaled, axis=0) + special.log_softmax(scaled, axis=1))
    found = {(i, int(j)) for i, j in enumerate(probability.argmax(axis=1)) if probability[:, j].argmax() == i}
    for least in (0.0, 0.3):
        options = {"temperature": temperature, "min_probability": least}
        matches = matchers.create_matcher("dual_softmax", options)(tokens(a), tokens(b))
        assert set(pairs(matches)) == {pair for pair in found if probability[pair] >= least}
    assert found


# --- tiles


def on_photographs(folder, backbone):
    """Two pairs of photographs: one with its left half, one with another."""
    names = images.list_photographs(folder)[:2]
    first, second = (images.decode(folder / name).pixels[:256, :384] for name in names)
    (whole,), (half,), (other,) = (backbone(pixels[None]) for pixels in (first, first[:, :192].copy(), second))
    return (whole, half), (whole, other)


def bytes_of(matches):
    return matches.index_a.tobytes(), matches.index_b.tobytes(), matches.similarity.tobytes()


ANY = sorted({*matchers.MATCHERS} - {"lighterglue"})
"""Those that take any descriptors."""
MATCHERS = [(name, {}) for name in ANY] + [("mutual", {"k": 4, "min_similarity": 0.0})]


def assert_same(found, expected):
    """The same correspondences, and their cosines but for roundings, which may also change their order."""
    found, expected = (dict(zip(pairs(m), m.similarity, strict=True)) for m in (found, expected))
    assert found.keys() == expected.keys()
    assert all(abs(found[pair] - expected[pair]) < 1e-5 for pair in found)


@pytest.mark.parametrize(("matcher", "options"), MATCHERS, ids=str)
def test_tiled_equals_untiled(matcher, options, demo_photographs, monkeypatch):
    match = matchers.create_matcher(matcher, options)
    given = [*on_photographs(demo_photographs, DenseSift()), *on_photographs(demo_photographs, Sift())]
    tied = tokens(repeated(150, 1)), tokens(repeated(130, 2))
    for a, b in [*given, tied]:
        untiled = match(a, b)
        assert len(a.descriptors) * len(b.descriptors) < matchers.TILE
        for tile in (1, 1000, 7777, 30_000):
            monkeypatch.setattr(matchers, "TILE", tile)
            assert_same(match(a, b), untiled)
            assert a is not tied[0] or matcher == "dual_softmax" or bytes_of(match(a, b)) == bytes_of(untiled)
        monkeypatch.undo()


@pytest.mark.parametrize(("matcher", "options"), MATCHERS, ids=str)
def test_bytes_do_not_depend_on_the_number_of_threads(matcher, options):
    """The engines give their processes different numbers of threads, and with them OpenBLAS rounds otherwise, as its
    code for Haswell does (on a processor that cannot run it, its own)."""
    code = f"""
import hashlib, sys
import numpy as np
from imatch.core.types import Tokens
from imatch.matching.matchers import create_matcher
rng = np.random.default_rng(0)
a, b = (rng.normal(size=(n, 128)).astype("f4") for n in (900, 1100))
b[:900] = a + 0.3 * b[:900]
given = (Tokens(np.ones(1), x, rng.uniform(0, 999, (len(x), 2)).astype("f4")) for x in (a, b))
found = create_matcher({matcher!r}, {options!r})(*given)
assert len(found) > 100
print(hashlib.sha256(b"".join(x.tobytes() for x in (found.index_a, found.index_b, found.similarity))).hexdigest())
"""
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(said) == 1


@pytest.mark.parametrize("matcher", ANY)
def test_where_there_is_nothing_nothing_is_found(matcher):
    none, some = tokens(np.zeros((4, 16), np.float32)), tokens(random(5))
    match = matchers.create_matcher(matcher)
    assert [len(match(a, b)) for a, b in ((none, some), (some, none), (none, none))] == [0, 0, 0]


@pytest.mark.parametrize("matcher", ANY)
def test_memory_stays_far_below_the_full_matrix(matcher):
    """10,000 x 10,000 similarities are 400 MB; a process of its own takes less than half of that more than it began
    with."""
    code = f"""
import re
from pathlib import Path
import numpy as np
from imatch.core.types import Tokens
from imatch.matching.matchers import create_matcher
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000
def tokens(n, seed):
    rng = np.random.default_rng(seed)
    return Tokens(np.ones(1), rng.normal(size=(n, 32)).astype("f4"), rng.uniform(0, 999, (n, 2)).astype("f4"))
match = create_matcher({matcher!r})
match(tokens(100, 0), tokens(100, 1))
before = peak()
match(tokens(10_000, 0), tokens(10_000, 1))
print("MB", peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10 < float(re.search(r"MB (.*)", done.stdout)[1]) < 200
