"""Kill a redis-server at random moments while messages are sent, start it again, send again, and count what is lost.

    .venv/bin/python -m tests.drills.redis_kills [--n 30] [--evicting 6] [--seed 0]

A real server that writes every command to its disk. After each kill `imatch.steps.send` is called once more, as `imatch
send` does, and every message and event of the step has to be there. Then servers that evict what they hold when they
are full: what is not there after "sent" must have been said.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
import warnings
from pathlib import Path
from threading import Timer

from imatch.core.step import Step
from imatch.core.types import ImatchError, ImatchWarning
from imatch.steps import send
from tests.drills.tally import Tally, asked, quiet
from tests.test_redis import EVENTS, Server, everything_is_there, index_step, kept

MESSAGES = 3000
EVICTING = ("allkeys-lru", "volatile-lru", "allkeys-random", "volatile-ttl", "allkeys-lfu", "volatile-random")


def main() -> None:
    """Kill, send again, count; let a full server evict; print one line of figures."""
    given, tally = asked(__doc__, n=30, evicting=len(EVICTING)), Tally()
    chance, within = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "server").start()
        os.environ["REDIS_URL"] = server.url
        names = [f"{i:04d}.jpg" for i in range(MESSAGES)]
        whole = step_of(Path(folder) / "whole", names)
        sent(whole)  # once for what is imported by it
        started = time.monotonic()
        sent(whole)
        took = time.monotonic() - started
        for kill in range(given.n):
            with server.client() as client:
                client.flushall()
            step = step_of(Path(folder) / str(kill), names)
            timer = Timer(chance.uniform(0, took), server.process.kill)
            timer.start()
            told = sent(step)
            timer.join()
            server.kill()
            server.start()
            within += bool(told)
            with server.client() as client:
                there = client.xlen(EVENTS)
                if not told and there < MESSAGES:
                    tally.fault("lost", "killed", f"kill {kill}: sent was said, {MESSAGES - there} events are missing")
                told = sent(step)
                try:
                    everything_is_there(client, step)
                except AssertionError as error:
                    tally.fault("lost", "sent again", f"kill {kill}: {told} {error}"[:200])
        server.kill()
        for policy in EVICTING[: given.evicting]:
            evict(Path(folder), policy, names, tally)
    figures = f"{given.n} kills of a Redis server ({within} while messages were sent), {tally.counted()}"
    tally.end(figures, "lost")


def step_of(folder: Path, names: list[str]) -> Step:
    """A finished search of so many queries."""
    with quiet():
        return index_step(folder, names)


def sent(step: Step) -> str:
    """Send; what was said against it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ImatchWarning)
        try:
            with quiet():
                send(step, ttl=1000)
        except ImatchError as error:
            return str(error)
    return "; ".join(str(one.message) for one in told)


def evict(folder: Path, policy: str, names: list[str], tally: Tally) -> None:
    """Send to a server that has no place for all of it, and drops what it had to keep what comes."""
    server = Server(folder / policy, "--maxmemory-policy", policy, "--appendonly", "no").start()
    os.environ["REDIS_URL"] = server.url
    step = step_of(folder / f"to {policy}", names)
    with server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 2**20)
        told = sent(step)
        missing = MESSAGES - len(kept(client)), MESSAGES - client.xlen(EVENTS)
    server.kill()
    tally.counts["evicting servers, said" if told else "evicting servers, not said"] += 1
    if any(missing) and not told:
        lost = f"sent was said, and {missing[0]} messages and {missing[1]} events are not there"
        tally.fault("lost", f"evicted by {policy}", lost)


if __name__ == "__main__":
    main()
