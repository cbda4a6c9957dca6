"""Toy jobs for engines, in a module of their own: a process that does them imports this and not the tests."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from imatch.core import files
from imatch.core.compute import Place
from imatch.core.types import ImatchError


@dataclass(frozen=True)
class Squares:
    """Writes the square of each job to a file; who did it goes to another one."""

    folder: Path
    seconds: float = 0.0
    dies_at: int = -1
    dies_once: bool = True
    what: str = "squares"

    def __call__(self, jobs: Iterable[int], place: Place) -> Iterator[dict[str, int]]:  # noqa: ARG002
        for n in jobs:
            if n == self.dies_at and not (self.dies_once and (self.folder / "died").exists()):
                (self.folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.seconds)
            files.write_bytes(self.folder / f"{n}.txt", str(n * n).encode())
            files.write_bytes(self.folder / f"{n}.pid", str(os.getpid()).encode())
            yield {"n": n}

    def done(self, n: int) -> bool:
        return (self.folder / f"{n}.txt").is_file()


class OddError(Exception):
    """An error that cannot be pickled and made anew."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"{what} {number}")


ERRORS = {"ours": ImatchError("job 2 is refused"), "system": PermissionError("no entry"), "odd": OddError(2, "job")}


@dataclass(frozen=True)
class Refusing:
    """Refuses its third job, by one of `ERRORS`."""

    by: str = "ours"
    what: str = "refusing"

    def done(self, n: int) -> bool:  # noqa: ARG002
        return False

    def __call__(self, jobs: Iterable[int], place: Place) -> Iterator[dict[str, int]]:  # noqa: ARG002
        for n in jobs:
            if n == 2:
                raise ERRORS[self.by]
            yield {"n": n}


class Threads:
    """Says how many threads the libraries use that it loads only now."""

    what = "threads"

    def done(self, n: int) -> bool:  # noqa: ARG002
        return False

    def __call__(self, jobs: Iterable[int], place: Place) -> Iterator[dict[str, int]]:  # noqa: ARG002
        import cv2
        import faiss
        import torch

        for _ in jobs:
            yield {"torch": torch.get_num_threads(), "faiss": faiss.omp_get_max_threads(), "cv2": cv2.getNumThreads()}
