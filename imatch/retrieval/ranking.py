"""Better rankings from the same vectors: whitening, query expansion, turned queries and token-wise scores."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from scipy import linalg

from imatch.core import compute, config, files
from imatch.core.rows import Parameters
from imatch.core.types import ImatchError, ImatchWarning, Truth, check_finite, normalise
from imatch.data import rotations, store
from imatch.data.embeddings import Embeddings
from imatch.data.rotations import Pose
from imatch.data.store import Posed
from imatch.retrieval import index as searcher
from imatch.retrieval.index import IndexOptions, Searcher
from imatch.retrieval.truth import Own

ALPHA = 3.0
"""Of query expansion: the larger it is, the more do the nearest neighbours count."""
FITTED = 2**27
"""Numbers of the gallery that a whitening is fitted on at most: 1 GB."""
FLOOR = 1e-6
"""Axes whose variance is at most this share of the widest one's are noise, which whitening would blow up."""
HELD = 2**24
"""Hits, or numbers of vectors, that are held at once."""
PART = 1000
"""Photographs of which aggregated tokens share a file."""


@dataclass(frozen=True)
class RankingOptions:
    """What makes a ranking better, each on top of the one before, and measured, for it may hurt.

    Attributes:
        whiten: dimensions of a PCA-whitening learned from the gallery (`Whitening`); 0 is none.
        rotations: 4 or 8: each query is also searched rotated, and a candidate counts by its best rotation; 1 is none.
        expand: neighbours that expand a query before it is searched again (`expand`); 0 is none.
        rerank: first hits that are put in the order of their aggregated tokens (`token_score`); 0 is none.
        tokens: aggregated tokens a photograph, for that.

    Raises:
        ImatchError: a number out of its range.
    """

    whiten: NonNegativeInt = 0
    rotations: int = 1
    expand: NonNegativeInt = 0
    rerank: NonNegativeInt = 0
    tokens: PositiveInt = 32

    def __post_init__(self) -> None:
        config.check(self, "ranking")
        rotations.poses(self.rotations)


@dataclass(frozen=True)
class Whitening:
    """PCA-whitening, (x - mean) @ matrix and then L2-normalised: what all the gallery has in common stops counting.

    Source: Jegou and Chum, "Negative evidences and co-occurrences in image retrieval: the benefit of PCA and
    whitening", ECCV 2012.

    Attributes:
        mean: (D,) float32, of the gallery.
        matrix: (D, D') float32, the widest axes first, each divided by the gallery's standard deviation along it.

    >>> gallery = np.random.default_rng(0).normal(size=(500, 3)) * [9, 3, 1] + 5
    >>> whitening = Whitening.fit(gallery, 2)
    >>> ((gallery - whitening.mean) @ whitening.matrix).std(axis=0, ddof=1).round(3).tolist()
    [1.0, 1.0]
    """

    mean: np.ndarray
    matrix: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray, dimension: int) -> Whitening:
        """Learn it from the gallery alone: no query and no truth is looked at.

        The sign of each axis makes its largest number positive: the same vectors give the same bytes with the same
        number of threads. Axes narrower than `FLOOR`, as there are when many vectors are equal, get a column of zeros:
        a query would otherwise be ranked by what the gallery lacks.

        Args:
            vectors: (N, D) float of the gallery; of more than `FITTED` numbers as many evenly spaced rows.
            dimension: D', at most D and below the number of vectors.

        Raises:
            ImatchError: dimension is out of range, a vector is not finite, or all vectors are equal.
        """
        rows = searcher.sample(len(vectors), FITTED // vectors.shape[1])
        n, d = len(rows), vectors.shape[1]
        most = max(0, min(d, n - 1))
        if not 1 <= dimension <= most:
            raise ImatchError(
                f"whitening to {dimension} dimensions: {n} vectors of {d} numbers give at most {most} axes: "
                "ask for no more, or leave it out"
            )
        seen = vectors[rows].astype(np.float64)
        check_finite("vector", seen, rows)
        mean = seen.mean(axis=0)
        seen -= mean
        scatter = seen @ seen.T if n <= d else seen.T @ seen
        values, axes = linalg.eigh(scatter, subset_by_index=(len(scatter) - dimension, len(scatter) - 1))
        values, axes = values[::-1], axes[:, ::-1]
        if not values[0] > n * (mean @ mean) * np.finfo(np.float32).eps ** 2:
            raise ImatchError(f"the {n} vectors to fit whitening on are all equal: leave it out, nothing can be ranked")
        if n <= d:
            axes = seen.T @ axes
        axes = normalise(axes.T).T * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(dimension)])
        floor = FLOOR * values[0]
        scale = np.where(values > floor, np.sqrt((n - 1) / np.maximum(values, floor)), 0)
        return cls(mean.astype(np.float32), np.ascontiguousarray(axes * scale, np.float32))

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Whiten (N, D) float vectors of the gallery or queries: (N, D') float32 of L2 norm 1; zero where nothing is
        left of a vector, and where it was zero."""
        # float64, so that equal vectors stay equal wherever they lie
        whitened = normalise((vectors.astype(np.float64) - self.mean) @ self.matrix.astype(np.float64))
        return (whitened * vectors.any(axis=1, keepdims=True)).astype(np.float32)


def expand(queries: np.ndarray, neighbours: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Alpha query expansion: a query plus its neighbours, each weighted by max(score, 0) ** `ALPHA`.

    It helps where the first neighbours are right, and leads further astray where they are not.
    Source: Radenovic, Tolias and Chum, "Fine-tuning CNN image retrieval with no human annotation", TPAMI 2019.

    Args:
        queries: (Q, D) float, L2-normalised.
        neighbours: (Q, n, D) float, L2-normalised, the n nearest of each in the gallery.
        scores: (Q, n) float, their cosines; one of 0 or less weighs nothing, such as the -inf of no neighbour.

    Returns:
        (Q, D) float32 of L2 norm 1; zero where nothing is left.

    >>> expand(np.array([[1.0, 0.0]]), np.array([[[0.0, 1.0], [0.0, -1.0]]]), np.array([[1.0, -np.inf]])).round(3)
    array([[0.707, 0.707]], dtype=float32)
    """
    weights = (np.maximum(scores, 0) ** ALPHA).astype(np.float32)
    return normalise(queries + (weights[:, None] @ neighbours)[:, 0]).astype(np.float32)


def token_score(query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """How alike two sets of tokens are: each token's best cosine on the other side, averaged over both sides.

    The mean over the query's tokens is the late interaction of ColBERT (Khattab and Zaharia, SIGIR 2020), also known as
    Chamfer similarity; the other direction counts, too, lest a candidate be the better for all else that it shows.

    Args:
        query: (K, d) float32, L2-normalised; rows of zeros are no tokens.
        candidates: (m, L, d) float32, likewise.

    Returns:
        (m,) float32 in [-1, 1]; 0 where either side has no token.

    >>> token_score(np.eye(2, dtype=np.float32), np.array([[[1, 0], [0, 1]], [[1, 0], [0, 0]]], np.float32)).tolist()
    [1.0, 0.75]
    """
    query, real = query[query.any(axis=1)], candidates.any(axis=2)
    if not len(query):
        return np.zeros(len(candidates), np.float32)
    cosine = candidates @ query.T
    there = cosine.max(axis=1, where=real[..., None], initial=-np.inf).mean(axis=1)
    back = cosine.max(axis=2).sum(axis=1) / np.maximum(real.sum(axis=1), 1)  # a row of zeros adds 0
    return np.where(real.any(axis=1), (there + back) / 2, 0).astype(np.float32)


@dataclass(frozen=True)
class Found:
    """Hits of some queries, best first.

    Attributes:
        rows: (q, n) rows of the gallery, -1 at the end where there are no more.
        scores: (q, n) float32, -inf there.
        turn: (q, n) degrees that the query was turned by, NaN there.
    """

    rows: np.ndarray
    scores: np.ndarray
    turn: np.ndarray

    def taken(self, order: np.ndarray) -> Found:
        """Those at some places, (q, m) int or the same for all queries, (1, m)."""
        return Found(*(np.take_along_axis(values, order, 1) for values in (self.rows, self.scores, self.turn)))

    def without(self, gone: np.ndarray, most: int | None = None) -> Found:
        """Without some of them, (q, n) bool; the others move up, and of these the first `most` are kept."""
        order = np.argsort(gone, axis=1, kind="stable")[:, :most]
        rows, scores = np.where(gone, -1, self.rows), np.where(gone, -np.inf, self.scores)
        turn = np.where(gone, np.nan, self.turn)
        return Found(rows, scores, turn).taken(order)


def best_turn(turned: Sequence[Found]) -> Found:
    """One list of hits from those of queries searched at several rotations: each candidate by its best rotation, the
    first of them at a tie; best score first, ties by the smaller row.

    >>> upright = Found(np.array([[7, 4]]), np.array([[0.9, 0.2]]), np.zeros((1, 2)))
    >>> found = best_turn([upright, Found(np.array([[4, -1]]), np.array([[0.5, -np.inf]]), np.full((1, 2), 90.0))])
    >>> found.rows.tolist(), found.turn.tolist()
    ([[7, 4, -1, -1]], [[0.0, 90.0, nan, nan]])
    """
    found = joined(turned, axis=1)
    found = found.taken(np.lexsort([found.turn, -found.scores, found.rows], axis=1))
    again = np.diff(found.rows, axis=1, prepend=-1) == 0  # the best comes first
    found = found.without(again | (found.rows < 0))
    return found.taken(np.lexsort([found.rows, -found.scores], axis=1))


def joined(parts: Sequence[Found], axis: int = 0) -> Found:
    """Hits of all queries, or all hits of the same queries (axis 1)."""
    return Found(*(np.concatenate([getattr(part, name) for part in parts], axis) for name in vars(parts[0])))


@dataclass
class Stage:
    """One way to search, what of it was right, and how long it took. Some ask again by what was found before."""

    name: str
    way: Callable[[slice, Found], Found]
    asks_again: bool = False
    seconds: float = 0.0
    right: list[np.ndarray] = field(default_factory=list)


@dataclass
class Ways:
    """The ways to search that a step asks for, each on top of the one before.

    Attributes:
        folder, parameters: of a 03_index; what the ways learn is kept there.
        index: of the gallery; once there is one, that of the whitened gallery.
        query, gallery: the two sides.
        depth: hits that are kept a query.
        deep: hits that are needed a query, so that `depth` are left.
        own: what is left out.
        turn: embeds the queries in poses.
    """

    folder: Path
    parameters: Parameters
    index: Searcher
    query: Embeddings
    gallery: Embeddings
    depth: int
    deep: int
    own: Own
    turn: Callable[[Embeddings, Sequence[Pose]], Posed]

    def __post_init__(self) -> None:
        self.asked = self.parameters["ranking"]
        self.whiten: Whitening | None = None

    def stages(self) -> list[Stage]:
        """The plain search, then one stage an option."""
        asked, upright = self.asked, self.index
        found = [Stage("plain", lambda part, _: self._found(part, upright, self.query.vectors[part]))]
        if asked["whiten"]:
            self._whiten_gallery()
            found.append(Stage(f"whitened to {asked['whiten']}", self.whitened))
        if asked["rotations"] > 1:
            turning = sum(one.work.get("seconds", 0.0) for one in self.posed.posed.values())
            found.append(Stage(f"{asked['rotations']} rotations", self.turned, seconds=turning))
        if asked["expand"]:
            found.append(Stage(f"expanded by {asked['expand']}", self.expanded, asks_again=True))
        if asked["rerank"]:
            self._aggregate()
            found.append(Stage(f"{asked['rerank']} by {asked['tokens']} tokens", self.by_tokens))
        return found

    @cached_property
    def posed(self) -> Posed:
        """The queries in all poses."""
        return self.turn(self.query, rotations.poses(self.asked["rotations"]))

    def whitened(self, part: slice, _: Found) -> Found:
        """The vectors whitened."""
        return self._found(part, self.index, self._whitened(self.query.vectors[part]))

    def turned(self, part: slice, _: Found) -> Found:
        """Each candidate by the best of the query's turns."""
        found = [
            self._found(part, self.index, self._whitened(vectors), pose.turn)
            for pose, vectors in self.posed.vectors(part)
        ]
        return best_turn(found).taken(np.arange(self.depth)[None])

    def expanded(self, part: slice, before: Found) -> Found:
        """The query and its first neighbours together; turned, as it found the first of them."""
        queries, degrees = self._as_turned(part, before)
        rows, scores = (values[:, : self.asked["expand"]] for values in (before.rows, before.scores))
        neighbours = files.take(self.index.vectors, np.maximum(rows, 0).ravel()).reshape(*rows.shape, -1)
        return self._found(part, self.index, expand(queries, neighbours, scores), degrees[:, None])

    def by_tokens(self, part: slice, before: Found) -> Found:
        """The first hits in the order of how alike their aggregated tokens are; the others behind them."""
        m = min(self.asked["rerank"], self.depth)
        better = np.full((len(before.rows), m), -np.inf)
        _, degrees = self._as_turned(part, before)
        for i, row in enumerate(range(*part.indices(len(self.query)))):
            rows = before.rows[i, :m][before.rows[i, :m] >= 0]
            if len(rows):
                shown = next(tokens for pose, tokens in self.posed.tokens(row) if pose.turn == degrees[i])
                own = store.aggregate(shown.descriptors, self.asked["tokens"])
                better[i, : len(rows)] = token_score(own, self._tokens(rows))
        behind = np.tile(np.arange(m, self.depth), (len(better), 1))
        return before.taken(np.hstack([np.argsort(-better, axis=1, kind="stable"), behind]))

    def _as_turned(self, part: slice, before: Found) -> tuple[np.ndarray, np.ndarray]:
        """(q, D) vectors of the queries as they found their first hit, and (q,) the degrees of their turns."""
        degrees = np.nan_to_num(before.turn[:, 0])
        queries = np.zeros((len(degrees), self.query.vectors.shape[1]), np.float32)
        for pose, vectors in self.posed.vectors(part):
            queries[degrees == pose.turn] = vectors[degrees == pose.turn]
        return self._whitened(queries), degrees

    def _whitened(self, vectors: np.ndarray) -> np.ndarray:
        return self.whiten(vectors) if self.whiten else vectors

    def _found(self, part: slice, index: Searcher, vectors: np.ndarray, turn: float | np.ndarray = 0.0) -> Found:
        """The first `depth` hits that are not left out; vectors of zeros, which are absent, have none."""
        hits = index.search(vectors, self.deep)
        gone = (hits.rows < 0) | ~vectors.any(axis=1, keepdims=True)
        if self.own:
            gone |= self.own[0][part][:, None] == np.append(self.own[1], -1)[hits.rows]
        return Found(hits.rows, hits.scores, np.broadcast_to(turn, gone.shape)).without(gone, self.depth)

    def _whiten_gallery(self) -> None:
        """Whiten the gallery, by what it has in common itself, and index that."""
        asked, gallery = self.parameters["index"], self.gallery.vectors
        learnt, path = self.folder / "whitening.npy", self.folder / "whitened.npy"
        if not learnt.is_file():
            made = Whitening.fit(gallery, self.asked["whiten"])
            files.write_array(learnt, np.vstack([made.mean, made.matrix.T]))
        mean, *axes = files.read_array(learnt)
        self.whiten = Whitening(mean, np.stack(axes, axis=1))
        if not path.is_file():
            with files.atomic(path) as temporary, temporary.open("wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(gallery), len(axes))}
                np.lib.format.write_array_header_1_0(file, header)
                for block in searcher.blocks(gallery):
                    file.write(self.whiten(block).astype("<f4").data.cast("B"))
        vectors = files.read_array(path)
        options = IndexOptions(**asked, device=self.index.device)
        self.index = searcher.build(self.folder / "index_whitened", vectors, searcher.digest(vectors), options)
        queries = self.whiten(files.take(self.query.vectors, searcher.sample(len(self.query))))
        tuned = self.index.tune(self.index.curve(queries, self.parameters["k"]), asked["recall"])
        if tuned is not None and tuned.recall < asked["recall"]:
            said = f"the index of whitened vectors has recall {tuned.recall:.3f}, below {asked['recall']:g}"
            warnings.warn(said, ImatchWarning, stacklevel=2)

    def _tokens(self, rows: np.ndarray) -> np.ndarray:
        """(m, K, d) float32, aggregated tokens of some photographs of the gallery."""
        parts = [_mapped(self._part(row // PART))[row % PART] for row in rows.tolist()]
        return np.stack(parts).astype(np.float32)

    def _part(self, i: int) -> Path:
        return self.folder / "tokens" / f"{i:05d}.npy"

    def _aggregate(self) -> None:
        """Write the gallery's aggregated tokens, `PART` photographs a file, where they are missing."""
        n, count = len(self.gallery), self.asked["tokens"]
        todo = [i for i in range(-(-n // PART)) if not self._part(i).is_file()]
        for i in compute.progress(todo, "aggregate tokens"):
            part = range(i * PART, min(n, (i + 1) * PART))
            made = [store.aggregate(self.gallery.tokens(row).descriptors, count) for row in part]
            files.write_array(self._part(i), np.stack(made).astype(np.float16))


@lru_cache(store.MAPS)
def _mapped(path: Path) -> np.ndarray:
    return files.read_array(path)


def search_by(stages: Sequence[Stage], part: slice, truth: Truth, k: int) -> tuple[Found, np.ndarray]:
    """The first k hits of some queries, and (q,) float32 the score of the first one without their right answers."""
    found, again = None, None
    for i, stage in enumerate(stages):
        if stage.asks_again:
            again = i, found
        started = time.perf_counter()
        found = stage.way(part, found)
        stage.seconds += time.perf_counter() - started
        stage.right.append(truth.right(found.rows[:, :k], part))
    alone = found
    if again:  # a query must not be expanded by answers that are not there
        alone = again[1].without(truth.right(again[1].rows, part))
        for stage in stages[again[0] :]:
            alone = stage.way(part, alone)
    left = alone.without(truth.right(alone.rows, part), 1)
    return found.taken(np.arange(k)[None]), left.scores[:, 0].astype(np.float32)
