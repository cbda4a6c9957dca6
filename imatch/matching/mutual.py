"""Mutual nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from imatch import devices, neighbours, plugins
from imatch.records import Matches, Tokens


@dataclass(frozen=True)
class Mutual:
    """Pairs in which each side is among the other's nearest neighbours by cosine.

    Attributes:
        k: among how many nearest neighbours. 1 is strict; with more, repeated things get a second chance, and
            `one_to_one` chooses.
        min_similarity: cosine below which a pair is dropped.
        min_relative: the share of the strongest pair's cosine, 0 to 1, below which a pair is dropped; 0 drops none.
        min_norm: the share of its photograph's largest norm, 0 to 1, below which a descriptor is left out. The norms
            of DINOv3's tokens differ, SIFT's are 1.
        one_to_one: whether a descriptor takes part in one pair only, the strongest whose other side is free.
        max_matches: how many of the strongest pairs are kept; 0 keeps all.
        device: "cpu", a GPU ("cuda", "cuda:1"), or "auto" (the GPU, if there is one), where numbers are rounded
            otherwise.

    Raises:
        ImatchError: a number out of its range, or a missing device.

    >>> import numpy as np
    >>> eye = np.eye(3, dtype=np.float32)
    >>> a, b = (Tokens(eye[0], d, np.zeros((3, 2), np.float32)) for d in (eye, eye[::-1]))
    >>> matches = Mutual(min_similarity=0.5)(a, b)
    >>> matches.index_a.tolist(), matches.index_b.tolist()
    ([0, 1, 2], [2, 1, 0])
    """

    k: PositiveInt = 1
    min_similarity: Annotated[float, Field(ge=-1, le=1)] = 0.8
    min_relative: plugins.Share = 0.0
    min_norm: plugins.Share = 0.0
    one_to_one: bool = True
    max_matches: NonNegativeInt = 2000
    device: str = field(default="cpu", compare=False)

    def __post_init__(self) -> None:
        plugins.check(self)
        object.__setattr__(self, "device", devices.resolved(self.device))

    def __call__(self, a: Tokens, b: Tokens) -> Matches:
        """See `Matcher`."""
        of_a, of_b = neighbours.sides(a, b, self.min_norm)
        tiles = neighbours.products(of_a, of_b, self.device)
        i, j, similarity = neighbours.mutual(*neighbours.nearest(tiles, self.k))
        kept = similarity >= self.min_similarity
        if self.min_relative and len(similarity):
            kept &= similarity >= self.min_relative * similarity.max()
        return neighbours.correspondences(of_a, of_b, i[kept], j[kept], self.max_matches, self.one_to_one)
