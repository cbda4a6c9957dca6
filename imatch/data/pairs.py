"""A finished 04_match, opened: its pairs, their correspondences, and the tokens that they came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imatch.core.files import Row
from imatch.core.step import Step, pair_path, sides
from imatch.core.types import Geometry, Matches, Pair, StepError, Tokens
from imatch.data.rotations import UPRIGHT, Pose
from imatch.data.store import Embeddings, open_embeddings, open_poses


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
    matcher_options: Mapping[str, Any]
    poses: Sequence[Pose]

    @property
    def record(self) -> dict[str, Any]:
        """Plain JSON, for the step's parameters."""
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Look:
        """Make one of what `record` gave."""
        return cls(**{**record, "poses": [Pose(**pose) for pose in record["poses"]]})


def looks_of(step: Step) -> list[Look]:
    """How a 04_match looks at its pairs: the next one where none before has verified a pair.

    Raises:
        StepError: the step is of an earlier version.
    """
    if "looks" not in step.parameters:
        raise StepError(f"{step.folder} is of an earlier version: run 04_match again and set on_change to recompute")
    return [Look.of(look) for look in step.parameters["looks"]]


def settings_of(step: Step, look: Look) -> dict[str, Any]:
    """The parameters that a 04_match aligns a pair with (`align.aligner`)."""
    return {**step.parameters, "matcher": look.matcher, "matcher_options": look.matcher_options}


class Looked:
    """The tokens of both sides of a 04_match by one backbone, opened once and memory-mapped.

    Args:
        step: of `start_match`.
        look: one of `looks_of` it.
    """

    def __init__(self, step: Step, look: Look) -> None:
        query, gallery = sides(step, look.weight)
        self.look, self.most = look, query.parameters["backbone"].get("max_keypoints")
        self.posed, self.gallery = open_poses(query.folder, look.poses), Embeddings(gallery.folder)
        self.parameters = gallery.parameters
        self._places = [{id: place for place, id in enumerate(side.ids)} for side in (self.posed.upright, self.gallery)]

    def __call__(self, query: str, candidate: str) -> tuple[list[tuple[Pose, Tokens]], Tokens]:
        """The tokens of A in each pose and those of B, by their ids; empty ones where the backbone found nothing."""
        a, b = self._places[0].get(query), self._places[1].get(candidate)
        one = self.gallery.tokens(0)
        none = Tokens(np.zeros_like(one.vector), one.descriptors[:0], one.xy[:0])
        return [(UPRIGHT, none)] if a is None else self.posed.tokens(a), none if b is None else self.gallery.tokens(b)


class Matched:
    """A 04_match and what it was made from, opened once; tokens are memory-mapped.

    Args:
        step: of `start_match`.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.query, self.gallery = open_embeddings(step)
        self.looked = {look.weight: Looked(step, look) for look in looks_of(step)}
        self._roots = [side.linked("photographs") for side in sides(step)]
        self._places = [{id: place for place, id in enumerate(side.ids)} for side in (self.query, self.gallery)]

    def tokens(self, row: Row) -> tuple[Tokens, Tokens]:
        """The tokens of a row of pairs.jsonl: A's in the pose that it was matched in, and B's."""
        seen, b = self.looked[row["weight"]](row["query"], row["candidate"])
        return dict(seen)[Pose(row["turn"], row["zoom"])], b

    def upright(self, row: Row) -> Tokens:
        """A's tokens of a row of pairs.jsonl as it is, not rotated."""
        return self.looked[row["weight"]](row["query"], row["candidate"])[0][0][1]

    def files(self, row: Row) -> tuple[tuple[Path, Path], tuple[tuple[int, int], tuple[int, int]]]:
        """The photographs of a row of pairs.jsonl: where they lie, and their (h, w)."""
        a, b = self._where(row)
        paths = self._roots[0] / row["query"], self._roots[1] / row["candidate"]
        return paths, (tuple(self.query.rows[a]["size"]), tuple(self.gallery.rows[b]["size"]))

    def pair(self, row: Row) -> Pair:
        """A row of pairs.jsonl with its correspondences.

        Raises:
            StepError: these were not saved: the outputs had no "npy".
        """
        path = pair_path(self.step, row).with_suffix(".npy")
        if not path.is_file():
            raise StepError(f"no correspondences at {path}: run 04_match with outputs that have 'npy'")
        table = np.load(path)
        found = Geometry.of(row, table["inlier"])
        matches = Matches(table["index_a"], table["index_b"], table["similarity"])
        return Pair(row, *self.files(row), table["xy_a"], table["xy_b"], matches, found)

    def _where(self, row: Row) -> tuple[int, int]:
        return self._places[0][row["query"]], self._places[1][row["candidate"]]
