"""Who does the work: jobs in, rows out, by this process, by others, or by the machines of a Dask cluster."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from threading import Lock, Thread
from typing import TYPE_CHECKING, Annotated, Any, Generic, Protocol, TypeVar

from pydantic import Field, PositiveInt
from threadpoolctl import threadpool_limits

from imatch.core import config, settings
from imatch.core.types import ImatchError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from distributed import Client


def resolved(device: str) -> str:
    """A device by name: "auto" is the GPU, if there is one.

    Raises:
        ImatchError: it is not there, or no device that imatch knows.

    >>> resolved("cpu")
    'cpu'
    """
    if device == "cpu":
        return device
    import torch  # which takes a second, and only a GPU needs it

    if device == "auto":  # device_count, for is_available would keep processes forked later from using the GPU
        return "cuda" if torch.cuda.device_count() else "cpu"
    try:
        kind = torch.device(device or "none")
    except RuntimeError as error:
        raise ImatchError(f"device {device!r} is not known: use auto, cpu, cuda or cuda:1") from error
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ImatchError(f"device {device} is not there, torch sees {torch.cuda.device_count()} GPUs: use auto or cpu")
    if kind.type not in ("cpu", "cuda") or device.startswith("cpu:"):
        raise ImatchError(f"device {device!r} is not known: use auto, cpu, cuda or cuda:1")
    return device


K = TypeVar("K")
T = TypeVar("T")
R = TypeVar("R")


def parallel(function: Callable[[T], R], items: Sequence[T], workers: int, what: str) -> Iterator[R]:
    """`function(item)` for every item, in order, with a progress bar (rate, time left) on standard output.

    Args:
        function: picklable; what it raises ends the loop.
        items: picklable things.
        workers: processes; 0 runs here; -1 is one a core. At most two results a worker wait in memory.
        what: the bar's label, such as "embed".
    """
    workers = min(settings.cores() if workers < 0 else workers, len(items))
    if not workers:
        yield from progress(map(function, items), what, len(items), delay=0)
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(function,))
    try:
        with without_opencv_threads():
            pool.submit(int).result()  # the first job starts the processes
        yield from progress(_ordered(pool, _do, items, 2 * workers), what, len(items), delay=0)
    except BrokenProcessPool as error:
        raise ImatchError(
            f"{what}: a worker process was killed, mostly for want of memory: use fewer workers "
            "and run it again, it goes on where it stopped"
        ) from error
    except ImatchError as error:  # its message is for the user, so it comes without the worker's traceback
        raise error from None
    finally:
        pool.shutdown(cancel_futures=True)


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
    pool = ThreadPoolExecutor(workers)
    try:
        yield from _ordered(pool, function, items, depth)
    finally:
        pool.shutdown(cancel_futures=True)


def _ordered(pool: Executor, function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def overlapped(
    function: Callable[[T], R], items: Iterable[tuple[K, T]], pool: Executor
) -> Iterator[tuple[K, R, float, float]]:
    """`function(item)` for every item, in order, by a pool of one thread, while the next item is being made.

    Args:
        function: as of `ahead`.
        items: each with a key that stays beside it.
        pool: of one thread.

    Returns:
        For each item its key, its result, and when that began and ended (`time.perf_counter`).

    >>> with ThreadPoolExecutor(1) as pool:
    ...     [(key, result) for key, result, *_ in overlapped(abs, [("a", -1), ("b", 2)], pool)]
    [('a', 1), ('b', 2)]
    """
    going: deque[tuple[K, Future[R], float, list[float]]] = deque()
    free = 0.0  # since when the thread had nothing left to do
    for one in itertools.chain(items, [None]):
        if one is not None:
            ended: list[float] = []
            going.append((one[0], pool.submit(function, one[1]), time.perf_counter(), ended))
            going[-1][1].add_done_callback(partial(_put_time, ended))
        while len(going) > (0 if one is None else 1):
            key, future, asked, ended = going.popleft()
            result = future.result()
            began, free = max(asked, free), ended[0] if ended else time.perf_counter()  # it may be told a moment later
            yield key, result, began, free
            del key, future, result  # not to be held while the next item is made


def _put_time(times: list[float], _: Future[R]) -> None:
    times.append(time.perf_counter())


def progress(items: Iterable[T], what: str, total: int | None = None, delay: float = 1) -> Iterator[T]:
    """The items, with a progress bar (rate, time left) once they take longer than `delay` seconds.

    It goes to standard output, which a notebook shows without alarm and batch passes on to its log.
    """
    from tqdm import tqdm

    return iter(tqdm(items, what, total, file=sys.stdout, mininterval=1, delay=delay, ncols=88))


@contextmanager
def without_opencv_threads() -> Iterator[None]:
    """End OpenCV's threads for a block that has threads of its own, or that starts workers: a forked one would wait for
    ever to end them itself."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


_work: list[Callable[[Any], Any]] = []
"""What a worker process does; it is given it once, not with every item, for it may open stores."""


def _begin(function: Callable[[T], R]) -> None:
    """In a worker: one thread, and an end when the process above is gone. That one alone is interrupted."""
    _take_cores(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    _work[:] = [function]


def _end_with(above: BaseProcess) -> None:
    above.join()
    os._exit(1)


def _do(item: Any) -> Any:
    try:
        return _work[0](item)
    except ImatchError:
        raise
    except Exception as error:  # not every exception can be sent to another process
        raise portable(error) from None


ENGINES = {
    "local": "imatch.core.compute:Local",
    "processes": "imatch.core.compute:Processes",
    "dask": "imatch.core.compute:Dask",
}
TRIES = 3
"""So often a job is begun: one that ends its process each time would end all of them."""
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
    """A long loop."""

    def __call__(self, jobs: Iterable[Job], place: Place) -> Iterator[Done]:
        """Do the jobs, which may come one by one, and yield the row of each when its result is on disk, in order. A row
        is small and plain: no arrays."""


class Engine(Protocol):
    """What imatch asks of an engine. Its options are the fields of its frozen dataclass."""

    @property
    def shard(self) -> str:
        """Which part of the jobs to do, such as "0/3"; "" is all."""

    def __call__(self, work: Work[T, R], jobs: Sequence[T], what: str, devices: Sequence[str]) -> Iterator[R]:
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
        ImatchError: a number out of its range, or what `create_engine` refuses.
    """

    devices: str = "auto"
    batch_size: PositiveInt = 8
    workers: Annotated[int, Field(ge=-1)] = -1
    engine: str = "local"
    scheduler: str = ""
    shard: str = ""

    def __post_init__(self) -> None:
        config.check(self, "compute")
        _ = self.machines

    @property
    def machines(self) -> Engine:
        """Who does the work (`create_engine`)."""
        return create_engine(self.engine, self.scheduler, self.shard)


def create_engine(engine: str = "local", scheduler: str = "", shard: str = "", on_change: str = "refuse") -> Engine:
    """Make an engine.

    Args:
        engine: "local", "processes" or "dask".
        scheduler: of dask, the scheduler's address; "" starts one here, with a worker for each device.
        shard: "i/n", to do only every n-th job from the i-th on, as in an array of SLURM jobs; "" is all.
        on_change: as the step will be given it: parts may not "recompute", each would remove the others' work.

    Raises:
        ImatchError: an unknown engine, one that takes no scheduler, a shard that is none, or parts that recompute.

    >>> create_engine("local", shard="0/3").shard
    '0/3'
    """
    given = {name: value for name, value in (("scheduler", scheduler), ("shard", shard)) if value}
    made: Engine = config.create(ENGINES, "engine", engine, given)
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
    work: Work[T, R],
    jobs: Sequence[T],
    what: str,
    devices: Sequence[str],
    done: Callable[[T], bool],
) -> Generator[R, None, None]:
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


def each(function: Callable[[T], R], workers: int, what: str) -> Work[T, R]:
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
class _Each(Generic[T, R]):
    function: Callable[[T], R]
    workers: int
    what: str

    def __call__(self, jobs: Iterable[T], place: Place) -> Iterator[R]:
        if place.quiet:
            return map(self.function, jobs)
        jobs = list(jobs)
        if not self.workers:
            return progress(map(self.function, jobs), self.what, len(jobs))
        return parallel(self.function, jobs, self.workers, self.what)


_one = Lock()


def part(pickled: bytes, jobs: Iterable[T], place: Place) -> Iterator[Any]:
    """Do jobs in a process that works for another one: on its share of the cores, one part at a time."""
    with _one:
        _take_cores(max(1, settings.cores() // place.share))
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
def _unpickled(pickled: bytes) -> Work[Any, Any]:
    """The work, which keeps what it has loaded (a model, open stores) from part to part."""
    work: Work[Any, Any] = pickle.loads(pickled)
    return work


def _take_cores(n: int) -> None:
    """numpy, torch, FAISS and OpenCV use so many threads, those that are loaded now and those that will be: torch alone
    takes seconds to load, and not every work needs it."""
    settings.take_cores(n)
    threadpool_limits(n, user_api="blas")
    for name, limit in (("torch", "set_num_threads"), ("faiss", "omp_set_num_threads"), ("cv2", "setNumThreads")):
        if name in sys.modules:
            getattr(sys.modules[name], limit)(n)


@dataclass(frozen=True)
class Local:
    """This process does all jobs, one after the other, with the helpers that the work brings.

    Attributes:
        shard: "i/n", or "" for all.
    """

    shard: str = ""

    def __call__(self, work: Work[T, R], jobs: Sequence[T], what: str, devices: Sequence[str]) -> Iterator[R]:  # noqa: ARG002
        """See `Engine`; of the devices the first is used."""
        return work(jobs, Place(devices[0]))


LOCAL = Local()
"""The engine of a loop that nobody gave another one."""
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

    def __call__(self, work: Work[T, R], jobs: Sequence[T], what: str, devices: Sequence[str]) -> Iterator[R]:
        """See `Engine`."""
        n = min(len(devices), len(jobs))
        places = [Place(device, n, quiet=True) for device in devices[:n]]
        return progress(_rows(work, jobs, what, places), what, len(jobs), delay=0)


def _rows(work: Work[T, R], jobs: Sequence[T], what: str, places: Sequence[Place]) -> Iterator[R]:
    pickled = pickle.dumps(work)
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

    def give(self, todo: deque[tuple[int, T]]) -> None:
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


PARTS = 16
"""Tasks for each worker, so that none waits long for a slower one and each keeps its model and its helpers warm."""
LONG = 8
"""Jobs of a task at most: so many are done again when its worker is killed at the end of them."""
START, PATIENCE = 30, 300
"""Seconds that a scheduler may be away in the beginning, and later."""


@dataclass(frozen=True)
class Dask:
    """Tasks of some jobs each. Workers write to the same disk as this process, under the same paths. Dask gives the
    tasks of a worker that was killed to another one; when the scheduler is gone, what is missing is asked for again as
    soon as it is back.

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

    def __call__(self, work: Work[T, R], jobs: Sequence[T], what: str, devices: Sequence[str]) -> Iterator[R]:
        """See `Engine`; the devices of a cluster's workers are their own."""
        return progress(self._rows(work, jobs, what, devices), what, len(jobs), delay=0)

    def _rows(self, work: Work[T, R], jobs: Sequence[T], what: str, devices: Sequence[str]) -> Iterator[R]:
        from distributed import as_completed
        from distributed.comm import CommClosedError
        from distributed.scheduler import KilledWorker

        pickled = pickle.dumps(work)
        left: dict[int, Sequence[T]] | None = None
        lost = 0
        while left is None or left:
            try:
                with self._client(devices, START if left is None else PATIENCE) as client:
                    client.wait_for_workers(1, timeout=START if left is None else PATIENCE)
                    workers = client.scheduler_info(n_workers=-1)["workers"].values()
                    if left is None:
                        print(f"{what}: {len(workers)} workers, look at {client.dashboard_link}", flush=True)
                        n = max(1, min(LONG, len(jobs) // (PARTS * len(workers))))
                        left = {first: jobs[first : first + n] for first in range(0, len(jobs), n)}
                    share = max(Counter(one["host"] for one in workers).values())
                    places = [Place(device, share, quiet=True) for device in ([] if self.scheduler else devices)]
                    places = places or [Place(share=share, quiet=True)]
                    tasks = {client.submit(_part, pickled, some, places, pure=False): n for n, some in left.items()}
                    for task in as_completed(tasks):
                        said = task.result()
                        if isinstance(said, ImatchError):
                            raise said
                        del left[tasks[task]]
                        lost = 0
                        yield from said
            except KilledWorker as error:
                raise ImatchError(
                    f"{what}: {TRIES} workers were killed at the same jobs, mostly for want of memory ({error}): give "
                    "them more, or use a smaller batch_size, and run it again, it goes on where it "
                    "stopped"
                ) from error
            except (CancelledError, CommClosedError, OSError) as error:
                lost += 1
                if left is None or lost == TRIES:
                    raise ImatchError(
                        f"{what}: no scheduler with workers at {self.scheduler or 'this machine'} ({error}): start "
                        "them, or correct scheduler, and run it again, it goes on where it stopped"
                    ) from error
                print(f"{what}: the scheduler is gone ({error}), waiting for it", flush=True)

    @contextmanager
    def _client(self, devices: Sequence[str], patience: float) -> Iterator[Client]:
        import dask
        from distributed import Client, LocalCluster

        with dask.config.set({"distributed.scheduler.allowed-failures": TRIES - 1}):
            if self.scheduler:
                with Client(self.scheduler, timeout=patience) as client:
                    yield client
                return
            cluster = LocalCluster(n_workers=len(devices), threads_per_worker=1, dashboard_address=":0")
            with cluster, Client(cluster) as client:
                yield client


def _part(pickled: bytes, jobs: Sequence[T], places: Sequence[Place]) -> list[Any] | ImatchError:
    """On a worker: one of a cluster that was started here has a number for its name, and a place of its own. What the
    work raises is handed over as an answer, not to be taken for an error of Dask's."""
    from distributed import get_worker

    place = places[0] if len(places) == 1 else places[int(get_worker().name)]
    try:
        return list(part(pickled, jobs, place))
    except Exception as error:
        return portable(error)
