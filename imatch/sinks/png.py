"""A pair as a picture: side by side, inliers joined by lines, the outline of the query drawn where it was found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from imatch import pictures, store
from imatch.pictures import encode
from imatch.records import Pair


@dataclass(frozen=True)
class Png:
    """Both photographs at most 360 pixels a side, the 120 most similar inliers coloured by similarity."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.png`."""
        store.write_bytes(path.with_name(path.name + ".png"), encode(pictures.lines(pair)))

    def gather(self, folder: Path, pairs: Iterable[tuple[Path, dict[str, Any]]]) -> None:
        """See `Sink`; each picture is all there is."""


def draw(pair: Pair, max_lines: int = 120, shown: np.ndarray | None = None) -> np.ndarray:
    """`pictures.lines` by its old name, for the explorer."""
    return pictures.lines(pair, replace(pictures.PLAIN, max_lines=max_lines), shown)
