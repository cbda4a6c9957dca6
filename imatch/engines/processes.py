"""Several processes of this machine."""

from __future__ import annotations

import pickle
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from imatch import runs
from imatch.engines import TRIES, Place, Work, part, portable
from imatch.records import ImatchError
from imatch.store import Row

T = TypeVar("T")
ASK = "ask"
"""What a process sends to get its next job."""


@dataclass(frozen=True)
class Processes:
    """One process for each device. Each asks for its next job when it gets to it, so that none waits for a slower one.
    The jobs of one that was killed are given to a new one.

    Attributes:
        shard: "i/n", or "" for all.
    """

    shard: str = ""

    def __call__(self, work: Work[T], jobs: Sequence[T], what: str, devices: Sequence[str]) -> Iterator[Row]:
        """See `Engine`."""
        n = min(len(devices), len(jobs))
        places = [Place(device, n, quiet=True) for device in devices[:n]]
        return runs.progress(_rows(pickle.dumps(work), jobs, what, places), what, len(jobs), delay=0)


def _rows(pickled: bytes, jobs: Sequence[Any], what: str, places: Sequence[Place]) -> Iterator[Row]:
    todo, tries = deque(enumerate(jobs)), Counter[int]()
    running: list[_Process] = []
    try:
        for place in places:
            running.append(_Process(pickled, place))
        while running:
            for pipe in wait([one.pipe for one in running]):
                one = next(one for one in running if one.pipe is pipe)
                try:
                    said = one.pipe.recv()
                except (EOFError, OSError):
                    running.remove(one)
                    if one.ended():
                        continue
                    one.count(tries)
                    print(f"{what}: {one} ended too early, a new one does its work", flush=True)
                    todo.extendleft(reversed(one.given))
                    running.append(_Process(pickled, one.place))
                    continue
                if isinstance(said, BaseException):
                    raise said
                if said == ASK:
                    one.give(todo)
                else:
                    one.given.popleft()
                    yield said
    finally:
        for one in running:
            one.process.terminate()
            one.process.join()


class _Process:
    """A process, the pipe to it, and the jobs that it was given and has not done yet, with their numbers."""

    def __init__(self, pickled: bytes, place: Place) -> None:
        context = get_context("spawn")
        self.place, self.given = place, deque[tuple[int, Any]]()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(pickled, place, theirs), name=place.device)
        self.process.start()
        theirs.close()  # so that the pipe ends when the process does

    def give(self, todo: deque[tuple[int, Any]]) -> None:
        """Send it the next job, or None when there is none."""
        job = None
        if todo:
            self.given.append(todo.popleft())
            job = self.given[-1][1]
        try:
            self.pipe.send(job)
        except OSError:  # killed meanwhile: the next look at the pipe says so
            return

    def ended(self) -> bool:
        """Whether it ended because it had nothing left to do."""
        self.process.join()
        return self.process.exitcode == 0 and not self.given

    def count(self, tries: Counter[int]) -> None:
        """Raise ImatchError when the job that it was at, or its start, has ended as many processes as it may."""
        number = self.given[0][0] if self.given else -1
        tries[number] += 1
        if tries[number] == TRIES:
            why = "was killed, mostly for want of memory: use fewer devices or a smaller batch_size"
            if (self.process.exitcode or 0) > 0:
                why = 'could not start; its words stand above (in a script of your own, `if __name__ == "__main__":`?)'
            raise ImatchError(
                f"{self}, as {TRIES - 1} before it at the same place, {why}. Run it again, it goes on where it stopped"
            )

    def __str__(self) -> str:
        return f"the process on {self.place.device} (exit code {self.process.exitcode})"


def _serve(pickled: bytes, place: Place, pipe: Connection) -> None:
    """In the process: do jobs and send their rows until there are no more. When the process above is gone, the pipe
    breaks, and this one ends with its next row."""

    def tell(message: object) -> None:
        try:
            pipe.send(message)
        except OSError:
            raise SystemExit from None

    def asked() -> Iterator[Any]:
        while True:
            tell(ASK)
            try:
                job = pipe.recv()
            except (EOFError, OSError):
                raise SystemExit from None
            if job is None:
                return
            yield job

    try:
        for row in part(pickled, asked(), place):
            tell(row)
    except KeyboardInterrupt:  # the process above was interrupted, too, and says so
        return
    except Exception as error:  # whatever it is, the process that the user sees raises it
        tell(portable(error))
