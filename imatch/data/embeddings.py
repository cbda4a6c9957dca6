"""A set of photographs as tokens: what retrieval, matching, evaluation and pictures take."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from imatch.core import files
from imatch.core.rows import Parameters, PhotoRow, ReferenceRow
from imatch.core.types import StepError, Tokens


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The tokens of a set of photographs, in memory; `data.store.Stored` reads them from a step's folder.

    Row i of `vectors` belongs to `rows[i]`.

    Attributes:
        rows: one a photograph: id, size (h, w), sha256, position, look (`images.look`), grid, n (descriptors), vector
            (`vector_digest`); a doubt where a position was not taken, a note where something was assumed of the pixels
            (`images.Decoded`); where a registry knows them, capture, label and frame; of a reference also source and
            source_sha256.
        vectors: (N, D) float32, L2-normalised global vectors.
        parameters: how they were made: weight, backbone (its options), resize, ...
        skipped: a row a photograph that is not among them: id, sha256, and why, as skipped; where it could be decoded,
            all that `rows` say of the photograph, too.
        views: the rows of references by id; none of photographs.
    """

    rows: list[PhotoRow] = field(repr=False)
    vectors: np.ndarray = field(repr=False)
    parameters: Parameters
    skipped: list[PhotoRow] = field(repr=False)
    views: Mapping[str, ReferenceRow] = field(repr=False)
    _tokens: Sequence[Tokens] = field(repr=False)
    _photographs: Mapping[str, Path | np.ndarray] = field(repr=False)
    _sources: Embeddings | None = field(default=None, repr=False)

    def tokens(self, row: int) -> Tokens:
        """The tokens of one photograph: descriptors (n, d); xy (n, 2) in pixels of the original, NaN where they have no
        positions."""
        return self._tokens[row]

    def photograph(self, row: int) -> Path | np.ndarray:
        """Where the pixels of a photograph are: its file, or (h, w, 3) uint8 RGB."""
        return self._photographs[self.ids[row]]

    @property
    def sources(self) -> Embeddings:
        """Those of the photographs that references were made from; of photographs, themselves."""
        return self._sources or self

    @property
    def missed(self) -> list[PhotoRow]:
        """Those that could be decoded, but in which the backbone found nothing: queries that find nothing."""
        return [row for row in self.skipped if "size" in row]

    @property
    def decodable(self) -> dict[str, PhotoRow]:
        """The rows of all that could be decoded, by id."""
        return {row["id"]: row for row in sorted([*self.rows, *self.missed], key=lambda row: row["id"])}

    @cached_property
    def ids(self) -> list[str]:
        """The photographs' ids, in row order."""
        return [row["id"] for row in self.rows]

    @cached_property
    def row_of(self) -> dict[str, int]:
        """id -> row."""
        return {id: row for row, id in enumerate(self.ids)}

    @cached_property
    def shows(self) -> list[str]:
        """What each row shows: the SHA-256 of its own file or, for a reference, of the photograph it was made from.

        Two photographs with equal content show the same, so either is a right answer for the other.
        """
        return [row.get("source_sha256", row["sha256"]) for row in self.rows]

    @property
    def unplaced(self) -> str:
        """Why local descriptors have no positions, in words for people; "" where they have."""
        if not any(row["n"] for row in self.rows):
            return "no local descriptors were kept"
        if self.rows[0]["grid"] is None and not apart(self.rows[0]):
            return "only aggregated tokens were kept, which have no positions"
        return ""

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        n = sum(row["n"] for row in self.rows)
        d = self.tokens(0).descriptors.shape[1]
        return (
            f"{len(self)} photographs, {len(self.skipped)} skipped; global {self.vectors.shape[1]} numbers each; "
            f"local {n} descriptors of {d} ({n / len(self):.0f} a photograph)"
        )

    @property
    def digest(self) -> str:
        """The digest of its vectors in their order."""
        return files.digest([row.get("vector") or vector_digest(self.vectors[i]) for i, row in enumerate(self.rows)])


def apart(row: PhotoRow) -> bool:
    """Whether a row's positions have a file of their own; stores of before there was `xy` have one for keypoints."""
    return bool(row.get("xy", row["grid"] is None))


def vector_digest(vector: np.ndarray) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a global vector as float32: which row it belongs to.

    >>> vector_digest(np.ones(2)) == vector_digest(np.ones(2, np.float32))
    True
    """
    return hashlib.sha256(np.ascontiguousarray(vector, "<f4").data).hexdigest()[:16]


COMPARED = ("weight", "backbone", "weights_digest", "resize", "pixels")
"""Parameters in which both sides must be equal."""


def comparable(a: Parameters, b: Parameters, name_a: str, name_b: str) -> None:
    """Refuse to compare embeddings that were made differently.

    Raises:
        StepError: they differ in backbone, pooling, precision or size; the message says in what.

    >>> comparable({"weight": "sift"}, {"weight": "dsift"}, "a", "b")
    Traceback (most recent call last):
    imatch.core.types.StepError: vectors of a and b cannot be compared, they were made differently:
      weight: "sift" -> "dsift"
    Embed both with the same weight, pooling, precision, engine_forward and size
    """
    of_a, of_b = ({key: side.get(key) for key in COMPARED} for side in (a, b))
    if differences := files.compare(of_a, of_b):
        raise StepError(
            f"vectors of {name_a} and {name_b} cannot be compared, they were made differently:\n  "
            + "\n  ".join(differences)
            + "\nEmbed both with the same weight, pooling, precision, engine_forward and size"
        )
