"""Photographs -> Tokens, in one forward pass. A backbone is one class in one file and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from imatch import plugins, registry
from imatch.records import ImatchError, Tokens

BACKBONES = {
    "sift": "imatch.backbones.sift:Sift",
    "dsift": "imatch.backbones.dsift:DenseSift",
    "dinov3": "imatch.backbones.dinov3:Dinov3",
}
CLASSICAL = ("sift", "dsift")
"""Those that need no weights and are named by themselves; the others are named by their weights."""
INVARIANT = ("sift",)
"""Those that turn and zoom with their photographs, so that turned ones say nothing new."""


class Backbone(Protocol):
    """What imatch asks of a backbone. Its options are the fields of its frozen dataclass; those with compare=False say
    how it is worked through and change no number."""

    @property
    def device(self) -> str:
        """Where it runs: "cpu", "cuda" or "cuda:1"."""

    @property
    def patch(self) -> int:
        """Both sides of a photograph must be multiples of this many pixels."""

    @property
    def resampling(self) -> str:
        """Who resizes its photographs, one of `images.RESAMPLING`."""

    @property
    def digest(self) -> str:
        """What the numbers depend on beside the options (weights, whose code), for the fingerprint."""

    def load(self) -> None:
        """Bring into memory what else the first photograph would wait for.

        Raises:
            ImatchError: what it needs is missing or broken.
        """

    def __call__(self, photographs: np.ndarray) -> list[Tokens]:
        """The tokens of a batch of one shape.

        Args:
            photographs: (B, h, w, 3) uint8 RGB, h and w multiples of `patch`.

        Returns:
            B Tokens; xy in pixels of what was given. A photograph's tokens do not depend on its batch.
        """


def create(
    weight: str,
    options: Mapping[str, Any] | None = None,
    *,
    weight_set: str = "",
    data_key: str = "params/data_key.json",
    device: str = "auto",
) -> Backbone:
    """Make the backbone that a weight names.

    Args:
        weight: "sift", "dsift", or a key of the registry's weights, such as "vits16".
        options: the backbone's fields; those of `identity` make the same backbone without the registry.
        weight_set: where in the registry a key is looked up that stands in several sets.
        data_key: the registry's file.
        device: where a network runs; "auto" is the GPU, if there is one. Classical backbones run on the CPU.

    Raises:
        ImatchError: unknown weight or option, with the nearest known one.

    >>> create("sift", {"max_keypoints": 500}).max_keypoints
    500
    """
    given = dict(options or {})
    if {"filename", "precision"} <= set(given):  # what a step recorded; before there was a choice, it was torch
        given = {"engine_forward": "torch", **given}
    backbone: Backbone
    if weight in CLASSICAL:
        if device not in ("auto", "cpu"):
            raise ImatchError(f"{weight} runs on the CPU, not on {device}: use auto or cpu")
        backbone = plugins.create(BACKBONES, "weight", weight, given)
        return backbone
    if "filename" not in given:
        known = registry.load(data_key)
        if weight not in {entry.key for entry in known.weights}:
            raise ImatchError(plugins.unknown("weight", weight, [*CLASSICAL, *(entry.key for entry in known.weights)]))
        entry = known.weight(weight, weight_set)
        given = {"hub_entry": entry.hub_entry, "filename": entry.filename, "family": entry.family, **given}
    backbone = plugins.create(BACKBONES, "weight", "dinov3", {**given, "device": device})
    return backbone


def identity(backbone: Backbone) -> dict[str, Any]:
    """The options of a backbone that its numbers depend on.

    >>> identity(create("dsift"))
    {'patch': 16, 'width': 48.0, 'p': 3.0}
    """
    fields = dataclasses.fields(backbone)  # type: ignore[arg-type]
    return {field.name: getattr(backbone, field.name) for field in fields if field.compare}
