"""A pair as JSON for people and programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imatch import store
from imatch.records import Pair


@dataclass(frozen=True)
class Json:
    """The pair's row: ids, rank, score, counts, geometry and, where it is known, the truth."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.json`."""
        store.write_json(path.with_name(path.name + ".json"), pair.row)
