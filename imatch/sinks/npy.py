"""A pair's correspondences as an array."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatch import store
from imatch.records import Pair
from imatch.sinks import Sink

CORRESPONDENCE = np.dtype(
    [
        ("xy_a", "<f4", 2),
        ("xy_b", "<f4", 2),
        ("similarity", "<f4"),
        ("inlier", "?"),
        ("index_a", "<i4"),
        ("index_b", "<i4"),
    ]
)
"""One correspondence: pixels in both originals, cosine, inlier or not, rows of the descriptors."""


@dataclass(frozen=True)
class Npy(Sink):
    """(m,) correspondences, strongest first, as a structured array of `CORRESPONDENCE`."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.npy`."""
        table = np.zeros(len(pair.matches), CORRESPONDENCE)
        table["xy_a"], table["xy_b"] = pair.xy_a, pair.xy_b
        table["similarity"], table["inlier"] = pair.matches.similarity, pair.geometry.inliers
        table["index_a"], table["index_b"] = pair.matches.index_a, pair.matches.index_b
        store.write_array(path.with_name(path.name + ".npy"), table)
