"""Photographs: list them, check their headers, decode, orient and resize them, read their position.

Every photograph is read from disk once: its SHA-256 is that of the very bytes that were decoded.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from imatch.core import compute, config
from imatch.core.files import printable
from imatch.core.rows import Position
from imatch.core.types import ImatchError, PassingError, PhotographError
from imatch.data import formats, jpeg, tiff
from imatch.data.exif import position as position_of
from imatch.data.tiff import UPRIGHT, Tiff

_HEIF = frozenset((".heic", ".heif", ".hif") if find_spec("pillow_heif") else ())
SUFFIXES = _HEIF.union(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm"),
    (".avif", ".jp2", ".j2k"),
)
"""In lower case, what the names of files end in that are listed as photographs."""
_REMEDIES = {
    "install the extra heif": ".heic .heif .hif",
    "raw of a camera: develop it to TIFF or JPEG": ".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .srw .raf .orf .rw2 "
    ".pef .x3f .iiq .3fr .fff .erf .mrw",
    "convert it to TIFF or PNG": ".jxl .psd .exr .jpx .tga .fits",
    "a video: take its frames out": ".mp4 .mov .avi .mkv",
}
OTHERS = {one: why for why, those in _REMEDIES.items() for one in those.split() if one not in SUFFIXES}
"""What photographs come as, too, and imatch does not list: suffix -> what to do."""
PICTURES = SUFFIXES | OTHERS.keys()
HIDDEN, OLDER = "hidden", "older copies"
UNSEEN = (HIDDEN, OLDER)
"""Kinds of folders that are not looked into: they may hold all of a disk once more."""
SYSTEM = {
    "thumbnails of a NAS": ("@eadir", "@__thumb"),
    "previews of Lightroom": ("*.lrdata",),
    "copies in a photo library": ("*.photoslibrary/resources", "*.p*library/previews", "*.p*library/thumbnails"),
    "deleted files": ("#recycle", "@recycle", "$recycle.bin", "recycler", "network trash folder"),
    OLDER: ("#snapshot", "@recently-snapshot"),
    "of the system": ("system volume information", "lost+found", "__macosx"),
}
"""What folders hold that systems and programs make between photographs -> how they are called, in lower case."""
MAX_PIXELS = 300_000_000
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which begins to warn at 89 megapixels; the one above stands for it
RESAMPLING = {"opencv": "area by OpenCV", "torch": "bicubic by torch"}
"""Who resizes photographs, and what steps record of it, so that numbers of another way are not mixed with these."""
REDUCED = 6
"""From so many times the wanted size on, blocks of pixels are averaged before a photograph is resized."""
STRIP = 1_000_000
"""Pixels that are converted to RGB at once, to save memory."""


@dataclass(frozen=True)
class Resize:
    """How large a photograph is when the backbone sees it.

    Attributes:
        mode: "long_side": its longer side becomes `long_side` pixels; "scale": both sides are multiplied by
            `scale`, the same for all photographs, so that a crop is not enlarged to the size of its source (both
            keep the aspect to the nearest patch); "stretch": a square of `long_side`, whatever the aspect;
            "crop": a square of `long_side` of the largest square in its middle.
        long_side: pixels, a multiple of the backbone's patch.
        scale: factor, larger than 0.
        limit: pixels that the longer side has at most in mode "scale"; 0 is no limit.

    >>> Resize("long_side", long_side=512).target((600, 1000), patch=16)
    (304, 512)
    >>> Resize("scale", scale=0.5).target((600, 1000), patch=1)
    (300, 500)
    >>> Resize(limit=3200).target((3000, 4000), patch=1)
    (2400, 3200)
    >>> Resize("crop", long_side=256).target((600, 1000), patch=16), Resize("crop", long_side=256).box((600, 1000))
    ((256, 256), (200.0, 0.0, 800.0, 600.0))
    """

    mode: Literal["scale", "long_side", "stretch", "crop"] = "scale"
    long_side: PositiveInt = 640
    scale: PositiveFloat = 1.0
    limit: NonNegativeInt = 0

    def __post_init__(self) -> None:
        config.check(self, "resize")

    def check(self, patch: int) -> None:
        """Raise ImatchError when `long_side` is not a multiple of `patch`.

        >>> Resize("long_side", long_side=518).check(16)
        Traceback (most recent call last):
        imatch.core.types.ImatchError: long_side 518 is not a multiple of patch 16: use 512 or 528
        """
        if self.mode != "scale" and self.long_side % patch:
            low = self.long_side // patch * patch
            use = f"{low} or {low + patch}" if low else f"{patch}"
            raise ImatchError(f"long_side {self.long_side} is not a multiple of patch {patch}: use {use}")

    def zoomed(self, zoom: float) -> Resize:
        """The same with every side multiplied by `zoom`.

        >>> str(Resize("long_side", long_side=512).zoomed(0.5))
        'ls256'
        """
        return replace(
            self,
            long_side=round(self.long_side * zoom),
            scale=self.scale * zoom,
            limit=round(self.limit * zoom),
        )

    def like(self, size: tuple[int, int]) -> Resize:
        """The same scale that a photograph of (h, w) pixels gets, for all of its parts.

        >>> Resize(limit=3200).like((3000, 4000)).scale
        0.8
        """
        return replace(self, scale=self._factor(size), limit=0) if self.mode == "scale" else self

    def target(self, size: tuple[int, int], patch: int) -> tuple[int, int]:
        """The (h, w) that a photograph of (h, w) pixels is resized to: multiples of `patch`, at least one each."""
        self.check(patch)
        if self.mode in ("stretch", "crop"):
            return self.long_side, self.long_side
        factor = self._factor(size)
        h, w = (max(1, round(side * factor / patch)) * patch for side in size)
        return h, w

    def _factor(self, size: tuple[int, int]) -> float:
        if self.mode == "long_side":
            return self.long_side / max(size)
        return min(self.scale, (self.limit or math.inf) / max(size))

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part (left, top, right, bottom) of a photograph of (h, w) pixels that is seen, in pixel edges."""
        h, w = size
        if self.mode != "crop":
            return 0.0, 0.0, float(w), float(h)
        side = min(size)
        left, top = (w - side) / 2, (h - side) / 2
        return left, top, left + side, top + side

    def __str__(self) -> str:
        if self.mode == "scale":
            return f"scale{self.scale:g}".replace(".", "p")
        short = {"long_side": "ls", "stretch": "res", "crop": "crop"}[self.mode]
        return f"{short}{self.long_side}"


@dataclass(frozen=True)
class Decoded:
    """A photograph in memory.

    Attributes:
        pixels: (h, w, 3) uint8 RGB, upright, resized as asked.
        size: (H, W) of the upright photograph before resizing.
        sha256: hexadecimal digest of the file's bytes.
        position: where it was taken, and how it was held (`exif.position`), or None.
        box: (left, top, right, bottom), the part of the upright photograph that `pixels` show, in pixel edges.
        look: what `look` says of the pixels, "" if nobody asked.
        note: what had to be assumed to show them, such as which numbers are black and white, "" if nothing.
        turned: (3, 3), where the pixels were before they were rotated (`rotations.turned`), and the (h, w) of all of
            them then; None when nobody rotated them.
        doubt: what of its position is not taken, and why; "" for nothing.
    """

    pixels: np.ndarray
    size: tuple[int, int]
    sha256: str
    position: Position | None
    box: tuple[float, float, float, float]
    look: str = ""
    note: str = ""
    turned: tuple[np.ndarray, tuple[int, int]] | None = None
    doubt: str = ""

    def to_original(self, xy: np.ndarray) -> np.ndarray:
        """Positions (n, 2) in `pixels` as float32 positions in the upright photograph as it lies on disk."""
        origin, corner = np.array(self.box[:2]), np.array(self.box[2:])
        size = self.pixels.shape[:2]
        if self.turned:
            back, size = self.turned
            xy = xy @ back[:2, :2].T + back[:2, 2]
        factor = (corner - origin) / size[::-1]
        return np.asarray((xy + 0.5) * factor + origin - 0.5, np.float32)


class Listed(list[str]):
    """Ids of photographs. `left_out` says what else lies there, to follow them: "; left out: ...", "" for nothing."""

    left_out = ""


def list_photographs(root: Path, leave_out: Path | None = None) -> Listed:
    """The ids of all photographs below `root`, but for those below `leave_out`: POSIX paths relative to it, sorted.

    Linked folders are followed, a link back to a folder above itself is not. Hidden files and folders, folders of
    systems and programs (`SYSTEM`) and files of other kinds are left out and counted; what is no picture is counted
    as one sum, and hidden folders and older copies are not looked into.

    Raises:
        ImatchError: a folder cannot be listed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("b.jpg", "a.PNG", "notes.txt", "c.cr2", "d.DNG"):
    ...         _ = (Path(folder) / name).write_bytes(b"")
    ...     found = list_photographs(Path(folder))
    >>> found, found.left_out
    (['a.PNG', 'b.jpg'], '; left out: 1 .cr2, 1 .dng (raw of a camera: develop it to TIFF or JPEG), 1 other files')
    """
    found: list[Path] = []
    left_out = Counter[tuple[str, str]]()
    system: dict[Path, tuple[str, str]] = {}

    def unlisted(error: OSError) -> None:
        if (folder := Path(error.filename)) not in system:
            raise ImatchError(
                f"folder {folder} cannot be listed: {error.strerror}. Allow reading it or take it out of the data set"
            ) from error
        left_out[system[folder]] += 0

    for name, folders, files in os.walk(root, onerror=unlisted, followlinks=True):
        folder = Path(name)
        if folder == leave_out:
            folders.clear()
            continue
        if folder in system:
            if pictures := sum(_suffix(one) in PICTURES for one in files):
                left_out[system[folder]] += pictures
            folders[:] = [one for one in folders if not (folder / one).is_symlink()]
            system |= {folder / one: system[folder] for one in folders}
            continue
        above = {os.path.realpath(one) for one in (folder, *folder.parents) if one.is_relative_to(root)}
        folders[:] = [one for one in folders if os.path.realpath(folder / one) not in above]
        for one in folders.copy():
            if why := _system(folder, one):
                system[folder / one] = kind = why, f"in {printable(one)}"
                if why in UNSEEN:
                    left_out[kind] += 0
                    folders.remove(one)
        for one in files:
            if (suffix := _suffix(one)) in SUFFIXES and not one.startswith("."):
                found.append(folder / one)
            elif suffix in PICTURES and one.startswith("."):
                left_out["their names begin with a dot", "hidden"] += 1
            elif not one.startswith("."):
                left_out[(OTHERS[suffix], suffix) if suffix in OTHERS else ("", "other files")] += 1
    listed = Listed(sorted(path.relative_to(root).as_posix() for path in found))
    listed.left_out = _said(left_out)
    return listed


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _system(above: Path, name: str) -> str:
    """What a folder that holds no photographs of the user's own holds; "" for all others."""
    if name.startswith("."):
        return HIDDEN
    path = f"/{above.name}/{name}".lower()
    for why, those in SYSTEM.items():
        if any(fnmatchcase(path, f"*/{one}") for one in those):
            return why
    return ""


def _said(left_out: Counter[tuple[str, str]]) -> str:
    """How many of each kind, those of one reason together; without a number, all that is in a folder."""
    reasons = []
    kinds = sorted(left_out, key=lambda kind: (not kind[0], kind))
    for why, alike in groupby(kinds, key=itemgetter(0)):
        counted = ", ".join(f"{left_out[kind] or 'all'} {kind[1]}" for kind in alike)
        reasons.append(f"{counted} ({why})" if why else counted)
    return f"; left out: {', '.join(reasons)}" if reasons else ""


def check_header(path: Path) -> tuple[int, int]:
    """The (h, w) of a photograph as it lies in the file, not yet upright, from its header alone.

    Raises:
        PhotographError: the file cannot be opened, is empty, is no photograph or is too large to decode.
    """
    with _reasons(), path.open("rb") as file:
        image = formats.opened(file)
        _check_size(image)
        # no EXIF: in a PNG it can lie behind the pixels, which would all be read
        return image.size[::-1]


def decode(
    photograph: Path | np.ndarray | Image.Image, resize: Resize | None = None, patch: int = 1, by: str = "opencv"
) -> Decoded:
    """Read a photograph: RGB, 8 bits, upright, at the size the backbone wants.

    JPEGs much larger than that are decoded at a half, a quarter or an eighth; nothing shifts. Where parts of pixels are
    cut off, Pillow resizes in place of `by`. More than 8 bits are scaled to 8 (`tiff.eight_bits`); transparent pixels
    lie on white, as viewers show them; of an animation the first frame is taken.

    Args:
        photograph: the file; or one that is in memory already, a Pillow image or (h, w, 3) uint8 RGB, upright.
        resize: None keeps the photograph's own size.
        patch: sides become multiples of it.
        by: who resizes, one of `RESAMPLING`.

    Raises:
        PhotographError: it has no pixels, or they cannot be decoded, or are damaged; the message is the reason.

    >>> decode(np.zeros((20, 30, 3), np.uint8), Resize("scale", scale=0.5)).pixels.shape
    (10, 15, 3)
    """
    with _reasons():
        if isinstance(photograph, Path):
            file = io.BytesIO(photograph.read_bytes())
            sha256 = hashlib.sha256(file.getvalue()).hexdigest()
            return _decoded(formats.opened(file), sha256, resize, patch, by, file)
        given = Image.fromarray(photograph) if isinstance(photograph, np.ndarray) else photograph
        return _decoded(given, hashlib.sha256(given.tobytes()).hexdigest(), resize, patch, by)


def _decoded(
    image: Image.Image | Tiff, sha256: str, resize: Resize | None, patch: int, by: str, file: io.BytesIO | None = None
) -> Decoded:
    _check_size(image)
    exif, xmp = formats.header(image, file)
    position, doubt = position_of(exif, xmp)
    turn = _turn(image, exif)
    lying = turn >= 5
    size = image.size if lying else image.size[::-1]
    target = resize.target(size, patch) if resize else size
    # a box in the middle is the same box before and after turning upright, but for its sides
    left, top, right, bottom = resize.box(size) if resize else (0.0, 0.0, *map(float, size[::-1]))
    box = (top, left, bottom, right) if lying else (left, top, right, bottom)
    target = target[::-1] if lying else target
    box = _drafted(image, target, box)
    pixels, note = _pixels(image, file)
    pixels = _resized(pixels, target, box, by)
    if turn in UPRIGHT:
        pixels = np.asarray(Image.fromarray(pixels).transpose(UPRIGHT[turn]))
    return Decoded(pixels, size, sha256, position, (left, top, right, bottom), note=note, doubt=doubt)


def thumbnail(photograph: Path | np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """A photograph for a picture, its longer side `side` pixels.

    Args:
        photograph: its pixels, or its file; a grey one stands for what is not there, or broken: a figure ends no run.
        size: its (h, w), for that.
        side: pixels.

    Returns:
        (h, w, 3) uint8 RGB.

    >>> thumbnail(Path("gone.jpg"), (60, 120), 20).shape
    (10, 20, 3)
    """
    resize = Resize("long_side", long_side=side)
    try:
        return decode(photograph, resize).pixels
    except PhotographError:
        return np.full((*resize.target(size, 1), 3), 160, np.uint8)


def look(pixels: np.ndarray) -> str:
    """What a photograph looks like in 256 bits: whether grey rises from each of 16 x 17 cells to the next on its right.

    Photographs that differ by compression or size alone differ in few bits, others in about half of them (difference
    hash: N. Krawetz, "Kind of Like That", hackerfactor.com, 2013).

    Args:
        pixels: (h, w, 3) uint8 RGB.

    Returns:
        64 hexadecimal digits.

    >>> look(np.tile(np.arange(34, dtype=np.uint8)[:, None], (32, 1, 3)))[:8]
    'ffffffff'
    """
    cells = Image.fromarray(pixels).convert("L").resize((17, 16), Image.Resampling.BOX)
    grey = np.asarray(cells, np.int16)
    return np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes().hex()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, hexadecimal."""
    with _reasons(), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_size(image: Image.Image | Tiff) -> None:
    w, h = image.size
    if not w * h:
        raise PhotographError("no pixels")
    if w * h > MAX_PIXELS:
        raise PhotographError(f"too large to decode: {w} x {h} are {w * h} pixels, more than {MAX_PIXELS}")


@contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except PhotographError:
        raise
    except Image.UnidentifiedImageError:
        raise PhotographError("not a photograph: no decoder knows its bytes") from None
    except Exception as error:  # decoders raise what they like; one file must not end a run
        kind = PassingError if compute.passing(error) else PhotographError
        said = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            said = error.strerror or str(error)
        elif isinstance(error, SyntaxError):  # Pillow's, of a PNG
            said = f"damaged: {error}"
        raise kind("no memory was left to decode it" if compute.out_of_memory(error) else said) from error


def _turn(image: Image.Image | Tiff, exif: Image.Exif) -> int:
    """The EXIF orientation that is left to apply: Pillow turns TIFFs itself, and has their upright size at once."""
    turn = 1 if image.format == "TIFF" else exif.get(ExifTags.Base.Orientation, 1)
    return turn if turn in UPRIGHT else 1


Box = tuple[float, float, float, float]


def _drafted(image: Image.Image | Tiff, target: tuple[int, int], box: Box) -> Box:
    """Ask the decoder for no more than twice the pixels that are wanted of a box, and say where it is then."""
    (h, w), (width, height) = target, image.size
    wanted = (math.ceil(2 * w * width / (box[2] - box[0])), math.ceil(2 * h * height / (box[3] - box[1])))
    drafted = image.draft(None, wanted)  # None unless the decoder can (JPEG)
    fx, fy = (drafted[1][2] / width, drafted[1][3] / height) if drafted else (1.0, 1.0)
    return box[0] * fx, box[1] * fy, box[2] * fx, box[3] * fy


def _resized(pixels: np.ndarray, target: tuple[int, int], box: Box, by: str) -> np.ndarray:
    (h, w), (height, width) = target, pixels.shape[:2]
    if (h, w) == (height, width) and box == (0, 0, w, h):
        return pixels
    much = by == "torch" and (width >= REDUCED * w or height >= REDUCED * h)
    if much or box != (0, 0, width, height):  # torch averages no blocks, and neither cuts out parts of pixels
        image = Image.fromarray(pixels)
        return np.asarray(image.resize((w, h), Image.Resampling.BICUBIC, box, reducing_gap=REDUCED / 2))
    if by == "opencv":
        small = min(w, width), min(h, height)  # first what shrinks, for INTER_AREA does not enlarge
        pixels = cv2.resize(pixels, small, interpolation=cv2.INTER_AREA)
        return cv2.resize(pixels, (w, h), interpolation=cv2.INTER_CUBIC)
    from torch import from_numpy
    from torch.nn.functional import interpolate

    # Pillow's numbers, to 1 or 2 in a few of a thousand of them, in a quarter of its time
    planes = from_numpy(pixels).permute(2, 0, 1)[None]
    planes = interpolate(planes, target, mode="bicubic", antialias=True)[0]
    return planes.permute(1, 2, 0).contiguous().numpy()


def _pixels(image: Image.Image | Tiff, file: io.BytesIO | None) -> tuple[np.ndarray, str]:
    """Decode a photograph: (h, w, 3) uint8 RGB, and a note of what had to be assumed."""
    if file and isinstance(image, JpegImageFile) and (found := jpeg.pixels(image, file.getvalue())) is not None:
        return found, ""
    note = ""
    if file and image.format == "PNG":  # of which decoding compares no checksums
        Image.open(io.BytesIO(file.getvalue()), formats=["PNG"]).verify()
    if isinstance(image, Tiff):
        image, note = image.read()
    elif file and image.format == "PNG" and file.getbuffer()[24] == 16:
        found, note = tiff.png_of_16(file.getvalue())
        if found.shape[2:] == (3,):
            return found, note
        image = Image.fromarray(found)
    elif image.mode == "F" or image.mode.startswith("I"):
        white = 65535 if image.format == "PPM" else None  # to which Pillow scales these itself
        numbers = np.asarray(image)
        found, note = tiff.eight_bits(numbers.astype(np.uint16) if white and image.mode == "I" else numbers, white)
        image = Image.fromarray(found)
    image.load()
    if file:
        file.close()  # large files must not lie beside their pixels, and some decoders keep them
    if image.has_transparency_data:
        alpha = image if "A" in image.getbands() else image.convert("RGBA")
        if not alpha.getchannel("A").getbbox():
            raise PhotographError("alpha is 0 everywhere, so there is nothing to see: save it without alpha")
    w, h = image.size
    pixels = np.empty((h, w, 3), np.uint8)
    rows = max(1, STRIP // w)
    for top in range(0, h, rows):
        pixels[top : top + rows] = np.asarray(_rgb(image.crop((0, top, w, min(top + rows, h)))))
    if file:
        image.close()
    return pixels, note


def _rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
