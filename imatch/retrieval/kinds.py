"""Kinds of FAISS index. A kind is one class and one line in the table; `retrieval.index` builds and searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from imatch.core import config
from imatch.core.types import ImatchError

if TYPE_CHECKING:
    import faiss

INDEXES = {
    "flat": "imatch.retrieval.kinds:Flat",
    "ivf_flat": "imatch.retrieval.kinds:IvfFlat",
    "hnsw": "imatch.retrieval.kinds:Hnsw",
    "ivf_pq": "imatch.retrieval.kinds:IvfPq",
    "ivf_rabitq": "imatch.retrieval.kinds:IvfRabitq",
    "factory": "imatch.retrieval.kinds:Factory",
}


@dataclass(frozen=True)
class Kind:
    """What imatch asks of a kind of index; its options are the fields of its frozen dataclass. Vectors are
    L2-normalised, so that the inner product is the cosine.

    Attributes:
        exact: whether its answers are those of an exact search.
        effort: what is raised for more recall and more time: "nprobe", "efSearch", or "" where there is no such thing.
        gpu: whether FAISS has it on GPUs.
        in_order: whether it depends on the order in which vectors are added, so that one thread must build it.
        refine: how many times k candidates are compared by their vectors in the store; 0 believes its own scores.
    """

    exact: ClassVar[bool] = False
    effort: ClassVar[str] = ""
    gpu: ClassVar[bool] = False
    in_order: ClassVar[bool] = False
    refine: ClassVar[int] = 1

    def efforts(self, n: int) -> Sequence[int]:  # noqa: ARG002
        """List the efforts worth trying when it was laid out for n vectors, rising; none where `effort` is ""."""
        return []

    def learns_from(self, n: int) -> int:  # noqa: ARG002
        """Say how many of n vectors it is trained on; 0 when it learns nothing."""
        return 0

    def empty(self, n: int, d: int) -> faiss.Index:
        """Make an index of inner products without vectors, laid out for n vectors of d numbers.

        Raises:
            ImatchError: options that do not fit n or d.
        """
        raise NotImplementedError

    def memory(self, n: int, d: int) -> int:
        """Count the bytes that n vectors of d numbers will take."""
        raise NotImplementedError


def create_kind(kind: str, options: Mapping[str, Any] | None = None) -> Kind:
    """Make a kind of index.

    Raises:
        ImatchError: unknown kind or option, with the nearest known one.

    >>> create_kind("flat").memory(1000, 384)
    1536000
    """
    made: Kind = config.create(INDEXES, "index", kind, options)
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


@dataclass(frozen=True)
class Flat(Kind):
    """FAISS' flat index.

    >>> Flat().empty(10, 4).d
    4
    """

    exact: ClassVar[bool] = True
    gpu: ClassVar[bool] = True

    def empty(self, _: int, d: int) -> faiss.Index:
        """See `Kind`."""
        import faiss

        return faiss.IndexFlatIP(d)

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: 4 d bytes a vector."""
        return n * 4 * d


@dataclass(frozen=True)
class _Inverted(Kind):
    """Only the `nprobe` lists nearest to a query are compared (Sivic and Zisserman, "Video Google", ICCV 2003).

    Attributes:
        centroids: number of lists; 0 chooses by the number of vectors.
    """

    centroids: int = 0
    effort: ClassVar[str] = "nprobe"

    def efforts(self, n: int) -> list[int]:
        """See `Kind`."""
        return probes(lists(n, self.centroids))

    def learns_from(self, n: int) -> int:
        """See `Kind`: 50 vectors a list."""
        return min(n, 50 * lists(n, self.centroids))

    def listed(self, n: int, d: int) -> int:
        """Count the bytes of the centroids, and of each vector's number."""
        return 8 * n + lists(n, self.centroids) * (4 * d + 8)


@dataclass(frozen=True)
class IvfFlat(_Inverted):
    """Inverted lists of whole vectors.

    >>> IvfFlat(centroids=8).empty(1000, 4).nlist
    8
    """

    gpu: ClassVar[bool] = True

    def empty(self, n: int, d: int) -> faiss.Index:
        """See `Kind`."""
        import faiss

        return faiss.index_factory(d, f"IVF{lists(n, self.centroids)},Flat", faiss.METRIC_INNER_PRODUCT)

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: 4 d + 8 bytes a vector, and the centroids."""
        return 4 * n * d + self.listed(n, d)


@dataclass(frozen=True)
class Hnsw(Kind):
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
    effort: ClassVar[str] = "efSearch"
    in_order: ClassVar[bool] = True

    def efforts(self, _: int) -> list[int]:
        """See `Kind`."""
        return [2**i for i in range(4, 11)]

    def empty(self, _: int, d: int) -> faiss.Index:
        """See `Kind`."""
        import faiss

        index = faiss.IndexHNSWFlat(d, self.neighbours, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.construction
        return index

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: 4 d + 8 M bytes a vector, and 16 for its level, its place and the levels above."""
        return n * (4 * d + 8 * self.neighbours + 16)


@dataclass(frozen=True)
class IvfPq(_Inverted):
    """Each vector is m bytes, one of 256 patterns for each of its m parts (Jegou, Douze and Schmid, "Product
    quantization for nearest neighbor search", TPAMI 2011).

    Attributes:
        parts: m, which must divide the dimension; 0 takes a part for every 4 numbers.
        refine: so many times k candidates are compared by their vectors in the store; 0 believes the bytes.

    >>> IvfPq(parts=16).memory(1_000_000, 128) // 1_000_000
    26
    """

    parts: int = 0
    refine: int = 8
    gpu: ClassVar[bool] = True

    def _parts(self, d: int) -> int:
        return self.parts or next(d // size for size in (4, 3, 2, 1) if d % size == 0)

    def learns_from(self, n: int) -> int:
        """See `Kind`: 50 vectors a list, and at least 10,000 for the patterns."""
        return min(n, max(50 * lists(n, self.centroids), 10_000))

    def empty(self, n: int, d: int) -> faiss.Index:
        """See `Kind`."""
        import faiss

        m = self._parts(d)
        if m < 1 or d % m:
            raise ImatchError(f"ivf_pq: parts {self.parts} do not divide dimension {d}: use 0, or such as {d // 4}")
        if n < 256:
            raise ImatchError(f"ivf_pq learns 256 patterns and wants as many vectors; there are {n}: use flat")
        key = f"IVF{lists(n, self.centroids)},PQ{m}"
        index = faiss.index_factory(d, key, faiss.METRIC_INNER_PRODUCT)
        index.pq.cp.min_points_per_centroid = 1  # warns on the console otherwise
        index.do_polysemous_training = False  # 99 % of the training, for a search that nobody asks for
        return index

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: m + 8 bytes a vector, the centroids, and the patterns."""
        return n * self._parts(d) + self.listed(n, d) + 4 * 256 * d


@dataclass(frozen=True)
class IvfRabitq(_Inverted):
    """Each number of a vector is one bit, with a correction (Gao and Long, "RaBitQ", SIGMOD 2024).

    Attributes:
        refine: so many times k candidates are compared by their vectors in the store; 0 believes the bits.

    >>> IvfRabitq().memory(1_000_000, 128) // 1_000_000
    34
    """

    refine: int = 8

    def empty(self, n: int, d: int) -> faiss.Index:
        """See `Kind`."""
        import faiss

        return faiss.index_factory(d, f"IVF{lists(n, self.centroids)},RaBitQ", faiss.METRIC_INNER_PRODUCT)

    def memory(self, n: int, d: int) -> int:
        """See `Kind`: d / 8 + 16 bytes a vector (bits, two factors, its number), and the centroids."""
        return n * (-(-d // 8) + 8) + self.listed(n, d)


@dataclass(frozen=True)
class Factory(Kind):
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

    @property
    def in_order(self) -> bool:
        """See `Kind`: graphs do."""
        return any(graph in self.key for graph in ("HNSW", "NSG", "NNDescent"))

    def learns_from(self, n: int) -> int:
        """See `Kind`."""
        return min(n, self.seen)

    def empty(self, _: int, d: int) -> faiss.Index:
        """See `Kind`."""
        import faiss

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
