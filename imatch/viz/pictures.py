"""Pictures of a pair: arrays in, (h, w, 3) uint8 RGB out. Whoever shows or writes them is a floor above.

A point (x, y) of a photograph lies at ((x, y) + 0.5) * factor - 0.5 of its picture, for both count from the centres
of their pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageColor

from imatch.core import files
from imatch.core.rows import PairRow
from imatch.core.types import Geometry, ImatchError, Pair, Tokens, normalise
from imatch.data import images
from imatch.features import denseft
from imatch.matching import geometry

BAR, GAP = 44, 8
"""Pixels above the photographs for text, and between them."""
SQUARES = 10
"""Squares of a checkerboard along the longer side."""
NEAR = 0.02
"""Keypoints within this share of the photograph's extent see much the same."""
GOOD, BAD, CHOSEN = "#5adc5a", "#eb5a50", "#00e5ff"
"""On photographs: what is verified, what is not, and what was pointed at."""
GREEN, RED = (ImageColor.getrgb(colour) for colour in (GOOD, BAD))
WHITE, DARK = (255, 255, 255), (24, 24, 24)
COLOURS = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]
"""(256, 3) uint8 RGB, from dark blue over green to yellow (viridis)."""
DASH = 8
"""Pixels of a dash: the outline is dashed where it is only roughly there."""
KINDS = {
    "planar": "a plane",
    "rotation": "a camera that only rotates",
    "general": "a scene with depth",
    "watermark": "a watermark",
    "degenerate": "no view of a scene",
}
"""What explains two photographs (`Geometry.kind`), in plain words."""
WAYS = (("to the left", "to the right"), ("up", "down"), ("back", "ahead"))
"""Against and along a camera's axes."""
SIDE, MOST, RADIUS = 360, 120, 2
"""Of a pair's picture: pixels of a photograph's longer side, correspondences and pixels around their ends at most."""
LOW, HIGH = 0.7, 1.0
"""Similarities that are dark blue and yellow; those beyond look like them."""


def encode(picture: np.ndarray) -> bytes:
    """An (h, w, 3) uint8 RGB picture as the bytes of a PNG of 256 colours, a quarter of the size of one of all.

    >>> encode(np.zeros((2, 3, 3), np.uint8))[1:4]
    b'PNG'
    """
    data = BytesIO()
    few = Image.fromarray(picture).quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(data, "PNG")
    return data.getvalue()


def lines(pair: Pair, side: int = SIDE, shown: np.ndarray | None = None) -> np.ndarray:
    """Both photographs side by side, correspondences as lines, the outline of A in B, and in words what was found.

    Args:
        pair: what to draw.
        side: pixels of a photograph's longer side at most; none is enlarged.
        shown: (m,) bool, which correspondences may be drawn; by default the inliers.

    >>> from imatch.core.types import Matches
    >>> found = Geometry(np.eye(3), np.zeros(0, bool), 0.0, True, "")
    >>> files, xy, none = (Path("a.jpg"), Path("b.jpg")), np.zeros((0, 2)), np.zeros(0)
    >>> row = {"query": "a", "candidate": "b", "verified": True, "inliers": 0, "matches": 0, "rotation": None}
    >>> pair = Pair(row, files, ((20, 30), (40, 60)), xy, xy, Matches(none, none, none), found)
    >>> lines(pair).shape
    (84, 98, 3)
    """
    left, right = (_thumbnail(path, size, side) for path, size in zip(pair.paths, pair.sizes, strict=True))
    corner = np.array([left.shape[1] + GAP, BAR])
    canvas = np.full((max(len(left), len(right)) + BAR, corner[0] + right.shape[1], 3), DARK, np.uint8)
    canvas[BAR : BAR + len(left), : left.shape[1]] = left
    canvas[BAR : BAR + len(right), corner[0] :] = right
    chosen = np.flatnonzero(pair.geometry.inliers if shown is None else shown)[:MOST]
    a = geometry.transform(_onto(pair.sizes[0], left), pair.xy_a[chosen]) + np.array([0, BAR])
    b = geometry.transform(_onto(pair.sizes[1], right), pair.xy_b[chosen]) + corner
    bright = (pair.matches.similarity[chosen] - LOW) / (HIGH - LOW)
    inks = COLOURS[np.clip(255 * bright, 0, 255).astype(np.uint8)].tolist()
    for start, end, ink in reversed(list(zip(a, b, inks, strict=True))):  # the most similar on top
        _line(canvas, start, end, ink, 1)
        for place in (start, end):
            cv2.circle(canvas, _fixed(place), RADIUS * 16, ink, -1, cv2.LINE_AA, 4)
    _outlined(canvas[BAR:, corner[0] :][: len(right)], pair, 2)
    _say(canvas, pair)
    return canvas


def checkerboard(pair: Pair, side: int = SIDE) -> np.ndarray:
    """B, with A warped onto it in every other square.

    Args:
        pair: what to draw.
        side: pixels of B's longer side at most.

    Raises:
        ImatchError: A cannot be warped onto B (`flaw`).

    >>> from imatch.core.types import Matches
    >>> found = Geometry(np.eye(3), np.zeros(0, bool), 0.0, True, "")
    >>> files, xy, none = (Path("a.jpg"), Path("b.jpg")), np.zeros((0, 2)), np.zeros(0)
    >>> pair = Pair({}, files, ((20, 30), (40, 60)), xy, xy, Matches(none, none, none), found)
    >>> checkerboard(pair).shape
    (40, 60, 3)
    """
    warped, covered, below = _warped(pair, side)
    y, x = np.indices(covered.shape) * SQUARES // max(covered.shape)
    shown = covered & ((x + y) % 2 == 0)
    return _outlined(np.where(shown[..., None], warped, below), pair)


def blend(pair: Pair, side: int = SIDE) -> np.ndarray:
    """B, and half transparent on it A, warped: what does not fit is seen twice. Otherwise as `checkerboard`."""
    warped, covered, below = _warped(pair, side)
    return _outlined(np.where(covered[..., None], cv2.addWeighted(warped, 0.5, below, 0.5, 0), below), pair)


def outline(found: Geometry, size: tuple[int, int]) -> np.ndarray | None:
    """Where A's corners lie in B by what was found.

    Args:
        found: from A to B.
        size: (h, w) of A.

    Returns:
        (4, 2) pixels of B; None without a matrix, and where one of them lies nowhere.

    >>> outline(Geometry(np.eye(3), np.ones(20, bool), 0.5, True, ""), (30, 40))[2].tolist()
    [39.0, 29.0]
    """
    if found.matrix is None:
        return None
    corners = geometry.transform(found.matrix, geometry.corners(size))
    return corners if np.isfinite(corners).all() else None


def similarities(a: Tokens, b: Tokens, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Cosine of some descriptors of A with all of B.

    Args:
        a, b: of one backbone.
        rows: (k,) descriptors of A.

    Returns:
        (k, n) float32.

    >>> tokens = Tokens(np.ones(1), np.array([[2.0, 0], [0, 3]]), np.zeros((2, 2)))
    >>> similarities(tokens, tokens, [0]).tolist()
    [[1.0, 0.0]]
    """
    asked, all_of_b = (normalise(x.astype(np.float32)) for x in (a.descriptors[rows], b.descriptors))
    return asked @ all_of_b.T


def best_two(similarity: np.ndarray, b: Tokens) -> tuple[int, int | None]:
    """The most similar descriptor of B, and the most similar one that is no neighbour of it: its rival.

    Neighbours see much the same. On a grid they are the eight around it; keypoints are those within `NEAR` of B's
    extent.

    Args:
        similarity: (n,) of all descriptors of B.
        b: those.

    Returns:
        Rows of B; None where all are neighbours.

    >>> xy = np.array([[0.0, 0], [10, 0], [20, 0]])
    >>> best_two(np.array([0.9, 0.8, 0.3]), Tokens(np.ones(1), np.ones((3, 1)), xy, grid=(1, 3)))
    (0, 2)
    """
    best = int(similarity.argmax())
    reach = NEAR * float(np.ptp(b.xy, axis=0).max()) if b.grid is None else 1.5 * max(b.spacing)
    others = np.flatnonzero(np.abs(b.xy - b.xy[best]).max(axis=1) > reach)
    return best, int(others[similarity[others].argmax()]) if len(others) else None


def extent(tokens: Tokens, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Where the cells of a grid lie on a photograph, as `Axes.imshow` takes it: left, right, bottom, top.

    Args:
        tokens: on a grid.
        size: (h, w) of the photograph in pixels.

    >>> extent(Tokens(np.ones(1), np.ones((2, 1)), np.array([[4.5, 4.5], [14.5, 4.5]]), grid=(1, 2)), (10, 20))
    (-0.5, 19.5, 9.5, -0.5)
    """
    (h, w), (rows, columns), (x, y) = denseft.covered(tokens, size), tokens.grid, tokens.xy[0].tolist()
    left, top = x - w / columns / 2, y - h / rows / 2
    return left, left + w, top + h, top


def _onto(size: tuple[int, int], picture: np.ndarray) -> np.ndarray:
    """From pixels of a photograph to pixels of its picture: (3, 3)."""
    y, x = np.array(picture.shape[:2]) / size
    return np.array([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])


def _thumbnail(photograph: Path | np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    seen = images.thumbnail if isinstance(photograph, np.ndarray) else _from_disk
    return seen(photograph, size, min(side, max(size)))


_from_disk = lru_cache(maxsize=64)(images.thumbnail)


def flaw(pair: Pair) -> str:
    """Say why A cannot be warped onto B; "" if it can."""
    found = pair.geometry
    if found.matrix is None:
        return found.reason
    if found.kind == "general":
        return "the scene has depth, which no matrix follows"
    return geometry.degenerate(
        found.matrix, pair.xy_a[found.inliers] if found.verified else geometry.corners(pair.sizes[0])
    )


def _warped(pair: Pair, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A on B's picture (h, w, 3), where it lies (h, w) bool, and B's picture."""
    if why := flaw(pair):
        raise ImatchError(f"A cannot be warped onto B: {why}")
    (size_a, size_b), matrix = pair.sizes, pair.geometry.matrix
    below = _thumbnail(pair.paths[1], size_b, side)
    into = _onto(size_b, below) @ matrix
    # A as large as it is shown, so that warping neither blurs it nor leaves pixels out
    scale = geometry.rotation_scale(into, size_a)[1]
    above = _thumbnail(pair.paths[0], size_a, max(1, round(min(scale, 1) * max(size_a))))
    into = into @ np.linalg.inv(_onto(size_a, above))
    shape = below.shape[1::-1]
    covered = cv2.warpPerspective(np.full(above.shape[:2], 255, np.uint8), into, shape) == 255
    return cv2.warpPerspective(above, into, shape), covered, below


def _fixed(xy: np.ndarray) -> tuple[int, int]:
    """OpenCV's fixed point numbers of 4 bits."""
    x, y = np.clip(np.round(xy * 16), -(2**24), 2**24).astype(int)
    return int(x), int(y)


def _line(canvas: np.ndarray, a: np.ndarray, b: np.ndarray, colour: Sequence[int], width: int) -> None:
    cv2.line(canvas, _fixed(a), _fixed(b), colour, width, cv2.LINE_AA, 4)


def _outlined(picture: np.ndarray, pair: Pair, width: int = 1) -> np.ndarray:
    """B's picture with A's outline, green where the geometry is verified, else red; dashed in a scene with depth."""
    found = outline(pair.geometry, pair.sizes[0])
    if found is None:
        return picture
    corners = geometry.transform(_onto(pair.sizes[1], picture), found)
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dashes = min(100, int(np.linalg.norm(end - start) / DASH / 2)) if pair.geometry.kind == "general" else 0
        stops = np.linspace(start, end, 2 * dashes + 2)
        for one, other in zip(stops[::2], stops[1::2], strict=True):
            _line(picture, one, other, GREEN if pair.geometry.verified else RED, width)
    return picture


def _say(canvas: np.ndarray, pair: Pair) -> None:
    """Two lines of text above the photographs: which they are, and what was found."""
    row = pair.row
    _text(canvas, 16, f"{files.printable(row['query'])}  ->  {files.printable(row['candidate'])}", WHITE)
    said = f"{'verified' if row['verified'] else 'not verified'}: {row['inliers']} inliers of {row['matches']} matches"
    by = f" by {row['weight']}" if row.get("weight") else ""
    said += by + (" and pixels" if row.get("refined") else "")
    found = told(pair.geometry, pair.sizes[0])[:1]  # without how the camera moved, for which there is no room
    error = row.get("corner_error")
    exact = [] if error is None else [f"corner error {error:.2f} px"]
    _text(canvas, 36, ", ".join([said, *found, *exact]), GREEN if row["verified"] else RED)


def _text(canvas: np.ndarray, y: int, text: str, colour: tuple[int, int, int]) -> None:
    cv2.putText(canvas, text, (6, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)


@dataclass(frozen=True)
class Png:
    """Both photographs at most 360 pixels a side, the 120 most similar inliers coloured by similarity."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.png`."""
        files.write_bytes(path.with_name(path.name + ".png"), encode(lines(pair)))

    def gather(self, folder: Path, pairs: Iterable[tuple[Path, PairRow]]) -> None:
        """See `Sink`; each picture is all there is."""


def told(found: Geometry, size: tuple[int, int]) -> list[str]:
    """Say in plain words what explains two photographs: its kind with rotation and scale, then how the camera moved.

    Args:
        found: the geometry; of one that is not verified only the kind counts, and only where that is the flaw.
        size: (h, w) of A.

    >>> told(Geometry(np.eye(3), np.ones(20, bool), 0.5, True, "", "general"), (30, 40))
    ['a scene with depth, rotated about 0.0 degrees, about 1.00 times as large']
    """
    kind = KINDS.get(found.kind, "")
    if not found.verified or found.matrix is None:
        return [kind] if found.kind in ("watermark", "degenerate") else []
    about = "about " if found.kind == "general" else ""
    angle, scale = geometry.rotation_scale(found.matrix, size)
    said = f"rotated {about}{angle:z.1f} degrees, {about}{scale:.2f} times as large"
    return [f"{kind}, {said}" if kind else said, *([_moved(*found.pose)] if found.pose else [])]


def _moved(rotation: np.ndarray, direction: np.ndarray) -> str:
    """How the camera of `Geometry.pose` moved from A to B, along the axes that it had at A."""
    said = f"the camera rotated by {math.degrees(np.linalg.norm(cv2.Rodrigues(rotation)[0])):.1f} degrees"
    centre = -rotation.T @ direction
    if not centre.any():
        return said
    ways = [way[int(along > 0)] for way, along in zip(WAYS, centre, strict=True) if abs(along) > 0.38]  # 22.5 degrees
    return f"{said} and moved {' and '.join(ways)}, ({', '.join(f'{along:z.2f}' for along in centre)})"


def metres_said(metres: float) -> str:
    """A distance for people.

    >>> metres_said(3.14159), metres_said(271.8), metres_said(12345.6)
    ('3.1 m', '272 m', '12.3 km')
    """
    return f"{metres / 1000:.1f} km" if metres >= 10_000 else f"{metres:.0f} m" if metres >= 100 else f"{metres:.1f} m"
