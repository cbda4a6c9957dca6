"""03_index: one set of global vectors searched by another."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from imatch.core import compute, config, files, settings
from imatch.core.compute import LOCAL, ComputeOptions
from imatch.core.files import flat_name
from imatch.core.rows import HitRow, IndexFigures, PhotoRow, QueryRow, SearchFigures, StageRow
from imatch.core.step import Step, check_planned, open_step, start_step, step_folder, tagged
from imatch.core.types import Hits, ImatchError, ImatchWarning, Ranking, StepError
from imatch.data import images, store
from imatch.data.embeddings import comparable
from imatch.data.rotations import poses
from imatch.data.store import Stored, read_ranking
from imatch.evaluation import calibration, intervals
from imatch.evaluation.alarms import SAME, alike, copies_of, guessing, promise_broken
from imatch.evaluation.calibration import Threshold
from imatch.evaluation.metrics import asked_twice, average_precision, chance, hit_at_k, retrieval_metrics
from imatch.features import base
from imatch.features.base import Backbone, embed_one
from imatch.retrieval import index as searcher
from imatch.retrieval.index import IndexOptions, Searcher
from imatch.retrieval.ranking import HELD, Found, RankingOptions, Stage, Ways, joined, search_by
from imatch.retrieval.truth import (
    TruthOptions,
    count_equal,
    left_out,
    places_of,
    position_figures,
    read_labels,
    truth_of,
)
from imatch.steps import groups
from imatch.steps.embedding import embed_poses, worth_trying

DIRECTIONS = ("reference-data", "data-reference", "reference-reference", "data-data")


def start_index(
    embed_step: str,
    references_step: str = "",
    *,
    direction: str = "reference-data",
    k: int = 10,
    index: IndexOptions = IndexOptions(),
    ranking: RankingOptions = RankingOptions(),
    truth: TruthOptions = TruthOptions(),
    run: str = "",
    tag: str = "",
    on_change: str = "refuse",
) -> Step:
    """Start 03_index: one set of embeddings searched by another.

    Args:
        embed_step: folder of a finished 01_embed.
        references_step: folder of the finished 02_references made from it, or of another 01_embed in their place, made
            with the same backbone at the same size; "" for the direction "data-data".
        direction: "<query>-<gallery>", one of `DIRECTIONS`.
        k: neighbours a query.
        index, ranking, truth: how vectors are indexed, hits are ranked, and answers judged.
        run: name of the run that it goes to; "" is that of the photographs.
        tag, on_change: as in `start_embed`.

    Raises:
        StepError: the references were not made from that 01_embed, or differ in backbone, pooling, family or size; or
            rerank, and a side kept too little for it.
        ImatchError: an unknown direction; see also `step.start_step`.
    """
    groups.check({"direction": direction, "k": k})
    sides = dict(zip(("query", "gallery"), direction.split("-"), strict=True))
    found = {"data": open_step(step_folder(embed_step))}
    kind = ""
    if "reference" in sides.values():
        if not references_step:
            raise ImatchError(
                f"direction {direction} needs references: give references_step, the folder of 02_references"
            )
        found["reference"] = open_step(step_folder(references_step))
        kind = kind_of_reference(found["reference"], found["data"])
    _check_ranking(ranking, *(found[side] for side in sides.values()))
    tries = worth_trying(found[sides["query"]], poses(ranking.rotations))
    data = found["data"]
    about = {**data.about, "question": f"{direction}{kind}{tagged(tag)}"}
    parameters = {
        "direction": direction,
        "k": k,
        "index": {name: value for name, value in asdict(index).items() if name != "device"},
        "ranking": {**asdict(ranking), "rotations": len(tries), "tokens": ranking.tokens if ranking.rerank else None},
        "truth": {
            **{name: value for name, value in asdict(truth).items() if name != "labels"},
            "radius": truth.radius if truth.kind == "radius" else None,
            "heading": None if truth.kind == "photograph" else truth.heading,
        },
    }
    upstream = {side: str(found[name].fingerprint) for side, name in sides.items()}
    links = {side: found[name].folder for side, name in sides.items()}
    if truth.labels:
        links["labels"] = settings.from_workspace(truth.labels)
        read_labels(links["labels"])  # refuses a bad file before anything is written
        upstream["labels"] = images.file_digest(links["labels"])
    home = data.run.with_name(config.folder_name(run, "run")) if run else data.run
    return start_step(home, "03_index", about, parameters, upstream, links, on_change)


def _check_ranking(ranking: RankingOptions, query: Step, gallery: Step) -> None:
    """Refuse what the two sides cannot do."""
    most = min(gallery.metrics["global_dimension"], gallery.metrics["photographs"] - 1)
    if ranking.whiten > most:
        raise ImatchError(
            f"ranking.whiten {ranking.whiten}: {gallery.metrics['photographs']} vectors of "
            f"{gallery.metrics['global_dimension']} numbers give at most {most} axes"
        )
    for side in (query, gallery) if ranking.rerank else ():
        store.check_keeps(side.folder, side.parameters, "rerank", store.KEEPS_LOCAL)
        if store.keep_of(side.parameters) == "aggregated" and ranking.tokens > store.AGGREGATED:
            raise StepError(
                f"ranking.tokens is {ranking.tokens}, and {side.folder} keeps {store.AGGREGATED} a photograph: set it "
                f"to {store.AGGREGATED}, or run 01_embed with storage.keep {' or '.join(store.KEEPS_PLACED)}"
            )


def build_index(
    step: Step, gallery: Stored, resources: ComputeOptions = ComputeOptions(), *, device: str = "auto"
) -> Searcher:
    """Build the index of the gallery's global vectors, unless it is there, open it, and print which kind it is and why.

    It lies beside the gallery, in index/<what was asked for>, for any number of steps that search it.

    Args:
        step: of `start_index`.
        gallery: what is searched.
        resources: whose engine adds vectors, shard by shard; what is learned is learned once, here.
        device: "auto" (all GPUs, if FAISS sees some), "cpu", "cuda", or such as "cuda:0".

    Raises:
        ImatchError: it does not fit into the memory, or a device that is not there.
        StepError: a file of it is broken.
        PartDoneError: see `compute.do`.
    """
    asked = step.parameters["index"]
    changed = [asked["options"], asked["memory_gb"]]
    given = files.digest(changed)[:8] if any(changed) else ""
    folder = gallery.folder / "index" / "_".join(filter(None, [asked["kind"], given]))
    engine = LOCAL if step.finished else resources.machines
    options = IndexOptions(**asked, device=device)
    index = searcher.build(folder, gallery.vectors, gallery.digest, options, engine=engine)
    print(f"{index.plan['kind']} on {index.backend}: {index.plan['reason']}")
    return index


def tune_index(step: Step, index: Searcher, query: Stored) -> IndexFigures:
    """Measure the index against exact search on a sample of the queries, and let it search with the smallest effort
    that reaches the wanted recall (a warning, if none does).

    Returns:
        bytes_a_vector is on disk, build_ms without what parts took, search_ms and exact_ms a query; sample counts
        queries; effort is None without one; curve: effort, recall and ms of each point tried.
    """
    if step.finished:
        measured = dict(step.metrics["index"])
        index.effort = (measured["effort"] or {}).get("value")  # other queries may have tuned it since
        return measured
    k = min(step.parameters["k"], len(index.vectors))
    sample = files.take(query.vectors, searcher.sample(len(query)))
    points = index.curve(sample, k)
    wanted = step.parameters["index"]["recall"]
    chosen = index.tune(points, wanted)
    if chosen is not None and chosen.recall < wanted:
        warnings.warn(
            f"recall@{k} is {chosen.recall:.3f} at most, below the {wanted:g} that was asked for: use another index, "
            "or a larger `refine` in index.options",
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
        "asked": step.parameters["index"]["kind"],
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


def _ms(work: Callable[[], Hits], queries: int) -> float:
    started = time.perf_counter()
    work()
    return round(1000 * (time.perf_counter() - started) / queries, 4)


def check_index(index: Searcher, gallery: Stored) -> tuple[int, int]:
    """Let up to 1,000 vectors of the gallery, evenly spread, search for themselves.

    Args:
        index: of that gallery.
        gallery: whose vectors they are.

    Returns:
        How many found a twin first (a photograph of the same content), and how many were missed.

    Raises:
        StepError: a vector finds something else better than itself in an exact index, or most do in another: rows and
            index do not belong together.
    """
    row = searcher.sample(len(gallery), 1000)
    vectors = files.take(gallery.vectors, row)
    hits = index.search(vectors, 1)
    own = np.einsum("nd,nd->n", vectors, vectors)
    # what came first must score, by the store's own vectors, as high as the vector itself
    found = hits.rows[:, 0] >= 0
    answers = files.take(gallery.vectors, hits.rows[:, 0])
    first = np.where(found, np.einsum("nd,nd->n", vectors, answers), -np.inf)
    other = hits.rows[:, 0] != row
    wrong = other & (first < own - 1e-5)
    if wrong.any() and (index.kind.exact or wrong.mean() > 0.5):
        answer = gallery.ids[hits.rows[wrong, 0][0]]
        raise StepError(f"the index answers {answer} for {gallery.ids[row[wrong][0]]}: delete its folder and run again")
    return int((other & ~wrong).sum()), int(wrong.sum())


def judge_index(
    step: Step, query: Stored, gallery: Stored, ranking: Ranking, index: IndexFigures
) -> tuple[list[QueryRow], Threshold]:
    """Say of every query what it found, and from which score on a hit is to be believed.

    Writes queries.jsonl (one row a query), hits.csv (one row a hit), queries/<id>.json (one file a query), results.json
    (all of these), ids.npy (Q, k) text, "" where there is no hit, and scores.npy (Q, k) float32.

    Args:
        step: of `start_index`.
        query, gallery: its two sides.
        ranking: of `search`.
        index: figures of `tune_index`.

    Returns:
        The rows of queries.jsonl, one a query of the ranking: query, photograph (its source), cluster, crop and angle
        of a reference, embedded (False: the backbone found nothing in it), answers (right ones in the gallery),
        right_ranks (from 0), score of the first hit, score_without (of the first wrong one), accepted (the first hit
        is believed), metres (of the first hit) and least_metres (of all k). And the threshold
        (`calibration.calibrate`).
    """
    about = [{**row, **query.views.get(row["id"], {})} for row in [*query.rows, *query.missed]]
    of = _clusters(query, step.parameters["truth"]["cluster"], about)
    found: list[QueryRow] = []
    for q, row in enumerate(about):
        metres = np.full(1, np.nan) if ranking.metres is None else ranking.metres[q]
        found.append(
            {
                "query": row["id"],
                "photograph": row.get("source", row["id"]),
                "cluster": of[q],
                "crop": row.get("crop"),
                "angle": row.get("angle"),
                "embedded": q < len(query),
                "answers": int(ranking.answers[q]),
                "right_ranks": np.flatnonzero(ranking.right[q]).tolist(),
                # unrounded: the threshold is one of these scores, and who compares shall find the same accepted
                "score": _known(ranking.scores[q, 0]),
                "score_without": _known(ranking.without[q]),
                "metres": _known(round(metres[0], 6)),
                "least_metres": _known(round(np.fmin.reduce(metres), 6)),
            }
        )
    threshold = calibration.calibrate(*asked_twice(found), precision=step.parameters["truth"]["precision"])
    believed = ranking.scores >= (math.inf if threshold.value is None else threshold.value)
    rows = [{**row, "accepted": bool(first)} for row, first in zip(found, believed[:, 0], strict=True)]
    if not step.finished:
        _write_hits(step, [row["query"] for row in rows], query, gallery, ranking, believed, index)
        files.write_rows(step.folder / "queries.jsonl", rows)
    return rows, threshold


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _write_hits(
    step: Step,
    queries: Sequence[str],
    query: Stored,
    gallery: Stored,
    ranking: Ranking,
    believed: np.ndarray,
    index: IndexFigures,
) -> None:
    about = {
        **{name: query.parameters[name] for name in ("weight", "variant")},
        **{name: step.parameters[name] for name in ("direction", "k")},
    }
    work = query.work.get("seconds", 0.0) / max(1, query.work.get("photographs", 0))
    timing = {"embed": round(1000 * work, 4), "search": index["search_ms"]}
    timing["total"] = round(sum(timing.values()), 4)
    records = []
    files.check_apart(step.folder, queries)
    for q, id in compute.progress(list(enumerate(queries)), "write hits"):
        hits: list[HitRow] = []
        for rank in range(int((ranking.rows[q] >= 0).sum())):
            name = gallery.ids[ranking.rows[q, rank]]
            hits.append(
                {
                    "rank": rank,
                    "id": name,
                    "path": name,
                    "score": round(float(ranking.scores[q, rank]), 6),
                    "right": bool(ranking.right[q, rank]),
                    "accepted": bool(believed[q, rank]),
                }
            )
            for known, values in (("metres", ranking.metres), ("turn", ranking.turn)):
                if values is not None and math.isfinite(values[q, rank]):
                    hits[-1][known] = round(float(values[q, rank]), 6)
        records.append({"query": id, **about, "accepted": bool(believed[q, 0]), "hits": hits, "timing_ms": timing})
        files.write_json(step.folder / "queries" / f"{flat_name(id)}.json", records[-1])
    searched = {"backend": index["backend"], "dimension": index["dimension"], "index_build_ms": index["build_ms"]}
    files.write_json(step.folder / "results.json", {**about, **searched, "queries": records})
    files.write_array(step.folder / "ids.npy", np.array([*gallery.ids, ""], str)[ranking.rows])
    files.write_array(step.folder / "scores.npy", ranking.scores)
    columns = ("query", "rank", "id", "score", "right", "accepted", "metres", "turn")
    table = (
        {"query": record["query"], **hit, "right": int(hit["right"]), "accepted": int(hit["accepted"])}
        for record in records
        for hit in record["hits"]
    )
    files.write_bytes(step.folder / "hits.csv", files.csv_bytes(columns, table))


def index_metrics(
    step: Step,
    query: Stored,
    gallery: Stored,
    ranking: Ranking,
    rows: Sequence[QueryRow],
    threshold: Threshold,
    index: IndexFigures,
    checked: tuple[int, int],
) -> SearchFigures:
    """The figures of 03_index: those of `metrics.retrieval_metrics`, `tune_index`, `check_index` and `index_stages`,
    chance, the threshold and, where positions are known, metres. Counted apart: photographs that never became queries,
    for they could not be embedded."""
    unit, lost = f"{step.parameters['truth']['cluster']}s", len(query.skipped) - len(query.missed)
    check_planned(step.folder / "queries.jsonl", len(rows) + lost, len(query) + len(query.skipped))
    return {
        **retrieval_metrics(rows, step.parameters["k"], unit),
        "gallery": len(gallery),
        "dimension": gallery.vectors.shape[1],
        "index": dict(index),
        "twins": checked[0],
        "not_found": checked[1],
        "queries_skipped": lost,
        "chance": chance(ranking.answers, ranking.candidates),
        "threshold": threshold.record(),
        "stages": index_stages(step),
        "positions": None if ranking.metres is None else position_figures(ranking.metres),
    }


def search(
    step: Step,
    index: Searcher,
    query: Stored,
    gallery: Stored,
    resources: ComputeOptions = ComputeOptions(),
) -> Ranking:
    """Search all queries, without the item itself and, if asked, without its siblings, and say what is right.

    The index goes deep enough to know, too, what each query would find if its right answers were not there. What each
    option of `RankingOptions` adds to those before is measured on the same queries (`index_stages`).

    Writes ranking.npz and stages.json; for whiten also whitening.npy, whitened.npy and index_whitened/, for rerank
    tokens/, for rotations a step a turn beside that of the queries.

    Args:
        step: of `start_index`.
        index: of `build_index`.
        query, gallery: the two sides.
        resources: as of `embed`, for queries that are rotated.

    Raises:
        ImatchError: truth by position, and no positions or headings are known.
        StepError: of `embed_poses`.
    """
    with files.alone(step.folder):
        return read_ranking(step) if step.finished else _search(step, index, query, gallery, resources)


def _search(step: Step, index: Searcher, query: Stored, gallery: Stored, resources: ComputeOptions) -> Ranking:
    asked, judged, lost = step.parameters["ranking"], step.parameters["truth"], query.missed
    k, about = step.parameters["k"], [*query.rows, *lost]
    shows = [*query.shows, *(row.get("source_sha256", row["sha256"]) for row in lost)]
    own = left_out(query, gallery, shows, judged["kind"], judged["exclude_siblings"])
    here, there, doubted = places_of(query, gallery, _labels(step))
    truth = truth_of(step.parameters, shows, gallery.shows, here, there, own, doubted)
    kin = np.zeros(len(shows), np.int64) if own is None else count_equal(*own)
    wanted = max(int(truth.count.max()) + max(1, asked["expand"]), asked["rerank"])
    depth = max(k, min(wanted, len(gallery)))
    turn = partial(embed_poses, resources=resources, on_change=step.on_change)
    ways = Ways(step.folder, step.parameters, index, query, gallery, depth, depth + int(kin.max()), own, turn)
    stages, numbers = ways.stages(), query.vectors.shape[1]
    vectors = numbers * (asked["expand"] + asked["rotations"])
    block = max(1, HELD // max(ways.deep * asked["rotations"], vectors))
    parts, without = [], []
    for first in compute.progress(range(0, len(query), block), "search"):
        part = slice(first, min(first + block, len(query)))
        found, alone = search_by(stages, part, truth, k)
        parts.append(found)
        without.append(alone)
    nothing = np.full((len(lost), k), -np.inf, np.float32)
    last = joined([*parts, Found(np.full(nothing.shape, -1), nothing, np.full(nothing.shape, np.nan))])
    metres = here.metres(there, last.rows) if here and there and here.system == there.system else None
    ranking = {
        "rows": last.rows,
        "scores": last.scores,
        "right": truth.right(last.rows),
        "answers": truth.count,
        "candidates": len(gallery) - kin,
        "without": np.concatenate([*without, nothing[:, 0]]),
        "metres": metres,
        "turn": last.turn if asked["rotations"] > 1 else None,
    }
    with files.atomic(step.folder / "ranking.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **{name: values for name, values in ranking.items() if values is not None})
    names, of = [row["id"] for row in about], _clusters(query, judged["cluster"], about)
    files.write_json(step.folder / "stages.json", _added(stages, truth.count, names, of, f"{judged['cluster']}s"))
    return Ranking(**ranking)


def _labels(step: Step) -> Path | None:
    return step.linked("labels") if "labels" in step.links else None


def _clusters(query: Stored, cluster: str, about: Sequence[PhotoRow]) -> list[str]:
    """What the queries are counted by: those of one photograph, or capture, stand or fall together."""
    if cluster == "photograph":
        return [row.get("source_sha256", row["sha256"]) for row in about]
    sources = query.sources.decodable
    found = (sources.get(row.get("source", row["id"])) for row in about)
    captures = [source.get("capture") if source else None for source in found]
    if None in captures:
        raise ImatchError(
            f"truth.cluster is capture, but {about[captures.index(None)]['id']} belongs to none: name the captures in "
            "data_key.json and run 01_embed anew, or set truth.cluster to photograph"
        )
    return [str(capture) for capture in captures]


def index_stages(step: Step) -> list[StageRow]:
    """What each option of the search added: rows as `tables.stage_table` takes them, the plain search first."""
    return list(files.read_json(step.folder / "stages.json"))


def _added(
    stages: Sequence[Stage], answers: np.ndarray, names: Sequence[str], of: Sequence[str], unit: str
) -> list[StageRow]:
    """Rows of stages.json. Only queries that have an answer count; those that were not embedded are missed."""
    counted = np.flatnonzero(answers)
    clusters = {names[q]: of[q] for q in counted}
    rows: list[StageRow] = []
    before: dict[str, float] = {}
    for stage in stages:
        found = np.concatenate(stage.right)
        right = np.pad(found, ((0, len(answers) - len(found)), (0, 0)))[counted]
        hit, precision = hit_at_k(right, 1), average_precision(right, answers[counted])
        now = dict(zip(clusters, hit.tolist(), strict=True))
        said = [intervals.interval(values, [*clusters.values()], unit=unit).record() for values in (hit, precision)]
        rows.append(
            {
                "stage": stage.name,
                "hit_at_1": said[0],
                "map": said[1],
                "ms": round(1000 * stage.seconds / max(1, len(found)), 4),
                "difference": intervals.paired_difference(now, before, clusters, unit=unit).record() if rows else None,
            }
        )
        before = now
    return rows


def audit_index(
    step: Step, query: Stored, gallery: Stored, metrics: SearchFigures, *, spot_check: int = 2
) -> list[str]:
    """Look for silent faults of a 03_index step.

    Args:
        step: a 03_index step.
        query, gallery: its two sides.
        metrics: of `index_metrics`.
        spot_check: how many photographs of each side are embedded again and compared with what is stored; 0 is none.

    Returns:
        One sentence an alarm (`evaluation.alarms`, and sides that could not be checked), each also a warning.

    Raises:
        StepError: numbers that belong to other photographs or to another backbone, which make every figure void.
    """
    sides = {"queries": query} if query == gallery else {"queries": query, "gallery": gallery}
    for embeddings in sides.values():
        embeddings.check_rows()
    said = [
        f"the {name} were embedded by an earlier version that noted no digests: whose vector is whose was not checked"
        for name, embeddings in sides.items()
        if any("vector" not in row for row in embeddings.rows)
    ]
    said += [*_embedded_again(sides, spot_check), *copies_of(query, gallery)]
    said += [*alike(query, gallery, step.parameters["truth"]["kind"]), *guessing(metrics)]
    said += [*promise_broken(metrics["threshold"]), *places_of(query, gallery, _labels(step))[2]]
    for alarm in said:
        warnings.warn(alarm, ImatchWarning, stacklevel=2)
    return said


def _embedded_again(sides: Mapping[str, Stored], n: int) -> list[str]:
    """Embed n photographs of each side again: their vectors must be those of the store."""
    imported = [name for name, side in sides.items() if side.parameters.get("imported")]
    said = [f"the {name} were imported without their photographs, so none was embedded again" for name in imported]
    there = [side for name, side in sides.items() if name not in imported]
    if n < 1 or not there:
        return said if n else []
    made_by = there[0].parameters  # both sides are made alike, or 03_index would not have started
    try:
        backbone = base.create_backbone(made_by["weight"], made_by["backbone"])
    except ImatchError as error:
        return [*said, f"nothing could be embedded again to compare: {error}"]
    for side in there:
        for row in searcher.sample(len(side), n):
            said += _compared(side, row, backbone)
    return said


def _compared(embeddings: Stored, row: int, backbone: Backbone) -> list[str]:
    id = embeddings.ids[row]
    try:
        photograph = embed_one(embeddings.root / id, backbone, embeddings.parameters)
    except ImatchError as error:
        return [f"{id} could not be embedded again to compare: {error}"]
    if photograph.sha256 != embeddings.rows[row]["sha256"]:
        return [f"{id} has changed since it was embedded: run its notebook again"]
    again, stored = photograph.tokens.vector, embeddings.vectors[row]
    cosine = float(again @ stored) if again.shape == stored.shape else math.nan
    if not cosine >= SAME:
        raise StepError(
            f"{id}, embedded again, has cosine {cosine:.3f} with its vector in {embeddings.folder}: the store is "
            "another backbone's, another size's, or its rows have slipped. Delete that folder, run its notebook again"
        )
    return []


def kind_of_reference(reference: Step, data: Step) -> str:
    """The ending that the other side of an index, references or another 01_embed, gives to its folder's name, after
    checking that the two belong together."""
    if reference.name == "02_references" and reference.upstream.get("embed") != data.fingerprint:
        raise StepError(f"{reference.folder} was not made from {data.folder} as it is now: run 02_references again")
    comparable(data.parameters, reference.parameters, str(data.folder), str(reference.folder))
    if reference.name == "02_references":
        return f"_{reference.about['kind']}"
    return f"_{reference.about['dataset']}-{reference.about['configuration']}"
