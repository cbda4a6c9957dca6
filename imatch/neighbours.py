"""Nearest neighbours between the local descriptors of two photographs, by tiles of one matrix product.

A matcher is a few lines on top of this: `sides` prepares the two photographs, `products` gives their cosines, `nearest`
finds the best of each descriptor, `mutual` keeps those that chose each other, and `correspondences` makes the answer of
them. Tiles are numpy's on the CPU and torch's on a GPU; what both libraries call by the same name is used of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from imatch.records import ImatchError, Matches, Tokens

TILE, ROWS = 2**20, 256
"""How many cosines are in memory at once: 4 MB, which stay in the processor's cache; and how many rows of them are
copied at once to look along the columns."""
_BLAS, _BLAS_LOCK = ThreadpoolController().select(user_api="blas"), Lock()


@dataclass(frozen=True)
class Side:
    """The descriptors of a photograph that take part in matching.

    Attributes:
        rows: (n,) int64, which rows of the Tokens they are, rising.
        directions: (n, d) float32 of norm 1.
        xy: (n, 2) float32, their positions in pixels.
    """

    rows: np.ndarray
    directions: np.ndarray
    xy: np.ndarray


class Nearest(NamedTuple):
    """The k best partners of each of n rows, best first; of equally good ones the one with the smaller index.

    Attributes:
        score: (n, k) float32.
        index: (n, k) int64.
    """

    score: np.ndarray
    index: np.ndarray


def sides(a: Tokens, b: Tokens, min_norm: float = 0.0) -> tuple[Side, Side]:
    """Make both photographs ready to be compared. Descriptors of norm 0 point nowhere and are left out.

    Args:
        a, b: their tokens.
        min_norm: the share of its photograph's largest norm, 0 to 1, below which a descriptor is left out.

    Raises:
        ImatchError: the two sides' descriptors are not of one kind.

    >>> xy = np.zeros((3, 2), np.float32)
    >>> tokens = Tokens(np.ones(1), np.array([[3.0, 4], [0, 0], [0.5, 0]]), xy)
    >>> [side.rows.tolist() for side in (*sides(tokens, tokens), *sides(tokens, tokens, 0.2))]
    [[0, 2], [0, 2], [0], [0]]
    """
    if a.descriptors.shape[1] != b.descriptors.shape[1]:
        raise ImatchError(
            f"descriptors of {a.descriptors.shape[1]} and {b.descriptors.shape[1]} numbers cannot be compared: "
            "embed both sides with the same backbone"
        )
    return _side(a, min_norm), _side(b, min_norm)


def _side(tokens: Tokens, min_norm: float) -> Side:
    directions = tokens.descriptors.astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ij,ij->i", directions, directions))
    rows = np.flatnonzero((norms > 0) & (norms >= min_norm * norms.max(initial=0)))
    if len(rows) < len(norms):
        directions, norms = directions[rows], norms[rows]
    return Side(rows, directions / norms[:, None], tokens.xy[rows])


def on_cpu(array: Any) -> np.ndarray:
    """An array of either library as numpy's.

    >>> on_cpu(np.ones(1)).tolist()
    [1.0]
    """
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def products(a: Side, b: Side, device: str) -> Iterator[Any]:
    """The cosines of A's and B's directions, some rows of A at a time: `TILE` numbers, or one row.

    Args:
        a, b: n_a and n_b descriptors.
        device: "cpu", for numpy's arrays, or what torch knows, for torch's.

    Yields:
        (t, n_b) float32, in the memory of the one before; one of (0, n_b) when A is empty.

    >>> eye = np.eye(3, dtype=np.float32)
    >>> a, b = (Side(np.arange(3), directions, eye[:, :2]) for directions in (eye, eye[::-1]))
    >>> next(products(a, b, "cpu")).tolist()
    [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    library: Any = np
    of_a, of_b = a.directions, b.directions
    if device != "cpu":
        import torch

        library = torch
        of_a, of_b = (torch.from_numpy(directions).to(device) for directions in (of_a, of_b))
    n = max(1, min(len(of_a), TILE // max(1, len(of_b))))
    tile = library.empty((n, len(of_b)), dtype=of_a.dtype, device=of_a.device)
    for first in range(0, max(1, len(of_a)), n):
        rows = of_a[first : first + n]
        # OpenBLAS rounds differently with another number of threads, and the engines differ in that. The lock is there
        # because the limit is the whole process's
        with _BLAS_LOCK, _BLAS.limit(limits=1):
            library.matmul(rows, of_b.T, out=tile[: len(rows)])
        yield tile[: len(rows)]


def largest(scores: Any, k: int) -> Nearest:
    """The k largest of each row of (n, m) scores; of equal ones the first. With k > 1 they are overwritten.

    >>> largest(np.array([[0.1, 0.9, 0.3]]), 2).index.tolist()
    [[1, 2]]
    """
    n, k = len(scores), min(k, scores.shape[1])
    found, rows = Nearest(np.empty((n, k), np.float32), np.empty((n, k), np.int64)), np.arange(n)
    for place in range(k):
        index = found.index[:, place] = on_cpu(scores.argmax(1))
        found.score[:, place] = on_cpu(scores[rows, index])
        if place + 1 < k:
            scores[rows, index] = -np.inf
    return found


def nearest(tiles: Iterable[Any], k: int) -> tuple[Nearest, Nearest]:
    """The k largest scores of each row, and of each column, from one pass.

    Args:
        tiles: (t, n_b) float32 scores that follow each other downwards, at least one; they are overwritten.
        k: how many; where there are fewer, all.

    Returns:
        for A's rows (n_a, min(k, n_b)), and for B's columns (n_b, min(k, n_a)).

    >>> of_a, of_b = nearest([np.array([[0.1, 0.9], [0.3, 0.9]], np.float32)], 1)
    >>> of_a.index.tolist(), of_b.index.tolist()
    ([[1], [1]], [[1], [0]])
    """
    of_rows: list[Nearest] = []
    of_columns, first = Nearest(np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)), 0
    for part in (tile[n : n + ROWS] for tile in tiles for n in range(0, max(1, len(tile)), ROWS)):
        below = largest(part.T.copy() if isinstance(part, np.ndarray) else part.T.contiguous(), k)  # rows read faster
        below.index[:] += first
        if first:  # those of earlier tiles stand first, so that the smaller index wins
            both = Nearest(*(np.concatenate(pair, axis=1) for pair in zip(of_columns, below, strict=True)))
            best = largest(both.score, k)
            below = Nearest(best.score, np.take_along_axis(both.index, best.index, axis=1))
        of_columns, first = below, first + len(part)
        of_rows.append(largest(part, k))
    return Nearest(*map(np.concatenate, zip(*of_rows, strict=True))), of_columns


def mutual(of_a: Nearest, of_b: Nearest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs in which each is among the other's nearest.

    Args:
        of_a: for n_a rows, indices below n_b.
        of_b: for n_b rows, indices below n_a.

    Returns:
        (m,) int64 rows of A, (m,) int64 rows of B and (m,) float32 scores, by the rows of A.

    >>> a, b = np.array([[0.9, 0.8], [0.7, 0.6]]), np.array([[0.9, 0.7], [0.8, 0.6]])
    >>> of_a, of_b = (Nearest(score, np.array([[0, 1], [0, 1]])) for score in (a, b))
    >>> [found.tolist() for found in mutual(of_a, of_b)[:2]]
    [[0, 0, 1, 1], [0, 1, 0, 1]]
    """
    i = np.arange(len(of_a.index))[:, None]
    chosen = (of_b.index[of_a.index] == i[..., None]).any(axis=2)
    return np.nonzero(chosen)[0], of_a.index[chosen], of_a.score[chosen]


def correspondences(
    a: Side, b: Side, index_a: np.ndarray, index_b: np.ndarray, max_matches: int, one_to_one: bool = True
) -> Matches:
    """The answer of a matcher from the pairs that it found: strongest first, equally strong ones by the rows of A.

    Args:
        a, b: the two sides.
        index_a, index_b: (m,) int64, their rows.
        max_matches: how many of the strongest are kept; 0 keeps all.
        one_to_one: keep a pair only if neither of its two is in a stronger pair that was kept.

    >>> directions = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8]], np.float32)
    >>> side = Side(np.arange(3), directions, np.zeros((3, 2), np.float32))
    >>> found = correspondences(side, side, np.array([0, 0, 2]), np.array([2, 1, 1]), 0)
    >>> found.index_a.tolist(), found.index_b.tolist()
    ([2, 0], [1, 2])
    """
    similarity = _cosines(a.directions, b.directions, index_a, index_b)
    order = np.lexsort((index_b, index_a, -similarity))
    if one_to_one:
        order = order[_greedy(index_a[order], index_b[order])]
    order = order[: max_matches or None]
    return Matches(a.rows[index_a[order]], b.rows[index_b[order]], similarity[order])


def _cosines(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """(m,) float32, of pairs of rows, once more and in float64: equal pairs are equally strong, wherever they stood in
    the tiles, and 1 is 1. Their order counts, for robust estimators draw by it."""
    found = np.empty(len(i), np.float32)
    for part in (slice(first, first + ROWS) for first in range(0, len(i), ROWS)):
        x, y = a[i[part]], b[j[part]]
        xy, xx, yy = (np.einsum("ij,ij->i", *two, dtype=np.float64) for two in ((x, y), (x, x), (y, y)))
        found[part] = xy / np.sqrt(xx * yy)
    return found


def _greedy(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Which of the pairs, strongest first, are kept one after the other where neither side is taken: (m,) bool.

    A pair that is the first of both its sides is kept whatever happens to the others, so that all such go at once.
    """
    kept = np.zeros(len(i), bool)
    left = np.arange(len(i))
    while len(left):
        firsts = np.intersect1d(*(np.unique(side[left], return_index=True)[1] for side in (i, j)))
        taken = left[firsts]
        kept[taken] = True
        left = left[~(np.isin(i[left], i[taken]) | np.isin(j[left], j[taken]))]
    return kept
