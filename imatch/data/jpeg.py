"""JPEGs, as Pillow decodes them to the bit; but what libjpeg warns of, and Pillow does not pass on, is damage here."""

from __future__ import annotations

import re

import numpy as np
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from imatch.core.types import PhotographError

DAMAGE = re.compile("Corrupt JPEG data|Premature end|Inconsistent progression")
HARMLESS = re.compile("bad ICC marker|before marker 0x(c[0-2]|d[bd]|e.|fe)")
"""Of the warnings of libjpeg: the data of pixels are not what was written; and what lies between parts of a header."""
END = b"\xff\xd9"
COLUMNS, EDGE = 24, 4
"""Blocks that a photograph is wide, and that a seam must be away from its sides, so that no horizon looks like one."""


def pixels(image: JpegImageFile, data: bytes) -> np.ndarray | None:
    """Decode a JPEG at the size that it was drafted to.

    What follows its end, such as the second picture of an MPO, is nothing to it; the marker of its end may be missing.

    Args:
        image: opened by Pillow, not loaded.
        data: its file.

    Returns:
        (h, w, 3) uint8 RGB; None of what Pillow has to decode, or to refuse.

    Raises:
        PhotographError: damaged, or truncated.
    """
    colours = "CMYK" if image.mode == "CMYK" else "RGB"
    try:
        try:
            found = simplejpeg.decode_jpeg(data, colours, min_height=image.height, min_width=image.width)
        except ValueError as error:
            if "Premature end of JPEG file" not in str(error):
                raise
            found = simplejpeg.decode_jpeg(data + END, colours, min_height=image.height, min_width=image.width)
    except ValueError as error:
        if DAMAGE.search(str(error)) and not HARMLESS.search(str(error)):
            raise PhotographError(f"damaged or truncated: {error}") from None
        return None
    if found.shape[:2] != (image.height, image.width):
        return None
    if colours == "CMYK":  # inverted, as Adobe writes it
        found = np.asarray(Image.fromarray(255 - found, "CMYK").convert("RGB"))
    scale = image.decoderconfig[0] if image.decoderconfig else 1
    across, down = (max(layer[i] for layer in image.layer) if image.layers > 1 else 1 for i in (1, 2))
    if scale <= 2 and (row := _seam(found, 8 * down // scale, 8 * across // scale)):
        raise PhotographError(f"damaged: from row {row * scale} on its colours are shifted, as after a wrong bit")
    return found


def _seam(found: np.ndarray, down: int, across: int) -> int:
    """The row from which on all blocks are lighter or darker than before; 0 if there is none.

    Blocks store how much lighter they are than the one before, so a wrong bit that libjpeg does not see shifts all that
    follow: the top of a row of blocks from one column on, and the top of the next row up to that column.
    """
    rows, columns = (found.shape[0] - 1) // down, found.shape[1] // across
    if columns < COLUMNS or rows < 2:
        return 0
    below, above = (found[i::down][:rows, : columns * across] for i in (down, down - 1))
    jumps = (below.astype(np.int16) - above).reshape(rows, columns, across, 3).mean(2, dtype=np.float32)
    left, right = _sides(jumps)
    quiet = np.maximum(abs(left[:-1]), abs(right[1:]))
    for sign in (1, -1):
        most_left, most_right = _sides(sign * jumps > 5)
        jump = np.minimum(sign * right[:-1], sign * left[1:]) - 2 * quiet
        seams = (jump > 10) & (np.minimum(most_right[:-1], most_left[1:]) > 0.8)
        if seams.any():
            return int(np.argwhere(seams)[0, 0] + 1) * down
    return 0


def _sides(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The means of rows to the left and to the right of every column but those near the sides."""
    n = values.shape[1]
    x = np.arange(EDGE, n - EDGE + 1)[:, None]
    sums = values.cumsum(axis=1, dtype=np.float32)
    left = sums[:, EDGE - 1 : n - EDGE]
    return left / x, (sums[:, -1:] - left) / (n - x)
