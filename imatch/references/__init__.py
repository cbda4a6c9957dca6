"""Photograph -> View: rotated and cropped references with their exact matrix. A kind is one class in one file
and one line here.

Every kind maps in "edge" coordinates, where a pixel covers [i, i + 1], as Pillow does inside; the matrices that
leave this room are for pixel centres at whole numbers, as everywhere in imatch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from PIL import Image

from imatch import plugins
from imatch.records import View

REFERENCES = {
    "legacy": "imatch.references.legacy:Legacy",
    "isometric": "imatch.references.isometric:Isometric",
}


class Reference(Protocol):
    """What imatch asks of a kind of reference; its options are the fields of its frozen dataclass."""

    def __call__(self, photograph: np.ndarray, angle: float, crop: float) -> View:
        """The view of a photograph turned by `angle` degrees counter-clockwise and cropped around its centre.

        Args:
            photograph: (h, w, 3) uint8 RGB.
            angle: degrees counter-clockwise, any number.
            crop: ratio in (0, 1].
        """


def create(kind: str, options: Mapping[str, Any] | None = None) -> Reference:
    """Make a kind of reference.

    Raises:
        ImatchError: unknown kind or option, with the nearest known one.

    >>> create("legacy", {"resize_to_original": True})
    Legacy(resize_to_original=True)
    """
    reference: Reference = plugins.create(REFERENCES, "kind of reference", kind, options)
    return reference


def name(stem: str, angle: float, crop: float) -> str:
    """The file name of a reference, without its suffix.

    >>> name("house", 45, 0.5), name("house", -22.5, 0.125)
    ('house_rot045_crop50', 'house_rotm22p5_crop12p5')
    """
    return f"{stem}_rot{_number(angle, 3)}_crop{_number(round(crop * 100, 6), 0)}"


def _number(value: float, digits: int) -> str:
    sign = "m" if value < 0 else ""
    whole = float(value).is_integer()
    text = f"{abs(int(value)):0{digits}d}" if whole else f"{abs(value):g}".replace(".", "p")
    return sign + text


def shift(x: float, y: float) -> np.ndarray:
    """(3, 3) translation by (x, y) pixels."""
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])


def turn(angle: float) -> np.ndarray:
    """(3, 3) rotation about the origin, counter-clockwise on the screen (y points down); exact at right angles.

    >>> (turn(90) @ [1, 0, 1]).tolist()
    [0.0, -1.0, 1.0]
    """
    a = np.radians(angle)
    c, s = round(float(np.cos(a)), 15) + 0.0, round(float(np.sin(a)), 15) + 0.0
    return np.array([[c, s, 0.0], [-s, c, 0], [0, 0, 1]])


def centres(matrix: np.ndarray) -> np.ndarray:
    """A matrix for edge coordinates as the matrix for pixel centres."""
    return shift(-0.5, -0.5) @ matrix @ shift(0.5, 0.5)


def enlarged(view: View, source: tuple[int, int], size: tuple[int, int]) -> View:
    """A view resized (bicubic) to another size, with the matrix and the mask that it has then.

    Args:
        view: of the photograph.
        source: (H, W) of the photograph.
        size: (h, w) wanted.

    >>> view = View(np.zeros((2, 3, 3), np.uint8), np.ones((2, 3), bool), np.eye(3))
    >>> enlarged(view, (2, 3), (4, 6)).matrix.tolist()
    [[2.0, 0.0, 0.5], [0.0, 2.0, 0.5], [0.0, 0.0, 1.0]]
    """
    h, w = size
    pixels = np.asarray(Image.fromarray(view.pixels).resize((w, h), Image.Resampling.BICUBIC))
    matrix = centres(np.diag([w / view.mask.shape[1], h / view.mask.shape[0], 1])) @ view.matrix
    return View(pixels, seen(matrix, source, size), matrix)


def seen(matrix: np.ndarray, source: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Which pixels of a view show the photograph.

    Args:
        matrix: (3, 3) photograph -> view, pixel centres.
        source: (H, W) of the photograph.
        size: (h, w) of the view.

    Returns:
        (h, w) bool.
    """
    (a, b, c), (d, e, f), _ = np.linalg.inv(matrix)
    v, u = np.arange(size[0])[:, None], np.arange(size[1])[None]
    edge = 0.5 + 1e-6
    inside = np.ones(size, bool)
    for position, side in ((a * u + b * v + c, source[1]), (d * u + e * v + f, source[0])):
        inside &= (position >= -edge) & (position <= side - 1 + edge)
    return inside
