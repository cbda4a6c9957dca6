"""Kill a redis-server at random moments while messages are sent, start it again, send again, and count what is lost.

    .venv/bin/python -m tests.drills.redis_kills [--kills 30] [--seed 0]

A real server that writes every command to its disk. After each kill `imatch.steps.send` is called once more, as `imatch
send` does, and every message and event of the step has to be there.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from threading import Timer

from imatch.core.types import ImatchWarning
from imatch.steps import send
from tests.test_redis import EVENTS, Server, everything_is_there, index_step

MESSAGES = 3000


def main() -> None:
    """Kill, send again, count; print one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance, within, lost = random.Random(asked.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "server").start()
        os.environ["REDIS_URL"] = server.url
        names = [f"{i:04d}.jpg" for i in range(MESSAGES)]
        step = index_step(Path(folder) / "whole", names)
        started = time.monotonic()
        send(step, ttl=1000)
        took = time.monotonic() - started
        for kill in range(asked.kills):
            with server.client() as client:
                client.flushall()
            step = index_step(Path(folder) / str(kill), names)
            timer = Timer(chance.uniform(0, took), server.process.kill)
            timer.start()
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always", ImatchWarning)
                send(step, ttl=1000)
            timer.join()
            server.kill()
            server.start()
            within += bool(told)
            with server.client() as client:
                there = client.xlen(EVENTS)
                if not told and there < MESSAGES:
                    lost += 1
                    print(f"kill {kill}: sent was said, and {MESSAGES - there} events are not there")
                send(step, ttl=1000)
                try:
                    everything_is_there(client, step)
                except AssertionError as error:
                    lost += 1
                    print(f"kill {kill}: {error}")
        server.kill()
    print(f"{asked.kills} kills of a Redis server ({within} while messages were sent): {lost} lost")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
