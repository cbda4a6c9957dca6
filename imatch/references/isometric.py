"""References at the photograph's own scale, so that rotation is measured alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from imatch.records import View
from imatch.references import centres, enlarged, seen, shift, turn


@dataclass(frozen=True)
class Isometric:
    """A centred square of side crop * min(h, w) / sqrt(2), cut from the rotated photograph in one bicubic step.

    The square lies inside the photograph at every angle, so no corner is empty. Its centre sits where multiples
    of 90 degrees fall on whole pixels, so those are exact copies.

    Attributes:
        resize_to_original: enlarge the view, bicubic, to a square of min(h, w) pixels: one scale at every angle still.

    >>> view = Isometric()(np.zeros((100, 150, 3), np.uint8), angle=30, crop=1.0)
    >>> view.pixels.shape, bool(view.mask.all()), round(float(np.linalg.det(view.matrix[:2, :2])), 6)
    ((70, 70, 3), True, 1.0)
    """

    resize_to_original: bool = False

    def __call__(self, photograph: np.ndarray, angle: float, crop: float) -> View:
        """See `Reference`. The view is a square."""
        h, w = photograph.shape[:2]
        side = max(1, math.floor(crop * min(h, w) / math.sqrt(2)))
        x, y = (w - side) // 2 + side / 2, (h - side) // 2 + side / 2
        matrix = shift(side / 2, side / 2) @ turn(math.fmod(angle, 360)) @ shift(-x, -y)
        back = np.linalg.inv(matrix)[:2].ravel()
        image = Image.fromarray(photograph)
        pixels = np.asarray(image.transform((side, side), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC))
        matrix = centres(matrix)
        view = View(pixels, seen(matrix, (h, w), (side, side)), matrix)
        return enlarged(view, (h, w), (min(h, w), min(h, w))) if self.resize_to_original else view
