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
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

import nbformat
import yaml
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

NAMED = frozenset(
    {
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
)
"""Parameters that a step's folder is named by; a sweep over any other one gives its points a tag."""
MOVED = {
    "cfg": "storage.cfg",
    "exports": "--exports DIR, or the variable EXPORT_ROOT,",
    "index_options": "index.options",
    "match_weight": "matching.weight",
    "matcher_options": "matching.options",
    "one": "a part of pairs, such as pairs one:ID,",
    "weight_set": "a part of weight, such as weight dinov3/vits16,",
}
"""Parameters that were -> what they are now; of fields of a group that have their old name the group says it."""
UPSTREAM = ("index", "query", "gallery", "embed")
"""Links of a step to the steps it was made from."""


@dataclass(frozen=True)
class Parameter:
    """A line of a parameters cell: its default, whose type is the wanted one, and its help."""

    default: Any
    help: str


@dataclass(frozen=True)
class Recipe:
    """What a file asks for: notebooks in order, parameters for all of them, lists to sweep over, single points besides.

    A manifest has `points` in place of a sweep: what each is called by -> its parameters.
    """

    notebooks: list[str]
    parameters: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    also: list[dict[str, Any]] = field(default_factory=list)
    points: dict[str, dict[str, Any]] | None = None


class _File(config.Said):
    notebooks: list[str]
    parameters: dict[str, Any] = Field({})
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({})
    also: list[dict[str, Any]] = Field([])


def schema(notebook: Path) -> dict[str, Parameter]:
    """Read the cell tagged `parameters`: literals only, one a line, the trailing comment is the help. The fields of a
    group of options (`groups.GROUPS`) follow it, such as ranking.whiten.

    Raises:
        ImatchError: there is no such cell, or something in it is no literal.
    """
    cells = [c for c in nbformat.read(notebook, 4).cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ImatchError(f"{notebook} has {len(cells)} cells tagged `parameters`, not one")
    source = cells[0].source
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    helps = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                try:
                    found[name] = Parameter(ast.literal_eval(value), helps.get(statement.lineno, ""))
                except ValueError as error:
                    raise ImatchError(f"{notebook}: parameter {name} is no literal: {error}") from error
                for field, option in groups.fields(name).items() if name in groups.GROUPS else ():
                    found[f"{name}.{field}"] = Parameter(option.default, option.help)
            case _:
                raise ImatchError(f"{notebook}: `{ast.unparse(statement)}` is no parameter: write name = literal")
    return found


def check(name: str, value: Json, wanted: Parameter) -> Json:
    """`value` if it may stand where the parameter's default does.

    Raises:
        ImatchError: another type; the message has the parameter's help.

    >>> check("long_side", 512, Parameter(640, "pixels"))
    512
    """
    default = wanted.default
    if name in groups.GROUPS and not isinstance(value, Mapping):
        fields = ", ".join(f"{name}.{field}" for field in groups.fields(name))
        raise ImatchError(f"parameter {name} is a group of options, got {value!r}: set one of {fields}")
    if not config.fits(value, type(default)):
        said = f"wants {type(default).__name__}, such as {default!r} ({wanted.help})"
        raise ImatchError(f"parameter {name} {said}; got {value!r}")
    return value


def from_text(name: str, text: str, wanted: Parameter) -> Json:
    """A value from the command line: text stays text where text is wanted, else it is read as YAML.

    >>> from_text("angles", "[0, 90]", Parameter([0], "")), from_text("dataset", "2024", Parameter("", ""))
    ([0, 90], '2024')
    """
    if isinstance(wanted.default, str):
        return text
    try:
        return check(name, yaml.safe_load(text), wanted)
    except yaml.YAMLError as error:
        raise ImatchError(f"parameter {name}: {text!r} is not readable: {error}") from error


def load(
    path: Path, overrides: Sequence[tuple[str, str]], notebooks: Path
) -> tuple[Recipe, dict[str, dict[str, Parameter]]]:
    """Read a YAML file or a manifest and check every name and type in it against the notebooks, before anything runs.

    Args:
        path: the file.
        overrides: (name, text) pairs from the command line; they also replace a sweep over that name, what a
            manifest says of it, and the single points that name it.
        notebooks: the folder of notebooks.

    Returns:
        The recipe and the schema of each of its notebooks.

    Raises:
        ImatchError: an unknown or mistyped name, with the nearest known one.
    """
    if not path.is_file():
        raise ImatchError(f"no file {path}: give a YAML file or a manifest, such as params/demo.yaml")
    content = config.read_file(path)
    points = manifest.is_manifest(content)
    if points:
        recipe = Recipe(manifest.ROLES[manifest.role(path)])
    else:
        recipe = Recipe(**dict(config.checked(_File, content, f"{path}: ")))
    for name in recipe.notebooks:
        if not (notebooks / f"{name}.ipynb").is_file():
            known = [p.stem for p in notebooks.glob("*.ipynb")]
            raise ImatchError(f"{path}: {config.unknown('notebook', name, known)}")
    schemas = {name: schema(notebooks / f"{name}.ipynb") for name in recipe.notebooks}
    known = {name: parameter for schema in schemas.values() for name, parameter in schema.items()}

    def wanted(name: str) -> Parameter:
        if name not in known:
            now = MOVED.get(name) or " or ".join(one for one in known if one.endswith(f".{name}"))
            raise ImatchError(f"parameter {name} is {now} now" if now else config.unknown("parameter", name, known))
        return known[name]

    def checked(values: Mapping[str, Json]) -> dict[str, Json]:
        """Values, checked one by one, with the fields of groups by their whole names."""
        return {name: check(name, value, wanted(name)) for name, value in _by_field(values, wanted).items()}

    given = checked({name: from_text(name, text, wanted(name)) for name, text in overrides})
    if points:
        found = manifest.read(path, given.get("data_key", settings.DATA_KEY), given)
        recipe = Recipe(found.notebooks, found.parameters, points=found.points)
    kept = {name: values for name, values in recipe.sweep.items() if name not in given}
    sweep = {name: [check(name, value, wanted(name)) for value in values] for name, values in kept.items()}
    also = [point for point in map(checked, recipe.also) if not point.keys() & given.keys()]
    several = recipe.points and {label: checked(point) for label, point in recipe.points.items()}
    recipe = Recipe(recipe.notebooks, {**checked(recipe.parameters), **given}, sweep, also, several)
    for point in _swept(recipe).values():
        together = _folded({**recipe.parameters, **_by_field(point, wanted)})
        for name in together.keys() & groups.GROUPS.keys():
            groups.create(name, together[name])  # refuses what its fields cannot be
    return recipe, schemas


def check_chain(recipe: Recipe, schemas: Mapping[str, Mapping[str, Parameter]]) -> None:
    """Refuse notebooks that read a step which none before them makes, and nobody gave: they would take the last one of
    the run, whatever it is.

    Raises:
        ImatchError: the first such notebook, and what would do.
    """
    for point in _swept(recipe).values():
        for place, name in enumerate(recipe.notebooks):
            defaults = {key: parameter.default for key, parameter in schemas[name].items()}
            values = {**defaults, **recipe.parameters, **_by_field(point)}
            for kind in sorted({*_reads(name, values)} - {*recipe.notebooks[:place]}):
                parameter = f"{kind[3:]}_step"
                if not values[parameter]:
                    said = f"add it to notebooks, or give its folder: -p {parameter} FOLDER"
                    raise ImatchError(f"{name} reads a {kind}, and none runs before it: {said}")


def _reads(notebook: str, given: Mapping[str, Json]) -> list[str]:
    """What a notebook reads with such parameters."""
    if notebook == "04_match":
        return ["01_embed" if given["pairs"] else "03_index"]
    references = ["02_references"] if notebook == "03_index" and "reference" in given["direction"] else []
    return [*references, *(["01_embed"] if notebook in ("02_references", "03_index") else [])]


def _by_field(values: Mapping[str, Json], wanted: Callable[[str], Parameter | str] = str) -> dict[str, Json]:
    """The fields of groups by their whole names, such as ranking.whiten."""
    found: dict[str, Json] = {}
    for name, value in values.items():
        wanted(name)
        if name in groups.GROUPS and isinstance(value, Mapping):
            found.update({f"{name}.{field}": one for field, one in value.items()})
        else:
            found[name] = value
    return found


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


def points(sweep: Mapping[str, Sequence[Json]]) -> list[dict[str, Json]]:
    """All combinations of a sweep; one empty point without one.

    >>> points({"weight": ["sift", "dsift"], "scale": [1.0]})
    [{'weight': 'sift', 'scale': 1.0}, {'weight': 'dsift', 'scale': 1.0}]
    """
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def run(
    recipe: Recipe, schemas: Mapping[str, Mapping[str, Parameter]], notebooks: Path
) -> tuple[dict[str, Path], list[str]]:
    """Execute the notebooks of every point; a point that fails is reported and the others go on.

    Returns:
        name of each point -> folder of its last step, and one message a failure.
    """
    finished: dict[str, Path] = {}
    failures: list[str] = []
    ran: dict[str, Path | str | None] = {}
    exports = settings.root("EXPORT_ROOT")
    together = [name for name in recipe.notebooks if "steps" in schemas[name]]
    each = [name for name in recipe.notebooks if name not in together]
    for label, point in (_swept(recipe) if each else {}).items():
        steps: dict[str, Path] = {}
        for name in each:
            values = _values(schemas[name], {**recipe.parameters, **point}, steps, recipe.sweep)
            key = json.dumps([name, values], sort_keys=True)
            if recipe.parameters.get("compute.shard") and "compute.shard" not in schemas[name]:
                print(f"== {label}: {name} has no parts, run it without --shard", flush=True)
                break
            if key not in ran:
                print(f"== {label}: {name}", flush=True)
                ran[key] = execute(notebooks / f"{name}.ipynb", values, exports)
            result = ran[key]
            if result is None:
                break
            if isinstance(result, str):
                failures.append(f"{label}: {name}: {result}")
                print(f"FAILED {failures[-1]}", file=sys.stderr, flush=True)
                break
            steps[name] = result
        else:
            finished[label] = result
    found = [str(folder) for folder in finished.values()]
    for name in [] if recipe.parameters.get("compute.shard") else together:
        values = _values(schemas[name], {"steps": found, **recipe.parameters}, {}, {})
        if not values["steps"]:
            failures.append(f"{name}: no finished steps to read: mend what failed above, or give some with -p steps")
            continue
        print(f"== all: {name}", flush=True)
        result = execute(notebooks / f"{name}.ipynb", values, exports)
        if isinstance(result, str):
            failures.append(f"{name}: {result}")
            print(f"FAILED {failures[-1]}", file=sys.stderr, flush=True)
        else:
            finished[name] = result
    return finished, failures


def _swept(recipe: Recipe) -> dict[str, dict[str, Json]]:
    """The points of a recipe: what each is called by -> its parameters."""
    if recipe.points is not None:
        return recipe.points
    found = [*points(recipe.sweep), *recipe.also]
    return {" ".join(f"{n}={point[n]}" for n in recipe.sweep if n in point) or "run": point for point in found}


def _values(
    schema: Mapping[str, Parameter], given: Mapping[str, Json], steps: Mapping[str, Path], sweep: Mapping[str, Json]
) -> dict[str, Json]:
    values = {name: value for name, value in _by_field(given).items() if name in schema}
    for name, folder in steps.items():
        parameter = f"{name[3:]}_step"
        if parameter in schema and parameter not in values:
            values[parameter] = str(folder)
    tagged = [
        f"{name.rpartition('.')[2]}{values[name]}" for name in sorted(sweep) if name in values and name not in NAMED
    ]
    if tagged and "tag" in schema:
        text = "_".join([*([values["tag"]] if values.get("tag") else []), *tagged])
        values["tag"] = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in text)
    return _folded(values)


def execute(notebook: Path, values: Mapping[str, Json], exports: Path) -> Path | str | None:
    """Run one notebook by papermill and put it, executed, into its step's folder as notebook.ipynb.

    While it runs, and when it fails, it lies in <exports>/.running.

    Returns:
        The step's folder; what went wrong; or None when it did its part (`compute.do`), and others are to do theirs.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

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
    """Passes a notebook's output on. Where nobody watches a terminal, a bar that redraws itself becomes a line of
    the log every ten seconds."""

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


def report(finished: Mapping[str, Path]) -> str:
    """The summary table of the points whose last step is 04_match, and where reports and pictures lie."""
    matched = {label: folder for label, folder in finished.items() if (folder / "pairs.jsonl").is_file()}
    lines = []
    if matched:
        metrics = {label: files.read_json(folder / "metrics.json") for label, folder in matched.items()}
        lines = [tables.summary_table(metrics), ""]
    for label, folder in finished.items():
        lines.append(f"{label}:")
        lines += [f"  {what}: {path}" for what, path in _reports(folder)]
    return "\n".join(lines)


def _reports(folder: Path) -> Iterator[tuple[str, Path]]:
    chain = [folder]
    while True:
        links = files.read_json(chain[-1] / "step.json")["links"]
        above = [settings.from_workspace(chain[-1] / link) for name, link in links.items() if name in UPSTREAM]
        if not above:
            break
        chain.append(max(above, key=lambda step: str(files.read_json(step / "step.json")["step"])))
    for step in reversed(chain):
        yield files.read_json(step / "step.json")["step"], step / "notebook.ipynb"
    for page in folder.glob("report.html"):
        yield "open in a browser", page
    for picture in sorted(folder.glob("*.png")):
        yield "picture", picture
    if (folder / "pairs").is_dir():
        yield "pictures of the pairs", folder / "pairs"


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
    read, schemas = load(recipe, parameters, folder)
    if any(point.get("weight") == "xfeat" for point in read.also) and (lacking := learned.lacking()):
        print(f"left out: weight xfeat; {lacking}")
        read.also[:] = [point for point in read.also if point.get("weight") != "xfeat"]
    check_chain(read, schemas)
    if shard and not any("compute.shard" in known for known in schemas.values()):
        raise ImatchError(f"{recipe.name} has no parts: run it without --shard")
    if shard:
        read.parameters["compute.shard"] = shard
    compute.check_parts(read.parameters.get("compute.shard", ""), read.parameters.get("on_change", "refuse"))
    if read.points:  # all of them need it: one message in place of one each
        registry.dataset(read.parameters["dataset"], read.parameters["data_key"])
    finished, failures = run(read, schemas, folder)
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
