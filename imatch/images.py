"""Photographs: list them, check their headers, decode, orient and resize them, read their position.

Every photograph is read from disk once: its SHA-256 is that of the very bytes that were decoded.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from imatch.records import ImatchError, PhotographError

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".mpo", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm"}
)
ORIENTATION = ExifTags.Base.Orientation
MODES = ("long_side", "scale")


@dataclass(frozen=True)
class Resize:
    """How large a photograph is when the backbone sees it; its aspect is kept to the nearest patch.

    Attributes:
        mode: "long_side": its longer side becomes `long_side` pixels; "scale": both sides are multiplied by
            `scale`, the same for all photographs, so that a crop is not enlarged to the size of its source.
        long_side: pixels, a multiple of the backbone's patch.
        scale: factor, larger than 0.

    >>> Resize("long_side", long_side=512).target((600, 1000), patch=16)
    (304, 512)
    >>> Resize("scale", scale=0.5).target((600, 1000), patch=1)
    (300, 500)
    """

    mode: str = "scale"
    long_side: int = 640
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ImatchError(f"resize {self.mode!r} is not known: use {' or '.join(MODES)}")
        if self.long_side < 1 or self.scale <= 0:
            raise ImatchError(f"long_side {self.long_side} and scale {self.scale} must be larger than 0")

    def check(self, patch: int) -> None:
        """Raise ImatchError when `long_side` is not a multiple of `patch`.

        >>> Resize("long_side", long_side=518).check(16)
        Traceback (most recent call last):
        imatch.records.ImatchError: long_side 518 is not a multiple of patch 16: use 512 or 528
        """
        if self.mode == "long_side" and self.long_side % patch:
            low = self.long_side // patch * patch
            use = f"{low} or {low + patch}" if low else f"{patch}"
            raise ImatchError(f"long_side {self.long_side} is not a multiple of patch {patch}: use {use}")

    def target(self, size: tuple[int, int], patch: int) -> tuple[int, int]:
        """The (h, w) that a photograph of (h, w) pixels is resized to: multiples of `patch`, at least one each."""
        self.check(patch)
        factor = self.long_side / max(size) if self.mode == "long_side" else self.scale
        h, w = (max(1, round(side * factor / patch)) * patch for side in size)
        return h, w

    def __str__(self) -> str:
        return f"ls{self.long_side}" if self.mode == "long_side" else f"scale{self.scale:g}".replace(".", "p")


@dataclass(frozen=True)
class Decoded:
    """A photograph in memory.

    Attributes:
        pixels: (h, w, 3) uint8 RGB, upright, resized as asked.
        size: (H, W) of the upright photograph before resizing.
        sha256: hexadecimal digest of the file's bytes.
        position: {"latitude", "longitude" (degrees), "altitude" (metres or None)} from EXIF, or None.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    sha256: str
    position: dict[str, float | None] | None


def list_photographs(root: Path) -> list[str]:
    """The ids of all photographs below `root`: POSIX paths relative to it, sorted.

    Linked folders are followed, a link back to a folder above itself is not. Hidden files are left out.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("b.jpg", "a.PNG", "notes.txt"):
    ...         _ = (Path(folder) / name).write_bytes(b"")
    ...     list_photographs(Path(folder))
    ['a.PNG', 'b.jpg']
    """
    return sorted(path.relative_to(root).as_posix() for path in _walk(root, ()))


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            yield from _walk(folder / entry.name, (*above, real))
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            yield folder / entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself: listed as a file, its header check says what is wrong
        return False


def check_header(path: Path) -> tuple[int, int]:
    """The upright (h, w) of a photograph, from its header alone.

    Raises:
        PhotographError: the file cannot be opened, is empty, is no photograph or is too large to decode.
    """
    with _reasons():
        if path.stat().st_size == 0:
            raise PhotographError("empty file")
        with Image.open(path) as image:
            return _upright(image)


def decode(path: Path, resize: Resize | None = None, patch: int = 1) -> Decoded:
    """Read a photograph from disk: RGB, 8 bits, upright, at the size the backbone wants.

    JPEGs much larger than that are decoded at a half, a quarter or an eighth (Pillow's draft mode; the exact
    box is kept, so nothing shifts) and resized bicubically with antialiasing. 16-bit grey is scaled to 8;
    transparent pixels lie on white, as viewers show them; of an animation the first frame is taken.

    Args:
        path: the file.
        resize: None keeps the photograph's own size.
        patch: sides become multiples of it.

    Raises:
        PhotographError: the file cannot be decoded; the message is the reason.
    """
    with _reasons():
        data = path.read_bytes()
        if not data:
            raise PhotographError("empty file")
        with Image.open(io.BytesIO(data)) as image:
            size = _upright(image)
            target = resize.target(size, patch) if resize else size
            exif = image.getexif()
            raw = target if exif.get(ORIENTATION, 1) < 5 else target[::-1]
            resized = _resized(image, raw)
            resized.getexif()[ORIENTATION] = exif.get(ORIENTATION, 1)
            pixels = np.asarray(ImageOps.exif_transpose(resized))
            return Decoded(pixels, size, hashlib.sha256(data).hexdigest(), _position(exif))


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, hexadecimal."""
    with _reasons(), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever a decoder raises into a PhotographError that gives the reason in one line."""
    try:
        yield
    except PhotographError:
        raise
    except Image.UnidentifiedImageError:
        raise PhotographError("not a photograph: no decoder knows its bytes") from None
    except Image.DecompressionBombError as error:
        raise PhotographError(f"too large to decode: {error}") from None
    except OSError as error:
        raise PhotographError(error.strerror or str(error)) from None
    except Exception as error:  # decoders raise what they like on broken bytes; one file must not end a run
        raise PhotographError(f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> tuple[int, int]:
    w, h = image.size
    return (h, w) if image.getexif().get(ORIENTATION, 1) < 5 else (w, h)


def _resized(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    h, w = target
    box: tuple[float, float, float, float] = (0, 0, *image.size)
    if image.size != (w, h):
        drafted = image.draft(None, (2 * w, 2 * h))  # None unless the decoder can (JPEG)
        box = drafted[1] if drafted else box
    image = _rgb(image)
    return image if image.size == (w, h) else image.resize((w, h), Image.Resampling.BICUBIC, box, reducing_gap=3)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise PhotographError("32-bit floating point pixels have no fixed white: convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise PhotographError("32-bit pixels have no fixed white: convert it to 8 or 16 bits")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _position(exif: Image.Exif) -> dict[str, float | None] | None:
    gps: dict[int, Any] = exif.get_ifd(ExifTags.IFD.GPSInfo)
    try:
        latitude = _degrees(gps[ExifTags.GPS.GPSLatitude], gps[ExifTags.GPS.GPSLatitudeRef] == "S")
        longitude = _degrees(gps[ExifTags.GPS.GPSLongitude], gps[ExifTags.GPS.GPSLongitudeRef] == "W")
        altitude = gps.get(ExifTags.GPS.GPSAltitude)
        below = gps.get(ExifTags.GPS.GPSAltitudeRef, b"\0") in (b"\1", 1)
        height = None if altitude is None else float(altitude) * (-1 if below else 1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # absent or malformed: the photograph has no position, which is what None says
    if not all(map(math.isfinite, (latitude, longitude, height or 0.0))):
        return None
    return {"latitude": latitude, "longitude": longitude, "altitude": height}


def _degrees(parts: tuple[Any, Any, Any], negative: bool) -> float:
    degrees = sum(float(part) / 60**power for power, part in enumerate(parts))
    return -degrees if negative else degrees
