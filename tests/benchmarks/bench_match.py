"""How fast 04_match matches two photographs' descriptors, beside plain torch; and in how much memory.

    .venv/bin/python tests/benchmarks/bench_match.py             # 1,024 tokens of 384 and 4,096 of 128
    .venv/bin/python tests/benchmarks/bench_match.py --memory    # 16,384 x 16,384 tokens within 1 GB

Plain torch is one float32 product of normalised descriptors, the two best of each row and of each column, and those
that chose each other; and the same with the product transposed first, whose columns are then read faster. Each side has
one thread, as a matcher has, and works in turn, in one run. No network's forward pass is in them.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from imatch.core.types import Tokens
from imatch.matching.matchers import MATCHERS, Matcher, create_matcher

SIZES, LARGE, BAR, TURNS = ((32, 384), (64, 128)), (128, 384), 1.4, 7
IN_A_ROW = 5
"""Pairs that each side matches before it is the other's turn, as 04_match does with thousands."""
Pairs = set[tuple[int, int]]


def main() -> None:
    """Speed by default, or memory."""
    if "--memory" in sys.argv:
        memory()
    else:
        torch.set_num_threads(1)
        for side, d in SIZES:
            speed(side, d)
    print(f"{sys.executable.rpartition('/')[2]} {' '.join(sys.argv)}")


def speed(side: int, d: int) -> None:
    """Milliseconds a pair, on the clock and of the processor, the best of some turns."""
    a, b = photographs(side, d)
    x, y = (torch.nn.functional.normalize(torch.from_numpy(tokens.descriptors)) for tokens in (a, b))
    options = {"mutual": {"min_similarity": -1.0}, "ratio": {"max_ratio": 1.0}, "dual_softmax": {}}
    matchers = {name: create_matcher(name, {**given, "max_matches": 0}) for name, given in options.items()}
    work: dict[str, Callable[[], Pairs]] = {
        "torch": lambda: plain(x, y, transposed=False),
        "torch, transposed": lambda: plain(x, y, transposed=True),
        **{name: lambda match=match: pairs(match, a, b) for name, match in matchers.items()},
    }
    best = dict.fromkeys(work, (float("inf"), float("inf")))
    for _ in range(TURNS):
        for name, one in work.items():
            took = measure(one)
            best[name] = min(best[name][0], took[0]), min(best[name][1], took[1])
    different = len(work["mutual"]() ^ work["torch"]())
    print(f"{side**2:,} x {side**2:,} tokens of {d}, one thread; mutual and torch differ in {different} pairs")
    for name, took in best.items():
        line = f"{name:<20}{1000 * took[0]:>8.1f} ms, {1000 * took[1]:>8.1f} ms of the processor"
        if name in matchers:
            clock, cpu = (mine / theirs for mine, theirs in zip(took, best["torch"], strict=True))
            line += f": {clock:.2f} and {cpu:.2f} times torch's" + (f" (bar {BAR})" if name != "dual_softmax" else "")
            line += f", {took[0] / best['torch, transposed'][0]:.2f} times the transposed one's clock"
        print(line)
    print()


def memory() -> None:
    """The peak of a process that makes the tokens and matches them, for each matcher one of its own."""
    side, d = LARGE
    print(f"{side**2:,} x {side**2:,} tokens of {d}; the matrix alone would be {4 * side**4 / 2**30:.2f} GB")
    for name in MATCHERS:
        process = multiprocessing.get_context("spawn").Process(target=peak, args=(name,))
        process.start()
        process.join()


def peak(name: str) -> None:
    """Match once, and print what it took."""
    a, b = photographs(*LARGE)
    started = time.perf_counter()
    n = len(create_matcher(name)(a, b))
    gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:<14}{n:>6} matches, {time.perf_counter() - started:5.1f} s, peak {gigabytes:.2f} GB (bar 1)")


def plain(a: torch.Tensor, b: torch.Tensor, transposed: bool) -> Pairs:
    """Mutual nearest neighbours as they are often written, with what the ratio test would need."""
    cosine = a @ b.T
    of_a = cosine.topk(2, dim=1).indices[:, 0]
    of_b = cosine.T.contiguous().topk(2, dim=1).indices[:, 0] if transposed else cosine.topk(2, dim=0).indices[0]
    rows = torch.nonzero(of_b[of_a] == torch.arange(len(a))).ravel()
    return set(zip(rows.tolist(), of_a[rows].tolist(), strict=True))


def pairs(match: Matcher, a: Tokens, b: Tokens) -> Pairs:
    """What a matcher finds."""
    matches = match(a, b)
    return set(zip(matches.index_a.tolist(), matches.index_b.tolist(), strict=True))


def measure(work: Callable[[], Pairs]) -> tuple[float, float]:
    """Seconds a pair on the clock and of the processor."""
    started = time.perf_counter(), time.process_time()
    for _ in range(IN_A_ROW):
        work()
    return (time.perf_counter() - started[0]) / IN_A_ROW, (time.process_time() - started[1]) / IN_A_ROW


def photographs(side: int, d: int) -> tuple[Tokens, Tokens]:
    """Tokens on two grids of side x side: B holds most of A's, changed a little and in another order."""
    rng = np.random.default_rng(0)
    n = side**2
    a = rng.standard_normal((n, d), dtype=np.float32)
    b = a[rng.permutation(n)] + 0.7 * rng.standard_normal((n, d), dtype=np.float32)
    b[: n // 4] = rng.standard_normal((n // 4, d), dtype=np.float32)
    xy = np.stack(np.meshgrid(*2 * [16 * np.arange(side, dtype=np.float32) + 7.5]), axis=2).reshape(-1, 2)
    vector = np.ones(1, np.float32)
    return Tokens(vector, a, xy, (side, side)), Tokens(vector, b, xy, (side, side))


if __name__ == "__main__":
    main()
