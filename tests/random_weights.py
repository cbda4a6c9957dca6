"""Weight files in Meta's format with random numbers, for what can be shown without the gated ones.

    python tests/random_weights.py FOLDER [KEY ...]

writes FOLDER/<file>.pth for keys of params/data_key.json (default: vits16) and FOLDER/data_key.json, which names them.
All biases, norms and layer scales are away from 0 and 1, so that nothing can be forgotten unseen.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import torch

from imatch.features import weights

ROOT = Path(__file__).parents[1]


def state(hub_entry, seed=0):
    """A state dict as Meta's file for this architecture holds it, training-only tensors included."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in weights.layout(weights.skeleton(hub_entry)).items():
        numbers = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            tensors[name] = 1 + 0.1 * numbers
        elif name.endswith("gamma"):
            tensors[name] = 0.3 + 0.1 * numbers
        elif len(shape) > 1 and name.endswith("weight"):
            tensors[name] = numbers / math.sqrt(math.prod(shape[1:]))
        else:
            tensors[name] = 0.1 * numbers
    if "convnext" in hub_entry:
        tensors |= {f"norms.3.{kind}": tensors[f"norm.{kind}"] for kind in ("weight", "bias")}
        return tensors
    for name in [name for name in tensors if name.endswith("qkv.bias")]:
        mask = torch.ones_like(tensors[name])
        mask[len(mask) // 3 : 2 * len(mask) // 3] = 0
        tensors[f"{name}_mask"] = mask
    tensors["mask_token"] = torch.zeros(1, tensors["cls_token"].shape[-1])
    # 100 ** (i / 16) for heads 64 wide, rounded to bfloat16 as in Meta's files
    quarter = 32 if "7b" in hub_entry else 16
    tensors["rope_embed.periods"] = (100 ** (torch.arange(quarter) / quarter)).bfloat16().float()
    return tensors


def save(tensors, folder, stem, suffix=".pth"):
    """Save under <stem>-<first eight digits of its SHA-256><suffix>; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"unnamed{suffix}"
    torch.save(tensors, path)
    named = path.with_name(f"{stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}{suffix}")
    return path.rename(named)


def write(folder, keys):
    """The files of these keys and a data_key.json that names them; returns its path."""
    path = folder / "data_key.json"
    content = json.loads((path if path.is_file() else ROOT / "params" / "data_key.json").read_text())
    for groups in content["weights"].values():
        for group in groups.values():
            for key, entry in group.items():
                if key in keys:
                    hub_entry, filename, _ = entry
                    stem = filename.rpartition("-")[0]
                    entry[1] = save(state(hub_entry, seed=len(key)), folder, stem).name
    path.write_text(json.dumps(content, indent=1))
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), sys.argv[2:] or ["vits16"]))
