"""A cluster of Dask's, or as many workers on this machine as it has devices (dask.distributed, an optional extra)."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from imatch import runs
from imatch.engines import TRIES, Place, Work, part, portable
from imatch.records import ImatchError
from imatch.store import Row

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
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

    def __call__(self, work: Work[T], jobs: Sequence[T], what: str, devices: Sequence[str]) -> Iterator[Row]:
        """See `Engine`; the devices of a cluster's workers are their own."""
        return runs.progress(self._rows(pickle.dumps(work), jobs, what, devices), what, len(jobs), delay=0)

    def _rows(self, pickled: bytes, jobs: Sequence[Any], what: str, devices: Sequence[str]) -> Iterator[Row]:
        from distributed import as_completed
        from distributed.comm import CommClosedError
        from distributed.scheduler import KilledWorker

        left: dict[int, Sequence[Any]] | None = None
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


def _part(pickled: bytes, jobs: Sequence[Any], places: Sequence[Place]) -> list[Row] | ImatchError:
    """On a worker: one of a cluster that was started here has a number for its name, and a place of its own. What the
    work raises is handed over as an answer, not to be taken for an error of Dask's."""
    from distributed import get_worker

    place = places[0] if len(places) == 1 else places[int(get_worker().name)]
    try:
        return list(part(pickled, jobs, place))
    except Exception as error:
        return portable(error)
