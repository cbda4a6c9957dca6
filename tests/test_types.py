"""What a type checker and editors know: rows by their keys, the names of `imatch`; and how little is left untyped."""

import ast
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path

import pytest

import imatch
from imatch.core import files, rows
from tests import test_golden

ROOT = Path(__file__).parents[1]
TREES = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "imatch").rglob("*.py"))}


def said(annotation):
    """The names in an annotation that say nothing: Any, object, and dict without what it holds. Text is looked into."""
    held = {id(part.value) for part in ast.walk(annotation) if isinstance(part, ast.Subscript)}
    for part in ast.walk(annotation):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield from said(ast.parse(part.value, mode="eval"))
        name = part.id if isinstance(part, ast.Name) else part.attr if isinstance(part, ast.Attribute) else ""
        if name and (name not in ("dict", "Mapping") or id(part) not in held):
            yield name


def nothing():
    """Any, object, dict and Mapping, and all names that imatch gives to what is made of them, such as
    `Row = dict[str, Any]`."""
    names = {"Any", "object", "dict", "Mapping"}
    given = [node for tree in TREES.values() for node in tree.body if isinstance(node, ast.Assign)]
    given = [node for node in given if isinstance(node.value, ast.Name | ast.Subscript | ast.BinOp)]
    while more := {
        target.id
        for node in given
        for target in node.targets
        if isinstance(target, ast.Name) and target.id not in names and names & {*said(node.value)}
    }:
        names |= more
    return names


def loose():
    """Where a signature says nothing: a line for each time."""
    names = nothing()
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                takes = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg]
                hints = [*(one.annotation for one in (*takes, node.args.kwarg) if one), node.returns]
                for hint in (hint for hint in hints if hint is not None):
                    where = f"{path.relative_to(ROOT)}:{hint.lineno} {node.name}: {ast.unparse(hint)}"
                    yield from [where] * sum(name in names for name in said(hint))


def mypy(*arguments):
    """What mypy says, by pyproject.toml; its cache is that of whoever runs it by hand."""
    done = subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.xdist_group("mypy")
def test_the_type_checker_finds_nothing():
    assert mypy().startswith("Success")


@pytest.mark.xdist_group("mypy")
def test_the_names_of_imatch_are_known(tmp_path):
    """To mypy, and so to editors: each public name with its signature, in which nothing is left open; and no other."""
    verbs = sorted([*({*imatch.__all__} - {"steps"}), *(f"steps.{name}" for name in imatch.steps.__all__)])
    probe = tmp_path / "probe.py"
    asked = [f"reveal_type(imatch.{name})" for name in verbs]
    probe.write_text("\n".join(["import imatch", *asked, "imatch.nothing"]) + "\n")
    *told, error, _ = mypy(str(probe)).splitlines()
    assert error.endswith('error: Module has no attribute "nothing"  [attr-defined]')
    assert len(told) == len(verbs)
    array = "numpy.ndarray[tuple[Any, ...], numpy.dtype[Any]]"
    open_still = [
        line
        for line in told
        if "Any" in re.sub(r"Explorer \| Any|(Mapping|dict)\[str, Any\]", "", line.replace(array, ""))
    ]
    open_still = [line for line in open_still if not line.endswith('-> tuple[Any, ...]"')]  # the groups, as asked for
    assert not open_still


def wrong(value, hint, where):
    """What of a JSON value is not as a type of `core.rows` says."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.NotRequired:
        return wrong(value, inside[0], where)
    if origin in (typing.Union, types.UnionType):
        found = [wrong(value, one, where) for one in inside]
        return [] if [] in found else found[0]
    kind = dict if typing.is_typeddict(hint) else {tuple: list, Mapping: dict, None: hint}.get(origin, origin)
    if hint is typing.Any or (kind is float and type(value) is int):
        return []
    if type(value) is not kind or (origin is tuple and len(value) != len(inside)):
        return [f"{where}: {value!r} is no {hint}"]
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        wanted = {key for key in hint.__required_keys__ if typing.get_origin(hints[key]) is not typing.NotRequired}
        found = [f"{where} lacks {key}" for key in sorted(wanted - value.keys())]
        found += [f"{where} has {key}, too" for key in sorted(value.keys() - hints)]
        return found + [it for key in value if key in hints for it in wrong(value[key], hints[key], f"{where}.{key}")]
    within = value.values() if kind is dict and origin is dict else value if kind is list else ()
    return [it for one in within for it in wrong(one, inside[-1], f"{where}[]")]


@pytest.fixture(scope="module")
def finished(few_photographs, tmp_path_factory):
    """The folders of 01_embed to 04_match, of sift."""
    exports = tmp_path_factory.mktemp("exports")
    data = test_golden.embedded(few_photographs, exports, "sift", "", {})
    references = test_golden.referenced(data, (0, 45), (1.0, 0.6))
    index = test_golden.searched(data, references)[0]
    test_golden.matched(index)
    folders = {"01": data.folder, "02": references.folder, "views": references.linked("views"), "03": index.folder}
    return folders | {"04": next(exports.glob("golden/04_match/**/pairs.jsonl")).parent}


@pytest.mark.parametrize(
    ("file", "kind"),
    {
        "01/images.jsonl": rows.PhotoRow,
        "01/skipped.jsonl": rows.PhotoRow,
        "01/seen.jsonl": rows.SeenRow,
        "02/images.jsonl": rows.PhotoRow,
        "views/references.jsonl": rows.ReferenceRow,
        "03/queries.jsonl": rows.QueryRow,
        "04/pairs.jsonl": rows.PairRow,
    }.items(),
)
def test_rows_hold_what_their_types_say(finished, file, kind):
    step, name = file.split("/")
    read = files.read_rows(finished[step] / name)
    assert read or name == "skipped.jsonl"
    assert not [it for row in read for it in wrong(row, kind, file)]


def test_figures_and_parameters_hold_what_their_types_say(finished):
    found, index = [], finished["03"]
    for step, kind in (("03", rows.SearchFigures), ("04", rows.MatchFigures)):
        metrics = files.read_json(finished[step] / "metrics.json")
        metrics = {key: value for key, value in metrics.items() if "_at_" not in key or key in kind.__annotations__}
        found += wrong(metrics, kind, step)
    for step, folder in finished.items():
        found += wrong(files.read_json(folder / "step.json")["parameters"], rows.Parameters, f"parameters of {step}")
    for row in files.read_json(index / "results.json")["queries"]:
        found += wrong(row, rows.AnswerRow, "results.json")
    for row in files.read_json(index / "stages.json"):
        found += wrong(row, rows.StageRow, "stages.json")
    assert not found


def test_what_is_no_row_is_told():
    row = json.loads('{"id": "a", "stat": [1, "2"], "problem": null, "more": 1}')
    assert [line.split(" is no")[0] for line in wrong(row, rows.SeenRow, "row")] == [
        "row lacks sha256",
        "row lacks size",
        "row has more, too",
        "row.stat[]: '2'",
    ]
