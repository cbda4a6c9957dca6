"""Lowe's ratio test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from imatch import devices, neighbours, plugins
from imatch.neighbours import Nearest, Side
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
        device: "cpu", a GPU ("cuda", "cuda:1"), or "auto" (the GPU, if there is one).

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
    device: str = field(default="cpu", compare=False)

    def __post_init__(self) -> None:
        plugins.check(self)
        object.__setattr__(self, "device", devices.resolved(self.device))

    def __call__(self, a: Tokens, b: Tokens) -> Matches:
        """See `Matcher`."""
        of_a, of_b = neighbours.sides(a, b)
        in_b, rival_in_b = _with_rivals(of_a, of_b, self.apart * spacing(b.xy), self.device)
        in_a, rival_in_a = _with_rivals(of_b, of_a, self.apart * spacing(a.xy), self.device)
        i, j, similarity = neighbours.mutual(in_b, in_a)
        kept = _angle(similarity) < self.max_ratio * _angle(np.maximum(rival_in_b[i], rival_in_a[j]))
        return neighbours.correspondences(of_a, of_b, i[kept], j[kept], self.max_matches)


def spacing(xy: np.ndarray) -> float:
    """The median distance in pixels from a position to its nearest other one; 0 where there are less than two.

    Args:
        xy: (n, 2) float; positions that occur more than once, as keypoints of several directions do, count once.

    >>> spacing(np.array([[0.0, 0], [0, 0], [3, 0], [3, 4], [7, 4]]))
    3.5
    """
    from scipy.spatial import KDTree  # a third of a second, and no other matcher needs it

    places = np.unique(xy, axis=0)
    return float(np.median(KDTree(places).query(places, k=2)[0][:, 1])) if len(places) > 1 else 0.0


def _with_rivals(a: Side, b: Side, radius: float, device: str) -> tuple[Nearest, np.ndarray]:
    """The most similar of B for each of A, n of them, and (n,) float32 the best cosine outside the circle around it, or
    0."""
    from scipy.spatial import KDTree  # a third of a second, and no other matcher needs it

    found, rivals, places = [], [], KDTree(b.xy)
    for tile in neighbours.products(a, b, device):
        best = neighbours.largest(tile, 1)
        around = KDTree(b.xy[best.index.ravel()]).sparse_distance_matrix(places, radius, output_type="ndarray")
        tile[around["i"], around["j"]] = 0.0
        found.append(best)
        rivals.append(neighbours.largest(tile, 1).score.ravel())
    return Nearest(*map(np.concatenate, zip(*found, strict=True))), np.concatenate(rivals)


def _angle(cosine: np.ndarray) -> np.ndarray:
    """Radians, float64."""
    return np.arccos(cosine.astype(np.float64).clip(-1, 1))
