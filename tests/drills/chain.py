"""A small run of all five notebooks on drawn photographs: what it is given, and its cells in this process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imatch
from tests import cells
from tests.test_resume import write_photographs

NOTEBOOKS = ["01_embed", "02_references", "03_index", "04_match", "05_report"]
ROOT = Path(imatch.__file__).parents[1]
WANTED: dict[str, dict[str, Any]] = {
    "01_embed": {"weight": "sift", "backbone_options": {"max_keypoints": 120}, "storage": {"shard_size": 2}},
    "02_references": {"kind": "legacy", "angles": [0, 30], "crops": [0.75]},
    "03_index": {},
    "04_match": {"candidates": 1},
    "05_report": {},
}
"""What each notebook is given, beside `run`; where its inputs are comes from `given`."""


def settle(home: Path, photographs: int) -> None:
    """Make a folder the one that we work in: photographs, and links to this checkout's notebooks and params."""
    write_photographs(home / "photographs", photographs)
    for name in ("notebooks", "params"):
        (home / name).symlink_to(ROOT / name)
    os.chdir(home)
    os.environ.setdefault("MPLBACKEND", "agg")


def given(name: str) -> dict[str, Any]:
    """The parameters of a notebook of the run "run"."""
    source = {"01_embed": {"dataset": "photographs"}, "05_report": {"steps": ["exports/run"]}}
    return {"run": "run", **source.get(name, {}), **WANTED[name]}


def execute(name: str, exports: Path, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run a notebook's cells; returns its variables."""
    os.environ["EXPORT_ROOT"] = str(exports)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cells.execute(name, **(given(name) if parameters is None else parameters))
