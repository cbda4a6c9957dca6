"""A pair's correspondences as a table for people and spreadsheets."""

from __future__ import annotations

from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np

from imatch import store
from imatch.records import Pair
from imatch.sinks import Sink


@dataclass(frozen=True)
class Csv(Sink):
    """One row a correspondence, strongest first: pixels in both originals to a thousandth, cosine, inlier (1 or 0)."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.csv`."""
        table = np.column_stack([pair.xy_a, pair.xy_b, pair.matches.similarity, pair.geometry.inliers])
        text = StringIO()
        formats = [*["%.3f"] * 4, "%.6f", "%d"]
        np.savetxt(text, table, formats, delimiter=",", header="x_a,y_a,x_b,y_b,similarity,inlier", comments="")
        store.write_bytes(path.with_name(path.name + ".csv"), text.getvalue().encode())
