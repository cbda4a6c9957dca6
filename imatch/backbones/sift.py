"""SIFT keypoints with RootSIFT descriptors and a VLAD global vector: no weights to bring, any rotation."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from imatch import plugins, pooling, registry
from imatch.records import Tokens

PIXELS = 16_000_000
"""How many pixels are worked on at once: OpenCV's scale space takes some 225 bytes a pixel."""
VOCABULARY = Path(__file__).with_name("sift_vocabulary.npy")


@dataclass(frozen=True)
class Sift:
    """The embedded default. Source of the keypoints: Lowe, "Distinctive image features from scale-invariant
    keypoints", IJCV 2004 (OpenCV's implementation); of the rest: `imatch.pooling`.

    Attributes:
        max_keypoints: how many of the strongest keypoints are kept.
        contrast: OpenCV's contrastThreshold; smaller finds keypoints in flatter places.

    Raises:
        ImatchError: a number out of its range.

    >>> noise = np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), np.uint8)
    >>> (tokens,) = Sift(max_keypoints=50)(noise)
    >>> tokens.vector.shape, tokens.descriptors.shape[1], tokens.xy.shape[1], tokens.grid
    ((8192,), 128, 2, None)
    """

    max_keypoints: PositiveInt = 1000
    contrast: NonNegativeFloat = 0.02

    @property
    def patch(self) -> int:
        """Any size will do."""
        return 1

    @property
    def device(self) -> str:
        """It runs on the CPU."""
        return "cpu"

    @property
    def resampling(self) -> str:
        """OpenCV, as SIFT does without torch."""
        return "opencv"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the vocabulary's file, and whose SIFT it is."""
        return f"{hashlib.sha256(VOCABULARY.read_bytes()).hexdigest()}, OpenCV {cv2.__version__}"

    @cached_property
    def words(self) -> np.ndarray:
        """(64, 128) float32, the visual words; made by `python -m imatch.backbones.sift_vocabulary`."""
        return np.load(VOCABULARY).astype(np.float32)

    def __post_init__(self) -> None:
        plugins.check(self)

    def load(self) -> None:
        """The visual words."""
        _ = self.words

    def __call__(self, photographs: np.ndarray) -> list[Tokens]:
        """Tokens of (B, h, w, 3) uint8 RGB photographs, without a grid, the strongest keypoint first."""
        h, w = photographs.shape[1:3]
        with ThreadPoolExecutor(max(1, min(registry.cores(), PIXELS // (h * w)))) as pool:
            return list(pool.map(self._tokens, photographs))

    def _tokens(self, photograph: np.ndarray) -> Tokens:
        xy, descriptors = keypoints(photograph, self.max_keypoints, self.contrast)
        return Tokens(pooling.vlad(descriptors, self.words), descriptors, xy)


def keypoints(photograph: np.ndarray, n: int, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """The n strongest keypoints of a photograph.

    Returns:
        xy (m, 2) float32 and RootSIFT descriptors (m, 128) float32, m <= n, strongest first.
    """
    # without the precise upscaling every keypoint would sit a quarter of a pixel off, and turn with the photograph
    detector = cv2.SIFT_create(contrastThreshold=contrast, enable_precise_upscale=True)
    grey = cv2.cvtColor(photograph, cv2.COLOR_RGB2GRAY)
    found = sorted(detector.detect(grey, None), key=lambda k: (-k.response, k.pt, k.angle, k.size))[:n]
    if not found:
        return np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32)
    found, descriptors = detector.compute(grey, found)
    return np.array([k.pt for k in found], np.float32), pooling.root_sift(descriptors)
