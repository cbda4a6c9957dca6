"""A photograph turned or zoomed before a backbone sees it, for backbones that do not turn with their photographs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from imatch.core import config
from imatch.core.types import ImatchError, Tokens
from imatch.data import references
from imatch.data.images import Decoded
from imatch.data.references import shift

ROTATIONS = (1, 4, 8)


@dataclass(frozen=True)
class Pose:
    """How a photograph is shown to a backbone.

    Attributes:
        turn: degrees counter-clockwise.
        zoom: factor, above 0, on the size that it is resized to anyway.

    >>> str(Pose(45)), str(Pose(90, 2)), str(Pose())
    ('rot045', 'rot090_x2', 'rot000')
    """

    turn: float = 0.0
    zoom: float = 1.0

    def __str__(self) -> str:
        zoomed = "" if self.zoom == 1 else f"_x{self.zoom:g}".replace(".", "p")
        return f"rot{round(self.turn):03d}{zoomed}"


UPRIGHT = Pose()


def poses(rotations: int, zooms: Sequence[float] = (1.0,)) -> list[Pose]:
    """All poses to try, the upright one first.

    Args:
        rotations: 1, or 4 or 8, evenly spread over the circle.
        zooms: factors on the size, each above 0; 1 is always among them.

    Raises:
        ImatchError: another number of rotations, or a zoom that is none.

    >>> [str(pose) for pose in poses(4, [1.0, 2.0])][:3]
    ['rot000', 'rot090', 'rot180']
    """
    if rotations not in ROTATIONS:
        raise ImatchError(f"rotations is {rotations}: use 1 (upright alone), 4 or 8")
    if not all(config.fits(zoom, float) and 0 < zoom < math.inf for zoom in zooms):
        raise ImatchError(f"zooms {list(zooms)} must be factors above 0")
    turns = [360.0 * i / rotations for i in range(rotations)]
    return [Pose(turn, zoom) for zoom in [1.0, *sorted({*map(float, zooms)} - {1.0})] for turn in turns]


def turned(photograph: Decoded, degrees: float, patch: int) -> Decoded:
    """A photograph turned counter-clockwise, on a canvas that holds all of it.

    Right angles move pixels and change none. Otherwise pixels are interpolated (bicubic), and what lies outside the
    photograph is its reflection, which disturbs a network less than a black corner; `placed` drops its tokens.

    Args:
        photograph: its pixels, and what is known of them.
        degrees: counter-clockwise.
        patch: both sides of the canvas are multiples of this many pixels.

    >>> pixels = np.zeros((2, 3, 3), np.uint8)
    >>> pixels[0, 2] = 255
    >>> found = turned(Decoded(pixels, (2, 3), "", None, (0.0, 0.0, 3.0, 2.0)), 90, patch=1)
    >>> found.pixels[0, 0, 0], found.to_original(np.array([[0.0, 0.0]])).tolist()
    (np.uint8(255), [[2.0, 0.0]])
    """
    h, w = photograph.pixels.shape[:2]
    if degrees % 90 == 0:
        pixels = np.ascontiguousarray(np.rot90(photograph.pixels, int(degrees // 90) % 4))
        there = _there(degrees, (h, w), pixels.shape[:2])
    else:
        spread = np.abs(references.turn(degrees)[:2, :2])
        size = tuple(math.ceil(side / patch - 1e-9) * patch for side in (spread @ [w, h])[::-1])
        there = _there(degrees, (h, w), size)
        pixels = cv2.warpAffine(
            photograph.pixels, there[:2], size[::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101
        )
    return replace(photograph, pixels=pixels, turned=(np.linalg.inv(there), (h, w)))


def _there(degrees: float, size: tuple[int, ...], canvas: tuple[int, ...]) -> np.ndarray:
    """(3, 3) pixels of a photograph -> pixels of a canvas with the same centre."""
    (h, w), (height, width) = size, canvas
    return (
        shift((width - 1) / 2, (height - 1) / 2)
        @ references.turn(math.fmod(degrees, 360))
        @ shift((1 - w) / 2, (1 - h) / 2)
    )


def shown(xy: np.ndarray, size: tuple[int, int], pose: Pose) -> tuple[np.ndarray, tuple[int, int]]:
    """Where points of a photograph lie when it is shown in a pose.

    Args:
        xy: (n, 2) pixels of the upright photograph.
        size: its (h, w).
        pose: the zoom changes nothing: the pixels stay the photograph's.

    Returns:
        (n, 2) float32 pixels of the rotated photograph, and its (h, w).

    >>> where, size = shown(np.array([[2.0, 0.0]]), (2, 3), Pose(90))
    >>> where.round(3).tolist(), size
    ([[0.0, 0.0]], (3, 2))
    """
    if not pose.turn:
        return xy, size
    spread = np.abs(references.turn(pose.turn)[:2, :2]) @ size[::-1]
    canvas = (math.ceil(spread[1] - 1e-9), math.ceil(spread[0] - 1e-9))
    there = _there(pose.turn, size, canvas)
    return (xy @ there[:2, :2].T + there[:2, 2]).astype(np.float32), canvas


def placed(tokens: Tokens, photograph: Decoded) -> Tokens:
    """Tokens of what `turned` gave with their positions in the original: without a grid, for turned rows are no rows
    there, and without those that look at what lies outside.
    """
    xy = photograph.to_original(tokens.xy)
    left, top, right, bottom = photograph.box
    inside = ((xy >= [left - 0.5, top - 0.5]) & (xy <= [right - 0.5, bottom - 0.5])).all(axis=1)
    return Tokens(tokens.vector, tokens.descriptors[inside], xy[inside])
