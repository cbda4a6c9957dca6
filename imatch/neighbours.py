"""Nearest neighbours between the local descriptors of two photographs, by tiles and to the bit.

A matcher is a few lines on top of this: `sides` prepares the two photographs, `nearest` finds the best of each
descriptor (`tiles` and `largest` of any other score), `mutual` keeps those that chose each other, and
`correspondences` makes the answer of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imatch.records import ImatchError, Matches, Tokens

TILE = 2**21
"""How many similarities are in memory at once: 16 MB in float64, and a few copies of them."""
FEW = 4
"""So many candidates a descriptor are compared one by one; of more, all are compared at once."""
PART = 2**15
"""So many numbers a side are compared exactly at once: they stay in the processor's cache, and torch takes them on one
thread (up to its grain size of 32,768), as waking another costs more than the work."""
GRAIN = 2.0**-26
"""Directions are rounded to multiples of this."""


@dataclass(frozen=True)
class Side:
    """The descriptors of a photograph that take part in matching.

    Attributes:
        rows: (n,) int64, which rows of the Tokens they are, rising.
        directions: (n, d) float64 on the device, of norm 1 and made of multiples of `GRAIN`.
        xy: (n, 2) float32, their positions in pixels.
    """

    rows: np.ndarray
    directions: Tensor
    xy: np.ndarray


class Nearest(NamedTuple):
    """The k best partners of each of n rows, best first; of equally good ones the one with the smaller index.

    Attributes:
        score: (n, k) float32.
        index: (n, k) int64.
    """

    score: Tensor
    index: Tensor


def sides(a: Tokens, b: Tokens, device: str, min_norm: float = 0.0) -> tuple[Side, Side]:
    """Both photographs, ready to be compared. Descriptors of norm 0 point nowhere and are left out.

    Args:
        a, b: their tokens.
        device: where to compute, a name that torch knows.
        min_norm: the share of its photograph's largest norm, 0 to 1, below which a descriptor is left out.

    Raises:
        ImatchError: the two sides' descriptors are not of one kind.

    >>> xy = np.zeros((3, 2), np.float32)
    >>> tokens = Tokens(np.ones(1), np.array([[3.0, 4], [0, 0], [0.5, 0]]), xy)
    >>> [side.rows.tolist() for side in (*sides(tokens, tokens, "cpu"), *sides(tokens, tokens, "cpu", 0.2))]
    [[0, 2], [0, 2], [0], [0]]
    """
    if a.descriptors.shape[1] != b.descriptors.shape[1]:
        raise ImatchError(
            f"descriptors of {a.descriptors.shape[1]} and {b.descriptors.shape[1]} numbers cannot be compared: "
            "embed both sides with the same backbone"
        )
    return _side(a, device, min_norm), _side(b, device, min_norm)


def _side(tokens: Tokens, device: str, min_norm: float) -> Side:
    descriptors = tokens.descriptors.astype(np.float64)
    norms = np.linalg.norm(descriptors, axis=1)
    rows = np.flatnonzero((norms > 0) & (norms >= min_norm * norms.max(initial=0)))
    # on the CPU always, so that every device compares the same numbers
    directions = np.round(descriptors[rows] / (norms[rows, None] * GRAIN)) * GRAIN
    return Side(rows, torch.from_numpy(directions).to(device), tokens.xy[rows])


def tiles(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """The cosines of A's and B's directions, some rows of A at a time: `TILE` numbers, or one row.

    They are the same to the bit in every tiling, on every device and with every number of threads: products of two
    multiples of 2^-26 are multiples of 2^-52, all sums of them that occur are below 2, and float64 holds such
    numbers exactly, so that no order of summation can round. Only the end is rounded, once, to float32. What the
    rounding of the directions costs, some 1e-8 in the cosine, is less than a product of float32 loses.

    Args:
        a, b: (n_a, d) and (n_b, d) float64, `Side.directions`.

    Yields:
        (t, n_b) float32, in the memory of the one before; one of (0, n_b) when A is empty.

    >>> a = torch.eye(3, dtype=torch.float64)
    >>> next(tiles(a, a.flip(0))).tolist()
    [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    """
    n = min(max(1, len(a)), max(1, TILE // max(1, len(b))))
    product = a.new_empty(n, len(b))  # used again and again: the C library's memory would come to lie in pieces
    cosines = product.new_empty(n, len(b), dtype=torch.float32)
    for rows in a.split(n):
        yield cosines[: len(rows)].copy_(torch.mm(rows, b.T, out=product[: len(rows)]))


def nearest(a: Tensor, b: Tensor, k: int) -> tuple[Nearest, Nearest]:
    """The k nearest of B for each direction of A, and the k nearest of A for each of B, from one pass.

    They are those of the exact cosines of `tiles`. For k = 1, products in float32, which are much faster, say which few
    pairs can be nearest at all, and only these are compared exactly.

    Args:
        a, b: (n_a, d) and (n_b, d) float64, `Side.directions`.
        k: how many; where there are fewer, all.

    Returns:
        for A's rows (n_a, min(k, n_b)), and for B's rows (n_b, min(k, n_a)).

    >>> a = torch.eye(2, dtype=torch.float64)
    >>> of_a, of_b = nearest(a, a.flip(0), 1)
    >>> of_a.index.tolist(), of_b.index.tolist()
    ([[1], [0]], [[1], [0]])
    """
    if k > 1:
        return largest(tiles(a, b), k)
    n = min(max(1, len(a)), max(1, TILE // max(1, len(b))))
    rough_b = b.float()
    product = rough_b.new_empty(n, len(b))  # these are used again and again, as in tiles
    likely = product.new_empty(2, n, len(b), dtype=torch.bool)

    def found() -> Iterator[tuple[Nearest, Nearest]]:
        for rows in a.split(n):
            rough = torch.mm(rows.float(), rough_b.T, out=product[: len(rows)])
            yield _nearest(rows, b, rough, likely[:, : len(rows)])

    return _joined(found(), k)


def largest(scores: Iterable[Tensor], k: int) -> tuple[Nearest, Nearest]:
    """The k largest scores of each row, and of each column, from one pass.

    Args:
        scores: (t, n_b) float tiles that follow each other downwards, at least one; they are overwritten.
        k: how many; where there are fewer, all.

    Returns:
        for A's rows (n_a, min(k, n_b)), and for B's columns (n_b, min(k, n_a)).

    >>> of_rows, of_columns = largest([torch.tensor([[0.1, 0.9], [0.3, 0.9]])], 1)
    >>> of_rows.index.tolist(), of_columns.index.tolist()
    ([[1], [1]], [[1], [0]])
    """

    def found() -> Iterator[tuple[Nearest, Nearest]]:
        for tile in scores:
            across = _largest(tile.T.clone(memory_format=torch.contiguous_format), k)  # rows are read faster
            yield _largest(tile, k), across

    return _joined(found(), k)


def _joined(tiles: Iterable[tuple[Nearest, Nearest]], k: int) -> tuple[Nearest, Nearest]:
    """The answers for tiles that follow each other downwards as one."""
    of_rows: list[Nearest] = []
    of_columns, first = None, 0
    for rows, below in tiles:
        below.index.add_(first)
        if of_columns is not None:  # those of earlier tiles stand first, so that the smaller index wins
            both = Nearest(*(torch.cat(pair, dim=1) for pair in zip(of_columns, below, strict=True)))
            best = _largest(both.score, k)
            below = Nearest(best.score, both.index.gather(1, best.index))
        of_columns, first = below, first + len(rows.index)
        of_rows.append(rows)
    assert of_columns is not None, "there is always a tile, if an empty one"
    return Nearest(*map(torch.cat, zip(*of_rows, strict=True))), of_columns


def _nearest(a: Tensor, b: Tensor, rough: Tensor, likely: Tensor) -> tuple[Nearest, Nearest]:
    """The exactly nearest of B (m, d) for each of A (n, d), and of A for each of B, from rough cosines (n, m) float32;
    likely (2, n, m) bool is overwritten."""
    n, m, d = *rough.shape, a.shape[1]
    if not n or not m:
        return largest([rough], 1)
    # a product of float32 is off by (d + 2) 2^-24 at most, since norms are 1; twice that, and the rounding of the end
    slack = (d + 2) * 2.0**-23 + 2.0**-22
    torch.ge(rough, rough.amax(dim=1, keepdim=True) - slack, out=likely[0])
    torch.ge(rough, rough.amax(dim=0) - slack, out=likely[1])
    i, j = torch.nonzero(likely[0].logical_or_(likely[1]), as_tuple=True)
    if len(i) > FEW * (n + m):  # many descriptors are equal
        return largest([(a @ b.T).float()], 1)
    part = max(1, PART // d)
    exact = [torch.linalg.vecdot(a[p], b[q]) for p, q in zip(i.split(part), j.split(part), strict=True)]
    score = torch.cat(exact).float()
    return _best(i, j, score, n), _best(j, i, score, m)


def _best(of: Tensor, other: Tensor, score: Tensor, n: int) -> Nearest:
    """The best pair of each of n rows: `of` names the row of each pair, each at least once, `other` its partner."""
    order = torch.argsort(other, stable=True)
    order = order[torch.argsort(score[order], descending=True, stable=True)]
    order = order[torch.argsort(of[order], stable=True)]  # by row, best first; of equal ones the smaller index
    first = order[torch.searchsorted(of[order], torch.arange(n, device=of.device))]
    return Nearest(score[first, None], other[first, None])


def _largest(scores: Tensor, k: int) -> Nearest:
    """The k largest of each row of (n, m), which is overwritten; of equal ones the first."""
    n, m = scores.shape
    found = Nearest(scores.new_empty(n, min(k, m)), torch.empty(n, min(k, m), dtype=torch.int64, device=scores.device))
    for place in range(min(k, m)):  # max promises the first of equals, torch.topk does not
        score, index = scores.max(dim=1, keepdim=True)
        found.score[:, place], found.index[:, place] = score[:, 0], index[:, 0]
        scores.scatter_(1, index, -torch.inf)
    return found


def mutual(of_a: Nearest, of_b: Nearest) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs in which each is among the other's nearest.

    Args:
        of_a: for n_a rows, indices below n_b.
        of_b: for n_b rows, indices below n_a.

    Returns:
        (m,) int64 rows of A, (m,) int64 rows of B and (m,) float32 scores, by the rows of A.

    >>> a, b = torch.tensor([[0.9, 0.8], [0.7, 0.6]]), torch.tensor([[0.9, 0.7]])
    >>> of_a, of_b = Nearest(a, torch.tensor([[0, 1], [0, 1]])), Nearest(a.T, torch.tensor([[0, 1], [0, 1]]))
    >>> [found.tolist() for found in mutual(of_a, of_b)[:2]]
    [[0, 0, 1, 1], [0, 1, 0, 1]]
    """
    i = torch.arange(len(of_a.index), device=of_a.index.device)[:, None].expand_as(of_a.index)
    chosen = (of_b.index[of_a.index] == i[..., None]).any(dim=2)
    return i[chosen], of_a.index[chosen], of_a.score[chosen]


def correspondences(
    a: Side, b: Side, index_a: Tensor, index_b: Tensor, similarity: Tensor, max_matches: int, one_to_one: bool = True
) -> Matches:
    """The answer of a matcher from the pairs that it found: strongest first, equally strong ones by the rows of A.

    Args:
        a, b: the two sides.
        index_a, index_b: (m,) int64, their rows.
        similarity: (m,) float32, cosine.
        max_matches: how many of the strongest are kept; 0 keeps all.
        one_to_one: keep a pair only if neither of its two is in a stronger pair that was kept.

    >>> tokens = Tokens(np.ones(1), np.eye(3), np.zeros((3, 2), np.float32))
    >>> pairs, similarity = torch.tensor([[0, 0, 1], [2, 1, 1]]), torch.tensor([0.7, 0.9, 0.8])
    >>> found = correspondences(*sides(tokens, tokens, "cpu"), *pairs, similarity, 0)
    >>> found.index_a.tolist(), found.index_b.tolist()
    ([0], [1])
    """
    i, j, strength = (found.cpu().numpy() for found in (index_a, index_b, similarity))
    order = np.lexsort((j, i, -strength))
    if one_to_one:
        order = order[_greedy(i[order], j[order])]
    order = order[: max_matches or None]
    return Matches(a.rows[i[order]], b.rows[j[order]], strength[order])


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
