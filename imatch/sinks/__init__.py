"""Where results go. A sink is one class in one file and one line here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from imatch import plugins
from imatch.records import Pair

SINKS = {
    "json": "imatch.sinks.json:Json",
    "npy": "imatch.sinks.npy:Npy",
    "png": "imatch.sinks.png:Png",
}


class Sink(Protocol):
    """What imatch asks of a sink."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """Put a pair at `path` with the sink's suffix, atomically; the same pair gives the same bytes."""


def create(sink: str) -> Sink:
    """Make a sink.

    Raises:
        ImatchError: unknown sink, with the nearest known one.
    """
    made: Sink = plugins.create(SINKS, "output", sink)
    return made
