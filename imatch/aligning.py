"""One pair of photographs from tokens to geometry: the best pose, finer correspondences, what explains them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from imatch import refine
from imatch.geometry import FEWEST, Estimator, degenerate, transform
from imatch.matching import Matcher
from imatch.plugins import unknown
from imatch.records import Geometry, ImatchError, Matches, Tokens

P = TypeVar("P")
REFINEMENTS = ("off", "patch", "pixel")
ROUNDS = 2
"""How often the photographs are compared: the second time by the geometry that the first has found."""


@dataclass(frozen=True)
class Alignment(Generic[P]):
    """How A lies on B.

    Attributes:
        pose: the pose of A that was best.
        matches: between A's tokens in that pose and B's, (m).
        xy_a: (m, 2) float32 pixels of the upright A.
        xy_b: (m, 2) float32 pixels of B, refined as far as was asked, and where they were found.
        geometry: A -> B.
    """

    pose: P
    matches: Matches
    xy_a: np.ndarray
    xy_b: np.ndarray
    geometry: Geometry


@dataclass(frozen=True)
class Aligner:
    """Aligns A with B: matches every pose of A, keeps the one with the most inliers, refines it and estimates again.

    Attributes:
        matcher: makes the correspondences.
        search: the first geometry, from coarse positions. It chooses the pose, and pixels are compared from it. Few and
            coarse points fix a similarity better than a homography.
        estimator: the geometry that is given back.
        refinement: "off" (centres of patches), "patch" (`refine.by_patch`) or "pixel" (`refine.by_pixels` after it).

    Raises:
        ImatchError: unknown refinement, or a search that is off.

    >>> from imatch import matching
    >>> xy = np.random.default_rng(0).uniform(0, 99, (40, 2)).astype(np.float32)
    >>> tokens = Tokens(np.ones(1), np.eye(40, dtype=np.float32), xy)
    >>> align = Aligner(matching.create("mutual"), Estimator("similarity"), Estimator("affine"))
    >>> found = align([("upright", tokens)], tokens, (100, 100), (100, 100))
    >>> found.pose, int(found.geometry.inliers.sum()), found.geometry.verified
    ('upright', 40, True)
    """

    matcher: Matcher
    search: Estimator
    estimator: Estimator
    refinement: str = "off"

    def __post_init__(self) -> None:
        if self.refinement not in REFINEMENTS:
            raise ImatchError(unknown("refinement", self.refinement, REFINEMENTS))
        if self.search.model == "off":
            raise ImatchError("the first geometry cannot be off, it chooses the pose: use similarity")
        if self.refinement == "pixel" and self.estimator.model == "off":
            raise ImatchError("refinement pixel starts from a geometry: use model similarity, affine or homography")

    def __call__(
        self,
        poses: Sequence[tuple[P, Tokens]],
        b: Tokens,
        size_a: tuple[int, int],
        size_b: tuple[int, int],
        photographs: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> Alignment[P]:
        """Align one pair.

        Args:
            poses: A's tokens in one pose or several, xy in pixels of the upright A. Of equal ones the first is kept.
            b: B's tokens.
            size_a, size_b: (h, w) of the upright photographs.
            photographs: gives the pixels of A and of B, both upright and (h, w, 3) uint8 RGB, in their full size.
                Called at most once, and only where pixels are compared.

        Raises:
            ImatchError: no pose at all, or no photographs for refinement "pixel".
        """
        if not poses:
            raise ImatchError("there is no pose of A to align: give at least the upright one")
        if self.refinement == "pixel" and photographs is None:
            raise ImatchError("refinement pixel compares photographs: give them, or use refinement patch")
        first = self.search if len(poses) > 1 or self.refinement == "pixel" else self.estimator
        tried = [self._tried(pose, a, b, size_a, size_b, first) for pose, a in poses]
        best = max(tried, key=lambda alignment: alignment.geometry.inliers.sum())  # the first of equal ones
        if self.refinement == "pixel" and photographs is not None:
            if _usable(best.geometry, size_a):
                return self._compared(best, size_a, size_b, *photographs())
            reason = f"no first geometry to compare the photographs from: {best.geometry.reason}"
            return replace(best, geometry=replace(best.geometry, verified=False, reason=reason))
        if first is self.estimator:
            return best
        return replace(best, geometry=self.estimator(best.xy_a, best.xy_b, size_a, size_b))

    def _tried(
        self, pose: P, a: Tokens, b: Tokens, size_a: tuple[int, int], size_b: tuple[int, int], estimator: Estimator
    ) -> Alignment[P]:
        matches = self.matcher(a, b)
        xy_a = a.xy[matches.index_a]
        xy_b = b.xy[matches.index_b] if self.refinement == "off" else refine.by_patch(a, b, matches)
        return Alignment(pose, matches, xy_a, xy_b, estimator(xy_a, xy_b, size_a, size_b))

    def _compared(
        self,
        coarse: Alignment[P],
        size_a: tuple[int, int],
        size_b: tuple[int, int],
        photograph_a: np.ndarray,
        photograph_b: np.ndarray,
    ) -> Alignment[P]:
        """The geometry of what is found in the photographs; correspondences that are not stay where they are."""
        best, matrix = None, coarse.geometry.matrix
        for _ in range(ROUNDS):
            xy_b = coarse.xy_b.copy()
            near = np.linalg.norm(transform(matrix, coarse.xy_a) - xy_b, axis=1) <= self.search.threshold
            xy_b[near], found = refine.by_pixels(photograph_a, photograph_b, coarse.xy_a[near], xy_b[near], matrix)
            rows, inliers = np.flatnonzero(near)[found], np.zeros(len(xy_b), bool)
            geometry = self.estimator(coarse.xy_a[rows], xy_b[rows], size_a, size_b)
            if not _usable(geometry, size_a):
                break
            inliers[rows] = geometry.inliers
            best, matrix = replace(coarse, xy_b=xy_b, geometry=replace(geometry, inliers=inliers)), geometry.matrix
        if best is None:
            reason = f"the photographs do not confirm it: {geometry.reason}"
            return replace(coarse, geometry=replace(coarse.geometry, verified=False, reason=reason))
        return best


def _usable(geometry: Geometry, size: tuple[int, int]) -> bool:
    return geometry.matrix is not None and geometry.inliers.sum() >= FEWEST and not degenerate(geometry.matrix, size)
