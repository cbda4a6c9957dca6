"""This process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from imatch.engines import Place, Work
from imatch.store import Row

T = TypeVar("T")


@dataclass(frozen=True)
class Local:
    """This process does all jobs, one after the other, with the helpers that the work brings.

    Attributes:
        shard: "i/n", or "" for all.
    """

    shard: str = ""

    def __call__(self, work: Work[T], jobs: Sequence[T], what: str, devices: Sequence[str]) -> Iterator[Row]:  # noqa: ARG002
        """See `Engine`; of the devices the first is used."""
        return work(jobs, Place(devices[0]))


LOCAL = Local()
"""The engine of a loop that nobody gave another one."""
