"""LighterGlue: a small network that matches XFeat's keypoints by what they show and where they lie, run by kornia."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from imatch.core import compute, config, learned
from imatch.core.types import ImatchError, Matches, Tokens
from imatch.matching.matchers import Matcher, Mutual, Sizes

if TYPE_CHECKING:
    from kornia.feature import LightGlue
    from kornia.feature.lightglue import CrossBlock
    from torch import Tensor

FILE = "xfeat-lighterglue.pt"
DIMENSION = 64
CONSTANTS = "confidence_thresholds"
"""What the network works out by itself."""


@dataclass(frozen=True)
class LighterGlue(Matcher):
    """Attention within and between the two photographs, then a probability for each pair of keypoints.

    What it pairs agrees with some geometry by itself, so agreement says less: it takes more inliers (`caution`).

    Source: Lindenberger, Sarlin and Pollefeys, "LightGlue", ICCV 2023; the weights are XFeat's authors'.

    Attributes:
        min_probability: 0 to 1; a pair below it is dropped. 0.1 is LightGlue's.
        device: "cpu", a GPU ("cuda", "cuda:1"), or "auto" (the GPU, if there is one).

    Raises:
        ImatchError: a number out of its range, a missing device, or the extra `learned` is not installed.

    >>> keypoints = Tokens(np.ones(1), np.eye(64, dtype=np.float32)[:2], np.zeros((2, 2), np.float32))
    >>> len(LighterGlue()(keypoints, keypoints, ((9, 9), (9, 9)))) <= 2
    True
    """

    share: ClassVar[float] = 0.01
    caution: ClassVar[float] = 3.0
    coarse: ClassVar[float] = 2 / 1024  # of what XFeat sees
    quick: ClassVar[Matcher | None] = Mutual(min_similarity=0.82, max_matches=0)
    min_probability: config.Share = 0.1
    device: str = field(default="cpu", compare=False)

    def __post_init__(self) -> None:
        learned.check()
        super().__post_init__()
        object.__setattr__(self, "device", compute.resolved(self.device))

    def __call__(self, a: Tokens, b: Tokens, sizes: Sizes | None = None) -> Matches:
        """See `Matcher`; the scores are probabilities.

        Raises:
            ImatchError: no sizes, or descriptors that are not XFeat's.
        """
        import torch

        if sizes is None:
            raise ImatchError("lighterglue looks at positions: give the sizes of both photographs")
        for tokens in (a, b):
            if tokens.grid is not None or tokens.descriptors.shape[1] != DIMENSION:
                raise ImatchError("lighterglue matches the keypoints of xfeat: embed with weight xfeat")
        if not (len(a.xy) and len(b.xy)):
            none = np.zeros(0, np.int64)
            return Matches(none, none, np.zeros(0, np.float32))
        with torch.inference_mode():
            sides = [_side(tokens, size, self.device) for tokens, size in zip((a, b), sizes, strict=True)]
            found = network(self.device)({"image0": sides[0], "image1": sides[1]})
            index, score = found["matches"][0].cpu().numpy(), found["scores"][0].float().cpu().numpy()
        order = np.lexsort((index[:, 1], index[:, 0], -score))
        order = order[score[order] >= self.min_probability]
        return Matches(index[order, 0], index[order, 1], score[order])


def _side(tokens: Tokens, size: tuple[int, int], device: str) -> dict[str, Tensor]:
    """A photograph as the network wants it. A keypoint at the border may lie a fraction of a pixel outside."""
    import torch

    h, w = size
    descriptors = torch.from_numpy(tokens.descriptors.astype(np.float32)).to(device)
    return {
        "keypoints": torch.from_numpy(tokens.xy.clip(0, (w, h)).astype(np.float32))[None].to(device),
        "descriptors": torch.nn.functional.normalize(descriptors, dim=1)[None],
        "image_size": torch.tensor([[w, h]], device=device),
    }


@cache
def network(device: str) -> LightGlue:
    """The network on a device, loaded once in a process.

    Raises:
        ImatchError: the weights are not there, or other ones.
    """
    import torch
    from kornia.feature import LightGlue

    flash = torch.backends.cuda.flash_sdp_enabled()  # kornia sets it for the whole process
    made = LightGlue(None, **{**LightGlue.features["xfeat"], "weights": None, "flash": False})
    torch.backends.cuda.enable_flash_sdp(flash)
    held = learned.read(FILE).items()
    tensors = {_name(name): tensor for name, tensor in held if name.startswith("matcher.")}
    lost = made.load_state_dict(tensors, strict=False)
    if lost.unexpected_keys or set(lost.missing_keys) - {CONSTANTS}:
        raise ImatchError(f"this kornia does not know the weights of lighterglue: {learned.REMEDY}")
    for layer in made.transformers:
        layer.cross_attn.forward = partial(_across, layer.cross_attn)
    return made.eval().requires_grad_(False).to(device)


def _across(block: CrossBlock, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Attend as kornia does, in one step without its (m, n) matrices: the same but for rounding, sooner."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (block.heads, -1)).transpose(1, 2)

    def told(x: Tensor, seen: Tensor) -> Tensor:
        return x + block.ffn(torch.cat([x, block.to_out(seen.transpose(1, 2).flatten(-2))], -1))

    (qa, va), (qb, vb) = ((heads(block.to_qk(x)), heads(block.to_v(x))) for x in (a, b))
    return told(a, attend(qa, qb, vb)), told(b, attend(qb, qa, va))


def _name(name: str) -> str:
    """A tensor's name in kornia: matcher.self_attn.0.x becomes transformers.0.self_attn.x."""
    parts = name.removeprefix("matcher.").split(".")
    if parts[0] in ("self_attn", "cross_attn"):
        parts[:2] = ["transformers", parts[1], parts[0]]
    return ".".join(parts)
