"""XFeat keypoints with their learned descriptors and a VLAD global vector, run by kornia."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from pydantic import PositiveInt

from imatch.core import compute, config, learned
from imatch.core.types import Tokens
from imatch.features.sift import vlad

if TYPE_CHECKING:
    from kornia.feature import XFeat as Network

VOCABULARY = Path(__file__).with_name("xfeat_vocabulary.npy")
FILE = "xfeat.pt"


@dataclass(frozen=True)
class XFeat:
    """A small network of free licence (Apache-2.0), for what differs in light, season or viewpoint; it does not rotate
    with its photographs.

    Source: Potje, Cadar, Araujo, Martins and Nascimento, "XFeat: accelerated features for lightweight image matching",
    CVPR 2024; the network is kornia's, the weights are the authors' (`imatch.core.learned`).

    Attributes:
        max_keypoints: how many of the strongest keypoints are kept; 136 bytes each on disk.
        device: "auto" (the GPU, if there is one), "cpu", "cuda" or "cuda:1". It is no part of what is asked.

    Raises:
        ImatchError: a number out of its range, a missing device, or the extra `learned` is not installed.

    >>> noise = np.random.default_rng(0).integers(0, 255, (1, 64, 96, 3), np.uint8)
    >>> (tokens,) = XFeat(max_keypoints=50, device="cpu")(noise)
    >>> tokens.vector.shape, tokens.descriptors.shape[1], tokens.xy.shape[1], tokens.grid
    ((4096,), 64, 2, None)
    """

    patch: ClassVar[int] = 32  # what the network itself would resize to
    resampling: ClassVar[str] = "opencv"
    side: ClassVar[int] = 1024
    held: ClassVar[int] = 0  # 6 MB
    bytes_per_pixel: ClassVar[float] = 60
    max_keypoints: PositiveInt = 2048
    device: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        learned.check()
        config.check(self)
        object.__setattr__(self, "device", compute.resolved(self.device))

    @property
    def digest(self) -> str:
        """The SHA-256 of the weights, and whose code runs them."""
        return f"{learned.FILES[FILE]}, kornia {metadata.version('kornia')}"

    @cached_property
    def words(self) -> np.ndarray:
        """(64, 64) float32, the visual words; made by `python -m tools.vocabulary xfeat`."""
        return np.load(VOCABULARY).astype(np.float32)

    def load(self) -> None:
        """The network and the visual words."""
        _ = network(self.device), self.words

    def __call__(self, photographs: np.ndarray) -> list[Tokens]:
        """Tokens of (B, h, w, 3) uint8 RGB photographs, without a grid, the strongest keypoint first."""
        found = [keypoints(photograph, self.max_keypoints, self.device) for photograph in photographs]
        return [Tokens(vlad(descriptors, self.words), descriptors, xy) for xy, descriptors in found]


def keypoints(photograph: np.ndarray, n: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """The n strongest keypoints of a photograph (h, w, 3) uint8 RGB, h and w multiples of 32.

    Returns:
        xy (m, 2) float32 and descriptors (m, 64) float32 of norm 1, m <= n, strongest first.
    """
    import torch

    x = torch.from_numpy(np.array(photograph)).to(device).permute(2, 0, 1)[None] / 255  # one, so that none differs
    (found,) = network(device).detectAndCompute(x, n)
    return found["keypoints"].float().cpu().numpy(), found["descriptors"].cpu().numpy()


@cache
def network(device: str) -> Network:
    """The network on a device, loaded once in a process.

    Raises:
        ImatchError: the weights are not there, or other ones.
    """
    import torch
    from kornia.feature import XFeat as Network
    from torch.fx.experimental.optimization import fuse

    made = Network().eval()
    made.net.load_state_dict(learned.read(FILE))
    made.net = fuse(made.net)  # batch normalisations into their convolutions; with channels_last a seventh of its time
    return made.requires_grad_(False).to(device, memory_format=torch.channels_last)
