"""04_match: each query against its best candidates, 1:1."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imatch import evaluate, geometry, matching, registry, runs, sinks, store
from imatch.records import ImatchError, Pair
from imatch.runs import Step
from imatch.steps.search import read_ranking
from imatch.steps.shared import flat_name, missed, query_and_gallery, tagged, views_by_id
from imatch.store import Row


def start_match(
    index_step: str,
    *,
    candidates: int,
    matcher: str,
    matcher_options: Mapping[str, Any],
    model: str,
    threshold: float,
    confidence: float,
    iterations: int,
    min_inliers: int,
    min_share: float,
    outputs: Sequence[str],
    tag: str,
    on_change: str,
) -> Step:
    """Start 04_match: each query of a 03_index step against its best candidates, 1:1.

    Args:
        index_step: folder of a finished 03_index.
        candidates: how many of each query's hits are matched.
        matcher: a name of `matching.MATCHERS`.
        matcher_options: fields of that matcher.
        model, threshold, confidence, iterations, min_inliers, min_share: of `geometry.Estimator`. A threshold of 0
            means 3 pixels between keypoints and half a patch on a grid; a share of 0 means 0.1 between keypoints
            and 0.3 on a grid, where neighbours see the same pixels and their agreement counts less.
        outputs: names of `sinks.SINKS`.
        tag, on_change: as in `start_embed`.

    Raises:
        ImatchError: an unknown name, or a number out of its range; see also `runs.start`.
    """
    source = runs.read(registry.resolve(index_step))
    if candidates < 1:
        raise ImatchError(f"candidates is {candidates}: match at least 1")
    matching.create(matcher, matcher_options)
    for output in outputs:
        sinks.create(output)
    chosen = {
        "model": model,
        "threshold": threshold,
        "confidence": confidence,
        "iterations": iterations,
        "min_inliers": min_inliers,
        "min_share": min_share,
    }
    _estimator(chosen, None)  # refuses bad values before anything is written
    within = source.folder.relative_to(source.folder.parents[3])  # <dataset>/<weight>/<configuration>/<direction>
    folder = source.folder.parents[4] / "04_match" / within.parent / f"{within.name}{tagged(tag)}"
    parameters = {
        "candidates": candidates,
        "matcher": matcher,
        "matcher_options": dict(matcher_options),
        "geometry": chosen,
        "outputs": sorted(outputs),
    }
    return runs.start(
        folder, "04_match", parameters, {"index": str(source.fingerprint)}, {"index": source.folder}, on_change
    )


def match(step: Step, *, workers: int = -1) -> list[Row]:
    """Match every query with its candidates, those that are missing.

    A reference is also matched with its own source when that is not among the candidates (retrieved: false), so
    that the error of the geometry is known apart from the retrieval; such pairs take no part in re-ranking.

    Returns:
        One row a pair, by query and rank (by global vectors); `reranked` is its place after re-ranking, from 0.
        pairs/<query>/<rank>.json, .npy and .png hold each in full. A query in which the backbone found nothing has one
        row without a candidate, in which everything has failed.
    """
    if not step.finished:
        job = _Match(step)
        todo = [q for q in range(len(job.query)) if not job.done(q).is_file()]
        for _ in runs.parallel(job, todo, workers, "match"):
            pass
        rows = [row for q in range(len(job.query)) for row in store.read_rows(job.done(q))]
        shown = {*job.gallery.shows}
        views = {row["id"] for row in missed(job.query) if not job.same and row.get("source_sha256") in shown}
        rows += [_unmatched(judged, judged["query"] in views) for judged in job.judged if not judged["embedded"]]
        store.write_rows(step.folder / "pairs.jsonl", rows)
    return store.read_rows(step.folder / "pairs.jsonl")


def match_metrics(step: Step, pairs: Sequence[Row]) -> dict[str, Any]:
    """The figures of 04_match (`evaluate.match_metrics`); counted apart: photographs that could not be decoded."""
    index = runs.read(step.linked("index"))
    return {
        "pairs": sum(row["candidate"] is not None for row in pairs),
        "queries_skipped": index.metrics["queries_skipped"],
        **evaluate.match_metrics(pairs, f"{index.parameters['cluster']}s"),
    }


class _Match:
    """Matches one query with its candidates; every worker process opens the stores for itself."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._open()

    def _open(self) -> None:
        index = runs.read(self.step.linked("index"))
        self.query, self.gallery = query_and_gallery(index)
        self.ranking = read_ranking(index)
        self.judged = store.read_rows(index.folder / "queries.jsonl")
        believed = index.metrics["threshold"]["value"]
        self.believed = math.inf if believed is None else believed
        self.same = self.query.folder == self.gallery.folder
        self.views = {side: views_by_id(index.linked(side)) for side in ("query", "gallery")}
        self.roots = {side: runs.read(index.linked(side)).linked("photographs") for side in ("query", "gallery")}
        parameters = self.step.parameters
        self.matcher = matching.create(parameters["matcher"], parameters["matcher_options"])
        self.sinks = [sinks.create(name) for name in parameters["outputs"]]
        self.row_that_shows = {shown: row for row, shown in reversed(list(enumerate(self.gallery.shows)))}

    def __getstate__(self) -> Step:
        return self.step

    def __setstate__(self, step: Step) -> None:
        self.step = step
        self._open()

    def done(self, q: int) -> Path:
        return self.step.folder / "pairs" / flat_name(self.query.ids[q]) / "pairs.jsonl"

    def __call__(self, q: int) -> None:
        wanted = [
            (int(row), float(score), rank)
            for rank, (row, score) in enumerate(zip(self.ranking.rows[q], self.ranking.scores[q], strict=True))
            if row >= 0
        ][: self.step.parameters["candidates"]]
        source = self.row_that_shows.get(self.query.shows[q])
        found = {self.gallery.shows[row] for row, _, _ in wanted}
        if source is not None and not self.same and self.query.shows[q] not in found:
            score = float(np.asarray(self.query.vectors[q]) @ np.asarray(self.gallery.vectors[source]))
            wanted.append((source, score, None))  # type: ignore[arg-type]
        pairs = [self._pair(q, row, score, rank) for row, score, rank in wanted]
        for place, row in enumerate(evaluate.rerank([pair.row for pair in pairs])):
            row["reranked"] = place
        for pair in pairs:
            name = "source" if pair.row["rank"] is None else f"{pair.row['rank']:02d}"
            for sink in self.sinks:
                sink(self.done(q).parent / name, pair)
        store.write_rows(self.done(q), (pair.row for pair in pairs))

    def _pair(self, q: int, row: int, score: float, rank: int | None) -> Pair:
        a, b = self.query.tokens(q), self.gallery.tokens(row)
        meta_a, meta_b = self.query.rows[q], self.gallery.rows[row]
        sizes = tuple(meta_a["size"]), tuple(meta_b["size"])
        matches = self.matcher(a, b)
        xy_a, xy_b = a.xy[matches.index_a], b.xy[matches.index_b]
        patch = None if b.grid is None else max(b.spacing)
        estimator = _estimator(self.step.parameters["geometry"], patch)
        found = estimator(xy_a, xy_b, *sizes)
        turned, scaled = (None, None)
        if found.matrix is not None and found.verified:
            turned, scaled = geometry.rotation_scale(found.matrix, sizes[0])
        view_a, view_b = (self.views[side].get(meta["id"]) for side, meta in (("query", meta_a), ("gallery", meta_b)))
        same = self.query.shows[q] == self.gallery.shows[row]
        truth = _truth(view_a, view_b) if same and (view_a or view_b) else None
        wanted = None if truth is None else geometry.rotation_scale(truth, sizes[0])
        judged = self.judged[q]
        record = {
            "query": meta_a["id"],
            "candidate": meta_b["id"],
            "rank": rank,
            "reranked": None,
            "retrieved": rank is not None,
            "score": round(score, 6),
            "right": same if rank is None else bool(self.ranking.right[q, rank]),
            "answerable": judged["answers"] > 0,
            "accepted": rank is not None and score >= self.believed,
            "cluster": judged["cluster"],
            "angle": judged["angle"],
            "crop": judged["crop"],
            "descriptors": [len(a.descriptors), len(b.descriptors)],
            "matches": len(matches),
            "inliers": int(found.inliers.sum()),
            "verified": found.verified,
            "reason": found.reason,
            "threshold": estimator.threshold,
            "matrix": None if found.matrix is None else found.matrix.tolist(),
            "rotation": turned,
            "scale": scaled,
            "reprojection_error": None if math.isnan(found.error) else found.error,
            "has_truth": truth is not None,
            "true_matrix": None if truth is None else truth.tolist(),
            "corner_error": None,
            "accuracy": None if truth is None else geometry.matching_accuracy(xy_a, xy_b, truth, evaluate.ACCURACY),
            "rotation_error": None,
            "scale_error": None,
        }
        if truth is not None and found.matrix is not None:
            error = geometry.corner_error(found.matrix, truth, sizes[0])
            record["corner_error"] = error if math.isfinite(error) else None
        if wanted and turned is not None and scaled:
            record["rotation_error"] = geometry.turned_apart(turned, wanted[0])
            record["scale_error"] = max(scaled / wanted[1], wanted[1] / scaled) - 1
        paths = self.roots["query"] / meta_a["id"], self.roots["gallery"] / meta_b["id"]
        return Pair(record, paths, sizes, xy_a, xy_b, matches, found)


def _unmatched(judged: Row, has_truth: bool) -> Row:
    """The row of a query that was not embedded and so finds nothing."""
    unknown = "candidate score matrix rotation scale reprojection_error true_matrix corner_error accuracy threshold"
    return {
        **dict.fromkeys([*unknown.split(), "rotation_error", "scale_error"]),
        **dict.fromkeys(["right", "verified", "accepted"], False),
        **{key: judged[key] for key in ("query", "cluster", "angle", "crop")},
        "rank": 0,
        "reranked": 0,
        "retrieved": True,
        "descriptors": [0, 0],
        "matches": 0,
        "inliers": 0,
        "reason": "the backbone found nothing in the query",
        "answerable": judged["answers"] > 0,
        "has_truth": has_truth,
    }


def _estimator(chosen: Mapping[str, Any], patch: float | None) -> geometry.Estimator:
    """The geometry's estimator; what was left at 0 is chosen for keypoints (patch None) or for a grid."""
    threshold = chosen["threshold"] or (3.0 if patch is None else max(3.0, patch / 2))
    share = chosen["min_share"] or (0.1 if patch is None else 0.3)
    return geometry.Estimator(**{**chosen, "threshold": threshold, "min_share": share})


def _truth(a: Row | None, b: Row | None) -> np.ndarray:
    """(3, 3) A -> B of two views of one photograph; None stands for the photograph itself."""
    into_a = np.eye(3) if a is None else np.array(a["matrix"])
    into_b = np.eye(3) if b is None else np.array(b["matrix"])
    return np.asarray(into_b @ np.linalg.inv(into_a))
