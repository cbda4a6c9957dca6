"""What the environment says: where things are, and how many cores this process may use. Nothing else reads it."""

from __future__ import annotations

import os
from pathlib import Path

from imatch.core.types import ImatchError

DATA_KEY = "params/data_key.json"
ROOTS = {  # variable -> its default in the container, if that is there, and in the working folder
    "DATASET_ROOT": ("/opt/datasets", "data"),
    "REFERENCE_ROOT": ("/opt/references", "references"),
    "WEIGHTS_ROOT": ("/workspace/weights", "weights"),
    "DINOV3_REPO": ("/workspace/dinov3", "dinov3"),
    "EXPORT_ROOT": ("/exports", "exports"),
}
REPLACED = {  # variables of older containers -> what stands for them
    "REPO_DIR": "DINOV3_REPO (CODE_HOST in docker/.env)",
    "IMG_ROOT": "DATASET_ROOT (DATASET_HOST in docker/.env)",
    "EMBED_ROOT": "EXPORT_ROOT (EXPORT_HOST in docker/.env), whose <run>/01_embed it is",
    "REFERENCE_EMBED_ROOT": "EXPORT_ROOT (EXPORT_HOST in docker/.env), whose <run>/02_references it is",
    "MATCH_ROOT": "EXPORT_ROOT (EXPORT_HOST in docker/.env), whose <run>/04_match it is",
    "VIS_ROOT": "EXPORT_ROOT (EXPORT_HOST in docker/.env), for pictures lie beside what they show",
    "VIS_*": "parameters of the notebooks, such as outputs of 04_match",
}


def workspace() -> Path:
    """The folder that relative paths start from.

    It is the working folder; from inside `notebooks/`, where JupyterLab starts kernels, the folder above.

    >>> workspace().is_absolute()
    True
    """
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def from_workspace(path: str | Path) -> Path:
    """`path` as an absolute path: `~` expanded, relative ones taken from `workspace()`.

    >>> from_workspace("data/demo") == workspace() / "data" / "demo"
    True
    """
    return Path(os.path.normpath(workspace() / Path(path).expanduser()))


def root(name: str) -> Path:
    """The folder that the variable `name` stands for: what it is set to, else its default.

    Args:
        name: DATASET_ROOT, REFERENCE_ROOT, WEIGHTS_ROOT, DINOV3_REPO or EXPORT_ROOT.

    >>> root("WEIGHTS_ROOT").is_absolute()
    True
    """
    container, local = ROOTS[name]
    return from_workspace(os.environ.get(name) or (container if Path(container).is_dir() else local))


def use_exports(exports: str) -> None:
    """Make a folder EXPORT_ROOT, for this process and those that it starts (the kernels of `imatch run`).

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ):
    ...     use_exports("results")
    ...     root("EXPORT_ROOT") == from_workspace("results")
    True
    """
    os.environ["EXPORT_ROOT"] = str(from_workspace(exports))


def cache_folder() -> Path:
    """Where things are remembered that could be worked out again.

    >>> cache_folder().name
    'imatch'
    """
    return from_workspace(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "imatch"


def redis_url() -> str:
    """REDIS_URL: the Redis server. It may hold a password: never print or write it.

    Raises:
        ImatchError: it is not set.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, REDIS_URL="redis://localhost:6379/0"):
    ...     redis_url()
    'redis://localhost:6379/0'
    """
    if not (url := os.environ.get("REDIS_URL", "")):
        raise ImatchError(
            "no Redis to send to: set REDIS_URL in the environment, such as redis://:password@host:6379/0 "
            "(rediss:// for TLS)"
        )
    return url


def jupyter_port() -> int:
    """JUPYTER_PORT: the port that JupyterLab listens on; 8888 where it is not set, as Jupyter itself has it.

    Raises:
        ImatchError: it is no port.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, JUPYTER_PORT="8890"):
    ...     jupyter_port()
    8890
    """
    text = os.environ.get("JUPYTER_PORT") or "8888"
    if not (text.isdecimal() and 0 < int(text) < 2**16):
        raise ImatchError(f"JUPYTER_PORT is {text!r}: set it to a port, such as 8888")
    return int(text)


def replaced() -> dict[str, str]:
    """Variables of older containers that are set, and that nothing reads any more -> what stands for them.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, IMG_ROOT="/photographs"):
    ...     replaced()["IMG_ROOT"]
    'DATASET_ROOT (DATASET_HOST in docker/.env)'
    """
    named = {name: REPLACED.get(name) for name, value in sorted(os.environ.items()) if value}
    others = {name: REPLACED["VIS_*"] for name in named if name.startswith("VIS_")}
    return others | {name: said for name, said in named.items() if said}


def cores() -> int:
    """How many CPU cores this process may use.

    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores() -> None:
    """Let the OpenMP threads of torch and FAISS sleep while they wait, unless the user chose otherwise.

    Spinning ones take the cores from each other. It acts on processes started afterwards.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def take_cores(n: int) -> None:
    """Let torch, FAISS and OpenCV use so many threads in this process; they read it when they are loaded."""
    # Dask gives its workers 1 in the first two
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
        os.environ[name] = str(n)


def hide_gpus() -> None:
    """Let this process, and those that it starts, see no GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
