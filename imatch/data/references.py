"""Photograph -> View: rotated and cropped references with their exact matrix. A kind is one function and one line in
the table.

Every kind maps in "edge" coordinates, where a pixel covers [i, i + 1], as Pillow does inside; the matrices that
leave this file are for pixel centres at whole numbers, as everywhere in imatch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field

from imatch.core import config
from imatch.core.rows import PhotoRow, ReferenceRow
from imatch.core.types import ImatchError, View


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


class _Asked(config.Said):
    angles: Annotated[list[Annotated[float, Field(ge=-3600, le=3600)]], Field(min_length=1)]
    crops: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    resize_to_original: bool


def check(kind: str, angles: Sequence[float], crops: Sequence[float], resize_to_original: bool = False) -> None:
    """Refuse what no references can be made of.

    Raises:
        ImatchError: an unknown kind, with the nearest; no angles or crops, one that is no number or out of its range,
            or two whose names would be equal.

    >>> check("isometric", [0], [1.5])
    Traceback (most recent call last):
    imatch.core.types.ImatchError: references: crops[0] must be less than or equal to 1, got 1.5
    """
    if kind not in REFERENCES:
        raise ImatchError(config.unknown("kind of reference", kind, REFERENCES))
    asked = {"angles": list(angles), "crops": list(crops), "resize_to_original": resize_to_original}
    config.checked(_Asked, asked, "references: ")
    views = [name("", angle, crop) for angle in {*angles} for crop in {*crops}]
    if len(views) != len({*views}):
        raise ImatchError(f"angles {list(angles)} or crops {list(crops)} lie so close that their names are equal")


def record(view: View, id: str, source: PhotoRow, kind: str, angle: float, crop: float) -> ReferenceRow:
    """Say of a view what it is, as a row of references.jsonl.

    Args:
        view: of the photograph.
        id: of the view.
        source: row of the photograph: id, sha256 and size.
        kind, angle, crop: how it was made.
    """
    h, w = view.mask.shape
    return {
        "id": id,
        "source": source["id"],
        "source_sha256": source["sha256"],
        "kind": kind,
        "angle": angle,
        "crop": crop,
        "size": (h, w),
        "source_size": source["size"],
        "matrix": view.matrix.tolist(),
        "scale": float(math.sqrt(np.linalg.det(view.matrix[:2, :2]))),
        "covered": float(view.mask.mean()),
        "mask": None,
    }


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


def legacy(photograph: np.ndarray, angle: float, crop: float, resize_to_original: bool = False) -> View:
    """Rotate (bicubic, canvas expanded), fit to the photograph's own size, cut the centre by the ratio.

    Its scale changes with the angle (on a 3:2 photograph 1.0 at 0, 0.83 at 30 and 1.5 at 90 degrees) and it can
    leave black corners, so it measures rotation and zoom together; `isometric` measures rotation alone.

    Args:
        photograph: (h, w, 3) uint8 RGB.
        angle: degrees counter-clockwise, any number.
        crop: ratio in (0, 1].
        resize_to_original: enlarge the view, bicubic, to the photograph's own (h, w).

    Returns:
        The view, of (round(h * crop), round(w * crop)) pixels, or all (h, w).

    >>> view = legacy(np.zeros((40, 60, 3), np.uint8), angle=90, crop=0.5)
    >>> view.pixels.shape, round(float(np.hypot(*view.matrix[:2, 0])), 3)
    ((20, 30, 3), 1.5)
    """
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
    return enlarged(view, (h, w), (h, w)) if resize_to_original else view


def isometric(photograph: np.ndarray, angle: float, crop: float, resize_to_original: bool = False) -> View:
    """Cut a centred square of side crop * min(h, w) / sqrt(2) from the rotated photograph in one bicubic step.

    The square lies inside the photograph at every angle, so no corner is empty. Its centre sits where multiples
    of 90 degrees fall on whole pixels, so those are exact copies.

    Args:
        photograph, angle, crop: as of `legacy`.
        resize_to_original: enlarge the view, bicubic, to a square of min(h, w) pixels: one scale at every angle still.

    >>> view = isometric(np.zeros((100, 150, 3), np.uint8), angle=30, crop=1.0)
    >>> view.pixels.shape, bool(view.mask.all()), round(float(np.linalg.det(view.matrix[:2, :2])), 6)
    ((70, 70, 3), True, 1.0)
    """
    h, w = photograph.shape[:2]
    side = max(1, math.floor(crop * min(h, w) / math.sqrt(2)))
    x, y = (w - side) // 2 + side / 2, (h - side) // 2 + side / 2
    matrix = shift(side / 2, side / 2) @ turn(math.fmod(angle, 360)) @ shift(-x, -y)
    back = np.linalg.inv(matrix)[:2].ravel().tolist()
    image = Image.fromarray(photograph)
    pixels = np.asarray(image.transform((side, side), Image.Transform.AFFINE, back, Image.Resampling.BICUBIC))
    matrix = centres(matrix)
    view = View(pixels, seen(matrix, (h, w), (side, side)), matrix)
    return enlarged(view, (h, w), (min(h, w), min(h, w))) if resize_to_original else view


REFERENCES = {"legacy": legacy, "isometric": isometric}
