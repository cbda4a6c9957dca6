"""How fast 03_index searches, beside one call a query and beside a bare matrix product; what opening costs; and a
gallery larger than the memory it may take.

    .venv/bin/python tests/benchmarks/bench_search.py             # 200,000 x 384
    .venv/bin/python tests/benchmarks/bench_search.py --memory    # 2,000,000 x 128 within 1 GB

Ratios are measured in one run, sides in turn. With a GPU it also measures 1,000,000 x 1024 at batches of 1, 32 and
1,000 beside the two limits: one pass over the memory, and the matrix product.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from imatch.core import files, settings
from imatch.retrieval import index as searcher
from imatch.retrieval.index import IndexOptions

N, D, QUERIES, K, FEW = 200_000, 384, 1000, 10, 40
LARGE, NARROW, PLACES, PART = 2_000_000, 128, 20_000, 100_000


def main() -> None:
    """Speed by default, or memory."""
    settings.share_cores()
    with tempfile.TemporaryDirectory() as temporary:
        if "--memory" in sys.argv:
            memory(Path(temporary))
        else:
            speed(Path(temporary))
    if "--memory" not in sys.argv and faiss.get_num_gpus():
        with tempfile.TemporaryDirectory() as temporary:
            gpu(Path(temporary))
    print(f"{Path(sys.executable).name} {' '.join(sys.argv)}")


def speed(folder: Path) -> None:
    """Exact search by batches, by single calls and as a bare product; and opening what was saved."""
    vectors, queries = unit(N, D, 0), unit(QUERIES, D, 1)
    gallery = searcher.digest(vectors)
    np.save(folder / "vectors.npy", vectors)
    index = searcher.build(folder / "index", vectors, gallery, IndexOptions("flat", device="cpu"))
    plain = faiss.IndexFlatIP(D)
    plain.add(vectors)

    def single() -> None:
        for query in queries[:FEW]:
            plain.search(query[None], K)

    def fours(threshold: int) -> Callable[[], None]:
        def batches() -> None:
            faiss.cvar.distance_compute_blas_threshold = threshold
            for first in range(0, 256, 64):
                plain.search(queries[first : first + 64], K)

        return batches

    sides = {
        "bare matrix product": (lambda: queries @ vectors.T, QUERIES),
        "imatch, 1,000 at once": (lambda: index.search(queries, K), QUERIES),
        "FAISS, one call a query": (single, FEW),
        "64 at once, FAISS' own threshold": (fours(128_000), 256),
        "64 at once, as imatch sets it": (fours(searcher.PRODUCTS * D), 256),
    }
    rates = dict.fromkeys(sides, 0.0)
    for _ in range(3):
        for name, (side, n) in sides.items():
            rates[name] = max(rates[name], n / measure(side))
    print(f"{N:,} x {D}, {settings.cores()} cores, best of 3 turns each, in turn\n")
    for name, found in rates.items():
        print(f"{name:<34}{found:>8.0f} queries/s")
    ours = rates["imatch, 1,000 at once"]
    print(f"\n{ours / rates['FAISS, one call a query']:.1f} times one call a query (bar 15)")
    print(f"{ours / rates['bare matrix product']:.2f} of the matrix product's rate (bar 0.75)")

    def first_answer() -> None:
        mapped = np.load(folder / "vectors.npy", mmap_mode="r")
        searcher.build(folder / "index", mapped, gallery, IndexOptions("flat", device="cpu")).search(queries[:1], K)

    print(f"opening the saved index and the first answer: {measure(first_answer):.2f} s (bar 1)\n")


def memory(folder: Path) -> None:
    """A gallery of 1 GB, written by blocks, built and searched while this process stays below 1 GB."""
    writer = multiprocessing.Process(target=write, args=(folder,))  # its memory is not what is measured
    writer.start()
    writer.join()
    vectors, gallery = np.load(folder / "v.npy", mmap_mode="r"), "what write() wrote"
    queries = files.take(vectors, np.arange(0, LARGE, LARGE // 1000))
    started = time.perf_counter()
    asked = IndexOptions(memory_gb=0.25, device="cpu")
    index = searcher.build(folder / "index", vectors, gallery, asked, shard_rows=500_000)
    built = time.perf_counter() - started
    print(f"{index.plan['kind']}: {index.plan['reason']}")
    points = index.curve(queries[:100], K)
    chosen = index.tune(points, 0.95)
    assert chosen is not None
    rate = len(queries) / measure(lambda: index.search(queries, K))
    print(
        f"built in {built:.0f} s: {len(index.shards)} shards, {index.stored() / LARGE:.0f} bytes a vector, "
        f"{4 * NARROW} in a flat index"
    )
    print(f"recall@{K} {chosen.recall:.3f} at {index.kind.effort} {chosen.effort}; {rate:.0f} queries/s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process {peak:.2f} GB (bar 1)")


def write(folder: Path) -> None:
    """2,000,000 vectors near 20,000 places."""
    centres = unit(PLACES, NARROW, 2)
    rng = np.random.default_rng(3)
    found = np.lib.format.open_memmap(folder / "v.npy", "w+", np.float32, (LARGE, NARROW))
    for first in range(0, LARGE, PART):
        near = centres[rng.integers(0, PLACES, PART)]
        block = near + 0.05 * rng.standard_normal(near.shape, dtype=np.float32)
        found[first : first + PART] = block / np.linalg.norm(block, axis=1, keepdims=True)
    found.flush()


def gpu(folder: Path) -> None:
    """Queries/s on the GPUs beside what the memory's and the matrix products' rates allow."""
    import torch

    n, d = 1_000_000, 1024
    vectors = unit(n, d, 4)
    gallery = "vectors of the seed 4"
    index = searcher.build(folder / "index", vectors, gallery, IndexOptions("flat", device="cuda"))
    on_gpu = torch.from_numpy(vectors).cuda()
    for batch in (1, 32, 1000):
        queries = unit(batch, d, 5)
        asked = torch.from_numpy(queries).cuda()

        def product(asked: torch.Tensor = asked) -> None:
            _ = asked @ on_gpu.T
            torch.cuda.synchronize()

        def once() -> None:
            on_gpu.sum()
            torch.cuda.synchronize()

        took = [min(measure(f) for _ in range(3)) for f in (lambda q=queries: index.search(q, K), product, once)]
        ours, product_rate, memory_rate = (batch / t for t in took)
        print(f"batch {batch:>5}: {ours:>9.0f} queries/s; product {product_rate:.0f}, one pass {memory_rate:.0f}")


def measure(work: Callable[[], object]) -> float:
    """Seconds on the clock."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def unit(n: int, d: int, seed: int) -> np.ndarray:
    """(n, d) float32 of norm 1."""
    found = np.random.default_rng(seed).standard_normal((n, d), dtype=np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
