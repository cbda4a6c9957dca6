"""How fast 04_match matches two photographs' descriptors, beside numpy with Python loops over candidates; and in how
much memory.

    .venv/bin/python tests/benchmarks/bench_match.py             # 1,024 and 4,096 tokens of 384
    .venv/bin/python tests/benchmarks/bench_match.py --memory    # 16,384 x 16,384 tokens within 1 GB

Ratios are measured in one run, sides in turn, and the matches compared. No network's forward pass is in them.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable

import numpy as np

from imatch import devices, matching, registry
from imatch.records import Tokens

D, SMALL, MIDDLE, LARGE, LEAST = 384, 32, 64, 128, 0.5
IN_A_ROW = 8
"""Pairs that each side matches before it is the other's turn, as 04_match does with thousands."""
Pairs = list[tuple[int, int]]


def main() -> None:
    """Speed by default, or memory."""
    if "--memory" in sys.argv:
        memory()
    else:
        speed(SMALL, turns=5)
        speed(MIDDLE, turns=2)
    print(f"{sys.executable.rpartition('/')[2]} {' '.join(sys.argv)}")


def speed(side: int, turns: int) -> None:
    """Milliseconds a pair, on the clock and of the processor, the best of some turns."""
    a, b = photographs(side)
    print(f"{side**2:,} x {side**2:,} tokens of {D}, {registry.cores()} cores, {devices.resolved('auto')}\n")
    for k in (1, 5):
        mutual = matching.create("mutual", {"k": k, "min_similarity": LEAST, "max_matches": 0})
        found: dict[str, Pairs] = {}
        sides: dict[str, Callable[[], Pairs]] = {
            "numpy and loops": lambda k=k: loops(a.descriptors, b.descriptors, k, tuned=False),
            "the same, tuned": lambda k=k: loops(a.descriptors, b.descriptors, k, tuned=True),
            "imatch": lambda mutual=mutual: pairs(mutual, a, b),
        }
        best = dict.fromkeys(sides, (float("inf"), float("inf")))
        for _ in range(turns):
            for name, work in sides.items():
                took = measure(name, work, found)
                best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
        assert found["imatch"] == found["numpy and loops"] == found["the same, tuned"]
        print(f"mutual, k = {k}: {len(found['imatch'])} matches, identical")
        for name, (clock, cpu) in best.items():
            print(f"    {name:<20}{1000 * clock:>8.1f} ms, {1000 * cpu:>8.1f} ms of the processor")
        for what, i in (("on the clock", 0), ("of the processor", 1)):
            usual, tuned = (best[name][i] / best["imatch"][i] for name in ("numpy and loops", "the same, tuned"))
            print(f"    {what}: {usual:.1f} times as fast as the loops (bar 3), {tuned:.1f} times as the tuned ones")
    for name in ("ratio", "dual_softmax"):
        match = matching.create(name)
        took = min(measure(name, lambda match=match: pairs(match, a, b), {})[0] for _ in range(turns))
        print(f"{name}: {1000 * took:.1f} ms")
    print()


def memory() -> None:
    """The peak of a process that makes the tokens and matches them, for each matcher one of its own."""
    print(f"{LARGE**2:,} x {LARGE**2:,} tokens of {D}; the matrix alone would be {4 * LARGE**4 / 2**30:.2f} GB")
    for name in matching.MATCHERS:
        process = multiprocessing.get_context("spawn").Process(target=peak, args=(name,))
        process.start()
        process.join()


def peak(name: str) -> None:
    """Match once, and print what it took."""
    a, b = photographs(LARGE)
    started = time.perf_counter()
    n = len(matching.create(name)(a, b))
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:<14}{n:>6} matches, {time.perf_counter() - started:5.1f} s, peak {gigabytes:.2f} GB (bar 1)")


def loops(a: np.ndarray, b: np.ndarray, k: int, tuned: bool) -> Pairs:
    """Mutual k nearest neighbours with numpy for the matrix and Python for the candidates: as they are often written,
    or tuned (partitions instead of sorts, lists instead of arrays in the loop)."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    similarity = a @ b.T
    best = [(np.argpartition if tuned else _sorted)(-s, k, axis=1)[:, :k] for s in (similarity, similarity.T)]
    of_a, of_b = (found.tolist() if tuned else found for found in best)
    candidates = [
        (-float(similarity[i, j]), i, int(j))
        for i, near in enumerate(of_a)
        for j in near
        if i in of_b[j] and similarity[i, j] >= LEAST
    ]
    kept, used_a, used_b = [], set(), set()
    for _, i, j in sorted(candidates):
        if i not in used_a and j not in used_b:
            kept.append((i, j))
            used_a.add(i)
            used_b.add(j)
    return sorted(kept)


def _sorted(values: np.ndarray, _: int, axis: int) -> np.ndarray:
    return np.argsort(values, axis=axis)


def pairs(match: matching.Matcher, a: Tokens, b: Tokens) -> Pairs:
    """What a matcher finds, by the rows of A."""
    matches = match(a, b)
    return sorted(zip(matches.index_a.tolist(), matches.index_b.tolist(), strict=True))


def measure(name: str, work: Callable[[], Pairs], found: dict[str, Pairs]) -> tuple[float, float]:
    """Seconds a pair on the clock and of the processor; what was found is put down under the name."""
    time.sleep(0.1)  # threads of the side before, which still wait for work, go to sleep
    started = time.perf_counter(), time.process_time()
    for _ in range(IN_A_ROW):
        found[name] = work()
    return (time.perf_counter() - started[0]) / IN_A_ROW, (time.process_time() - started[1]) / IN_A_ROW


def photographs(side: int) -> tuple[Tokens, Tokens]:
    """Tokens on two grids of side x side: B holds most of A's, changed a little and in another order."""
    rng = np.random.default_rng(0)
    n = side**2
    a = rng.standard_normal((n, D), dtype=np.float32)
    b = a[rng.permutation(n)] + 0.7 * rng.standard_normal((n, D), dtype=np.float32)
    b[: n // 4] = rng.standard_normal((n // 4, D), dtype=np.float32)
    xy = np.stack(np.meshgrid(*2 * [16 * np.arange(side, dtype=np.float32) + 7.5]), axis=2).reshape(-1, 2)
    vector = np.ones(1, np.float32)
    return Tokens(vector, a, xy, (side, side)), Tokens(vector, b, xy, (side, side))


if __name__ == "__main__":
    main()
