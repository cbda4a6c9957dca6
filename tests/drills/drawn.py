"""Small drawn photographs in every documented format, and what can tell that one of them is damaged."""

from __future__ import annotations

import io
import logging
import struct
import zlib

import cv2
import numpy as np
import simplejpeg
import tifffile
from PIL import ExifTags, Image

from tests.leaves import dead_leaves

SIDE, HEIGHT = 112, 96


def scene(seed: int) -> np.ndarray:
    """(96, 112, 3) uint8, in colours."""
    bands = np.stack([dead_leaves(3 * seed + band, SIDE)[:HEIGHT, :, 0] for band in range(3)], axis=2)
    return (0.75 * bands[:, :, :1] + 0.25 * bands).astype(np.uint8)


def gps() -> Image.Exif:
    """Lying on its side, 52.5 N 13.4 E."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    place = {1: "N", 2: (52.0, 30.0, 0.0), 3: "E", 4: (13.0, 24.0, 0.0), 6: 40.0}
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(place)
    return exif


def whole(pixels: np.ndarray, other: np.ndarray) -> dict[str, bytes]:
    """Format (the first word is the suffix) -> the bytes of a photograph; `other` is a second page, or frame."""
    rgb, grey, second = Image.fromarray(pixels), Image.fromarray(pixels).convert("L"), Image.fromarray(other)
    deep, clear = pixels.astype(np.uint16) * 257, rgb.copy()
    clear.putalpha(255)
    return {
        "jpg": _pillow(rgb, "JPEG", quality=90),
        "jpg progressive": _pillow(rgb, "JPEG", quality=90, progressive=True),
        "jpg restart": _pillow(rgb, "JPEG", quality=90, restart_marker_blocks=7),
        "jpg grey": _pillow(grey, "JPEG", quality=90),
        "jpg cmyk": _pillow(rgb.convert("CMYK"), "JPEG", quality=90),
        "jpg turned gps": _pillow(rgb, "JPEG", quality=90, exif=gps()),
        "mpo": _pillow(rgb, "MPO", quality=90, save_all=True, append_images=[second.copy()]),
        "png": _pillow(rgb, "PNG"),
        "png grey16": _pillow(Image.fromarray(deep[:, :, 1]), "PNG"),
        "png rgb16": cv2.imencode(".png", deep[:, :, ::-1])[1].tobytes(),
        "png palette": _pillow(rgb.quantize(64), "PNG"),
        "png alpha": _pillow(clear, "PNG"),
        "png turned gps": _pillow(rgb, "PNG", exif=gps()),
        "tif": _pillow(rgb, "TIFF"),
        "tif lzw": _pillow(rgb, "TIFF", compression="tiff_lzw"),
        "tif deflate": _pillow(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "tif grey16": _tifffile(deep[:, :, 1]),
        "tif rgb16": _tifffile(deep),
        "tif rgb16 deflate": _tifffile(deep, compression="zlib"),
        "tif planar": _tifffile(pixels.transpose(2, 0, 1), planarconfig="separate"),
        "tif planar rgb16": _tifffile(deep.transpose(2, 0, 1), planarconfig="separate"),
        "tif tiled": _tifffile(pixels, tile=(32, 32)),
        "tif tiled deflate": _tifffile(pixels, tile=(32, 32), compression="zlib"),
        "tif pages": _pillow(rgb, "TIFF", save_all=True, append_images=[second.copy()]),
        "bmp": _pillow(rgb, "BMP"),
        "webp": _pillow(rgb, "WEBP", quality=90),
        "webp lossless": _pillow(rgb, "WEBP", lossless=True),
        "gif": _pillow(rgb, "GIF"),
        "gif frames": _pillow(rgb, "GIF", save_all=True, append_images=[second.copy()]),
        "ppm": _pillow(rgb, "PPM"),
        "pgm": _pillow(grey, "PPM"),
    }


def foreign(pixels: np.ndarray) -> dict[str, bytes]:
    """Formats that nobody documents, which Pillow would decode all the same, and texts."""
    image = Image.fromarray(pixels)
    names = ("EPS", "PCX", "TGA", "ICO", "SGI", "DDS", "IM", "PDF", "ICNS")
    texts = {"html": b"<html><body>404 Not Found</body></html>", "zip": b"PK\3\4" + bytes(60), "text": b"no photograph"}
    return {**{name: _pillow(image, name) for name in names}, **texts}


def complaint(name: str, data: bytes) -> str:
    """What a reader of such a format that believes nothing finds wrong; "" is nothing: nobody could tell."""
    try:
        return {"jpg": _jpeg, "mpo": _jpeg, "png": _png, "tif": _tiff, "webp": _webp}.get(name.split()[0], _silent)(
            data
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:100]


def _silent(_: bytes) -> str:
    return ""


def _jpeg(data: bytes) -> str:
    _, _, colours, _ = simplejpeg.decode_jpeg_header(data)
    simplejpeg.decode_jpeg(data, colorspace=colours if colours in ("CMYK", "GRAY") else "RGB", strict=True)
    return ""


def _png(data: bytes) -> str:
    at, kind = 8, b""
    while kind != b"IEND":
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        (said,) = struct.unpack_from(">I", data, at + 8 + length)
        if zlib.crc32(data[at + 4 : at + 8 + length]) != said:
            return f"the checksum of {kind!r}"
        at += 12 + length
    return ""


def _tiff(data: bytes) -> str:
    told = io.StringIO()
    logger, handler = logging.getLogger("tifffile"), logging.StreamHandler(told)
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            bits = page.bitspersample * page.samplesperpixel
            rows = page.imagelength * -(-page.imagewidth * bits // 8)
            if page.compression == 1 and not page.is_tiled and rows != sum(page.databytecounts):
                return f"{rows} bytes of pixels in {sum(page.databytecounts)}"
            if page.size > 10_000_000:
                return f"{page.size} numbers in {len(data)} bytes"
            if page.compression != 5:  # LZW, which it cannot without another package
                page.asarray()
    finally:
        logger.removeHandler(handler)
    return told.getvalue().strip()


def _webp(data: bytes) -> str:
    (size,) = struct.unpack_from("<I", data, 4)
    return "" if size + 8 <= len(data) else f"{size + 8} bytes in {len(data)}"


def _pillow(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, kind, **options)  # a copy, for saving leaves its settings behind
    return file.getvalue()


def _tifffile(values: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb" if values.ndim == 3 else "minisblack", **options)
    return file.getvalue()
