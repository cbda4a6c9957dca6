"""From local descriptors to one global vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from imatch import plugins
from imatch.records import ImatchError

if TYPE_CHECKING:  # torch takes seconds to import, and SIFT does without
    from torch import Tensor

POOLINGS = ("cls", "mean", "cls+mean", "gem", "legacy_mean")


def normalise(vectors: np.ndarray) -> np.ndarray:
    """Scale the last axis to L2 norm 1; zero vectors stay zero.

    >>> normalise(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1)


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


def pool(method: str, cls: Tensor, patches: Tensor, before: Tensor, p: float = 3.0) -> Tensor:
    """One global vector a photograph from the tokens of a vision transformer or ConvNeXt.

    - "cls": the normalised class token, as DINOv3's authors retrieve with (Simeoni et al., "DINOv3", 2025);
    - "mean": the mean of the normalised patch tokens;
    - "cls+mean": the two side by side, each of L2 norm 1, so that neither outweighs the other;
    - "gem": the generalised mean of the normalised patch tokens with their signs kept, sign(x) |x| ** p
      (Radenovic, Tolias and Chum, TPAMI 2018; signed as in Keetha et al., "AnyLoc", RA-L 2023);
    - "legacy_mean": the mean of all tokens before the last normalisation, class token and registers included. It is
      what older exports hold; it is here to be compared with them, not to be chosen.

    Args:
        method: one of `POOLINGS`.
        cls: (B, D) float, the normalised class token.
        patches: (B, n, D) float, the normalised patch tokens.
        before: (B, m, D) float, all tokens before the last normalisation.
        p: exponent of "gem".

    Returns:
        (B, D) or, for "cls+mean", (B, 2 D), each of L2 norm 1.

    Raises:
        ImatchError: an unknown method, with the nearest known one.

    >>> import torch
    >>> cls, patches = torch.tensor([[3.0, 4.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> pool("cls+mean", cls, patches, patches).numpy().round(3).tolist()
    [[0.42399999499320984, 0.5659999847412109, 0.5, 0.5]]
    """
    match method:
        case "cls":
            pooled = cls
        case "mean":
            pooled = patches.mean(dim=1)
        case "cls+mean":
            import torch

            pooled = torch.cat([_unit(cls), _unit(patches.mean(dim=1))], dim=1)
        case "gem":
            powered = (patches.sign() * patches.abs() ** p).mean(dim=1)
            pooled = powered.sign() * powered.abs() ** (1 / p)
        case "legacy_mean":
            pooled = before.mean(dim=1)
        case _:
            raise ImatchError(plugins.unknown("pooling", method, POOLINGS))
    return _unit(pooled)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


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
    blocks = np.zeros(words.shape)
    # the nearest word by |x - w|^2 = |x|^2 - 2 x.w + |w|^2, where |x|^2 is the same for all words
    nearest = np.argmin((words**2).sum(axis=1) - 2 * descriptors @ words.T, axis=1)
    np.add.at(blocks, nearest, descriptors - words[nearest])
    return normalise(normalise(blocks).ravel()).astype(np.float32)
