"""DINOv3's weight files, loaded strictly into timm's models or into Meta's own: a file is what its name says (SHA-256),
holds tensors and no code, and every tensor finds its place, but for `NEEDLESS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from imatch.core import compute, files, settings
from imatch.core.config import unknown
from imatch.core.types import ImatchError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
State = dict[str, "Tensor"]
ARCHITECTURES = {
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb",
    "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb",
    "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb",
    "dinov3_vith16plus": "vit_huge_plus_patch16_dinov3_qkvb",
    "dinov3_vit7b16": "vit_7b_patch16_dinov3",  # this one has no biases of queries, keys and values
    "dinov3_convnext_tiny": "convnext_tiny",
    "dinov3_convnext_small": "convnext_small",
    "dinov3_convnext_base": "convnext_base",
    "dinov3_convnext_large": "convnext_large",
}
"""Meta's hub entry -> timm's model. The _qkvb builds keep biases that timm's plain ones leave out as near zero."""
NEEDLESS = {
    r"rope_embed\.periods": "a constant that timm computes; the file's is checked and taken over",
    r"blocks\.\d+\.attn\.qkv\.bias_mask": "multiplied into the bias, as Meta's code does at every pass",
    r"mask_token": "used in training only",
    r"local_cls_norm\.(weight|bias)": "used in training only (ViT-L SAT, ViT-7B)",
    r"norms\.3\.(weight|bias)": "the last norm of a ConvNeXt under a second name",
}
"""Tensors of Meta's files that timm's models have no place for, and why that is right."""
Names = tuple[tuple[str, str], ...]
_TIMMS: Names = (
    (r"^reg_token$", "storage_tokens"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.attn\.q_bias$", ".attn.qkv.bias"),
    (r"^(blocks\.\d+\.mlp)\.fc1_g\.", r"\1.w1."),
    (r"^(blocks\.\d+\.mlp)\.fc1_x\.", r"\1.w2."),
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"^(stages.*)\.mlp\.fc", r"\1.pwconv"),
    (r"^head\.norm\.", "norm."),
)
_HUGGING_FACES: Names = (
    (r"^(model\.)?layer\.", "blocks."),
    (r"^embeddings\.(cls_token|mask_token)", r"\1"),
    (r"^embeddings\.register_tokens", "storage_tokens"),
    (r"^embeddings\.patch_embeddings", "patch_embed.proj"),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.gate_proj\.", ".mlp.w1."),
    (r"\.mlp\.up_proj\.", ".mlp.w2."),
    (r"\.mlp\.down_proj\.", ".mlp.w3."),
    (r"^(model\.)?stages\.(\d)\.downsample_layers\.", r"downsample_layers.\2."),
    (r"^(model\.)?stages\.(\d)\.layers\.", r"stages.\2."),
    (r"depthwise_conv", "dwconv"),
    (r"pointwise_conv", "pwconv"),
    (r"layer_norm", "norm"),
)
"""What tensors are called by timm, and in Hugging Face's repositories -> in Meta's files."""
HASH = re.compile(r"-([0-9a-f]{8})\.(?:pth|safetensors)$")
SUFFIXES = (".pth", ".safetensors")


def patch_side(hub_entry: str) -> int:
    """The side of a patch in pixels: 16, and 32 for a ConvNeXt, the stride of its last stage.

    >>> patch_side("dinov3_vits16"), patch_side("dinov3_convnext_tiny")
    (16, 32)
    """
    return 32 if "convnext" in hub_entry else 16


def find(filename: str) -> Path:
    """The path of a weight file under WEIGHTS_ROOT, in that folder itself.

    Raises:
        ImatchError: it is not there; the message names a file that may be it under another name, or says how to get it.
    """
    root = settings.root("WEIGHTS_ROOT")
    path = root / filename
    if path.is_file():
        return path
    if not root.is_dir():
        raise ImatchError(
            f"no weights folder {root}: make it, put {filename} there, or set WEIGHTS_ROOT to the folder that holds it"
        )
    there = sorted(entry.name for entry in root.iterdir() if entry.suffix in SUFFIXES)
    hashed = HASH.search(filename)
    signs = (hashed[1], filename[: hashed.start()]) if hashed else (Path(filename).stem,)
    near = [name for name in there if any(sign in name for sign in signs)]
    if near:
        raise ImatchError(f"no {filename} in {root}, but {near[0]}: if it is that file renamed, rename it back")
    raise ImatchError(
        f"no {filename} in {root}: ask for DINOv3's weights at https://ai.meta.com/resources/models-and-libraries/"
        "dinov3-downloads/ and put the file there unrenamed, or set WEIGHTS_ROOT to the folder that holds it"
    )


def remembered(memory: Path, key: str, measure: Callable[[], T]) -> T:
    """What a JSON file in the cache folder has under a key; what it has not is measured, and written there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [remembered(Path(folder, "memory.json"), "answer", lambda: 42), Path(folder, "memory.json").is_file()]
    [42, True]
    """
    known: dict[str, T] = {}
    with contextlib.suppress(OSError, ImatchError):  # not there yet, or torn: measured once more
        known = files.read_json(memory)
    if key not in known:
        known[key] = measure()
        with contextlib.suppress(OSError):  # a home that cannot be written to: measured again next time
            files.write_json(memory, known)
    return known[key]


def weight_digest(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal; remembered by size and time of change, for weights are gigabytes."""
    stat = path.stat()

    def read_all() -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(2**24), b"")
            for block in compute.progress(blocks, f"check {path.name[:40]}", total=-(-stat.st_size // 2**24), delay=3):
                digest.update(block)
        return digest.hexdigest()

    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    return remembered(settings.cache_folder() / "checksums.json", key, read_all)


def check_name(path: Path) -> str:
    """The SHA-256 of a weight file, after checking that it begins with the eight digits at the end of its name.

    Raises:
        ImatchError: it does not: the download broke off, or the file is another one.
    """
    if path.suffix == ".pth" and not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            truncated = file.read(2) == b"PK"
        size = f"{path.stat().st_size / 2**20:.1f} MB"
        if truncated:
            raise ImatchError(f"{path} is truncated ({size}): its end is missing. Download it again")
        raise ImatchError(f"{path} ({size}) is no weight file of PyTorch: Download it again, from Meta's own link")
    digest = weight_digest(path)
    named = HASH.search(path.name)
    if named and not digest.startswith(named[1]):
        raise ImatchError(
            f"{path} is not the file that its name says: its SHA-256 begins with {digest[:8]}, not with {named[1]}. "
            "Download it again; if it was saved under another file's name, rename it"
        )
    return digest


def read(path: Path) -> State:
    """The tensors of a `.pth` or `.safetensors` file, in Meta's names, memory-mapped. No code in it is ever run.

    Hugging Face's names (`model.safetensors` of Meta's repositories there) are turned into Meta's.

    Raises:
        ImatchError: the file is truncated, holds code in place of tensors, or is no state dict.
    """
    import torch

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _in_metas_names(load_file(path))
        except SafetensorError as error:
            raise ImatchError(f"{path} cannot be read ({error}): it is truncated; download it again") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ImatchError(
            f"{path} holds more than tensors: loading it would run code, so it was not loaded. Take the file from "
            "Meta's own link; a checkpoint of your own must be saved again as torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ImatchError(f"{path} cannot be read ({error}): it is truncated; download it again") from error
    held = state if isinstance(state, Mapping) else {type(state).__name__: None}
    if not all(isinstance(value, torch.Tensor) for value in held.values()):
        said = ", ".join(map(str, [*held][:5]))
        raise ImatchError(f"{path} is no state dict of a backbone (it holds {said}): take Meta's pretrained backbone")
    return _in_metas_names(dict(state))


def _in_metas_names(state: State) -> State:
    """A state dict in Meta's names, from Hugging Face's if it has those."""
    import torch

    if not any(re.search(r"patch_embeddings|depthwise_conv", name) for name in state):
        return state
    gated = any(".mlp.gate_proj." in name for name in state)
    found: State = {}
    for name, value in state.items():
        meta = _renamed(name, _HUGGING_FACES)
        if not gated:
            meta = meta.replace(".mlp.w2.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        found[meta] = value[0] if meta == "mask_token" and value.ndim == 3 else value
    for name in [name for name in found if ".attention.q_proj." in name]:
        block, kind = name.split(".attention.q_proj.")
        q, v = found.pop(name), found.pop(f"{block}.attention.v_proj.{kind}")
        k = found.pop(f"{block}.attention.k_proj.{kind}", None)  # keys have no bias
        found[f"{block}.attn.qkv.{kind}"] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    return found


def _renamed(name: str, table: Names) -> str:
    for theirs, ours in table:
        name = re.sub(theirs, ours, name)
    return name


def skeleton(hub_entry: str) -> nn.Module:
    """timm's model for a hub entry, without memory for its weights (on torch's meta device).

    Raises:
        ImatchError: an unknown hub entry, with the nearest known one.
    """
    import timm
    import torch

    if hub_entry not in ARCHITECTURES:
        raise ImatchError(unknown("hub entry", hub_entry, ARCHITECTURES))
    with torch.device("meta"):
        return timm.create_model(ARCHITECTURES[hub_entry], pretrained=False, num_classes=0).eval()


def layout(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The tensors that Meta's file for a timm model must hold: name -> shape.

    >>> shapes = layout(skeleton("dinov3_vits16"))
    >>> shapes["storage_tokens"], shapes["blocks.0.attn.qkv.bias"]
    ((1, 4, 384), (1152,))
    """
    shapes = {}
    gated = any(".mlp.fc1_g." in name for name in model.state_dict())
    for name, value in model.state_dict().items():
        if name.endswith("attn.v_bias"):
            continue  # one tensor with the queries' in Meta's file
        shape = tuple(value.shape)
        if name.endswith("attn.q_bias"):
            shape = (3 * shape[0],)
        name = _renamed(name, _TIMMS)
        if gated:
            name = name.replace(".mlp.fc2.", ".mlp.w3.")
        shapes[name] = shape
    return shapes


def _problems(state: State, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps a state dict from being exactly the wanted tensors, a line each."""
    needless = re.compile("|".join(NEEDLESS))
    missing = [f"{name} is missing" for name in sorted(set(shapes) - set(state))]
    extra = [f"{name} has no place" for name in sorted(set(state) - set(shapes)) if not needless.fullmatch(name)]
    wrong = [
        f"{name} is {tuple(state[name].shape)}, not {shape}"
        for name, shape in sorted(shapes.items())
        if name in state and tuple(state[name].shape) != shape
    ]
    return missing + extra + wrong


def load(hub_entry: str, path: Path) -> nn.Module:
    """timm's model for a hub entry with the weights of a file, float32 on the CPU, ready to infer.

    A ViT's last normalisation is taken out of the forward pass and kept as `last_norm`, so that one pass gives the
    tokens before and after it.

    Raises:
        ImatchError: the file does not hold exactly this architecture; the message says which one it holds.
    """
    import torch
    from timm.models import convnext, eva

    model = skeleton(hub_entry)
    state = read(path)
    _refuse(_problems(state, layout(model)), state, hub_entry, path)
    _mask_biases(state, path)
    needless = re.compile("|".join(NEEDLESS))
    kept = {name: value.float() for name, value in state.items() if not needless.fullmatch(name)}
    convert = convnext.checkpoint_filter_fn if "convnext" in hub_entry else eva.checkpoint_filter_fn
    model.load_state_dict(convert(kept, model), strict=True, assign=True)
    for module in model.modules():  # constants that no file holds
        unmade = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in unmade.items():
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if unmade:
            module.init_non_persistent_buffers()
    if "convnext" not in hub_entry:
        model.rope.periods.copy_(_periods(state, model.rope.periods, path))
        model.last_norm, model.norm = model.norm, torch.nn.Identity()
    return model


@cache
def _layout(hub_entry: str) -> dict[str, tuple[int, ...]]:
    return layout(skeleton(hub_entry))


def _refuse(found: list[str], state: State, hub_entry: str, path: Path) -> None:
    if not found:
        return
    other = [name for name in ARCHITECTURES if name != hub_entry and not _problems(state, _layout(name))]
    said = f"it is a {other[0]}: correct its hub entry in data_key" if other else "take Meta's own file for it"
    more = f"\n  ... and {len(found) - 10} more" if len(found) > 10 else ""
    raise ImatchError(f"{path} is no {hub_entry}, {said}:\n  " + "\n  ".join(found[:10]) + more)


def _mask_biases(state: State, path: Path) -> None:
    """Multiply the masks into the biases, as Meta's layers do. (In the files that Meta released both are all zero.)"""
    for name in [name for name in state if name.endswith(".qkv.bias")]:
        mask = state.get(f"{name}_mask")
        if mask is not None and mask.shape != state[name].shape:
            raise ImatchError(f"{path}: {name}_mask is {tuple(mask.shape)}, not {tuple(state[name].shape)}")
        state[name] = state[name] if mask is None else state[name] * mask
        if not bool((state[name].chunk(3)[1] == 0).all()):
            raise ImatchError(f"{path}: {name} gives keys a bias, which timm's model has not: use source hub")


def _periods(state: State, exact: Tensor, path: Path) -> Tensor:
    """Meta's files hold the periods rounded to bfloat16, and Meta's code uses them so; Hugging Face's hold none."""
    found: Tensor = state.get("rope_embed.periods", exact.bfloat16().float())
    if found.shape != exact.shape or not bool(((found / exact - 1).abs() < 0.01).all()):
        raise ImatchError(f"{path}: rope_embed.periods are not those of DINOv3: use source hub, or Meta's own file")
    return found


def load_from_hub(hub_entry: str, path: Path) -> nn.Module:
    """Meta's own model, from the checkout of Meta's repository at DINOV3_REPO, with the weights of a file.

    Raises:
        ImatchError: no checkout there, packages that it imports are missing, or the weights do not fit it exactly.
    """
    import torch

    repository = settings.root("DINOV3_REPO")
    if not (repository / "hubconf.py").is_file():
        raise ImatchError(
            f"no checkout of Meta's DINOv3 at {repository}: clone https://github.com/facebookresearch/dinov3, set "
            "DINOV3_REPO to where it lies, or use source timm, which needs none"
        )
    if hub_entry not in ARCHITECTURES:
        raise ImatchError(unknown("hub entry", hub_entry, ARCHITECTURES))
    try:
        model: Any = torch.hub.load(str(repository), hub_entry, source="local", pretrained=False)
    except ModuleNotFoundError as error:
        raise ImatchError(
            f"Meta's code at {repository} imports {error.name}, which is not installed: pip install -c constraints.txt "
            "-e '.[hub]' in imatch's folder, or use source timm, which does not need it"
        ) from error
    state = read(path)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    training_only = {name for name in state if name.startswith("local_cls_norm.")} - {*wanted}
    kept = {name: value.float() for name, value in state.items() if name not in training_only}
    # Hugging Face's files lack what never changes; Meta's own model has it from its construction
    constant = {name for name in wanted if re.fullmatch("|".join(NEEDLESS), name)} - set(kept)
    found = _problems(kept, {name: shape for name, shape in wanted.items() if name not in constant})
    _refuse(found, state, hub_entry, path)
    model.load_state_dict({**{name: model.state_dict()[name] for name in constant}, **kept}, strict=True)
    return model.eval()


def timm_tokens(model: nn.Module, seen: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens before and after the last norm, of what timm's `forward_features` gave: two (B, m, D) float32."""
    import torch
    from torch import nn

    if hasattr(model, "num_prefix_tokens"):
        return seen.float(), model.last_norm(seen.float())
    patches = seen.float().flatten(2).transpose(1, 2)
    norm = model.head.norm
    # as Meta's code has it: the pooled vector goes through the norm as one more token
    normalised = nn.functional.layer_norm(
        torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1),
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
    )
    return patches, normalised


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
