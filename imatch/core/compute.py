"""Who does the work: jobs in, rows out, by this process, by others, or by the machines of a Dask cluster."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import pickle
import re
import signal
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Annotated, Any, Generic, Protocol, TypeVar

import psutil
from pydantic import Field, PositiveInt
from threadpoolctl import threadpool_limits

from imatch.core import config, settings
from imatch.core.types import ImatchError

if TYPE_CHECKING:
    from distributed import Client


def resolved(device: str) -> str:
    """A device by name: "auto" is the GPU, if there is one.

    Raises:
        ImatchError: it is not there, or no device that imatch knows.

    >>> resolved("cpu")
    'cpu'
    """
    check_device(device)
    if device == "cpu":
        return device
    import torch  # which takes a second, and only a GPU needs it

    if device == "auto":  # device_count, for is_available would keep processes forked later from using the GPU
        return "cuda" if torch.cuda.device_count() else "cpu"
    if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ImatchError(f"device {device} is not there, torch sees {torch.cuda.device_count()} GPUs: use auto or cpu")
    return device


def check_device(device: str) -> None:
    """Refuse what is no device, here or anywhere.

    >>> check_device("cuda:1")
    """
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", device):
        raise ImatchError(f"device {device!r} is not known: use auto, cpu, cuda or cuda:1")


GROUPS, LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux says in which groups this process is, and what they may take."""


def free_memory(device: str = "cpu") -> int:
    """Bytes that are free on a device: a GPU's own memory, or what the machine, the limits of the container (of Docker,
    Kubernetes, Slurm) and that of the process (`ulimit -v`) leave this process, whichever is least.

    >>> free_memory() > 0
    True
    """
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()  # what torch keeps for later is free, too
        return int(torch.cuda.mem_get_info(device)[0])
    left = [psutil.virtual_memory().available, *_left_by_groups()]
    if os.name == "posix":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        left += [limit - psutil.Process().memory_info().vms] if limit != resource.RLIM_INFINITY else []
    return max(0, min(left))


def _left_by_groups() -> Iterator[int]:
    """What each control group of this process has left, in version 2 and 1; psutil knows the host's memory alone."""
    for line in GROUPS.read_text().splitlines() if GROUPS.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = LIMITS / "memory" if kinds else LIMITS
        limit, used, file = ("limit_in_bytes", "usage_in_bytes", "total_") if kinds else ("max", "current", "")
        inner = root / path.lstrip("/")
        for group in (inner, *inner.parents):  # in a container the path can be the host's: then the root tells
            with suppress(OSError, ValueError):  # a group that is not there, or above all; and "max"
                most, taken = (int((group / f"memory.{name}").read_text()) for name in (limit, used))
                told = dict(pair.split() for pair in (group / "memory.stat").read_text().splitlines())
                kept = sum(int(told.get(f"{file}{which}_file", 0)) for which in ("active", "inactive"))  # of files
                yield most - taken + kept


OWN = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG}
    | {errno.EINVAL, errno.ENXIO}
)
"""What the system says of a file that is itself at fault; all else is of the disk, the network or this process."""
NO_MEMORY = (
    *("memoryerror", "outofmemory", "out of memory", "insufficient memory", "bad alloc", "bad_alloc"),
    *("can't allocate", "cannot allocate", "can't start new thread"),
)
"""How Python, OpenCV, Pillow, torch and OpenVINO say it, each in an error of its own."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, or room for another thread, has run out.

    >>> out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")), out_of_memory(ValueError("no"))
    (True, False)
    """
    told = error.strerror if isinstance(error, OSError) and error.strerror else error  # not the name of the file
    return any(words in f"{type(error).__name__}: {told}".lower() for words in NO_MEMORY)


def passing(error: BaseException) -> bool:
    """Whether an error that came with a file is no fault of the file: the same can go well on the next run.

    >>> passing(OSError(errno.EIO, "Input/output error")), passing(OSError(errno.EACCES, "Permission denied"))
    (True, False)
    """
    number = error.errno if isinstance(error, OSError) else None
    return out_of_memory(error) or (number is not None and number not in OWN)


T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int, depth: int) -> Generator[R, None, None]:
    """`function(item)` for every item, in order, computed by threads some items ahead.

    Args:
        function: releases Python's lock for most of its time, as decoders do; what it raises ends the loop.
        items: may come one by one; they are taken in this thread.
        workers: threads; 0 runs here.
        depth: results that wait at most.

    >>> list(ahead(abs, [-1, 2], workers=2, depth=4))
    [1, 2]
    """
    if not workers:
        yield from map(function, items)
        return
    pool, waiting = ThreadPoolExecutor(workers), deque[Future[R]]()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            del item  # not to be held while the next one comes
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def progress(items: Iterable[T], what: str, total: int | None = None, delay: float = 1) -> Iterator[T]:
    """The items, with a progress bar (rate, time left) once they take longer than `delay` seconds.

    It goes to standard output, which a notebook shows without alarm and batch passes on to its log.
    """
    from tqdm import tqdm

    return iter(tqdm(items, what, total, file=sys.stdout, mininterval=1, delay=delay, ncols=88))


@contextmanager
def without_opencv_threads() -> Iterator[None]:
    """End OpenCV's threads for a block; a process that is forked meanwhile would wait for ever to end them itself."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


ENGINES = {
    "local": "imatch.core.compute:Local",
    "processes": "imatch.core.compute:Processes",
    "dask": "imatch.core.compute:Dask",
}
PARTS = 16
"""Parts for each process, so that none waits long for a slower one."""
LONG = 8
"""Jobs of a part at most: while one is written, the next is begun."""
TRIES = 3
"""So often a job is begun that ends its process each time."""
START, PATIENCE = 30, 300
"""Seconds that a scheduler of Dask may be away in the beginning, and later."""
Job = TypeVar("Job", contravariant=True)
Done = TypeVar("Done", covariant=True)


@dataclass(frozen=True)
class Place:
    """Where a part of the work is done.

    Attributes:
        device: where a network runs, as `compute.resolved` knows it.
        share: among how many such parts the machine's cores are divided.
        quiet: another process shows the bar.
    """

    device: str = "auto"
    share: int = 1
    quiet: bool = False

    def workers(self, asked: int) -> int:
        """How many helpers a part may have: those asked for (-1 is one a core) divided among the parts.

        >>> Place(share=2).workers(4), Place().workers(-1) == settings.cores()
        (2, True)
        """
        return -(-(settings.cores() if asked < 0 else asked) // self.share)


class Work(Protocol[Job, Done]):
    """A long loop; picklable, as its jobs are."""

    @property
    def what(self) -> str:
        """The bar's label, such as "embed"."""

    def done(self, job: Job) -> bool:
        """Whether a job's result is on disk."""

    def __call__(self, jobs: Sequence[Job], place: Place) -> Iterator[Done]:
        """Do the jobs and yield the row of each when its result is on disk, in order. A row is small and plain: no
        arrays. It is lost where a process is killed between writing and handing over."""


class Engine(Protocol):
    """What imatch asks of an engine. Its options are the fields of its frozen dataclass."""

    @property
    def shard(self) -> str:
        """Which part of the jobs to do, such as "0/3"; "" is all."""

    def __call__(self, work: Work[T, R], jobs: Sequence[T], devices: Sequence[str]) -> Iterator[R]:
        """Do all jobs and yield their rows as they come, in any order, with one progress bar.

        Args:
            work, jobs: see `Work`.
            devices: one for each part that this machine can take, such as ["cuda:0", "cuda:1"] or ["cpu"].

        Raises:
            ImatchError: what the work raises, or a job that ended its process again and again.
        """


class PartDoneError(ImatchError):
    """The part that `shard` asked for is done, others are not there yet. No failure."""


@dataclass(frozen=True)
class ComputeOptions:
    """Who does the work and where; no result depends on it.

    Attributes:
        devices: where a network runs: "auto" is all GPUs, else the CPU; or "cpu", "cuda:0,cuda:1".
        batch_size: photographs, or rotated queries, a forward pass.
        workers: threads that decode, or processes that match or make views; -1 is one a core, 0 none.
        engine: "local", or "processes", "dask": who does the work.
        scheduler: of dask: its address, such as "tcp://10.0.0.1:8786"; "" starts one here.
        shard: "" is all; or "0/8": this part of the work alone, for arrays of jobs (`imatch run --shard 0/8`).

    Raises:
        ImatchError: a number out of its range, an unknown engine, one that takes no scheduler, or a shard that is none.

    >>> ComputeOptions(shard="0/3").machines
    Local(shard='0/3')
    """

    devices: str = "auto"
    batch_size: PositiveInt = 8
    workers: Annotated[int, Field(ge=-1)] = -1
    engine: str = "local"
    scheduler: str = ""
    shard: str = ""

    def __post_init__(self) -> None:
        config.check(self, "compute")
        for device in self.devices.split(","):
            check_device(device.strip())
        numbered(self.shard)
        _ = self.machines

    @property
    def machines(self) -> Engine:
        """Who does the work."""
        options = {"scheduler": self.scheduler, "shard": self.shard}
        given = {name: value for name, value in options.items() if value}
        made: Engine = config.create(ENGINES, "engine", self.engine, given)
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


def do(engine: Engine, work: Work[T, R], jobs: Sequence[T], devices: Sequence[str]) -> Generator[R, None, None]:
    """Do those of the engine's part of the jobs that are not done yet; the rows as they come.

    Args:
        engine, work, devices: see `Engine`.
        jobs: all of them, those of other parts and those that are done included.

    Raises:
        PartDoneError: a part of the jobs was asked for, and is done. Parts never finish a step.
        ImatchError: what the engine raises, or jobs have given no row and are not done.
    """
    i, n = numbered(engine.shard)
    mine = [job for job in jobs[i::n] if not work.done(job)]
    rows = 0
    for row in engine(work, mine, devices) if mine else ():
        rows += 1
        yield row
    if rows < len(mine) and not all(map(work.done, mine)):
        raise ImatchError(f"{work.what}: only {rows} of {len(mine)} jobs came back: run the same command again")
    if engine.shard:
        missing = sum(not work.done(job) for job in jobs)
        others = f"{missing} of {len(jobs)} jobs are left to other parts" if missing else "so are all others"
        raise PartDoneError(
            f"{work.what}: part {engine.shard} is done, {others}. When all parts have ended, run the same once more "
            "without a shard: it goes on from there"
        )


@dataclass(frozen=True)
class Each(Generic[T, R]):
    """The work of a loop whose jobs have nothing to do with each other.

    Attributes:
        function: picklable; does a job and returns its row.
        done: whether a job's result is on disk.
        workers: processes that share the jobs where there is no more than one part on a machine; -1 is one a core.
        what: the bar's label.

    >>> list(Each(abs, bool, 0, "")([-1, 2], Place(quiet=True)))
    [1, 2]
    """

    function: Callable[[T], R]
    done: Callable[[T], bool]
    workers: int
    what: str

    def __call__(self, jobs: Sequence[T], place: Place) -> Iterator[R]:
        """See `Work`; rows of several processes come in any order."""
        if place.quiet:
            return map(self.function, jobs)
        if not self.workers:
            return progress(map(self.function, jobs), self.what, len(jobs))
        n = min(place.workers(self.workers), len(jobs))
        places = [Place("cpu", settings.cores(), quiet=True)] * n  # a core each
        return _shared(self, jobs, partial(_processes, self, places, None))


@dataclass(frozen=True)
class Local:
    """This process does all jobs, one after the other, with the helpers that the work brings.

    Attributes:
        shard: "i/n", or "" for all.
    """

    shard: str = ""

    def __call__(self, work: Work[T, R], jobs: Sequence[T], devices: Sequence[str]) -> Iterator[R]:
        """See `Engine`; of the devices the first is used."""
        return work(jobs, Place(devices[0]))


LOCAL = Local()
"""The engine of a loop that nobody gave another one."""


@dataclass(frozen=True)
class Processes:
    """One process for each device. When one is killed, new ones do what is not done yet.

    Attributes:
        shard: "i/n", or "" for all.
    """

    shard: str = ""

    def __call__(self, work: Work[T, R], jobs: Sequence[T], devices: Sequence[str]) -> Iterator[R]:
        """See `Engine`."""
        n = min(len(devices), len(jobs))
        places = [Place(device, n, quiet=True) for device in devices[:n]]
        return _shared(work, jobs, partial(_processes, work, places, "spawn"))


class _LostError(Exception):
    """An executor broke: what is said of it, and what is to be done when it does so again and again."""


_Submit = Callable[[list[T]], Future[list[R]]]
"""Gives a part of the jobs to an executor, and gets their rows from it."""
_Opened = Callable[[], AbstractContextManager[tuple[_Submit[T, R], int]]]
"""Opens an executor; it has so many workers."""


def _shared(work: Work[T, R], jobs: Sequence[T], opened: _Opened[T, R]) -> Iterator[R]:
    return progress(_rows(work, jobs, opened), work.what, len(jobs), delay=0)


def _rows(work: Work[T, R], jobs: Sequence[T], opened: _Opened[T, R]) -> Iterator[R]:
    """Do the jobs part by part; an executor that broke is opened again for what is not on disk yet."""
    left, tries = [*range(len(jobs))], Counter[int]()
    while left:
        going: dict[Future[list[R]], list[int]] = {}
        came, workers = set[int](), 0
        try:
            with opened() as (submit, workers):
                n = max(1, min(LONG, len(left) // (PARTS * workers)))
                for first in range(0, len(left), n):
                    part = left[first : first + n]
                    going[submit([jobs[i] for i in part])] = part
                for future in as_completed(going):
                    yield from future.result()
                    came.update(going.pop(future))
            return
        except ImatchError as error:  # for the user, so it comes without the worker's traceback
            raise error from None
        except _LostError as lost:
            left = [i for i in left if i not in came and not work.done(jobs[i])]
            begun = filter(None, map({*left}.intersection, going.values()))  # in the order given
            at = [min(part) for part in itertools.islice(begun, workers)] or [-1]
            said, remedy = lost.args
            if not (going or tries) or any(tries[i] == TRIES - 1 for i in at):
                why = f"{work.what}: {remedy}, and run it again, it goes on where it stopped"
                raise ImatchError(why) from lost.__cause__
            tries.update(at)
            print(f"{work.what}: {said}", flush=True)


@contextmanager
def _processes(work: Work[T, R], places: Sequence[Place], start: str | None) -> Iterator[tuple[_Submit[T, R], int]]:
    """Open processes, one for each place; they end with this one, or when something ends the block."""
    context = get_context(start)
    free, (theirs, ours) = context.SimpleQueue(), context.Pipe(duplex=False)
    for place in places:
        free.put(place)
    pool = ProcessPoolExecutor(len(places), context, _begin, (work, free, theirs, ours))
    try:
        with theirs, ours:
            with without_opencv_threads():
                pool.submit(int)  # the first one starts those that are forked
            yield lambda part: pool.submit(_part, part), len(places)
            pool.shutdown()
    except BrokenProcessPool as error:
        raise _LostError(
            "a process ended too early, a new one does its work",
            f"a process was killed {TRIES} times at the same place, mostly for want of memory: use fewer workers or "
            "devices, or a smaller batch_size (if it could not start, its words stand above: a script needs "
            '`if __name__ == "__main__":`)',
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_mine: list[Any] = []
"""In such a process: the work, which keeps what it has loaded (a model, open stores), and its place."""


def _begin(work: Work[T, R], free: SimpleQueue[Place], theirs: Connection, ours: Connection) -> None:
    """Take a place; end with the process above, which alone holds `ours`, and which alone is interrupted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ours.close()
    Thread(target=_end_with, args=(theirs,), daemon=True).start()
    place = free.get()
    _take_cores(place)
    _mine[:] = work, place


def _end_with(pipe: Connection) -> None:
    pipe.poll(None)
    os._exit(1)


def _part(jobs: Sequence[T]) -> list[R]:
    work, place = _mine
    return _told(partial(work, jobs, place))


def _told(rows: Callable[[], Iterator[R]]) -> list[R]:
    """The rows, or an error that can be sent; where it came from is in its notes."""
    try:
        return list(rows())
    except ImatchError as error:
        told = error
    except Exception as error:
        told = ImatchError(f"{type(error).__name__}: {error}")
        told.add_note("".join(traceback.format_exception(error)))
    told.__cause__ = told.__context__ = None
    raise told


def _take_cores(place: Place) -> None:
    """Let the libraries that are loaded, and those that will be, use a place's share of the cores."""
    n = max(1, settings.cores() // place.share)
    settings.take_cores(n)
    threadpool_limits(n, user_api="blas")
    limits = {"torch": "set_num_threads", "faiss": "omp_set_num_threads", "cv2": "setNumThreads"}
    for name in limits.keys() & sys.modules.keys():
        getattr(sys.modules[name], limits[name])(n)


@dataclass(frozen=True)
class Dask:
    """Workers that write to the same disk as this process, under the same paths. Dask gives the part of a killed one to
    another; when the scheduler is gone, what is missing is asked for again as soon as it is back.

    Attributes:
        scheduler: its address, such as "tcp://10.0.0.1:8786"; "" starts one here, with a worker for each device.
        shard: "i/n", or "" for all.

    Raises:
        ImatchError: Dask is not installed.
    """

    scheduler: str = ""
    shard: str = ""

    def __post_init__(self) -> None:
        try:
            import distributed  # noqa: F401
        except ImportError as error:
            raise ImatchError("engine dask needs Dask: pip install 'imatch[dask]'") from error

    def __call__(self, work: Work[T, R], jobs: Sequence[T], devices: Sequence[str]) -> Iterator[R]:
        """See `Engine`; the devices of a cluster's workers are their own."""
        patience = itertools.chain([START], itertools.repeat(PATIENCE))
        return _shared(work, jobs, partial(self._opened, work, pickle.dumps(work), devices, patience))

    @contextmanager
    def _opened(
        self, work: Work[T, R], pickled: bytes, devices: Sequence[str], patience: Iterator[int]
    ) -> Iterator[tuple[_Submit[T, R], int]]:
        from distributed.scheduler import KilledWorker

        try:
            seconds = next(patience)
            with self._client(len(devices), seconds) as client:
                client.wait_for_workers(1, timeout=seconds)
                workers = client.scheduler_info(n_workers=-1)["workers"].values()
                print(f"{work.what}: {len(workers)} workers, look at {client.dashboard_link}", flush=True)
                share = max(Counter(one["host"] for one in workers).values())
                theirs = ["auto"] if self.scheduler else devices
                places = [Place(device, share, quiet=True) for device in theirs]
                submit = client.get_executor(pure=False).submit
                yield lambda part: submit(_remote, pickled, places, part), len(workers)
        except KilledWorker as error:
            raise ImatchError(
                f"{work.what}: {TRIES} workers were killed at the same jobs, mostly for want of memory ({error}): "
                "give them more, or use a smaller batch_size, and run it again, it goes on where it stopped"
            ) from error
        except (CancelledError, asyncio.CancelledError, OSError) as error:  # the work raises neither
            where = self.scheduler or "this machine"
            remedy = f"no scheduler with workers at {where} ({error}): start them, or correct scheduler"
            raise _LostError("the scheduler is gone, waiting for it", remedy) from error

    def _client(self, workers: int, patience: float) -> Client:
        import dask
        from distributed import Client

        if self.scheduler:
            return Client(self.scheduler, timeout=patience)
        with dask.config.set({"distributed.scheduler.allowed-failures": TRIES - 1}):
            return Client(n_workers=workers, threads_per_worker=1, dashboard_address=":0")


_one = Lock()
"""A worker of Dask does one part at a time."""


def _remote(pickled: bytes, places: Sequence[Place], jobs: Sequence[T]) -> list[R]:
    """On a worker; one that was started here has a number for its name. What a killed one had written stays."""
    from distributed import get_worker

    place = places[0] if len(places) == 1 else places[int(get_worker().name)]

    def rows() -> Iterator[R]:
        with _one:
            _take_cores(place)
            work = _unpickled(pickled)
            yield from work([job for job in jobs if not work.done(job)], place)

    return _told(rows)


@lru_cache(maxsize=1)
def _unpickled(pickled: bytes) -> Work[Any, Any]:
    """As `_mine`."""
    work: Work[Any, Any] = pickle.loads(pickled)
    return work
