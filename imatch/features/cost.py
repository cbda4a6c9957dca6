"""What a network costs at a size of photograph, counted on a model without memory: no weights are needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from imatch.features.weights import patch_side, skeleton


@dataclass(frozen=True)
class Cost:
    """What an architecture costs at one size of photograph.

    Attributes:
        parameters: how many numbers the model has.
        flop: floating-point operations of one photograph's forward pass, a multiplication and an addition being two.
        tokens, dimension: n and d of its local descriptors.
        weights: bytes of the model in memory.
        working: bytes that one photograph of a batch needs beside it.
    """

    parameters: int
    flop: int
    tokens: int
    dimension: int
    weights: int
    working: int

    @property
    def stored(self) -> int:
        """Bytes of one photograph on disk: local descriptors in float16 and a global vector in float32."""
        return 2 * self.tokens * self.dimension + 4 * self.dimension


@cache
def cost(hub_entry: str, size: tuple[int, int], precision: str = "fp32") -> Cost:
    """What an architecture costs, counted on a model without memory; no weights are needed.

    Args:
        hub_entry: such as "dinov3_vits16".
        size: (h, w) of a photograph as the backbone sees it.
        precision: "fp32" or "bf16".

    >>> small = cost("dinov3_vits16", (256, 256))
    >>> round(small.parameters / 1e6, 1), round(small.flop / 1e9, 1), small.tokens, small.dimension
    (21.6, 12.5, 256, 384)
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model: Any = skeleton(hub_entry)
    matrices = sum(
        parameter.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for parameter in module.parameters(recurse=False)
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    widest = 0

    def watch(_: torch.nn.Module, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        nonlocal widest
        together = sum(x.numel() for x in (*given, made) if isinstance(x, torch.Tensor))
        widest = max(widest, together)

    for module in model.modules():
        module.register_forward_hook(watch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        seen = model.forward_features(torch.empty(1, 3, *size, device="meta"))
    patch = patch_side(hub_entry)
    tokens = (size[0] // patch) * (size[1] // patch)
    dimension = int(seen.shape[1] if "convnext" in hub_entry else seen.shape[2])
    weights = 4 * parameters - (2 * matrices if precision == "bf16" else 0)
    # the widest step's input and output, the residual beside them, and what goes in and comes out
    working = 4 * (2 * widest + 3 * size[0] * size[1] + 4 * tokens * dimension)
    return Cost(parameters, counter.get_total_flops(), tokens, dimension, weights, working)
