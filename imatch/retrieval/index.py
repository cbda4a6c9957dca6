"""Nearest neighbours among the vectors of a gallery: an index on disk in shards, built and searched.

    index.json      what was asked and chosen, and of which gallery, written first
    trained.faiss   what was learned from a sample (kinds that learn)
    00000.faiss     a shard: an index of the next rows of the gallery, mapped into memory when it is searched

Shards are what a build that was killed resumes by; an index of another gallery is built again.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypedDict

import faiss
import numpy as np
import psutil
from pydantic import Field, NonNegativeFloat

from imatch.core import compute, config, files, settings
from imatch.core.compute import LOCAL, Engine
from imatch.core.rows import Json, Options
from imatch.core.types import Hits, ImatchError, StepError
from imatch.data.embeddings import vector_digest
from imatch.retrieval import kinds

DEVICES = ("auto", "cpu", "cuda")
SHARD = 2**30
"""Bytes of a shard."""
BLOCK = 2**24
"""Numbers that are held at once while vectors are read or compared."""
PRODUCTS = 8
"""From so many queries on FAISS compares by matrix products. Its own limit, 128,000 numbers, is 333 queries of 384:
below it every query reads all vectors anew (`make bench` shows both)."""
EXACT = 10**9
"""n d up to which exact search is fast enough: some 20 ms a query on two cores in batches."""
TIE = 1e-6
"""Cosines that differ by less are equal but for rounding."""
SAMPLE = 256
"""Queries at most that recall is measured on."""


@dataclass(frozen=True)
class IndexOptions:
    """How vectors are indexed.

    Attributes:
        kind: "flat" is exact; also "ivf_flat", "hnsw", "ivf_pq", "ivf_rabitq", "factory"; "auto" is exact while that
            fits and is fast enough.
        options: fields of that kind (`kinds.INDEXES`), such as {"parts": 48}.
        recall: of an approximate index, the recall@k that it is tuned to, in (0, 1].
        memory_gb: GB that it may take; 0 is half of what is free.
        device: all GPUs that FAISS sees, else the CPU ("auto"); or "cpu", "cuda", "cuda:0".
        float16: whether GPUs keep vectors in 16 bits.

    Raises:
        ImatchError: an unknown kind, or a field of the wrong type or out of range.
    """

    kind: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    memory_gb: NonNegativeFloat = 0.0
    device: str = "auto"
    float16: bool = False

    def __post_init__(self) -> None:
        config.check(self, "index")
        if self.kind != "auto":
            kinds.create_kind(self.kind, self.options)


def choose(n: int, d: int, memory: int) -> tuple[str, str]:
    """The kind of index for n vectors of d numbers, and why: exact while it fits and is fast enough, then whole vectors
    in lists, then fewer bytes a vector.

    Args:
        n, d: how many vectors of how many numbers.
        memory: bytes that the index may take.

    Raises:
        ImatchError: not even the smallest fits.

    >>> choose(40_000, 384, 2**30)[0], choose(100_000_000, 384, 2**36)[0]
    ('flat', 'ivf_pq')
    """
    told = []
    for kind in ("flat", "ivf_flat", "ivf_pq", "ivf_rabitq"):
        needed = kinds.create_kind(kind).memory(n, d)
        size = f"{kind} takes {_gb(needed)}"
        if needed > memory:
            told.append(f"{size}, more than {_gb(memory)}")
        elif kind == "flat" and n * d > EXACT:
            told.append(f"{size}, but compares {n * d:.1e} numbers a query, more than {EXACT:.0e}")
        else:
            return kind, "; ".join([*told, f"{size} of {_gb(memory)}"])
    raise ImatchError(f"no index of {n} vectors of {d} numbers fits: {'; '.join(told)}. Give more as index.memory_gb")


def sample(n: int, most: int = SAMPLE) -> np.ndarray:
    """Which of n rows to measure on: all, or so many evenly spread ones.

    >>> sample(10, 4).tolist()
    [0, 3, 6, 9]
    """
    return np.unique(np.linspace(0, n - 1, min(most, n)).astype(int))


class _Plan(TypedDict):
    """What index.json holds: what was asked for, and what was chosen."""

    asked: str
    given: Options
    memory: int
    shard_rows: int
    gallery: str
    vectors: int
    dimension: int
    kind: str
    options: Options
    reason: str
    build_ms: float
    rows: int


def digest(vectors: np.ndarray) -> str:
    """Digest (N, D) vectors in their order, as `Embeddings.digest` does.

    >>> digest(np.eye(2, dtype=np.float32)) == digest(np.eye(2, dtype=np.float32)[::-1])
    False
    """
    return files.digest([vector_digest(vector) for block in _blocks(vectors) for vector in block])


def build(
    folder: Path,
    vectors: np.ndarray,
    gallery: str,
    *,
    kind: str = "auto",
    options: Options | None = None,
    memory: int = 0,
    shard_rows: int = 0,
    engine: Engine = LOCAL,
) -> None:
    """Build the index of a gallery in a folder, unless it is there; one of another gallery, or asked for otherwise, is
    built again. A killed build resumes where it stopped.

    Args:
        folder: of the index alone.
        vectors: (N, D) float32, L2-normalised; a memory map is read block by block.
        gallery: their `digest`.
        kind: a name of `kinds.INDEXES`, or "auto" (`choose`).
        options: fields of that kind.
        memory: bytes it may take; 0 is half of what is free.
        shard_rows: vectors a shard; 0 fills `SHARD` bytes.
        engine: of `ComputeOptions.machines`, by which shards are made. Their bytes are the same with all of them.

    Raises:
        ImatchError: no vectors, or not finite, or not normalised; options that do not fit; more than the memory; a part
            of an index that is to be built again.
        PartDoneError: see `compute.do`.
    """
    _check_vectors(vectors)
    n, d = vectors.shape
    given = {"asked": kind, "given": dict(options or {}), "memory": memory, "shard_rows": shard_rows}
    asked = {**given, "gallery": gallery, "vectors": n, "dimension": d}
    plan = files.read_json(folder / "index.json") if (folder / "index.json").is_file() else {}
    same = all(plan.get(name) == value for name, value in asked.items())
    if engine.shard:
        _check_part(folder, bool(plan), same, kind, memory)
    if not same:
        plan = {**asked, **_plan(kind, asked["given"], n, d, memory), "build_ms": 0.0}
        plan["rows"] = shard_rows or max(1, SHARD * n // max(1, _kind(plan).memory(n, d)))
        if not engine.shard and folder.exists():
            shutil.rmtree(folder)  # what cannot be deleted must not pass for a shard of this one
        files.write_json(folder / "index.json", plan)
    started = time.perf_counter()
    _trained(folder, _kind(plan), vectors)
    adding = _Adding(folder, plan, vectors)
    jobs = _shards(plan)
    was_there = all(adding.done(job) for job in jobs)
    fit = max(1, psutil.virtual_memory().available // (4 * SHARD))  # shards that grow at the same time
    places = ["cpu"] * min(fit, settings.cores())
    deque(compute.do(engine, compute.Each(adding, adding.done, 0, "index"), jobs, places), maxlen=0)
    if not was_there:
        spent = plan["build_ms"] + 1000 * (time.perf_counter() - started)
        files.write_json(folder / "index.json", {**plan, "build_ms": round(spent, 3)})


def _check_part(folder: Path, begun: bool, same: bool, kind: str, memory: int) -> None:
    """Refuse a part of an index that would not be that of the other parts, or would take theirs away."""
    if begun and not same:
        raise ImatchError(
            f"the index at {folder} is of another gallery or was asked for otherwise: delete it and start the parts "
            "again, or run it once without a shard"
        )
    if kind == "auto" and not memory:
        raise ImatchError("parts must choose the same index: name one, such as flat, or give index.memory_gb")
    if not same and any(folder.glob("*.faiss")) and not (folder / "index.json").is_file():  # else another has begun
        raise ImatchError(f"{folder} holds what is left of another index: delete it, and start the parts again")


def _check_vectors(vectors: np.ndarray) -> None:
    if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] < 1:
        raise ImatchError(f"an index needs (N, D) vectors, at least one; got {vectors.shape}")


def _kind(plan: _Plan) -> kinds.Kind:
    return kinds.create_kind(plan["kind"], plan["options"])


def _shards(plan: _Plan) -> list[_Shard]:
    n, size = plan["vectors"], plan["rows"]
    return [_Shard(f"{i:05d}", first, min(n, first + size)) for i, first in enumerate(range(0, n, size))]


def _plan(kind: str, options: Options, n: int, d: int, memory: int) -> dict[str, Json]:
    budget = memory or psutil.virtual_memory().available // 2
    if kind == "auto":
        if options:
            raise ImatchError(f"index auto takes no options, got {sorted(options)}: name a kind")
        chosen, why = choose(n, d, budget)
        return {"kind": chosen, "options": {}, "reason": why}
    needed = kinds.create_kind(kind, options).memory(n, d)
    if needed > budget:
        raise ImatchError(
            f"{kind} of {n} vectors of {d} numbers takes {_gb(needed)}, more than {_gb(budget)}: use auto, or give "
            "more as index.memory_gb"
        )
    return {"kind": kind, "options": dict(options), "reason": f"asked for; it takes {_gb(needed)} of {_gb(budget)}"}


def _taken(vectors: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Some rows, block by block, looked at for whether they are normalised."""
    size = max(1, BLOCK // vectors.shape[1])
    for part in (rows[first : first + size] for first in range(0, len(rows), size)):
        block = files.take(vectors, part)
        norms = np.sqrt(np.einsum("nd,nd->n", block, block))
        wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
        if len(wrong):
            norm = norms[wrong[0]]
            raise ImatchError(f"vector {part[wrong[0]]} has norm {norm:.4g}, not 1: embed the gallery again")
        yield block


def _trained(folder: Path, made: kinds.Kind, vectors: np.ndarray) -> faiss.Index:
    """The empty index, trained: what was saved, or learned now."""
    path = folder / "trained.faiss"
    if path.is_file():
        return _read(path)
    index = made.empty(*vectors.shape)
    if not index.is_trained:
        _learn(index, made, vectors)
        if path.is_file():  # another part was first
            return _read(path)
        _write(path, index)
    return index


def _learn(index: faiss.Index, made: kinds.Kind, vectors: np.ndarray) -> None:
    """Train an index on evenly spread vectors."""
    if not made.learns_from(len(vectors)):
        raise ImatchError("this index learns from vectors, and option seen is 0: give such as 100000")
    seen = np.concatenate(list(_taken(vectors, sample(len(vectors), made.learns_from(len(vectors))))))
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.cp.min_points_per_centroid = 1  # warns on the console otherwise
    try:
        index.train(seen)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise ImatchError(f"{len(seen)} vectors are too few to learn from ({said}): use flat") from error


def _add(index: faiss.Index, kind: kinds.Kind, vectors: np.ndarray, shard: _Shard) -> None:
    """Add the rows of a shard."""
    with _threads(1 if kind.in_order else faiss.omp_get_max_threads()):
        for block in _taken(vectors, np.arange(shard.first, shard.last)):
            index.add(block)


@dataclass(frozen=True)
class _Shard:
    """A job: the rows of the gallery, from the first to before the last, that become one shard."""

    name: str
    first: int
    last: int


class _Adding:
    """Makes shards; another process opens what was learned, and the vectors, for itself."""

    def __init__(self, folder: Path, plan: _Plan, vectors: np.ndarray) -> None:
        self.folder, self.plan, self.vectors = folder, plan, vectors

    def __getstate__(self) -> tuple[Path, _Plan, Path | np.ndarray]:
        vectors = self.vectors
        return self.folder, self.plan, Path(vectors.filename) if isinstance(vectors, np.memmap) else vectors

    def __setstate__(self, state: tuple[Path, _Plan, Path | np.ndarray]) -> None:
        folder, plan, vectors = state
        self.__init__(folder, plan, np.load(vectors, mmap_mode="r") if isinstance(vectors, Path) else vectors)

    @cached_property
    def trained(self) -> faiss.Index:
        return _trained(self.folder, _kind(self.plan), self.vectors)

    def done(self, shard: _Shard) -> bool:
        """Whether a shard is on disk."""
        return (self.folder / f"{shard.name}.faiss").is_file()

    def __call__(self, shard: _Shard) -> dict[str, str | int]:
        index = faiss.clone_index(self.trained)
        _add(index, _kind(self.plan), self.vectors, shard)
        _write(self.folder / f"{shard.name}.faiss", index)
        return {"shard": shard.name, "vectors": index.ntotal}


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(n)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def in_memory(
    vectors: np.ndarray, kind: str = "auto", options: Options | None = None, *, gallery: str = "", device: str = "auto"
) -> Searcher:
    """Index vectors in memory; nothing is written.

    Args:
        vectors, kind, options, gallery: as of `build`.
        device: as of `Searcher`.

    Raises:
        ImatchError: as `build` and `Searcher`.
    """
    _check_vectors(vectors)
    n, d = vectors.shape
    chosen = _plan(kind, options or {}, n, d, memory=0)
    plan = {"gallery": gallery, "vectors": n, "dimension": d, "rows": n, "build_ms": 0.0, **chosen}
    index = _kind(plan).empty(n, d)
    if not index.is_trained:
        _learn(index, _kind(plan), vectors)
    _add(index, _kind(plan), vectors, _Shard("", 0, n))
    return Searcher(vectors, plan, [index], device=device)


def open_index(
    folder: Path, vectors: np.ndarray, gallery: str, *, device: str = "auto", float16: bool = False
) -> Searcher:
    """Open an index that `build` wrote.

    Args:
        folder: the index' folder.
        vectors: (N, D) float32, as they were given to `build`.
        gallery: their `digest`.
        device, float16: as of `Searcher`.

    Raises:
        StepError: there is no index, it is not whole, or older than its gallery.
        ImatchError: a device that is not there.

    >>> import tempfile
    >>> vectors = np.eye(3, dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     build(Path(folder) / "index", vectors, digest(vectors))
    ...     open_index(Path(folder) / "index", vectors, digest(vectors)).search(vectors[1:], k=1).rows.tolist()
    [[1], [2]]
    """
    if not (folder / "index.json").is_file():
        raise StepError(f"no index at {folder}: run 03_index again")
    plan = files.read_json(folder / "index.json")
    if plan.get("gallery") != gallery:
        raise StepError(
            f"the index at {folder} is older than its gallery: it holds {plan.get('vectors', 'other')} "
            f"vectors of {plan.get('dimension')} numbers, not these {vectors.shape[0]} of {vectors.shape[1]}: "
            "run 03_index again"
        )
    paths = [folder / f"{shard.name}.faiss" for shard in _shards(plan)]
    if not all(path.is_file() for path in paths):
        raise StepError(f"the index at {folder} is not whole: run 03_index again, it goes on where it stopped")
    shards = [_read(path, mapped=True) for path in paths]
    for index, shard, path in zip(shards, _shards(plan), paths, strict=True):
        if index.ntotal != shard.last - shard.first:
            raise StepError(f"{path} holds {index.ntotal} vectors, not {shard.last - shard.first}: delete {folder}")
    return Searcher(vectors, plan, shards, device=device, float16=float16, folder=folder)


@dataclass(frozen=True)
class Point:
    """What an effort gives.

    Attributes:
        effort: of the search; None where there is none to choose.
        recall: share of the exact k nearest that are found, in [0, 1].
        ms: milliseconds a query in one batch.
    """

    effort: int | None
    recall: float
    ms: float


class Searcher:
    """An index over the vectors that it was made from; of `open_index` or `in_memory`.

    Args:
        vectors: (N, D) float32, L2-normalised.
        plan: what was asked for, and what was chosen.
        shards: FAISS' indexes of successive rows.
        device: "cpu", "cuda" (all GPUs), "cuda:N", or "auto": all GPUs if FAISS sees some and knows the kind there.
        float16: whether a GPU keeps numbers in 16 bits.
        folder: where it lies on disk, if it does.

    Raises:
        ImatchError: a device that is not there.

    >>> vectors = np.eye(3, dtype=np.float32)
    >>> in_memory(vectors).search(vectors[1:], k=1).rows.tolist()
    [[1], [2]]
    """

    def __init__(
        self,
        vectors: np.ndarray,
        plan: _Plan,
        shards: Sequence[faiss.Index],
        *,
        device: str = "auto",
        float16: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.vectors, self.plan, self.folder, self.device = vectors, plan, folder, device
        self.kind, self.firsts = _kind(plan), [shard.first for shard in _shards(plan)]
        self.gpus = _gpus(device, plan["kind"], self.kind.gpu)
        if self.gpus:
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16, options.shard = float16, len(self.gpus) > 1
            shards = [faiss.index_cpu_to_gpus_list(shard, options, self.gpus) for shard in shards]
        self.shards = shards
        self.effort: int | None = plan.get("effort")

    @property
    def backend(self) -> str:
        """Where it searches: "faiss-cpu" or "faiss-gpu"."""
        return "faiss-gpu" if self.gpus else "faiss-cpu"

    def search(self, queries: np.ndarray, k: int, effort: int | None = None) -> Hits:
        """The k nearest rows of each of (Q, D) queries by cosine, ties by the smaller row.

        Candidates are compared by their vectors in the store (unless the kind's refine is 0), in one order of adding
        up, so that scores are exact and do not depend on how many queries are asked at once.

        Args:
            queries: (Q, D) float32, L2-normalised.
            k: at least 1; rows of -1 fill up where the gallery has fewer.
            effort: nprobe or efSearch; None is what `tune` chose.

        Raises:
            ImatchError: k below 1, queries of another dimension or not finite.
        """
        n, d = self.vectors.shape
        if k < 1:
            raise ImatchError(f"k is {k}: ask for at least 1 neighbour")
        if queries.ndim != 2 or queries.shape[1] != d:
            raise ImatchError(
                f"queries {queries.shape} do not fit an index of dimension {d}: embed both sides with the same backbone"
            )
        queries = np.ascontiguousarray(queries, np.float32)
        if not np.isfinite(queries).all():
            raise ImatchError("queries hold numbers that are not finite: embed them again")
        self._set_effort(effort or self.effort)
        _allow_products(d)
        k_found = min(k, n)
        rows = np.full((len(queries), k), -1)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        todo, depth = np.arange(len(queries)), min(n, k_found * max(1, self.kind.refine) + 1)
        while len(todo):
            found = self._nearest(queries[todo], depth)
            rows[todo, :k_found], scores[todo, :k_found] = found.rows[:, :k_found], found.scores[:, :k_found]
            if not self.kind.exact or depth == n:
                break
            # where the last place ties with the last candidate, others that were not looked at may tie, too
            todo = todo[found.scores[:, k_found - 1] - found.scores[:, -1] < TIE]
            depth = min(n, 4 * depth)
        return Hits(rows, scores)

    def _set_effort(self, effort: int | None) -> None:
        if effort is None or not self.kind.effort:
            return
        for shard in self.shards:
            space = faiss.GpuParameterSpace() if self.gpus else faiss.ParameterSpace()
            space.set_index_parameter(shard, self.kind.effort, effort)

    def _nearest(self, queries: np.ndarray, depth: int) -> Hits:
        found = []
        for shard, first in zip(self.shards, self.firsts, strict=True):
            if self.gpus and depth > 2048:
                raise ImatchError(
                    f"a GPU finds at most 2,048 neighbours a query, {depth} are needed: set device to cpu"
                )
            scores, places = shard.search(queries, min(depth, shard.ntotal))
            found.append((np.where(places < 0, -1, first + places), scores))
        rows, scores = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
        scores = np.where(rows < 0, -np.inf, scores)
        if len(found) > 1:
            best = np.argpartition(-scores, min(depth, scores.shape[1]) - 1, axis=1)[:, :depth]
            rows, scores = np.take_along_axis(rows, best, 1), np.take_along_axis(scores, best, 1)
        if self.kind.refine:
            scores = self._compared(queries, rows)
        order = np.lexsort([rows, -scores], axis=1)
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1).astype(np.float32)
        rows[np.isneginf(scores)] = -1
        short = max(0, depth - rows.shape[1])
        return Hits(
            np.pad(rows, ((0, 0), (0, short)), constant_values=-1),
            np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf),
        )

    def _compared(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(Q, m) cosines of candidates by their vectors in the store; -inf where row is -1."""
        scores = np.empty(rows.shape, np.float32)
        block = max(1, BLOCK // (rows.shape[1] * self.vectors.shape[1]))
        for first in range(0, len(rows), block):
            part = slice(first, first + block)
            candidates = files.take(self.vectors, rows[part].ravel()).reshape(*rows[part].shape, -1)
            scores[part] = np.einsum("qd,qkd->qk", queries[part], candidates)
        scores[rows < 0] = -np.inf
        return scores

    def curve(self, queries: np.ndarray, k: int) -> list[Point]:
        """Recall@k against exact search and milliseconds a query, over the kind's efforts, until nothing is missed; no
        points for an exact kind.

        Args:
            queries: (Q, D) float32, a sample.
            k: neighbours a query.
        """
        if self.kind.exact:
            return []
        k = min(k, len(self.vectors))
        exact = self.exact(queries, k)
        efforts = [*self.kind.efforts(len(self.vectors))] or [None]
        self.search(queries, k, efforts[0])  # the first search maps the file and wakes threads
        points = []
        for effort in efforts:
            started = time.perf_counter()
            rows = self.search(queries, k, effort).rows
            took = 1000 * (time.perf_counter() - started) / len(queries)
            # a neighbour that scores as high as the last of the exact ones is as good
            scores = self._compared(queries, rows)
            recall = float((scores >= exact.scores[:, -1:] - TIE).mean())
            points.append(Point(effort, recall, took))
            if recall == 1.0:
                break
        return points

    def tune(self, points: Sequence[Point], wanted: float) -> Point | None:
        """Search from now on with the smallest effort that reaches the wanted recall, or with the best there is, and
        remember that beside the index. None for an exact kind."""
        if not points:
            return None
        reached = [point for point in points if point.recall >= wanted]
        chosen = reached[0] if reached else max(points, key=lambda point: point.recall)
        self.effort = chosen.effort
        self.plan = {**self.plan, "effort": chosen.effort}
        if self.folder:
            files.write_json(self.folder / "index.json", self.plan)
        return chosen

    def exact(self, queries: np.ndarray, k: int) -> Hits:
        """The exact k nearest, by comparing with all vectors of the store, block by block; k is at most N."""
        queries = np.ascontiguousarray(queries, np.float32)
        _allow_products(queries.shape[1])
        rows = np.zeros((len(queries), 0), np.int64)
        scores = np.zeros((len(queries), 0), np.float32)
        first = 0
        for block in _blocks(self.vectors):
            new, places = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            rows, scores = np.hstack([rows, places + first]), np.hstack([scores, new])
            order = np.lexsort([rows, -scores], axis=1)[:, :k]
            rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
            first += len(block)
        return Hits(rows, scores)

    def stored(self) -> int:
        """Bytes of its shards on disk; 0 of one in memory."""
        return (
            0
            if self.folder is None
            else sum((self.folder / f"{shard.name}.faiss").stat().st_size for shard in _shards(self.plan))
        )


def _allow_products(d: int) -> None:
    faiss.cvar.distance_compute_blas_threshold = PRODUCTS * d


def _gpus(device: str, kind: str, able: bool) -> list[int]:
    """The GPUs to search on; none is the CPU."""
    name, _, number = device.partition(":")
    if name not in DEVICES or (number and (name != "cuda" or not number.isdecimal())):
        raise ImatchError(f"unknown device {device!r}: use auto, cpu, cuda or such as cuda:0")
    there = faiss.get_num_gpus()
    if name == "cpu" or (name == "auto" and not (there and able)):
        return []
    if not there:
        raise ImatchError(
            f"device {device} was asked for, and FAISS sees no GPU: install faiss-gpu (make setup FAISS=gpu) and a "
            "driver, or use auto"
        )
    if not able:
        raise ImatchError(f"{kind} does not run on a GPU: use device cpu, or flat, ivf_flat or ivf_pq")
    if number and int(number) >= there:
        raise ImatchError(f"device {device} is not there: FAISS sees {there} GPUs, from cuda:0 on")
    return [int(number)] if number else list(range(there))


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    size = max(1, BLOCK // max(1, vectors.shape[1]))
    for first in range(0, len(vectors), size):
        yield files.take(vectors, slice(first, first + size))


def _write(path: Path, index: faiss.Index) -> None:
    """Write an index through Python, for faiss.write_index hides a full disk."""
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        _through(file.write, index)


def _through(write: Callable[[memoryview], int], index: faiss.Index) -> None:
    failed: list[OSError] = []

    def chunk(data: memoryview) -> int:
        try:
            return 0 if failed else write(data)
        except OSError as error:  # FAISS would say only that it wrote too little
            failed.append(error)
            return 0

    try:
        faiss.write_index(index, faiss.BufferedIOWriter(faiss.PyCallbackIOWriter(chunk), 2**20))
    except RuntimeError:
        if not failed:
            raise
    if failed:
        raise failed[0]


def _read(path: Path, mapped: bool = False) -> faiss.Index:
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
    except RuntimeError as error:
        raise StepError(f"{path} is not a whole FAISS index: delete {path.parent} and run 03_index again") from error


def _gb(size: float) -> str:
    return f"{size / 2**30:.2f} GB" if size >= 2**27 else f"{size / 2**20:.2f} MB"
