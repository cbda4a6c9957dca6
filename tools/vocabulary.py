"""How sift_vocabulary.npy and xfeat_vocabulary.npy were made: visual words learned from procedural images, so that no
photograph's licence or content is in the package.

    python -m tools.vocabulary sift imatch/features/sift_vocabulary.npy

The images are dead leaves (Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001): shapes with
radii of density r^-3 that cover each other, which gives edges, corners and scales the statistics of photographs.
Every leaf carries a texture over a shaded ground: none, stripes, a checkerboard or smoothed noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np

from imatch.core import files
from imatch.features import sift, xfeat

WORDS, IMAGES, SIDE, LEAVES, KEYPOINTS, SEED = 64, 100, 512, 4000, 1000, 0
DESCRIBED = {
    "sift": lambda photograph: sift.keypoints(photograph, KEYPOINTS, 0.02)[1],
    "xfeat": lambda photograph: xfeat.keypoints(photograph, KEYPOINTS, "cpu")[1],
}
"""Backbone -> the descriptors of a photograph."""


def dead_leaves(rng: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """One procedural image.

    Returns:
        (side, side, 3) uint8, grey.

    >>> dead_leaves(np.random.default_rng(0), side=64).shape
    (64, 64, 3)
    """
    image = np.full((side, side), 128.0, np.float32)
    smallest, largest = 4.0, side / 3
    for _ in range(LEAVES):  # from the back to the front: each leaf covers what was there
        u = rng.random()
        radius = (smallest**-2 + u * (largest**-2 - smallest**-2)) ** -0.5
        _drop_leaf(rng, image, radius)
    noise = rng.normal(0, 2, image.shape)
    soft = cv2.GaussianBlur(image, (0, 0), 0.7) + noise
    return cv2.cvtColor(np.clip(soft, 0, 255).astype(np.uint8), cv2.COLOR_GRAY2RGB)


def _drop_leaf(rng: np.random.Generator, image: np.ndarray, radius: float) -> None:
    r = int(np.ceil(radius)) + 1
    leaf = _shape(rng, r, radius)
    texture = _texture(rng, 2 * r + 1, radius)
    left, top = rng.integers(-2 * r, image.shape[0], 2)
    there = (slice(max(top, 0), top + 2 * r + 1), slice(max(left, 0), left + 2 * r + 1))
    h, w = image[there].shape
    here = (slice(max(-top, 0), max(-top, 0) + h), slice(max(-left, 0), max(-left, 0) + w))
    image[there][leaf[here]] = texture[here][leaf[here]]


def _shape(rng: np.random.Generator, r: int, radius: float) -> np.ndarray:
    mask = np.zeros((2 * r + 1, 2 * r + 1), np.uint8)
    turn, aspect = rng.uniform(0, 360), rng.uniform(0.4, 1)
    if rng.random() < 0.5:
        cv2.ellipse(mask, (r, r), (round(radius), max(1, round(radius * aspect))), turn, 0, 360, 1, -1)
    else:
        around = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
        points = r + radius * np.stack([np.cos(around), np.sin(around)], axis=1)
        cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1)
    return mask.astype(bool)


def _texture(rng: np.random.Generator, side: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - side / 2
    turn, period = rng.uniform(0, 2 * np.pi), rng.uniform(3, max(4, radius))
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    kind = rng.integers(4)
    if kind == 0:
        pattern = np.zeros_like(x)
    elif kind == 1:
        pattern = np.sin(2 * np.pi * u / period)
    elif kind == 2:
        pattern = np.sign(np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period))
    else:
        pattern = cv2.GaussianBlur(rng.normal(0, 1, x.shape), (0, 0), rng.uniform(0.7, 4))
        pattern /= pattern.std()
    shade = rng.uniform(20, 235) + rng.normal(0, 0.3) * u
    return np.asarray(shade + rng.uniform(0, 50) * pattern, np.float32)


def learn(weight: str = "sift", images: int = IMAGES, words: int = WORDS, seed: int = SEED) -> np.ndarray:
    """K-means words over a backbone's descriptors of dead leaves.

    Returns:
        (words, d) float16, sorted so that the order does not depend on the start.
    """
    rng = np.random.default_rng(seed)
    descriptors = np.concatenate([DESCRIBED[weight](dead_leaves(rng)) for _ in range(images)])
    cv2.setRNGSeed(seed)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_MAX_ITER, 60, 1e-5)
    _, _, centres = cv2.kmeans(descriptors, words, None, stop, 3, cv2.KMEANS_PP_CENTERS)
    return centres[np.lexsort(centres.T[::-1])].astype(np.float16)


def main() -> None:
    """Write the vocabulary to the path given on the command line."""
    parser = argparse.ArgumentParser(description="Learn the visual words of a backbone from procedural images.")
    parser.add_argument("weight", choices=DESCRIBED)
    parser.add_argument("path", type=Path, help="the .npy file to write")
    given = parser.parse_args()
    path = given.path
    files.write_array(path, learn(given.weight))
    print(f"{path}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
