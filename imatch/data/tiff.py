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
from typing import TYPE_CHECKING, BinaryIO, cast

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
        self.size = self.page.imagewidth, self.page.imagelength
        if self.turn in (5, 6, 7, 8):
            self.size = self.size[::-1]
        self.mode, self.colours = _colours(self.page)
        self.info = {"xmp": self.page.tags[700].value} if 700 in self.page.tags else {}

    def getexif(self) -> Image.Exif:
        """Read the EXIF of the file's first page."""
        self.file.seek(0)
        try:
            with Image.open(self.file, formats=["TIFF"]) as image:
                return image.getexif()
        except (OSError, ValueError):  # Pillow does not know its pixels
            exif = Image.Exif()
            self.file.seek(0)
            exif.load_from_fp(self.file)
            return exif

    def draft(self, _mode: None, _size: tuple[int, int]) -> None:
        """Do nothing: it cannot be read smaller than it is."""

    def read(self) -> tuple[Image.Image, str]:
        """Read the pixels, upright, of 8 bits; and a note of what had to be assumed of them, else "".

        Raises:
            PhotographError: they are not all there, or in a form that no decoder here knows.
        """
        page = self.page
        self._check()
        plain = page.bitspersample <= 8 and page.sampleformat in (1, 4) and not page.extrasamples
        if plain and (image := self._by_pillow()):
            return image, ""
        if (found := self._by_bits()) is None:
            return self._by_pillow_alone()
        image, note = found
        return (image.transpose(UPRIGHT[self.turn]) if self.turn in UPRIGHT else image), note

    def _check(self) -> None:
        """Refuse pixels that are not what was written, as far as a TIFF says that; libtiff looks at none of it."""
        page = self.page
        parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        bits = page.imagewidth * page.bitspersample * (1 if page.planarconfig == 2 else page.samplesperpixel)
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        wanted = (bits + 7) // 8 * page.imagelength * planes
        there = sum(page.databytecounts) if page.compression == 1 and page.photometric != 6 else wanted
        ends = [at + n for at, n in parts]
        if not parts or min(page.databytecounts) < 1 or max(ends) > self.file.seek(0, io.SEEK_END) or there < wanted:
            raise PhotographError("truncated: its pixels are not all there")
        if there > 2 * wanted and not page.is_tiled:
            raise PhotographError(f"damaged: its header speaks of {wanted:,} bytes of pixels, there are {there:,}")
        for at, n in parts if page.compression in (8, 32946) else ():
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
        image.load()
        return image

    def _by_bits(self) -> tuple[Image.Image, str] | None:
        if (values := self._values()) is None:
            return None
        bands = values.reshape(*values.shape[:2], -1)
        colours = bands[..., : self.colours] if self.colours > 1 else bands[..., 0]
        nodata = self.page.nodata if 42113 in self.page.tags else None
        scaled, note = eight_bits(colours, self._white(), nodata)
        alphas = [i for i, kind in enumerate(self.page.extrasamples, self.colours) if kind in (1, 2)]
        alpha = None
        if alphas and self.mode in ("L", "RGB") and values.dtype.kind == "u":
            alpha = Image.fromarray(eight_bits(bands[..., alphas[0]], self._white())[0])
        del values, bands, colours  # not to lie beside the image, nor the file
        self.file.close()
        image = Image.fromarray(255 - scaled if self.page.photometric == 0 else scaled, self.mode)
        if alpha and _is_a_band(alpha):
            return image, "; ".join(filter(None, (note, A_BAND)))
        if alpha:
            mode = "RGBa" if 1 in self.page.extrasamples else "RGBA"
            image = Image.merge(mode, (*image.convert("RGB").split(), alpha)).convert("RGBA")
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
        if found is None or found.shape != page.shape or found.dtype != page.dtype:
            return None
        if found.ndim == 3:
            found[..., :3] = found[..., 2::-1].copy()
        return found

    def _by_pillow_alone(self) -> tuple[Image.Image, str]:
        """What no other reads: grey in its bits, colours in the upper 8 of them."""
        page, image = self.page, None
        kind = f"{page.samplesperpixel} bands of {page.bitspersample} bits, {getattr(page.compression, 'name', '')}"
        if page.dtype in (np.uint8, np.uint16) and (page.photometric or page.bitspersample <= 8):
            image = self._by_pillow()
        if image is None:
            raise PhotographError(f"{kind}: no decoder reads it, save it uncompressed")
        if page.bitspersample > 8 and image.mode.startswith("I"):
            return eight_bits_of(image, self._white())
        if page.bitspersample > 8 and _few(image):
            raise PhotographError(f"{kind}: read in 8 bits, few of which are used; save it uncompressed")
        if image.mode == "RGBA" and _is_a_band(image.getchannel("A")):
            if 1 in page.extrasamples:
                raise PhotographError(f"{kind}: {A_BAND.partition(':')[0]}; save it uncompressed")
            return image.convert("RGB"), A_BAND
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
    unread = [code for code in ON_PIXELS if code in codes and code not in page.tags]
    if unread or ("PlanarConfiguration" in page.tags and page.tags["PlanarConfiguration"].value not in (1, 2)):
        raise PhotographError(f"damaged: tag {unread[0] if unread else 284} of its header cannot be read")


def _colours(page: TiffPage) -> tuple[str, int]:
    """Pillow's mode, and how many of the bands are colours."""
    kind, name = page.photometric, getattr(page.photometric, "name", "")
    bits = {page.bitspersample, *np.ravel(page.tags[258].value).tolist()} if 258 in page.tags else {1}
    mode, colours = BANDS.get(kind, ("", 0))
    alphas = sum(extra in (1, 2) for extra in page.extrasamples)
    other_inks = kind == 5 and _number(page, 332, 1) != 1
    if not mode or other_inks or (kind == 3 and (max(bits) > 8 or page.samplesperpixel > 1)):
        raise PhotographError(f"its colours are {name}, PhotometricInterpretation {kind}: convert it to RGB")
    if page.samplesperpixel < colours or (colours == 1 and page.samplesperpixel - alphas > 2):
        raise PhotographError(f"{page.samplesperpixel} bands, of {name}: which are red, green and blue is not said")
    if page.sampleformat not in (1, 2, 3, 4) or len(bits) > 1 or page.dtype is None or page.imagedepth > 1:
        several = f"{min(bits)} to {max(bits)}"
        raise PhotographError(f"numbers of {several} bits, SampleFormat {page.sampleformat}: save it in 8 or 16")
    return mode, colours


def _number(page: TiffPage, tag: int, default: int) -> int:
    """The value of a tag, the largest of several."""
    value = np.ravel(page.tags[tag].value if tag in page.tags else default)
    return int(value.max()) if value.size and value.dtype.kind in "iuf" and math.isfinite(value.max()) else default


def _is_a_band(alpha: Image.Image) -> bool:
    between = np.bincount(np.asarray(alpha).ravel(), minlength=256)[1:-1].sum()
    return bool(2 * between > alpha.width * alpha.height)


def png_of_16(image: Image.Image, data: bytes) -> tuple[Image.Image, str]:
    """Scale a PNG of 16 bits to 8, by its sBIT chunk if it has one, and a note of what had to be assumed, else "".

    Args:
        image: opened by Pillow, which reads grey in 16 bits and colours in the upper 8 of them.
        data: its file.
    """
    at, said = data.find(b"sBIT", 0, data.find(b"IDAT")), None
    if at > 0:
        said = 2 ** max(data[at + 4 : at + 4 + data[at - 1]]) - 1
    if image.mode.startswith("I"):
        return eight_bits_of(image, said)
    if not _few(image):
        return image, ""
    alpha = image.getchannel("A") if "A" in image.getbands() else None
    image.close()
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    scaled, note = eight_bits(found[..., 2::-1], said)
    del found
    narrow = Image.fromarray(scaled)
    if alpha:
        narrow.putalpha(alpha)
    return narrow, note


def _few(image: Image.Image) -> bool:
    """Whether 16-bit colours, of which an image has the upper 8 bits, use so few that they may be fewer bits."""
    used = np.ravel([image.getchannel(band).getextrema() for band in image.getbands() if band != "A"])
    return bool(used.max() < 64 or np.ptp(used) < 32)


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


def eight_bits_of(image: Image.Image, said: float | None = None) -> tuple[Image.Image, str]:
    """Scale the grey of a Pillow image of more than 8 bits, as `eight_bits`, without a copy of all of it.

    >>> image, note = eight_bits_of(Image.new("I;16", (2, 1), 4080))
    >>> image.getpixel((0, 0)), note
    (254, 'values reach 4,080 of 65,535: taken as 12 bits')
    """
    if image.mode == "F":
        scaled, note = eight_bits(np.asarray(image))
        return Image.fromarray(scaled), note
    image.load()
    sixteen = image.mode != "I" or image.format in ("PPM", "PNG")
    low, high = cast("tuple[int, int]", image.getextrema())
    black, white, note = _scale(low, high, np.dtype(np.uint16 if sixteen else np.int32), said)
    w, h = image.size
    grey = Image.new("L", image.size)
    rows = max(1, STRIP // w)
    for row in range(0, h, rows):
        strip = np.asarray(image.crop((0, row, w, min(row + rows, h))))
        grey.paste(Image.fromarray(_scaled(strip, black, white)), (0, row))
    return grey, note


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
