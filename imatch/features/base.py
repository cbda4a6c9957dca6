"""Photographs -> Tokens, in one forward pass. A backbone is one class and one line in a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np

from imatch.core import compute, config, settings
from imatch.core.rows import Json, Options, Parameters
from imatch.core.types import ImatchError, PassingError, PhotographError, StepError, Tokens
from imatch.data import images, registry, rotations, store
from imatch.data.images import Decoded, Resize
from imatch.data.rotations import UPRIGHT, Pose

if TYPE_CHECKING:
    from torch import Tensor


BACKBONES = {
    "sift": "imatch.features.sift:Sift",
    "dsift": "imatch.features.sift:DenseSift",
    "xfeat": "imatch.features.xfeat:XFeat",
    "dinov3": "imatch.features.dinov3:Dinov3",
}
CLASSICAL = ("sift", "dsift")
"""Those that have no network."""
NAMED = tuple(name for name in BACKBONES if name != "dinov3")
"""Those that are named by themselves; the others are named by their weights, which the registry knows."""
INVARIANT = ("sift",)
"""Those that turn and zoom with their photographs, so that turned ones say nothing new."""
MATCHED_BY = {"sift": "ratio", "xfeat": "lighterglue"}
"""What matches their descriptors best; for those of grids that is "mutual"."""


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
    def side(self) -> int:
        """Pixels that the longer side has at most, unless another size was asked for; 0 is no limit."""

    @property
    def held(self) -> int:
        """Bytes that its weights take on its device."""

    @property
    def bytes_per_pixel(self) -> float:
        """What a forward pass takes there for each pixel of one photograph, beside the weights."""

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


def create_backbone(
    weight: str,
    options: Options | None = None,
    *,
    weight_set: str = "",
    data_key: str = "params/data_key.json",
    device: str = "auto",
) -> Backbone:
    """Make the backbone that a weight names.

    Args:
        weight: one of `NAMED`, or a key of the registry's weights, such as "vits16".
        options: the backbone's fields; those of `identity` make the same backbone without the registry.
        weight_set: where in the registry a key is looked up that stands in several sets.
        data_key: the registry's file.
        device: where a network runs; "auto" is the GPU, if there is one. Classical backbones run on the CPU.

    Raises:
        ImatchError: unknown weight or option, with the nearest known one.

    >>> create_backbone("sift", {"max_keypoints": 500}).max_keypoints
    500
    """
    name, given = named(weight, options or {}, weight_set, data_key)
    if weight not in CLASSICAL:
        given["device"] = device
    elif device not in ("auto", "cpu"):
        raise ImatchError(f"{weight} runs on the CPU, not on {device}: use auto or cpu")
    backbone: Backbone = config.create(BACKBONES, "weight", name, given)
    return backbone


def named(weight: str, options: Options, weight_set: str, data_key: str) -> tuple[str, dict[str, Json]]:
    """The name in `BACKBONES` and the options of what a weight names. Arguments and errors as of `create_backbone`.

    >>> named("sift", {}, "", "")
    ('sift', {})
    """
    given = dict(options)
    if {"filename", "precision"} <= set(given):  # what a step recorded; before there was a choice, it was torch
        given = {"engine_forward": "torch", **given}
    if weight not in NAMED and "filename" not in given:
        if not settings.from_workspace(data_key).is_file():
            said = config.unknown("weight", weight, NAMED)
            raise ImatchError(f"{said}; no others are known, for there is no {data_key}")
        known = registry.load(data_key)
        keys = [entry.key for entry in known.weights]
        if weight not in keys:
            raise ImatchError(config.unknown("weight", weight, [*NAMED, *keys]))
        entry = known.weight(weight, weight_set)
        given = {"hub_entry": entry.hub_entry, "filename": entry.filename, "family": entry.family, **given}
    return weight if weight in NAMED else "dinov3", given


def backbone_of(parameters: Parameters, device: str = "auto") -> Backbone:
    """Make the backbone again that photographs were embedded by.

    Args:
        parameters: of their embeddings.
        device: as of `create_backbone`.

    Raises:
        StepError: its weights are other ones now, or the embeddings were imported.

    >>> backbone_of({"weight": "sift", "backbone": {}, "weights_digest": "another"})
    Traceback (most recent call last):
    imatch.core.types.StepError: the weights of sift have changed since 01_embed (another -> 56731136): embed again
    """
    weight, digest = parameters["weight"], parameters["weights_digest"]
    if parameters.get("imported"):
        raise StepError("these embeddings were imported, without what they were made by: run 01_embed")
    backbone = create_backbone(weight, parameters["backbone"], device=device)
    if backbone.digest != digest:
        changed = f"({digest[:8]} -> {backbone.digest[:8]})"
        raise StepError(f"the weights of {weight} have changed since 01_embed {changed}: embed again")
    return backbone


def matcher_for(weight: str, matcher: str = "auto") -> str:
    """Say what "auto" stands for with a backbone; any other matcher is itself.

    Raises:
        ImatchError: a matcher that was trained for another backbone.

    >>> matcher_for("sift"), matcher_for("vits16"), matcher_for("sift", "mutual")
    ('ratio', 'mutual', 'mutual')
    """
    if matcher == "lighterglue" and weight != "xfeat":
        raise ImatchError(f"lighterglue matches the keypoints of xfeat, not {weight}: use matcher auto")
    return MATCHED_BY.get(weight, "mutual") if matcher == "auto" else matcher


def backbone_identity(backbone: Backbone) -> dict[str, Json]:
    """The options of a backbone that its numbers depend on.

    >>> backbone_identity(create_backbone("dsift"))
    {'patch': 16, 'width': 48.0, 'p': 3.0}
    """
    fields = dataclasses.fields(backbone)  # type: ignore[arg-type]
    return {field.name: getattr(backbone, field.name) for field in fields if field.compare}


Pooling = Literal["cls", "mean", "cls+mean", "gem", "legacy_mean"]
POOLINGS = get_args(Pooling)


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
            raise ImatchError(config.unknown("pooling", method, POOLINGS))
    return _unit(pooled)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def stride_of(variant: str) -> int:
    """1 for "raw", s for "sub{s}".

    Raises:
        ImatchError: it is neither.

    >>> stride_of("raw"), stride_of("sub2")
    (1, 2)
    """
    if variant == "raw":
        return 1
    if variant.startswith("sub") and variant[3:].isdecimal() and int(variant[3:]) > 1:
        return int(variant[3:])
    raise ImatchError(
        f"variant {variant!r} is not known: use raw, or sub2, sub3, ... for every 2nd, 3rd row and column"
    )


def decoded_for(
    photograph: Path | np.ndarray,
    resize: Resize,
    backbone: Backbone,
    degrees: float,
    free: Mapping[str, int] | None = None,
) -> Decoded | PhotographError:
    """Read a photograph for a backbone, turned, with its look; a broken one, or one that needs more memory than is
    free (of `free_for`), is given back as its error."""
    try:
        decoded = images.decode(photograph, resize, backbone.patch, backbone.resampling)
        if free and (why := lacking(decoded.size, resize, backbone, free)):
            return PassingError(why)
        decoded = replace(decoded, look=images.look(decoded.pixels))
        return rotations.turned(decoded, degrees, backbone.patch) if degrees else decoded
    except PhotographError as error:
        return error


DECODED = 22
"""Bytes that decoding takes at most for each pixel in the file (16 bits, WebP); as a rule it is 8."""


def free_for(backbone: Backbone) -> dict[str, int]:
    """Bytes of "cpu" and of the backbone's device for photographs: what is free but for an eighth, for what waits.

    >>> [*free_for(create_backbone("sift"))]
    ['cpu']
    """
    return {device: compute.free_memory(device) * 7 // 8 for device in {"cpu", backbone.device}}


def needed(size: tuple[int, int], resize: Resize, backbone: Backbone) -> dict[str, int]:
    """Bytes that one photograph takes, from its file to its tokens, of "cpu" and of the backbone's device.

    Args:
        size: its (h, w) in the file.
        resize: how the backbone sees it.

    >>> needed((6000, 8000), Resize(), create_backbone("sift"))
    {'cpu': 11808000000}
    """
    taken = {"cpu": DECODED * math.prod(size)}
    passed = pass_bytes(resize.target(size, backbone.patch), backbone)
    return taken | {backbone.device: max(passed, taken.get(backbone.device, 0))}


def pass_bytes(size: tuple[int, ...], backbone: Backbone) -> int:
    """Bytes that a photograph of (h, w), as the backbone sees it, takes on its device.

    >>> pass_bytes((100, 100), create_backbone("dsift"))
    380000
    """
    return round((backbone.bytes_per_pixel + 6) * math.prod(size))  # its RGB lies there twice


def lacking(size: tuple[int, int], resize: Resize, backbone: Backbone, free: Mapping[str, int]) -> str:
    """Say why a photograph does not fit into memory, and what to do; "" if it does.

    Args:
        size, resize: as of `needed`.
        free: of `free_for`.

    >>> free = {"cpu": 7 * 2**30}
    >>> lacking((6000, 8000), Resize(), create_backbone("sift"), free)
    '48 megapixels need 11.0 GB of 7.0 GB of memory: set resize.limit 6300 or less, or use a machine with more'
    >>> lacking((6000, 8000), Resize(limit=3072), create_backbone("sift"), free)
    ''
    """
    pixels, side = math.prod(size), max(resize.target(size, backbone.patch))
    for device, wanted in needed(size, resize, backbone).items():
        if wanted > (most := max(0, free[device])):
            fitting = int(side * math.sqrt(most / wanted) // 100 * 100) if most >= DECODED * pixels else 0
            field = "limit" if resize.mode == "scale" else "long_side"
            smaller = f"set resize.{field} {fitting} or less, or " if fitting else ""
            return (
                f"{pixels / 1e6:.0f} megapixels need {wanted / 2**30:.1f} GB of {most / 2**30:.1f} GB of memory: "
                f"{smaller}use a machine with more"
            )
    return ""


def embed_one(path: Path, backbone: Backbone, parameters: Parameters, pose: Pose = UPRIGHT) -> Embedded:
    """One photograph as a step with such parameters sees it; nothing is written.

    Raises:
        PhotographError: it cannot be decoded.
    """
    resize = Resize(**parameters["resize"]).zoomed(pose.zoom)
    decoded = decoded_for(path, resize, backbone, pose.turn)
    if isinstance(decoded, PhotographError):
        raise decoded
    tokens = embed_decoded(decoded, backbone, stride_of(parameters["variant"]))
    return Embedded(decoded.size, decoded.sha256, tokens)


def embed_decoded(photograph: Decoded, backbone: Backbone, stride: int = 1) -> Tokens:
    """Pass one photograph that was decoded for this backbone through it; xy in pixels of the original."""
    (tokens,) = backbone(np.stack([photograph.pixels]))  # a copy, for torch wants to be allowed to write
    return placed_tokens(tokens, photograph, stride)


@dataclass(frozen=True)
class Embedded:
    """A photograph's (h, w) in pixels, the SHA-256 of its file, and its tokens."""

    size: tuple[int, int]
    sha256: str
    tokens: Tokens


def placed_tokens(tokens: Tokens, photograph: Decoded, stride: int) -> Tokens:
    """The tokens with positions in pixels of the original photograph, every `stride`-th row and column of a grid."""
    if photograph.turned:
        return rotations.placed(tokens if stride == 1 else tokens.thinned(stride), photograph)
    placed = store.settled(replace(tokens, xy=photograph.to_original(tokens.xy)), photograph.size)
    return placed if stride == 1 else placed.thinned(stride)
