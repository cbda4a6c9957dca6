"""What the header of a photograph says of its camera, and of how it was held."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from imatch.data.images import UPRIGHT

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
    size, _, exif = _header(path)
    tags = {name: _number(exif.get(ExifTags.Base[name])) for name in _READ}
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
    turn = _header(path, behind=True)[1]
    return turn if turn in UPRIGHT else 1


Header = tuple[tuple[int, int], int, dict[int, object]]
"""(w, h), the orientation, and the tags of the camera."""


def _header(path: Path, behind: bool = False) -> Header:
    """What the header of a photograph says; of one that is gone or broken, nothing: decoding says so. The EXIF of a PNG
    can lie behind its pixels, which are all read then: only if that is asked for."""
    try:
        return _read(path, behind, path.stat().st_mtime_ns)
    except Exception:  # decoders raise what they like on broken bytes
        return (0, 0), 1, {}


@lru_cache(maxsize=4096)
def _read(path: Path, behind: bool, _changed: int) -> Header:
    with Image.open(path) as photograph:
        if not behind and photograph.format == "PNG" and "exif" not in photograph.info:
            return photograph.size, 1, {}
        exif = photograph.getexif()
        return photograph.size, exif.get(ExifTags.Base.Orientation, 1), dict(exif.get_ifd(ExifTags.IFD.Exif))


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


_READ = (
    "FocalLengthIn35mmFilm",
    "FocalLength",
    "FocalPlaneXResolution",
    "FocalPlaneResolutionUnit",
    "ExifImageWidth",
    "ExifImageHeight",
)


def _number(value: object) -> float:
    """0 for what is not there, or not a number that counts."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, ZeroDivisionError):
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
