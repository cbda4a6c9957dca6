"""Any index that FAISS can spell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import faiss

from imatch.records import ImatchError


@dataclass(frozen=True)
class Factory:
    """An index by its factory string (FAISS' wiki, "The index factory").

    Attributes:
        key: such as "IVF256,SQ8".
        search: what is set before searching, such as "nprobe=16".
        refine: so many times k candidates are compared by their vectors in the store; 0 believes the index.
        seen: how many vectors it learns from at most.

    >>> Factory("SQ8").empty(10, 4).d
    4
    """

    key: str = "Flat"
    search: str = ""
    refine: int = 8
    seen: int = 100_000
    exact: ClassVar[bool] = False
    effort: ClassVar[str] = ""
    gpu: ClassVar[bool] = False

    @property
    def in_order(self) -> bool:
        """See `Kind`: graphs do."""
        return any(graph in self.key for graph in ("HNSW", "NSG", "NNDescent"))

    def efforts(self, _: int) -> list[int]:
        """See `Kind`."""
        return []

    def learns_from(self, n: int) -> int:
        """See `Kind`."""
        return min(n, self.seen)

    def empty(self, _: int, d: int) -> faiss.Index:
        """See `Kind`."""
        try:
            index = faiss.index_factory(d, self.key, faiss.METRIC_INNER_PRODUCT)
            if self.search:
                faiss.ParameterSpace().set_index_parameters(index, self.search)
        except RuntimeError as error:
            said = str(error).strip().splitlines()[-1]
            raise ImatchError(f"FAISS makes no index of {self.key!r} with {self.search!r}: {said}") from error
        return index

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: the code of a vector and 8 bytes for its number; graphs and tables come on top."""
        index = self.empty(n, d)
        code = index.storage.sa_code_size() if hasattr(index, "hnsw") else index.sa_code_size()
        return n * (int(code) + 8)
