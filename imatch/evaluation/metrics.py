"""How good the answers are: retrieval, geometry and metres, by angle and crop, with honest intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np

from imatch.core.rows import MatchFigures, PairFigures, PairRow, QueryRow, RetrievalFigures
from imatch.evaluation import intervals

DEPTHS = (1, 5, 10)
"""The K of Hit@K, Recall@K and Precision@K, as far as the ranking goes."""
PIXELS = (3, 5, 10)
"""Thresholds of the corner error's AUC."""
ACCURACY = (1, 3, 5, 10)
"""Thresholds of the matching accuracy in pixels."""


def hit_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """Hit@K: 1 where a right answer is among the first k hits, else 0. Place recognition calls it Recall@K
    (Arandjelovic et al., "NetVLAD", CVPR 2016).

    Args:
        right: (Q, K) bool.
        k: 1 to K.

    Returns:
        (Q,) float64.

    >>> hit_at_k(np.array([[False, True], [True, False]]), 1).tolist()
    [0.0, 1.0]
    """
    return right[:, :k].any(axis=1).astype(float)


def recall_at_k(right: np.ndarray, answers: np.ndarray, k: int) -> np.ndarray:
    """Recall@K: the share of a query's right answers that are among its first k hits (Manning, Raghavan and Schuetze,
    "Introduction to Information Retrieval", 2008, chapter 8).

    Args:
        right: (Q, K) bool.
        answers: (Q,) how many right answers the gallery holds.
        k: 1 to K.

    Returns:
        (Q,) float64; NaN where there is no right answer.

    >>> recall_at_k(np.array([[True, False, True]]), np.array([4]), 3).tolist()
    [0.5]
    """
    return _share(right[:, :k].sum(axis=1), answers)


def average_precision(right: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Average precision over the first K hits: the mean of Precision@r over the ranks r of right hits, where what was
    not found counts as 0, over at most K answers (mAP@K of Weyand et al., "Google Landmarks Dataset v2", CVPR 2020).
    Its mean over queries is mAP.

    Args:
        right: (Q, K) bool.
        answers: (Q,) how many right answers the gallery holds.

    Returns:
        (Q,) float64; NaN where there is no right answer.

    >>> average_precision(np.array([[True, False, True]]), np.array([2])).round(4).tolist()
    [0.8333]
    """
    k = right.shape[1]
    precision = right.cumsum(axis=1) / np.arange(1, k + 1)
    return _share((precision * right).sum(axis=1), np.minimum(answers, k))


def chance(answers: np.ndarray, candidates: np.ndarray) -> float | None:
    """The Hit@1 of guessing: the mean share of candidates that are right, over queries that have an answer.

    Args:
        answers: (Q,) how many right answers the gallery holds.
        candidates: (Q,) how many of its rows may be found at all.

    >>> chance(np.array([1, 3, 0]), np.array([8, 8, 8]))
    0.25
    """
    return mean(answers[answers > 0] / candidates[answers > 0])


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def right_hits(rows: Sequence[QueryRow], k: int) -> np.ndarray:
    """Which hits are right: (Q, k) bool, from Q rows of queries.jsonl.

    >>> right_hits([{"right_ranks": [1]}, {"right_ranks": []}], 2).tolist()
    [[False, True], [False, False]]
    """
    right = np.zeros((len(rows), k), bool)
    for q, row in enumerate(rows):
        right[q, row["right_ranks"]] = True
    return right


def asked_twice(rows: Sequence[QueryRow]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Every query asked twice, for `calibrate`: as it is, if it has an answer, and with its answers left out.

    Args:
        rows: of queries.jsonl: answers, right_ranks, score and score_without (None: no hit), cluster.

    Returns:
        scores (n,) float64 of the first hits, -inf without one; right (n,) bool; has_answer (n,) bool; n clusters.

    >>> row = {"answers": 1, "right_ranks": [0], "score": 0.9, "score_without": None, "cluster": "a"}
    >>> scores, right, has_answer, clusters = asked_twice([row])
    >>> scores.tolist(), right.tolist(), has_answer.tolist(), clusters
    ([0.9, -inf], [True, False], [True, False], ['a', 'a'])
    """
    asked = [row for row in rows if row["answers"]]
    found = [*(row["score"] for row in asked), *(row["score_without"] for row in rows)]
    scores = np.array([-math.inf if score is None else score for score in found], float)
    right = np.array([0 in row["right_ranks"] for row in asked] + [False] * len(rows), bool)
    return scores, right, np.arange(len(scores)) < len(asked), [row["cluster"] for row in [*asked, *rows]]


def retrieval_metrics(rows: Sequence[QueryRow], k: int, unit: str = "photographs") -> RetrievalFigures:
    """The figures of a ranking, from its rows of queries.jsonl.

    Args:
        rows: one a query: answers, right_ranks, cluster, crop, angle.
        k: how many hits each query was given.
        unit: what a cluster is, for the messages.

    Returns:
        k, queries, without_answer (counted apart, in nothing else), missed (the backbone found nothing in them, so they
        are wrong everywhere), hit_at_K, recall_at_K and precision_at_K for K of `DEPTHS`: the share of the first K hits
        that are right, places that the gallery could not fill count as wrong; map_at_k; mrr_at_k, the mean of 1 / rank
        of the first right hit, 0 without one (Voorhees, TREC-8, 1999); `intervals` of hit_at_1, map and mrr;
        `by_view`: hit_at_1 with its interval for each crop and angle. Figures are None where nothing could be counted.
    """
    counted = [row for row in rows if row["answers"]]
    right, answers = right_hits(counted, k), np.array([row["answers"] for row in counted], int)
    clusters = [row["cluster"] for row in counted]
    figures: dict[str, Any] = {
        "k": k,
        "queries": len(rows),
        "without_answer": len(rows) - len(counted),
        "missed": sum(not row["embedded"] for row in counted),
    }
    for depth in sorted({*(n for n in DEPTHS if n < k), k}):
        figures[f"hit_at_{depth}"] = mean(hit_at_k(right, depth))
        figures[f"recall_at_{depth}"] = mean(recall_at_k(right, answers, depth))
        figures[f"precision_at_{depth}"] = mean(right[:, :depth].mean(axis=1))
    reciprocal = np.where(right.any(axis=1), 1 / (right.argmax(axis=1) + 1), 0.0)
    whole = {"map": average_precision(right, answers), "mrr": reciprocal}
    figures |= {f"{name}_at_{k}": mean(values) for name, values in whole.items()}
    each = {"hit_at_1": hit_at_k(right, 1), **whole}
    figures["intervals"] = {
        name: intervals.interval(values, clusters, unit=unit).record() for name, values in each.items()
    }
    figures["by_view"] = [
        {"crop": crop, "angle": angle, "unit": unit, **intervals.interval(values, of, unit=unit).record()}
        for (crop, angle), (values, of) in _by_view(counted, each["hit_at_1"], clusters).items()
    ]
    return cast("RetrievalFigures", figures)


def _by_view(
    rows: Sequence[QueryRow], values: np.ndarray, clusters: Sequence[str]
) -> dict[tuple[float, float], tuple[list[float], list[str]]]:
    parts: dict[tuple[float, float], tuple[list[float], list[str]]] = {}
    for row, value, cluster in zip(rows, values.tolist(), clusters, strict=True):
        if row["crop"] is not None and row["angle"] is not None:
            part = parts.setdefault((row["crop"], row["angle"]), ([], []))
            part[0].append(value)
            part[1].append(cluster)
    return dict(sorted(parts.items()))


def corner_auc(errors: Sequence[float], threshold: float) -> float | None:
    """Area under the curve of the share of pairs below an error, from 0 to `threshold`, divided by `threshold`, as
    Sarlin et al., "SuperGlue", CVPR 2020, compute it: trapezoids between the sorted errors.

    Args:
        errors: mean corner errors in pixels; infinite where no geometry was found.
        threshold: pixels.

    Returns:
        In [0, 1]; None without pairs.

    >>> corner_auc([1.0, math.inf], 2)
    0.375
    """
    if not len(errors):
        return None
    ranked = np.concatenate([[0.0], np.sort(np.asarray(errors, float))])
    share = np.arange(len(ranked)) / len(errors)
    last = int(np.searchsorted(ranked, threshold))
    return float(np.trapezoid([*share[:last], share[last - 1]], [*ranked[:last], threshold]) / threshold)


def rerank(pairs: Iterable[PairRow]) -> list[PairRow]:
    """One query's retrieved pairs in a new order: verified ones by their inliers, those of an earlier look first (of
    another backbone they are not comparable), then the others as retrieval ranked them.

    >>> rows = [dict(rank=r, verified=r == 1, inliers=9 * r, retrieved=True) for r in range(3)]
    >>> [row["rank"] for row in rerank(rows)]
    [1, 0, 2]
    """
    retrieved = (row for row in pairs if row["retrieved"])
    return sorted(retrieved, key=_place)


def _place(row: PairRow) -> tuple[float, ...]:
    verified = (row.get("look", 0), -row["inliers"]) if row["verified"] else (0, 0)
    return (not row["verified"], *verified, row["rank"] or 0)


def best_pairs(pairs: Iterable[PairRow]) -> list[PairRow]:
    """Of each query's retrieved pairs, the one that re-ranking puts first; sorted by query."""
    by_query: dict[str, list[PairRow]] = {}
    for row in pairs:
        by_query.setdefault(row["query"], []).append(row)
    ranked = (rerank(by_query[query]) for query in sorted(by_query))
    return [rows[0] for rows in ranked if rows]


def match_metrics(pairs: Sequence[PairRow], unit: str = "photographs") -> MatchFigures:
    """The figures of a finished 04_match, from its rows.

    Args:
        pairs: rows of pairs.jsonl. Where `right` is None, nobody knows, and they count in no figure of what is right.
        unit: what a cluster is, for the messages.

    Returns:
        hit_at_1 (by global vectors), reranked_hit_at_1 (after re-ranking by inliers), verified (share of queries
        whose best candidate verifies), verified_right (share of those that are right), wrong_verified (of the
        queries with a wrong candidate, the share of which one verifies: how often no match would be believed),
        corner_error_median of the verified right ones in pixels. Of all pairs of a reference with its own source
        (pairs without a geometry count as failed): true_pairs, true_corner_error_median, true_within_8px,
        corner_auc (by threshold), matching_accuracy (mean of `geometry.matching_accuracy`), inlier_ratio (mean share of
        correspondences that the found geometry explains), rotation_error_median in degrees and scale_error_median
        (0.01 is one hundredth too large or too small). `intervals` of hit_at_1, reranked_hit_at_1, true_within_8px and
        reranking (reranked_hit_at_1 - hit_at_1, paired on the same queries). `by_crop` and `by_view` (crop and angle)
        have the same for parts. Shares are None where nothing could be counted.
    """
    best = best_pairs(pairs)
    figures = _figures(pairs, best, unit)
    crops = sorted({row["crop"] for row in pairs if row["crop"] is not None})
    known = ((row["crop"], row["angle"]) for row in pairs)
    views = sorted({(crop, angle) for crop, angle in known if crop is not None and angle is not None})
    return {
        **figures,
        "by_crop": [_part(pairs, best, unit, crop=crop) for crop in crops],
        "by_view": [_part(pairs, best, unit, crop=crop, angle=angle) for crop, angle in views],
    }


def _part(pairs: Sequence[PairRow], best: Sequence[PairRow], unit: str, **wanted: float) -> PairFigures:
    def inside(rows: Sequence[PairRow]) -> list[PairRow]:
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    return cast("PairFigures", {**wanted, **_figures(inside(pairs), inside(best), unit)})


def _figures(pairs: Sequence[PairRow], best: Sequence[PairRow], unit: str) -> PairFigures:
    counted = [row for row in best if row["answerable"]]
    first = [row for row in pairs if row["answerable"] and row["rank"] == 0]
    verified = [row for row in best if row["verified"]]
    right = [row["corner_error"] for row in verified if row["corner_error"] is not None]
    wrong: dict[str, bool] = {}
    for row in pairs:
        candidate = row["retrieved"] and row["candidate"] is not None
        if candidate and row["right"] is False and not row["has_truth"]:  # its own photograph matches rightly
            wrong[row["query"]] = wrong.get(row["query"], False) or row["verified"]
    true = [row for row in pairs if row["has_truth"]]
    errors = [_or_inf(row["corner_error"]) for row in true]
    nothing = [0.0] * len(ACCURACY)
    shares = [row["accuracy"] if row["matches"] and row["accuracy"] else nothing for row in true]
    accuracy = [mean(of[i] for of in shares) for i in range(len(ACCURACY))]
    each = {
        "hit_at_1": (first, [row["right"] for row in first]),
        "reranked_hit_at_1": (counted, [row["right"] for row in counted]),
        "true_within_8px": (true, [error <= 8 for error in errors]),
    }
    measured = {
        name: intervals.interval(np.array(values, float), [row["cluster"] for row in rows], unit=unit)
        for name, (rows, values) in each.items()
    }
    of = {row["query"]: row["cluster"] for row in counted}
    before, after = ({row["query"]: float(bool(row["right"])) for row in rows} for rows in (first, counted))
    measured["reranking"] = intervals.paired_difference(after, before, of, unit=unit)
    return {
        "queries": len(best),
        "hit_at_1": measured["hit_at_1"].value,
        "reranked_hit_at_1": measured["reranked_hit_at_1"].value,
        "verified": mean(row["verified"] for row in best),
        "verified_right": mean(bool(row["right"]) for row in verified if row["answerable"]),
        "wrong_verified": mean(wrong.values()),
        "corner_error_median": _median(right),
        "true_pairs": len(true),
        "true_corner_error_median": _median(errors),
        "true_within_8px": measured["true_within_8px"].value,
        "corner_auc": {str(pixels): corner_auc(errors, pixels) for pixels in PIXELS},
        "matching_accuracy": dict(zip(map(str, ACCURACY), accuracy, strict=True)),
        "inlier_ratio": mean(row["inliers"] / max(1, row["matches"]) for row in true),
        "rotation_error_median": _median([_or_inf(row["rotation_error"]) for row in true]),
        "scale_error_median": _median([_or_inf(row["scale_error"]) for row in true]),
        "intervals": {name: interval.record() for name, interval in measured.items()},
    }


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def mean(values: Iterable[float]) -> float | None:
    """Take the mean; None of nothing."""
    listed = list(values)
    return float(np.mean(listed)) if listed else None


def _median(values: Sequence[float]) -> float | None:
    median = float(np.median(values)) if values else math.nan
    return median if math.isfinite(median) else None
