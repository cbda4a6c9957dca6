"""Vectors -> nearest neighbours with FAISS. A kind of index is one class in one file and one line here."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from imatch import plugins
from imatch.records import Hits

INDEXES = {"flat": "imatch.indexes.flat:Flat"}


class Index(Protocol):
    """What imatch asks of an index."""

    def build(self, vectors: np.ndarray) -> None:
        """Take (N, D) float32 L2-normalised vectors; row i answers as i.

        Raises:
            ImatchError: none, or not finite, or not normalised.
        """

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """The k nearest rows of each of (Q, D) queries by cosine, in one call; ties by the smaller row.

        Raises:
            ImatchError: k below 1, or queries of another dimension.
        """

    def save(self, path: Path) -> None:
        """Write it to a file, atomically."""

    def load(self, path: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ImatchError: the file is not an index.
        """


def create(kind: str) -> Index:
    """Make an empty index.

    Raises:
        ImatchError: unknown kind, with the nearest known one.
    """
    index: Index = plugins.create(INDEXES, "index", kind)
    return index
