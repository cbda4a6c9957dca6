"""Lowe's ratio test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from scipy.spatial import KDTree
from torch import Tensor

from imatch import devices, neighbours, plugins
from imatch.neighbours import Side
from imatch.records import Matches, Tokens


@dataclass(frozen=True)
class Ratio:
    """Mutual nearest neighbours that are clearly nearer than anything elsewhere, seen from either photograph.

    A pair is kept when its angle is below `max_ratio` times the angle to its rival, the most similar descriptor in
    another place of the same photograph. Beside the best descriptor of a grid lies one that shows nearly the same, so
    the rival is looked for outside a circle around the best; Lowe, too, takes the second neighbour from another object.
    The circle's radius is `apart` times the spacing of that photograph's positions: the median distance from a position
    to its nearest other one, which is the side of a cell on a grid (turned or not), and for keypoints how densely they
    lie. An unrelated descriptor, at 90 degrees, is always among the rivals, for where nothing lies outside the circle.

    Source: Lowe, "Distinctive image features from scale-invariant keypoints", IJCV 2004, section 7.1; angles in place
    of distances as in his published program, nearly the same where angles are small.

    Attributes:
        max_ratio: of the two angles, above 0 and at most 1; smaller is stricter. Lowe's is 0.8, for distances.
        apart: in spacings, at least 0; 1.5 excludes the eight neighbours of a cell.
        max_matches: how many of the strongest pairs are kept; 0 keeps all.
        device: "auto" (the GPU, if there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        ImatchError: a number out of its range, or a missing device.

    >>> xy = np.array([[0.0, 0], [9, 0], [18, 0]], np.float32)
    >>> a = Tokens(np.ones(1), np.eye(3), xy)
    >>> b = Tokens(np.ones(1), np.array([[9, 1, 0], [0, 9, 1.0], [0, 9, 1.1]]), xy)
    >>> [Ratio(apart=apart)(a, b).index_a.tolist() for apart in (0.0, 1.5)]
    [[0], [0, 1]]
    """

    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.8
    apart: NonNegativeFloat = 1.5
    max_matches: NonNegativeInt = 2000
    device: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        plugins.check(self)
        object.__setattr__(self, "device", devices.resolved(self.device))

    def __call__(self, a: Tokens, b: Tokens) -> Matches:
        """See `Matcher`."""
        of_a, of_b = neighbours.sides(a, b, self.device)
        nearest = neighbours.nearest(of_a.directions, of_b.directions, 1)
        i, j, similarity = neighbours.mutual(*nearest)
        rival = torch.maximum(
            _rival(of_a.directions[i], of_b, j, self.apart * spacing(b.xy)),
            _rival(of_b.directions[j], of_a, i, self.apart * spacing(a.xy)),
        )
        kept = _angle(similarity) < self.max_ratio * _angle(rival)
        return neighbours.correspondences(of_a, of_b, i[kept], j[kept], similarity[kept], self.max_matches)


def spacing(xy: np.ndarray) -> float:
    """The median distance in pixels from a position to its nearest other one; 0 where there are less than two.

    Args:
        xy: (n, 2) float; positions that occur more than once, as keypoints of several directions do, count once.

    >>> spacing(np.array([[0.0, 0], [0, 0], [3, 0], [3, 4], [7, 4]]))
    3.5
    """
    places = np.unique(xy, axis=0)
    return float(np.median(KDTree(places).query(places, k=2)[0][:, 1])) if len(places) > 1 else 0.0


def _rival(directions: Tensor, other: Side, partners: Tensor, radius: float) -> Tensor:
    """(m,) float32: each direction's best cosine outside the circle around its partner, or 0."""
    found = directions.new_empty(len(directions), dtype=torch.float32)  # at once, as in neighbours.tiles
    xy = torch.from_numpy(other.xy.astype(np.float64)).to(directions.device)
    n = 0
    for tile in neighbours.tiles(directions, other.directions) if len(partners) else ():
        rows = slice(n, n + len(tile))
        away = torch.cdist(xy[partners[rows]], xy, compute_mode="donot_use_mm_for_euclid_dist")
        torch.amax(tile.masked_fill_(away <= radius, 0.0), dim=1, out=found[rows])
        n += len(tile)
    return found


def _angle(cosine: Tensor) -> Tensor:
    """Radians, float64."""
    return torch.arccos(cosine.double().clamp(-1, 1))
