"""A pair as a picture: side by side, inliers joined by lines, the outline of the query drawn where it was found."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from imatch import geometry, images, store
from imatch.records import Pair
from imatch.sinks import Sink

SIDE, BAR, GAP = 360, 44, 8
GREEN, RED, WHITE = (90, 220, 90), (235, 90, 80), (255, 255, 255)
COLOURS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]


@dataclass(frozen=True)
class Png(Sink):
    """Both photographs at most 360 pixels a side, the 120 most similar inliers coloured by similarity."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.png`."""
        store.write_bytes(path.with_name(path.name + ".png"), encode(draw(pair)))


def encode(picture: np.ndarray) -> bytes:
    """An (h, w, 3) uint8 RGB picture as the bytes of a PNG of 256 colours, a quarter of the size of one of all."""
    data = BytesIO()
    few = Image.fromarray(picture).quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(data, "PNG")
    return data.getvalue()


def draw(pair: Pair, max_lines: int = 120, shown: np.ndarray | None = None) -> np.ndarray:
    """Draw a pair.

    Args:
        pair: what to draw.
        max_lines: at most so many lines, the most similar ones.
        shown: (m,) bool, which correspondences may be drawn; by default the inliers.

    Returns:
        (h, w, 3) uint8 RGB. Colours run from dark blue (similarity 0.7 and below) to yellow (1.0).
    """
    left, right = (_thumbnail(path, size) for path, size in zip(pair.paths, pair.sizes, strict=True))
    height = max(len(left), len(right)) + BAR
    canvas = np.full((height, left.shape[1] + GAP + right.shape[1], 3), 24, np.uint8)
    canvas[BAR : BAR + len(left), : left.shape[1]] = left
    canvas[BAR : BAR + len(right), left.shape[1] + GAP :] = right
    here, there = (_to_canvas(size, part) for size, part in zip(pair.sizes, (left, right), strict=True))
    offset = np.array([left.shape[1] + GAP, BAR])

    chosen = np.flatnonzero(pair.geometry.inliers if shown is None else shown)[:max_lines]
    level = np.clip((pair.matches.similarity[chosen] - 0.7) / 0.3 * 255, 0, 255).astype(np.uint8)
    colours = COLOURS[level]
    for i, colour in reversed(list(zip(chosen, colours.tolist(), strict=True))):  # the most similar on top
        a, b = here(pair.xy_a[i]) + np.array([0, BAR]), there(pair.xy_b[i]) + offset
        _line(canvas, a, b, colour, 1)
        for end in (a, b):
            cv2.circle(canvas, _fixed(end), 2 * 16, colour, -1, cv2.LINE_AA, 4)

    row, matrix = pair.row, pair.geometry.matrix
    colour = GREEN if row["verified"] else RED
    if matrix is not None and np.isfinite(outline := geometry.transform(matrix, geometry.corners(pair.sizes[0]))).all():
        corners = [there(corner) + offset for corner in outline]
        part = canvas[BAR:, left.shape[1] + GAP :]
        for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
            _line(part, start - offset, end - offset, colour, 2)
    _text(canvas, 16, f"{store.printable(row['query'])}  ->  {store.printable(row['candidate'])}", WHITE)
    said = f"{'verified' if row['verified'] else 'not verified'}: {row['inliers']} inliers of {row['matches']} matches"
    turn = None if row["rotation"] is None else round(row["rotation"], 1) + 0.0  # no minus zero
    found = "" if turn is None else f", turn it by {turn:.1f} degrees, scale by {row['scale']:.2f}"
    error = row.get("corner_error")
    _text(canvas, 36, said + found + ("" if error is None else f", corner error {error:.2f} px"), colour)
    return canvas


@lru_cache(maxsize=64)
def _thumbnail(path: Path, size: tuple[int, int]) -> np.ndarray:
    return images.thumbnail(path, size, min(SIDE, max(size)))


def _to_canvas(size: tuple[int, int], part: np.ndarray):  # noqa: ANN202  (a closure over the scale)
    scale = np.array([part.shape[1] / size[1], part.shape[0] / size[0]])
    return lambda xy: (np.asarray(xy) + 0.5) * scale - 0.5


def _fixed(xy: np.ndarray) -> tuple[int, int]:
    x, y = np.clip(np.round(xy * 16), -(2**24), 2**24).astype(int)
    return int(x), int(y)


def _line(canvas: np.ndarray, a: np.ndarray, b: np.ndarray, colour: list[int] | tuple[int, ...], width: int) -> None:
    cv2.line(canvas, _fixed(a), _fixed(b), colour, width, cv2.LINE_AA, 4)


def _text(canvas: np.ndarray, y: int, text: str, colour: tuple[int, int, int]) -> None:
    cv2.putText(canvas, text, (6, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)
