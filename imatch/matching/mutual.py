"""Mutual nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from imatch.records import ImatchError, Matches, Tokens

TILE = 2**26
"""How many similarities are in memory at once (256 MB)."""


@dataclass(frozen=True)
class Mutual:
    """Pairs in which each side is the other's nearest neighbour by cosine, above a similarity.

    Attributes:
        min_similarity: cosine below which a pair is dropped.
        max_matches: how many of the strongest are kept; 0 keeps all.

    >>> eye = np.eye(3, dtype=np.float32)
    >>> a, b = (Tokens(eye[0], d, np.zeros((3, 2), np.float32)) for d in (eye, eye[::-1]))
    >>> matches = Mutual(min_similarity=0.5)(a, b)
    >>> matches.index_a.tolist(), matches.index_b.tolist()
    ([0, 1, 2], [2, 1, 0])
    """

    min_similarity: float = 0.8
    max_matches: int = 2000

    def __call__(self, a: Tokens, b: Tokens) -> Matches:
        """See `Matcher`; equally strong pairs come in the order of A.

        Raises:
            ImatchError: the two sides' descriptors are not of one kind.
        """
        if a.descriptors.shape[1] != b.descriptors.shape[1]:
            raise ImatchError(
                f"descriptors of {a.descriptors.shape[1]} and {b.descriptors.shape[1]} numbers cannot be compared: "
                "embed both sides with the same backbone"
            )
        if not len(a.descriptors) or not len(b.descriptors):
            none = np.zeros(0, np.int64)
            return Matches(none, none, np.zeros(0, np.float32))
        of_a, of_b = (
            torch.nn.functional.normalize(torch.from_numpy(tokens.descriptors.astype(np.float32))) for tokens in (a, b)
        )
        best, in_b = _nearest(of_a, of_b)
        _, in_a = _nearest(of_b, of_a)
        kept = torch.nonzero((in_a[in_b] == torch.arange(len(in_b))) & (best >= self.min_similarity)).ravel()
        order = kept[torch.argsort(-best[kept], stable=True)][: self.max_matches or None]
        return Matches(order.numpy(), in_b[order].numpy(), best[order].numpy())


def _nearest(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of a the best cosine with a row of b, and which."""
    tiles = [(tile @ b.T).max(dim=1) for tile in a.split(max(1, TILE // len(b)))]
    return torch.cat([tile.values for tile in tiles]), torch.cat([tile.indices for tile in tiles])
