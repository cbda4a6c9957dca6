"""Inverted lists of vectors in few bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import faiss

from imatch import indexes
from imatch.records import ImatchError


@dataclass(frozen=True)
class IvfPq:
    """Each vector is m bytes, one of 256 patterns for each of its m parts (Jegou, Douze and Schmid, "Product
    quantization for nearest neighbor search", TPAMI 2011).

    Attributes:
        centroids: number of lists; 0 chooses by the number of vectors.
        parts: m, which must divide the dimension; 0 takes a part for every 4 numbers.
        refine: so many times k candidates are compared by their vectors in the store; 0 believes the bytes.

    >>> IvfPq(parts=16).memory(1_000_000, 128) // 1_000_000
    26
    """

    centroids: int = 0
    parts: int = 0
    refine: int = 8
    exact: ClassVar[bool] = False
    effort: ClassVar[str] = "nprobe"
    gpu: ClassVar[bool] = True
    in_order: ClassVar[bool] = False

    def _parts(self, d: int) -> int:
        return self.parts or next(d // size for size in (4, 3, 2, 1) if d % size == 0)

    def efforts(self, n: int) -> list[int]:
        """See `Kind`."""
        return indexes.probes(indexes.lists(n, self.centroids))

    def learns_from(self, n: int) -> int:
        """See `Kind`: 50 vectors a list, and at least 10,000 for the patterns."""
        return min(n, max(50 * indexes.lists(n, self.centroids), 10_000))

    def empty(self, n: int, d: int) -> faiss.Index:
        """See `Kind`."""
        m = self._parts(d)
        if m < 1 or d % m:
            raise ImatchError(f"ivf_pq: parts {self.parts} do not divide dimension {d}: use 0, or such as {d // 4}")
        if n < 256:
            raise ImatchError(f"ivf_pq learns 256 patterns and wants as many vectors; there are {n}: use flat")
        key = f"IVF{indexes.lists(n, self.centroids)},PQ{m}"
        index = faiss.index_factory(d, key, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.min_points_per_centroid = 1  # warns on the console otherwise
        index.do_polysemous_training = False  # 99 % of the training, for a search that nobody asks for
        return index

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: m + 8 bytes a vector, the centroids, and the patterns."""
        return n * (self._parts(d) + 8) + indexes.lists(n, self.centroids) * (4 * d + 8) + 4 * 256 * d
