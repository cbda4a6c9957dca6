"""Intervals: hand-computed means, planted cluster effects, and how often the truth lies inside."""

import json
import math
import tracemalloc

import numpy as np
import pytest

from imatch.core.types import ImatchError
from imatch.evaluation.intervals import Interval, interval, paired_difference


def clustered(rng, mean, correlation, n):
    """Hits of n photographs of 6 to 24 queries whose chances differ (beta-binomial), and whose query each is."""
    spread = (1 - correlation) / correlation
    chance = rng.beta(mean * spread, (1 - mean) * spread, n)
    member = np.repeat(np.arange(n), rng.integers(6, 25, n))
    return (rng.random(len(member)) < chance[member]).astype(float), member


def test_the_mean_counts_queries_and_not_clusters():
    values = [1] * 9 + [0] * 7  # nine right ones of one photograph, seven wrong ones of as many
    found = interval(values, ["a"] * 9 + list("bcdefgh"))
    assert found.value == 9 / 16
    assert found.clusters == 8
    assert found.why == ""
    assert found.low == 0  # a resample without the one right photograph
    assert found.value < found.high <= 1


@pytest.mark.parametrize(("n", "low"), [(10, 1 / 10), (20, 5 / 20)])
def test_ends_are_expanded_percentiles(n, low):
    """One query a cluster, half of them right: the right ones drawn are binomial (n, 0.5), and the ends are in a table.

    sqrt(10 / 9) t(0.975, 9) = 2.3845 and Phi(-2.3845) = 0.00855, between P(X <= 0) = 0.0010 and P(X <= 1) = 0.0107;
    sqrt(20 / 19) t(0.975, 19) = 2.1474 and Phi(-2.1474) = 0.01588, between P(X <= 4) = 0.0059 and P(X <= 5) = 0.0207.
    Plain percentiles, at 0.025, would end at 2 / 10 and 6 / 20.
    """
    found = interval([0, 1] * (n // 2), range(n), resamples=40_000)
    assert (found.low, found.high) == pytest.approx((low, 1 - low))


def test_the_same_seed_gives_the_same_interval():
    values, member = clustered(np.random.default_rng(0), 0.6, 0.3, 30)
    assert interval(values, member) == interval(values, member)
    first = {str(i): value for i, value in enumerate(values)}
    second = {str(i): float(i % 3 > 0) for i in range(len(values))}
    owner = {str(i): cluster for i, cluster in enumerate(member)}
    backwards = dict(reversed(first.items()))
    assert paired_difference(first, second, owner) == paired_difference(backwards, second, owner)
    assert paired_difference(first, second, owner) != paired_difference(first, second, owner, seed=1)


def test_clusters_of_many_make_it_wider():
    values, member = clustered(np.random.default_rng(1), 0.6, 0.5, 30)
    by_photograph, by_query = interval(values, member), interval(values, range(len(values)))
    assert by_photograph.value == by_query.value
    assert by_photograph.high - by_photograph.low > 1.8 * (by_query.high - by_query.low)


def test_memory_stays_small_with_many_clusters():
    values = np.random.default_rng(0).random(40_000)
    tracemalloc.start()
    found = interval(values, range(40_000), resamples=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # 100 resamples at once would be 32 MB for the indices, and as much for each gather
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 40_000), rel=0.3)


@pytest.mark.parametrize(("n", "mean"), [(20, 0.5), (30, 0.7), (40, 0.9)])
def test_coverage_of_a_mean(n, mean):
    rng = np.random.default_rng(n)
    inside = 0
    for seed in range(1000):
        found = interval(*clustered(rng, mean, 0.4, n), resamples=800, seed=seed)
        inside += found.low <= mean <= found.high
    assert 0.93 <= inside / 1000 <= 0.97


@pytest.mark.parametrize(("n", "means"), [(25, (0.7, 0.7)), (40, (0.6, 0.3))])
def test_coverage_of_a_paired_difference(n, means):
    rng = np.random.default_rng(n)
    inside = 0
    for seed in range(1000):
        first, member = clustered(rng, means[0], 0.4, n)
        chance = rng.beta(3 * means[1], 3 * (1 - means[1]), n)
        second = (rng.random(len(member)) < chance[member]).astype(float)
        names = [str(i) for i in range(len(member))]
        sides = (dict(zip(names, side, strict=True)) for side in (first, second, member))
        found = paired_difference(*sides, resamples=800, seed=seed)
        inside += found.low <= means[0] - means[1] <= found.high
    assert 0.93 <= inside / 1000 <= 0.97


def test_pairing_takes_out_what_both_share():
    """Two configurations that fail on the same photographs differ by little, however much the photographs differ."""
    values, member = clustered(np.random.default_rng(2), 0.5, 0.6, 30)
    other = values.copy()
    other[::10] = 0
    names = [str(i) for i in range(len(values))]
    sides = [dict(zip(names, side, strict=True)) for side in (values, other, member)]
    found = paired_difference(*sides)
    assert found.value == pytest.approx(values.mean() - other.mean())
    assert 0 < found.low < found.high < 0.1
    apart = interval(values, member)
    assert apart.high - apart.low > 3 * (found.high - found.low)
    mirrored = paired_difference(sides[1], sides[0], sides[2])
    assert (mirrored.value, mirrored.low, mirrored.high) == pytest.approx((-found.value, -found.high, -found.low))


@pytest.mark.parametrize(("every", "low", "high"), [(1, 1 - 0.3085, 1), (0, 0, 0.3085), (0.5, 0.3458, 0.6542)])
def test_all_right_is_not_certain(every, low, high):
    """0.3085 = 1 - 0.025 ** (1 / 10), Clopper and Pearson's bound at 0 of 10 photographs, however many queries each."""
    found = interval(np.full(240, every), np.repeat(np.arange(10), 24))
    assert (found.value, found.low, found.high) == pytest.approx((every, low, high), abs=1e-4)
    assert found.why == ""


def test_clusters_of_one_mean_are_told_in_spite_of_rounding():
    found = interval([0.1, 0.2, 0.3] * 10, np.repeat(np.arange(10), 3))
    shuffled = interval([0.1, 0.2, 0.3, 0.3, 0.2, 0.1] * 5, np.repeat(np.arange(10), 3))
    assert shuffled.low == pytest.approx(found.low)
    assert found.low == pytest.approx(0.2 * (1 - 0.3085), abs=1e-4)


def test_no_difference_on_any_query_is_not_certain():
    same = {str(i): float(i % 2) for i in range(40)}
    found = paired_difference(same, same, {str(i): i // 4 for i in range(40)})
    assert found.value == 0
    assert (found.low, found.high) == pytest.approx((-0.3085, 0.3085), abs=1e-4)
    assert str(found) == "0.00 [-0.31, 0.31]"


def test_too_few_clusters_and_nothing_to_count():
    found = interval([1.0, 0.0, 1.0, 1.0, 1.0], list("abcde"), unit="captures")
    assert (found.value, found.low, found.high, found.clusters) == (0.8, None, None, 5)
    assert str(found) == "0.80 (no interval: 5 captures are too few, 8 are the least)"
    assert interval([1.0] * 7, range(7)).low is None
    assert interval([1.0] * 8, range(8)).low is not None
    for nothing in (interval([], []), paired_difference({}, {}, {})):
        assert nothing == Interval(None, None, None, 0, "no queries to count")
        assert str(nothing) == "-"


def test_the_record_is_plain_json():
    found = interval(np.array([0, 1, 1, 1] * 4, bool), np.arange(16))
    assert json.loads(json.dumps(found.record(), allow_nan=False)) == found.record()
    assert set(found.record()) == {"value", "low", "high", "clusters", "why"}
    assert Interval(**found.record()) == found


@pytest.mark.parametrize(
    ("values", "clusters", "said"),
    [
        ([1.0, math.nan, 1.0], "abc", "nan of value 1"),
        ([1.0, None, 1.0], "abc", "nan of value 1"),
        ([1.0, 0.0, -0.5], "abc", "paired_difference"),
        ([1.0, 17.0, 0.5], "abc", "17 of value 1"),
        ([1.0, 0.0], "abc", "2 values but 3 clusters"),
    ],
)
def test_wrong_values_are_refused(values, clusters, said):
    with pytest.raises(ImatchError, match=said):
        interval(values, clusters)


def test_different_queries_are_refused():
    same = dict.fromkeys("abcdefgh", 1.0)
    with pytest.raises(ImatchError, match="2 are only in the first, 1 only in the second, such as 'x'"):
        paired_difference(same | {"y": 1.0, "x": 0.0}, same | {"z": 1.0}, dict.fromkeys("abcdefghxyz", 0))
    with pytest.raises(ImatchError, match="0 are only in the first, 1 only in the second, such as 'z'"):
        paired_difference(same, same | {"z": 1.0}, dict.fromkeys("abcdefghxyz", 0))
    with pytest.raises(ImatchError, match="nan of query 'c'"):
        paired_difference(same, same | {"c": math.nan}, {query: query for query in "abcdefgh"})
