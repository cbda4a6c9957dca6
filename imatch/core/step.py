"""A step's folder: started, fingerprinted, reused or refused, finished. And the loop that steps share."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

from imatch.core import files, settings
from imatch.core.config import folder_name
from imatch.core.files import compare, digest, refuse_or_say
from imatch.core.rows import Parameters
from imatch.core.types import StepError

ON_CHANGE = ("refuse", "recompute")
MIME = "application/vnd.imatch.step+json"
M = TypeVar("M", bound=Mapping[str, object])
VERSIONS = ("imatch", "numpy", "pillow", "opencv-python-headless", "torch", "timm")


@dataclass
class Step:
    """One step of work and its folder on disk.

    Attributes:
        folder: where it writes. `step.json` is there from the start, `metrics.json` only when finished.
        name: the notebook's name, such as "01_embed".
        parameters: what was asked; all that changes the result and nothing else.
        upstream: fingerprints of what it was made from.
        links: paths of the steps it reads, relative to `folder`.
        about: what it is, a word each (dataset, weight, configuration, ...), of which its path is made.
        home: path of its run, <exports>/<run>, relative to `folder`.
        on_change: "refuse" or "recompute", what to do with results made from something else.
        device: where it was computed, for the record.
        work: for the record, too: how many photographs, and what took how many seconds, in all runs and processes.
    """

    folder: Path
    name: str
    parameters: Parameters
    upstream: dict[str, str]
    links: dict[str, str] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    home: str = ""
    on_change: str = "refuse"
    fingerprint: str | None = None
    device: str = "cpu"
    work: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def run(self) -> Path:
        """The folder of its run, <exports>/<run>, whatever a step.json that was brought here says."""
        return settings.from_workspace(self.folder).parents[len(self.about)]

    @property
    def finished(self) -> bool:
        """Whether metrics.json, which is written last, is there."""
        return (self.folder / "metrics.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """What the step recorded when it finished."""
        return files.read_json(self.folder / "metrics.json")

    def linked(self, link: str) -> Path:
        """The folder or file that this step reads under the name `link`."""
        return Path(settings.from_workspace(self.folder / self.links[link]))

    def runs_on(self, device: str) -> None:
        """Record where an unfinished step is being computed."""
        self.device = device
        self._write()

    def did(self, work: Mapping[str, float]) -> None:
        """Add to the record of what an unfinished step has computed."""
        for name, amount in work.items():
            self.work[name] = round(self.work.get(name, 0) + amount, 3)
        self._write()

    def unfinish(self) -> None:
        """Take the finished mark away before anything below is changed."""
        (self.folder / "metrics.json").unlink(missing_ok=True)

    def finish(self, metrics: M, contents: object = None) -> M:
        """Record the metrics, last, and say where the step is (batch reads that from the notebook).

        Args:
            metrics: figures for people, tests and the summary; plain JSON.
            contents: what the results were made from beyond parameters and upstream (content hashes);
                it enters the fingerprint. None when there is nothing more.

        Returns:
            The metrics as they stand on disk. A step that was reused keeps the ones it had.
        """
        if not self.finished:
            self.fingerprint = digest([_identity(self), contents])
            self._write(seconds=round(time.monotonic() - self.started, 3))
            for left in self.folder.rglob(".*.tmp"):  # by a kill
                left.unlink(missing_ok=True)
            files.write_json(self.folder / "metrics.json", dict(metrics))
        record = files.read_json(self.folder / "step.json")
        if record["links"] != self.links:  # the same inputs, moved
            files.write_json(self.folder / "step.json", {**record, "links": self.links})
        _publish(self)
        return cast("M", self.metrics)

    def _write(self, seconds: float | None = None) -> None:
        record = {
            **_identity(self),
            "fingerprint": self.fingerprint,
            "run": self.home,
            "about": self.about,
            "links": self.links,
            "device": self.device,
            "machine": platform.machine(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}},
            "seconds": seconds,
            "work": self.work,
        }
        files.write_json(self.folder / "step.json", record)


def start_step(
    run: Path,
    name: str,
    about: Mapping[str, str],
    parameters: Mapping[str, object],
    upstream: Mapping[str, str] | None = None,
    links: Mapping[str, Path] | None = None,
    on_change: str = "refuse",
) -> Step:
    """Open a step: a new one, one to go on with, or a finished one to reuse.

    Args:
        run: <exports>/<run>.
        name, about, parameters, upstream, links, on_change: of `Step`; links as paths, and what it is about as
            names of folders (`files.one_name`).

    Raises:
        StepError: its folder holds a step made with other parameters or from other inputs and
            `on_change` is "refuse"; the message lists every difference.
    """
    if on_change not in ON_CHANGE:
        raise StepError(f"on_change {on_change!r} is not known: use {' or '.join(ON_CHANGE)}")
    about = {what: files.one_name(said) for what, said in about.items()}
    folder, given = Path(run, name, *about.values()), json.loads(json.dumps(dict(parameters)))
    relative = {key: files.relative(path, folder) for key, path in (links or {}).items()}
    home = files.relative(run, folder)
    step = Step(folder, name, given, dict(upstream or {}), relative, about, home, on_change)
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if (folder / "step.json").is_file():
        before = open_step(folder, finished=False)
        there = {path.name for path in folder.iterdir()}
        nothing_done = not before.finished and there <= {"step.json", "seen.jsonl"}
        differences = [] if nothing_done else compare(_identity(before), _identity(step))
        if nothing_done:
            step._write()  # of a run that was refused before it computed anything
        if not differences:
            step.fingerprint, step.device, step.work = before.fingerprint, before.device, before.work
            if not before.about:  # of an earlier version
                record = files.read_json(folder / "step.json")
                files.write_json(folder / "step.json", {**record, "run": home, "about": step.about})
            print(f"{name}: {'there already' if step.finished else 'begun before, goes on'} at {folder}")
            return step
        refuse_or_say(name, on_change, f"{folder} was made differently", differences)
        folder.rename(aside)  # at once, so that a kill leaves no half of a step
        shutil.rmtree(aside)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    step._write()
    print(f"{name}: new at {folder}")
    return step


def open_step(folder: Path, finished: bool = True) -> Step:
    """Open a step that another one reads.

    Raises:
        StepError: it is not there, of an earlier version, or not finished though it should be.
    """
    if not (folder / "step.json").is_file():
        raise StepError(f"no step at {folder}: run the notebook before this one first, or correct the path")
    record = files.read_json(folder / "step.json")
    step = Step(
        folder,
        record["step"],
        record["parameters"],
        record["upstream"],
        record["links"],
        {what: files.one_name(said) for what, said in record.get("about", {}).items()},  # it may be another's
        record.get("run", ""),
        fingerprint=record["fingerprint"],
        device=record["device"],
        work=record.get("work", {}),
    )
    if finished and not step.finished:
        raise StepError(f"{step.name} at {folder} is not finished: run its notebook again, it goes on where it stopped")
    if finished and not step.about:
        raise StepError(f"{folder} is of an earlier version: run its notebook again, it keeps what is there")
    return step


def _identity(step: Step) -> dict[str, object]:
    return {"step": step.name, "parameters": step.parameters, "upstream": step.upstream}


def _publish(step: Step) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import display

    text = f"{step.name} finished: {step.folder}"
    if not InteractiveShell.initialized():
        print(text)
        return
    display({MIME: {"step": step.name, "folder": str(step.folder)}, "text/plain": text}, raw=True)


def run_folder(run: str) -> Path:
    """The folder of a run, in EXPORT_ROOT.

    Raises:
        ImatchError: the run's name is none of a folder.

    >>> run_folder("demo") == settings.root("EXPORT_ROOT") / "demo"
    True
    """
    return settings.root("EXPORT_ROOT") / folder_name(run, "run")


def tagged(tag: str) -> str:
    """What a tag adds to a folder's name."""
    return f"_{folder_name(tag, 'tag')}" if tag else ""


def sides(step: Step, weight: str = "") -> tuple[Step, Step]:
    """The embeddings behind a 03_index or 04_match: of the queries, and of what they are shown.

    Args:
        step: the 03_index or 04_match.
        weight: of a 04_match, another backbone that it matches by.
    """
    query, gallery = side_folders(step, weight)
    return open_step(query), open_step(gallery)


def side_folders(step: Step, weight: str = "") -> tuple[Path, Path]:
    """The folders of `sides`, whether these are there already or not."""
    if f"query_{weight}" in step.links:
        return step.linked(f"query_{weight}"), step.linked(f"gallery_{weight}")
    of = step if "query" in step.links else open_step(step.linked("index"))
    return of.linked("query"), of.linked("gallery")


def step_folder(path: str | Path) -> Path:
    """The folder of a step, or of some: what begins with `exports/` lies in EXPORT_ROOT, wherever that is.

    >>> step_folder("exports/demo") == settings.root("EXPORT_ROOT") / "demo"
    True
    """
    first, *below = Path(path).parts or ("",)
    if first == settings.ROOTS["EXPORT_ROOT"][1]:
        path = Path(settings.root("EXPORT_ROOT"), *below)
    return settings.from_workspace(path)
