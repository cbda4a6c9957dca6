"""The exact index: every vector is compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import faiss


@dataclass(frozen=True)
class Flat:
    """FAISS' flat index.

    >>> Flat().empty(10, 4).d
    4
    """

    exact: ClassVar[bool] = True
    effort: ClassVar[str] = ""
    gpu: ClassVar[bool] = True
    in_order: ClassVar[bool] = False
    refine: ClassVar[int] = 1

    def efforts(self, _: int) -> list[int]:
        """See `Kind`."""
        return []

    def learns_from(self, _: int) -> int:
        """See `Kind`."""
        return 0

    def empty(self, _: int, d: int) -> faiss.Index:
        """See `Kind`."""
        return faiss.IndexFlatIP(d)

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: 4 d bytes a vector."""
        return n * 4 * d
