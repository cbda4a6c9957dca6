"""Dual softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeInt

from imatch import devices, neighbours, plugins
from imatch.neighbours import Side
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
        device: "cpu", a GPU ("cuda", "cuda:1"), or "auto" (the GPU, if there is one).

    Raises:
        ImatchError: a number out of its range, or a missing device.

    >>> tokens = Tokens(np.ones(1), np.eye(3)[[0, 1, 2, 2]], np.zeros((4, 2), np.float32))
    >>> DualSoftmax(min_probability=0.5)(tokens, tokens).index_a.tolist()
    [0, 1]
    """

    temperature: Annotated[float, Field(ge=0.001)] = 0.02
    min_probability: plugins.Share = 0.2
    max_matches: NonNegativeInt = 2000
    device: str = field(default="cpu", compare=False)

    def __post_init__(self) -> None:
        plugins.check(self)
        object.__setattr__(self, "device", devices.resolved(self.device))

    def __call__(self, a: Tokens, b: Tokens) -> Matches:
        """See `Matcher`."""
        of_a, of_b = neighbours.sides(a, b)
        scores = _log_probabilities(of_a, of_b, self.temperature, self.device)
        i, j, score = neighbours.mutual(*neighbours.nearest(scores, 1))
        kept = np.exp(score) >= self.min_probability
        return neighbours.correspondences(of_a, of_b, i[kept], j[kept], self.max_matches)


def _log_probabilities(a: Side, b: Side, temperature: float, device: str) -> Iterator[Any]:
    """Tiles (t, n_b) float32: the sums over rows and columns in a first pass, the probabilities in a second one."""
    if not (len(a.rows) and len(b.rows)):
        yield from neighbours.products(a, b, device)  # the empty tile, of which there is no sum
        return
    of_rows, of_columns = [], None
    for tile in neighbours.products(a, b, device):
        tile /= temperature
        of_rows.append(_log_sum_exp(tile, 1))
        below = _log_sum_exp(tile, 0)
        of_columns = below if of_columns is None else _log_add_exp(of_columns, below)
    for tile, of_these in zip(neighbours.products(a, b, device), of_rows, strict=True):
        tile *= 2 / temperature
        tile -= of_these[:, None]
        tile -= of_columns
        yield tile


def _log_sum_exp(x: Any, axis: int) -> Any:
    if not isinstance(x, np.ndarray):
        return x.logsumexp(axis)
    top = x.max(axis=axis, keepdims=True)
    return np.log(np.exp(x - top).sum(axis=axis)) + top.squeeze(axis)


def _log_add_exp(x: Any, y: Any) -> Any:
    return np.logaddexp(x, y) if isinstance(x, np.ndarray) else x.logaddexp(y)
