"""YAML or a manifest -> checked parameters -> papermill: the notebooks, headless, in a chain.

    imatch run params/demo.yaml -p NAME VALUE --exports DIR
    imatch run params/manifest.json

The parameters cell of each notebook is its schema. A `sweep` in the YAML expands lists into one executed notebook
per point, a manifest into one per weight, size and variant; notebooks that a point shares with another run once. A
parameter called <name>_step that nobody set is the folder of the notebook <nn>_<name> that ran before it. A notebook
with a parameter `steps` runs once, after all points, on the last step of each.
"""

from __future__ import annotations

import ast
import io
import itertools
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from pydantic import Field

from imatch.cli import manifest
from imatch.core import compute, config, files, learned, settings
from imatch.core.compute import PartDoneError
from imatch.core.rows import Json
from imatch.core.step import MIME
from imatch.core.types import ImatchError
from imatch.data import registry
from imatch.evaluation import tables
from imatch.steps import groups
from imatch.steps.groups import Option

NAMED = {
    "dataset",
    "run",
    "weight",
    "resize.mode",
    "resize.long_side",
    "resize.scale",
    "storage.cfg",
    "storage.variant",
    "storage.keep",
    "kind",
    "direction",
    "pairs",
    "tag",
}
"""Parameters that a step's folder is named by; a sweep over any other one gives its points a tag."""
MOVED = {
    "exports": "--exports DIR, or the variable EXPORT_ROOT,",
    "match_weight": "matching.weight",
    "matcher_options": "matching.options",
    "one": "a part of pairs, such as pairs one:ID,",
    "weight_set": "a part of weight, such as weight dinov3/vits16,",
}
"""Parameters that were -> what they are now; of fields of a group that have their old name the group says it."""


@dataclass(frozen=True)
class Recipe:
    """What a file asks for. Fields of groups have their whole names, such as ranking.whiten.

    Attributes:
        notebooks: in order, each with its parameters, of `schema`.
        parameters: of all of them.
        points: what each point is called by -> its own parameters, which win over those of all.
        swept: parameters that the points differ in.
    """

    notebooks: Mapping[str, Mapping[str, Option]]
    parameters: dict[str, Any]
    points: dict[str, dict[str, Any]]
    swept: Sequence[str] = ()


class _File(config.Said):
    notebooks: list[str]
    parameters: dict[str, Any] = Field({})
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    also: list[dict[str, Any]] = Field([])


def schema(notebook: Path) -> dict[str, Option]:
    """Read the cell tagged `parameters`: literals only, one a line, the trailing comment is the help.

    The fields of a group of options (`groups.GROUPS`) follow it, such as ranking.whiten.

    Raises:
        ImatchError: there is no such cell, or something in it is no literal.
    """
    found = {}
    for name, said in papermill.inspect_notebook(notebook).items():
        try:
            found[name] = Option(ast.literal_eval(said["default"]), said["help"])
        except (ValueError, SyntaxError) as error:
            raise ImatchError(f"{notebook}: parameter {name} is no literal: {said['default']}") from error
        if name in groups.GROUPS:
            found |= {f"{name}.{field}": option for field, option in groups.fields(name).items()}
    if not found:
        raise ImatchError(f"{notebook} has no parameters: tag a cell `parameters`, and write name = literal in it")
    return found


def load(path: Path, overrides: Sequence[tuple[str, str]], notebooks: Path) -> Recipe:
    """Read a YAML file or a manifest and check every name and type in it against the notebooks, before anything runs.

    Args:
        path: the file.
        overrides: (name, text) pairs from the command line; they also replace a sweep over that name, what a
            manifest says of it, and the single points that name it.
        notebooks: their folder.

    Raises:
        ImatchError: an unknown or mistyped name, with the nearest known one.
    """
    content = config.read_file(path)
    if of_manifest := manifest.is_manifest(content):
        said = _File(notebooks=manifest.ROLES[manifest.role(path)])
    else:
        said = config.checked(_File, content, f"{path}: ")
    there = {file.stem: file for file in notebooks.glob("*.ipynb")}
    for name in said.notebooks:
        if name not in there:
            raise ImatchError(f"{path}: {config.unknown('notebook', name, there)}")
    schemas = {name: schema(there[name]) for name in said.notebooks}
    known = {name: option for schema in schemas.values() for name, option in schema.items()}
    told = {name: _read(name, text, _known(name, known)) for name, text in overrides}
    given = _checked(told, known)
    if of_manifest:
        parameters, points = manifest.read(path, given.get("data_key", settings.DATA_KEY), given)
    else:
        parameters, points = said.parameters, _points(said, given, known)
    parameters = {**_checked(parameters, known), **given}
    points = {label: _checked(point, known) for label, point in points.items()}
    swept = {name for key, values in said.sweep.items() for one in values for name in _checked({key: one}, known)}
    recipe = Recipe(schemas, parameters, points, sorted(swept - given.keys()))
    defaults = {name: option.default for name, option in known.items() if name not in groups.GROUPS}
    for point in points.values():
        groups.check(_folded({**defaults, **parameters, **point}))
    return recipe


def _points(said: _File, given: Mapping[str, Json], known: Mapping[str, Option]) -> dict[str, dict[str, Json]]:
    """The combinations of a sweep and the single points beside it; one empty point without either."""
    sweep = {name: values for name, values in said.sweep.items() if name not in given}
    also = [point for point in said.also if not _checked(point, known).keys() & given.keys()]
    if any(point.get("weight") == "xfeat" for point in also) and (lacking := learned.lacking()):
        print(f"left out: weight xfeat; {lacking}")
        also = [point for point in also if point.get("weight") != "xfeat"]
    combined = itertools.product(*sweep.values()) if said.sweep or not also else ()
    points: dict[str, dict[str, Json]] = {}
    for point in [*(dict(zip(sweep, values, strict=True)) for values in combined), *also]:
        label = " ".join(f"{name}={point[name]}" for name in sweep if name in point) or "run"
        points[f"{label} ({len(points) + 1})" if label in points else label] = point
    return points


def _known(name: str, known: Mapping[str, Option]) -> Option:
    if name not in known:
        now = MOVED.get(name) or " or ".join(one for one in known if one.endswith(f".{name}"))
        if now:
            raise ImatchError(f"parameter {name} is {now} now")
        raise ImatchError(config.unknown("parameter", name, known))
    return known[name]


def _checked(values: Mapping[str, Json], known: Mapping[str, Option]) -> dict[str, Json]:
    """Values, of the types that the defaults have; fields of groups by their whole names."""
    found: dict[str, Json] = {}
    for name, value in values.items():
        wanted = _known(name, known)
        if name in groups.GROUPS:
            if not isinstance(value, Mapping):
                fields = ", ".join(one for one in known if one.startswith(f"{name}."))
                raise ImatchError(f"parameter {name} is a group of options, got {value!r}: set one of {fields}")
            found |= _checked({f"{name}.{field}": one for field, one in value.items()}, known)
        elif config.fits(value, type(wanted.default)) and not _giant(value):
            found[name] = value
        else:
            kind = type(wanted.default).__name__
            said = f"wants {kind}, such as {wanted.default!r} ({wanted.help})"
            raise ImatchError(f"parameter {name} {said}; got {value!r}")
    return found


def _giant(value: Json) -> bool:
    """Whether it is, or has in it, a number that the libraries behind the steps may not hold."""
    if isinstance(value, Mapping | list):
        return any(map(_giant, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, int | float) and abs(value) >= 2**31


def _read(name: str, text: str, wanted: Option) -> Json:
    """A value from the command line, as YAML where no text is wanted."""
    if isinstance(wanted.default, str):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ImatchError(f"parameter {name}: {text!r} is not readable: {error}") from error


def _folded(values: Mapping[str, Json]) -> dict[str, Json]:
    """The way back: what a notebook is given."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        group, dot, field = name.partition(".")
        if dot:
            found.setdefault(group, {})[field] = value
        else:
            found[name] = value
    return found


def check_chain(recipe: Recipe) -> None:
    """Refuse notebooks that read a step which none before them makes, and nobody gave: they would take the last one of
    the run, whatever it is. And data sets that are not there.

    Raises:
        ImatchError: the first such notebook, and what would do; or the first such data set.
    """
    names = list(recipe.notebooks)
    for point in recipe.points.values():
        for name, schema in recipe.notebooks.items():
            defaults = {key: option.default for key, option in schema.items()}
            values = {**defaults, **recipe.parameters, **point}
            if "dataset" in schema:
                registry.dataset(values["dataset"], values["data_key"])
            for kind in _reads(name, values):
                parameter = f"{kind[3:]}_step"
                if kind not in names[: names.index(name)] and not values[parameter]:
                    said = f"add it to notebooks, or give its folder: -p {parameter} FOLDER"
                    raise ImatchError(f"{name} reads a {kind}, and none runs before it: {said}")


def _reads(notebook: str, given: Mapping[str, Json]) -> list[str]:
    """What a notebook reads with such parameters."""
    if notebook == "04_match":
        return ["01_embed" if given["pairs"] else "03_index"]
    references = ["02_references"] if notebook == "03_index" and "reference" in given["direction"] else []
    return [*(["01_embed"] if notebook in ("02_references", "03_index") else []), *references]


def run(recipe: Recipe, notebooks: Path) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Execute the notebooks of every point; a point that fails is reported and the others go on.

    Returns:
        name of each point -> its notebooks, each with the folder of its step, and one message a failure.
    """
    finished: dict[str, dict[str, Path]] = {}
    failures: list[str] = []
    ran: dict[str, Path | str | None] = {}
    exports, in_parts = settings.root("EXPORT_ROOT"), recipe.parameters.get("compute.shard")
    together = [name for name, schema in recipe.notebooks.items() if "steps" in schema]
    each = [name for name in recipe.notebooks if name not in together]

    def done(label: str, name: str, given: Mapping[str, Json], steps: Mapping[str, Path]) -> Path | None:
        """Where its step is; it is made once for all points."""
        values = _values(recipe, name, given, steps)
        key = json.dumps([name, values], sort_keys=True)
        if key not in ran:
            print(f"== {label}: {name}", flush=True)
            ran[key] = execute(notebooks / f"{name}.ipynb", values, exports)
        if not isinstance(result := ran[key], str):
            return result
        failures.append(f"{label}: {name}: {result}")
        print(f"FAILED {failures[-1]}", file=sys.stderr, flush=True)
        return None

    for label, point in recipe.points.items() if each else ():
        steps: dict[str, Path] = {}
        for name in each:
            if in_parts and "compute.shard" not in recipe.notebooks[name]:
                print(f"== {label}: {name} has no parts, run it without --shard", flush=True)
                break
            if (folder := done(label, name, {**recipe.parameters, **point}, steps)) is None:
                break
            steps[name] = folder
        else:
            finished[label] = steps
    last = [str([*steps.values()][-1]) for steps in finished.values()]
    for name in () if in_parts else together:
        given = {"steps": last, **recipe.parameters}
        if not given["steps"]:
            failures.append(f"{name}: no finished steps to read: mend what failed above, or give some with -p steps")
        elif folder := done("all", name, given, {}):
            finished[name] = {name: folder}
    return finished, failures


def _values(recipe: Recipe, notebook: str, given: Mapping[str, Json], steps: Mapping[str, Path]) -> dict[str, Json]:
    """What a notebook is given; with a tag, where its folder needs one."""
    schema = recipe.notebooks[notebook]
    before = {f"{name[3:]}_step": str(folder) for name, folder in steps.items()}
    values = {name: value for name, value in {**before, **given}.items() if name in schema}
    differ = [name for name in recipe.swept if name in values and name not in NAMED]
    if differ and "tag" in schema:
        parts = [f"{name.rpartition('.')[2]}{values[name]}" for name in differ]
        if values.get("tag"):
            parts.insert(0, values["tag"])
        values["tag"] = files.short_name("".join(c if c.isalnum() or c in "-_.+" else "-" for c in "_".join(parts)))
    return _folded(values)


def execute(notebook: Path, values: Mapping[str, Json], exports: Path) -> Path | str | None:
    """Run one notebook by papermill and put it, executed, into its step's folder as notebook.ipynb.

    While it runs, and when it fails, it lies in <exports>/.running.

    Returns:
        The step's folder; what went wrong; or None when it did its part (`compute.do`), and others are to do theirs.
    """
    report = exports / ".running" / f"{notebook.stem}_{files.digest(dict(values))[:12]}.ipynb"
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        with files.writing(report), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # papermill's and nbclient's own
            report.parent.mkdir(parents=True, exist_ok=True)
            executed = papermill.execute_notebook(
                notebook,
                report,
                dict(values),
                kernel_name="python3",
                progress_bar=False,
                cwd=str(settings.workspace()),
                stdout_file=_Lines(sys.stdout),
                stderr_file=_Lines(sys.stderr),
                extra_arguments=["--IPKernelApp.log_level=50"],  # its words on encryption and on being stopped alarm
            )
    except (ImatchError, OSError) as error:
        return f"cannot write to {exports}: {error}; choose another folder with --exports"
    except PapermillExecutionError as error:
        if error.ename == PartDoneError.__name__:
            print(error.evalue, flush=True)
            report.unlink()
            return None
        return f"{error.ename}: {error.evalue}\n  see {report}"
    except DeadKernelError as error:
        said = "killed, or out of memory; run the same command again, it goes on where it stopped"
        return f"the notebook's process ended ({error}): {said}\n  see {report}"
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    published = [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]
    if not published:
        return f"it finished no step (its last cell must call finish)\n  see {report}"
    folder = Path(published[-1]["folder"])
    files.write_bytes(folder / "notebook.ipynb", report.read_bytes())  # the step may lie on another disk
    report.unlink()
    return folder


class _Lines(io.TextIOBase):
    """A notebook's output; where nobody watches a terminal, a bar becomes a line of the log every ten seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, -math.inf

    def write(self, text: str) -> int:
        shown = text
        if not self.stream.isatty() and text.startswith("\r"):
            now = time.monotonic()
            if now - self.last < 10 and "100%" not in text:
                return len(text)
            self.last = now
            shown = text.strip("\r\n") + "\n"
        self.stream.write(shown)
        self.stream.flush()
        return len(text)


def report(finished: Mapping[str, Mapping[str, Path]]) -> str:
    """The summary table of the points whose last step is 04_match, and where reports and pictures lie."""
    last = {label: [*steps.values()][-1] for label, steps in finished.items()}
    metrics = {
        label: files.read_json(folder / "metrics.json")
        for label, folder in last.items()
        if (folder / "pairs.jsonl").is_file()
    }
    lines = [tables.summary_table(metrics), ""] if metrics else []
    for label, steps in finished.items():
        lines.append(f"{label}:")
        lines += [f"  {name}: {folder / 'notebook.ipynb'}" for name, folder in steps.items()]
        lines += [f"  open in a browser: {page}" for page in last[label].glob("report.html")]
        lines += [f"  picture: {picture}" for picture in sorted(last[label].glob("*.png"))]
        lines += [f"  pictures of the pairs: {folder}" for folder in last[label].glob("pairs")]
    return "\n".join(lines)


def main(recipe: Path, parameters: Sequence[tuple[str, str]], exports: str, shard: str) -> int:
    """Run what a file asks for and print where its results are.

    Args:
        recipe: a YAML file or a manifest.
        parameters: (name, text) pairs, which win over the file.
        exports: EXPORT_ROOT of this run: where results go, and where paths that begin with exports/ are looked up.
        shard: "i/n", the part that is done; "" is all.

    Returns:
        0 if every point finished, 1 if one failed.

    Raises:
        ImatchError: a bad request; nothing has run.
    """
    folder = notebooks()
    if exports:
        settings.use_exports(exports)
    read = load(recipe, parameters, folder)
    check_chain(read)
    if shard and not any("compute.shard" in known for known in read.notebooks.values()):
        raise ImatchError(f"{recipe.name} has no parts: run it without --shard")
    if shard:
        read.parameters["compute.shard"] = shard
    compute.check_parts(read.parameters.get("compute.shard", ""), read.parameters.get("on_change", "refuse"))
    finished, failures = run(read, folder)
    print()
    if finished:
        print(report(finished))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def notebooks() -> Path:
    """Say where the notebooks are.

    Raises:
        ImatchError: not here.
    """
    folder = settings.from_workspace("notebooks")
    if not any(folder.glob("*.ipynb")):
        raise ImatchError(f"no notebooks in {folder.parent}: run this in a clone of imatch, whose notebooks/ it runs")
    return folder


def parameters_said(notebook: str | None = None) -> str:
    """The parameters of the notebooks as text: a line each with default and help.

    Args:
        notebook: of this one alone, such as "04_match".

    Raises:
        ImatchError: there is no such notebook.
    """
    known = {path.stem: path for path in sorted(notebooks().glob("*.ipynb"))}
    if notebook is not None and notebook not in known:
        raise ImatchError(config.unknown("notebook", notebook, known))
    lines = []
    for name in [notebook] if notebook else known:
        lines += [f"{name}:", *(f"  {key} = {p.default!r}  # {p.help}" for key, p in schema(known[name]).items()), ""]
    return "\n".join(lines).rstrip()
