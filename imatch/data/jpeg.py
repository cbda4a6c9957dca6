"""JPEGs, as Pillow decodes them to the bit; but what libjpeg warns of, and Pillow does not pass on, is damage here."""

from __future__ import annotations

import re

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from imatch.core.types import PhotographError

DAMAGE = re.compile("Corrupt JPEG data|Premature end|Inconsistent progression|Invalid SOS")
HARMLESS = re.compile("bad ICC marker|before marker 0x(c[0-2]|d[bd]|e.|fe)")
"""Of the warnings of libjpeg: the data of pixels are not what was written; and what lies between parts of a header."""
END = b"\xff\xd9"
COLUMNS, EDGE, SHIFT = 24, 4, 10
"""Blocks that a photograph is wide and that a seam is away from its sides, and of how many levels of 255, at least: so
that no horizon looks like one."""


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
            if "Premature end of JPEG file" not in str(error) or data.endswith(bytes(len(END))):  # nor ends in zeros
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
    means = [cv2.reduce(part, 1, cv2.REDUCE_AVG, dtype=cv2.CV_32F) for part in (below, above)]
    lighter = means[0] - means[1]
    for row in np.flatnonzero((abs(lighter[:-1] + lighter[1:]) > SHIFT).any((1, 2))):
        two = slice(row, row + 2)
        jumps = (below[two].astype(np.float32) - above[two]).reshape(2, columns, across, 3).mean(2)
        if _is_seam(jumps) or _is_seam(-jumps):
            return int(row + 1) * down
    return 0


def _is_seam(jumps: np.ndarray) -> bool:
    """Whether two rows of blocks are lighter than those above: the first from a column on, the second up to it.

    Args:
        jumps: (2, columns, 3), of the blocks.
    """
    x = np.arange(EDGE, jumps.shape[1] - EDGE + 1)[:, None]
    (quiet, one), (other, quiet_too) = _sides(jumps, x)
    (_, most_of_one), (most_of_other, _) = _sides(jumps > SHIFT / 2, x)
    shift = np.minimum(one, other) - 2 * np.maximum(abs(quiet), abs(quiet_too))
    return bool(((shift > SHIFT) & (np.minimum(most_of_one, most_of_other) > 0.8)).any())


def _sides(rows: np.ndarray, x: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The means of each of two rows to the left and to the right of columns."""
    sums = rows.cumsum(axis=1, dtype=np.float32)
    left, n = sums[:, x[:, 0] - 1], rows.shape[1]
    return list(zip(left / x, (sums[:, -1:] - left) / (n - x), strict=True))
