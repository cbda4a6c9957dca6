"""Principal components of tokens as colours: the first three become red, green, blue.

Tokens enter by their direction alone (L2-normalised), as matching compares them; their norm only weights the
brightness, if asked. Whatever shares a basis shares its colours: a data set (here) or a pair (`viz.figures`).
Source of the idea: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024, figure 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from imatch.core import compute
from imatch.core.types import ImatchError, Tokens, normalise
from imatch.data.embeddings import Embeddings

FLAT = 1e-5
"""A component with a smaller range shows but rounding, and is shown as half."""


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
        projected = (normalise(values) - self.mean) @ self.axes.T
        colours = np.clip((projected - self.low) / np.where(flat, 1, span), 0, 1)
        colours[:, flat] = 0.5
        if weighted:
            colours *= np.minimum(1, np.linalg.norm(values, axis=1, keepdims=True) / (self.norm or 1))
        return colours.reshape(*tokens.grid, 3).astype(np.float32)


def fit(tokens: np.ndarray) -> Basis:
    """The basis of some tokens.

    Args:
        tokens: (n, d) float, n at least 4 and d at least 3.

    Raises:
        ImatchError: there are too few tokens, or they have too few numbers.

    >>> fit(np.random.default_rng(0).normal(size=(6, 4))).axes.shape
    (3, 4)
    """
    n, d = tokens.shape
    if n < 4 or d < 3:
        raise ImatchError(f"three components need at least 4 tokens of 3 numbers, not {n} of {d}")
    directions = normalise(tokens.astype(np.float32))
    mean = directions.mean(axis=0, dtype=np.float64)
    directions -= mean.astype(np.float32)
    axes = np.linalg.eigh((directions.T @ directions).astype(np.float64))[1][:, :-4:-1].T
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]
    low, high = np.percentile(directions @ axes.T, (1, 99), axis=0)
    norms = np.linalg.norm(tokens.astype(np.float32), axis=1)
    return Basis(mean, axes, low, high, float(np.percentile(norms, 99)))


def gridless(what: str) -> str:
    """Why there are no colours of keypoints, and what to do."""
    return (
        f"{what} lie on no grid, and DenseFT colours the cells of one: leave DenseFT out for keypoints, "
        "or use a backbone with a grid (DINOv3, dsift)"
    )


def fit_embeddings(embeddings: Embeddings, sample: int = 50_000) -> Basis:
    """The basis of a data set, from tokens spread evenly over all of its photographs.

    Every photograph gives the share of the sample that it has of the tokens, drawn with a seed of its own.
    Memory: some 16 bytes a number of the sample.

    Args:
        embeddings: tokens on grids, of 3 dimensions or more.
        sample: about how many tokens are looked at.

    Raises:
        ImatchError: a photograph's descriptors lie on no grid, or tokens or dimensions are too few.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from imatch.core.types import Tokens
    >>> from imatch.core.types import grid_xy
    >>> from imatch.data.shards import Shards
    >>> from imatch.data.store import Stored
    >>> values = np.random.default_rng(0).normal(size=(6, 4)).astype("f4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tokens = Tokens(values[0], values, grid_xy((2, 3), (32, 48)), grid=(2, 3))
    ...     Shards(Path(folder)).write(0, [{"id": "a.jpg", "size": (32, 48), "sha256": ""}], [tokens])
    ...     _ = Shards(Path(folder)).merge()
    ...     fit_embeddings(Stored(Path(folder))).axes.shape
    (3, 4)
    """
    without = next((row["id"] for row in embeddings.rows if row["grid"] is None), None)
    if without is not None:
        raise ImatchError(gridless(f"the local descriptors of {without}"))
    total, d = sum(row["n"] for row in embeddings.rows), embeddings.tokens(0).descriptors.shape[1]
    if sample < 4 or total < 4 or d < 3:
        raise ImatchError(
            f"DenseFT's three components need at least 4 tokens of 3 numbers; these photographs have {total} of {d} "
            f"and the sample is {sample}: use larger photographs, more of them, or a larger sample"
        )
    shown = np.unique(np.linspace(0, len(embeddings) - 1, min(len(embeddings), sample)).astype(int))
    share = min(1.0, sample / sum(embeddings.rows[row]["n"] for row in shown))
    found = []
    for row in compute.progress(shown.tolist(), "DenseFT"):
        descriptors = embeddings.tokens(row).descriptors
        n = len(descriptors)
        # drawn, for even steps could fall on the same column of every grid
        drawn = np.random.default_rng(row).choice(n, min(n, max(1, round(n * share))), replace=False) if n else []
        found.append(descriptors[np.sort(drawn).astype(int)])
    return fit(np.concatenate(found))


def covered(tokens: Tokens, size: tuple[int, int]) -> tuple[float, float]:
    """The (h, w) pixels of the original photograph that a grid spans: all of them, but for crops and thinned grids.

    Args:
        tokens: on a grid.
        size: (H, W) of the photograph.

    >>> from imatch.core.types import grid_xy
    >>> covered(Tokens(np.ones(1), np.ones((6, 4)), grid_xy((2, 3), (32, 48)), grid=(2, 3)), (32, 48))
    (32.0, 48.0)
    """
    if tokens.grid is None:
        raise ImatchError(gridless("these tokens"))
    (h, w), (dx, dy) = tokens.grid, tokens.xy[-1].astype(float) - tokens.xy[0]
    return float(dy / (h - 1) * h if h > 1 else size[0]), float(dx / (w - 1) * w if w > 1 else size[1])


def denseft_picture(colours: np.ndarray, size: tuple[float, float], long_side: int = 512) -> Image.Image:
    """Colours as a picture of the photograph's aspect. Each token stays a block of one colour.

    Args:
        colours: (h, w, 3) float in [0, 1].
        size: (H, W), of which only the ratio counts.
        long_side: pixels of the longer side.

    >>> denseft_picture(np.ones((2, 3, 3)), (682, 1024)).size
    (512, 341)
    """
    h, w = (max(1, round(side * long_side / max(size))) for side in size)
    blocks = Image.fromarray(np.round(np.asarray(colours) * 255).astype(np.uint8))
    return blocks.resize((w, h), Image.Resampling.NEAREST)
