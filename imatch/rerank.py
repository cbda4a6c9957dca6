"""Better rankings from the same vectors: whitening, query expansion, turned queries and token-wise scores."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import linalg

from imatch import store
from imatch.pooling import normalise
from imatch.records import ImatchError

FLOOR = 1e-6
"""Axes whose variance is at most this share of the widest one's are noise, which whitening would blow up."""
BLOCK = 2**22
"""Numbers that are taken from the vectors at once: 32 MB as float64."""
ITERATIONS = 10
"""Of k-means."""


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
        with store.atomic(path) as temporary, temporary.open("wb") as file:
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
    _check("the scores of query", np.where(scores == -np.inf, 0, scores))
    weights = np.where(scores > 0, np.maximum(scores, 0) ** alpha, 0).astype(np.float32)
    with np.errstate(invalid="ignore"):  # what is not finite is named below
        expanded = queries + (weights[:, None] @ neighbours)[:, 0]
    _check("itself or a neighbour of query", expanded)
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
    _check("the scores of query", np.where(scores == -np.inf, 0, scores))

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


def aggregate(descriptors: np.ndarray, tokens: int) -> np.ndarray:
    """A photograph's local descriptors as a few tokens: the centres of a spherical k-means (FAISS, fixed seed).

    Args:
        descriptors: (n, d) float of one photograph; each is L2-normalised first, and those that are zero left out.
        tokens: K, how many to make.

    Returns:
        (K, d) float32 of L2 norm 1. With K descriptors or fewer, these themselves, then rows of zeros.

    Raises:
        ImatchError: tokens is below 1, or a descriptor is not finite.

    >>> aggregate(np.array([[3.0, 4.0], [0.0, 0.0]]), 2).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    if tokens < 1:
        raise ImatchError(f"tokens is {tokens}: ask for at least 1")
    _check("descriptor", descriptors)
    directions = normalise(descriptors.astype(np.float32))
    directions = np.ascontiguousarray(directions[directions.any(axis=1)])
    n, d = directions.shape
    if n <= tokens:
        return np.pad(directions, ((0, tokens - n), (0, 0)))
    import faiss  # an extra that only this function needs

    # without the last two, FAISS warns of few points and leaves out some of many
    few = {"min_points_per_centroid": 1, "max_points_per_centroid": n}
    means = faiss.Kmeans(d, tokens, niter=ITERATIONS, spherical=True, seed=0, **few)
    means.train(directions)
    return normalise(means.centroids)


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
    _check("the query or candidate", cosine)
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
        _check("vector", block, rows[first : first + step])
        yield block


def _check(what: str, values: np.ndarray, names: np.ndarray | None = None) -> None:
    """Refuse NaN and infinity, which would spread; the message names the first of `values`, or its name, with one."""
    wrong = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1)) if values.size else ()
    if len(wrong):
        name = wrong[0] if names is None else names[wrong[0]]
        raise ImatchError(f"{what} {name} is not finite (NaN or infinity): embed the photographs again")
