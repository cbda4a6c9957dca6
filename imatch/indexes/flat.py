"""The exact index."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np

from imatch import store
from imatch.records import Hits, ImatchError


@dataclass
class Flat:
    """FAISS' flat inner-product index: on L2-normalised vectors the inner product is the cosine.

    >>> index = Flat()
    >>> index.build(np.eye(3, dtype=np.float32))
    >>> index.search(np.eye(3, dtype=np.float32)[1:], k=1).rows.tolist()
    [[1], [2]]
    """

    index: faiss.IndexFlatIP | None = field(default=None, repr=False)

    def build(self, vectors: np.ndarray) -> None:
        """See `Index`."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or not len(vectors):
            raise ImatchError(f"an index needs (N, D) vectors, at least one; got {vectors.shape}")
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
        wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
        if len(wrong):
            raise ImatchError(f"vector {wrong[0]} has norm {norms[wrong[0]]:.4g}, not 1: embed the gallery again")
        self.index = faiss.IndexFlatIP(vectors.shape[1])
        self.index.add(vectors)

    def search(self, queries: np.ndarray, k: int) -> Hits:
        """See `Index`."""
        if self.index is None:
            raise ImatchError("the index is empty: build or load it before searching")
        if k < 1:
            raise ImatchError(f"k is {k}: ask for at least 1 neighbour")
        if queries.ndim != 2 or queries.shape[1] != self.index.d:
            raise ImatchError(
                f"queries {queries.shape} do not fit an index of dimension {self.index.d}: "
                "embed both sides with the same backbone"
            )
        depth = min(k + 1, self.index.ntotal)  # one more shows whether the last place is a tie
        scores, rows = self.index.search(np.ascontiguousarray(queries, np.float32), depth)
        order = np.lexsort([rows, -scores], axis=1)[:, :k]
        rows, scores = np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
        missing = k - rows.shape[1]
        pad = ((0, 0), (0, max(missing, 0)))
        return Hits(np.pad(rows, pad, constant_values=-1), np.pad(scores, pad, constant_values=-np.inf))

    def save(self, path: Path) -> None:
        """See `Index`."""
        store.write_bytes(path, faiss.serialize_index(self.index).tobytes())  # write_index hides a full disk

    def load(self, path: Path) -> None:
        """See `Index`."""
        try:
            self.index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ImatchError(f"{path} is not a FAISS index ({error}): run 03_index again") from error
