"""RootSIFT on a regular grid: the grid protocol of a vision transformer, without weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
from pydantic import PositiveFloat, PositiveInt

from imatch import plugins, pooling, registry, store
from imatch.records import Tokens


@dataclass(frozen=True)
class DenseSift:
    """One upright descriptor at the centre of every patch, global vector by GeM. It does not turn with the
    photograph: that is what it is compared for.

    Attributes:
        patch: side of a patch in pixels.
        width: side of the square that a descriptor looks at, in pixels.
        p: exponent of the generalised mean.

    Raises:
        ImatchError: a number out of its range.

    >>> noise = np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), np.uint8)
    >>> (tokens,) = DenseSift()(noise)
    >>> tokens.vector.shape, tokens.as_grid().shape
    ((128,), (4, 6, 128))
    """

    patch: PositiveInt = 16
    width: PositiveFloat = 48.0
    p: PositiveFloat = 3.0

    @property
    def device(self) -> str:
        """It runs on the CPU."""
        return "cpu"

    @property
    def resampling(self) -> str:
        """OpenCV, as SIFT does without torch."""
        return "opencv"

    @property
    def digest(self) -> str:
        """There are no weights; whose SIFT it is."""
        return f"OpenCV {cv2.__version__}"

    def __post_init__(self) -> None:
        plugins.check(self)

    def load(self) -> None:
        """Nothing: there are no weights."""

    def __call__(self, photographs: np.ndarray) -> list[Tokens]:
        """Tokens of (B, h, w, 3) uint8 RGB photographs, on a grid of (h / patch, w / patch)."""
        with ThreadPoolExecutor(registry.cores()) as pool:
            return list(pool.map(self._tokens, photographs))

    def _tokens(self, photograph: np.ndarray) -> Tokens:
        size = photograph.shape[:2]
        grid = (size[0] // self.patch, size[1] // self.patch)
        xy = store.grid_xy(grid, size)
        grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
        shift = 0.0
        if self.patch % 2 == 0:
            # OpenCV rounds a keypoint to a whole pixel and the centre of an even patch lies between pixels:
            # after this mean of 2 x 2, pixel (x, y) shows what was at (x - 0.5, y - 0.5)
            grey = cv2.blur(grey, (2, 2), anchor=(1, 1), borderType=cv2.BORDER_REFLECT_101)
            shift = 0.5
        # a SIFT descriptor is 4 x 4 cells, each three times the keypoint's radius wide: 6 sizes in all
        points = [cv2.KeyPoint(float(x) + shift, float(y) + shift, self.width / 6, 0.0) for x, y in xy]
        _, raw = cv2.SIFT_create().compute(grey, points)
        descriptors = pooling.root_sift(raw)
        return Tokens(pooling.gem(descriptors, self.p), descriptors, xy, grid)
