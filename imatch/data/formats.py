"""Files of photographs: which formats are opened, and what other bytes are."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from typing import BinaryIO

from PIL import Image

from imatch.core.types import PhotographError
from imatch.data import tiff

FORMATS = ["JPEG", "PNG", "BMP", "WEBP", "GIF", "PPM", "AVIF", "JPEG2000"]
"""What Pillow decodes, beside TIFFs: no other format, whatever the name of a file says."""
HEIF = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_BYTES = {
    "HEIF: install the extra heif": HEIF,
    "raw of a camera: develop it to TIFF or JPEG": (b"ftypcrx ", b"FUJIFILM", b"IIU\0", b"IIRO", b"FOVb"),
    "PostScript": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "PDF": (b"%PDF",),
    "SVG or XML": (b"<svg", b"<?xml"),
    "Photoshop": (b"8BPS",),
    "an icon": (b"\0\0\1\0",),
    "JPEG XL": (b"\xff\x0a", b"JXL "),
    "OpenEXR": (b"\x76\x2f\x31\x01",),
    "FITS": (b"SIMPLE  =",),
    "a video": (b"ftypisom", b"ftypmp4", b"ftypqt  ", b"ftypM4V", b"ftypavc1"),
    "a web page": (b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML"),
    "a ZIP archive": (b"PK\3\4",),
    "a pointer of Git LFS: fetch it by git lfs pull": (b"version https://",),
}
"""What bytes are not decoded, by what files of them begin with, or have after 4 bytes."""
_TEXT = "MAX_TEXT"
"""What Pillow's message names of a PNG with more text than it takes."""


def opened(file: BinaryIO) -> Image.Image | tiff.Tiff:
    """Open a photograph, for its `size`, `format`, `info` and `getexif()`; its pixels are not decoded yet.

    Args:
        file: at its beginning; stays open while the photograph is used.

    Raises:
        PhotographError: it is empty, of a format that imatch does not read, or a TIFF that shows none; of broken bytes
            also what their decoder raises.

    >>> opened(io.BytesIO(b"%PDF-1.7"))
    Traceback (most recent call last):
    imatch.core.types.PhotographError: not a photograph that imatch reads, but PDF
    """
    head = file.read(16)
    file.seek(0)
    if not head:
        raise PhotographError("empty file")
    if head.startswith(tiff.MAGIC):
        return tiff.Tiff(file)
    try:
        return Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        if head[4:].startswith(HEIF) and find_spec("pillow_heif"):
            from pillow_heif import HeifImageFile

            file.seek(0)
            return HeifImageFile(file)
        for what, signs in _BYTES.items():
            if head.startswith(signs) or head[4:].startswith(signs):
                raise PhotographError(f"not a photograph that imatch reads, but {what}") from None
        raise
    except ValueError as error:
        if _TEXT not in str(error):
            raise
        file.seek(0)
        return Image.open(io.BytesIO(_without_text(file.read())), formats=["PNG"])


def load(png: Image.Image) -> None:
    """Decode a PNG, whatever text lies behind its pixels."""
    try:
        png.load()
    except ValueError as error:
        if _TEXT not in str(error):
            raise


def check_png(data: bytes) -> None:
    """Raise PhotographError when the pixels of a PNG are not what was written, as their checksums say.

    Pillow does not look at these.
    """
    for kind, at, end in _chunks(data):
        said = int.from_bytes(data[end - 4 : end], "big")
        if kind == b"IDAT" and zlib.crc32(memoryview(data)[at + 4 : end - 4]) != said:
            raise PhotographError("damaged or truncated: its pixels have another checksum")


def _without_text(png: bytes) -> bytes:
    """A PNG without its texts and profile, of which Pillow takes only so many bytes."""
    texts = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
    return png[:8] + b"".join(png[at:end] for kind, at, end in _chunks(png) if kind not in texts)


def _chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each chunk, where it begins, and where it ends."""
    at = 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        yield png[at + 4 : at + 8], at, end
        at = end
