"""Principal components of tokens as colours: the first three become red, green, blue.

Tokens enter by their direction alone (L2-normalised), as matching compares them; their norm only weights the
brightness, if asked. Whatever shares a basis shares its colours: a data set (`denseft`) or a pair (`pictures`).
Source of the idea: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024, figure 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from imatch import pooling
from imatch.records import ImatchError, Tokens

FLAT = 1e-5
"""A component whose colours lie closer than this shows nothing but rounding, and is shown as half."""


@dataclass(frozen=True)
class Basis:
    """From tokens to colours, the same for every photograph.

    Attributes:
        mean: (d,) float64, the mean direction.
        axes: (3, d) float64, the principal components, strongest first, of norm 1; the entry of largest magnitude
            of each is positive, for a component has no sign of its own.
        low, high: (3,) float64, the projections that become 0 and 1 (1st and 99th percentile of the sample).
        norm: the 99th percentile of the tokens' norms.

    >>> basis = Basis(np.zeros(3), np.eye(3), np.zeros(3), np.ones(3), norm=2.0)
    >>> tokens = Tokens(np.ones(1), np.array([[1.0, 0, 0], [0, 5, 0]]), np.zeros((2, 2)), grid=(1, 2))
    >>> basis(tokens).tolist()
    [[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    >>> basis(tokens, weighted=True).tolist()
    [[[0.5, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    """

    mean: np.ndarray
    axes: np.ndarray
    low: np.ndarray
    high: np.ndarray
    norm: float

    def __call__(self, tokens: Tokens, weighted: bool = False) -> np.ndarray:
        """The colours of one photograph's grid.

        Args:
            tokens: on a grid (h, w), of the dimension that the basis has.
            weighted: multiply each colour by min(1, norm of its token / `norm`), so that weak tokens darken.

        Returns:
            (h, w, 3) float32 in [0, 1].

        Raises:
            ImatchError: the tokens lie on no grid, or have another dimension.
        """
        if tokens.grid is None:
            raise ImatchError(gridless("these tokens"))
        values = tokens.descriptors.astype(np.float64)
        if values.shape[1] != len(self.mean):
            raise ImatchError(
                f"tokens of {values.shape[1]} numbers do not fit a DenseFT basis of {len(self.mean)}: "
                "fit one on embeddings of the same backbone"
            )
        span = self.high - self.low
        flat = span < FLAT
        projected = (pooling.normalise(values) - self.mean) @ self.axes.T
        colours = np.clip((projected - self.low) / np.where(flat, 1, span), 0, 1)
        colours[:, flat] = 0.5
        if weighted:
            colours *= np.minimum(1, np.linalg.norm(values, axis=1, keepdims=True) / (self.norm or 1))
        return colours.reshape(*tokens.grid, 3).astype(np.float32)


def fit(blocks: Callable[[str], Iterable[np.ndarray]]) -> Basis:
    """The basis of tokens that come in blocks, twice: once for the axes, once for their range.

    Args:
        blocks: from what the pass is for ("basis" or "range") to blocks (n, d) of tokens, the same in both passes;
            4 tokens or more of 3 numbers or more.

    Raises:
        ImatchError: there are too few tokens, or they have too few numbers.

    >>> tokens = np.random.default_rng(0).normal(size=(6, 4))
    >>> fit(lambda _: [tokens[:2], tokens[2:]]).axes.shape
    (3, 4)
    """
    count, first, second = 0, np.zeros(1), np.zeros((1, 1))
    for block in blocks("basis"):
        directions = pooling.normalise(block.astype(np.float64))
        count += len(block)
        first = first + directions.sum(axis=0)
        second = second + directions.T @ directions
    if count < 4 or len(first) < 3:
        raise ImatchError(f"three components need at least 4 tokens of 3 numbers, not {count} of {len(first)}")
    mean = first / count
    axes = np.linalg.eigh(second / count - np.outer(mean, mean))[1][:, :-4:-1].T
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]
    projected, norms = [], []
    for block in blocks("range"):
        values = block.astype(np.float64)
        projected.append((pooling.normalise(values) - mean) @ axes.T)
        norms.append(np.linalg.norm(values, axis=1))
    low, high = np.percentile(np.concatenate(projected), (1, 99), axis=0)
    return Basis(mean, axes, low, high, float(np.percentile(np.concatenate(norms), 99)))


def gridless(what: str) -> str:
    """Why there are no colours of keypoints, and what to do."""
    return (
        f"{what} lie on no grid, and DenseFT colours the cells of one: leave DenseFT out for keypoints, "
        "or use a backbone with a grid (DINOv3, dsift)"
    )
