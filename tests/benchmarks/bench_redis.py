"""How fast messages go to Redis against one SET after the other, as a ratio measured in one run.

    .venv/bin/python tests/benchmarks/bench_redis.py

10,000 messages of ten results go to a redis-server of its own on the loopback. The loop calls `client.set(key, payload,
ex=ttl)` for each, and makes no events; `retrieval.redis` sends the same SETs in pipelines, and an event for each. The
loop mostly waits for the server to wake up, so the ratio says something of the machine: it falls where other programs
keep the cores awake.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis

from imatch.core import settings
from imatch.retrieval.redis import PREFIX, Redis
from imatch.steps.sending import message

MESSAGES, RESULTS, TTL = 10_000, 10, 600
REPEATS = 5


def main() -> None:
    """Start a server, run the sides in turn, print the best of each."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", folder]
        server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        try:
            measure(f"redis://127.0.0.1:{port}/0")
        finally:
            server.kill()
            server.wait()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def measure(url: str) -> None:
    """Send the same messages by both sides, in turn, to an empty server."""
    messages, sink = make_messages(), Redis(url, TTL)
    with redis.Redis.from_url(url) as client:
        wait_for(client)

        def loop() -> None:
            for query, payload in messages:
                client.set(f"{PREFIX}:bench:{query}", payload, ex=TTL)

        def ours() -> None:
            for _ in sink("bench", messages):
                pass

        best: dict[str, float] = {}
        for _ in range(REPEATS):
            for name, side in (("one SET a message", loop), ("imatch.retrieval.redis", ours)):
                client.flushall()
                best[name] = min(best.get(name, float("inf")), seconds(side))
        events = client.xlen(f"{PREFIX}:bench:events")
    if events != MESSAGES:
        raise SystemExit(f"{events} events for {MESSAGES} messages")
    size = sum(len(payload) for _, payload in messages) / len(messages)
    print(f"{MESSAGES} messages of {size:.0f} bytes, {RESULTS} results each; batches of {sink.batch}")
    busy = f"{os.getloadavg()[0]:.1f} busy before"
    print(f"{settings.cores()} cores ({os.uname().machine}), {busy}; best of {REPEATS} turns each, in turn\n")
    print(f"{'':<20}{'seconds':>9}{'messages/s':>13}")
    for name, took in best.items():
        print(f"{name:<20}{took:>9.3f}{MESSAGES / took:>13,.0f}")
    print(f"\nimatch.retrieval.redis is {best['one SET a message'] / best['imatch.retrieval.redis']:.1f} times as fast")
    print(f"{Path(sys.executable).name} {' '.join(sys.argv)}")


def make_messages() -> list[tuple[str, bytes]]:
    """Messages as 03_index makes them, of a survey's names and chance scores."""
    chance = random.Random(0)
    results = {"weight": "vits16", "backend": "faiss-cpu", "dimension": 384, "k": RESULTS, "index_build_ms": 12.3}
    made = []
    for i in range(MESSAGES):
        hits = [
            {"rank": rank, "path": f"flight 1/DJI_{chance.randrange(10**6):06d}.jpg", "score": chance.random()}
            for rank in range(RESULTS)
        ]
        timing = {"embed": chance.random(), "search": chance.random(), "total": chance.random()}
        made.append((f"flight 2/DJI_{i:06d}.jpg", message(results, {"hits": hits, "timing_ms": timing})))
    return made


def wait_for(client: redis.Redis) -> None:
    """Return when the server answers."""
    for _ in range(100):
        try:
            client.ping()
        except redis.ConnectionError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit("redis-server does not answer")


def seconds(side: Callable[[], None]) -> float:
    """Run one side."""
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
