"""From one step to the next: which is meant where none is given, and the embeddings behind one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from imatch.core.step import Step, open_step, run_folder, side_folders, step_folder
from imatch.core.types import StepError
from imatch.data.store import Stored


def last_finished(step: str, kind: str, run: str, of: str = "") -> str:
    """Say which step is meant: the one given or, for "", the last finished one of its kind in a run; print it then, and
    the others that it was chosen from.

    Args:
        step: its folder, or "".
        kind: "01_embed", "02_references" or "03_index".
        run: name of the run.
        of: of references, the folder of the 01_embed that they are made from; "" is any.

    Raises:
        StepError: there is none in that run.
    """
    if step:
        return step
    home = run_folder(run)
    found = [one for one in _finished(home / kind) if not of or one.linked("embed") == step_folder(of)]
    if not found:
        raise StepError(f"no finished {kind} in {home}: run it first, or give the run or the folder that it is in")
    for one in found[:-1]:
        print(f"also there: {one.folder}")
    print(f"the last finished {kind}: {found[-1].folder}")
    return str(found[-1].folder)


def _finished(folder: Path) -> list[Step]:
    """The finished steps below a folder, the last one last; neither views without their tokens nor what another step
    has beside it, in other poses or by another backbone."""
    marks = filter(Path.is_file, (below / "metrics.json" for below in steps_below(folder)))
    dated = sorted(marks, key=lambda mark: (mark.stat().st_mtime_ns, mark))
    opened = [open_step(mark.parent, finished=False) for mark in dated]
    return [one for one in opened if "part" not in one.about and "upright" not in one.upstream]


def steps_below(folder: Path) -> Iterator[Path]:
    """Yield the folders of steps below a folder; they are not looked into, for they may hold a folder a query."""
    for path, below, names in os.walk(folder, followlinks=True):
        if "step.json" in names:
            below.clear()
            yield Path(path)
        below[:] = sorted(name for name in below if not name.startswith("."))


def open_embeddings(step: Step, weight: str = "") -> tuple[Stored, Stored]:
    """The embeddings that a 03_index step searches with, and those it searches; of a 04_match, what it matches, by
    another backbone if `weight` names one."""
    query, gallery = side_folders(step, weight)
    return open_finished(query), open_finished(gallery)


def open_finished(folder: Path) -> Stored:
    """Open the embeddings of a finished step."""
    return Stored(open_step(folder).folder)
