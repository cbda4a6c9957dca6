"""Two photographs matched in memory. Nothing is written unless asked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from imatch.api.embed import EMBEDDINGS, make_tokens, seen_by, source_of
from imatch.core import files, learned, settings
from imatch.core.rows import Json, MatchRow, PairRow, Parameters
from imatch.core.types import Geometry, ImatchError, Matches, Pair, PhotographError, Tokens
from imatch.data import exif, images
from imatch.data.embeddings import Embeddings
from imatch.data.images import Resize
from imatch.data.rotations import UPRIGHT, Pose, turned
from imatch.features.base import CLASSICAL, Backbone, create_backbone, embed_decoded, matcher_for
from imatch.features.sift import Sift
from imatch.features.xfeat import XFeat
from imatch.matching.align import aligner
from imatch.matching.geometry import rotation_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from imatch.api.embed import Photograph, Sources

SETTINGS: Parameters = {"refine": "patch", "geometry": {"threshold": 0, "min_share": 0}}
"""What 04_match does by default, too."""
FIRST, CLOSER, TURNS = Sift.max_keypoints, 8000, (90, 180, 270)
"""Keypoints of a first and of a second look; degrees by which A is rotated in the second."""
AUTO = ("sift", "xfeat")
"""The backbones of weight "auto": what the first does not verify is asked of the second."""


@dataclass(frozen=True)
class Correspondences:
    """Points of A and of B that show the same.

    Attributes:
        xy_a, xy_b: (m, 2) float32 pixels, the strongest first.
        score: (m,) float32, the cosine of the two descriptors; by xfeat the probability of the pair.
        inlier: (m,) bool, whether the geometry explains it.
    """

    xy_a: np.ndarray
    xy_b: np.ndarray
    score: np.ndarray
    inlier: np.ndarray

    def __len__(self) -> int:
        return len(self.score)


@dataclass(frozen=True)
class Match:
    """What two photographs, A and B, have in common. As text it is one sentence; it is true when verified.

    Attributes:
        verified: whether they show the same thing.
        reason: why, with the numbers.
        inliers: how many correspondences the geometry explains.
        correspondences: all of them.
        kind: "planar", "rotation" or "general"; where not verified "watermark", "degenerate" or "".
        matrix: (3, 3) float64, pixels of A -> pixels of B, or None.
        fundamental, pose: where they are known (`core.types.Geometry`).
        rotation: degrees counter-clockwise by which B shows A rotated; None where not verified.
        scale: how many times as large B shows it; None where not verified.
        sizes: (h, w) in pixels of A and of B.
        descriptors: how many local descriptors each has.
        names: of the two photographs.
        weight: backbone that gave this answer.
        refined: whether pixels were compared to make positions and geometry exact.
    """

    verified: bool
    reason: str
    inliers: int
    correspondences: Correspondences
    kind: str
    matrix: np.ndarray | None
    fundamental: np.ndarray | None
    pose: tuple[np.ndarray, np.ndarray] | None
    rotation: float | None
    scale: float | None
    sizes: tuple[tuple[int, int], tuple[int, int]]
    descriptors: tuple[int, int]
    names: tuple[str, str]
    weight: str
    refined: bool
    _photographs: tuple[Path | np.ndarray, Path | np.ndarray] = field(repr=False)
    _geometry: Geometry = field(repr=False)

    def __bool__(self) -> bool:
        return self.verified

    def __str__(self) -> str:
        if self.rotation is None or self.scale is None:
            return f"no match: {self.reason}; {self._advice()}"
        a, b = (files.printable(name) for name in self.names)
        angle = round(self.rotation, 1) + 0.0  # no minus zero
        about = "about " if self.kind == "general" else ""
        shown = f"rotated {about}{angle:.1f} degrees, {about}{self.scale:.2f} times as large"
        found = f"{self.inliers} inliers by {self.weight}, {shown}"
        same = isinstance(self._photographs[0], Path) and self._photographs[0] == self._photographs[1]
        return f"{b} shows {a}: {found}{' (the same file)' if same else ''}"

    def _advice(self) -> str:
        """What to try where nothing was verified."""
        for name, n in zip(self.names, self.descriptors, strict=True):
            if not n:
                return f"{files.printable(name)} has no texture to describe: try another photograph"
        if self.kind == "watermark":
            return "cut the caption off, and match what is left"
        return "try photographs that overlap more, or another weight"

    @property
    def row(self) -> MatchRow:
        """Its names and numbers, as a row of a table."""
        return {
            "query": self.names[0],
            "candidate": self.names[1],
            "verified": self.verified,
            "inliers": self.inliers,
            "matches": len(self.correspondences),
            "rotation": self.rotation,
            "scale": self.scale,
            "kind": self.kind,
            "weight": self.weight,
            "refined": self.refined,
            "reason": self.reason,
        }

    def record(self) -> dict[str, Json]:
        """Give all of it as plain JSON: positions in pixels to a hundredth, scores to four digits."""
        found = self.correspondences
        numbers = cast("dict[str, Json]", self._geometry.record() | self.row)
        return {
            **numbers,
            "sizes": [list(size) for size in self.sizes],
            "correspondences": {
                "xy_a": np.round(found.xy_a.astype(np.float64), 2).tolist(),
                "xy_b": np.round(found.xy_b.astype(np.float64), 2).tolist(),
                "score": np.round(found.score.astype(np.float64), 4).tolist(),
                "inlier": found.inlier.tolist(),
            },
        }

    def picture(self, side: int = 800) -> np.ndarray:
        """Both photographs, lines between the inliers, and A's outline in B.

        Args:
            side: pixels of a photograph's longer side at most.

        Returns:
            (h, w, 3) uint8 RGB.
        """
        from imatch.viz import pictures

        found = self.correspondences
        index = np.arange(len(found))
        matches = Matches(index, index, found.score)
        row = cast("PairRow", self.row)  # of whose other keys a picture reads only those that are there
        pair = Pair(row, self._photographs, self.sizes, found.xy_a, found.xy_b, matches, self._geometry)
        return pictures.lines(pair, side)

    def show(self) -> Figure:
        """The picture as a matplotlib figure, which a notebook shows."""
        from matplotlib.figure import Figure

        picture = self.picture()
        figure = Figure(figsize=(picture.shape[1] / 100, picture.shape[0] / 100), layout="constrained")
        axis = figure.add_subplot()
        axis.imshow(picture)
        axis.axis("off")
        return figure

    def save(self, path: str | Path) -> Path:
        """Write it, and give the path back: `.png` is the picture, `.json` is `record`.

        Raises:
            ImatchError: another ending, or a place that cannot be written to.
        """
        from imatch.viz.pictures import encode

        path = settings.from_workspace(path)
        check_ending(path, (".png", ".json"))
        if path.suffix.lower() == ".png":
            write(path, encode(self.picture()))
        else:
            text = json.dumps(self.record(), ensure_ascii=False) + "\n"
            write(path, text.encode(errors="surrogateescape"))
        return path


def match(
    a: Photograph, b: Photograph, weight: str = "auto", *, device: str = "auto", data_key: str = settings.DATA_KEY
) -> Match:
    """Match two photographs. Those that do not match get a second look: with more keypoints, or with A rotated.

    Args:
        a, b: paths, arrays (h, w, 3) uint8 RGB, or Pillow images.
        weight: backbone: sift, dsift, xfeat, or weights of the registry. "auto" is sift, exact and at any rotation;
            what that does not verify is asked of xfeat, if the extra `learned` is installed.
        device: where a network runs; "auto" is the GPU, if there is one. sift has none.
        data_key: the registry that names the weights.

    Raises:
        ImatchError: an unknown weight, or an array of another shape or type; PhotographError: a file that is not there
            or is no photograph. The message names it.

    >>> photograph = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    >>> found = match(photograph, np.rot90(photograph))
    >>> found.verified, round(found.rotation), round(found.scale, 2), found.sizes
    (True, 90, 1.0, ((160, 240), (240, 160)))
    """
    sources = {"a": source_of(a, "a"), "b": source_of(b, "b")}
    weights, lacking = weights_of(weight)
    tried: list[Match] = []
    for one in weights:
        options = {"max_keypoints": CLOSER} if one == "sift" else {}
        backbone = create_backbone(one, options, data_key=data_key, device=device_of(one, weight, device))
        both, unread = describe(sources, backbone, one)
        for id, why in unread.items():
            name = str(sources[id]) if isinstance(sources[id], Path) else id
            raise PhotographError(f"{files.printable(name)}: {why}")
        tried.append(look_twice(*map(_named, both)))
        if tried[-1].verified:
            return tried[-1]
    return _none_of(tried, lacking)


def _named(of: Described) -> Described:
    """A photograph by the name of its file, if it has one."""
    return dataclasses.replace(of, name=of.source.name) if isinstance(of.source, Path) else of


def weights_of(weight: str) -> tuple[tuple[str, ...], str]:
    """The backbones that a weight stands for, and what "auto" lacks ("" if nothing).

    >>> weights_of("sift")
    (('sift',), '')
    """
    if weight != "auto":
        return (weight,), ""
    lacking = learned.lacking()
    return (AUTO[:1], f"{AUTO[0]} only; {lacking}") if lacking else (AUTO, "")


def device_of(one: str, weight: str, device: str) -> str:
    """Where a backbone runs: of "auto" the one that has a network is meant."""
    return "auto" if weight == "auto" and one in CLASSICAL else device


def _none_of(tried: Sequence[Match], lacking: str) -> Match:
    """The first of several that verified nothing, with the reasons of all."""
    reasons = [f"{one.weight}: {one.reason}" for one in tried] if len(tried) > 1 else [tried[0].reason]
    reasons += [lacking] if lacking else []
    return dataclasses.replace(tried[0], reason="; ".join(reasons))


def look_twice(a: Described, b: Described) -> Match:
    """Match two photographs, and look again where they do not match."""
    if isinstance(a.backbone, Sift):
        first = matched(a.first(FIRST), b.first(FIRST))
        if first.verified or max(len(a.tokens.xy), len(b.tokens.xy)) <= FIRST:
            return first
        again = matched(a, b)
    elif isinstance(a.backbone, XFeat):  # its matcher takes longer than all rotations
        return matched(a, b, rotate=True)
    else:
        first = matched(a, b)
        if first.verified:
            return first
        again = matched(a, b, rotate=True)
    return again if again.verified else first


@dataclass(frozen=True)
class Described:
    """A photograph and its tokens by a backbone.

    Attributes:
        name: what it is called.
        source: where its pixels are.
        size: (h, w) in pixels.
        tokens: of the upright photograph.
        weight: what the backbone is called.
        backbone: that made the tokens.
        resize: how large it saw the photograph.
    """

    name: str
    source: Path | np.ndarray
    size: tuple[int, int]
    tokens: Tokens
    weight: str
    backbone: Backbone = field(repr=False)
    resize: Resize

    @cached_property
    def rotated(self) -> list[tuple[Pose, Tokens]]:
        """Its tokens rotated, made when they are first asked for."""
        patch = self.backbone.patch
        upright = images.decode(self.source, self.resize, patch, self.backbone.resampling)
        return [(Pose(turn), embed_decoded(turned(upright, turn, patch), self.backbone)) for turn in TURNS]

    def first(self, n: int) -> Described:
        """Take the n strongest keypoints; a grid stays whole."""
        whole = self.tokens
        if whole.grid is not None:
            return self
        return dataclasses.replace(self, tokens=Tokens(whole.vector, whole.descriptors[:n], whole.xy[:n]))


def describe(
    sources: Sources, backbone: Backbone, weight: str, *, copies: int = 1, instead: str = EMBEDDINGS
) -> tuple[list[Described], dict[str, str]]:
    """Pass photographs through a backbone.

    Args:
        sources, backbone, copies, instead: as of `embed.make_tokens`.
        weight: what the backbone is called.

    Returns:
        Those that can be read, something found in them or not; and id -> why for others.

    Raises:
        ImatchError: more than fit into memory.
    """
    parameters = seen_by(weight, backbone, Resize())
    made = make_tokens(sources, backbone, parameters, copies=copies, instead=instead)
    tokens, resize = {**made.tokens, **made.empty}, Resize(**parameters["resize"])
    found = [
        Described(id, sources[id], row["size"], tokens[id], weight, backbone, resize)
        for id, row in made.rows.items()
        if id in tokens
    ]
    return found, {id: row["skipped"] for id, row in made.rows.items() if id not in tokens}


def described(embeddings: Embeddings, row: int, backbone: Backbone) -> Described:
    """A photograph of a set that was embedded by this backbone."""
    id, (h, w) = embeddings.ids[row], embeddings.rows[row]["size"]
    weight, resize = str(embeddings.parameters["weight"]), Resize(**embeddings.parameters["resize"])
    source, tokens = embeddings.photograph(row), embeddings.tokens(row)
    return Described(id, source, (h, w), tokens, weight, backbone, resize)


def matched(a: Described, b: Described, rotate: bool = False) -> Match:
    """Match two photographs, A also rotated if asked."""
    options = {"device": a.backbone.device} if a.weight == "xfeat" else {}
    parameters: Parameters = {**SETTINGS, "matcher": matcher_for(a.weight), "matcher_options": options}
    align = aligner(parameters, b.tokens, b.size)
    poses = [(UPRIGHT, a.tokens), *(a.rotated if rotate else ())]
    focal = exif.focal_lengths(a.source, b.source)
    found = align(poses, b.tokens, a.size, b.size, lambda: (_pixels(a), _pixels(b)), focal)
    explained = found.geometry
    angle, scaled = (None, None)
    if explained.verified and explained.matrix is not None:
        angle, scaled = rotation_scale(explained.matrix, a.size)
    return Match(
        explained.verified,
        explained.reason,
        int(explained.inliers.sum()),
        Correspondences(found.xy_a, found.xy_b, found.matches.similarity, explained.inliers),
        explained.kind,
        explained.matrix,
        explained.fundamental,
        explained.pose,
        angle,
        scaled,
        (a.size, b.size),
        (len(a.tokens.xy), len(b.tokens.xy)),
        (a.name, b.name),
        a.weight,
        found.compared,
        (a.source, b.source),
        explained,
    )


def _pixels(of: Described) -> np.ndarray:
    return images.decode(of.source).pixels if isinstance(of.source, Path) else of.source


def check_ending(path: Path, endings: Sequence[str]) -> None:
    """Refuse a path that ends otherwise.

    >>> check_ending(Path("a.gif"), [".png", ".json"])
    Traceback (most recent call last):
    imatch.core.types.ImatchError: a.gif ends in '.gif': give a path that ends in .png or .json
    """
    if path.suffix.lower() not in endings:
        known = " or ".join(endings)
        raise ImatchError(f"{path.name} ends in {path.suffix!r}: give a path that ends in {known}")


def write(path: Path, data: bytes) -> None:
    """Write a file. Raises ImatchError where that cannot be."""
    try:
        files.write_bytes(path, data)
    except OSError as error:
        raise ImatchError(f"{path} cannot be written: {error.strerror}: give another path") from error


def write_table(path: str | Path, rows: Sequence[MatchRow], unasked: Sequence[Mapping[str, Json]] = ()) -> Path:
    """Write rows as a CSV, last those of what was not matched, which have some of the columns; give the path back.

    Raises:
        ImatchError: another ending than .csv, or a place that cannot be written to.
    """
    path = settings.from_workspace(path)
    check_ending(path, (".csv",))
    write(path, files.csv_bytes(rows[0], [*rows, *unasked]))
    return path
