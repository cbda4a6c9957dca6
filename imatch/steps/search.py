"""03_index: the search itself, what may make it better, and which hits are right."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np

from imatch import evaluate, intervals, poses, positions, rerank, runs, searcher, store
from imatch.engines import Engine
from imatch.engines.local import LOCAL
from imatch.poses import Pose
from imatch.positions import Places
from imatch.records import Hits, ImatchError, ImatchWarning, Ranking, StepError, Truth
from imatch.rerank import Whitening
from imatch.runs import Step
from imatch.searcher import Searcher
from imatch.steps.poses import Posed, embed_poses
from imatch.steps.shared import clusters, missed, photographs_root, source_rows, views_by_id
from imatch.store import Embeddings, Row

BLOCK = 2**24
"""Hits, or numbers of vectors, that are held at once."""
PART = 1000
"""Photographs of which aggregated tokens share a file."""
Own = tuple[np.ndarray, np.ndarray] | None
"""(Q,) and (N,) whole numbers, equal where a row is no answer for a query; None leaves nothing out."""


def search(
    step: Step,
    index: Searcher,
    query: Embeddings,
    gallery: Embeddings,
    *,
    engine: Engine = LOCAL,
    devices: str = "auto",
    workers: int = -1,
    batch_size: int = 8,
) -> Ranking:
    """Search all queries, without the item itself and, if asked, without its siblings, and say what is right.

    The index goes deep enough to know, too, what each query would find if its right answers were not there. What was
    asked for to rank better (whiten, rotations, expand, rerank) is added one after the other, each on top of all
    before, and what each adds is measured on the same queries (`search_stages`).

    Writes ranking.npz and stages.json; for whiten also whitening.npz, whitened.npy and index_whitened/, for rerank
    tokens/, for rotations a step a turn beside that of the queries.

    Args:
        step: of `start_index`.
        index: of `build_index`.
        query, gallery: the two sides.
        devices, workers, batch_size: of `embed`, for queries that are turned.

    Raises:
        ImatchError: truth by position, and no positions or headings are known.
        StepError: of `embed_poses`.
    """
    if step.finished:
        return read_ranking(step)
    asked, lost = step.parameters, missed(query)
    k, about = asked["k"], [*query.rows, *lost]
    shows = [*query.shows, *(row.get("source_sha256", row["sha256"]) for row in lost)]
    own = _left_out(step, query, gallery, shows)
    here, there = _places(step, about, gallery.rows)
    truth = _truth(step, shows, gallery.shows, here, there, own)
    kin = np.zeros(len(shows), np.int64) if own is None else _count(*own)
    depth = max(k, int(truth.count.max()) + max(1, asked["expand"]), asked["rerank"])
    depth = max(k, min(depth, len(gallery)))
    turn = partial(
        embed_poses,
        engine=engine,
        devices=devices,
        workers=workers,
        batch_size=batch_size,
        on_change=step.on_change,
    )
    ways = _Ways(step, index, query, gallery, depth, own, min(len(gallery), depth + int(kin.max())), turn)
    stages, numbers = ways.stages(), query.vectors.shape[1]
    block = max(1, BLOCK // max(ways.deep * asked["rotations"], numbers * (asked["expand"] + asked["rotations"])))
    parts, without = [], []
    for first in runs.progress(range(0, len(query), block), "search"):
        part = slice(first, min(first + block, len(query)))
        found, alone = _found(stages, part, truth)
        parts.append(found.cut(k))
        without.append(alone)
    last = _joined(parts, len(lost), k)
    metres = here.metres(there, last.rows) if here and there and here.system == there.system else None
    ranking = {
        "rows": last.rows,
        "scores": last.scores,
        "right": truth.right(last.rows),
        "answers": truth.count,
        "candidates": len(gallery) - kin,
        "without": np.concatenate([*without, np.full(len(lost), -np.inf, np.float32)]),
        "metres": metres,
        "turn": last.turn if asked["rotations"] > 1 else None,
    }
    with store.atomic(step.folder / "ranking.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **{name: values for name, values in ranking.items() if values is not None})
    names = [row["id"] for row in about]
    store.write_json(step.folder / "stages.json", _added(stages, truth.count, names, clusters(step, about), asked))
    return Ranking(**ranking)


def search_stages(step: Step) -> list[Row]:
    """What each option of the search added: rows as `evaluate.stage_table` takes them, the plain search first."""
    return list(store.read_json(step.folder / "stages.json"))


NOTHING = (-1, -np.inf, np.nan)
"""Row, score and turn where there is no hit."""


@dataclass(frozen=True)
class _Found:
    """Hits of some queries without what is left out, best first.

    Attributes:
        rows: (q, depth) rows of the gallery, -1 at the end where there are no more.
        scores: (q, depth) float32, -inf there.
        turn: (q, depth) degrees that the query was turned by, NaN there.
    """

    rows: np.ndarray
    scores: np.ndarray
    turn: np.ndarray

    def cut(self, k: int) -> _Found:
        """The first k."""
        return _Found(*(np.ascontiguousarray(values[:, :k]) for values in (self.rows, self.scores, self.turn)))

    def but(self, gone: np.ndarray) -> _Found:
        """Without some of them, (q, depth) bool; the others move up."""
        order = np.argsort(gone, axis=1, kind="stable")
        return _Found(
            *(
                np.take_along_axis(np.where(gone, empty, values), order, 1)
                for values, empty in zip((self.rows, self.scores, self.turn), NOTHING, strict=True)
            )
        )

    def filled(self, depth: int) -> _Found:
        """With nothing behind them, up to a depth."""
        pad = ((0, 0), (0, depth - self.rows.shape[1]))
        return _Found(
            *(
                np.pad(values, pad, constant_values=empty)
                for values, empty in zip((self.rows, self.scores, self.turn), NOTHING, strict=True)
            )
        )


@dataclass
class _Stage:
    """One way to search, what of it was right, and how long it took. Some ask anew by what was found before."""

    name: str
    way: Callable[[slice, _Found | None], _Found]
    k: int
    asks_anew: bool = False
    seconds: float = 0.0
    right: list[np.ndarray] = field(default_factory=list)

    def __call__(self, part: slice, before: _Found | None, truth: Truth) -> _Found:
        started = time.perf_counter()
        found = self.way(part, before)
        self.seconds += time.perf_counter() - started
        self.right.append(truth.right(found.rows[:, : self.k], part))
        return found


@dataclass(frozen=True)
class _Space:
    """Where vectors are compared: as they are, or whitened."""

    index: Searcher
    whitening: Whitening | None = None

    def of(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of queries in this space; those of zeros, which are absent, stay zero."""
        if self.whitening is None:
            return vectors
        return self.whitening(vectors) * vectors.any(axis=1, keepdims=True)

    def search(self, vectors: np.ndarray, depth: int) -> Hits:
        hits = self.index.search(vectors, depth)
        absent = ~vectors.any(axis=1)
        hits.rows[absent], hits.scores[absent] = -1, -np.inf
        return hits


class _Ways:
    """The ways to search that a step asks for, each on top of the one before.

    Args:
        step, index, query, gallery: of `search`.
        depth: hits that are kept a query.
        own: what is left out.
        deep: hits that are asked for a query, so that `depth` are left.
        turn: embeds the queries of a folder in poses.
    """

    def __init__(
        self,
        step: Step,
        index: Searcher,
        query: Embeddings,
        gallery: Embeddings,
        depth: int,
        own: Own,
        deep: int,
        turn: Callable[[Path, Sequence[Pose]], Posed],
    ) -> None:
        self.step, self.asked, self.query, self.gallery = step, step.parameters, query, gallery
        self.depth, self.own, self.deep, self.turn = depth, own, deep, turn
        self.space = self.plain_space = _Space(index)

    def stages(self) -> list[_Stage]:
        """The plain search, then one stage an option."""
        asked, k = self.asked, self.asked["k"]
        found = [_Stage("plain", self.plain, k)]
        if asked["whiten"]:
            self.space = self._whitened_space()
            found.append(_Stage(f"whitened to {asked['whiten']}", self.whitened, k))
        if asked["rotations"] > 1:
            turning = sum(runs.read(one.folder).work.get("seconds", 0.0) for one in self.posed.posed.values())
            found.append(_Stage(f"{asked['rotations']} rotations", self.turned, k, turning))
        if asked["expand"]:
            found.append(_Stage(f"expanded by {asked['expand']}", self.expanded, k, asks_anew=True))
        if asked["rerank"]:
            self._aggregate()
            found.append(_Stage(f"{asked['rerank']} by {asked['tokens']} tokens", self.by_tokens, k))
        return found

    @cached_property
    def posed(self) -> Posed:
        return self.turn(self.query.folder, poses.poses(self.asked["rotations"]))

    def plain(self, part: slice, _: _Found | None) -> _Found:
        return self._kept(part, self.plain_space.search(self.query.vectors[part], self.deep))

    def whitened(self, part: slice, _: _Found | None) -> _Found:
        return self._kept(part, self.space.search(self.space.of(self.query.vectors[part]), self.deep))

    def turned(self, part: slice, _: _Found | None) -> _Found:
        """Each candidate by the best of the query's turns."""
        hits = [self.space.search(self.space.of(vectors), self.deep) for _, vectors in self.posed.vectors(part)]
        rows, scores, which = rerank.best_turn(
            np.stack([one.rows for one in hits]), np.stack([one.scores for one in hits]), self.deep
        )
        degrees = np.array([*(pose.turn for pose in [poses.UPRIGHT, *self.posed.posed]), np.nan])
        return self._kept(part, Hits(rows, scores), degrees[which])

    def expanded(self, part: slice, before: _Found | None) -> _Found:
        """The query and its first neighbours together; turned, as it found the first of them."""
        assert before is not None
        queries, degrees = self._as_turned(part, before)
        near = slice(0, self.asked["expand"])
        rows = before.rows[:, near]
        neighbours = store.take(self.space.index.vectors, np.maximum(rows, 0).ravel()).reshape(*rows.shape, -1)
        hits = self.space.search(rerank.expand(queries, neighbours, before.scores[:, near]), self.deep)
        return self._kept(part, hits, np.broadcast_to(degrees[:, None], hits.rows.shape))

    def by_tokens(self, part: slice, before: _Found | None) -> _Found:
        """The first hits in the order of how alike their aggregated tokens are."""
        assert before is not None
        m, count = min(self.asked["rerank"], before.rows.shape[1]), self.asked["tokens"]
        better = np.full((len(before.rows), m), -np.inf)
        _, degrees = self._as_turned(part, before)
        for i, row in enumerate(range(*part.indices(len(self.query)))):
            there = before.rows[i, :m] >= 0
            if not there.any():
                continue
            own = rerank.aggregate(self._local(row, degrees[i]), count)
            better[i, there] = rerank.token_score(own, self._tokens(before.rows[i, :m][there]))
        rows, scores, order = rerank.reorder(before.rows, before.scores, better)
        return _Found(rows, scores, np.take_along_axis(before.turn, order, 1))

    def _as_turned(self, part: slice, before: _Found) -> tuple[np.ndarray, np.ndarray]:
        """(q, D) vectors of the queries as they found their first hit, and (q,) the degrees they were turned by."""
        degrees = np.nan_to_num(before.turn[:, 0])
        if self.asked["rotations"] == 1:
            return self.space.of(self.query.vectors[part]), degrees
        queries = np.zeros_like(self.space.of(self.query.vectors[part]))
        for pose, vectors in self.posed.vectors(part):
            queries[degrees == pose.turn] = self.space.of(vectors)[degrees == pose.turn]
        return queries, degrees

    def _local(self, row: int, degrees: float) -> np.ndarray:
        if self.asked["rotations"] == 1:
            return self.query.tokens(row).descriptors
        return next(tokens for pose, tokens in self.posed.tokens(row) if pose.turn == degrees).descriptors

    def _kept(self, part: slice, hits: Hits, turn: np.ndarray | None = None) -> _Found:
        """The first `depth` hits that are not left out."""
        degrees = np.zeros(hits.rows.shape) if turn is None else turn
        gone = hits.rows < 0
        if self.own:
            gone |= self.own[0][part][:, None] == np.append(self.own[1], -1)[hits.rows]
        found = _Found(hits.rows, hits.scores.astype(np.float32), degrees)
        return found.but(gone).cut(self.depth).filled(self.depth)

    def _whitened_space(self) -> _Space:
        """The gallery whitened, by what it has in common itself, and an index of that."""
        folder, asked, n = self.step.folder, self.asked, len(self.gallery)
        if (folder / "whitening.npz").is_file():
            whitening = Whitening.load(folder / "whitening.npz")
        else:
            whitening = Whitening.fit(self.gallery.vectors, asked["whiten"])
            whitening.save(folder / "whitening.npz")
        if not (folder / "whitened.npy").is_file():
            with store.atomic(folder / "whitened.npy") as temporary, temporary.open("wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (n, asked["whiten"])}
                np.lib.format.write_array_header_1_0(file, header)
                size = max(1, searcher.BLOCK // self.gallery.vectors.shape[1])
                for first in range(0, n, size):
                    block = store.take(self.gallery.vectors, slice(first, first + size))
                    file.write(np.ascontiguousarray(whitening(block), "<f4").data.cast("B"))
        vectors = np.load(folder / "whitened.npy", mmap_mode="r")
        keys, given = searcher.digests(vectors), (asked["index"], asked["index_options"])
        memory = round(asked["memory_gb"] * 2**30)
        searcher.build(folder / "index_whitened", vectors, keys, kind=given[0], options=given[1], memory=memory)
        device = self.plain_space.index.device
        index = Searcher(folder / "index_whitened", vectors, keys, device=device, float16=asked["float16"])
        queries = whitening(store.take(self.query.vectors, searcher.sample(len(self.query))))
        tuned = index.tune(index.curve(queries, asked["k"]), asked["recall"])
        if tuned is not None and tuned.recall < asked["recall"]:
            said = f"the index of whitened vectors has recall {tuned.recall:.3f}, below {asked['recall']:g}"
            warnings.warn(said, ImatchWarning, stacklevel=2)
        return _Space(index, whitening)

    def _tokens(self, rows: np.ndarray) -> np.ndarray:
        """(m, K, d) float32, aggregated tokens of some photographs of the gallery."""
        parts = [_mapped(self._part(row // PART))[row % PART] for row in rows.tolist()]
        return np.stack(parts).astype(np.float32)

    def _part(self, i: int) -> Path:
        return self.step.folder / "tokens" / f"{i:05d}.npy"

    def _aggregate(self) -> None:
        """Write the gallery's aggregated tokens, `PART` photographs a file, where they are missing."""
        n, count = len(self.gallery), self.asked["tokens"]
        todo = [i for i in range(-(-n // PART)) if not self._part(i).is_file()]
        for i in runs.progress(todo, "aggregate tokens"):
            part = range(i * PART, min(n, (i + 1) * PART))
            made = [rerank.aggregate(self.gallery.tokens(row).descriptors, count) for row in part]
            store.write_array(self._part(i), np.stack(made).astype(np.float16))


@lru_cache(store.MAPS)
def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _found(stages: Sequence[_Stage], part: slice, truth: Truth) -> tuple[_Found, np.ndarray]:
    """What some queries find, and (q,) float32 the score of the first hit when their right answers are not there."""
    found, anew = None, None
    for i, stage in enumerate(stages):
        if stage.asks_anew:
            anew = i, found
        found = stage(part, found, truth)
    assert found is not None
    alone = found
    if anew and anew[1] is not None:  # a query must not be expanded by answers that are not there
        alone = anew[1].but(truth.right(anew[1].rows, part))
        for stage in stages[anew[0] :]:
            alone = stage.way(part, alone)
    return found, _first_wrong(alone, truth.right(alone.rows, part))


def _joined(parts: Sequence[_Found], lost: int, k: int) -> _Found:
    """All queries in order, then those that were not embedded, which find nothing."""
    nothing = _Found(np.zeros((lost, 0), int), np.zeros((lost, 0), np.float32), np.zeros((lost, 0))).filled(k)
    names = ("rows", "scores", "turn")
    return _Found(*(np.concatenate([getattr(part, name) for part in [*parts, nothing]]) for name in names))


def _first_wrong(found: _Found, right: np.ndarray) -> np.ndarray:
    """(Q,) float32, the score of the first hit that is not right; -inf without one."""
    wrong = (found.rows >= 0) & ~right
    first = np.take_along_axis(found.scores, wrong.argmax(axis=1)[:, None], 1)[:, 0]
    return np.where(wrong.any(axis=1), first, -np.inf).astype(np.float32)


def _added(
    stages: Sequence[_Stage], answers: np.ndarray, names: Sequence[str], of: Sequence[str], asked: Row
) -> list[Row]:
    """Rows of stages.json. Only queries that have an answer count; those that were not embedded are missed."""
    counted = np.flatnonzero(answers)
    within, unit = [of[q] for q in counted], f"{asked['cluster']}s"
    rows: list[Row] = []
    before: dict[str, float] = {}
    for stage in stages:
        right = np.zeros((len(answers), asked["k"]), bool)
        found = np.concatenate(stage.right) if stage.right else right[:0]
        right[: len(found), : found.shape[1]] = found
        hit = evaluate.hit_at_k(right[counted], 1)
        precision = evaluate.average_precision(right[counted], answers[counted])
        now = {names[q]: value for q, value in zip(counted, hit.tolist(), strict=True)}
        clustered = {names[q]: of[q] for q in counted}
        rows.append(
            {
                "stage": stage.name,
                "hit_at_1": intervals.interval(hit, within, unit=unit).record(),
                "map": intervals.interval(precision, within, unit=unit).record(),
                "ms": round(1000 * stage.seconds / max(1, len(found)), 4),
                "difference": intervals.paired_difference(now, before, clustered, unit=unit).record() if rows else None,
            }
        )
        before = now
    return rows


def read_ranking(step: Step) -> Ranking:
    """What `search` found.

    Raises:
        StepError: there is no ranking, as in a step of an earlier version.
    """
    if not (step.folder / "ranking.npz").is_file():
        raise StepError(f"no ranking in {step.folder}: run 03_index again and set on_change to recompute")
    with np.load(step.folder / "ranking.npz") as saved:
        return Ranking(**{name: saved.get(name) for name in Ranking.__dataclass_fields__})


def _left_out(step: Step, query: Embeddings, gallery: Embeddings, shows: Sequence[str]) -> Own:
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
    own: Own,
) -> Truth:
    parameters = step.parameters
    if parameters["truth"] == "photograph":
        return evaluate.same_photograph(query_shows, gallery_shows, *(own or ()))
    if here is None or there is None:
        raise ImatchError(
            f"truth is {parameters['truth']}, but no photograph of the {'gallery' if here else 'queries'} has a "
            "position in its EXIF: give them in a CSV or JSON, and set labels to its path"
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
