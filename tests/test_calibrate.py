"""When to believe a best hit: thresholds by hand, and whether they keep what they promise on other photographs."""

import itertools
import json
import math

import numpy as np
import pytest

from imatch.core.types import ImatchError
from imatch.evaluation.calibration import Threshold, calibrate, curve


def asked_twice(rng, photographs, shift, queries=12):
    """Every query with and without its answer: score, right, has_answer, whose query.

    An answer raises the score by 3; the best hit is right more often the higher it scores; `shift` is how much
    photographs differ in the scores of all their queries (0: instances are independent).
    """
    member = np.repeat(np.arange(photographs), 2 * queries)
    has_answer = np.tile(np.arange(2 * queries) < queries, photographs)
    score = 3 * has_answer + rng.normal(0, shift, photographs)[member] + rng.normal(size=len(member))
    right = has_answer & (rng.random(len(member)) < 1 / (1 + np.exp(2.7 - 3 * score)))
    return score, right, has_answer, member


def separable(n=100, photographs=10):
    """n right ones above n known negatives, whose scores are 0 to n - 1."""
    score = np.arange(2 * n)
    return score, score >= n, score >= n, score % photographs


def test_curve_by_hand():
    """Five queries; without its answer, the second of them still finds something at 0.7."""
    scores = [0.9, 0.7, 0.6, 0.4, -math.inf, 0.3, 0.7, -math.inf, 0.4, 0.1]
    right = [1, 1, 0, 1, 0] + [0] * 5
    has_answer = [1] * 5 + [0] * 5
    thresholds, precision, coverage = curve(scores, right, has_answer)
    assert thresholds.tolist() == [0.9, 0.7, 0.6, 0.4, 0.3, 0.1]
    assert precision == pytest.approx([1, 2 / 3, 2 / 4, 3 / 6, 3 / 7, 3 / 8])
    assert coverage == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 4 / 5, 4 / 5])


def test_curve_of_nothing():
    assert [len(part) for part in curve([], [], [])] == [0, 0, 0]
    assert [len(part) for part in curve([-math.inf], [False], [True])] == [0, 0, 0]
    thresholds, precision, coverage = curve([0.5, 0.25], [False, False], [False, False])
    assert thresholds.tolist() == [0.5, 0.25]
    assert precision.tolist() == [0, 0]
    assert np.isnan(coverage).all()


def test_threshold_by_hand():
    """Of 100 right ones, w wrong ones below may be let in while the bound of 100 of 100 + w is at least 0.9.

    Clopper-Pearson, one-sided 95 %: 100 of 105 is bounded by 0.9025, 100 of 106 by 0.8913. So w = 5, down to score 95.
    """
    found = calibrate(*separable(), precision=0.9)
    assert found.value == 95
    assert found.precision == pytest.approx(100 / 105)
    assert found.coverage == 1
    assert found.why == ""


def test_equal_scores_are_accepted_together():
    """As above, but the five wrong ones let in score the same as the six after them: none of them can be let in."""
    score, *rest = separable()
    score = np.where((score < 100) & (score >= 89), 89, score)
    found = calibrate(score, *rest, precision=0.9)
    assert found.value == 100
    assert found.precision == 1


def test_scores_that_separate():
    """59 is the least number of right ones that shows 0.95: 0.95 ** 59 = 0.0485, 0.95 ** 58 = 0.0510."""
    score, right, has_answer, owner = separable(200)
    found = calibrate(score, right, has_answer, owner)
    assert (found.held_out_coverage, found.coverage) == (1, 1)
    assert found.held_out_precision == pytest.approx(0.95, abs=0.05)
    assert calibrate(*separable(59)).value == 59
    found = calibrate(*separable(58))
    assert found.value is None
    assert "58 of 58 are right (59 of 59 would do)" in found.why


def test_one_wrong_hit_at_the_top_does_not_end_the_search():
    score, right, has_answer, owner = separable(300)
    right[-1] = False
    found = calibrate(score, right, has_answer, owner)
    assert found.value <= 300
    assert found.coverage == 1


@pytest.mark.parametrize("precision", [0.6, 0.95])
def test_scores_that_tell_nothing_give_no_threshold(precision):
    rng = np.random.default_rng(0)
    has_answer = np.arange(2000) % 2 == 0
    found = calibrate(rng.random(2000), has_answer, has_answer, np.arange(2000) // 20, precision=precision)
    assert (found.value, found.precision, found.coverage) == (None, None, 0)
    assert (found.held_out_precision, found.held_out_coverage) == (None, None)
    assert f"no score shows a precision of {precision:g}: the best lower bound is 0." in found.why


def test_no_hit_is_never_accepted():
    score, right, has_answer, owner = separable(200)
    score = np.where(score % 4 == 0, -math.inf, score)
    right &= score > 0
    found = calibrate(score, right, has_answer, owner, precision=0.5)
    assert found.value > -math.inf
    assert found.coverage == 0.75
    nothing = calibrate([-math.inf] * 20, [False] * 20, [True] * 20, range(20))
    assert (nothing.value, nothing.coverage, nothing.why) == (None, 0, "no instance has a hit")


def test_nothing_to_calibrate_on():
    for found in (calibrate([], [], [], []), calibrate([0.5] * 20, [False] * 20, [False] * 20, range(20))):
        assert found == Threshold(None, 0.95, None, None, None, None, "no query has an answer")


def test_too_few_clusters_hold_nothing_out():
    found = calibrate(*separable(200, photographs=7))
    assert found.value is not None
    assert (found.held_out_precision, found.held_out_coverage) == (None, None)
    assert found.why == "no held-out figure: 7 clusters are too few, 8 are the least"
    assert calibrate(*separable(200, photographs=8)).why == ""


def test_halves_too_small_for_a_threshold_of_their_own():
    found = calibrate(*separable(100))
    assert found.value is not None
    assert (found.held_out_precision, found.held_out_coverage) == (None, 0)
    assert "neither half" in found.why


def test_each_half_is_judged_by_the_threshold_of_the_other():
    """Against all 35 splits of eight photographs, each done by hand."""
    score, right, has_answer, owner = asked_twice(np.random.default_rng(3), 8, 0.7, queries=60)

    def figures(split, swapped):
        inside = np.isin(owner, split)
        accepted = np.zeros(len(score), bool)
        for judged in (inside, ~inside):
            made_on = ~judged if swapped else judged
            made = calibrate(score[made_on], right[made_on], has_answer[made_on], owner[made_on], precision=0.9)
            accepted[judged] = score[judged] >= made.value
        return right[accepted].mean(), accepted[has_answer].mean()

    splits = [(0, *rest) for rest in itertools.combinations(range(1, 8), 3)]
    by_the_other = {figures(split, swapped=True) for split in splits}
    by_its_own = {figures(split, swapped=False) for split in splits}
    seen = set()
    for seed in range(10):
        found = calibrate(score, right, has_answer, owner, precision=0.9, seed=seed)
        seen.add((found.held_out_precision, found.held_out_coverage))
    assert seen <= by_the_other
    assert not seen & by_its_own
    assert len(seen) > 3


def test_the_same_seed_gives_the_same_threshold():
    instances = asked_twice(np.random.default_rng(0), 30, 0.7)
    found = calibrate(*instances)
    assert found == calibrate(*instances)
    turned = [part[::-1] for part in instances]
    assert found == calibrate(*turned)
    other = calibrate(*instances, seed=1)
    assert (found.value, found.precision) == (other.value, other.precision)
    assert found.held_out_precision != other.held_out_precision


@pytest.mark.parametrize("shift", [0, 0.7], ids=["independent", "clustered"])
def test_the_wanted_precision_is_kept_on_other_photographs(shift):
    """Forty photographs set the threshold; 2,000 others judge it, so that the judgement has no noise of its own."""
    rng = np.random.default_rng(0)
    score, right, *_ = asked_twice(rng, 2000, shift)
    reached, held_out = np.empty(200), np.empty(200)
    for seed in range(200):
        found = calibrate(*asked_twice(rng, 40, shift), seed=seed)
        assert found.precision >= 0.95
        reached[seed] = right[score >= found.value].mean()
        held_out[seed] = math.nan if found.held_out_precision is None else found.held_out_precision
    slack = 0.01
    assert reached.mean() >= 0.95
    assert (reached >= 0.95 - slack).mean() >= 0.9
    if not shift:
        assert (reached >= 0.95).mean() >= 0.95  # what the bound promises where instances are independent
    assert np.isnan(held_out).mean() < 0.1  # a half alone may be too small
    assert np.nanmean(held_out) == pytest.approx(reached.mean(), abs=0.015)


def test_the_record_is_plain_json():
    score, *rest = asked_twice(np.random.default_rng(0), 30, 0.7)
    score = score.astype(np.float32)
    found = calibrate(score, *rest)
    again = json.loads(json.dumps(found.record(), allow_nan=False))
    assert Threshold(**again) == found
    assert (score >= again["value"]).sum() == (score >= np.float32(found.value)).sum()
    assert np.float32(found.value) in score


@pytest.mark.parametrize(
    ("instances", "said"),
    [
        (([0.5, math.nan], [0, 0], [1, 1], "ab"), "score 1 is nan"),
        (([0.5, math.inf], [0, 0], [1, 1], "ab"), "score 1 is inf"),
    ],
)
def test_wrong_instances_are_refused(instances, said):
    with pytest.raises(ImatchError, match=said):
        calibrate(*instances)


@pytest.mark.parametrize("precision", [0.0, 1.0, 95, math.nan])
def test_a_wrong_precision_is_refused(precision):
    with pytest.raises(ImatchError, match="precision"):
        calibrate([0.5], [True], [True], ["a"], precision=precision)
