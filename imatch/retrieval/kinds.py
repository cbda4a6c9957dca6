"""Kinds of FAISS index. A kind is one line in the table; `retrieval.index` builds and searches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from imatch.core import config
from imatch.core.rows import Options
from imatch.core.types import ImatchError

if TYPE_CHECKING:
    import faiss


@dataclass(frozen=True)
class Kind:
    """A kind of FAISS index of inner products: vectors are L2-normalised, so that these are cosines.

    Attributes:
        key: FAISS' factory string (its wiki, "The index factory"), in which options stand in braces.
        options: those of the fields below, and of `key`, that may be given.
        exact: whether its answers are those of an exact search.
        effort: what is raised for more recall and more time: "nprobe", "efSearch", or "".
        gpu: whether FAISS has it on GPUs.
        in_order: whether one thread must build it, for it depends on the order of vectors.
        centroids: number of inverted lists (Sivic and Zisserman, "Video Google", ICCV 2003); 0 is that of `lists`.
        parts: bytes of a vector, one of 256 patterns for each of so many parts, which must divide the dimension (Jegou,
            Douze and Schmid, TPAMI 2011); 0 takes a part for every 4 numbers.
        neighbours: M, links of a vector in a graph (Malkov and Yashunin, TPAMI 2020).
        construction: efConstruction, how widely neighbours are looked for when the graph is built.
        search: what is set before searching, such as "nprobe=16".
        refine: how many times k candidates are compared by their vectors in the store; 0 believes its own scores.
        seen: vectors that it learns from, where `centroids` do not want more.
    """

    key: str
    options: tuple[str, ...] = ()
    exact: bool = False
    effort: str = ""
    gpu: bool = False
    in_order: bool = False
    centroids: NonNegativeInt = 0
    parts: NonNegativeInt = 0
    neighbours: Annotated[int, Field(ge=2)] = 32
    construction: PositiveInt = 100
    search: str = ""
    refine: NonNegativeInt = 1
    seen: NonNegativeInt = 0

    def efforts(self, n: int) -> Sequence[int]:
        """List the efforts worth trying when it was laid out for n vectors, rising; none where `effort` is ""."""
        if self.effort == "nprobe":
            count = lists(n, self.centroids)
            return sorted({count, *(2**i for i in range(count.bit_length()))})
        return [2**i for i in range(4, 11)] if self.effort else []

    def learns_from(self, n: int) -> int:
        """Say how many of n vectors it is trained on, 50 per list; 0 when it learns nothing."""
        by_lists = 50 * lists(n, self.centroids) if "centroids" in self.options else 0
        return min(n, max(self.seen, by_lists))

    def empty(self, n: int, d: int) -> faiss.Index:
        """Make an index without vectors, laid out for n vectors of d numbers.

        Raises:
            ImatchError: options that do not fit n or d, in FAISS' words.
        """
        import faiss

        if "parts" in self.options and n < 256:
            raise ImatchError(f"it learns 256 patterns and wants as many vectors; there are {n}: use flat")
        parts = self.parts or next(d // size for size in (4, 3, 2, 1) if d % size == 0)
        known = {"centroids": lists(n, self.centroids), "parts": parts, "neighbours": self.neighbours}
        key = self.key
        for name, value in known.items():
            key = key.replace(f"{{{name}}}", str(value))
        try:
            index = faiss.index_factory(d, key, faiss.METRIC_INNER_PRODUCT)
            if self.search:
                faiss.ParameterSpace().set_index_parameters(index, self.search)
        except RuntimeError as error:
            said = str(error).strip().rpartition(": ")[2]
            extra = f" with {self.search!r}" if self.search else ""
            raise ImatchError(f"FAISS makes no index {key!r} of {d} numbers{extra}: {said}") from error
        if "construction" in self.options:
            index.hnsw.efConstruction = self.construction
        if "parts" in self.options:
            index.pq.cp.min_points_per_centroid = 1  # warns on the console otherwise
            index.do_polysemous_training = False  # 99 % of the training, for a search that nobody asks for
        return index

    def memory(self, n: int, d: int) -> int:
        """Count the bytes of n vectors of d numbers: codes, and lists, patterns or links beside them.

        Raises:
            ImatchError: as `empty`; or FAISS cannot tell.
        """
        index = self.empty(n, d)
        try:
            return self._bytes(index, n, d)
        except RuntimeError as error:
            raise ImatchError(f"FAISS cannot tell how large an index {self.key!r} will be: use another key") from error

    def _bytes(self, index: faiss.Index, n: int, d: int) -> int:
        import faiss

        if hasattr(index, "hnsw"):  # 16 for its level, its place and the levels above
            return n * (int(index.storage.sa_code_size()) + 4 * index.hnsw.nb_neighbors(0) + 16)
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is None:
            return n * int(index.sa_code_size())
        patterns = 4 * 256 * d if "parts" in self.options else 0
        code = index.sa_code_size() if isinstance(index, faiss.IndexRefine) else ivf.code_size
        return n * (int(code) + 8) + ivf.nlist * (4 * d + 8) + patterns


INDEXES = {
    "flat": Kind("Flat", exact=True, gpu=True),
    "ivf_flat": Kind("IVF{centroids},Flat", ("centroids",), effort="nprobe", gpu=True),
    "hnsw": Kind("HNSW{neighbours},Flat", ("neighbours", "construction"), effort="efSearch", in_order=True),
    "ivf_pq": Kind(
        "IVF{centroids},PQ{parts}", ("centroids", "parts", "refine"), effort="nprobe", gpu=True, refine=8, seen=10_000
    ),
    # each number is one bit, with a correction (Gao and Long, "RaBitQ", SIGMOD 2024)
    "ivf_rabitq": Kind("IVF{centroids},RaBitQ", ("centroids", "refine"), effort="nprobe", refine=8),
    "factory": Kind("Flat", ("key", "search", "refine", "seen"), refine=8, seen=100_000),
}
GRAPHS = ("HNSW", "NSG", "NNDescent")


def create_kind(kind: str, options: Options | None = None) -> Kind:
    """Make a kind of index.

    Raises:
        ImatchError: unknown kind or option, with the nearest known one; an option of the wrong type.

    >>> create_kind("flat").memory(1000, 384)
    1536000
    >>> [create_kind(kind).memory(1_000_000, 128) // 1_000_000 for kind in ("ivf_pq", "ivf_rabitq", "hnsw")]
    [42, 34, 784]
    """
    if kind not in INDEXES:
        raise ImatchError(config.unknown("index", kind, INDEXES))
    known, given = INDEXES[kind], dict(options or {})
    for option in given:
        if option not in known.options:
            raise ImatchError(config.unknown(f"option of index {kind}", option, known.options))
    made = dataclasses.replace(known, **given)
    config.check(made, f"index {kind}: option ")
    return dataclasses.replace(made, in_order=made.in_order or any(graph in made.key for graph in GRAPHS))


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
