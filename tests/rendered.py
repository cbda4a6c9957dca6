"""Scenes of depth with known cameras: textured planes at several depths, seen from two places. Truth for two views.

Everything is a plane, so every pixel's depth is exact: a wall, the ground and boards before it, painted from far to
near with photographs as their textures. Two cameras look at the scene's middle from an arc.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imatch.cli import demo
from imatch.data import images

SIZE = (900, 1200)
FOCAL_35MM = 30
"""What the EXIF says: 30 mm where the diagonal were that of a frame of 36 x 24 mm."""
FOCAL = FOCAL_35MM / np.hypot(36, 24) * np.hypot(*SIZE)
OVER = 2
"""Rendered so many times as large, then averaged: no aliasing."""
DISTANCE = 10.0
"""From the cameras to the middle of the scene."""


@dataclass(frozen=True)
class Camera:
    """A pinhole: x = K (R X + t).

    Attributes:
        rotation: (3, 3) world -> camera, whose z looks ahead and y down.
        centre: (3,) where it stands.
    """

    rotation: np.ndarray
    centre: np.ndarray

    @property
    def matrix(self) -> np.ndarray:
        """K, (3, 3)."""
        h, w = SIZE
        return np.array([[FOCAL, 0, (w - 1) / 2], [0, FOCAL, (h - 1) / 2], [0, 0, 1.0]])


@dataclass(frozen=True)
class Scene:
    """Two photographs of one scene.

    Attributes:
        photographs: (h, w, 3) uint8 each.
        cameras: of the two.
        points: (n, 2) and (n, 2), true correspondences: what is seen in both.
        baseline: degrees between the two directions from which the middle is seen.
    """

    photographs: tuple[np.ndarray, np.ndarray]
    cameras: tuple[Camera, Camera]
    points: tuple[np.ndarray, np.ndarray]
    baseline: float

    @property
    def relative(self) -> tuple[np.ndarray, np.ndarray]:
        """R (3, 3) and the direction t (3,) of norm 1: x_b ~ R x_a + t."""
        a, b = self.cameras
        t = b.rotation @ (a.centre - b.centre)
        return b.rotation @ a.rotation.T, t / np.linalg.norm(t)


def textures(folder: Path) -> list[np.ndarray]:
    """Photographs large enough to be painted with: the demo's, which are written to a folder."""
    demo.write(folder)
    every = [images.decode(path).pixels for path in sorted(folder.iterdir())]
    return [pixels for pixels in every if min(pixels.shape[:2]) >= 400]


def scene(textures: list[np.ndarray], seed: int, baseline: float, boards: int = 4) -> Scene:
    """Render a scene: a wall, the ground, and boards between it and the cameras, at depths of their own.

    Args:
        textures: (h, w, 3) uint8 photographs, at least boards + 2; the seed says which is painted where.
        seed: of all that is drawn.
        baseline: degrees, see `Scene`.
        boards: how many.
    """
    rng = np.random.default_rng(seed)
    chosen = [textures[i] for i in rng.permutation(len(textures))[: boards + 2]]
    planes = [_wall(rng), _ground()]
    planes += [_board(depth, rng) for depth in np.linspace(1.5, 6.5, boards) + rng.uniform(-0.4, 0.4, boards)]
    start = rng.uniform(-baseline, 0)
    cameras = _camera(start, rng), _camera(start + baseline, rng)
    seen = [_rendered(planes, chosen, camera) for camera in cameras]
    points = _common(planes, cameras, [which for _, which in seen], rng)
    return Scene((_taken(seen[0][0], rng), _taken(seen[1][0], rng)), cameras, points, baseline)


def turned_only(textures: list[np.ndarray], seed: int, angle: float) -> Scene:
    """The same scene from one place, the second camera rotated by so many degrees about its y axis."""
    rng = np.random.default_rng(seed)
    chosen = [textures[i] for i in rng.permutation(len(textures))[:5]]
    planes = [_wall(rng), _ground(), *(_board(depth, rng) for depth in (2.0, 3.5, 5.0))]
    first = _camera(0.0, rng)
    cameras = first, Camera(_about_y(angle) @ first.rotation, first.centre)
    seen = [_rendered(planes, chosen, camera) for camera in cameras]
    points = _common(planes, cameras, [which for _, which in seen], rng)
    return Scene((_taken(seen[0][0], rng), _taken(seen[1][0], rng)), cameras, points, 0.0)


def save(photograph: np.ndarray, path: Path, focal: bool = True) -> Path:
    """Write a JPEG, with the focal length in its EXIF or without."""
    exif = Image.Exif()
    if focal:
        exif.get_ifd(0x8769)[0xA405] = FOCAL_35MM
    Image.fromarray(photograph).save(path, quality=92, exif=exif)
    return path


CAPTIONS = ("bar", "stamp", "strip", "logo", "display", "frame")


def caption(picture: Image.Image, kind: str) -> Image.Image:
    """What is burned in, drawn onto a picture: one of `CAPTIONS`."""
    draw, (w, h) = ImageDraw.Draw(picture), picture.size
    if kind == "bar":
        draw.rectangle((0, h - 40, w, h), fill="black")
        draw.ellipse((10, h - 34, 38, h - 6), fill="white")
        _write(draw, (80, h - 35), "TRAILCAM 4K  Forest-07", 26)
    if kind in ("bar", "stamp"):
        _write(draw, (w - 300, h - 32), "2026-05-01 06:10:12  4 C", 22, "orange")
    elif kind == "strip":  # a fifth of the picture
        draw.rectangle((0, 0.8 * h, w, h), fill="navy")
        for line, text in enumerate(
            ("Survey of the eastern woodland, plot 14", "Operator K. Lindqvist", "Frame 00210")
        ):
            _write(draw, (20, (0.81 + 0.06 * line) * h), text, 0.05 * h)
    elif kind == "logo":
        draw.ellipse((0.3 * w, 0.3 * h, 0.7 * w, 0.7 * h), fill="crimson", outline="white", width=8)
        draw.polygon([(0.4 * w, 0.5 * h), (0.5 * w, 0.32 * h), (0.6 * w, 0.5 * h)], fill="white")
        _write(draw, (0.38 * w, 0.54 * h), "ACME PRESS", 0.07 * h, "yellow")
    elif kind == "display":
        shown = ("BAT 80% 15.2V", "GPS 14 SAT", "ALT 104 m", "SPD 3.4 m/s", "MODE P-GPS", "GIMBAL -90", "HDG 213 DEG")
        for place, text in enumerate(shown):
            _write(draw, (0.05 * w, (0.04 + 0.14 * place) * h), text, 0.035 * h, "lime")
            _write(draw, (0.75 * w, (0.04 + 0.14 * place) * h), text[::-1], 0.035 * h, "lime")
        for rung in range(5):
            _write(draw, (0.58 * w, (0.3 + 0.1 * rung) * h), f"{10 * rung - 20:+d}", 0.03 * h, "lime")
    elif kind == "frame":  # about half of the picture
        side = (w // 6, h // 6)
        cells = np.random.default_rng(5).integers(0, 255, (h // 12, w // 12, 3)).astype(np.uint8)
        ornament = Image.fromarray(cells).resize(picture.size, Image.Resampling.BICUBIC)
        ornament.paste(picture.crop((*side, w - side[0], h - side[1])), side)
        picture.paste(ornament)
    return picture


def _write(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: float, colour: str = "white") -> None:
    draw.text(at, text, font=ImageFont.load_default(size), fill=colour)


def _about_y(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _camera(angle: float, rng: np.random.Generator) -> Camera:
    """On the arc, somewhat higher or lower, nearer or farther, and not held straight."""
    around = _about_y(-angle)
    centre = around @ np.array([0, rng.uniform(-0.6, 0.2), -DISTANCE * rng.uniform(0.9, 1.1)])
    ahead = -centre + rng.normal(0, 0.3, 3)
    ahead /= np.linalg.norm(ahead)
    right = np.cross([0, 1.0, 0], ahead)
    right /= np.linalg.norm(right)
    straight = np.array([right, np.cross(ahead, right), ahead])
    roll = np.radians(rng.uniform(-5, 5))
    c, s = np.cos(roll), np.sin(roll)
    return Camera(np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ straight, centre)


# A plane is (3, 3): its columns are where u, v and 1 go, u and v from 0 to 1 over its texture.
def _wall(rng: np.random.Generator) -> np.ndarray:
    width, height, tilt = 18.0, 9.0, _about_y(rng.uniform(-10, 10))
    return np.column_stack([tilt @ [width, 0, 0], [0, height, 0], tilt @ [-width / 2, 0, 0] + [0, -7, 4]])


def _ground() -> np.ndarray:
    return np.column_stack([[16.0, 0, 0], [0, 0, 14.0], [-8.0, 2, -9.0]])


def _board(nearer: float, rng: np.random.Generator) -> np.ndarray:
    width, height = rng.uniform(2, 3.5), rng.uniform(2, 4)
    place = np.array([rng.uniform(-5, 3), 2 - height, 4 - nearer])
    return np.column_stack([_about_y(rng.uniform(-25, 25)) @ [width, 0, 0], [0, height, 0], place])


def _into(plane: np.ndarray, camera: Camera) -> np.ndarray:
    """(3, 3): u, v, 1 -> pixels of a camera, whose third row is the depth."""
    in_camera = camera.rotation @ plane
    in_camera[:, 2] -= camera.rotation @ camera.centre
    return camera.matrix @ in_camera


def _rendered(planes: list[np.ndarray], textures: list[np.ndarray], camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """(h, w, 3) float32 and (h, w) which plane each pixel shows, -1 the sky."""
    h, w = SIZE[0] * OVER, SIZE[1] * OVER
    larger = np.array([[OVER, 0, (OVER - 1) / 2], [0, OVER, (OVER - 1) / 2], [0, 0, 1.0]])
    pixels, nearest, which = np.full((h, w, 3), 200, np.uint8), np.zeros((h, w)), np.full((h, w), -1)
    for number, (plane, texture) in enumerate(zip(planes, textures, strict=True)):
        into = larger @ _into(plane, camera)
        a, b, c = np.linalg.inv(into)[2]
        inverse = a * np.arange(w) + b * np.arange(h)[:, None] + c  # of the depth, which is linear on a plane
        size = texture.shape[1::-1]
        from_texture = into @ np.diag([1 / size[0], 1 / size[1], 1]) @ np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        there = cv2.warpPerspective(np.ones(texture.shape[:2], np.uint8), from_texture, (w, h), flags=cv2.INTER_NEAREST)
        nearer = (there > 0) & (inverse > nearest) & (inverse < 10)
        pixels[nearer] = cv2.warpPerspective(texture, from_texture, (w, h), borderMode=cv2.BORDER_REPLICATE)[nearer]
        nearest[nearer], which[nearer] = inverse[nearer], number
    small = cv2.resize(pixels, SIZE[::-1], interpolation=cv2.INTER_AREA).astype(np.float32)
    return small, which[OVER // 2 :: OVER, OVER // 2 :: OVER]


def _common(
    planes: list[np.ndarray], cameras: tuple[Camera, Camera], which: list[np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Points of the planes that both cameras see."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for number, plane in enumerate(planes):
        uv = np.column_stack([rng.uniform(size=(2000, 2)), np.ones(2000)])
        seen, there = np.ones(2000, bool), []
        for camera, shown in zip(cameras, which, strict=True):
            mapped = uv @ _into(plane, camera).T
            xy = mapped[:, :2] / mapped[:, 2:]
            x, y = np.round(xy).astype(int).T
            inside = (mapped[:, 2] > 0) & (x >= 0) & (y >= 0) & (x < SIZE[1]) & (y < SIZE[0])
            seen &= inside & (shown[y.clip(0, SIZE[0] - 1), x.clip(0, SIZE[1] - 1)] == number)
            there.append(xy)
        found.append((there[0][seen], there[1][seen]))
    return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])


def _taken(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As a camera takes it: blurred a little, exposed otherwise, with noise."""
    blurred = cv2.GaussianBlur(pixels, None, rng.uniform(0.3, 0.9))
    exposed = 255 * (blurred / 255) ** rng.uniform(0.8, 1.25) * rng.uniform(0.85, 1.1)
    return np.clip(np.round(exposed + rng.normal(0, rng.uniform(1, 4), exposed.shape)), 0, 255).astype(np.uint8)
