"""Files of photographs: which formats are opened, and what other bytes are."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import BinaryIO

from PIL import Image, PngImagePlugin

from imatch.core import compute
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
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # of a PNG, in place of 1 MB a piece


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


def header(image: Image.Image | tiff.Tiff, file: BinaryIO | None = None) -> tuple[Image.Exif, bytes | str]:
    """Read the EXIF and the XMP of a photograph; nothing of what is broken, for the pixels are good all the same.

    Args:
        image: as of `opened`, not loaded.
        file: of a PNG, which may say it behind its pixels; without it they are all read for that.

    Raises:
        OSError: of the disk or the network, and what passes like that (`compute.passing`).
    """
    try:
        if file and image.format == "PNG":
            image = Image.open(_without_pixels(file), formats=["PNG"])
            return Image.Image.getexif(image), image.info.get("xmp", b"")
        return image.getexif(), image.info.get("xmp", b"")
    except Exception as error:  # decoders raise what they like on broken bytes
        if compute.passing(error):
            raise
        return Image.Exif(), b""


def _without_pixels(png: BinaryIO) -> io.BytesIO:
    png.seek(0)
    kept = [png.read(8)]
    while len(head := png.read(8)) == 8:
        n = int.from_bytes(head[:4], "big") + 4  # and its checksum
        if head[4:] in (b"IDAT", b"fdAT"):
            png.seek(n, io.SEEK_CUR)
        else:
            kept.append(head + png.read(n))
    return io.BytesIO(b"".join(kept))
