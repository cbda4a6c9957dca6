"""A step's folder: started, fingerprinted, reused or refused, finished. And the loop that steps share."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

from imatch.core import files, settings
from imatch.core.config import folder_name
from imatch.core.files import compare, digest, refuse_or_say
from imatch.core.rows import Json, Parameters
from imatch.core.types import StepError

ON_CHANGE = ("refuse", "recompute")
MIME = "application/vnd.imatch.step+json"
M = TypeVar("M", bound=Mapping[str, object])
PASSING = ("step.json", "metrics.json", "seen.jsonl", "sent.json", "hits.html", "notebook.ipynb")
"""Files of a step that change when it is finished, or are sealed apart."""
APART = ("index", "rows")
"""Folders of a step whose files come and go."""
ITEMS = ("pairs", "queries")
"""Folders with files for each photograph, which no later step reads: those who open one look at it, the step when it is
asked for again, and the doctor."""
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
        sealed: of a finished one, size and SHA-256 of its files (`files.seal`); none are known of an earlier version's.
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
    sealed: dict[str, str] = field(default_factory=dict, repr=False)
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

    def damage(self, items: bool = True, again: bool = False) -> dict[str, str]:
        """What is wrong with the files of a finished step since it finished: name -> reason (`files.damage`).

        Args:
            items: look at those of `ITEMS`, too.
            again: read all of them once more; else each is read once.
        """
        if not self.finished:
            return {}
        return files.damage(self.folder, self.sealed if items else _built_on(self.sealed), again)

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

    def finish(self, metrics: M, contents: Json = None) -> M:
        """Record the metrics, last, and say where the step is (batch reads that from the notebook).

        Args:
            metrics: figures for people, tests and the summary; plain JSON.
            contents: what the results were made from beyond parameters and upstream (content hashes);
                it enters the fingerprint. None when there is nothing more.

        Returns:
            The metrics as they stand on disk. A step that was reused keeps the ones it had.
        """
        with files.alone(self.folder):
            if not self.finished:
                self.fingerprint = digest([_identity(self), contents])
                self._finish(files.json_bytes(dict(metrics)))
            record = files.read_json(self.folder / "step.json", signed=True)
            if record["links"] != self.links:  # the same inputs, moved
                files.write_signed(self.folder / "step.json", {**record, "links": self.links})
        self.fingerprint = record["fingerprint"]
        _publish(self)
        return cast("M", self.metrics)

    def _finish(self, metrics: bytes) -> None:
        for left in self.folder.rglob(".*.tmp"):  # by a kill, for nobody else is at work
            left.unlink(missing_ok=True)
        self.sealed = files.seal(self.folder, _lasting(self.folder))
        self.sealed["metrics.json"] = f"{len(metrics)} {hashlib.sha256(metrics).hexdigest()}"
        self._write(seconds=round(time.monotonic() - self.started, 3))
        files.write_bytes(self.folder / "metrics.json", metrics)
        for sealed in (self.sealed, _built_on(self.sealed)):
            files.remember(self.folder, sealed)

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
            "files": self.sealed,
        }
        files.write_signed(self.folder / "step.json", record)


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
    if any(_visible(folder)):
        before, why, differences = _found(step)
        if not differences:
            step.fingerprint, step.device, step.work = before.fingerprint, before.device, before.work
            step.sealed = before.sealed
            if not before.about:  # of an earlier version
                record = files.read_json(folder / "step.json", signed=True)
                files.write_signed(folder / "step.json", {**record, "run": home, "about": step.about})
            print(f"{name}: {'there already' if step.finished else 'begun before, goes on'} at {folder}")
            return step
        refuse_or_say(name, on_change, f"{folder} {why}", differences)
        with files.alone(folder):
            folder.rename(aside)  # at once, so that a kill leaves no half of a step
        shutil.rmtree(aside)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    step._write()
    print(f"{name}: new at {folder}")
    return step


def _found(step: Step) -> tuple[Step, str, list[str]]:
    """What is in the folder of a step that starts; why it cannot go on with that, and more of it, a line each."""
    if "step.json" not in _visible(step.folder):
        return step, "is damaged", ["gone: step.json, which says what the other files are"]
    try:
        before = open_step(step.folder, finished=False)
    except StepError as torn:
        return step, "is damaged", [str(torn)]
    if not before.finished and not _begun(step.folder):
        shutil.rmtree(step.folder / "local", ignore_errors=True)
        step._write()  # of a run that was refused before it computed anything
        return before, "", []
    if differences := compare(_identity(before), _identity(step)):
        return before, "was made differently", differences
    harmed = before.damage()
    if harmed.keys() == {"metrics.json"}:
        print(f"{step.name}: metrics.json is damaged ({harmed['metrics.json']}): the step is finished once more")
        before.unfinish()
        harmed = {}
    lines = (("gone" if why == "gone" else "changed", name, why) for name, why in harmed.items())
    return before, "is damaged", [f"{what}: {name}" + f" ({why})" * (what != why) for what, name, why in lines]


def open_step(folder: Path, finished: bool = True) -> Step:
    """Open a step that another one reads.

    Raises:
        StepError: it is not there, of an earlier version, damaged, or not finished though it should be.
    """
    if not (folder / "step.json").is_file():
        raise StepError(f"no step at {folder}: run the notebook before this one first, or correct the path")
    with files.reading(folder / "step.json"):
        record = files.read_json(folder / "step.json", signed=True)
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
            sealed=record.get("files", {}),
        )
    if finished and not step.finished:
        raise StepError(f"{step.name} at {folder} is not finished: run its notebook again, it goes on where it stopped")
    if finished and not step.about:
        raise StepError(f"{folder} is of an earlier version: run its notebook again, it keeps what is there")
    if finished and (harmed := step.damage(items=False)):
        raise StepError(f"{step.name} at {folder} is damaged: {files.damage_said(harmed)}")
    return step


def _begun(folder: Path) -> bool:
    """Whether the folder of an unfinished step holds results: of what `local` holds, only arrays are, not reasons."""
    notes = ("step.json", "seen.jsonl", "notebook.ipynb")
    below = (path for path in folder.rglob("*") if path.name not in notes and not path.name.startswith("."))
    return any(path.is_file() and (path.parent.name != "local" or path.suffix == ".npy") for path in below)


def check_planned(file: Path, there: int, planned: int, remedy: str = "delete it and run the same again") -> None:
    """Refuse to go on with other rows than were planned, those that are listed as skipped included.

    Raises:
        StepError: there are more or fewer.

    >>> check_planned(Path("rows.jsonl"), 2, 3)
    Traceback (most recent call last):
    imatch.core.types.StepError: rows.jsonl has 2 rows of 3 that were planned: delete it and run the same again
    """
    if there != planned:
        raise StepError(f"{file} has {there} rows of {planned} that were planned: {remedy}")


def _identity(step: Step) -> dict[str, Json]:
    return {"step": step.name, "parameters": cast("Json", step.parameters), "upstream": step.upstream}


def _visible(folder: Path) -> Iterator[str]:
    return (path.name for path in folder.glob("*") if not path.name.startswith("."))


def _lasting(folder: Path) -> Iterator[str]:
    """The names of a step's files without `PASSING`, `APART`, hidden ones, and pictures, which may be drawn again."""
    for path, below, names in os.walk(folder):
        top, within = path == str(folder), Path(path).relative_to(folder).as_posix()
        below[:] = sorted(name for name in below if not (name.startswith(".") or (top and name in APART)))
        for name in sorted(names):
            if not (name.startswith(".") or (top and (name in PASSING or name.endswith(".png")))):
                yield name if top else f"{within}/{name}"


def _built_on(sealed: Mapping[str, str]) -> dict[str, str]:
    return {name: was for name, was in sealed.items() if name.partition("/")[0] not in ITEMS}


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
