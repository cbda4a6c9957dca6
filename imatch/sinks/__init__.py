"""Where results go. A sink is one class in one file and one line here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from imatch import plugins
from imatch.records import Pair

SINKS = {
    "colmap": "imatch.sinks.colmap:Colmap",
    "csv": "imatch.sinks.csv:Csv",
    "json": "imatch.sinks.json:Json",
    "npy": "imatch.sinks.npy:Npy",
    "png": "imatch.sinks.png:Png",
}


class Sink(Protocol):
    """What imatch asks of a sink."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """Put a pair at `path` with the sink's suffix, atomically; the same pair gives the same bytes, durations apart.

        It may be called in any order and by several processes at once.
        """

    def gather(self, folder: Path, pairs: Iterable[tuple[Path, dict[str, Any]]]) -> None:
        """Write into `folder` what needs all pairs, when they are done; by default nothing.

        Args:
            folder: the sink's own, of the step.
            pairs: where each pair was put, and its row.
        """


def create(sink: str) -> Sink:
    """Make a sink.

    Raises:
        ImatchError: unknown sink, with the nearest known one.
    """
    made: Sink = plugins.create(SINKS, "output", sink)
    return made
