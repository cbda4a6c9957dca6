"""A step's folder: started, fingerprinted, reused or refused, finished. And the loop that steps share."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from imatch import registry, store
from imatch.records import ImatchError, StepError

T = TypeVar("T")
R = TypeVar("R")
ON_CHANGE = ("refuse", "recompute")
MIME = "application/vnd.imatch.step+json"
VERSIONS = ("imatch", "numpy", "pillow", "opencv-python-headless", "torch", "timm")


@dataclass
class Step:
    """One step of work and its folder on disk.

    Attributes:
        folder: where it writes. `step.json` is there from the start, `metrics.json` only when finished.
        name: the notebook's name, such as "01_embed".
        parameters: what was asked; all that changes the result and nothing else.
        upstream: fingerprints of what it was made from.
        links: paths of the steps it reads, relative to `folder`.
        on_change: "refuse" or "recompute", what to do with results made from something else.
        device: where it was computed, for the record.
        work: for the record, too, what was computed over all runs, that of several processes added up: {"photographs",
            "seconds"} and, of embeddings, the seconds of them in "forward" passes, in "wait" for the next one, and in
            "decode" and "write" beside those; in "start" the seconds before, until the model was loaded.
    """

    folder: Path
    name: str
    parameters: dict[str, Any]
    upstream: dict[str, str]
    links: dict[str, str] = field(default_factory=dict)
    on_change: str = "refuse"
    fingerprint: str | None = None
    device: str = "cpu"
    work: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def finished(self) -> bool:
        """Whether metrics.json, which is written last, is there."""
        return (self.folder / "metrics.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """What the step recorded when it finished."""
        return store.read_json(self.folder / "metrics.json")

    def linked(self, link: str) -> Path:
        """The folder of the step that this one reads under the name `link`."""
        return Path(registry.resolve(self.folder / self.links[link]))

    def runs_on(self, device: str) -> None:
        """Record where an unfinished step is being computed."""
        self.device = device
        self._write()

    def did(self, work: Mapping[str, float]) -> None:
        """Add to the record of what an unfinished step has computed."""
        for name, amount in work.items():
            self.work[name] = round(self.work.get(name, 0) + amount, 3)
        self._write()

    def unfinish(self) -> None:
        """Take the finished mark away before anything below is changed."""
        (self.folder / "metrics.json").unlink(missing_ok=True)

    def finish(self, metrics: Mapping[str, Any], contents: object = None) -> dict[str, Any]:
        """Record the metrics, last, and say where the step is (batch reads that from the notebook).

        Args:
            metrics: figures for people, tests and the summary; plain JSON.
            contents: what the results were made from beyond parameters and upstream (content hashes);
                it enters the fingerprint. None when there is nothing more.

        Returns:
            The metrics as they stand on disk. A step that was reused keeps the ones it had.
        """
        if not self.finished:
            self.fingerprint = digest([_identity(self), contents])
            self._write(seconds=round(time.monotonic() - self.started, 3))
            for left in self.folder.rglob(".*.tmp"):  # by a kill
                left.unlink(missing_ok=True)
            store.write_json(self.folder / "metrics.json", dict(metrics))
        record = store.read_json(self.folder / "step.json")
        if record["links"] != self.links:  # the same inputs, moved
            store.write_json(self.folder / "step.json", {**record, "links": self.links})
        _publish(self)
        return self.metrics

    def _write(self, seconds: float | None = None) -> None:
        record = {
            **_identity(self),
            "fingerprint": self.fingerprint,
            "links": self.links,
            "device": self.device,
            "machine": platform.machine(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
            "seconds": seconds,
            "work": self.work,
        }
        store.write_json(self.folder / "step.json", record)


def start(
    folder: Path,
    name: str,
    parameters: Mapping[str, Any],
    upstream: Mapping[str, str] | None = None,
    links: Mapping[str, Path] | None = None,
    on_change: str = "refuse",
    keep: Sequence[str] = (),
) -> Step:
    """Open the step at `folder`: a new one, one to go on with, or a finished one to reuse.

    Args:
        folder: where it writes.
        name: the notebook's.
        parameters, upstream, links, on_change: of `Step`; links as paths.
        keep: names in the folder that outlive a recomputation, for they know by themselves what of them still holds.

    Raises:
        StepError: the folder holds a step made with other parameters or from other inputs and
            `on_change` is "refuse"; the message lists every difference.
    """
    if on_change not in ON_CHANGE:
        raise StepError(f"on_change {on_change!r} is not known: use {' or '.join(ON_CHANGE)}")
    relative = {key: store.relative(path, folder) for key, path in (links or {}).items()}
    step = Step(folder, name, json.loads(json.dumps(dict(parameters))), dict(upstream or {}), relative, on_change)
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if (folder / "step.json").is_file():
        before = read(folder, finished=False)
        nothing_done = not before.finished and {path.name for path in folder.iterdir()} <= {"step.json", "seen.jsonl"}
        differences = [] if nothing_done else compare(_identity(before), _identity(step))
        if nothing_done:
            step._write()  # of a run that was refused before it computed anything
        if not differences:
            step.fingerprint, step.device, step.work = before.fingerprint, before.device, before.work
            print(f"{name}: {'there already' if step.finished else 'begun before, goes on'} at {folder}")
            return step
        refuse_or_say(step, f"{folder} was made differently", differences)
        folder.rename(aside)  # at once, so that a kill leaves no half of a step
        for kept in keep:
            if (aside / kept).exists():
                folder.mkdir(exist_ok=True)
                (aside / kept).rename(folder / kept)
        shutil.rmtree(aside)
    with store.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    step._write()
    print(f"{name}: new at {folder}")
    return step


def refuse_or_say(step: Step, what: str, differences: Sequence[str]) -> None:
    """Print the differences and return when the step may recompute; raise StepError with them otherwise."""
    shown = [*differences[:20], *([f"... and {len(differences) - 20} more"] if len(differences) > 20 else [])]
    message = f"{step.name}: {what}:\n" + "\n".join(f"  {line}" for line in shown)
    if step.on_change == "refuse":
        raise StepError(
            f"{message}\nNothing was touched. To make it anew: set on_change to recompute. "
            "To keep both: set another run or tag."
        )
    print(f"{message}\n  so what depends on it is computed again")


def read(folder: Path, finished: bool = True) -> Step:
    """Open a step that another one reads.

    Raises:
        StepError: it is not there, or not finished though it should be.
    """
    if not (folder / "step.json").is_file():
        raise StepError(f"no step at {folder}: run the notebook before this one first, or correct the path")
    record = store.read_json(folder / "step.json")
    step = Step(
        folder,
        record["step"],
        record["parameters"],
        record["upstream"],
        record["links"],
        fingerprint=record["fingerprint"],
        device=record["device"],
        work=record.get("work", {}),
    )
    if finished and not step.finished:
        raise StepError(f"{step.name} at {folder} is not finished: run its notebook again, it goes on where it stopped")
    return step


def compare(before: object, now: object, name: str = "") -> list[str]:
    """The differences between two JSON values, a line each.

    >>> compare({"scale": 1.0, "run": {"k": 5}}, {"scale": 0.5, "run": {"k": 5}})
    ['scale: 1.0 -> 0.5']
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        return [
            line
            for key in keys
            for line in compare(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if before == now else [f"{name}: {json.dumps(before)} -> {json.dumps(now)}"]


def digest(value: object) -> str:
    """The SHA-256 of a JSON value, independent of the order of its keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def parallel(function: Callable[[T], R], items: Sequence[T], workers: int, what: str) -> Iterator[R]:
    """`function(item)` for every item, in order, with a progress bar (rate, time left) on standard output.

    Args:
        function: picklable; what it raises ends the loop.
        items: picklable things.
        workers: processes; 0 runs here; -1 is one a core. At most two results a worker wait in memory.
        what: the bar's label, such as "embed".
    """
    workers = min(registry.cores() if workers < 0 else workers, len(items))
    if not workers:
        yield from progress(map(function, items), what, len(items), delay=0)
        return
    pool = ProcessPoolExecutor(workers, initializer=_begin, initargs=(function,))
    try:
        with _without_threads():
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


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int, depth: int) -> Iterator[R]:
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


def progress(items: Iterable[T], what: str, total: int | None = None, delay: float = 1) -> Iterator[T]:
    """The items, with a progress bar (rate, time left) once they take longer than `delay` seconds.

    It goes to standard output, which a notebook shows without alarm and batch passes on to its log.
    """
    from tqdm import tqdm

    return iter(tqdm(items, what, total, file=sys.stdout, mininterval=1, delay=delay, ncols=88))


@contextmanager
def _without_threads() -> Iterator[None]:
    """End OpenCV's threads for the block that starts workers: a forked one would wait for ever to end them itself."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


_work: list[Callable[[Any], Any]] = []
"""What a worker process does; it is given it once, not with every item, for it may open stores."""


def _begin(function: Callable[[Any], Any]) -> None:
    """In a worker: one thread, and an end when the process above is gone. That one alone is interrupted."""
    import cv2

    cv2.setNumThreads(1)
    threadpool_limits(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    _work[:] = [function]


def _end_with(above: Any) -> None:
    above.join()
    os._exit(1)


def _do(item: Any) -> Any:
    return _work[0](item)


def _identity(step: Step) -> dict[str, Any]:
    return {"step": step.name, "parameters": step.parameters, "upstream": step.upstream}


def _publish(step: Step) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display

    text = f"{step.name} finished: {step.folder}"
    if not InteractiveShell.initialized():
        print(text)
        return
    display({MIME: {"step": step.name, "folder": str(step.folder)}, "text/plain": text}, raw=True)
