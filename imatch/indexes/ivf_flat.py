"""Inverted lists of whole vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import faiss

from imatch import indexes


@dataclass(frozen=True)
class IvfFlat:
    """Only the `nprobe` lists nearest to a query are compared (Sivic and Zisserman, "Video Google", ICCV 2003).

    Attributes:
        centroids: number of lists; 0 chooses by the number of vectors.

    >>> IvfFlat(centroids=8).empty(1000, 4).nlist
    8
    """

    centroids: int = 0
    exact: ClassVar[bool] = False
    effort: ClassVar[str] = "nprobe"
    gpu: ClassVar[bool] = True
    in_order: ClassVar[bool] = False
    refine: ClassVar[int] = 1

    def efforts(self, n: int) -> list[int]:
        """See `Kind`."""
        return indexes.probes(indexes.lists(n, self.centroids))

    def learns_from(self, n: int) -> int:
        """See `Kind`: 50 vectors a list."""
        return min(n, 50 * indexes.lists(n, self.centroids))

    def empty(self, n: int, d: int) -> faiss.Index:
        """See `Kind`."""
        return faiss.index_factory(d, f"IVF{indexes.lists(n, self.centroids)},Flat", faiss.METRIC_INNER_PRODUCT)

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: 4 d + 8 bytes a vector, and the centroids."""
        return n * (4 * d + 8) + indexes.lists(n, self.centroids) * (4 * d + 8)
