"""One pair of photographs from tokens to geometry: the best pose, finer correspondences, what explains them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from imatch.core import config
from imatch.core.rows import PairRow, Parameters
from imatch.core.types import Geometry, ImatchError, Matches, Pair, PhotographError, Tokens
from imatch.data import exif, images
from imatch.data.pairs import Looked
from imatch.data.rotations import Pose, poses, shown
from imatch.matching import matchers, refine
from imatch.matching.geometry import degenerate, transform
from imatch.matching.matchers import Matcher, Sizes
from imatch.matching.two_view import FEWEST, PLANE, Estimator, Photographs
from imatch.matching.two_view import GeometryOptions as GeometryOptions  # beside those of matching

REFINEMENTS = ("off", "patch", "pixel")
COARSE = 20
"""Inliers that verify a pair of grids: smooth photographs of different things agree in up to 34 of 62 by chance."""
CONFIRMED, AROUND = 0.5, 4
"""Share of a coarse plane's inliers that pixels must find again; how many times the threshold they are looked for."""
ROUNDS = 2
"""How often the photographs are compared: the second time by the geometry that the first has found."""


@dataclass(frozen=True)
class Alignment:
    """How A lies on B.

    Attributes:
        pose: the pose of A that was best.
        matches: between A's tokens in that pose and B's, (m).
        xy_a: (m, 2) float32 pixels of the upright A.
        xy_b: (m, 2) float32 pixels of B, refined as far as was asked, and where they were found.
        geometry: A -> B.
        compared: whether positions and geometry are those of pixels that were compared.
    """

    pose: Pose
    matches: Matches
    xy_a: np.ndarray
    xy_b: np.ndarray
    geometry: Geometry
    compared: bool = False


@dataclass(frozen=True)
class Aligner:
    """Aligns A with B: matches every pose of A, keeps the one with the most inliers, refines it and estimates again.

    Attributes:
        matcher: makes the correspondences.
        search: the first geometry, which chooses the pose, and from which pixels are compared. Few and coarse points
            fix a similarity better than a homography.
        estimator: the geometry that is given back.
        refinement: "off", "patch" (`refine.by_patch`) or "pixel" (`refine.by_pixels` after it). What a coarse matcher
            verifies is compared in pixels by "patch", too; it stays where they do not confirm it: light may differ.

    Raises:
        ImatchError: refinement "pixel" without a geometry to start from.

    >>> from imatch.data.rotations import UPRIGHT
    >>> xy = np.random.default_rng(0).uniform(0, 99, (40, 2)).astype(np.float32)
    >>> tokens = Tokens(np.ones(1), np.eye(40, dtype=np.float32), xy)
    >>> align = Aligner(matchers.create_matcher("mutual"), Estimator("similarity"), Estimator("affine"))
    >>> found = align([(UPRIGHT, tokens)], tokens, (100, 100), (100, 100))
    >>> str(found.pose), int(found.geometry.inliers.sum()), found.geometry.verified
    ('rot000', 40, True)
    """

    matcher: Matcher
    search: Estimator
    estimator: Estimator
    refinement: str = "off"

    def __post_init__(self) -> None:
        if self.refinement == "pixel" and self.estimator.model == "off":
            raise ImatchError("refinement pixel starts from a geometry: use model auto or homography")

    def __call__(
        self,
        poses: Sequence[tuple[Pose, Tokens]],
        b: Tokens,
        size_a: tuple[int, int],
        size_b: tuple[int, int],
        photographs: Photographs | None = None,
        focal: tuple[float, float] | None = None,
    ) -> Alignment:
        """Align one pair.

        Args:
            poses: A's tokens in a pose or several, xy in pixels of the upright A. Of equal ones the first is kept.
            b: B's tokens.
            size_a, size_b: (h, w) of the upright photographs.
            photographs: refinement "pixel" needs them, and what stands still in a part of the picture.
            focal: their focal lengths in pixels, where known.
        """
        if len(poses) > 1 and (quick := self.matcher.quick):
            poses = [max(poses, key=lambda pose: len(quick(pose[1], b)))]
        first = self.search if len(poses) > 1 or self.refinement == "pixel" else self.estimator
        everywhere = np.concatenate([poses[0][1].xy / size_a[::-1], b.xy / size_b[::-1]])
        views = (size_a, size_b, focal, everywhere, photographs)
        tried = [self._tried(pose, a, b, first, views) for pose, a in poses]
        best = max(tried, key=lambda alignment: alignment.geometry.inliers.sum())  # the first of equal ones
        depth = self._depth(best, views) if self.refinement == "pixel" else None
        if depth:
            best = depth
        elif self.refinement == "pixel" and photographs is not None:
            why = f"no first geometry to compare the photographs from: {best.geometry.reason}"
            usable = _usable(best)
            best = self._compared(best, views, *photographs()) if usable else refused(best, why)
        elif first is not self.estimator:
            best = replace(best, geometry=self.estimator(best.xy_a, best.xy_b, *views))
        if self.matcher.coarse and self.refinement == "patch" and photographs and best.geometry.verified:
            with contextlib.suppress(PhotographError):  # one is gone or broken by now: it stays as it was
                best = self._finer(best, views, *photographs())
        found, repeated = best.geometry, best.matches.repeated
        if not found.verified and repeated > len(best.matches):
            more = f"{repeated} more were left out, for what they show repeats"
            return refused(best, f"{found.reason}; {more}")
        return best

    def _tried(self, pose: Pose, a: Tokens, b: Tokens, estimator: Estimator, views: Views) -> Alignment:
        xy, size_a = shown(a.xy, views[0], pose)
        matches = self.matcher(replace(a, xy=xy), b, (size_a, views[1]))
        xy_a = a.xy[matches.index_a]
        xy_b = b.xy[matches.index_b] if self.refinement == "off" else refine.by_patch(a, b, matches)
        return Alignment(pose, matches, xy_a, xy_b, estimator(xy_a, xy_b, *views))

    def _depth(self, coarse: Alignment, views: Views) -> Alignment | None:
        """The alignment of keypoints in a scene of depth, where pixels cannot be compared."""
        found = self.estimator(coarse.xy_a, coarse.xy_b, *views) if self.estimator.model == "auto" else None
        if not found or found.kind != "general":
            return None
        reason = f"{found.reason}; pixels were not compared, for the scene has depth"
        return replace(coarse, geometry=replace(found, reason=reason))

    def _finer(self, coarse: Alignment, views: Views, photograph_a: np.ndarray, photograph_b: np.ndarray) -> Alignment:
        """The alignment by pixels where they confirm most of it, else as it was.

        Coarse points of something flat may look like a scene of depth, so that is compared, too.
        """
        model = "homography" if self.estimator.model == "auto" else self.estimator.model
        if coarse.geometry.matrix is None or model == "fundamental":
            return coarse
        around = replace(self.search, threshold=AROUND * self.search.threshold)
        exact = replace(self, search=around, estimator=replace(self.estimator, model=model))
        found = exact._compared(coarse, views, photograph_a, photograph_b)
        share = PLANE if coarse.geometry.kind == "general" else CONFIRMED
        most = found.geometry.inliers.sum() >= share * coarse.geometry.inliers.sum()
        return found if found.geometry.verified and most else coarse

    def _compared(
        self, coarse: Alignment, views: Views, photograph_a: np.ndarray, photograph_b: np.ndarray
    ) -> Alignment:
        """The geometry of what is found in the photographs; other correspondences stay where they are."""
        best, matrix = None, coarse.geometry.matrix
        for _ in range(ROUNDS):
            xy_b = coarse.xy_b.copy()
            near = np.linalg.norm(transform(matrix, coarse.xy_a) - xy_b, axis=1) <= self.search.threshold
            xy_b[near], found = refine.by_pixels(photograph_a, photograph_b, coarse.xy_a[near], xy_b[near], matrix)
            rows, inliers = np.flatnonzero(near)[found], np.zeros(len(xy_b), bool)
            geometry = self.estimator(coarse.xy_a[rows], xy_b[rows], *views)
            inliers[rows] = geometry.inliers
            finer = replace(coarse, xy_b=xy_b, geometry=replace(geometry, inliers=inliers), compared=True)
            if not _usable(finer):
                break
            best, matrix = finer, geometry.matrix
        if best and best.geometry.verified:
            return best
        why = best.geometry.reason if best else geometry.reason
        n = coarse.geometry.inliers.sum()
        return refused(best or coarse, f"the photographs do not confirm {n} inliers: {why}")


Views = tuple[tuple[int, int], tuple[int, int], tuple[float, float] | None, np.ndarray, Photographs | None]
"""(h, w) of A and of B, their focal lengths, where both have descriptors, and their pixels."""


def _usable(found: Alignment) -> bool:
    """Whether photographs can be compared from a geometry."""
    geometry = found.geometry
    if geometry.matrix is None or geometry.inliers.sum() < FEWEST:
        return False
    return not degenerate(geometry.matrix, found.xy_a[geometry.inliers])


def refused(found: Alignment, reason: str) -> Alignment:
    """Say why an alignment is not verified."""
    return replace(found, geometry=replace(found.geometry, verified=False, reason=reason))


@dataclass(frozen=True)
class MatchingOptions:
    """How two photographs' descriptors find each other.

    Attributes:
        weight: backbone whose descriptors are matched, of both sides, embedded first if no 01_embed of the run has done
            so; "" is that which retrieved, "auto" that and, for what it does not verify, xfeat, if it is installed.
        matcher: "auto" is the backbone's: "ratio" for sift, "lighterglue" for xfeat, "mutual" for grids; also
            "dual_softmax". Where there are two backbones it is the first one's, as are `rotations` and `zooms`.
        options: fields of that matcher (`matchers.MATCHERS`), such as {"max_matches": 2000}; its device is the CPU.
        rotations: 1, 4 or 8: each query is also matched rotated, and the rotation with the most inliers is kept; 0 is 4
            where the backbone does not rotate with its photographs, else 1.
        zooms: factors by which each query is also enlarged, such as [1.0, 2.0].
        refine: "patch" puts correspondences between the centres of patches, "pixel" then follows them in the
            photographs, "off" leaves them at the centres.

    Raises:
        ImatchError: a value of the wrong type, or an unknown `matcher` or `refine`.
    """

    weight: str = ""
    matcher: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    rotations: int = 0
    zooms: Sequence[float] = (1.0,)
    refine: str = "patch"

    def __post_init__(self) -> None:
        config.check(self, "matching")
        if self.matcher not in ("auto", *matchers.MATCHERS):
            raise ImatchError(config.unknown("matcher", self.matcher, ["auto", *matchers.MATCHERS]))
        if self.refine not in REFINEMENTS:
            raise ImatchError(config.unknown("refine", self.refine, REFINEMENTS))
        poses(self.rotations or 1, self.zooms)


def aligner(parameters: Parameters, b: Tokens | None, size_b: tuple[int, int] = (0, 0)) -> Aligner:
    """What a 04_match aligns a pair with: what was left at 0 or "auto" is chosen for the matcher and the tokens.

    Between the centres of patches lies half a patch of noise, in which a homography by OpenCV's graph cut does better
    than PoseLib's and a fundamental matrix explains anything: on grids "auto" is a homography.

    Args:
        b, size_b: tokens and (h, w) of the right photograph; None stands for keypoints.
    """
    chosen, refinement = dict(parameters["geometry"]), parameters["refine"]
    patch = 0.0 if b is None or b.grid is None else max(b.spacing)
    coarse = max(3.0, patch / 2)
    fine = not patch or refinement == "pixel"
    matcher = matchers.create_matcher(parameters["matcher"], parameters["matcher_options"])
    threshold = max(3.0, matcher.coarse * max(size_b)) if fine else coarse
    chosen["threshold"] = chosen["threshold"] or threshold
    chosen["min_inliers"] = chosen.get("min_inliers") or (0 if fine else COARSE)
    chosen["min_share"] = chosen["min_share"] or matcher.share or (0.1 if fine else 0.3)
    estimator = Estimator(**chosen, caution=matcher.caution)
    widest = max(chosen["threshold"], coarse)
    search = dataclasses.replace(estimator, model="similarity", method="auto", threshold=widest)
    if patch and estimator.model == "auto":
        estimator = dataclasses.replace(estimator, model="homography")
    if not fine and (estimator.model, estimator.method) == ("homography", "auto"):
        estimator = dataclasses.replace(estimator, method="accurate")
    return Aligner(matcher, search, estimator, refinement)


@dataclass(frozen=True)
class Tried:
    """A pair as one look has aligned it.

    Attributes:
        looked, align, found: the look, what aligned the pair by it, and how A lies on B.
        seen, b: A's tokens in each pose, and B's.
        sizes, paths: (h, w) of A and of B, upright, and their files.
    """

    looked: Looked
    align: Aligner
    found: Alignment
    seen: Sequence[tuple[Pose, Tokens]]
    b: Tokens
    sizes: Sizes
    paths: tuple[Path, Path]

    @classmethod
    def by(
        cls, looked: Looked, seen: Sequence[tuple[Pose, Tokens]], b: Tokens, sizes: Sizes, paths: tuple[Path, Path]
    ) -> Tried:
        """Align a pair by one look; where pixels cannot be read by now, it is not verified."""
        align, focal = aligner(looked.settings, b, sizes[1]), exif.focal_lengths(*paths)

        def photographs() -> tuple[np.ndarray, np.ndarray]:
            return _pixels(paths[0]), _pixels(paths[1])

        try:
            found = align(seen, b, *sizes, photographs, focal)
        except PhotographError as error:
            found = replace(align, refinement="patch")(seen, b, *sizes, focal=focal)
            found = refused(found, f"the photographs cannot be compared: {error}")
        return cls(looked, align, found, seen, b, sizes, paths)

    @property
    def a(self) -> Tokens:
        """A's tokens in the pose that was best."""
        return dict(self.seen)[self.found.pose]

    def pair(self, row: PairRow, time_ms: float = 0.0) -> Pair:
        """Put what was found to its row, for the sinks."""
        found, look, grids = self.found, self.looked.look, (self.a.grid, self.b.grid)
        settings = {
            "matcher": look.matcher,
            "matcher_options": matchers.options_of(self.align.matcher),
            "refine": self.align.refinement,
            "poses": look.record["poses"],
            "geometry": dataclasses.asdict(self.align.estimator),
        }
        places = found.xy_a, found.xy_b, found.matches, found.geometry
        return Pair(row, self.paths, self.sizes, *places, grids, look.weight, settings, time_ms)


def first_verified(tries: Iterable[Tried]) -> Tried:
    """Give back the first try that verifies the pair; if none does, the first, with the reasons of all."""
    tried: list[Tried] = []
    for one in tries:
        if one.found.geometry.verified:
            return one
        tried.append(one)
    first = tried[0]
    if len(tried) == 1:
        return first
    reason = "; ".join(f"{one.looked.look.weight}: {one.found.geometry.reason}" for one in tried)
    return replace(first, found=refused(first.found, reason))


@lru_cache(maxsize=2)
def _pixels(path: Path) -> np.ndarray:
    """A photograph in full; a query, which is asked for again and again, stays."""
    return images.decode(path).pixels
