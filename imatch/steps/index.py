"""03_index: one set of global vectors searched by another."""

from __future__ import annotations

import csv
import io
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from imatch import calibrate, evaluate, images, indexes, plugins, positions, registry, runs, searcher, store
from imatch.calibrate import Threshold
from imatch.positions import Places
from imatch.records import Hits, ImatchError, ImatchWarning, Ranking, StepError, Truth
from imatch.runs import Step
from imatch.searcher import Searcher
from imatch.steps.send import sink_of
from imatch.steps.shared import (
    flat_name,
    missed,
    photographs_root,
    run_and_dataset,
    source_rows,
    tagged,
    views_by_id,
)
from imatch.store import Embeddings, Row

DIRECTIONS = ("reference-data", "data-reference", "reference-reference", "data-data")
TRUTHS = ("photograph", "nearest", "radius")
CLUSTERS = ("photograph", "capture")
BLOCK = 2**24
"""Hits that one call of an index may return."""


def start_index(
    embed_step: str,
    references_step: str,
    *,
    direction: str,
    index: str,
    index_options: Mapping[str, Any],
    memory_gb: float,
    recall: float,
    float16: bool,
    k: int,
    exclude_siblings: bool,
    truth: str,
    labels: str,
    radius: float,
    heading: float,
    cluster: str,
    precision: float,
    send: str,
    ttl: int,
    tag: str,
    on_change: str,
) -> Step:
    """Start 03_index: one set of embeddings searched by another.

    Args:
        embed_step: folder of a finished 01_embed.
        references_step: folder of the finished 02_references made from it, or of another 01_embed in their place, made
            with the same backbone at the same size; "" for the direction "data-data".
        direction: "<query>-<gallery>", one of `DIRECTIONS`.
        index: a name of `indexes.INDEXES`, or "auto": exact while it fits and is fast enough (`searcher.choose`).
        index_options: fields of that kind.
        memory_gb: GB that the index may take; 0 is half of what is free.
        recall: of an approximate index, the recall@k that it is tuned to, in (0, 1].
        float16: whether a GPU keeps vectors in 16 bits.
        k: neighbours a query.
        exclude_siblings: leave out what was made from the query's own photograph: the other references of it in
            "reference-reference"; with truth by position, in any direction, the photograph itself, too.
        truth: what a right answer is: "photograph" (it shows the query's own), "nearest" (it was taken nearest) or
            "radius" (all that were taken within `radius`).
        labels: a CSV or JSON of positions (`positions.read_labels`); "" takes them from the EXIF.
        radius: metres.
        heading: degrees that two headings may differ by at most; 180 asks for none.
        cluster: what intervals resample, for its queries fall or stand together: "photograph" or "capture".
        precision: the share of believed hits that shall be right, in (0, 1).
        send, ttl: as `send` will be given them (`to`, in seconds): refused now, not after hours.
        tag, on_change: as in `start_embed`.

    Raises:
        StepError: the references were not made from that 01_embed, or differ in backbone, pooling, family or size.
        ImatchError: an unknown direction or index; see also `runs.start`.
    """
    if direction not in DIRECTIONS:
        raise ImatchError(plugins.unknown("direction", direction, DIRECTIONS))
    if k < 1:
        raise ImatchError(f"k is {k}: ask for at least 1 neighbour")
    for what, value, known in (("truth", truth, TRUTHS), ("cluster", cluster, CLUSTERS)):
        if value not in known:
            raise ImatchError(plugins.unknown(what, value, known))
    if not (0 < radius < math.inf and 0 < heading <= 180 and 0 < precision < 1):
        raise ImatchError(
            f"radius {radius} must be above 0 metres, heading {heading} above 0 and up to 180 degrees, "
            f"precision {precision} between 0 and 1"
        )
    sink_of(send, ttl)
    if index != "auto":
        indexes.create(index, index_options)
    if not (0 < recall <= 1 and 0 <= memory_gb < math.inf):
        raise ImatchError(f"recall {recall} must be above 0 and up to 1, memory_gb {memory_gb} 0 or more")
    sides = dict(zip(("query", "gallery"), direction.split("-"), strict=True))
    found = {"data": runs.read(registry.resolve(embed_step))}
    kind = ""
    if "reference" in sides.values():
        if not references_step:
            raise ImatchError(
                f"direction {direction} needs references: give references_step, the folder of 02_references"
            )
        found["reference"] = runs.read(registry.resolve(references_step))
        kind = kind_of_reference(found["reference"], found["data"])
    exports, dataset = run_and_dataset(found["data"])
    weight, configuration = found["data"].folder.parts[-2:]
    folder = exports / "03_index" / dataset / weight / configuration / f"{direction}{kind}{tagged(tag)}"
    parameters = {
        "direction": direction,
        "index": index,
        "index_options": dict(index_options),
        "memory_gb": float(memory_gb),
        "recall": float(recall),
        "float16": float16,
        "k": k,
        "exclude_siblings": exclude_siblings,
        "truth": truth,
        "radius": float(radius) if truth == "radius" else None,
        "heading": None if truth == "photograph" else float(heading),
        "cluster": cluster,
        "precision": precision,
    }
    upstream = {side: str(found[name].fingerprint) for side, name in sides.items()}
    links = {side: found[name].folder for side, name in sides.items()}
    if labels:
        links["labels"] = registry.resolve(labels)
        positions.read_labels(links["labels"])  # refuses a bad file before anything is written
        upstream["labels"] = images.file_digest(links["labels"])
    # the index knows by itself what of it still holds
    return runs.start(folder, "03_index", parameters, upstream, links, on_change, keep=("index",))


def kind_of_reference(reference: Step, data: Step) -> str:
    """The ending that the other side of an index gives to its folder's name, after checking that the two belong
    together: references made from the photographs, or photographs of another 01_embed (queries of a survey, say)."""
    if reference.name == "02_references" and reference.upstream.get("embed") != data.fingerprint:
        raise StepError(f"{reference.folder} was not made from {data.folder} as it is now: run 02_references again")
    compared = ("weight", "backbone", "weights_digest", "resize")
    of_data, of_reference = ({key: step.parameters[key] for key in compared} for step in (data, reference))
    if differences := runs.compare(of_data, of_reference):
        raise StepError(
            f"vectors of {data.folder} and {reference.folder} cannot be compared, they were made differently:\n  "
            + "\n  ".join(differences)
            + "\nEmbed both with the same weight, pooling, precision and size"
        )
    if reference.name == "02_references":
        return f"_{reference.folder.parent.parent.name}"
    _, dataset = run_and_dataset(reference)
    return f"_{dataset}-{reference.folder.name}"


def build_index(step: Step, gallery: Embeddings, *, device: str = "auto") -> Searcher:
    """Build the index of the gallery's global vectors, or bring the one that is there up to date, and open it.

    Prints which kind it is, and why.

    Args:
        step: of `start_index`.
        gallery: what is searched.
        device: "auto" (all GPUs, if FAISS sees some), "cpu", "cuda", or such as "cuda:0".

    Raises:
        ImatchError: it does not fit into the memory, or a device that is not there.
        StepError: a finished step's index is not whole, or older than the gallery.
    """
    folder, asked = step.folder / "index", step.parameters
    keys = gallery.digests
    if not step.finished:
        searcher.build(
            folder,
            gallery.vectors,
            keys,
            kind=asked["index"],
            options=asked["index_options"],
            memory=round(asked["memory_gb"] * 2**30),
        )
    index = Searcher(folder, gallery.vectors, keys, device=device, float16=asked["float16"])
    print(f"{index.plan['kind']} on {index.backend}: {index.plan['reason']}")
    return index


def tune_index(step: Step, index: Searcher, query: Embeddings) -> Row:
    """Measure the index against exact search on a sample of the queries, and let it search with the smallest effort
    that reaches the wanted recall (a warning, if none does).

    Returns:
        kind, reason, vectors, dimension, shards, bytes_a_vector (on disk) and estimated_bytes_a_vector, backend,
        build_ms; k and sample (queries); effort (name and value, None without one), wanted_recall, recall, search_ms
        and exact_ms a query; curve: effort, recall and ms of each point that was tried.
    """
    if step.finished:
        return dict(step.metrics["index"])
    k = min(step.parameters["k"], len(index.vectors))
    rows = np.unique(np.linspace(0, len(query) - 1, min(searcher.SAMPLE, len(query))).astype(int))
    sample = store.take(query.vectors, rows)
    points = index.curve(sample, k)
    chosen, wanted = index.tune(points, step.parameters["recall"]), step.parameters["recall"]
    if chosen is not None and chosen.recall < wanted:
        warnings.warn(
            f"recall@{k} is {chosen.recall:.3f} at most, below the {wanted:g} that was asked for: use another index, "
            "or a larger `refine` in index_options",
            ImatchWarning,
            stacklevel=2,
        )
    index.exact(sample[:8], k)  # the first ones wake threads and map files
    index.search(sample[:8], k)
    exact_ms = _ms(lambda: index.exact(sample, k), len(sample))
    search_ms = _ms(lambda: index.search(sample, k), len(sample))
    n, d = index.vectors.shape
    return {
        "kind": index.plan["kind"],
        "asked": step.parameters["index"],
        "options": index.plan["options"],
        "reason": index.plan["reason"],
        "vectors": n,
        "dimension": d,
        "bytes_a_vector": round(index.stored() / n, 1),
        "estimated_bytes_a_vector": round(index.kind.memory(n, d) / n, 1),
        "shards": len(index.shards),
        "backend": index.backend,
        "effort": {"name": index.kind.effort, "value": chosen.effort} if chosen and chosen.effort else None,
        "wanted_recall": wanted,
        "recall": 1.0 if chosen is None else chosen.recall,
        "k": k,
        "sample": len(sample),
        "build_ms": index.plan["build_ms"],
        "search_ms": search_ms,
        "exact_ms": exact_ms,
        "curve": [{"effort": p.effort, "recall": p.recall, "ms": round(p.ms, 4)} for p in points],
    }


def _ms(work: Callable[[], Any], queries: int) -> float:
    started = time.perf_counter()
    work()
    return round(1000 * (time.perf_counter() - started) / queries, 4)


def self_check(index: Searcher, gallery: Embeddings, sample: int = 1000) -> tuple[int, int]:
    """Let vectors of the gallery, evenly spread, search for themselves.

    Args:
        index: of that gallery.
        gallery: whose vectors they are.
        sample: how many at most.

    Returns:
        How many found an equal-score twin of theirs first (photographs with the same content), and how many an
        approximate index did not find.

    Raises:
        StepError: a vector finds something else better than itself in an exact index, or most do in another: rows and
            index do not belong together.
    """
    row = np.unique(np.linspace(0, len(gallery) - 1, min(sample, len(gallery))).astype(int))
    vectors = store.take(gallery.vectors, row)
    hits = index.search(vectors, 1)
    own = np.einsum("nd,nd->n", vectors, vectors)
    # what came first must score, by the store's own vectors, as high as the vector itself
    found = hits.rows[:, 0] >= 0
    first = np.where(found, np.einsum("nd,nd->n", vectors, store.take(gallery.vectors, hits.rows[:, 0])), -np.inf)
    other = hits.rows[:, 0] != row
    wrong = other & (first < own - 1e-5)
    if wrong.any() and (index.kind.exact or wrong.mean() > 0.5):
        answer = gallery.ids[hits.rows[wrong, 0][0]]
        raise StepError(f"the index answers {answer} for {gallery.ids[row[wrong][0]]}: delete its folder and run again")
    return int((other & ~wrong).sum()), int(wrong.sum())


def search(step: Step, index: Searcher, query: Embeddings, gallery: Embeddings) -> Ranking:
    """Search all queries, without the item itself and, if asked, without its siblings, and say what is right.

    The index goes deep enough to know, too, what each query would find if its right answers were not there. Writes
    ranking.npz.

    Raises:
        ImatchError: truth by position, and no positions or headings are known.
    """
    if step.finished:
        return read_ranking(step)
    k, lost = step.parameters["k"], missed(query)
    shows = [*query.shows, *(row.get("source_sha256", row["sha256"]) for row in lost)]
    own = _left_out(step, query, gallery, shows)
    here, there = _places(step, [*query.rows, *lost], gallery.rows)
    truth = _truth(step, shows, gallery.shows, here, there, own)
    kin = np.zeros(len(shows), np.int64) if own is None else _count(*own)
    depth = min(len(gallery), int(kin.max()) + max(k, int(truth.count.max()) + 1))
    block = max(1, BLOCK // depth)
    parts = []
    for first in runs.progress(range(0, len(query), block), "search"):
        part = slice(first, min(first + block, len(query)))
        hits = index.search(query.vectors[part], depth)
        parts.append(_ranked(hits, truth.right(hits.rows, part), own and (own[0][part], own[1]), k))
    nothing = np.full((len(lost), k), -1), np.full((len(lost), k), -np.inf, np.float32)
    parts.append((*nothing, np.zeros((len(lost), k), bool), np.full(len(lost), -np.inf, np.float32)))
    rows, scores, right, without = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    metres = here.metres(there, rows) if here and there and here.system == there.system else None
    counts = {"answers": truth.count, "candidates": len(gallery) - kin}
    found = {"rows": rows, "scores": scores, "right": right, "without": without, **counts}
    with store.atomic(step.folder / "ranking.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **found, **({} if metres is None else {"metres": metres}))
    return Ranking(**found, metres=metres)


def read_ranking(step: Step) -> Ranking:
    """What `search` found.

    Raises:
        StepError: there is no ranking, as in a step of an earlier version.
    """
    if not (step.folder / "ranking.npz").is_file():
        raise StepError(f"no ranking in {step.folder}: run 03_index again, with -p on_change recompute")
    with np.load(step.folder / "ranking.npz") as saved:
        return Ranking(**{name: saved.get(name) for name in Ranking.__dataclass_fields__})


def _ranked(
    hits: Hits, right: np.ndarray, own: tuple[np.ndarray, np.ndarray] | None, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The first k hits that are not left out, whether they are right, and the best score of the wrong ones."""
    gone = hits.rows < 0
    if own:
        gone |= own[0][:, None] == np.append(own[1], -1)[hits.rows]
    scores = np.where(gone, -np.inf, hits.scores).astype(np.float32)
    without = np.where(right, -np.inf, scores).max(axis=1)
    order = np.argsort(gone, axis=1, kind="stable")[:, :k]
    rows, scores, right = (
        np.take_along_axis(values, order, 1) for values in (np.where(gone, -1, hits.rows), scores, right & ~gone)
    )
    pad = ((0, 0), (0, k - rows.shape[1]))
    return (
        np.pad(rows, pad, constant_values=-1),
        np.pad(scores, pad, constant_values=-np.inf),
        np.pad(right, pad),
        without,
    )


def _left_out(
    step: Step, query: Embeddings, gallery: Embeddings, shows: Sequence[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """(Q,) and (N,) whole numbers, equal where a row is no answer for a query: itself, or all that show the same."""
    same, siblings = query.folder == gallery.folder, step.parameters["exclude_siblings"]
    if siblings and (same or step.parameters["truth"] != "photograph"):
        codes = np.unique([*shows, *gallery.shows], return_inverse=True)[1]
        return codes[: len(shows)], codes[len(shows) :]
    if not same:
        return None
    return np.where(np.arange(len(shows)) < len(query), np.arange(len(shows)), -1), np.arange(len(gallery))


def _count(own: np.ndarray, of: np.ndarray) -> np.ndarray:
    """How many of `of` are equal to each of `own`."""
    ranked = np.sort(of)
    return np.searchsorted(ranked, own, "right") - np.searchsorted(ranked, own, "left")


def _truth(
    step: Step,
    query_shows: Sequence[str],
    gallery_shows: Sequence[str],
    here: Places | None,
    there: Places | None,
    own: tuple[np.ndarray, np.ndarray] | None,
) -> Truth:
    parameters = step.parameters
    if parameters["truth"] == "photograph":
        return evaluate.same_photograph(query_shows, gallery_shows, *(own or ()))
    if here is None or there is None:
        raise ImatchError(
            f"truth is {parameters['truth']}, but no photograph of the {'gallery' if here else 'queries'} has a "
            "position in its EXIF: give them in a CSV or JSON with -p labels FILE"
        )
    if parameters["truth"] == "radius":
        return Truth.of(positions.within(here, there, parameters["radius"], parameters["heading"], own))
    return Truth.of(positions.nearest(here, there, parameters["heading"], own))


def _places(step: Step, query: Sequence[Row], gallery: Sequence[Row]) -> tuple[Places | None, Places | None]:
    """Where the photographs of both sides were taken; a reference lies where its source does, and is turned from it.

    Labels are fitted to both sides at once, so that a name which fits photographs of two data sets is refused.
    """
    labels = positions.read_labels(step.linked("labels")) if "labels" in step.links else None
    roots = [photographs_root(step.linked(side)) for side in ("query", "gallery")]
    ids, exif, turned = [], [], []
    for side, root, rows in zip(("query", "gallery"), roots, (query, gallery), strict=True):
        sources, views = source_rows(step.linked(side)), views_by_id(step.linked(side))
        for row in rows:
            source = sources.get(row.get("source", row["id"]), {})
            ids.append(
                row.get("source", row["id"]) if roots[0] == roots[1] else f"{root.name}/{row.get('source', row['id'])}"
            )
            place = source.get("position") or {}
            exif.append(place if None not in (place.get("latitude"), place.get("longitude")) else None)
            turned.append(float({**row, **views.get(row["id"], {})}.get("angle") or 0))
    both = positions.places(ids, exif, labels, turned)
    found = []
    for side, part in (("query", slice(0, len(query))), ("gallery", slice(len(query), None))):
        known = both is not None and bool(both.known[part].any())
        if labels is not None and not known:
            raise ImatchError(
                f"{step.linked('labels')} names none of the photographs ({side} side): its names must be ids or file "
                f"names, such as {ids[part][0]}"
            )
        if labels is not None and both is not None and not both.known[part].all():
            lacking = int((~both.known[part]).sum())
            print(f"{lacking} of {len(ids[part])} photographs ({side} side) have no place in {step.linked('labels')}")
        found.append(Places(both.system, both.coordinates[part], both.heading[part]) if both and known else None)
    return found[0], found[1]


def judge(
    step: Step, query: Embeddings, gallery: Embeddings, ranking: Ranking, index: Mapping[str, Any]
) -> tuple[list[Row], Threshold]:
    """Say of every query what it found, and from which score on a hit is to be believed.

    The threshold is calibrated on the queries themselves, each asked twice: as it is, and with its right answers left
    out of the gallery, when nothing it finds is right (`calibrate.calibrate`).

    Writes queries.jsonl (one row a query), hits.csv (one row a hit), queries/<id>.json (one file a query), results.json
    (all of these), ids.npy (Q, k) text, "" where there is no hit, and scores.npy (Q, k) float32.

    Args:
        step: of `start_index`.
        query, gallery: its two sides.
        ranking: of `search`.
        index: figures of `tune_index`.

    Returns:
        The rows of queries.jsonl, one a query of the ranking: query, photograph (its source), cluster, crop and angle
        of a reference, embedded (False: the backbone found nothing in it, so it finds nothing), answers
        (right ones in the gallery), right_ranks (from 0), score of the first hit, score_without (of the first wrong
        one), accepted (whether the first hit is believed), metres (of the first hit) and least_metres (of all k).
        And the threshold.
    """
    views, lost = views_by_id(step.linked("query")), missed(query)
    about = [{**row, **views.get(row["id"], {})} for row in [*query.rows, *lost]]
    clusters = _clusters(step, about)
    found: list[Row] = []
    for q, row in enumerate(about):
        metres = np.full(1, np.nan) if ranking.metres is None else ranking.metres[q]
        found.append(
            {
                "query": row["id"],
                "photograph": row.get("source", row["id"]),
                "cluster": clusters[q],
                "crop": row.get("crop"),
                "angle": row.get("angle"),
                "embedded": q < len(query),
                "answers": int(ranking.answers[q]),
                "right_ranks": np.flatnonzero(ranking.right[q]).tolist(),
                "score": _score(ranking.scores[q, 0]),
                "score_without": _score(ranking.without[q]),
                "metres": _finite(metres[0]),
                "least_metres": _finite(np.min(metres, where=~np.isnan(metres), initial=np.inf)),
            }
        )
    threshold = calibrate.calibrate(*evaluate.asked_twice(found), precision=step.parameters["precision"])
    believed = ranking.scores >= (math.inf if threshold.value is None else threshold.value)
    rows = [{**row, "accepted": bool(first)} for row, first in zip(found, believed[:, 0], strict=True)]
    if not step.finished:
        _write_hits(step, [row["query"] for row in rows], gallery, ranking, believed, index)
        store.write_rows(step.folder / "queries.jsonl", rows)
    return rows, threshold


def _score(value: float) -> float | None:
    """Unrounded: the threshold is one of these scores, and whoever compares the two shall find the same accepted."""
    return None if value == -math.inf else float(value)


def _finite(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None


def _clusters(step: Step, queries: Sequence[Row]) -> list[str]:
    """What the queries are counted by: those of one photograph, or of one capture, fall or stand together."""
    if step.parameters["cluster"] == "photograph":
        return [row.get("source_sha256", row["sha256"]) for row in queries]
    sources = source_rows(step.linked("query"))
    captures = [sources.get(row.get("source", row["id"]), {}).get("capture") for row in queries]
    if None in captures:
        raise ImatchError(
            f"cluster is capture, but {queries[captures.index(None)]['id']} belongs to none: name the captures in "
            "data_key.json and run 01_embed anew, or use -p cluster photograph"
        )
    return captures


def _write_hits(
    step: Step,
    queries: Sequence[str],
    gallery: Embeddings,
    ranking: Ranking,
    believed: np.ndarray,
    index: Mapping[str, Any],
) -> None:
    asked = runs.read(step.linked("query"))
    about = {
        "weight": asked.parameters["weight"],
        "variant": asked.parameters["variant"],
        "direction": step.parameters["direction"],
        "k": step.parameters["k"],
    }
    work = asked.work.get("seconds", 0.0) / max(1, asked.work.get("photographs", 0))
    timing = {"embed": round(1000 * work, 4), "search": index["search_ms"]}
    timing["total"] = round(sum(timing.values()), 4)
    records = []
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["query", "rank", "id", "score", "right", "accepted", "metres"])
    for q, id in runs.progress(list(enumerate(queries)), "write hits"):
        found = []
        for rank in range(int((ranking.rows[q] >= 0).sum())):
            metres = None if ranking.metres is None else _finite(ranking.metres[q, rank])
            hit = {
                "rank": rank,
                "id": gallery.ids[ranking.rows[q, rank]],
                "path": gallery.ids[ranking.rows[q, rank]],
                "score": round(float(ranking.scores[q, rank]), 6),
                "right": bool(ranking.right[q, rank]),
                "accepted": bool(believed[q, rank]),
            }
            found.append(hit if metres is None else {**hit, "metres": metres})
            score, right, accepted = f"{hit['score']:.6f}", int(hit["right"]), int(hit["accepted"])
            table.writerow([id, rank, hit["id"], score, right, accepted, "" if metres is None else f"{metres:.3f}"])
        record = {"query": id, **about, "accepted": bool(believed[q, 0]), "hits": found, "timing_ms": timing}
        store.write_json(step.folder / "queries" / f"{flat_name(id)}.json", record)
        records.append(record)
    searched = {"backend": index["backend"], "dimension": index["dimension"], "index_build_ms": index["build_ms"]}
    store.write_json(step.folder / "results.json", {**about, **searched, "queries": records})
    store.write_array(step.folder / "ids.npy", np.array([*gallery.ids, ""], str)[ranking.rows])
    store.write_array(step.folder / "scores.npy", ranking.scores)
    store.write_bytes(step.folder / "hits.csv", text.getvalue().encode(errors="surrogateescape"))


def index_metrics(
    step: Step,
    query: Embeddings,
    gallery: Embeddings,
    ranking: Ranking,
    rows: Sequence[Row],
    threshold: Threshold,
    index: Mapping[str, Any],
    checked: tuple[int, int],
) -> dict[str, Any]:
    """The figures of 03_index: sizes, index (`tune_index`), twins and vectors not_found (`self_check`), retrieval
    (`evaluate.retrieval_metrics`), chance, threshold, and metres where positions are known. Counted apart: queries that
    have no answer in the gallery, and photographs that could not be embedded and so never became queries."""
    unit = f"{step.parameters['cluster']}s"
    return {
        **evaluate.retrieval_metrics(rows, step.parameters["k"], unit),
        "gallery": len(gallery),
        "dimension": gallery.vectors.shape[1],
        "index": dict(index),
        "twins": checked[0],
        "not_found": checked[1],
        "queries_skipped": len(store.read_rows(query.folder / "skipped.jsonl")) - len(missed(query)),
        "chance": evaluate.chance(ranking.answers, ranking.candidates),
        "threshold": threshold.record(),
        "positions": None if ranking.metres is None else positions.figures(ranking.metres),
    }
