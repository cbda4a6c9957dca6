"""What the header of a photograph says of its camera, and of how it was held."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import lru_cache
from numbers import Real
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from imatch.data.formats import opened
from imatch.data.tiff import UPRIGHT

DIAGONAL_35MM = math.hypot(36, 24)
"""Millimetres, which a focal length "in 35 mm film" is for (CIPA DCG-001)."""
MILLIMETRES = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
"""Of EXIF's units of resolution."""
MIRRORED = {2: (True, False), 3: (True, True), 4: (False, True), 6: (True, False), 7: (True, True), 8: (False, True)}
"""EXIF orientation -> whether x and y of an upright photograph run the other way in its file; from 5 on they also
change places."""


def focal_lengths(a: Path | np.ndarray, b: Path | np.ndarray) -> tuple[float, float] | None:
    """Read the focal lengths of two photographs; None unless both are known. Arrays have no header."""
    if not (isinstance(a, Path) and isinstance(b, Path)):
        return None
    of_a, of_b = focal_length(a), focal_length(b)
    return (of_a, of_b) if of_a and of_b else None


def focal_length(path: Path) -> float | None:
    """Read the focal length in pixels of the photograph in full; None where its EXIF does not say it.

    That is the length in 35 mm film by the diagonal, else the length in millimetres by the pixels of a millimetre of
    the sensor. A photograph that was cropped afterwards says what was true before.

    >>> focal_length(Path("gone.jpg")) is None
    True
    """
    size, tags = _header(path)
    if tags["FocalLengthIn35mmFilm"]:
        return tags["FocalLengthIn35mmFilm"] / DIAGONAL_35MM * math.hypot(*size)
    unit = MILLIMETRES.get(int(tags["FocalPlaneResolutionUnit"] or 2))
    if not (tags["FocalLength"] and tags["FocalPlaneXResolution"] and unit):
        return None
    taken = max(tags["ExifImageWidth"], tags["ExifImageHeight"]) or max(size)
    return tags["FocalLength"] * tags["FocalPlaneXResolution"] / unit * max(size) / taken


def orientation(path: Path) -> int:
    """Read the EXIF orientation of a photograph, 1 to 8; 1 where nothing, or nothing sensible, says it.

    >>> orientation(Path("gone.jpg"))
    1
    """
    turn = int(_header(path, behind=True)[1]["Orientation"])
    return turn if turn in UPRIGHT else 1


Header = tuple[tuple[int, int], defaultdict[str, float]]
"""(w, h), and the numbers above 0 of the EXIF by name, 0 for what is not there."""


def _header(path: Path, behind: bool = False) -> Header:
    """What a header says; nothing, if it is broken. EXIF `behind` the pixels of a PNG costs reading them all."""
    try:
        return _read(path, behind, path.stat().st_mtime_ns)
    except Exception:  # decoders raise what they like on broken bytes
        return (0, 0), defaultdict(float)


@lru_cache(maxsize=4096)
def _read(path: Path, behind: bool, _changed: int) -> Header:
    with path.open("rb") as file:
        photograph = opened(file)
        late = photograph.format == "PNG" and "exif" not in photograph.info and not behind
        exif = Image.Exif() if late else photograph.getexif()
        said = {**exif, **exif.get_ifd(ExifTags.IFD.Exif)}
        numbers = {tag: float(value) for tag, value in said.items() if isinstance(value, Real)}
        tags = {ExifTags.TAGS.get(tag, ""): x for tag, x in numbers.items() if 0 < x < math.inf}
        return photograph.size, defaultdict(float, tags)


def stored(xy: np.ndarray, size: tuple[int, int], turn: int) -> np.ndarray:
    """Give positions in an upright photograph as positions in its file, before it was turned.

    Args:
        xy: (n, 2) pixels, (0, 0) in the middle of the first.
        size: (h, w) of the upright photograph.
        turn: its `orientation`.

    Returns:
        (n, 2) pixels, (0, 0) in the middle of the first that the file holds.

    >>> stored(np.array([[0, 0], [79, 47]]), (48, 80), 6).tolist()
    [[0, 79], [47, 0]]
    """
    last = np.array(size[::-1], xy.dtype) - 1
    turned = np.where(MIRRORED.get(turn, (False, False)), last - xy, xy)
    return turned[:, ::-1] if turn >= 5 else turned
