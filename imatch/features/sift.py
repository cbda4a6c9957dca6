"""SIFT keypoints with RootSIFT descriptors and a VLAD global vector: no weights to bring, any rotation."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from imatch.core import config, settings
from imatch.core.types import Tokens, grid_xy, normalise

GLOBAL = 2000
"""Keypoints of the global vector: of the demo's references at crop 0.5, 1,000 find 0.85 first, 2,000 and 4,000 0.94."""
VOCABULARY = Path(__file__).with_name("sift_vocabulary.npy")


class _Classical:
    """What both have in common: they run on the CPU and have no network."""

    device: ClassVar[str] = "cpu"
    resampling: ClassVar[str] = "opencv"
    side: ClassVar[int] = 3072  # a square of which takes 2.3 GB
    held: ClassVar[int] = 0
    bytes_per_pixel: ClassVar[float]

    def __post_init__(self) -> None:
        config.check(self)

    def __call__(self, photographs: np.ndarray) -> list[Tokens]:
        """Tokens of (B, h, w, 3) uint8 RGB photographs, as many at once as there are cores."""
        with ThreadPoolExecutor(settings.cores()) as pool:
            return list(pool.map(self._tokens, photographs))

    def _tokens(self, photograph: np.ndarray) -> Tokens:
        raise NotImplementedError


@dataclass(frozen=True)
class Sift(_Classical):
    """The embedded default. Source of the keypoints: Lowe, "Distinctive image features from scale-invariant
    keypoints", IJCV 2004 (OpenCV's implementation); of the rest: `imatch.features.base`.

    Attributes:
        max_keypoints: how many of the strongest keypoints are kept; about 140 bytes each on disk.
        contrast: OpenCV's contrastThreshold; smaller finds keypoints in flatter places.

    Raises:
        ImatchError: a number out of its range.

    >>> noise = np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), np.uint8)
    >>> (tokens,) = Sift(max_keypoints=50)(noise)
    >>> tokens.vector.shape, tokens.descriptors.shape[1], tokens.xy.shape[1], tokens.grid
    ((8192,), 128, 2, None)
    """

    patch: ClassVar[int] = 1  # any size will do
    bytes_per_pixel: ClassVar[float] = 240  # OpenCV's scale space
    max_keypoints: PositiveInt = 4000
    contrast: NonNegativeFloat = 0.02

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the vocabulary's file, and whose SIFT it is."""
        return f"{hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()}, OpenCV {cv2.__version__}"

    @cached_property
    def words(self) -> np.ndarray:
        """(64, 128) float32, the visual words; made by `python -m tools.vocabulary sift`."""
        return np.load(VOCABULARY).astype(np.float32)

    def load(self) -> None:
        """The visual words."""
        _ = self.words

    def _tokens(self, photograph: np.ndarray) -> Tokens:
        """Without a grid, the strongest keypoint first."""
        grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
        xy, descriptors = keypoints(grey, self.max_keypoints, self.contrast)
        return Tokens(vlad(descriptors[:GLOBAL], self.words), descriptors, xy)


def keypoints(grey: np.ndarray, n: int, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """The n strongest keypoints of a photograph (h, w) uint8.

    Returns:
        xy (m, 2) float32 and RootSIFT descriptors (m, 128) float32, m <= n, strongest first.
    """
    # without the precise upscaling every keypoint would sit a quarter of a pixel off, and turn with the photograph
    detector = cv2.SIFT_create(nfeatures=n, contrastThreshold=contrast, enable_precise_upscale=True)
    found, descriptors = detector.detectAndCompute(grey, None)
    if not found:
        return np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32)
    told = [(-k.response, *k.pt, k.angle, k.size) for k in found]
    order = sorted(range(len(found)), key=told.__getitem__)[:n]
    return np.array([told[i][1:3] for i in order], np.float32), root_sift(descriptors[order])


@dataclass(frozen=True)
class DenseSift(_Classical):
    """One upright descriptor at the centre of every patch, global vector by GeM. It does not turn with the
    photograph: that is what it is compared for.

    Attributes:
        patch: side of a patch in pixels.
        width: side of the square that a descriptor looks at, in pixels.
        p: exponent of the generalised mean.

    Raises:
        ImatchError: a number out of its range.

    >>> noise = np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), np.uint8)
    >>> (tokens,) = DenseSift()(noise)
    >>> tokens.vector.shape, tokens.as_grid().shape
    ((128,), (4, 6, 128))
    """

    bytes_per_pixel: ClassVar[float] = 32
    patch: PositiveInt = 16
    width: PositiveFloat = 48.0
    p: PositiveFloat = 3.0

    @property
    def digest(self) -> str:
        """There are no weights; whose SIFT it is."""
        return f"OpenCV {cv2.__version__}"

    def load(self) -> None:
        """Nothing: there are no weights."""

    def _tokens(self, photograph: np.ndarray) -> Tokens:
        """On a grid of (h / patch, w / patch)."""
        size = photograph.shape[:2]
        grid = (size[0] // self.patch, size[1] // self.patch)
        xy = grid_xy(grid, size)
        grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
        shift = 0.0
        if self.patch % 2 == 0:
            # OpenCV rounds a keypoint to a whole pixel and the centre of an even patch lies between pixels:
            # after this mean of 2 x 2, pixel (x, y) shows what was at (x - 0.5, y - 0.5)
            grey = cv2.blur(grey, (2, 2), anchor=(1, 1), borderType=cv2.BORDER_REFLECT_101)
            shift = 0.5
        # a SIFT descriptor is 4 x 4 cells, each three times the keypoint's radius wide: 6 sizes in all
        points = [cv2.KeyPoint(float(x) + shift, float(y) + shift, self.width / 6, 0.0) for x, y in xy]
        _, raw = cv2.SIFT_create().compute(grey, points)
        descriptors = root_sift(raw)
        return Tokens(gem(descriptors, self.p), descriptors, xy, grid)


def root_sift(descriptors: np.ndarray) -> np.ndarray:
    """SIFT histograms to RootSIFT: the square root of the L1-normalised histogram.

    Its dot product is the Hellinger kernel, and its L2 norm is 1 by construction.
    Source: Arandjelovic and Zisserman, "Three things everyone should know to improve object retrieval", CVPR 2012.

    Args:
        descriptors: (n, 128) float, not negative.

    Returns:
        (n, 128) float32; the histogram of a flat patch stays zero.

    >>> root_sift(np.array([[1.0, 3.0]])).round(3).tolist()
    [[0.5, 0.8659999966621399]]
    """
    total = descriptors.sum(axis=1, keepdims=True)
    return np.sqrt(descriptors / np.where(total > 0, total, 1)).astype(np.float32)


def gem(descriptors: np.ndarray, p: float = 3.0) -> np.ndarray:
    """Generalised mean of descriptors that are not negative: (mean(x ** p)) ** (1 / p), L2-normalised.

    Source: Radenovic, Tolias and Chum, "Fine-tuning CNN image retrieval with no human annotation", TPAMI 2018.

    Args:
        descriptors: (n, d) float, not negative.
        p: 1 is the mean, infinity the maximum.

    Returns:
        (d,) float32 of norm 1; zeros when there are no descriptors.

    >>> gem(np.eye(2)).round(3).tolist()
    [0.7070000171661377, 0.7070000171661377]
    """
    if not len(descriptors):
        return np.zeros(descriptors.shape[1], np.float32)
    pooled = np.mean(descriptors.astype(np.float64) ** p, axis=0) ** (1 / p)
    return normalise(pooled).astype(np.float32)


def vlad(descriptors: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Vector of locally aggregated descriptors, intra-normalised.

    Each descriptor adds its difference from its nearest word to that word's block; every block is
    L2-normalised, then the whole. Sources: Jegou et al., "Aggregating local descriptors into a compact image
    representation", CVPR 2010; Arandjelovic and Zisserman, "All about VLAD", CVPR 2013.

    Args:
        descriptors: (n, d) float.
        words: (k, d) float, the vocabulary.

    Returns:
        (k * d,) float32 of norm 1; zeros when there are no descriptors.

    >>> vlad(np.array([[1.0, 1.0]]), words=np.array([[1.0, 0.0], [9.0, 9.0]])).tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    # the nearest word by |x - w|^2 = |x|^2 - 2 x.w + |w|^2, where |x|^2 is the same for all words
    nearest = np.argmin((words**2).sum(axis=1) - 2 * descriptors @ words.T, axis=1)
    member = np.equal.outer(np.arange(len(words)), nearest)
    blocks = member @ (descriptors - words[nearest]).astype(np.float64)
    return normalise(normalise(blocks).ravel()).astype(np.float32)
