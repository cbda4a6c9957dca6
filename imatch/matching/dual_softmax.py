"""Dual softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from imatch import devices, neighbours, plugins
from imatch.records import Matches, Tokens


@dataclass(frozen=True)
class DualSoftmax:
    """Pairs that are each other's most probable partner, where probable is what stands out among all the others.

    The probability of a pair is the softmax of its cosine over all of B times that over all of A, so a descriptor
    that resembles many has none that is likely.

    Source: Sun et al., "LoFTR: Detector-free local feature matching with transformers", CVPR 2021, equation 3.

    Attributes:
        temperature: what cosines are divided by before the softmax, from 0.001 on; smaller is sharper. LoFTR's 0.1 is
            for features of its own, which are not of norm 1; among 1,000 SIFT 0.02 finds what the ratio test does.
        min_probability: 0 to 1; a pair below it is dropped. 0.2 is LoFTR's.
        max_matches: how many of the strongest (by cosine) are kept; 0 keeps all.
        device: "auto" (the GPU, if there is one), "cpu", "cuda" or "cuda:1".

    Raises:
        ImatchError: a number out of its range, or a missing device.

    >>> import numpy as np
    >>> tokens = Tokens(np.ones(1), np.eye(3)[[0, 1, 2, 2]], np.zeros((4, 2), np.float32))
    >>> DualSoftmax(min_probability=0.5)(tokens, tokens).index_a.tolist()
    [0, 1]
    """

    temperature: Annotated[float, Field(ge=0.001)] = 0.02
    min_probability: plugins.Share = 0.2
    max_matches: NonNegativeInt = 2000
    device: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        plugins.check(self)
        object.__setattr__(self, "device", devices.resolved(self.device))

    def __call__(self, a: Tokens, b: Tokens) -> Matches:
        """See `Matcher`."""
        of_a, of_b = neighbours.sides(a, b, self.device)
        scores = _log_probabilities(of_a.directions, of_b.directions, self.temperature)
        i, j, score = neighbours.mutual(*neighbours.largest(scores, 1))
        kept = score.exp() >= self.min_probability
        i, j = i[kept], j[kept]
        cosine = (of_a.directions[i] * of_b.directions[j]).sum(dim=1).float()
        return neighbours.correspondences(of_a, of_b, i, j, cosine, self.max_matches)


def _log_probabilities(a: Tensor, b: Tensor, temperature: float) -> Iterator[Tensor]:
    """Tiles (t, n_b) float32: the sums over rows and columns in a first pass, the probabilities in a second one.

    Sums of exponentials are rounded by how they are tiled, in the last digits of float64; float32 hides that.
    """
    of_rows, of_columns = a.new_empty(len(a), 1), a.new_full((len(b),), -math.inf)
    scaled, n = a.new_empty(0), 0  # what is used again and again keeps its memory, as in neighbours.tiles
    for tile in neighbours.tiles(a, b):
        scaled.resize_(tile.shape).copy_(tile).div_(temperature)
        of_rows[n : n + len(tile)] = scaled.logsumexp(dim=1, keepdim=True)
        torch.logaddexp(of_columns, scaled.logsumexp(dim=0), out=of_columns)
        n += len(tile)
    n = 0
    for tile in neighbours.tiles(a, b):
        scaled.resize_(tile.shape).copy_(tile).mul_(2 / temperature)
        scaled.sub_(of_rows[n : n + len(tile)]).sub_(of_columns)
        n += len(tile)
        yield tile.copy_(scaled)
