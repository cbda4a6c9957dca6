"""Where things are. The only room that looks at the environment: working folder and variables."""

from __future__ import annotations

import os
from pathlib import Path

from imatch.records import ImatchError


def workspace() -> Path:
    """The folder that relative paths start from.

    It is the working folder; inside `notebooks/`, where JupyterLab starts a notebook's kernel, it is the
    folder above, so that a notebook means the same paths from JupyterLab, papermill and batch.

    >>> workspace().is_absolute()
    True
    """
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def resolve(path: str | Path) -> Path:
    """`path` as an absolute path: `~` expanded, relative ones taken from `workspace()`.

    >>> resolve("data/demo") == workspace() / "data" / "demo"
    True
    """
    return Path(os.path.normpath(workspace() / Path(path).expanduser()))


def dataset_folder(dataset: str) -> Path:
    """The folder of photographs that `dataset` names.

    Raises:
        ImatchError: if there is no such folder.
    """
    folder = resolve(dataset)
    if not dataset:
        raise ImatchError("no dataset given: set `dataset` to a folder of photographs (-p dataset PATH)")
    if folder.is_file():
        raise ImatchError(f"dataset {folder} is a file: give the folder that holds the photographs")
    if not folder.is_dir():
        raise ImatchError(
            f"dataset folder {folder} does not exist: give an existing folder of photographs (-p dataset PATH); "
            "`make demo` writes the demo's to data/demo"
        )
    return folder


def cores() -> int:
    """How many CPU cores this process may use.

    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores() -> None:
    """Let the OpenMP threads of torch and FAISS sleep while they wait, unless the user chose otherwise.

    Both bring a pool of threads of their own; spinning ones take the cores from each other. It acts on
    processes started afterwards (the kernels that batch starts), for OpenMP reads it when it is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
