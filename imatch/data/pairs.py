"""A finished 04_match, opened: its pairs, their correspondences, and the tokens that they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np

from imatch.core import files
from imatch.core.files import flat_name
from imatch.core.rows import LookRecord, Options, PairRow, Parameters
from imatch.core.types import Geometry, Matches, Pair, StepError, Tokens
from imatch.data.embeddings import Embeddings
from imatch.data.rotations import UPRIGHT, Pose
from imatch.data.store import Posed, Stored, intact


@dataclass(frozen=True)
class Look:
    """How a 04_match looks at its pairs: by the descriptors of one backbone.

    Attributes:
        weight: the backbone.
        matcher, matcher_options: of `matchers.create_matcher`.
        poses: in which each query is shown.
    """

    weight: str
    matcher: str
    matcher_options: Options
    poses: Sequence[Pose]

    @property
    def record(self) -> LookRecord:
        """Plain JSON, for the step's parameters."""
        return cast("LookRecord", asdict(self))

    @classmethod
    def of(cls, record: LookRecord) -> Look:
        """Make one of what `record` gave."""
        poses = [Pose(**pose) for pose in record["poses"]]
        return cls(record["weight"], record["matcher"], record["matcher_options"], poses)


def pair_path(folder: Path, row: PairRow) -> Path:
    """Where the 04_match of a folder puts a pair, without the suffix of the sink."""
    name = "source" if row["rank"] is None else f"{row['rank']:02d}"
    return folder / "pairs" / flat_name(row["query"]) / name


@dataclass(frozen=True)
class Looked:
    """The tokens of both sides of a 04_match by one backbone, memory-mapped.

    Attributes:
        look: how they are looked at.
        settings: what a pair is aligned with (`align.aligner`).
        posed: A's in its poses.
        gallery: B's.
    """

    look: Look
    settings: Parameters
    posed: Posed
    gallery: Embeddings

    def __call__(self, query: str, candidate: str | None) -> tuple[list[tuple[Pose, Tokens]], Tokens]:
        """The tokens of A in each pose and those of B, by their ids; empty ones where the backbone found nothing."""
        a, b = self.posed.upright.row_of.get(query), self.gallery.row_of.get(str(candidate))
        one = self.gallery.tokens(0)
        none = Tokens(np.zeros_like(one.vector), one.descriptors[:0], one.xy[:0])
        seen = [(UPRIGHT, none)] if a is None else self.posed.tokens(a)
        return seen, none if b is None else self.gallery.tokens(b)


@dataclass(frozen=True)
class Matched:
    """A 04_match and what it was made from (`steps.match.open_match`); tokens are memory-mapped.

    Attributes:
        folder: the step's.
        query, gallery: its two sides.
        looked: weight -> their tokens by that backbone, in the order in which they are tried.
        labels: the file of people's labels, there already or not.
        pages: the folder of pages that are saved of its pairs.
    """

    folder: Path
    query: Stored
    gallery: Stored
    looked: Mapping[str | None, Looked]
    labels: Path
    pages: Path

    def tokens(self, row: PairRow) -> tuple[Tokens, Tokens]:
        """The tokens of a row of pairs.jsonl: A's in the pose that it was matched in, and B's."""
        seen, b = self.looked[row["weight"]](row["query"], row["candidate"])
        return dict(seen)[Pose(row["turn"], row["zoom"])], b

    def upright(self, row: PairRow) -> Tokens:
        """A's tokens of a row of pairs.jsonl as it is, not rotated."""
        return self.looked[row["weight"]](row["query"], row["candidate"])[0][0][1]

    def files(self, row: PairRow) -> tuple[tuple[Path, Path], tuple[tuple[int, int], tuple[int, int]]]:
        """The photographs of a row of pairs.jsonl: where they lie, and their (h, w)."""
        a, b = self.query.row_of[row["query"]], self.gallery.row_of[str(row["candidate"])]
        paths = self.query.root / row["query"], self.gallery.root / str(row["candidate"])
        (h_a, w_a), (h_b, w_b) = self.query.rows[a]["size"], self.gallery.rows[b]["size"]
        return paths, ((h_a, w_a), (h_b, w_b))

    def pair(self, row: PairRow) -> Pair:
        """A row of pairs.jsonl with its correspondences.

        Raises:
            StepError: these were not saved, for the outputs had no "npy"; or they are damaged.
        """
        path = pair_path(self.folder, row).with_suffix(".npy")
        if not path.is_file():
            raise StepError(f"no correspondences at {path}: run 04_match with outputs that have 'npy'")
        table = np.array(files.read_array(intact(self.folder, path.relative_to(self.folder).as_posix())))
        found = Geometry.of(row, table["inlier"])
        matches = Matches(table["index_a"], table["index_b"], table["similarity"])
        return Pair(row, *self.files(row), table["xy_a"], table["xy_b"], matches, found)
