"""Photographs -> Tokens, in one forward pass. A backbone is one class in one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from imatch import plugins
from imatch.records import Tokens

BACKBONES = {
    "sift": "imatch.backbones.sift:Sift",
    "dsift": "imatch.backbones.dsift:DenseSift",
}


class Backbone(Protocol):
    """What imatch asks of a backbone; its options are the fields of its frozen dataclass."""

    @property
    def patch(self) -> int:
        """Both sides of a photograph must be multiples of this many pixels."""

    @property
    def digest(self) -> str:
        """What the numbers depend on beside the options (weights, whose code), for the fingerprint."""

    def __call__(self, photographs: np.ndarray) -> list[Tokens]:
        """The tokens of a batch of one shape.

        Args:
            photographs: (B, h, w, 3) uint8 RGB, h and w multiples of `patch`.

        Returns:
            B Tokens; xy in pixels of what was given. A photograph's tokens do not depend on its batch.
        """


def create(weight: str, options: Mapping[str, Any] | None = None) -> Backbone:
    """Make the backbone that a weight names.

    Raises:
        ImatchError: unknown weight or option, with the nearest known one.

    >>> create("sift", {"max_keypoints": 500}).max_keypoints
    500
    """
    backbone: Backbone = plugins.create(BACKBONES, "weight", weight, options)
    return backbone
