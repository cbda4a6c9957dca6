"""When to believe a best hit: the score from which hits are right as often as wanted. "No match" is an answer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import cast

import numpy as np
from scipy.special import betaincinv

from imatch.core.rows import ThresholdRecord
from imatch.core.types import ImatchError
from imatch.evaluation.intervals import MIN_CLUSTERS

RISK = 0.05
"""Of the one-sided bound: how often the true precision may lie below it."""


@dataclass(frozen=True)
class Threshold:
    """From which score on a best hit is accepted as a match.

    Attributes:
        value: accept a best hit of at least this score; None: accept none.
        wanted: the precision asked for, in (0, 1).
        precision: share of right ones among the accepted, on the instances it was calibrated on; None without a value.
        coverage: share of the queries that have an answer which are accepted; None when no query has one.
        held_out_precision, held_out_coverage: of what the two halves of the clusters accept, each by the threshold of
            the other; None when there is no such figure.
        why: why there is no threshold or no held-out figure, "" otherwise.
    """

    value: float | None
    wanted: float
    precision: float | None
    coverage: float | None
    held_out_precision: float | None
    held_out_coverage: float | None
    why: str

    def record(self) -> ThresholdRecord:
        """The same as plain JSON."""
        return cast("ThresholdRecord", asdict(self))


def calibrate(
    scores: Sequence[float] | np.ndarray,
    right: Sequence[bool] | np.ndarray,
    has_answer: Sequence[bool] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray,
    *,
    precision: float = 0.95,
    seed: int = 0,
) -> Threshold:
    """The lowest score from which best hits are right as often as wanted.

    Every query is asked twice (`metrics.asked_twice`), so half of the instances have no match; where matches are rarer,
    the precision is lower.

    The threshold is the lowest score at which the one-sided 95 % Clopper-Pearson bound of the precision (Biometrika 26,
    1934) is at least the wanted one. Two things make this bound too kind. It takes instances as independent, while
    those of one photograph are not: the held-out figure, by cluster, is the check. And it is looked at for every score
    (Geifman and El-Yaniv, NeurIPS 2017, divide the risk by the number of looks, which costs 7 to 28 points of
    coverage). Simulated for 0.95, the true precision fell short in 2 to 5 % of the data sets where instances are
    independent, in 6 to 15 % where photographs shift the scores of all their queries.

    Args:
        scores: (n,) of the best hits, higher is better; -inf for an instance without any hit, which is never accepted.
        right: (n,) bool, whether the best hit is right; False without an answer.
        has_answer: (n,) bool, whether the answer was in the gallery.
        clusters: n names, the photograph or capture that each query comes from.
        precision: wanted, in (0, 1).
        seed: of the split into halves.

    Raises:
        ImatchError: a score is NaN or inf, or the precision is outside (0, 1).

    >>> scores = np.r_[np.linspace(0.6, 0.9, 200), np.linspace(0.2, 0.5, 200)]
    >>> found = calibrate(scores, scores > 0.55, scores > 0.55, [i % 10 for i in range(400)])
    >>> round(found.value, 2), round(found.precision, 2), found.coverage
    (0.5, 0.98, 1.0)
    """
    if not 0 < precision < 1:
        raise ImatchError(f"precision is {precision}: it must lie between 0 and 1, such as 0.95")
    scores, right, has_answer = _checked(scores, right, has_answer)
    if not has_answer.any():
        return Threshold(None, precision, None, None, None, None, "no query has an answer")
    value, why = _lowest(scores, right, precision)
    if value is None:
        return Threshold(None, precision, None, 0.0, None, None, why)
    accepted = scores >= value
    figures = value, precision, float(right[accepted].mean()), float(accepted[has_answer].mean())

    names = sorted(set(clusters), key=repr)
    if len(names) < MIN_CLUSTERS:
        why = f"no held-out figure: {len(names)} clusters are too few, {MIN_CLUSTERS} are the least"
        return Threshold(*figures, None, None, why)
    chosen = np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]
    half = {names[i] for i in chosen}
    inside = np.array([cluster in half for cluster in clusters])
    accepted = np.zeros(len(scores), bool)
    for judged in (inside, ~inside):
        other, _ = _lowest(scores[~judged], right[~judged], precision)
        accepted |= judged & (scores >= (math.inf if other is None else other))
    coverage = float(accepted[has_answer].mean())
    if not accepted.any():
        why = f"no held-out precision: neither half alone accepts anything of the other at {precision:g}"
        return Threshold(*figures, None, coverage, why)
    return Threshold(*figures, float(right[accepted].mean()), coverage, "")


def curve(
    scores: Sequence[float] | np.ndarray,
    right: Sequence[bool] | np.ndarray,
    has_answer: Sequence[bool] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and coverage at every score that can be a threshold; equal scores share one.

    Args:
        scores, right, has_answer: as for `calibrate`.

    Returns:
        (m,) float64 each: the distinct scores, descending, without -inf; precision among the instances of at least this
        score; coverage, the share of the queries that have an answer among them, NaN when no query has one.

    Raises:
        ImatchError: a score is NaN or inf.

    >>> [x.tolist() for x in curve([0.9, 0.5, 0.5, 0.2], [True, True, False, False], [True, True, False, False])]
    [[0.9, 0.5, 0.2], [1.0, 0.6666666666666666, 0.5], [0.5, 1.0, 1.0]]
    """
    scores, right, has_answer = _checked(scores, right, has_answer)
    thresholds, accepted, good = _counts(scores, right)
    answerable = _counts(scores, has_answer)[2]
    asked = has_answer.sum()
    return thresholds, good / accepted, answerable / asked if asked else np.full(len(thresholds), np.nan)


def _checked(
    scores: Sequence[float] | np.ndarray,
    right: Sequence[bool] | np.ndarray,
    has_answer: Sequence[bool] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = np.asarray(scores, np.float64)
    wrong = np.flatnonzero(~(scores < math.inf))
    if len(wrong):
        raise ImatchError(f"score {wrong[0]} is {scores[wrong[0]]}: give numbers, and -inf where there is no hit")
    return scores, np.asarray(right, bool), np.asarray(has_answer, bool)


def _counts(scores: np.ndarray, marked: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At each distinct score, descending: the score, how many instances have at least it, how many of them marked."""
    found = scores > -math.inf
    thresholds, place = np.unique(-scores[found], return_inverse=True)
    return (
        -thresholds,
        np.cumsum(np.bincount(place)),
        np.cumsum(np.bincount(place[marked[found]], minlength=len(thresholds))),
    )


def _lowest(scores: np.ndarray, right: np.ndarray, wanted: float) -> tuple[float | None, str]:
    """The lowest score at which the bound reaches the wanted precision, or None and why not."""
    thresholds, accepted, good = _counts(scores, right)
    if not len(thresholds):
        return None, "no instance has a hit"
    bound = np.where(good > 0, betaincinv(np.maximum(good, 1), accepted - good + 1, RISK), 0)
    reached = np.flatnonzero(bound >= wanted)
    if len(reached):
        return float(thresholds[reached[-1]]), ""
    best = int(bound.argmax())
    least = math.ceil(math.log(RISK) / math.log(wanted))
    there = f"from score {thresholds[best]:.4g} on, where {good[best]} of {accepted[best]} are right"
    return None, (
        f"no score shows a precision of {wanted:g}: the best lower bound is {bound[best]:.3f}, "
        f"{there} ({least} of {least} would do)"
    )
