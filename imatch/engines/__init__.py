"""Where the long loops run: in this process, in several of this machine, or on a cluster. An engine is one class in one
file and one line here.

A loop is a picklable `Work`: jobs in, one row for each out. A job says what to do, the work writes the result to disk
itself, atomically, and the row only says that it is there. Doing a job again changes nothing, so an engine may do it
twice, elsewhere, or go on tomorrow: the bytes are the same.
"""

from __future__ import annotations

import pickle
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Protocol, TypeVar

from threadpoolctl import threadpool_limits

from imatch import plugins, registry, runs
from imatch.records import ImatchError
from imatch.store import Row

ENGINES = {
    "local": "imatch.engines.local:Local",
    "processes": "imatch.engines.processes:Processes",
    "dask": "imatch.engines.dask:Dask",
}
TRIES = 3
"""So often a job is begun: one that ends its process each time would end all of them."""

Job = TypeVar("Job", contravariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a part of the work is done.

    Attributes:
        device: where a network runs, as `devices.resolved` knows it.
        share: among how many such parts the machine's cores are divided.
        quiet: another process shows the bar.
    """

    device: str = "auto"
    share: int = 1
    quiet: bool = False

    def workers(self, asked: int) -> int:
        """How many helpers a part may have: those asked for (-1 is one a core) divided among the parts.

        >>> Place(share=2).workers(4), Place().workers(-1) == registry.cores()
        (2, True)
        """
        return -(-(registry.cores() if asked < 0 else asked) // self.share)


class Work(Protocol[Job]):
    """A long loop."""

    def __call__(self, jobs: Iterable[Job], place: Place) -> Iterator[Row]:
        """Do the jobs, which may come one by one, and yield the row of each when its result is on disk, in order. A row
        is small and plain: no arrays."""


class Engine(Protocol):
    """What imatch asks of an engine. Its options are the fields of its frozen dataclass."""

    @property
    def shard(self) -> str:
        """Which part of the jobs to do, such as "0/3"; "" is all."""

    def __call__(self, work: Work[T], jobs: Sequence[T], what: str, devices: Sequence[str]) -> Iterator[Row]:
        """Do all jobs and yield their rows as they come, in any order, with one progress bar.

        Args:
            work: picklable.
            jobs: picklable.
            what: the bar's label, such as "embed".
            devices: one for each part that this machine can take, such as ["cuda:0", "cuda:1"] or ["cpu"].

        Raises:
            ImatchError: what the work raises, or a job that ended its process again and again.
        """


class PartDoneError(ImatchError):
    """The part that `shard` asked for is done, others are not there yet. No failure."""


def create(engine: str = "local", scheduler: str = "", shard: str = "", on_change: str = "refuse") -> Engine:
    """Make an engine.

    Args:
        engine: "local", "processes" or "dask".
        scheduler: of dask, the scheduler's address; "" starts one here, with a worker for each device.
        shard: "i/n", to do only every n-th job from the i-th on, as in an array of SLURM jobs; "" is all.
        on_change: as the step will be given it: parts may not "recompute", each would remove the others' work.

    Raises:
        ImatchError: an unknown engine, one that takes no scheduler, a shard that is none, or parts that recompute.

    >>> create("local", shard="0/3").shard
    '0/3'
    """
    given = {name: value for name, value in (("scheduler", scheduler), ("shard", shard)) if value}
    made: Engine = plugins.create(ENGINES, "engine", engine, given)
    check_parts(shard, on_change)
    return made


def check_parts(shard: str, on_change: str) -> None:
    """Refuse parts that cannot be.

    Raises:
        ImatchError: the shard is no i/n, or on_change is "recompute": each would remove the others' work.

    >>> check_parts("0/3", "refuse"), check_parts("", "recompute")
    (None, None)
    """
    numbered(shard)
    if shard and on_change == "recompute":
        raise ImatchError("parts cannot make a step anew, each would remove the others' work: run it without a shard")


def numbered(shard: str) -> tuple[int, int]:
    """The i and n of a shard "i/n"; (0, 1) of "".

    Raises:
        ImatchError: it is not of this form, or i is not below n.

    >>> numbered("2/3"), numbered("")
    ((2, 3), (0, 1))
    """
    first, _, of = (shard or "0/1").partition("/")
    if not (first.isdecimal() and of.isdecimal() and int(first) < int(of)):
        raise ImatchError(f"shard {shard!r} is no i/n: use 0/{of or 3}, 1/{of or 3}, ... with i from 0 to n - 1")
    return int(first), int(of)


def do(
    engine: Engine,
    work: Work[T],
    jobs: Sequence[T],
    what: str,
    devices: Sequence[str],
    done: Callable[[T], bool],
) -> Iterator[Row]:
    """Do those of the engine's part of the jobs that are not done yet; the rows as they come.

    Args:
        engine, work, what, devices: see `Engine`.
        jobs: all of them, those of other parts and those that are done included.
        done: whether a job's result is on disk.

    Raises:
        PartDoneError: a part of the jobs was asked for, and is done. Parts never finish a step, for each of them may
            think that it is the last one.
        ImatchError: what the engine raises, or it gave back fewer rows than it had jobs.
    """
    i, n = numbered(engine.shard)
    mine = [job for job in jobs[i::n] if not done(job)]
    rows = 0
    for row in engine(work, mine, what, devices) if mine else ():
        rows += 1
        yield row
    if rows != len(mine):
        raise ImatchError(f"{what}: only {rows} of {len(mine)} jobs came back: run the same command again")
    if engine.shard:
        missing = sum(not done(job) for job in jobs)
        others = f"{missing} of {len(jobs)} jobs are left to other parts" if missing else "so are all others"
        raise PartDoneError(
            f"{what}: part {engine.shard} is done, {others}. When all parts have ended, run the same once more without "
            "a shard: it goes on from there"
        )


def each(function: Callable[[T], Row], workers: int, what: str) -> Work[T]:
    """The work of a loop whose jobs have nothing to do with each other.

    Args:
        function: picklable; does a job and returns its row.
        workers: processes that share the jobs where there is no more than one part on a machine; -1 is one a core.
        what: the bar's label.

    >>> list(each(abs, 0, "")([-1, 2], Place(quiet=True)))
    [1, 2]
    """
    return _Each(function, workers, what)


@dataclass(frozen=True)
class _Each:
    function: Callable[[Any], Row]
    workers: int
    what: str

    def __call__(self, jobs: Iterable[Any], place: Place) -> Iterator[Row]:
        if place.quiet:
            return map(self.function, jobs)
        jobs = list(jobs)
        if not self.workers:
            return runs.progress(map(self.function, jobs), self.what, len(jobs))
        return runs.parallel(self.function, jobs, self.workers, self.what)


# --- for engines that work elsewhere ----------------------------------------------------------------------

_one = Lock()


def part(pickled: bytes, jobs: Iterable[Any], place: Place) -> Iterator[Row]:
    """Do jobs in a process that works for another one: on its share of the cores, one part at a time."""
    with _one:
        _take_cores(max(1, registry.cores() // place.share))
        yield from _unpickled(pickled)(jobs, place)


def portable(error: Exception) -> ImatchError:
    """An error that another process can raise: not every exception can be pickled. Where it came from is in its notes.

    >>> portable(ValueError("no number"))
    ImatchError('ValueError: no number')
    """
    told = error if isinstance(error, ImatchError) else ImatchError(f"{type(error).__name__}: {error}")
    told.add_note("".join(traceback.format_exception(error)))
    return told


@lru_cache(maxsize=1)
def _unpickled(pickled: bytes) -> Work[Any]:
    """The work, which keeps what it has loaded (a model, open stores) from part to part."""
    work: Work[Any] = pickle.loads(pickled)
    return work


def _take_cores(n: int) -> None:
    """numpy, torch, FAISS and OpenCV use so many threads, those that are loaded now and those that will be: torch alone
    takes seconds to load, and not every work needs it."""
    registry.take_cores(n)
    threadpool_limits(n, user_api="blas")
    for name, limit in (("torch", "set_num_threads"), ("faiss", "omp_set_num_threads"), ("cv2", "setNumThreads")):
        if name in sys.modules:
            getattr(sys.modules[name], limit)(n)
