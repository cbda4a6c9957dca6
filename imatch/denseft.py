"""DenseFT: what a grid of tokens says, as a picture. The first three principal components become red, green, blue.

One basis (`components.Basis`) serves a whole data set, so that one colour means one thing in all of its photographs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from imatch import components, runs
from imatch.components import Basis, gridless
from imatch.records import ImatchError, Tokens
from imatch.store import Embeddings

BLOCK = 4096
"""Tokens a matrix product."""


def fit(embeddings: Embeddings, sample: int = 100_000) -> Basis:
    """The basis of a data set, from tokens spread evenly over all of its photographs.

    Every photograph gives the share of the sample that it has of the tokens, drawn with a seed of its own: one seed
    for all would look at the same places of every photograph. Memory: two (d, d) matrices and a block of tokens.

    Args:
        embeddings: tokens on grids, of 3 dimensions or more.
        sample: about how many tokens are looked at.

    Raises:
        ImatchError: a photograph's descriptors lie on no grid, or tokens or dimensions are too few.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from imatch import store
    >>> values = np.random.default_rng(0).normal(size=(6, 4)).astype("f4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     tokens = Tokens(values[0], values, store.grid_xy((2, 3), (32, 48)), grid=(2, 3))
    ...     store.write_shard(Path(folder), 0, [{"id": "a.jpg", "size": (32, 48), "sha256": ""}], [tokens])
    ...     _ = store.merge(Path(folder))
    ...     fit(Embeddings(Path(folder))).axes.shape
    (3, 4)
    """
    without = next((row["id"] for row in embeddings.rows if row["grid"] is None), None)
    if without is not None:
        raise ImatchError(gridless(f"the local descriptors of {without} in {embeddings.folder}"))
    total, d = sum(row["n"] for row in embeddings.rows), embeddings.tokens(0).descriptors.shape[1]
    if sample < 4 or total < 4 or d < 3:
        raise ImatchError(
            f"DenseFT's three components need at least 4 tokens of 3 numbers; {embeddings.folder} has {total} of {d} "
            f"and the sample is {sample}: use larger photographs, more of them, or a larger sample"
        )
    return components.fit(lambda what: _blocks(embeddings, sample, f"DenseFT {what}"))


def _blocks(embeddings: Embeddings, sample: int, what: str) -> Iterator[np.ndarray]:
    """The sample's tokens as (BLOCK or so, d) float64, the same ones on every call."""
    shown = np.unique(np.linspace(0, len(embeddings) - 1, min(len(embeddings), sample)).astype(int))
    share = min(1.0, sample / sum(embeddings.rows[row]["n"] for row in shown))
    held: list[np.ndarray] = []
    for row in runs.progress(shown.tolist(), what):
        descriptors = embeddings.tokens(row).descriptors
        n = len(descriptors)
        # drawn, for even steps could fall on the same column of every grid
        drawn = np.random.default_rng(row).choice(n, min(n, max(1, round(n * share))), replace=False) if n else []
        held.append(descriptors[np.sort(drawn).astype(int)].astype(np.float64))
        if sum(map(len, held)) >= BLOCK:
            yield np.concatenate(held)
            held.clear()
    if held:
        yield np.concatenate(held)


def covered(tokens: Tokens, size: tuple[int, int]) -> tuple[float, float]:
    """The (h, w) pixels of the original photograph that a grid spans: all of them, but for crops and thinned grids.

    Args:
        tokens: on a grid.
        size: (H, W) of the photograph.

    >>> from imatch import store
    >>> covered(Tokens(np.ones(1), np.ones((6, 4)), store.grid_xy((2, 3), (32, 48)), grid=(2, 3)), (32, 48))
    (32.0, 48.0)
    """
    if tokens.grid is None:
        raise ImatchError(gridless("these tokens"))
    (h, w), (dx, dy) = tokens.grid, tokens.xy[-1].astype(float) - tokens.xy[0]
    return float(dy / (h - 1) * h if h > 1 else size[0]), float(dx / (w - 1) * w if w > 1 else size[1])


def picture(colours: np.ndarray, size: tuple[float, float], long_side: int = 512) -> Image.Image:
    """Colours as a picture of the photograph's aspect. Each token stays a block of one colour (nearest neighbour):
    nothing is drawn between tokens that no token says.

    Args:
        colours: (h, w, 3) float in [0, 1].
        size: (H, W), of which only the ratio counts.
        long_side: pixels of the longer side.

    >>> picture(np.ones((2, 3, 3)), (682, 1024)).size
    (512, 341)
    """
    h, w = (max(1, round(side * long_side / max(size))) for side in size)
    blocks = Image.fromarray(np.round(np.asarray(colours) * 255).astype(np.uint8))
    return blocks.resize((w, h), Image.Resampling.NEAREST)
