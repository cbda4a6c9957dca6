"""DINOv3: one forward pass gives the class token, the registers and the grid of patch tokens, normalised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from imatch.core import compute, config
from imatch.core.types import ImatchError, Tokens, grid_xy
from imatch.features import base, openvino, weights

MEAN_STD = {
    "LVD": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "SAT": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}
"""How Meta normalised the photographs of each family of weights, RGB in 0 to 1: web photographs (LVD-1689M, as
ImageNet) and satellite tiles (SAT-493M)."""
TABLES = 8
"""Shapes of photographs whose rotary angles are kept: some 2 MB each at 1,024 pixels, 24 MB at 12 megapixels."""


@dataclass(frozen=True)
class Features:
    """What one forward pass of B photographs yields.

    Attributes:
        cls: (B, D) float32, the normalised class token; of a ConvNeXt the pooled vector, normalised.
        registers: (B, R, D) float32, normalised; R is 4 for ViTs and 0 for ConvNeXts.
        grid: (B, h, w, D) float32, the normalised patch tokens (x_norm).
        before: (B, m, D) float32, every token before the last normalisation, class token and registers first.
    """

    cls: Tensor
    registers: Tensor
    grid: Tensor
    before: Tensor


@dataclass(frozen=True)
class Dinov3:
    """A DINOv3 of any size with the weights that the user brings. Source: Simeoni et al., "DINOv3", 2025.

    `imatch.features.base.create_backbone("vits16")` makes one from a line of params/data_key.json.

    Attributes:
        hub_entry: Meta's name of the architecture, such as "dinov3_vits16".
        filename: the weight file under WEIGHTS_ROOT.
        family: "LVD" or "SAT": how photographs are normalised.
        source: "timm" (timm's model with Meta's weights) or "hub" (Meta's code from a checkout at DINOV3_REPO).
        pooling: what the global vector is, one of `imatch.features.base.POOLINGS`.
        precision: "fp32", "bf16" (autocast), or "auto", which becomes bf16 where the device computes in it: GPUs since
            Ampere, CPUs with AMX or AVX512-BF16.
        compile: let torch.compile fuse the model; the first batch of a shape then takes a minute.
        engine_forward: "torch", "openvino" (timm's model on the CPU; an extra of pip), or "auto", which becomes
            openvino where it is there, faster, and gives torch's tokens (`imatch.features.openvino.chosen`).
        device: "auto" (the GPU, if there is one), "cpu", "cuda" or "cuda:1". It is no part of what is asked.

    Raises:
        ImatchError: an unknown name, a missing device, openvino where it cannot be, or a weight file that is not what
            it should be.
    """

    side: ClassVar[int] = 0  # photographs are seen at the size that was asked for
    resampling: ClassVar[str] = "torch"  # whose bicubic has antialiasing, as Meta's training had
    hub_entry: str
    filename: str
    family: Literal["LVD", "SAT"]
    source: Literal["timm", "hub"] = "timm"
    pooling: base.Pooling = "cls"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    engine_forward: Literal["auto", "torch", "openvino"] = "auto"
    device: str = field(default="auto", compare=False)

    def __post_init__(self) -> None:
        config.check(self)
        if self.hub_entry not in weights.ARCHITECTURES:
            raise ImatchError(config.unknown("hub entry", self.hub_entry, weights.ARCHITECTURES))
        # "auto" becomes what this machine does, so that the step records what was done
        cpu = self.device == "auto" and self.engine_forward == "openvino"
        object.__setattr__(self, "device", "cpu" if cpu else compute.resolved(self.device))
        if self.precision == "auto":
            object.__setattr__(self, "precision", "bf16" if computes_in_bf16(self.device) else "fp32")
        if self.engine_forward == "openvino":
            openvino.check(self)
        if self.engine_forward == "auto":
            object.__setattr__(self, "engine_forward", openvino.chosen(self))

    def __getstate__(self) -> dict[str, object]:
        # models do not go to other processes, they are loaded there
        loaded = ("model", "openvino", "_mean_std")
        return {name: value for name, value in vars(self).items() if name not in loaded}

    @cached_property
    def bytes(self) -> int:
        """Bytes of the weights in fp32; no weight file is needed."""
        return sum(parameter.nbytes for parameter in weights.skeleton(self.hub_entry).parameters())

    @property
    def held(self) -> int:
        """Bytes of the weights as the engine holds them; this and the next are counted on a model without memory."""
        return openvino.HELD * self.bytes if self.engine_forward == "openvino" else self._cost.weights

    @property
    def bytes_per_pixel(self) -> float:
        """What the widest layer takes."""
        return self._cost.working / (16 * self.patch) ** 2

    @property
    def _cost(self) -> weights.Cost:
        return weights.cost(self.hub_entry, (16 * self.patch, 16 * self.patch), self.precision)

    @property
    def patch(self) -> int:
        """16 pixels; 32 for a ConvNeXt."""
        return weights.patch_side(self.hub_entry)

    @cached_property
    def path(self) -> Path:
        """The weight file."""
        return weights.find(self.filename)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the weight file, checked against its name."""
        return weights.check_name(self.path)

    @cached_property
    def model(self) -> nn.Module:
        """The model on its device; of timm's, `features` applies the last normalisation itself.

        Raises:
            ImatchError: the weight file is not there, not what its name says, or does not fit the architecture.
        """
        weights.check_name(self.path)
        load = {"timm": weights.load, "hub": weights.load_from_hub}[self.source]
        model = load(self.hub_entry, self.path).requires_grad_(False)
        if self.precision == "bf16":
            for module in model.modules():  # what autocast would do at every pass, done once
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(torch.bfloat16)
        model = model.to(self.device)
        if self.compile:
            model.forward_features = torch.compile(model.forward_features)
        elif hasattr(model, "rope"):  # timm works its angles out at every pass
            model.rope.get_embed = lru_cache(TABLES)(model.rope.get_embed)
        made: nn.Module = model
        return made

    @cached_property
    def openvino(self) -> openvino.Forward:
        """The forward pass by OpenVINO, for engine_forward "openvino".

        Raises:
            ImatchError: its tokens are not torch's, or the weight file is not what it should be.
        """
        return openvino.checked(self)

    def load(self) -> None:
        """The model, as the engine wants it.

        Raises:
            ImatchError: as `model` or `openvino`.
        """
        _ = self.openvino.compiled(openvino.HALVES) if self.engine_forward == "openvino" else self.model

    @cached_property
    def _mean_std(self) -> tuple[Tensor, Tensor]:
        both = torch.tensor(MEAN_STD[self.family], device=self.device)[..., None, None] * 255
        return both[0], both[1]

    def normalised(self, photographs: Tensor) -> Tensor:
        """(B, h, w, 3) uint8 RGB photographs as the model wants them: (B, 3, h, w) float32 on the device."""
        mean, std = self._mean_std
        if torch.device(self.device).type == "cuda" and not photographs.is_cuda:
            photographs = photographs.pin_memory()  # so that the next line does not wait for the GPU
        x = photographs.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        # planes first, numbers then: seven times as fast as to go through triples of them
        return x.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)

    def tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens of timm's model, class token and registers first, before and after its last normalisation.

        Args:
            x: (B, 3, h, w) float32, from `normalised`.

        Returns:
            Two (B, m, D) float32 on the device; a ConvNeXt's have no class token before, and its pooled vector after.
        """
        if self.engine_forward == "openvino":
            return self.openvino(x)
        with self._torch():
            return weights.timm_tokens(self.model, self.model.forward_features(x))

    @contextmanager
    def _torch(self) -> Iterator[None]:
        device_type = torch.device(self.device).type
        with torch.inference_mode(), torch.autocast(device_type, torch.bfloat16, enabled=self.precision == "bf16"):
            yield

    def features(self, photographs: Tensor) -> Features:
        """The one forward pass.

        Args:
            photographs: (B, h, w, 3) uint8 RGB, h and w multiples of `patch`.

        Returns:
            float32, on the device.
        """
        x = self.normalised(photographs)
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        if self.source == "hub":
            with self._torch():
                seen = self.model.forward_features(x)
                cls, registers, patches = (
                    seen[f"x_{name}"].float() for name in ("norm_clstoken", "storage_tokens", "norm_patchtokens")
                )
                before = seen["x_prenorm"].float()
        else:
            before, normalised = self.tokens(x)
            cls, rest = normalised[:, 0], normalised[:, 1:]
            registers, patches = rest[:, : -h * w], rest[:, -h * w :]
        return Features(cls, registers, patches.unflatten(1, (h, w)), before)

    def __call__(self, photographs: np.ndarray) -> list[Tokens]:
        """Tokens of (B, h, w, 3) uint8 RGB photographs on a grid of (h / patch, w / patch)."""
        seen = self.features(torch.from_numpy(np.ascontiguousarray(photographs)))
        with torch.inference_mode():
            vectors = base.pool(self.pooling, seen.cls, seen.grid.flatten(1, 2), seen.before).cpu().numpy()
            local = seen.grid.flatten(1, 2).half().cpu().numpy()
        grid = (seen.grid.shape[1], seen.grid.shape[2])
        xy = grid_xy(grid, photographs.shape[1:3])
        both = zip(vectors, local, strict=True)
        return [Tokens(vector, descriptors, xy, grid) for vector, descriptors in both]


def computes_in_bf16(device: str) -> bool:
    """Whether a device multiplies matrices in bfloat16 itself, rather than to emulate it slowly.

    >>> isinstance(computes_in_bf16("cpu"), bool)
    True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
