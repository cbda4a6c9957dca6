"""Nearest neighbours among the vectors of a gallery: an index on disk in shards, built and searched.

    index.json      what was asked and chosen, and of which gallery, written first
    trained.faiss   the empty index, with what it has learned from a sample
    00000.faiss     a shard: an index of the next rows of the gallery, mapped into memory when it is searched

Shards are what a build that was killed resumes by; an index of another gallery is built again.
"""

from __future__ import annotations

import mmap
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
from pydantic import Field, NonNegativeFloat
from threadpoolctl import threadpool_limits

from imatch.core import compute, config, files, settings
from imatch.core.compute import LOCAL, Engine
from imatch.core.rows import Json
from imatch.core.types import Hits, ImatchError, StepError
from imatch.data.embeddings import vector_digest
from imatch.retrieval import kinds

SHARD = 2**30
"""Bytes of a shard."""
BLOCK = 2**24
"""Numbers that are held at once while vectors are read or compared."""
PRODUCTS = 8
"""From so many queries on FAISS compares by matrix products; below, every query reads all vectors anew."""
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
        compute.check_device(self.device)
        if self.kind != "auto":
            kinds.create_kind(self.kind, self.options)
        elif self.options:
            raise ImatchError(f"index auto takes no options, got {sorted(self.options)}: name a kind")


def choose(n: int, d: int, memory: int) -> tuple[str, str]:
    """The kind of index for n vectors of d numbers, and why: the most exact one that fits into so many bytes of
    memory and is fast enough.

    Raises:
        ImatchError: not even the smallest fits.

    >>> choose(40_000, 384, 2**30)[0], choose(100_000_000, 384, 2**36)[0]
    ('flat', 'ivf_pq')
    """
    told: list[str] = []
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


Plan = dict[str, Json]
"""What index.json holds: what was asked for, of which gallery, and what was chosen."""


def digest(vectors: np.ndarray) -> str:
    """Digest (N, D) vectors in their order, as `Embeddings.digest` does.

    >>> digest(np.eye(2, dtype=np.float32)) == digest(np.eye(2, dtype=np.float32)[::-1])
    False
    """
    return files.digest([vector_digest(vector) for block in blocks(vectors) for vector in block])


def build(
    folder: Path,
    vectors: np.ndarray,
    gallery: str,
    asked: IndexOptions = IndexOptions(),
    *,
    shard_rows: int = 0,
    engine: Engine = LOCAL,
) -> Searcher:
    """Build the index of a gallery in a folder, unless it is there, and open it; one of another gallery, or asked for
    otherwise, is built again. A killed build resumes where it stopped.

    Args:
        folder: of the index alone.
        vectors: (N, D) float32, L2-normalised.
        gallery: their `digest`.
        asked: what sort of index, and where it is searched.
        shard_rows: vectors a shard; 0 fills `SHARD` bytes.
        engine: of `ComputeOptions.machines`, by which shards are made.

    Raises:
        ImatchError: no vectors, or not finite, or not normalised; options that do not fit; more than the memory; a part
            of an index that is to be built again; a device that is not there.
        StepError: a file of it is broken.
        PartDoneError: see `compute.do`.

    >>> import tempfile
    >>> vectors = np.eye(3, dtype=np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     build(Path(folder) / "index", vectors, digest(vectors)).search(vectors[1:], k=1).rows.tolist()
    [[1], [2]]
    """
    _shape(vectors)
    with files.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with files.alone(folder.parent, engine.shard):
        plan = _planned(folder, vectors, gallery, asked, shard_rows, engine)
        shards = _shards(folder, plan)
        _check_whole(folder, plan)
        if engine.shard or not all(path.is_file() for path in shards):
            _make_missing(folder, plan, vectors, engine)
        opened = [_read(path, mapped=True) for path in shards]
    return Searcher(vectors, plan, opened, asked, folder)


def _planned(
    folder: Path, vectors: np.ndarray, gallery: str, asked: IndexOptions, shard_rows: int, engine: Engine
) -> Plan:
    """What index.json says; a new one, and nothing else in the folder, where that is of another gallery or request."""
    n, d = vectors.shape
    given = asdict(asked)
    made_by = {name: given[name] for name in ("kind", "options", "memory_gb")}
    wanted = {"asked": made_by, "shard_rows": shard_rows, "gallery": gallery, "vectors": n, "dimension": d}
    begun = any(folder.glob("*.faiss"))  # looked for first, for other parts write index.json first
    plan = _known(folder)
    same = all(plan.get(name) == value for name, value in wanted.items())
    if engine.shard and begun and not same:
        raise ImatchError(
            f"the index at {folder} is of another gallery or was asked for otherwise: delete it and start the parts "
            "again, or run it once without a shard"
        )
    if engine.shard and asked.kind == "auto" and not asked.memory_gb:
        raise ImatchError("parts must choose the same index: name one, such as flat, or give index.memory_gb")
    if not same:
        plan = {**wanted, **_plan(asked, n, d), "build_ms": 0.0}
        plan["rows"] = shard_rows or max(1, SHARD * n // max(1, _kind(plan).memory(n, d)))
        if not engine.shard and folder.exists():
            shutil.rmtree(folder)  # what cannot be deleted must not pass for a shard of this one
        files.write_signed(folder / "index.json", plan)
    return plan


def _check_whole(folder: Path, plan: Plan) -> None:
    """Refuse a file that is not what was written; one that is gone is made again."""
    there = {name: was for name, was in plan.get("files", {}).items() if (folder / name).is_file()}
    if harmed := files.damage(folder, there):
        name, reason = next(iter(harmed.items()))
        raise StepError(f"{folder / name} is not a whole FAISS index ({reason}): {_remedy(folder)}")


def _make_missing(folder: Path, plan: Plan, vectors: np.ndarray, engine: Engine) -> None:
    started, shards = time.perf_counter(), _shards(folder, plan)
    _trained(folder, plan, vectors)  # once for all of them
    whole = isinstance(vectors, np.memmap) and isinstance(vectors.base, mmap.mmap)
    source = Path(vectors.filename) if whole else vectors  # which other processes map for themselves
    work = compute.Each(partial(_make, plan, source), Path.is_file, 0, "index")
    fit = max(1, compute.free_memory() // (4 * SHARD))  # shards that grow at the same time
    places = ["cpu"] * min(fit, settings.cores())
    deque(compute.do(engine, work, shards, places), maxlen=0)
    plan["build_ms"] = round(plan["build_ms"] + 1000 * (time.perf_counter() - started), 3)
    plan["files"] = files.seal(folder, [path.name for path in (folder / "trained.faiss", *shards)])
    files.write_signed(folder / "index.json", plan)
    files.remember(folder, plan["files"])


def _known(folder: Path) -> Plan:
    """What index.json says, if it is there."""
    path = folder / "index.json"
    return files.read_json(path, _remedy(folder), signed=True) if path.is_file() else {}


def _shape(vectors: np.ndarray) -> tuple[int, int]:
    if vectors.ndim != 2 or not len(vectors) or vectors.shape[1] < 1:
        raise ImatchError(f"an index needs (N, D) vectors, at least one; got {vectors.shape}")
    return vectors.shape


def _kind(plan: Plan) -> kinds.Kind:
    return kinds.create_kind(plan["kind"], plan["options"])


def _shards(folder: Path, plan: Plan) -> list[Path]:
    return [folder / f"{i:05d}.faiss" for i in range(-(-plan["vectors"] // plan["rows"]))]


def _plan(asked: IndexOptions, n: int, d: int) -> Plan:
    """The kind, its options, and why."""
    kind, budget = asked.kind, round(asked.memory_gb * 2**30) or compute.free_memory() // 2
    if kind == "auto":
        chosen, why = choose(n, d, budget)
        return {"kind": chosen, "options": {}, "reason": why}
    needed = kinds.create_kind(kind, asked.options).memory(n, d)
    if needed > budget:
        raise ImatchError(
            f"{kind} of {n} vectors of {d} numbers takes {_gb(needed)}, more than {_gb(budget)}: use auto, or give "
            "more as index.memory_gb"
        )
    why = f"asked for; it takes {_gb(needed)} of {_gb(budget)}"
    return {"kind": kind, "options": dict(asked.options), "reason": why}


def _check_norms(vectors: np.ndarray, rows: Sequence[int] | np.ndarray) -> None:
    norms = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
    if len(wrong):
        row, norm = rows[wrong[0]], norms[wrong[0]]
        raise ImatchError(f"vector {row} has norm {norm:.4g}, not 1: embed the gallery again")


def _trained(folder: Path, plan: Plan, vectors: np.ndarray) -> faiss.Index:
    """The empty index, trained: what was saved, or learned now."""
    path = folder / "trained.faiss"
    if not path.is_file():
        index = _learned(plan, vectors)
        if not path.is_file():  # another part was first
            _write(path, index)
    return _read(path)


def _learned(plan: Plan, vectors: np.ndarray) -> faiss.Index:
    """The empty index, trained on evenly spread vectors if it learns."""
    index, many = _kind(plan).empty(*vectors.shape), _kind(plan).learns_from(len(vectors))
    if index.is_trained:
        return index
    if not many:
        raise ImatchError("this index learns from vectors, and option seen is 0: give such as 100000")
    rows = sample(len(vectors), many)
    seen = files.take(vectors, rows)
    _check_norms(seen, rows)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.cp.min_points_per_centroid = 1  # warns on the console otherwise
    try:
        index.train(seen)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise ImatchError(f"{len(seen)} vectors are too few to learn from ({said}): use flat") from error
    return index


def _make(plan: Plan, source: Path | np.ndarray, path: Path) -> dict[str, str | int]:
    """Make a shard, in this process or another one."""
    vectors = files.read_array(source) if isinstance(source, Path) else source
    index = _trained(path.parent, plan, vectors)
    first = int(path.stem) * plan["rows"]
    _add(index, _kind(plan), vectors, first, min(plan["vectors"], first + plan["rows"]))
    _write(path, index)
    return {"shard": path.stem, "vectors": index.ntotal}


def _add(index: faiss.Index, kind: kinds.Kind, vectors: np.ndarray, first: int, last: int) -> None:
    """Add some rows of the gallery."""
    with threadpool_limits(1 if kind.in_order else None, user_api="openmp"):
        for block in blocks(vectors, first, last):
            _check_norms(block, range(first, last))
            index.add(block)
            first += len(block)


def in_memory(vectors: np.ndarray, asked: IndexOptions = IndexOptions(), gallery: str = "") -> Searcher:
    """Index vectors in memory; arguments and refusals are those of `build`, and nothing is written."""
    n, d = _shape(vectors)
    plan = {"gallery": gallery, "vectors": n, "dimension": d, "rows": n, "build_ms": 0.0, **_plan(asked, n, d)}
    index = _learned(plan, vectors)
    _add(index, _kind(plan), vectors, 0, n)
    return Searcher(vectors, plan, [index], asked)


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
    """An index over the vectors that it was made from; of `build` or `in_memory`.

    Args:
        vectors: (N, D) float32, L2-normalised.
        plan: what was asked for, and what was chosen.
        shards: FAISS' indexes of successive rows.
        asked: where it searches: all GPUs with "cuda", or with "auto" if FAISS sees some and knows the kind there.
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
        plan: Plan,
        shards: Sequence[faiss.Index],
        asked: IndexOptions,
        folder: Path | None = None,
    ) -> None:
        self.vectors, self.plan, self.folder, self.device = vectors, plan, folder, asked.device
        self.kind = _kind(plan)
        self.gpus = _gpus(asked.device, plan["kind"], self.kind.gpu)
        if self.gpus:
            options = faiss.GpuMultipleClonerOptions()
            options.useFloat16, options.shard = asked.float16, len(self.gpus) > 1
            shards = [faiss.index_cpu_to_gpus_list(shard, options, self.gpus) for shard in shards]
        self.shards = shards
        self._all = shards[0]
        if len(shards) > 1:  # one after the other, rows counted through
            self._all = faiss.IndexShards(vectors.shape[1], False, True)
            for shard in shards:
                self._all.add_shard(shard)
        self.effort: int | None = plan.get("effort")

    @property
    def backend(self) -> str:
        """Where it searches: "faiss-cpu" or "faiss-gpu"."""
        return "faiss-gpu" if self.gpus else "faiss-cpu"

    def search(self, queries: np.ndarray, k: int, effort: int | None = None) -> Hits:
        """The k nearest rows of each of (Q, D) queries by cosine, ties by the smaller row.

        Unless the kind's refine is 0, candidates are compared by their vectors in the store, in one order of adding up:
        scores do not depend on how many queries are asked at once.

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
        if self.gpus and depth > 2048:
            why = f"a GPU finds at most 2,048 neighbours a query, {depth} are needed"
            raise ImatchError(f"{why}: set device to cpu")
        scores, rows = self._all.search(queries, depth)
        scores[rows < 0] = -np.inf
        if self.kind.refine:
            scores = self._compared(queries, rows)
        return _sorted(rows, scores)

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
        """Recall@k against exact search, for a sample of (Q, D) queries, and milliseconds a query, over the kind's
        efforts until nothing is missed; no points for an exact kind."""
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
        """Search from now on with the smallest effort that reaches the wanted recall, or with the best there is; the
        index on disk remembers it."""
        if not points:
            return None
        reached = [point for point in points if point.recall >= wanted]
        chosen = reached[0] if reached else max(points, key=lambda point: point.recall)
        self.effort = chosen.effort
        self.plan = {**self.plan, "effort": chosen.effort}
        if self.folder:
            files.write_signed(self.folder / "index.json", self.plan)
        return chosen

    def exact(self, queries: np.ndarray, k: int) -> Hits:
        """The exact k nearest, by comparing with all vectors of the store; k is at most N."""
        queries = np.ascontiguousarray(queries, np.float32)
        _allow_products(queries.shape[1])
        heap, first = faiss.ResultHeap(len(queries), k, keep_max=True), 0
        for block in blocks(self.vectors):
            scores, rows = faiss.knn(queries, block, k, metric=faiss.METRIC_INNER_PRODUCT)
            heap.add_result(scores, rows + first)
            first += len(block)
        heap.finalize()
        return _sorted(heap.I, heap.D)

    def stored(self) -> int:
        """Bytes of its shards on disk; 0 of one in memory."""
        paths = _shards(self.folder, self.plan) if self.folder else []
        return sum(path.stat().st_size for path in paths)


def _sorted(rows: np.ndarray, scores: np.ndarray) -> Hits:
    """Best first, ties by the smaller row."""
    order = np.lexsort([rows, -scores], axis=1)
    return Hits(np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1))


def _allow_products(d: int) -> None:
    faiss.cvar.distance_compute_blas_threshold = PRODUCTS * d


def _gpus(device: str, kind: str, able: bool) -> list[int]:
    """The GPUs to search on; none is the CPU."""
    name, _, number = device.partition(":")
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


def blocks(vectors: np.ndarray, first: int = 0, last: int | None = None) -> Iterator[np.ndarray]:
    """Yield copies of (N, D) vectors, from the first to before the last, `BLOCK` numbers at once.

    >>> [block.tolist() for block in blocks(np.eye(2), 1)]
    [[[0.0, 1.0]]]
    """
    size, last = max(1, BLOCK // max(1, vectors.shape[1])), len(vectors) if last is None else last
    for start in range(first, last, size):
        yield files.take(vectors, slice(start, min(start + size, last)))


def _write(path: Path, index: faiss.Index) -> None:
    """Write an index through Python, for faiss.write_index hides a full disk."""
    files.write_bytes(path, faiss.serialize_index(index).data)


def _read(path: Path, mapped: bool = False) -> faiss.Index:
    with files.reading(path, f"it is not a whole FAISS index: {_remedy(path.parent)}"):
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)


def _remedy(folder: Path) -> str:
    return f"delete {folder} and run 03_index again"


def _gb(size: float) -> str:
    return f"{size / 2**30:.2f} GB" if size >= 2**27 else f"{size / 2**20:.2f} MB"
