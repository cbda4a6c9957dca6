"""TIFFs, and numbers of more than 8 bits: which page is the photograph, what its tags say of them, their 8 bits.

Pillow decodes what has at most 8 bits; tifffile and OpenCV the others, in the bits that they have.
"""

from __future__ import annotations

import io
import logging
import math
import struct
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

import cv2
import numpy as np
from PIL import Image

from imatch.core.types import PhotographError

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPage

UPRIGHT = {  # EXIF orientation -> what makes the photograph upright; 1 and values out of range need nothing
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
A_BAND = "its last band, said to be alpha, is hardly ever 0 or full: it was left out"
STRIP = 1_000_000
"""Numbers that are converted at once, to save memory."""
BANDS = {0: ("L", 1), 1: ("L", 1), 2: ("RGB", 3), 3: ("P", 1), 5: ("CMYK", 4), 6: ("YCbCr", 3)}
"""PhotometricInterpretation -> Pillow's mode, and the bands that are colours."""
ON_PIXELS = (*range(254, 260), 262, 273, *range(277, 280), 284, 317, *range(320, 326), *range(338, 342))
"""Tags that say what the pixels are, and where."""
ONE = (*range(254, 258), 259, 262, 266, 277, 278, 284, 317, 322, 323)
"""Those of one number."""
RAW = (32803, 34892)
"""PhotometricInterpretation: what the pixels of a sensor measured, as in DNG."""


class Tiff:
    """The photograph in a TIFF, read when it is asked for; in place of a Pillow image.

    Args:
        file: stays open while it is used.

    Attributes:
        size: (w, h) of the upright photograph.
        info: its XMP packet, as "xmp", if it has one.

    Raises:
        PhotographError: it holds none, or one of whose numbers imatch can make no colours.
    """

    format = "TIFF"

    def __init__(self, file: BinaryIO) -> None:
        from tifffile import TiffFile

        logging.getLogger("tifffile").addHandler(logging.NullHandler())  # a broken file is told of by its reason
        self.file = file
        self.page = _photograph(TiffFile(file))
        self.turn = _number(self.page, 274, 1)
        w, h = self.page.imagewidth, self.page.imagelength
        self.size = (h, w) if self.turn in (5, 6, 7, 8) else (w, h)
        self.mode, self.colours = _colours(self.page)
        self.info = {"xmp": self.page.tags.valueof(700, b"")}

    def getexif(self) -> Image.Exif:
        """Read the EXIF of the file's first page."""
        exif, file = Image.Exif(), self.page.parent
        exif.endian, exif.bigtiff = file.byteorder, file.is_bigtiff
        exif.load_from_fp(self.file, file.pages.first.offset)
        return exif

    def draft(self, _mode: None, _size: tuple[int, int]) -> None:
        """Do nothing: it cannot be read smaller than it is."""

    def read(self) -> tuple[Image.Image, str]:
        """Read the pixels, upright, of 8 bits; and a note of what had to be assumed of them, else "".

        Raises:
            PhotographError: they are not all there, or in a form that no decoder here knows.
        """
        page, note = self.page, ""
        self._check()
        plain = page.bitspersample <= 8 and page.sampleformat in (1, 4) and not page.extrasamples
        image = self._by_pillow() if plain else None
        if not image and (values := self._values()) is not None:
            image, note = self._by_bits(values)
            image = image.transpose(UPRIGHT[self.turn]) if self.turn in UPRIGHT else image
        elif not image:
            image, note = self._by_pillow_alone()
        if image.mode not in ("LA", "RGBA"):
            return image, note
        if _is_a_band(image.getchannel("A")):
            return image.convert(image.mode[:-1]), "; ".join(filter(None, (note, A_BAND)))
        if 1 in page.extrasamples:
            image = Image.merge("RGBa", image.convert("RGBA").split()).convert("RGBA")
        return image, note

    def _check(self) -> None:
        """Refuse pixels that are not what was written, as far as a TIFF says that; libtiff looks at none of it."""
        page, parts = self.page, self.page.databytecounts
        apart = page.planarconfig == 2
        planes, bands = (page.samplesperpixel, 1) if apart else (1, page.samplesperpixel)
        wanted = (page.imagewidth * page.bitspersample * bands + 7) // 8 * page.imagelength * planes
        there = sum(parts) if page.compression == 1 and page.photometric != 6 else wanted
        end = max(map(sum, zip(page.dataoffsets, parts, strict=True)), default=math.inf)
        if end > self.file.seek(0, io.SEEK_END) or min(parts) < 1 or there < wanted:
            raise PhotographError("truncated: its pixels are not all there")
        if there > 2 * wanted and not page.is_tiled:
            raise PhotographError(f"damaged: its header speaks of {wanted:,} bytes of pixels, there are {there:,}")
        for at, n in zip(page.dataoffsets, parts, strict=True) if page.compression in (8, 32946) else ():
            self.file.seek(at)
            try:
                zlib.decompress(self.file.read(n))
            except zlib.error as error:
                raise PhotographError(f"damaged: {error}") from None

    def _by_pillow(self) -> Image.Image | None:
        """The page, upright; None if Pillow does not know its pixels, or those of the first page."""
        self.file.seek(0)
        try:
            image = Image.open(self.file, formats=["TIFF"])
            image.seek(self.page.index)
        except (Image.UnidentifiedImageError, ValueError):
            return None
        for i, tile in enumerate(image.tile):
            if isinstance(tile.args, tuple) and tile.args[0] == "RGBa":  # not to be divided by what may be no alpha
                image.tile[i] = tile._replace(args=("RGBA", *tile.args[1:]))
        image.load()
        return image

    def _by_bits(self, values: np.ndarray) -> tuple[Image.Image, str]:
        page, white = self.page, self._white()
        bands = values.reshape(*values.shape[:2], -1)
        colours = bands[..., : self.colours] if self.colours > 1 else bands[..., 0]
        scaled, note = eight_bits(colours, white, page.nodata if 42113 in page.tags else None)
        image = Image.fromarray(255 - scaled if page.photometric == 0 else scaled, self.mode)
        alphas = [i for i, kind in enumerate(page.extrasamples, self.colours) if kind in (1, 2)]
        if alphas and self.mode in ("L", "RGB") and values.dtype.kind == "u":
            image.putalpha(Image.fromarray(eight_bits(bands[..., alphas[0]], white)[0]))
        return image, note

    def _values(self) -> np.ndarray | None:
        """(h, w) or (h, w, bands) as the file holds them; None if only Pillow knows their compression."""
        page = self.page
        # a compression, a predictor or packed bits, for which tifffile needs imagecodecs, which is not here
        with suppress(ImportError, NotImplementedError, ValueError):
            if page.is_final and page.dtype and isinstance(self.file, io.BytesIO):  # as they lie in the file
                order = page.dtype.newbyteorder(page.parent.byteorder)
                values = np.frombuffer(self.file.getvalue(), order, math.prod(page.shape), page.dataoffsets[0])
                values = values.reshape(page.shape)
            else:
                values = page.asarray()
            return np.moveaxis(values, 0, -1) if page.planarconfig == 2 and values.ndim == 3 else values
        if page.bitspersample <= 8 or page.compression not in (1, 5, 8, 32946) or page.planarconfig == 2 or page.index:
            return None
        self.file.seek(0)
        found = cv2.imdecode(np.frombuffer(self.file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
        if found is None or (found.shape, found.dtype) != (page.shape, page.dtype):
            return None
        if found.ndim == 3:
            found[..., :3] = found[..., 2::-1].copy()
        return found

    def _by_pillow_alone(self) -> tuple[Image.Image, str]:
        """What no other reads: grey in its bits, colours in the upper 8 of them."""
        page, image = self.page, None
        many = page.bitspersample > 8
        kind = f"{page.samplesperpixel} bands of {page.bitspersample} bits, {getattr(page.compression, 'name', '')}"
        if page.dtype in (np.uint8, np.uint16) and (page.photometric or not many):
            image = self._by_pillow()
        if image is None:
            raise PhotographError(f"{kind}: no decoder reads it, save it uncompressed")
        if many and image.mode.startswith("I"):
            scaled, note = eight_bits(np.asarray(image), self._white())
            return Image.fromarray(scaled), note
        used = np.ravel([image.getchannel(band).getextrema() for band in image.getbands() if band != "A"])
        if many and (used.max() < 64 or np.ptp(used) < 32):
            raise PhotographError(f"{kind}: read in 8 bits, few of which are used; save it uncompressed")
        return image, ""

    def _white(self) -> float | None:
        """The largest number that the file says can be: of fewer bits than hold it, or by SMax or MaxSampleValue."""
        page, dtype = self.page, np.dtype(self.page.dtype)
        if dtype.kind == "u" and page.bitspersample < 8 * dtype.itemsize:
            return 2**page.bitspersample - 1
        return _number(page, 341, 0) or _number(page, 281, 0) or None


def _photograph(tiff: TiffFile) -> TiffPage:
    for page in (page.aspage() for page in tiff.pages):
        if 50706 in page.tags or page.photometric in RAW:
            raise PhotographError("raw of a camera (DNG): develop it to TIFF or JPEG")
        _check_tags(page)
        if not (page.subfiletype & 0b101 or _number(page, 255, 1) == 2):  # a smaller copy, a mask
            return page
    raise PhotographError("only a preview: the photograph that NewSubfileType tells of is not in it")


def _check_tags(page: TiffPage) -> None:
    """Refuse a page of which a tag on its pixels cannot be read: tifffile takes the usual value then."""
    form, file = page.parent.tiff, page.parent.filehandle
    file.seek(page.offset)
    (n,) = struct.unpack(form.tagnoformat, file.read(form.tagnosize))
    codes = {struct.unpack(f"{form.byteorder}H", file.read(form.tagsize)[:2])[0] for _ in range(n)}
    for code in codes.intersection(ON_PIXELS):
        value = page.tags.valueof(code)
        if value is None or (code in ONE and not isinstance(value, int)) or (code == 284 and value not in (1, 2)):
            raise PhotographError(f"damaged: tag {code} of its header cannot be read")


def _colours(page: TiffPage) -> tuple[str, int]:
    """Pillow's mode, and how many of the bands are colours."""
    kind, name = page.photometric, getattr(page.photometric, "name", "")
    bits = {page.bitspersample, *np.ravel(page.tags[258].value).tolist()} if 258 in page.tags else {1}
    mode, colours = BANDS.get(kind, ("", 0))
    alphas = sum(extra in (1, 2) for extra in page.extrasamples)
    bands, form = page.samplesperpixel, page.sampleformat
    refused = {
        f"its colours are {name}, PhotometricInterpretation {kind}: convert it to RGB": not mode
        or (kind == 5 and _number(page, 332, 1) != 1)
        or (kind == 3 and (max(bits) > 8 or bands > 1)),
        f"{bands} bands, of {name}: which are red, green and blue is not said": bands < colours
        or (colours == 1 and bands - alphas > 2),
        f"numbers of {min(bits)} to {max(bits)} bits, SampleFormat {form}: save it in 8 or 16": len(bits) > 1
        or form not in (1, 2, 3, 4)
        or page.dtype is None
        or page.imagedepth > 1,
    }
    for reason, wrong in refused.items():
        if wrong:
            raise PhotographError(reason)
    return mode, colours


def _number(page: TiffPage, tag: int, default: int) -> int:
    """The value of a tag, the largest of several."""
    value = np.ravel(page.tags.valueof(tag, default))
    return int(value.max()) if value.size and value.dtype.kind in "iuf" and math.isfinite(value.max()) else default


def _is_a_band(alpha: Image.Image) -> bool:
    return 2 * sum(alpha.histogram()[1:-1]) > alpha.width * alpha.height


def png_of_16(data: bytes) -> tuple[np.ndarray, str]:
    """Decode a PNG of 16 bits in 8, by its sBIT chunk if it has one, and a note of what had to be assumed, else "".

    Returns:
        (h, w), (h, w, 3) or, with alpha, (h, w, 4) uint8.

    Raises:
        PhotographError: OpenCV cannot decode it.
    """
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None:
        raise PhotographError("damaged or truncated: its pixels cannot be decoded")
    at, said = data.find(b"sBIT", 0, data.find(b"IDAT")), None
    if at > 0:
        said = 2 ** max(data[at + 4 : at + 4 + data[at - 1]]) - 1
    if found.ndim == 2:
        return eight_bits(found, said)
    scaled, note = eight_bits(found[..., :3], said)
    colours = cv2.cvtColor(scaled, cv2.COLOR_BGR2RGB, dst=scaled)
    return (np.dstack([colours, found[..., 3] // 257]).astype(np.uint8) if found.shape[2] == 4 else colours), note


def eight_bits(values: np.ndarray, said: float | None = None, nodata: float | None = None) -> tuple[np.ndarray, str]:
    """Scale numbers to 8 bits: by what the file says is white, else by their own range.

    16 bits that are used keep the scale that they always had. What reaches no more than 16,383 is taken as 8, 10, 12 or
    14 bits; what uses less than an eighth of its scale, and numbers of other kinds, from the lowest to the highest.

    Args:
        values: (h, w) or (h, w, colours), of any number; NaN and infinity become black.
        said: what the file says is white.
        nodata: a number that stands for none.

    Returns:
        The same shape in uint8; and a note of what had to be assumed, else "".

    Raises:
        PhotographError: there is no number.

    >>> eight_bits(np.array([[0, 2048, 4080]], np.uint16))
    (array([[  0, 128, 254]], dtype=uint8), 'values reach 4,080 of 65,535: taken as 12 bits')
    """
    if values.dtype == np.uint8:
        return values, ""
    black, white, note = _scale(*_range(values, nodata), values.dtype, said)
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, STRIP // math.prod(values.shape[1:]))
    for row in range(0, len(values), rows):
        scaled[row : row + rows] = _scaled(values[row : row + rows], black, white, nodata)
    return scaled, note


def _scale(low: float, high: float, dtype: np.dtype, said: float | None) -> tuple[float, float, str]:
    """What of numbers from `low` to `high` is black and what is white, and the note."""
    top = np.iinfo(dtype).max if dtype.kind in "iu" else math.inf
    black, white, note = 0.0, float(top), ""
    if said and low >= 0 and high <= said:
        white = said
    elif dtype.kind in "iu" and low >= 0 and high < 2**14:
        bits = max(8, 2 * math.ceil(int(high).bit_length() / 2))
        white, note = 2**bits - 1, f"values reach {high:,} of {top:,}: taken as {bits} bits"
    elif dtype.str[1:] != "u2":
        white = -math.inf
    if (high > low and 8 * (high - low) < white - black) or white < high:
        numbers = [f"{number:,.6g}" if isinstance(number, float) else f"{number:,}" for number in (low, high)]
        return low, high, f"values lie between {' and '.join(numbers)}: taken as black and white"
    return black, white, note


def _scaled(values: np.ndarray, black: float, white: float, nodata: float | None = None) -> np.ndarray:
    """Scale a strip to 0 to 255."""
    if (black, white) == (0, 65535) and values.ndim == 3:
        return np.asarray(values >> 8, np.uint8)  # as Pillow does with colours
    if values.dtype.str[1:] == "u2" and values.size > 2**16:
        return _scaled(np.arange(2**16, dtype=np.uint16), black, white, nodata)[values]
    found = values.astype(np.float64)
    found[~np.isfinite(found) | (found == nodata)] = black
    return np.round(np.clip((found - black) * (255 / (white - black or 1)), 0, 255)).astype(np.uint8)


def _range(values: np.ndarray, nodata: float | None) -> tuple[int | float, int | float]:
    """The lowest and the highest of the numbers that are some."""
    if values.dtype.kind in "iu" and nodata is None:
        return int(values.min()), int(values.max())
    low, high = math.inf, -math.inf
    for row in values:
        good = row[np.isfinite(row) & (row != nodata)]
        if good.size:
            low, high = min(low, good.min().item()), max(high, good.max().item())
    if low > high:
        raise PhotographError("no pixel is a number")
    return low, high
