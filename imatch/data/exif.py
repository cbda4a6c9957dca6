"""What the header of a photograph says of its camera, of how it was held, and of where."""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Literal, SupportsFloat, cast

import numpy as np
from PIL import ExifTags, Image

from imatch.core import compute, config
from imatch.core.files import printable
from imatch.core.rows import PhotoRow, Position
from imatch.core.types import PassingError
from imatch.data.formats import header, opened

DIAGONAL_35MM = math.hypot(36, 24)
"""Millimetres, which a focal length "in 35 mm film" is for (CIPA DCG-001)."""
MILLIMETRES = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}
"""Of EXIF's units of resolution."""
MIRRORED = {2: (True, False), 3: (True, True), 4: (False, True), 6: (True, False), 7: (True, True), 8: (False, True)}
"""EXIF orientation -> whether x and y of an upright photograph run the other way in its file; from 5 on they also
change places."""

NO_FIX = 0.001
"""Degrees from 0 N 0 E, in the open sea, within which a receiver that knows no place says it is."""
HIGHEST = 100_000
"""Metres above the sea, or below, that no photograph is taken at."""
XMP = {
    "yaw": ("GimbalYawDegree", "CameraYawDegree", "Yaw", "FlightYawDegree"),
    "pitch": ("GimbalPitchDegree", "CameraPitchDegree", "Pitch"),
    "roll": ("GimbalRollDegree", "CameraRollDegree", "Roll"),
    "relative_altitude": ("RelativeAltitude",),
    "altitude": ("AbsoluteAltitude",),
    "latitude": ("GPSLatitude", "GpsLatitude", "Latitude"),
    "longitude": ("GPSLongitude", "GpsLongitude", "GpsLongtitude", "Longitude"),
}
"""What the XMP of DJI, Autel, Parrot, senseFly, Skydio and Pix4D calls it, the first that is there; sic."""
_SAID = re.compile(
    rf"""\b({"|".join(name for names in XMP.values() for name in names)})\s*(?:=\s*["']|>)\s*([^"'<>]+)"""
)
Written = str | bytes | SupportsFloat | Sequence[SupportsFloat] | None
"""What a header holds where a number, a side or an angle is looked for."""
FLOAT = 11, 1
"""TIFF's type of number and how many, of one in 32 bits."""
DJI = {7: "yaw", 9: "pitch", 10: "yaw", 11: "roll"}
"""Tags of DJI's MakerNote, the aircraft's before the camera's, which stands for it."""


def position(exif: Image.Exif, xmp: bytes | str) -> tuple[Position | None, str]:
    """Read where a photograph was taken and how it was held, by its EXIF, else by its XMP.

    Args:
        exif: with its GPS block and, of DJI, its MakerNote.
        xmp: the packet, empty if there is none.

    Returns:
        latitude, longitude (degrees), altitude (metres above the sea, or None) and, where they are known, yaw (of the
        camera, else of the aircraft; degrees clockwise from north, true or magnetic as it is written), pitch (above
        the horizon) and relative_altitude (metres above the take-off); None where no place can be taken. And what
        cannot be taken, and why; "" for nothing.

    >>> position(Image.Exif(), '<a drone-dji:GpsLatitude="-33.9" drone-dji:GpsLongtitude="18.4" Camera:Yaw="90"/>')
    ({'latitude': -33.9, 'longitude': 18.4, 'altitude': None, 'yaw': 90.0}, '')
    """
    said = _xmp(xmp)
    try:
        gps: dict[int, Written] = exif.get_ifd(ExifTags.IFD.GPSInfo)
    except Exception as error:  # decoders raise what they like on broken bytes
        return None, f"its GPS block cannot be read ({error})"
    written, doubt = [], ""
    if 2 in gps or 4 in gps:
        metres, below = _number(gps.get(6)), gps.get(5) in (1, b"\1", "1", "\1")
        written.append(((gps.get(2), gps.get(1)), (gps.get(4), gps.get(3)), -abs(metres) if below else metres))
    if "latitude" in said and "longitude" in said:
        sides = _side(said["latitude"], "NS"), _side(said["longitude"], "EW")
        written.append((*sides, _number(said.get("altitude"))))
    for latitude, longitude, metres in written:
        try:
            place = _degrees("latitude", *latitude, "NS", 90), _degrees("longitude", *longitude, "EW", 180)
        except ValueError as error:
            doubt = doubt or str(error)
            continue
        if max(map(abs, place)) < NO_FIX:
            doubt = doubt or "0 N 0 E, which is written where a receiver knows no place"
            continue
        above = metres if abs(metres) < HIGHEST else None  # so written, NaN is unknown, too
        found = {"latitude": place[0], "longitude": place[1], "altitude": above, **_held(exif, gps, said)}
        return cast("Position", found), f"altitude is none: {metres:,.0f} m" if abs(metres) >= HIGHEST else ""
    return None, doubt


def told(rows: Mapping[str, PhotoRow], what: Literal["doubt", "note"]) -> list[str]:
    """Say the doubts or the notes of photographs, a sentence a kind with the first as its example.

    >>> told({"a.jpg": {"id": "a.jpg", "sha256": "", "doubt": "latitude is past 90: 95"}}, "doubt")
    ['not taken from the headers of 1 photographs (latitude is past 90: 95): a.jpg']
    """
    found: dict[str, list[str]] = defaultdict(list)
    for id, row in sorted(rows.items()):
        if said := row.get(what):
            found[re.sub("[-+.,0-9]+", "", said)].append(id)
    start = {"doubt": "not taken from the headers", "note": "assumed of the pixels"}[what]
    return [
        f"{start} of {len(ids)} photographs ({rows[ids[0]].get(what)}): {config.names(map(printable, ids))}"
        for ids in found.values()
    ]


def _xmp(packet: bytes | str) -> dict[str, str]:
    """What a packet says, by the keys of `XMP`. No parser of XML: a packet is often broken, and can hold bombs."""
    text = _text(packet)
    text = text.partition("CameraOrientationNED")[2] + text  # Skydio gives angles in several frames
    said: dict[str, str] = {}
    for name, value in _SAID.findall(text):
        said.setdefault(name, value.strip())
    found = {}
    for key, names in XMP.items():
        if there := [said[name] for name in names if name in said]:
            found[key] = there[0]
    return found


def _text(value: Written) -> str:
    return value.replace(b"\0", b"").decode("latin-1") if isinstance(value, bytes) else str(value or "")


def _side(text: str, sides: str) -> tuple[str, str]:
    """The numbers and the side of 46,50.56N or -91.99."""
    if text[-1:].upper() in sides:
        return text[:-1], text[-1]
    return text.lstrip("+-"), sides[text.startswith("-")]


def _degrees(name: str, value: Written, side: Written, sides: str, most: int) -> float:
    """Degrees of degrees, minutes and seconds, negative on the second of two `sides`; ValueError says what is wrong."""
    letter = _text(side).strip(" \0")[:1].upper()
    parts = value if isinstance(value, Sequence) else [value]
    if isinstance(value, str | bytes):
        parts = re.findall(r"[-+\d./]+", _text(value))
    numbers = [*map(_number, parts)]
    # what has decimals is the last that is not 0
    angle = not any(number % 1 and any(numbers[i + 1 :]) for i, number in enumerate(numbers))
    inside = all(0 <= number <= limit for number, limit in zip(numbers, (math.inf, 60, 60), strict=False))
    if not (inside and angle and 1 <= len(numbers) <= 3):
        raise ValueError(f"no {name}" if value is None else f"{name} is no angle: {value!r:.60}")
    if not letter or letter not in sides:
        raise ValueError(f"{name} has no side, {' or '.join(sides)}")
    degrees = sum(number / 60**power for power, number in enumerate(numbers))
    if degrees > most:
        raise ValueError(f"{name} is past {most}: {degrees:g}")
    return degrees * (1, -1)[sides.index(letter)]


def _number(value: Written) -> float:
    """A number as a header has it, text such as "33/1", too; NaN for what is none."""
    try:
        if isinstance(value, SupportsFloat):
            return float(value)
        above, _, below = _text(value).partition("/")
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        return math.nan


def _held(exif: Image.Exif, gps: Mapping[int, Written], said: Mapping[str, str]) -> dict[str, float]:
    """Angles and the height above the take-off, those that are known."""
    held = {key: _number(said.get(key)) for key in ("yaw", "pitch", "roll", "relative_altitude")}
    if math.isnan(held["yaw"]):
        held |= _maker_note(exif)
    if math.isnan(held["yaw"]):
        held["yaw"] = _number(gps.get(ExifTags.GPS.GPSImgDirection))
    if abs(held["roll"]) > 90 and held["pitch"] < -45:  # DJI writes it so where the camera looks straight down
        held["yaw"] += 180
    within = {"yaw": 540, "pitch": 360, "relative_altitude": HIGHEST}
    return {key: round(held[key], 4) for key, most in within.items() if abs(held[key]) <= most}


def _maker_note(exif: Image.Exif) -> dict[str, float]:
    """The angles of DJI's MakerNote, which is little-endian, whatever the EXIF around it is."""
    if not str(exif.get(ExifTags.Base.Make, "")).startswith("DJI"):
        return {}
    try:
        note = bytes(exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.MakerNote])
    except Exception:  # absent or broken: the angles are not known
        return {}
    rows = min(int.from_bytes(note[:2], "little"), (len(note) - 2) // 12)
    said = {}
    for tag, kind, n, number in struct.iter_unpack("<HHIf", note[2 : 2 + 12 * rows]):
        if (kind, n) == FLOAT and tag in DJI:
            said[tag] = number
    return {key: said[tag] for tag, key in DJI.items() if tag in said}


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
    turn = int(_header(path)[1]["Orientation"])
    return turn if turn in range(1, 9) else 1


Header = tuple[tuple[int, int], defaultdict[str, float]]
"""(w, h), and the numbers above 0 of the EXIF by name, 0 for what is not there."""


def _header(path: Path) -> Header:
    """What a header says; nothing, if it is broken.

    Raises:
        PassingError: it could not be read just now.
    """
    try:
        return _read(path, path.stat().st_mtime_ns)
    except Exception as error:  # decoders raise what they like on broken bytes
        if compute.passing(error):
            raise PassingError(f"{path} could not be read just now ({error}): run it again") from error
        return (0, 0), defaultdict(float)


@lru_cache(maxsize=4096)
def _read(path: Path, _changed: int) -> Header:
    with path.open("rb") as file:
        photograph = opened(file)
        exif, _ = header(photograph, file)
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
