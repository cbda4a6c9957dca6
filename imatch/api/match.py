"""Photographs matched 1:1 in memory: two of them, or all of a folder. Nothing is written unless asked."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from tqdm import tqdm

from imatch.core import compute, files, learned, settings
from imatch.core.rows import Json, MatchRow, PairRow, Parameters
from imatch.core.types import Geometry, ImatchError, Matches, Pair, PhotographError, Tokens
from imatch.data import exif, images
from imatch.data.images import Resize
from imatch.data.rotations import UPRIGHT, Pose, turned
from imatch.features.base import CLASSICAL, Backbone, create_backbone, embed_decoded, matcher_for
from imatch.features.sift import PIXELS, Sift
from imatch.features.xfeat import XFeat
from imatch.matching.align import aligner
from imatch.matching.geometry import rotation_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    Photograph = str | Path | np.ndarray | Image.Image

T = TypeVar("T")
R = TypeVar("R")
SETTINGS: Parameters = {"refine": "patch", "geometry": {"threshold": 0, "min_share": 0}}
"""What 04_match does by default, too."""
FIRST, CLOSER, TURNS = Sift.max_keypoints, 8000, (90, 180, 270)
"""Keypoints of a first and of a second look at two photographs; degrees by which one is rotated in the second, by a
backbone that does not rotate with its photographs."""
AUTO = ("sift", "xfeat")
"""The backbones of weight "auto": what the first does not verify is asked of the second."""
RETRIEVED, NEAREST = 200, 20
"""In a folder of more photographs than the first, each is matched with so many nearest ones by global vector."""


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
        kind: "planar", "rotation" (of the camera alone) or "general" (a scene with depth); where not verified
            "watermark", "degenerate" or "" (`core.types.Geometry`).
        matrix: (3, 3) float64, pixels of A -> pixels of B; None where there is none. Of kind "general" it says roughly
            where A lies.
        fundamental: (3, 3) float64, x_b^T F x_a = 0, of kind "general".
        pose: R (3, 3) and t (3,), x_b ~ R x_a + t, where both files say their focal length (`core/types.py`).
        rotation: degrees counter-clockwise by which B shows A rotated; None where not verified.
        scale: how many times as large B shows it; None where not verified.
        sizes: (h, w) in pixels of A and of B.
        descriptors: how many local descriptors each has.
        names: of the two photographs.
        weight: backbone that gave this answer.
        refined: whether pixels of the photographs were compared to make positions and geometry exact.
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
    _error: float = field(repr=False)

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
        numbers = cast("dict[str, Json]", self.row | self._geometry.record())
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
        return pictures.lines(pair, pictures.Style(side=side))

    @property
    def _geometry(self) -> Geometry:
        inlier = self.correspondences.inlier
        found = (self.verified, self.reason, self.kind, self.fundamental, self.pose)
        return Geometry(self.matrix, inlier, self._error, *found)

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
        """Write it: `.png` is the picture, `.json` is `record`.

        Returns:
            The path.

        Raises:
            ImatchError: another ending, or a place that cannot be written to.
        """
        from imatch.viz.pictures import encode

        path = settings.from_workspace(path)
        check_ending(path, (".png", ".json"))
        record = (json.dumps(self.record(), ensure_ascii=False) + "\n").encode(errors="surrogateescape")
        _write(path, encode(self.picture()) if path.suffix.lower() == ".png" else record)
        return path


def match(
    a: Photograph, b: Photograph, weight: str = "auto", *, device: str = "auto", data_key: str = settings.DATA_KEY
) -> Match:
    """Match two photographs. Those that do not match get a second look: with more keypoints or, by a backbone that does
    not rotate with its photographs, with A rotated.

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
    sources = [_source(a, "a"), _source(b, "b")]
    names = [source.name if isinstance(source, Path) else name for source, name in zip(sources, "ab", strict=True)]
    weights, lacking = weights_of(weight)
    tried: list[Match] = []
    for one in weights:
        options = {"max_keypoints": CLOSER} if one == "sift" else {}
        backbone = create_backbone(one, options, data_key=data_key, device=_device(one, weight, device))
        tried.append(_look_twice(backbone, *_both(backbone, one, list(zip(sources, names, strict=True)))))
        if tried[-1].verified:
            return tried[-1]
    return _none_of(tried, lacking)


def weights_of(weight: str) -> tuple[tuple[str, ...], str]:
    """The backbones that a weight stands for, and what "auto" lacks ("" if nothing).

    >>> weights_of("sift")
    (('sift',), '')
    """
    if weight != "auto":
        return (weight,), ""
    lacking = learned.lacking()
    return (AUTO[:1], f"{AUTO[0]} only; {lacking}") if lacking else (AUTO, "")


def _device(one: str, weight: str, device: str) -> str:
    """Where a backbone runs: of "auto" the one that has a network is meant."""
    return "auto" if weight == "auto" and one in CLASSICAL else device


def _none_of(tried: Sequence[Match], lacking: str) -> Match:
    """The first of several that verified nothing, with the reasons of all."""
    reasons = [f"{one.weight}: {one.reason}" for one in tried] if len(tried) > 1 else [tried[0].reason]
    return dataclasses.replace(tried[0], reason="; ".join([*reasons, *([lacking] if lacking else [])]))


def _both(backbone: Backbone, weight: str, photographs: Sequence[tuple[Path | np.ndarray, str]]) -> list[_Seen]:
    """Two photographs through a backbone; PhotographError names the one that cannot be read."""
    backbone.load()
    at_once = _at_once(weight, [source for source, _ in photographs])
    with compute.without_opencv_threads() if at_once > 1 else contextlib.nullcontext():
        seen = list(compute.ahead(partial(_tried, backbone, weight=weight), photographs, at_once, 2))
    good: list[_Seen] = []
    for (source, name), found in zip(photographs, seen, strict=True):
        if isinstance(found, PhotographError):
            raise PhotographError(f"{files.printable(str(source if isinstance(source, Path) else name))}: {found}")
        good.append(found)
    return good


def _look_twice(backbone: Backbone, a: _Seen, b: _Seen) -> Match:
    """Match two photographs that went through a backbone, and look again where they do not match."""
    if isinstance(backbone, Sift):
        first = _matched(a.first(FIRST), b.first(FIRST))
        if first.verified or max(len(a.tokens.xy), len(b.tokens.xy)) <= FIRST:
            return first
        again = _matched(a, b)
    elif isinstance(backbone, XFeat):  # its matcher takes longer than all rotations
        return _matched(a if a.rotated else _rotated(a, backbone), b)
    else:
        first = _matched(a, b)
        if first.verified:
            return first
        again = _matched(_rotated(a, backbone), b)
    return again if again.verified else first


def _rotated(a: _Seen, backbone: Backbone) -> _Seen:
    """A photograph also by its rotations."""
    rotated = ((Pose(turn), _seen(a.source, backbone, a.name, a.weight, turn).tokens) for turn in TURNS)
    return dataclasses.replace(a, rotated=tuple(rotated))


@dataclass(frozen=True)
class _Seen:
    """A photograph and its tokens by a backbone, also of other poses; `source` is where its pixels are."""

    name: str
    source: Path | np.ndarray
    size: tuple[int, int]
    tokens: Tokens
    weight: str
    device: str
    rotated: tuple[tuple[Pose, Tokens], ...] = ()

    def first(self, n: int) -> _Seen:
        """With the n strongest keypoints alone; a grid stays whole."""
        whole = self.tokens
        if whole.grid is not None:
            return self
        return dataclasses.replace(self, tokens=Tokens(whole.vector, whole.descriptors[:n], whole.xy[:n]))


def _source(photograph: Photograph, name: str) -> Path | np.ndarray:
    """Where a photograph lies, or its upright pixels; `name` is what one without a file is called."""
    if isinstance(photograph, str | Path):
        return settings.from_workspace(photograph)
    if isinstance(photograph, np.ndarray):
        if photograph.dtype != np.uint8 or photograph.ndim != 3 or photograph.shape[2] != 3 or not photograph.size:
            raise ImatchError(
                f"{name} is an array {photograph.shape} of {photograph.dtype}: give (h, w, 3) uint8 RGB, 0 to 255"
            )
        return photograph
    if not hasattr(photograph, "convert"):
        raise ImatchError(f"{name} is a {type(photograph).__name__}: give a path, an array or a Pillow image")
    try:
        return images.from_memory(photograph).pixels
    except PhotographError as error:
        raise PhotographError(f"{name}: {error}") from error


def _seen(source: Path | np.ndarray, backbone: Backbone, name: str, weight: str, turn: float = 0) -> _Seen:
    """A photograph through a backbone, rotated by `turn` degrees."""
    how = (Resize(limit=backbone.side), backbone.patch, backbone.resampling)
    decoded = images.decode(source, *how) if isinstance(source, Path) else images.from_memory(source, *how)
    decoded = turned(decoded, turn, backbone.patch) if turn else decoded
    return _Seen(name, source, decoded.size, embed_decoded(decoded, backbone), weight, backbone.device)


def _at_once(weight: str, sources: Sequence[Path | np.ndarray]) -> int:
    """How many photographs may go through a backbone side by side: a network takes one, `sift` what memory allows."""
    pixels = 1
    for source in sources:
        with contextlib.suppress(PhotographError):
            h, w = source.shape[:2] if isinstance(source, np.ndarray) else images.check_header(source)
            pixels = max(pixels, h * w)
    return max(1, min(settings.cores(), PIXELS // pixels)) if weight in CLASSICAL else 1


def _matched(a: _Seen, b: _Seen) -> Match:
    matcher, options = matcher_for(a.weight), {"device": a.device} if a.weight == "xfeat" else {}
    align = aligner({**SETTINGS, "matcher": matcher, "matcher_options": options}, b.tokens, b.size)
    poses, focal = [(UPRIGHT, a.tokens), *a.rotated], exif.focal_lengths(a.source, b.source)
    found = align(poses, b.tokens, a.size, b.size, lambda: (_pixels(a.source), _pixels(b.source)), focal)
    explained = found.geometry
    angle, scaled = (
        rotation_scale(explained.matrix, a.size)
        if explained.verified and explained.matrix is not None
        else (None, None)
    )
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
        explained.error,
    )


def _pixels(source: Path | np.ndarray) -> np.ndarray:
    return images.decode(source).pixels if isinstance(source, Path) else source


@dataclass(frozen=True)
class FolderMatches:
    """The pairs of a folder. As text it is a table of what belongs together.

    Attributes:
        names: of the photographs that were matched, sorted.
        pairs: a row a pair: query, candidate, verified, inliers, matches, rotation, scale, kind, weight, refined,
            reason.
        groups: names of photographs that belong together, the largest group first; those that match none are in none.
        skipped: name -> why it could not be read.
        retrieved: whether each photograph was matched with its nearest ones alone, and not with all.
        lacking: what weight "auto" had to do without.
    """

    names: list[str]
    pairs: list[MatchRow]
    groups: list[list[str]]
    skipped: dict[str, str]
    retrieved: bool
    lacking: str = ""

    def __str__(self) -> str:
        verified = sorted((row for row in self.pairs if row["verified"]), key=lambda row: -row["inliers"])
        wide = max([len(files.printable(row[side])) for row in verified for side in ("query", "candidate")] + [9])
        lines = (
            [f"{'photograph':<{wide}}  {'shown by':<{wide}}  inliers  by     rotated  times as large"]
            if verified
            else []
        )
        for row in verified:
            shown = (files.printable(row[side]) for side in ("query", "candidate"))
            angle = round(row["rotation"] or 0.0, 1) + 0.0
            text = "  ".join(f"{name:<{wide}}" for name in shown)
            about = "~" if row["kind"] == "general" else ""
            turned = about + format(angle, ".1f")
            lines.append(f"{text}  {row['inliers']:7d}  {row['weight']:<6} {turned:>7}  {row['scale']:14.2f}")
        which = f"nearest {NEAREST} of each" if self.retrieved else "all"
        lines += ["", f"{len(verified)} of {len(self.pairs)} pairs ({which}) of {len(self.names)} photographs match"]
        for number, group in enumerate(self.groups, 1):
            lines.append(f"group {number}: {', '.join(map(files.printable, group))}")
        alone = len(self.names) - sum(map(len, self.groups))
        lines += [f"{alone} photographs match no other"] if alone else []
        lines += [self.lacking] if self.lacking else []
        lines += [f"left out: {files.printable(name)}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines).lstrip("\n")

    @property
    def verified(self) -> bool:
        """Whether any pair shows the same."""
        return any(row["verified"] for row in self.pairs)

    def record(self) -> dict[str, Json]:
        """All of it as plain JSON."""
        return {
            "photographs": self.names,
            "pairs": cast("list[Json]", self.pairs),
            "groups": self.groups,
            "skipped": self.skipped,
            "lacking": self.lacking,
        }

    def save(self, path: str | Path) -> Path:
        """Write the pairs as a CSV, which 04_match takes as its list, too.

        Raises:
            ImatchError: another ending than .csv, or a place that cannot be written to.
        """
        path = settings.from_workspace(path)
        check_ending(path, (".csv",))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(self.pairs[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(self.pairs)
        _write(path, text.getvalue().encode(errors="surrogateescape"))
        return path


def match_folder(
    folder: str | Path, weight: str = "auto", *, device: str = "auto", data_key: str = settings.DATA_KEY
) -> FolderMatches:
    """Match the photographs of a folder with each other.

    All pairs are matched or, of more than 200 photographs, each with its 20 nearest by global vector, without a second
    look. By weight "auto" what sift does not verify is asked of xfeat, for the 20 nearest of each. A photograph that
    cannot be read is left out and named.

    Args:
        folder: of the photographs; those in folders below it count, too.
        weight, device, data_key: as of `match`.

    Raises:
        ImatchError: no such folder, fewer than two photographs that can be read, or more than fit into memory.
    """
    folder = settings.from_workspace(folder)
    weights, lacking = weights_of(weight)
    first, *others = (create_backbone(w, data_key=data_key, device=_device(w, weight, device)) for w in weights)
    skipped: dict[str, str] = {}
    seen = _all_seen(first, weights[0], folder, images.list_photographs(folder), skipped)
    names = [one.name for one in seen]
    if len(names) < 2:
        left_out = "".join(f"; {files.printable(name)}: {why}" for name, why in skipped.items())
        raise ImatchError(f"two photographs are needed, and {folder} holds {len(names)} that can be read{left_out}")
    pairs = _nearest(seen) if len(names) > RETRIEVED else list(itertools.combinations(seen, 2))
    rows = {(row["query"], row["candidate"]): row for row in _rows(pairs, weights[0], settings.cores())}
    for backbone, other in zip(others, weights[1:], strict=True):
        seen = _all_seen(backbone, other, folder, names, {})
        pairs = [(a, b) for a, b in _nearest(seen) if not ((row := rows.get((a.name, b.name))) and row["verified"])]
        for row in _rows(pairs, other, 1):  # its network has threads of its own
            before = rows.get(pair := (row["query"], row["candidate"]))
            both = f"{weights[0]}: {before['reason']}; {other}: {row['reason']}" if before else row["reason"]
            rows[pair] = row if row["verified"] or not before else {**before, "reason": both}
    found = [rows[pair] for pair in sorted(rows)]
    together = [(row["query"], row["candidate"]) for row in found if row["verified"]]
    return FolderMatches(names, found, groups(together), skipped, len(names) > RETRIEVED, lacking)


def _rows(pairs: Sequence[tuple[_Seen, _Seen]], weight: str, workers: int) -> Iterator[MatchRow]:
    return _each(lambda pair: _matched(*pair).row, pairs, f"match by {weight}", workers)


def _all_seen(
    backbone: Backbone, weight: str, folder: Path, names: Sequence[str], skipped: dict[str, str]
) -> list[_Seen]:
    """The photographs of a folder through a backbone; those that cannot be read are added to `skipped`."""
    todo = [(folder / name, name) for name in names]
    backbone.load()
    seen: list[_Seen] = []
    at_once = _at_once(weight, [path for path, _ in todo])
    look = partial(_tried, backbone, weight=weight, rotate=isinstance(backbone, XFeat))
    for name, found in zip(names, _each(look, todo, f"embed by {weight}", at_once), strict=True):
        if isinstance(found, PhotographError):
            skipped[name] = str(found)
            continue
        seen.append(found)
        _check_memory(found, len(names), folder)
    return seen


def _tried(
    backbone: Backbone, photograph: tuple[Path | np.ndarray, str], weight: str, rotate: bool = False
) -> _Seen | PhotographError:
    """A photograph, or why it cannot be read."""
    source, name = photograph
    try:
        seen = _seen(source, backbone, name, weight)
        return _rotated(seen, backbone) if rotate else seen
    except PhotographError as error:
        return error


def _each(function: Callable[[T], R], items: Sequence[T], what: str, workers: int) -> Iterator[R]:
    """The answers in order, by threads, with a progress bar on a terminal: what is printed may be read by a program."""
    return iter(tqdm(compute.ahead(function, items, workers, 2 * workers), what, len(items), disable=None, delay=1))


def _check_memory(seen: _Seen, n: int, folder: Path) -> None:
    import psutil

    poses = (seen.tokens, *(tokens for _, tokens in seen.rotated))
    wanted = n * sum(tokens.descriptors.nbytes + tokens.vector.nbytes for tokens in poses)
    if wanted > psutil.virtual_memory().total // 2:
        raise ImatchError(
            f"{n} photographs take about {wanted / 2**30:.0f} GB of memory here: use imatch run params/pairs.yaml "
            f"-p dataset {folder}, which keeps them on disk"
        )


def _nearest(seen: Sequence[_Seen]) -> list[tuple[_Seen, _Seen]]:
    """Each photograph with its `NEAREST` by cosine, each pair once, in order."""
    vectors = np.array([one.tokens.vector for one in seen])
    pairs: set[tuple[int, int]] = set()
    for q, vector in enumerate(vectors):
        cosine = vectors @ vector
        cosine[q] = -np.inf
        order = (int(i) for i in np.argsort(-cosine, kind="stable")[:NEAREST] if i != q)
        pairs |= {(min(q, i), max(q, i)) for i in order}
    return [(seen[i], seen[j]) for i, j in sorted(pairs)]


def groups(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """What is connected by pairs, directly or through others: the largest group first, each sorted.

    >>> groups([("a", "b"), ("x", "y"), ("c", "b")])
    [['a', 'b', 'c'], ['x', 'y']]
    """
    of: dict[str, set[str]] = {}
    for a, b in pairs:
        joined = of.get(a, {a}) | of.get(b, {b})
        for name in joined:
            of[name] = joined
    return sorted((sorted(group) for group in {id(group): group for group in of.values()}.values()), key=_by_size)


def _by_size(group: Sequence[str]) -> tuple[int, Sequence[str]]:
    return -len(group), group


def check_ending(path: Path, endings: Sequence[str]) -> None:
    """Refuse a path that ends otherwise.

    >>> check_ending(Path("a.gif"), [".png", ".json"])
    Traceback (most recent call last):
    imatch.core.types.ImatchError: a.gif ends in '.gif': give a path that ends in .png or .json
    """
    if path.suffix.lower() not in endings:
        raise ImatchError(f"{path.name} ends in {path.suffix!r}: give a path that ends in {' or '.join(endings)}")


def _write(path: Path, data: bytes) -> None:
    try:
        files.write_bytes(path, data)
    except OSError as error:
        raise ImatchError(f"{path} cannot be written: {error.strerror}: give another path") from error
