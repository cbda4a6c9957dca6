"""How good the answers are: retrieval and geometry, by angle and crop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

Row = Mapping[str, Any]
T = TypeVar("T", bound=Row)


def right_answers(rows: np.ndarray, query_shows: Sequence[str], gallery_shows: Sequence[str]) -> np.ndarray:
    """Which hits show the photograph that the query shows.

    Args:
        rows: (Q, k) int, rows in the gallery, -1 for none.
        query_shows: Q names of what the queries show, such as `Embeddings.shows`.
        gallery_shows: N of the same for the gallery.

    Returns:
        (Q, k) bool.

    >>> right_answers(np.array([[1, 0], [1, -1]]), ["a", "b"], ["a", "b"]).tolist()
    [[False, True], [True, False]]
    """
    wanted = np.asarray(query_shows, object)[:, None]
    return (np.append(np.asarray(gallery_shows, object), None)[rows] == wanted) & (rows >= 0)


def answerable(
    query_shows: Sequence[str], gallery_shows: Sequence[str], excludes_self: bool, excludes_siblings: bool
) -> np.ndarray:
    """Which queries have a right answer in the gallery at all: (Q,) bool.

    >>> answerable(["a", "a", "b"], ["a", "a", "b"], excludes_self=True, excludes_siblings=False).tolist()
    [True, True, False]
    """
    count: dict[str, int] = {}
    for source in gallery_shows:
        count[source] = count.get(source, 0) + 1
    if excludes_siblings:
        return np.zeros(len(query_shows), bool)
    return np.array([count.get(source, 0) > int(excludes_self) for source in query_shows], bool)


def hit_at_k(right: np.ndarray, k: int, has_answer: np.ndarray | None = None) -> float | None:
    """The share of queries with a right answer among their first k hits (Hit@K, also called Recall@K in place
    recognition: Arandjelovic et al., "NetVLAD", CVPR 2016).

    Args:
        right: (Q, K) bool.
        k: 1 to K.
        has_answer: (Q,) bool; queries without one do not count.

    Returns:
        In [0, 1]; None when no query counts.

    >>> hit_at_k(np.array([[False, True], [True, False]]), 1)
    0.5
    """
    hits = right[:, :k].any(axis=1)
    hits = hits if has_answer is None else hits[has_answer]
    return float(hits.mean()) if len(hits) else None


def rerank(pairs: Iterable[T]) -> list[T]:
    """One query's retrieved pairs in a new order: verified ones by their inliers, then the others as retrieval
    ranked them (inliers that do not verify are chance).

    >>> rows = [dict(rank=r, verified=r == 1, inliers=9 * r, retrieved=True) for r in range(3)]
    >>> [row["rank"] for row in rerank(rows)]
    [1, 0, 2]
    """
    retrieved = (row for row in pairs if row["retrieved"])
    return sorted(retrieved, key=lambda r: (not r["verified"], -r["inliers"] if r["verified"] else 0, r["rank"]))


def best_pairs(pairs: Iterable[Row]) -> list[Row]:
    """Of each query's retrieved pairs, the one that re-ranking puts first; sorted by query."""
    by_query: dict[str, list[Row]] = {}
    for row in pairs:
        by_query.setdefault(row["query"], []).append(row)
    ranked = (rerank(by_query[query]) for query in sorted(by_query))
    return [rows[0] for rows in ranked if rows]


def match_metrics(pairs: Sequence[Row]) -> dict[str, Any]:
    """The figures of a finished 04_match, from its rows.

    Returns:
        hit_at_1 (by global vectors), reranked_hit_at_1 (after re-ranking by inliers), verified (share of queries
        whose best candidate verifies), verified_right (share of those that are right), corner_error_median of
        the verified right ones in pixels, and of all pairs of a reference with its own source: true_pairs,
        true_corner_error_median, true_within_8px (pairs without a geometry count as failed). `by_crop` and
        `by_view` (crop and angle) have the same for parts. Shares are None where nothing could be counted.
    """
    best = best_pairs(pairs)
    figures = _figures(pairs, best)
    crops = sorted({row["crop"] for row in pairs if row["crop"] is not None})
    views = sorted({(row["crop"], row["angle"]) for row in pairs if row["crop"] is not None})
    figures["by_crop"] = [_part(pairs, best, crop=crop) for crop in crops]
    figures["by_view"] = [_part(pairs, best, crop=crop, angle=angle) for crop, angle in views]
    return figures


def _part(pairs: Sequence[Row], best: Sequence[Row], **wanted: float) -> dict[str, Any]:
    def inside(rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    return {**wanted, **_figures(inside(pairs), inside(best))}


def _figures(pairs: Sequence[Row], best: Sequence[Row]) -> dict[str, Any]:
    counted = [row for row in best if row["answerable"]]
    first = [row for row in pairs if row["answerable"] and row["rank"] == 0]
    verified = [row for row in best if row["verified"]]
    right = [row["corner_error"] for row in verified if row["corner_error"] is not None]
    true = [row for row in pairs if row["right"] and row["has_truth"]]
    errors = [math.inf if row["corner_error"] is None else row["corner_error"] for row in true]
    return {
        "queries": len(best),
        "hit_at_1": _mean(row["right"] for row in first),
        "reranked_hit_at_1": _mean(row["right"] for row in counted),
        "verified": _mean(row["verified"] for row in best),
        "verified_right": _mean(row["right"] for row in verified if row["answerable"]),
        "corner_error_median": _median(right),
        "true_pairs": len(true),
        "true_corner_error_median": _median(errors),
        "true_within_8px": _mean(error <= 8 for error in errors),
    }


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return float(np.mean(listed)) if listed else None


def _median(values: Sequence[float]) -> float | None:
    median = float(np.median(values)) if values else math.nan
    return median if math.isfinite(median) else None


def summary_table(finished: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics of 04_match as a table for a terminal: Hit@1 by crop and angle, then the median pixel error.

    Args:
        finished: name of a configuration -> its metrics.
    """
    shown = {name: metrics for name, metrics in finished.items() if metrics["by_view"]}
    angles = sorted({view["angle"] for metrics in shown.values() for view in metrics["by_view"]})
    wide = max([len(name) for name in finished] + [8])
    heads = [f"{angle:>5g}" for angle in angles] + [" mean", "re-ranked", "verified", "    px"]
    lines = [f"{'Hit@1':<{wide}}  crop " + " ".join(heads)] if shown else []
    for name, metrics in shown.items():
        for part in reversed(metrics["by_crop"]):
            hits = {view["angle"]: view["hit_at_1"] for view in metrics["by_view"] if view["crop"] == part["crop"]}
            cells = [_cell(hits.get(angle), 5) for angle in angles]
            rest = [(part["hit_at_1"], 5), (part["reranked_hit_at_1"], 9), (part["verified"], 8)]
            cells += [_cell(value, width) for value, width in [*rest, (part["corner_error_median"], 6)]]
            lines.append(f"{name:<{wide}}  {part['crop']:<4g} {' '.join(cells)}")
    for name, metrics in finished.items():
        lines += ["", f"{name}: {metrics['queries']} queries, {_cell(metrics['verified'])} of them verified"]
        if metrics.get("queries_skipped"):
            lines.append(f"  not counted above: {metrics['queries_skipped']} queries that could not be embedded")
        if metrics["verified_right"] is not None:
            lines.append(f"  of the verified, right: {_cell(metrics['verified_right'])}")
        if metrics["corner_error_median"] is not None:
            lines.append(f"  median corner error of verified right matches: {metrics['corner_error_median']:.2f} px")
        if metrics["true_pairs"]:
            lines.append(
                f"  of all {metrics['true_pairs']} pairs of a reference and its source: median corner error "
                f"{_cell(metrics['true_corner_error_median'])} px, within 8 px {_cell(metrics['true_within_8px'])}"
            )
    return "\n".join(lines)


def _cell(value: float | None, width: int = 0) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>{width}}"
