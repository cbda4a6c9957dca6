"""Kinds of FAISS index. A kind is one class in one file and one line here; `imatch.searcher` builds and searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from imatch import plugins

INDEXES = {
    "flat": "imatch.indexes.flat:Flat",
    "ivf_flat": "imatch.indexes.ivf_flat:IvfFlat",
    "hnsw": "imatch.indexes.hnsw:Hnsw",
    "ivf_pq": "imatch.indexes.ivf_pq:IvfPq",
    "ivf_rabitq": "imatch.indexes.ivf_rabitq:IvfRabitq",
    "factory": "imatch.indexes.factory:Factory",
}


class Kind(Protocol):
    """What imatch asks of a kind of index. Vectors are L2-normalised, so that the inner product is the cosine."""

    @property
    def exact(self) -> bool:
        """Whether its answers are those of an exact search."""

    @property
    def effort(self) -> str:
        """What is raised for more recall and more time: "nprobe", "efSearch", or "" where there is no such thing."""

    @property
    def gpu(self) -> bool:
        """Whether FAISS has it on GPUs."""

    @property
    def in_order(self) -> bool:
        """Whether it depends on the order in which vectors are added, so that one thread must build it."""

    @property
    def refine(self) -> int:
        """How many times k candidates are compared by their vectors in the store; 0 believes the index' own scores."""

    def efforts(self, n: int) -> Sequence[int]:
        """The efforts worth trying when it was laid out for n vectors, rising; none where `effort` is ""."""

    def learns_from(self, n: int) -> int:
        """How many of n vectors it is trained on; 0 when it learns nothing."""

    def empty(self, n: int, d: int) -> Any:
        """An index without vectors, a `faiss.Index` of inner products, laid out for n vectors of d numbers.

        Raises:
            ImatchError: options that do not fit n or d.
        """

    def memory(self, n: int, d: int) -> int:
        """Bytes that n vectors of d numbers will take."""


def create(kind: str, options: Mapping[str, Any] | None = None) -> Kind:
    """Make a kind of index.

    Raises:
        ImatchError: unknown kind or option, with the nearest known one.

    >>> create("flat").memory(1000, 384)
    1536000
    """
    made: Kind = plugins.create(INDEXES, "index", kind, options)
    return made


def lists(n: int, wanted: int) -> int:
    """How many inverted lists n vectors are put into: `wanted`, or for 0 about 4 sqrt(n), a power of two that leaves 39
    vectors a list to learn from (FAISS' guidelines to choose an index).

    >>> lists(1_000_000, 0), lists(1000, 0), lists(10, 0)
    (4096, 16, 1)
    """
    if wanted:
        return wanted
    most = max(1, n // 39)
    return int(min(2 ** round((16 * max(n, 1)).bit_length() / 2), 2 ** (most.bit_length() - 1)))


def probes(count: int) -> list[int]:
    """Efforts to try with so many inverted lists: doubling, up to all of them.

    >>> probes(12)
    [1, 2, 4, 8, 12]
    """
    return sorted({count, *(2**i for i in range(count.bit_length()))})
