"""The nouns of imatch: frozen records that every other file passes around.

Coordinates are (x, y) pixels with the centre of the top-left pixel at (0, 0); sizes are (h, w);
angles are degrees counter-clockwise as one sees them on the screen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imatch.core.rows import GeometryRecord, PairRow


class ImatchError(Exception):
    """A problem that the message explains in full: what, where and the remedy."""


class PhotographError(ImatchError):
    """One photograph that cannot be used; the message is the reason."""


class PassingError(PhotographError):
    """A photograph that could not be had just now, by no fault of its own: a disk or network drive that does not
    answer, too many open files, no memory left. It is never remembered: the next run tries again."""


class StepError(ImatchError):
    """A step on disk that cannot be used as asked: absent, unfinished or made from something else."""


class ImatchWarning(UserWarning):
    """Something the user should look at after the run: photographs left out, answers that are thin."""


@dataclass(frozen=True)
class Tokens:
    """What a backbone says of one photograph.

    Attributes:
        vector: (D,) float32, the global vector, of L2 norm 1 (of norm 0 if there was nothing to see).
        descriptors: (n, d) float, local descriptors as the backbone gives them: of L2 norm 1 for SIFT; the
            normalised patch tokens (x_norm) of a DINOv3, whose norms say something, too. Matching compares directions.
        xy: (n, 2) float32, their positions in pixels.
        grid: (h, w) with h * w == n when the descriptors lie on a regular grid, row by row; else None.

    Raises:
        ValueError: when the shapes do not fit each other.

    >>> tokens = Tokens(np.ones(1, "f4"), np.ones((6, 4), "f4"), np.zeros((6, 2), "f4"), grid=(2, 3))
    >>> tokens.as_grid().shape
    (2, 3, 4)
    """

    vector: np.ndarray
    descriptors: np.ndarray
    xy: np.ndarray
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        n = len(self.descriptors)
        if self.vector.ndim != 1 or self.descriptors.ndim != 2 or self.xy.shape != (n, 2):
            raise ValueError(
                f"tokens do not fit: vector {self.vector.shape}, descriptors {self.descriptors.shape}, "
                f"xy {self.xy.shape}"
            )
        if self.grid is not None and self.grid[0] * self.grid[1] != n:
            raise ValueError(f"a grid of {self.grid} does not hold {n} descriptors")

    def thinned(self, stride: int) -> Tokens:
        """Every `stride`-th row and column of the grid, from the first; the global vector stays that of all.

        Raises:
            ImatchError: the descriptors lie on no grid.

        >>> tokens = Tokens(np.ones(1, "f4"), np.ones((15, 4), "f4"), np.zeros((15, 2), "f4"), grid=(3, 5))
        >>> tokens.thinned(2).grid
        (2, 3)
        """
        if self.grid is None:
            raise ImatchError("keypoints lie on no grid, so there is no variant sub of them: use variant raw")
        kept = np.arange(len(self.xy)).reshape(self.grid)[::stride, ::stride]
        return Tokens(self.vector, self.descriptors[kept.ravel()], self.xy[kept.ravel()], kept.shape)

    @property
    def spacing(self) -> tuple[float, float]:
        """How far apart neighbours of the grid lie, (x, y) in the unit of `xy`; 0 along a side of one.

        >>> xy = np.array([[7.5, 7.5], [23.5, 7.5]], np.float32)
        >>> Tokens(np.ones(1, "f4"), np.ones((2, 4), "f4"), xy, grid=(1, 2)).spacing
        (16.0, 0.0)
        """
        if self.grid is None:
            raise ValueError("these descriptors lie on no grid")
        cells = self.xy.reshape(*self.grid, 2)
        return float(np.diff(cells[0, :2, 0]).sum()), float(np.diff(cells[:2, 0, 1]).sum())

    def as_grid(self) -> np.ndarray:
        """The descriptors as (h, w, d): the same bytes, seen as a grid. Raises ValueError without a grid."""
        if self.grid is None:
            raise ValueError("these descriptors lie on no grid")
        return self.descriptors.reshape(*self.grid, -1)


@dataclass(frozen=True)
class View:
    """A reference made from a photograph, with its exact ground truth.

    Attributes:
        pixels: (h, w, 3) uint8 RGB.
        mask: (h, w) bool, True where the pixel shows the photograph (False in the corners that a
            rotation leaves empty).
        matrix: (3, 3) float64, photograph (x, y, 1) -> view (x, y, 1).
    """

    pixels: np.ndarray
    mask: np.ndarray
    matrix: np.ndarray


@dataclass(frozen=True)
class Hits:
    """The answer of an index to Q queries, best first.

    Attributes:
        rows: (Q, k) int64, row of each neighbour in the gallery; -1 where the gallery had no more.
        scores: (Q, k) float32, cosine similarity; -inf where row is -1.
    """

    rows: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Truth:
    """Which rows of a gallery answer each of Q queries: the rows of query q are `rows[first[q] : first[q + 1]]`.

    Attributes:
        first: (Q + 1,) int64, from 0, never falling.
        rows: (m,) int64, rows of the gallery, rising within a query.

    >>> truth = Truth.of([[0, 2], []])
    >>> truth.count.tolist(), truth.right(np.array([[2, 1], [0, -1]])).tolist()
    ([2, 0], [[True, False], [False, False]])
    """

    first: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, answers: Sequence[Sequence[int] | np.ndarray]) -> Truth:
        """From a list of gallery rows for each query."""
        rows = [np.unique(np.asarray(rows, np.int64)) for rows in answers]
        return cls(np.cumsum([0, *map(len, rows)]), np.concatenate([np.zeros(0, np.int64), *rows]))

    @property
    def count(self) -> np.ndarray:
        """(Q,) int64, how many right answers each query has."""
        return np.diff(self.first)

    def right(self, rows: np.ndarray, queries: slice | None = None) -> np.ndarray:
        """Which of the hits (Q, k), rows of the gallery or -1, are right: (Q, k) bool.

        Args:
            rows: the hits.
            queries: the queries that these are, when they are not all.
        """
        n = 1 + max(self.rows.max(initial=0), rows.max(initial=0))
        q = np.arange(len(self.first) - 1)
        wanted = np.repeat(q, self.count) * n + self.rows  # sorted, one number a pair of query and row
        asked = q[queries or slice(None), None] * n + rows
        place = np.searchsorted(wanted, asked).clip(0, max(len(wanted) - 1, 0))
        return (wanted[place] == asked) & (rows >= 0) if len(wanted) else np.zeros(rows.shape, bool)


@dataclass(frozen=True)
class Ranking:
    """What Q queries found, and whether it is right.

    First those that have a vector; then those in which the backbone found nothing: they find nothing.

    Attributes:
        rows: (Q, k) int64, row of each hit in the gallery, best first; -1 where it had no more.
        scores: (Q, k) float32, cosine similarity; -inf where row is -1.
        right: (Q, k) bool, whether the hit answers the query.
        answers: (Q,) int64, how many right answers the gallery holds.
        candidates: (Q,) int64, how many of its rows may be found: not the query itself or, if asked, its siblings.
        without: (Q,) float32, the score of the first hit when all right answers are left out of the gallery: what a
            query that has no match would find. -inf where nothing else is there.
        metres: (Q, k) float64, how far each hit lies from where the query was taken, NaN where that is not known;
            None when no position is known at all.
        turn: (Q, k) float64, degrees counter-clockwise that the query was turned by when it found the hit, NaN where
            row is -1; None when queries were searched upright alone.
    """

    rows: np.ndarray
    scores: np.ndarray
    right: np.ndarray
    answers: np.ndarray
    candidates: np.ndarray
    without: np.ndarray
    metres: np.ndarray | None
    turn: np.ndarray | None


@dataclass(frozen=True)
class Matches:
    """One-to-one correspondences between the local descriptors of photographs A and B, strongest first.

    Attributes:
        index_a, index_b: (m,) int64, rows of the descriptors of A and of B.
        similarity: (m,) float32, cosine; by lighterglue the probability of the pair.
        repeated: how many more there would be, had they not as good a rival: what they show repeats.
    """

    index_a: np.ndarray
    index_b: np.ndarray
    similarity: np.ndarray
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.similarity)


@dataclass(frozen=True)
class Geometry:
    """What explains a set of correspondences.

    Attributes:
        matrix: (3, 3) float64, A (x, y, 1) -> B up to scale; None when none was found. Of kind "general" it is a
            similarity that says roughly where A lies.
        inliers: (m,) bool, which correspondences agree with it.
        error: mean distance of the inliers in pixels of B, from where the matrix puts them or, of kind "general", from
            their epipolar lines; NaN where nothing was found.
        verified: whether the two photographs show the same thing, as far as geometry can say.
        reason: why it is, or is not, verified.
        kind: "planar" (a flat scene), "rotation" (of the camera alone), "general" (a scene of depth); of what is not
            verified "watermark" (only what stands still in the picture agrees), "degenerate" (no view of a scene), or
            "" (too few inliers).
        fundamental: (3, 3) float64, x_b^T F x_a = 0, of kind "general" alone.
        pose: how the camera moved, where the focal lengths are known and inliers are many: R (3, 3), and t (3,) of norm
            1 (0 for a rotation), for the distance is not known; x_b ~ R x_a + t in coordinates of the cameras (x right,
            y down, z ahead), so that in those of A the camera moved by -R^T t.
    """

    matrix: np.ndarray | None
    inliers: np.ndarray
    error: float
    verified: bool
    reason: str
    kind: str = ""
    fundamental: np.ndarray | None = None
    pose: tuple[np.ndarray, np.ndarray] | None = None

    def record(self) -> GeometryRecord:
        """Give all but the inliers as plain JSON, for the row of a pair."""
        return {
            "verified": self.verified,
            "reason": self.reason,
            "kind": self.kind,
            "matrix": None if self.matrix is None else self.matrix.tolist(),
            "fundamental": None if self.fundamental is None else self.fundamental.tolist(),
            "pose": None
            if self.pose is None
            else {"rotation": self.pose[0].tolist(), "direction": self.pose[1].tolist()},
            "reprojection_error": None if math.isnan(self.error) else self.error,
        }

    @classmethod
    def of(cls, record: GeometryRecord, inliers: np.ndarray) -> Geometry:
        """Make one of what `record` gave.

        >>> found = Geometry(np.eye(3), np.ones(9, bool), 0.5, True, "9 inliers", "planar")
        >>> Geometry.of(found.record(), found.inliers).kind
        'planar'
        """
        error, pose = record["reprojection_error"], record.get("pose")
        known = (record.get(name) for name in ("matrix", "fundamental"))
        matrix, fundamental = (None if one is None else np.array(one) for one in known)
        return cls(
            matrix,
            inliers,
            math.nan if error is None else error,
            record["verified"],
            record["reason"],
            record.get("kind", ""),  # steps of before there were kinds have none
            fundamental,
            None if pose is None else (np.array(pose["rotation"]), np.array(pose["direction"])),
        )


@dataclass(frozen=True)
class Pair:
    """Two photographs matched 1:1, ready for the sinks.

    Attributes:
        row: plain JSON, and small: ids, rank, score, counts, verified, reason, matrix, rotation, scale, truth.
        paths: the files of A (the query) and B (the candidate), or the pixels of those that have none.
        sizes: their (h, w) in pixels.
        xy_a, xy_b: (m, 2) float32, the correspondences in pixels of the original photographs.
        matches: which descriptors they are, and how similar.
        geometry: what explains them.
        grids: (h, w) of each side's tokens; None where they lie on no grid.
        weight: the backbone that made the tokens, by its key.
        settings: plain JSON: how they were matched.
        time_ms: how long matching and geometry took.
    """

    row: PairRow
    paths: tuple[Path | np.ndarray, Path | np.ndarray]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    xy_a: np.ndarray
    xy_b: np.ndarray
    matches: Matches
    geometry: Geometry
    grids: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None)
    weight: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    time_ms: float = 0.0


def grid_xy(grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The centres of a photograph's patches.

    Args:
        grid: (h, w) patches.
        size: (H, W) pixels that the grid covers exactly.

    Returns:
        (h * w, 2) float32, (x, y) pixels, row by row.

    >>> grid_xy((1, 2), (16, 32)).tolist()
    [[7.5, 7.5], [23.5, 7.5]]
    """
    h, w = grid
    x, y = np.meshgrid((np.arange(w) + 0.5) * size[1] / w - 0.5, (np.arange(h) + 0.5) * size[0] / h - 0.5)
    return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Scale the last axis to L2 norm 1; zero vectors stay zero.

    >>> normalise(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


def check_finite(what: str, values: np.ndarray, names: np.ndarray | None = None) -> None:
    """Refuse NaN and infinity, which would spread; the message names the first of `values`, or its name, with one."""
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        name = wrong[0, 0] if names is None else names[wrong[0, 0]]
        raise ImatchError(f"{what} {name} is not finite (NaN or infinity): embed the photographs again")
