"""Better rankings from the same vectors: whitening, query expansion, turned queries and token-wise scores."""

from __future__ import annotations

import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from scipy import linalg

from imatch.core import compute, config, files
from imatch.core.rows import Parameters
from imatch.core.types import Hits, ImatchError, ImatchWarning, Truth, check_finite, normalise
from imatch.data import rotations, store
from imatch.data.embeddings import Embeddings
from imatch.data.rotations import Pose
from imatch.data.store import Posed
from imatch.retrieval import index as searcher
from imatch.retrieval.index import Searcher
from imatch.retrieval.truth import Own

FLOOR = 1e-6
"""Axes whose variance is at most this share of the widest one's are noise, which whitening would blow up."""
BLOCK = 2**22
"""Numbers that are taken from the vectors at once: 32 MB as float64."""


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
        matrix: (D, D') float32, the D' widest axes, widest first, each divided by the gallery's standard deviation
            along it; a column of zeros where the gallery does not vary (see `fit`).

    >>> gallery = np.random.default_rng(0).normal(size=(500, 3)) * [9, 3, 1] + 5
    >>> whitening = Whitening.fit(gallery, 2)
    >>> ((gallery - whitening.mean) @ whitening.matrix).std(axis=0, ddof=1).round(3).tolist()
    [1.0, 1.0]
    """

    mean: np.ndarray
    matrix: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray, dimension: int, sample: int = 100_000) -> Whitening:
        """Learn it from the gallery alone: no query and no truth is looked at.

        The principal axes come from the (D, D) scatter or, when there are fewer vectors than dimensions, from their
        (N, N) products, in float64. The sign of each axis makes its largest number positive, so that the same vectors
        give the same bytes with the same number of threads, and all but the last digits with another. Axes along which
        the variance is at most `FLOOR` of the widest one's, as there are when many vectors are equal, get a column of
        zeros: a query would otherwise be ranked by what the gallery lacks.

        Args:
            vectors: (N, D) float of the gallery; a memory map is read in blocks, only the rows of the sample.
            dimension: D', at most D and below the number of vectors.
            sample: how many vectors to fit on; of more, as many evenly spaced ones.

        Raises:
            ImatchError: dimension is out of range, a vector is not finite, or all vectors are equal.
        """
        rows = np.linspace(0, len(vectors) - 1, min(len(vectors), sample), dtype=np.int64)
        n, d = len(rows), vectors.shape[1]
        largest = min(d, n - 1)
        if largest < 1:
            raise ImatchError(f"whitening needs at least 2 vectors to fit, not {n}: leave it out")
        if not 1 <= dimension <= largest:
            raise ImatchError(
                f"whitening to {dimension} dimensions: {n} vectors of {d} numbers give at most {largest} axes. Ask for "
                f"1 to {largest}"
            )
        mean = sum((block.sum(axis=0) for block in _blocks(vectors, rows)), np.zeros(d)) / n
        if few := n <= d:
            centred = np.concatenate(list(_blocks(vectors, rows))) - mean
            scatter = centred @ centred.T
        else:
            scatter = np.zeros((d, d))
            for block in _blocks(vectors, rows):
                block -= mean
                scatter += block.T @ block
        values, axes = linalg.eigh(scatter, subset_by_index=(len(scatter) - dimension, len(scatter) - 1))
        values, axes = values[::-1], axes[:, ::-1]
        if not values[0] > n * (mean @ mean) * np.finfo(np.float32).eps ** 2:
            raise ImatchError(f"the {n} vectors to fit whitening on are all equal: leave it out, nothing can be ranked")
        if few:
            axes = centred.T @ axes
        axes = normalise(axes.T).T * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(dimension)])
        floor = FLOOR * values[0]
        scale = np.where(values > floor, np.sqrt((n - 1) / np.maximum(values, floor)), 0)
        return cls(mean.astype(np.float32), np.ascontiguousarray(axes * scale, np.float32))

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Whiten vectors of the gallery or queries, in blocks.

        Args:
            vectors: (N, D) float.

        Returns:
            (N, D') float32 of L2 norm 1; zero where nothing is left of a vector. A vector of zeros is no special case:
            it lies away from the mean like any other.

        Raises:
            ImatchError: vectors of another dimension, or one that is not finite.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise ImatchError(
                f"vectors {vectors.shape} do not fit a whitening of dimension {len(self.mean)}: embed both sides with "
                "the same backbone"
            )
        # float64, so that equal vectors stay equal wherever in a block they lie
        matrix, first = self.matrix.astype(np.float64), 0
        whitened = np.empty((len(vectors), matrix.shape[1]), np.float32)
        for block in _blocks(vectors, np.arange(len(vectors))):
            whitened[first : first + len(block)] = normalise((block - self.mean) @ matrix)
            first += len(block)
        return whitened

    def save(self, path: Path) -> None:
        """Write it as .npz, atomically."""
        with files.atomic(path) as temporary, temporary.open("wb") as file:
            np.savez(file, mean=self.mean, matrix=self.matrix)

    @classmethod
    def load(cls, path: Path) -> Whitening:
        """Read what `save` wrote.

        Raises:
            ImatchError: the file is absent or broken.
        """
        try:
            with path.open("rb") as file, np.load(file) as saved:  # np.load alone leaves a broken file open
                mean, matrix = saved["mean"], saved["matrix"]
            if mean.ndim != 1 or matrix.ndim != 2 or len(mean) != len(matrix):
                raise ValueError(f"mean {mean.shape}, matrix {matrix.shape}")
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ImatchError(
                f"{path} is not a whitening ({error}): delete its step's folder and run the notebook again"
            ) from error
        return cls(mean, matrix)


def expand(queries: np.ndarray, neighbours: np.ndarray, scores: np.ndarray, alpha: float = 3.0) -> np.ndarray:
    """Alpha query expansion: a query plus its neighbours, each weighted by max(score, 0) ** alpha.

    It helps where the first neighbours are right, and leads further astray where they are not.
    Source: Radenovic, Tolias and Chum, "Fine-tuning CNN image retrieval with no human annotation", TPAMI 2019.

    Args:
        queries: (Q, D) float, L2-normalised.
        neighbours: (Q, n, D) float, L2-normalised, the n nearest of each in the gallery.
        scores: (Q, n) float, their cosines; one of 0 or less weighs nothing, such as the -inf of no neighbour.
        alpha: 0 weighs all alike, the more the larger it is do the nearest count.

    Returns:
        (Q, D) float32 of L2 norm 1; zero where nothing is left.

    Raises:
        ImatchError: alpha is below 0, or a number is NaN or infinite.

    >>> expand(np.array([[1.0, 0.0]]), np.array([[[0.0, 1.0], [0.0, -1.0]]]), np.array([[1.0, -np.inf]])).round(3)
    array([[0.707, 0.707]], dtype=float32)
    """
    if not alpha >= 0:
        raise ImatchError(f"alpha is {alpha}: it must be 0 or more, such as 3")
    check_finite("the scores of query", np.where(scores == -np.inf, 0, scores))
    weights = np.where(scores > 0, np.maximum(scores, 0) ** alpha, 0).astype(np.float32)
    with np.errstate(invalid="ignore"):  # what is not finite is named below
        expanded = queries + (weights[:, None] @ neighbours)[:, 0]
    check_finite("itself or a neighbour of query", expanded)
    return normalise(expanded).astype(np.float32)


def best_turn(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One list of hits from those of a query searched at several rotations: each candidate by its best rotation.

    Args:
        rows: (R, Q, n) int, rows of the gallery that each rotation of each query found; -1 for none.
        scores: (R, Q, n) float, their cosines; one of -inf is no candidate either.
        k: how many candidates to keep.

    Returns:
        rows: (Q, k) int64, best score first, ties by the smaller row; -1 where there are no more.
        scores: (Q, k) float32; -inf where row is -1.
        turn: (Q, k) int64, which rotation scored it highest, the first of them at a tie; -1 where row is -1.

    Raises:
        ImatchError: k is below 1, or a score is NaN or inf.

    >>> rows, scores, turn = best_turn(np.array([[[7, 4]], [[4, -1]]]), np.array([[[0.9, 0.2]], [[0.5, -np.inf]]]), 3)
    >>> rows.tolist(), scores.tolist(), turn.tolist()
    ([[7, 4, -1]], [[0.8999999761581421, 0.5, -inf]], [[0, 1, -1]])
    """
    if k < 1:
        raise ImatchError(f"k is {k}: ask for at least 1 neighbour")
    turns, queries, n = rows.shape
    turn = np.broadcast_to(np.repeat(np.arange(turns), n), (queries, turns * n))
    rows, scores = (values.transpose(1, 0, 2).reshape(queries, turns * n) for values in (rows, scores))
    scores = np.where(rows < 0, -np.inf, scores).astype(np.float32)
    check_finite("the scores of query", np.where(scores == -np.inf, 0, scores))

    rows, scores, turn = _taken(np.lexsort([turn, -scores, rows], axis=1), rows, scores, turn)
    gone = scores == -np.inf
    gone[:, 1:] |= rows[:, 1:] == rows[:, :-1]  # the best of each row comes first
    rows, scores, turn = np.where(gone, -1, rows), np.where(gone, -np.inf, scores), np.where(gone, -1, turn)
    rows, scores, turn = _taken(np.lexsort([rows, -scores], axis=1)[:, :k], rows, scores, turn)
    pad = ((0, 0), (0, k - rows.shape[1]))
    return (
        np.pad(rows.astype(np.int64), pad, constant_values=-1),
        np.pad(scores, pad, constant_values=-np.inf),
        np.pad(turn.astype(np.int64), pad, constant_values=-1),
    )


def token_score(query: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """How alike two sets of tokens are: each token's best cosine on the other side, averaged over both sides.

    The mean over the query's tokens is the late interaction of ColBERT (Khattab and Zaharia, "ColBERT: efficient and
    effective passage search via contextualized late interaction over BERT", SIGIR 2020), also known as Chamfer
    similarity; here it is taken in both directions, and these are averaged, so that a candidate is not the better for
    all else that it shows.

    Args:
        query: (K, d) float32, L2-normalised; rows of zeros are no tokens.
        candidates: (m, L, d) float32, likewise, of each of m candidates.

    Returns:
        (m,) float32 in [-1, 1]; 0 where either side has no token.

    Raises:
        ImatchError: a number is NaN or infinite.

    >>> token_score(np.eye(2, dtype=np.float32), np.array([[[1, 0], [0, 1]], [[1, 0], [0, 0]]], np.float32)).tolist()
    [1.0, 0.75]
    """
    query, real = query[query.any(axis=1)], candidates.any(axis=2)
    m, size, d = candidates.shape
    if not len(query):
        return np.zeros(m, np.float32)
    with np.errstate(invalid="ignore"):  # what is not finite is named below
        cosine = (candidates.reshape(m * size, d) @ query.T).reshape(m, size, len(query))
    check_finite("the query or candidate", cosine)
    there = cosine.max(axis=1, where=real[..., None], initial=-np.inf).mean(axis=1)
    back = cosine.max(axis=2).sum(axis=1) / np.maximum(real.sum(axis=1), 1)  # a row of zeros adds 0
    return np.where(real.any(axis=1), (there + back) / 2, 0).astype(np.float32)


def reorder(rows: np.ndarray, scores: np.ndarray, better: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put the first hits of each query in the order of a better score; the others stay behind them as they were.

    Args:
        rows: (Q, k) int, rows of the gallery, best first; -1, at the end, where there are no more.
        scores: (Q, k) float, which order them now.
        better: (Q, m) float, of the first m hits, higher is better; not looked at where row is -1.

    Returns:
        rows, scores: (Q, k), each score still beside its row; ties of the better score keep the old order.
        order: (Q, k) int64, the old place of each.

    Raises:
        ImatchError: m is above k, or a better score is NaN.

    >>> [x.tolist() for x in reorder(np.array([[7, 4, 9]]), np.array([[0.9, 0.8, 0.7]]), np.array([[0.1, 0.6]]))]
    [[[4, 7, 9]], [[0.8, 0.9, 0.7]], [[1, 0, 2]]]
    """
    m, k = better.shape[1], rows.shape[1]
    if m > k:
        raise ImatchError(f"{m} better scores a query for {k} hits: give at most one a hit")
    gone = rows[:, :m] < 0
    if (np.isnan(better) & ~gone).any():
        raise ImatchError(f"a better score of query {np.argwhere(np.isnan(better) & ~gone)[0, 0]} is NaN")
    order = np.broadcast_to(np.arange(k), rows.shape).copy()
    order[:, :m] = np.lexsort([-better, gone], axis=1)  # stable
    return *_taken(order, rows, scores), order


def _taken(order: np.ndarray, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each of the (Q, k) arrays in an order of its own for every query."""
    return tuple(np.take_along_axis(array, order, 1) for array in arrays)


def _blocks(vectors: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of (N, D) vectors as float64, some at once."""
    step = max(1, BLOCK // vectors.shape[1])
    for first in range(0, len(rows), step):
        block = vectors[rows[first : first + step]].astype(np.float64)
        check_finite("vector", block, rows[first : first + step])
        yield block


HELD = 2**24
"""Hits, or numbers of vectors, that are held at once."""
PART = 1000
"""Photographs of which aggregated tokens share a file."""
NOTHING = (-1, -np.inf, np.nan)
"""Row, score and turn where there is no hit."""


@dataclass(frozen=True)
class Found:
    """Hits of some queries without what is left out, best first.

    Attributes:
        rows: (q, depth) rows of the gallery, -1 at the end where there are no more.
        scores: (q, depth) float32, -inf there.
        turn: (q, depth) degrees that the query was turned by, NaN there.
    """

    rows: np.ndarray
    scores: np.ndarray
    turn: np.ndarray

    def cut(self, k: int) -> Found:
        """The first k."""
        return Found(*(np.ascontiguousarray(values[:, :k]) for values in (self.rows, self.scores, self.turn)))

    def but(self, gone: np.ndarray) -> Found:
        """Without some of them, (q, depth) bool; the others move up."""
        order = np.argsort(gone, axis=1, kind="stable")
        return Found(
            *(
                np.take_along_axis(np.where(gone, empty, values), order, 1)
                for values, empty in zip((self.rows, self.scores, self.turn), NOTHING, strict=True)
            )
        )

    def filled(self, depth: int) -> Found:
        """With nothing behind them, up to a depth."""
        pad = ((0, 0), (0, depth - self.rows.shape[1]))
        return Found(
            *(
                np.pad(values, pad, constant_values=empty)
                for values, empty in zip((self.rows, self.scores, self.turn), NOTHING, strict=True)
            )
        )


@dataclass
class Stage:
    """One way to search, what of it was right, and how long it took. Some ask anew by what was found before."""

    name: str
    way: Callable[[slice, Found | None], Found]
    k: int
    asks_anew: bool = False
    seconds: float = 0.0
    right: list[np.ndarray] = field(default_factory=list)

    def __call__(self, part: slice, before: Found | None, truth: Truth) -> Found:
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


class Ways:
    """The ways to search that a step asks for, each on top of the one before.

    Args:
        folder: where what they learn is kept.
        asked: parameters of a 03_index.
        index, query, gallery: of `search`.
        depth: hits that are kept a query.
        own: what is left out.
        deep: hits that are needed a query, so that `depth` are left.
        turn: embeds the queries in poses.
    """

    def __init__(
        self,
        folder: Path,
        asked: Parameters,
        index: Searcher,
        query: Embeddings,
        gallery: Embeddings,
        depth: int,
        own: Own,
        deep: int,
        turn: Callable[[Embeddings, Sequence[Pose]], Posed],
    ) -> None:
        self.folder, self.asked, self.k = folder, asked["ranking"], asked["k"]
        self.index_asked, self.query, self.gallery = asked["index"], query, gallery
        self.depth, self.own, self.deep, self.turn = depth, own, deep, turn
        self.space = self.plain_space = _Space(index)

    def stages(self) -> list[Stage]:
        """The plain search, then one stage an option."""
        asked, k = self.asked, self.k
        found = [Stage("plain", self.plain, k)]
        if asked["whiten"]:
            self.space = self._whitened_space()
            found.append(Stage(f"whitened to {asked['whiten']}", self.whitened, k))
        if asked["rotations"] > 1:
            turning = sum(one.work.get("seconds", 0.0) for one in self.posed.posed.values())
            found.append(Stage(f"{asked['rotations']} rotations", self.turned, k, seconds=turning))
        if asked["expand"]:
            found.append(Stage(f"expanded by {asked['expand']}", self.expanded, k, asks_anew=True))
        if asked["rerank"]:
            self._aggregate()
            found.append(Stage(f"{asked['rerank']} by {asked['tokens']} tokens", self.by_tokens, k))
        return found

    @cached_property
    def posed(self) -> Posed:
        """The queries in all poses."""
        return self.turn(self.query, rotations.poses(self.asked["rotations"]))

    def plain(self, part: slice, _: Found | None) -> Found:
        """The vectors as they are."""
        return self._kept(part, self.plain_space.search(self.query.vectors[part], self.deep))

    def whitened(self, part: slice, _: Found | None) -> Found:
        """The vectors whitened."""
        return self._kept(part, self.space.search(self.space.of(self.query.vectors[part]), self.deep))

    def turned(self, part: slice, _: Found | None) -> Found:
        """Each candidate by the best of the query's turns."""
        hits = [self.space.search(self.space.of(vectors), self.deep) for _, vectors in self.posed.vectors(part)]
        rows, scores, which = best_turn(
            np.stack([one.rows for one in hits]), np.stack([one.scores for one in hits]), self.deep
        )
        degrees = np.array([*(pose.turn for pose in [rotations.UPRIGHT, *self.posed.posed]), np.nan])
        return self._kept(part, Hits(rows, scores), degrees[which])

    def expanded(self, part: slice, before: Found | None) -> Found:
        """The query and its first neighbours together; turned, as it found the first of them."""
        assert before is not None
        queries, degrees = self._as_turned(part, before)
        near = slice(0, self.asked["expand"])
        rows = before.rows[:, near]
        neighbours = files.take(self.space.index.vectors, np.maximum(rows, 0).ravel()).reshape(*rows.shape, -1)
        hits = self.space.search(expand(queries, neighbours, before.scores[:, near]), self.deep)
        return self._kept(part, hits, np.broadcast_to(degrees[:, None], hits.rows.shape))

    def by_tokens(self, part: slice, before: Found | None) -> Found:
        """The first hits in the order of how alike their aggregated tokens are."""
        assert before is not None
        m, count = min(self.asked["rerank"], before.rows.shape[1]), self.asked["tokens"]
        better = np.full((len(before.rows), m), -np.inf)
        _, degrees = self._as_turned(part, before)
        for i, row in enumerate(range(*part.indices(len(self.query)))):
            there = before.rows[i, :m] >= 0
            if not there.any():
                continue
            own = store.aggregate(self._local(row, degrees[i]), count)
            better[i, there] = token_score(own, self._tokens(before.rows[i, :m][there]))
        rows, scores, order = reorder(before.rows, before.scores, better)
        return Found(rows, scores, np.take_along_axis(before.turn, order, 1))

    def _as_turned(self, part: slice, before: Found) -> tuple[np.ndarray, np.ndarray]:
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

    def _kept(self, part: slice, hits: Hits, turn: np.ndarray | None = None) -> Found:
        """The first `depth` hits that are not left out."""
        degrees = np.zeros(hits.rows.shape) if turn is None else turn
        gone = hits.rows < 0
        if self.own:
            gone |= self.own[0][part][:, None] == np.append(self.own[1], -1)[hits.rows]
        found = Found(hits.rows, hits.scores.astype(np.float32), degrees)
        return found.but(gone).cut(self.depth).filled(self.depth)

    def _whitened_space(self) -> _Space:
        """The gallery whitened, by what it has in common itself, and an index of that."""
        folder, asked, n = self.folder, self.index_asked, len(self.gallery)
        if (folder / "whitening.npz").is_file():
            whitening = Whitening.load(folder / "whitening.npz")
        else:
            whitening = Whitening.fit(self.gallery.vectors, self.asked["whiten"])
            whitening.save(folder / "whitening.npz")
        if not (folder / "whitened.npy").is_file():
            with files.atomic(folder / "whitened.npy") as temporary, temporary.open("wb") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (n, self.asked["whiten"])}
                np.lib.format.write_array_header_1_0(file, header)
                size = max(1, searcher.BLOCK // self.gallery.vectors.shape[1])
                for first in range(0, n, size):
                    block = files.take(self.gallery.vectors, slice(first, first + size))
                    file.write(np.ascontiguousarray(whitening(block), "<f4").data.cast("B"))
        vectors = np.load(folder / "whitened.npy", mmap_mode="r")
        digest, given = searcher.digest(vectors), (asked["kind"], asked["options"])
        memory = round(asked["memory_gb"] * 2**30)
        searcher.build(folder / "index_whitened", vectors, digest, kind=given[0], options=given[1], memory=memory)
        device = self.plain_space.index.device
        index = searcher.open_index(folder / "index_whitened", vectors, digest, device=device, float16=asked["float16"])
        queries = whitening(files.take(self.query.vectors, searcher.sample(len(self.query))))
        tuned = index.tune(index.curve(queries, self.k), asked["recall"])
        if tuned is not None and tuned.recall < asked["recall"]:
            said = f"the index of whitened vectors has recall {tuned.recall:.3f}, below {asked['recall']:g}"
            warnings.warn(said, ImatchWarning, stacklevel=2)
        return _Space(index, whitening)

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
    return np.load(path, mmap_mode="r")


def search_by(stages: Sequence[Stage], part: slice, truth: Truth) -> tuple[Found, np.ndarray]:
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


def joined(parts: Sequence[Found], lost: int, k: int) -> Found:
    """All queries in order, then those that were not embedded, which find nothing."""
    nothing = Found(np.zeros((lost, 0), int), np.zeros((lost, 0), np.float32), np.zeros((lost, 0))).filled(k)
    names = ("rows", "scores", "turn")
    return Found(*(np.concatenate([getattr(part, name) for part in [*parts, nothing]]) for name in names))


def _first_wrong(found: Found, right: np.ndarray) -> np.ndarray:
    """(Q,) float32, the score of the first hit that is not right; -inf without one."""
    wrong = (found.rows >= 0) & ~right
    first = np.take_along_axis(found.scores, wrong.argmax(axis=1)[:, None], 1)[:, 0]
    return np.where(wrong.any(axis=1), first, -np.inf).astype(np.float32)
