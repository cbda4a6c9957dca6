"""A graph of neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import faiss


@dataclass(frozen=True)
class Hnsw:
    """A search walks from neighbour to neighbour, keeping the `efSearch` best (Malkov and Yashunin, TPAMI 2020). Fast
    and large; building it is slow, for it takes one thread, so that the same vectors give the same graph.

    Attributes:
        neighbours: M, links a vector; twice as many on the lowest level.
        construction: efConstruction, how widely neighbours are looked for when it is built.

    >>> Hnsw().memory(1000, 384) // 1000
    1808
    """

    neighbours: int = 32
    construction: int = 100
    exact: ClassVar[bool] = False
    effort: ClassVar[str] = "efSearch"
    gpu: ClassVar[bool] = False
    in_order: ClassVar[bool] = True
    refine: ClassVar[int] = 1

    def efforts(self, _: int) -> list[int]:
        """See `Kind`."""
        return [2**i for i in range(4, 11)]

    def learns_from(self, _: int) -> int:
        """See `Kind`."""
        return 0

    def empty(self, _: int, d: int) -> faiss.Index:
        """See `Kind`."""
        index = faiss.IndexHNSWFlat(d, self.neighbours, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.construction
        return index

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: 4 d + 8 M bytes a vector, and 16 for its level, its place and the levels above."""
        return n * (4 * d + 8 * self.neighbours + 16)
