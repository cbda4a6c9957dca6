"""Inverted lists of vectors in one bit a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import faiss

from imatch import indexes


@dataclass(frozen=True)
class IvfRabitq:
    """Each number of a vector is one bit, with a correction (Gao and Long, "RaBitQ", SIGMOD 2024).

    Attributes:
        centroids: number of lists; 0 chooses by the number of vectors.
        refine: so many times k candidates are compared by their vectors in the store; 0 believes the bits.

    >>> IvfRabitq().memory(1_000_000, 128) // 1_000_000
    34
    """

    centroids: int = 0
    refine: int = 8
    exact: ClassVar[bool] = False
    effort: ClassVar[str] = "nprobe"
    gpu: ClassVar[bool] = False
    in_order: ClassVar[bool] = False

    def efforts(self, n: int) -> list[int]:
        """See `Kind`."""
        return indexes.probes(indexes.lists(n, self.centroids))

    def learns_from(self, n: int) -> int:
        """See `Kind`: 50 vectors a list."""
        return min(n, 50 * indexes.lists(n, self.centroids))

    def empty(self, n: int, d: int) -> faiss.Index:
        """See `Kind`."""
        return faiss.index_factory(d, f"IVF{indexes.lists(n, self.centroids)},RaBitQ", faiss.METRIC_INNER_PRODUCT)

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: d / 8 + 16 bytes a vector (bits, two factors, its number), and the centroids."""
        return n * (-(-d // 8) + 16) + indexes.lists(n, self.centroids) * (4 * d + 8)
