"""Who is matched with whom in 04_match: the queries of a 03_index with their candidates, or pairs from a list."""

from __future__ import annotations

import csv
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from imatch.core import config, files, settings
from imatch.core.files import flat_name
from imatch.core.rows import PairRow, QueryAbout, QueryRow
from imatch.core.step import Step, open_step, side_folders, sides, step_folder
from imatch.core.types import ImatchError
from imatch.data import images
from imatch.data.embeddings import Embeddings
from imatch.data.store import Stored, read_ranking
from imatch.steps import groups
from imatch.steps.chain import open_embeddings, open_finished
from imatch.steps.index import kind_of_reference

LISTS = ("all", "ordered", "one")
"""Lists that need no file."""
COLUMNS = ("query", "candidate")


@dataclass(frozen=True)
class Candidate:
    """What a query is matched with.

    Attributes:
        row: its row in the gallery.
        score: cosine of the two global vectors.
        rank: its place among the query's candidates by that score, from 0; None for a query's own source, which was
            not among them.
        right: whether it is a right answer; None where nobody knows.
        accepted: whether 03_index believes it; None where none was asked.
    """

    row: int
    score: float
    rank: int | None
    right: bool | None
    accepted: bool | None


@dataclass(frozen=True)
class Plan:
    """What a 04_match is, for `start_step`, and the steps of its two sides."""

    query: Step
    gallery: Step
    run: Path
    about: dict[str, str]
    parameters: dict[str, Any]
    upstream: dict[str, str]
    links: dict[str, Path]


def plan_pairs(index_step: str, candidates: int, pairs: str, embed_step: str, gallery_step: str) -> Plan:
    """Check what is to be matched, before anything is written. Arguments as of `start_match`.

    Raises:
        ImatchError: a list, a file or a photograph that is not there; StepError for a step.
    """
    if not pairs:
        groups.check({"candidates": candidates})
        index = open_step(step_folder(index_step))
        upstream, links = {"index": str(index.fingerprint)}, {"index": index.folder}
        return Plan(*sides(index), index.run, index.about, {"candidates": candidates}, upstream, links)
    query = open_step(step_folder(embed_step))
    gallery = open_step(step_folder(gallery_step)) if gallery_step else query
    kind = "" if gallery.folder == query.folder else kind_of_reference(gallery, query)
    pairs, _, one = pairs.partition(":") if pairs.startswith("one:") else (pairs, "", "")
    parameters: dict[str, Any] = {"pairs": pairs if pairs in LISTS else "listed"}
    upstream = {"query": str(query.fingerprint), "gallery": str(gallery.fingerprint)}
    links = {"query": query.folder, "gallery": gallery.folder}
    name = pairs
    if pairs == "one":
        _row_of(one, Stored(query.folder))
        parameters["one"] = one
        name = f"one-{flat_name(one)}"
    elif pairs not in LISTS:
        path = settings.from_workspace(check_pairs(pairs))
        read_pairs(path, Stored(query.folder), Stored(gallery.folder))  # refuses a bad file now
        upstream["pairs"], links["pairs"] = images.file_digest(path), path
        name = f"csv-{path.stem}"
    about = {**query.about, "question": f"pairs-{name}{kind}"}
    return Plan(query, gallery, query.run, about, parameters, upstream, links)


def check_pairs(pairs: str) -> str:
    """Give `pairs` back, unless it is no list that is known, nor the path of a CSV.

    >>> check_pairs("one:a.jpg")
    'one:a.jpg'
    """
    path = settings.from_workspace(pairs)
    if not (pairs in ("", *LISTS) or pairs.startswith("one:") or path.is_file()):
        raise ImatchError(f"{config.unknown('pairs', pairs, LISTS)}, or the path of a CSV; there is none at {path}")
    return pairs


def open_source(step: Step) -> Source:
    """Open what a started 04_match matches."""
    if "index" in step.links:
        return Retrieved(step.linked("index"), step.parameters["candidates"])
    file = step.linked("pairs") if "pairs" in step.links else None
    return Listed(*side_folders(step), step.parameters["pairs"], step.parameters.get("one"), file)


def read_pairs(path: Path, query: Embeddings, gallery: Embeddings) -> tuple[dict[int, list[int]], list[str]]:
    """A list of pairs: a CSV with a line of names, query and candidate, and ids of photographs below.

    Args:
        path: the file, UTF-8; other columns are left alone, a pair that is there twice counts once.
        query, gallery: what the ids of the two columns are looked up in.

    Returns:
        row of a query -> rows of its candidates; and the pairs that are left out, for 01_embed skipped one of the two.

    Raises:
        ImatchError: a column is missing, there is no pair, or an id is unknown; the message has the first few and the
            nearest known one.
    """
    rows = [query.row_of, gallery.row_of]
    skipped = [{row["id"] for row in side.skipped} for side in (query, gallery)]
    pairs: dict[int, dict[int, None]] = {}
    left_out, unknown = [], [dict[str, int](), dict[str, int]()]
    opened = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    with files.reading(path, "correct it, or write it anew"), opened as file:
        reader = csv.DictReader(file)
        if lacking := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ImatchError(f"pairs {path} has no column {lacking[0]!r}: its first line must be query,candidate")
        for line in reader:
            ids = [files.unmarked(line[name] or "") for name in COLUMNS]
            known = [id in of for id, of in zip(ids, rows, strict=True)]
            for side, id in enumerate(ids):
                if not known[side] and id not in skipped[side]:
                    unknown[side].setdefault(id, reader.line_num)
            if all(known):
                pairs.setdefault(rows[0][ids[0]], {})[rows[1][ids[1]]] = None
            else:
                left_out.append(" and ".join(ids))
    for names, side in zip(unknown, (query, gallery), strict=True):
        if names:
            first = ", ".join(f"{id!r} (line {line})" for id, line in [*names.items()][:3])
            raise ImatchError(f"pairs {path}: {len(names)} unknown ids, {first}: {_nearest(next(iter(names)), side)}")
    if not pairs:
        raise ImatchError(f"pairs {path} holds no pair: give a line query,candidate and ids below it")
    return {q: [*candidates] for q, candidates in pairs.items()}, left_out


def _row_of(id: str, embeddings: Embeddings) -> int:
    if id in embeddings.row_of:
        return embeddings.row_of[id]
    for row in embeddings.skipped:
        if row["id"] == id:
            raise ImatchError(f"one is {id!r}, which was skipped ({row['skipped']}): choose another photograph")
    raise ImatchError(f"one is {id!r}, an unknown photograph: {_nearest(id, embeddings)}")


def _nearest(id: str, embeddings: Embeddings) -> str:
    near = difflib.get_close_matches(id, embeddings.ids, n=1, cutoff=0)
    return f"ids are paths below the folder of photographs, did you mean {near[0]!r}?"


class Retrieved:
    """The queries of a 03_index and the best of what they found.

    A query is matched with its own source, too, where that was not found (`match.match_pairs`).

    Attributes:
        query, gallery: the two sides; may be the same photographs.
        unit: what a cluster of queries is, for messages.
        skipped: how many photographs of the query's side could not be decoded.
        said: what people should know before it starts, a line each.
    """

    def __init__(self, folder: Path, most: int) -> None:
        index, self._most = open_step(folder), most
        self.query, self.gallery = open_embeddings(index)
        self.unit = f"{index.parameters['truth']['cluster']}s"
        self.skipped = index.metrics["queries_skipped"]
        self.said: list[str] = []
        self._ranking = read_ranking(index)
        self._judged = files.read_rows(index.folder / "queries.jsonl")
        believed = index.metrics["threshold"]["value"]
        self._believed = math.inf if believed is None else believed
        self._same = self.query.folder == self.gallery.folder
        self._row_that_shows = {shown: row for row, shown in reversed(list(enumerate(self.gallery.shows)))}

    def count(self, q: int) -> int:
        """How many candidates query q has."""
        return int((self._ranking.rows[q, : self._most] >= 0).sum()) + (self._source(q) is not None)

    def candidates(self, q: int) -> list[Candidate]:
        """The candidates of query q, best first."""
        ranking = self._ranking
        right, believed = ranking.right[q], ranking.scores[q] >= self._believed
        found = [
            Candidate(int(row), float(score), rank, bool(right[rank]), bool(believed[rank]))
            for rank, (row, score) in enumerate(zip(ranking.rows[q], ranking.scores[q], strict=True))
            if row >= 0
        ][: self._most]
        own = self._source(q)
        if own is None:
            return found
        score = float(np.asarray(self.query.vectors[q]) @ np.asarray(self.gallery.vectors[own]))
        return [*found, Candidate(own, score, None, True, False)]

    def _source(self, q: int) -> int | None:
        """The row of the query's own source, where it is not among the candidates."""
        own = self._row_that_shows.get(self.query.shows[q])
        rows = self._ranking.rows[q, : self._most]
        found = {self.gallery.shows[row] for row in rows[rows >= 0]}
        return None if self._same or self.query.shows[q] in found else own

    def about(self, q: int) -> QueryAbout:
        """Of query q: answerable (it has a right answer that could be found), cluster, angle and crop."""
        return _about(self._judged[q])

    @cached_property
    def unmatched(self) -> list[PairRow]:
        """Rows of pairs.jsonl for queries without a hit."""
        shown, found = {*self.gallery.shows}, self._ranking.rows[:, 0] >= 0
        views = {row["id"] for row in self.query.missed if not self._same and row.get("source_sha256") in shown}
        lost = (row for row, any_hit in zip(self._judged, found, strict=True) if not any_hit)
        return [_unmatched(row, row["query"] in views) for row in lost]


class Listed:
    """Pairs from a list: "all", "ordered", "one", or a CSV. Nothing is retrieved, so nothing of that is judged: a pair
    that shows the same photograph is right, of others nobody knows. See `Retrieved`."""

    def __init__(self, query: Path, gallery: Path, kind: str, one: str | None, file: Path | None) -> None:
        self.query, self.gallery = open_finished(query), open_finished(gallery)
        self.unit, self.unmatched = "photographs", list[PairRow]()
        self._kind, self._same = kind, query == gallery
        self._one = None if one is None else _row_of(one, self.query)
        skipped = self.query.skipped
        self.skipped = sum("size" not in row for row in skipped)
        self.said = [f"{len(skipped)} photographs were skipped, {skipped[0]['id']} and others"] if skipped else []
        self._last: tuple[int, list[Candidate]] = (-1, [])
        self._listed: Mapping[int, Sequence[int]] = {}
        if file:
            self._listed, left_out = read_pairs(file, self.query, self.gallery)
            few = "; ".join(left_out[:3])
            self.said = [f"{len(left_out)} pairs are left out, for a photograph was skipped: {few}"] if left_out else []

    def count(self, q: int) -> int:
        """See `Retrieved`."""
        return len(self._rows(q))

    def _rows(self, q: int) -> Sequence[int] | np.ndarray:
        """Rows of the gallery; never a list of all pairs."""
        if self._kind == "listed":
            return self._listed.get(q, ())
        if self._kind == "one" and q != self._one:
            return ()
        if not self._same:
            return range(len(self.gallery))
        if self._kind == "all":
            return range(q + 1, len(self.gallery))
        return np.delete(np.arange(len(self.gallery)), q)

    def candidates(self, q: int) -> list[Candidate]:
        """See `Retrieved`."""
        if self._last[0] != q:  # the blocks of a query follow each other
            self._last = q, self._scored(q)
        return self._last[1]

    def _scored(self, q: int) -> list[Candidate]:
        rows = np.asarray(self._rows(q), np.int64)
        # not @, whose last digit may depend on the number of threads
        vectors = files.take(self.gallery.vectors, rows)
        scores = np.einsum("nd,d->n", vectors, np.asarray(self.query.vectors[q]))
        shown = self.query.shows[q]
        return [
            Candidate(row, float(scores[i]), rank, True if self.gallery.shows[row] == shown else None, None)
            for rank, i in enumerate(np.lexsort((rows, -scores)))
            for row in [int(rows[i])]
        ]

    def about(self, q: int) -> QueryAbout:
        """See `Retrieved`."""
        row = self.query.rows[q]
        view = self.query.views.get(row["id"], {})
        cluster = row.get("source_sha256", row["sha256"])
        return _about({"answers": 0, "cluster": cluster, "angle": view.get("angle"), "crop": view.get("crop")})


Source = Retrieved | Listed
"""Where the pairs of a 04_match come from."""


def _about(judged: QueryRow) -> QueryAbout:
    return {"answerable": judged["answers"] > 0, **{key: judged[key] for key in ("cluster", "angle", "crop")}}


def _unmatched(judged: QueryRow, has_truth: bool) -> PairRow:
    unknown = "candidate score matrix rotation scale reprojection_error true_matrix corner_error accuracy threshold"
    return {
        **dict.fromkeys([*unknown.split(), "rotation_error", "scale_error"]),
        **dict.fromkeys(["right", "verified", "accepted"], False),
        **_about(judged),
        "query": judged["query"],
        "rank": 0,
        "reranked": 0,
        "retrieved": True,
        "weight": None,
        "refined": False,
        "descriptors": [0, 0],
        "matches": 0,
        "inliers": 0,
        "reason": "nothing was found" if judged["embedded"] else "the backbone found nothing in the query",
        "has_truth": has_truth,
    }
