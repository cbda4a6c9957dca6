"""References as older exports made them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from imatch.records import View
from imatch.references import centres, enlarged, seen, shift, turn


@dataclass(frozen=True)
class Legacy:
    """Rotate (bicubic, canvas expanded), fit to the photograph's own size, cut the centre by the ratio.

    Its scale changes with the angle (on a 3:2 photograph 1.0 at 0, 0.83 at 30 and 1.5 at 90 degrees) and it can
    leave black corners, so it measures rotation and zoom together; `isometric` measures rotation alone.

    Attributes:
        resize_to_original: enlarge the view, bicubic, to the photograph's own (h, w).

    >>> view = Legacy()(np.zeros((40, 60, 3), np.uint8), angle=90, crop=0.5)
    >>> view.pixels.shape, round(float(np.hypot(*view.matrix[:2, 0])), 3)
    ((20, 30, 3), 1.5)
    """

    resize_to_original: bool = False

    def __call__(self, photograph: np.ndarray, angle: float, crop: float) -> View:
        """See `Reference`. The view has (round(h * crop), round(w * crop)) pixels, or all (h, w)."""
        h, w = photograph.shape[:2]
        rotated = Image.fromarray(photograph).rotate(angle, Image.Resampling.BICUBIC, expand=True)
        fitted = ImageOps.fit(rotated, (w, h), Image.Resampling.BICUBIC)
        factor = max(w / rotated.width, h / rotated.height)
        size = (max(1, round(h * crop)), max(1, round(w * crop)))
        left, top = (w - size[1]) // 2, (h - size[0]) // 2
        pixels = np.asarray(fitted)[top : top + size[0], left : left + size[1]]
        matrix = centres(
            shift(-left, -top)
            @ shift(w / 2, h / 2)
            @ np.diag([factor, factor, 1])
            @ turn(math.fmod(angle, 360))
            @ shift(-w / 2, -h / 2)
        )
        view = View(pixels, seen(matrix, (h, w), size), matrix)
        return enlarged(view, (h, w), (h, w)) if self.resize_to_original else view
