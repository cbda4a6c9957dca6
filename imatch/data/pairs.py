"""A finished 04_match, opened: its pairs, their correspondences, and the tokens that they came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from imatch.core.files import Row
from imatch.core.step import Step, pair_path, sides
from imatch.core.types import Geometry, Matches, Pair, StepError, Tokens
from imatch.data.rotations import Pose
from imatch.data.store import open_embeddings, open_poses


class Matched:
    """A 04_match and what it was made from, opened once; tokens are memory-mapped.

    Args:
        step: of `start_match`.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.query, self.gallery = open_embeddings(step)
        both = sides(step)
        self.posed = open_poses(both[0].folder, poses_of(step))
        self._roots = [side.linked("photographs") for side in both]
        self._places = [{id: place for place, id in enumerate(side.ids)} for side in (self.query, self.gallery)]

    def tokens(self, row: Row) -> tuple[Tokens, Tokens]:
        """The tokens of a row of pairs.jsonl: A's in the pose that it was matched in, and B's."""
        a, b = self._where(row)
        return dict(self.posed.tokens(a))[Pose(row["turn"], row["zoom"])], self.gallery.tokens(b)

    def upright(self, row: Row) -> Tokens:
        """A's tokens of a row of pairs.jsonl as 01_embed left them."""
        return self.query.tokens(self._where(row)[0])

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


def poses_of(step: Step) -> list[Pose]:
    """The poses in which a 04_match shows its queries."""
    return [Pose(**pose) for pose in step.parameters["poses"]]
