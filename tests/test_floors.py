"""Seven floors: a file imports from floors below its own and from its own package; packages of one floor do not know
each other, and nothing runs in a circle. There is no exception, and every import counts, wherever it stands."""

import ast
import re
from pathlib import Path

import pytest

import imatch

ROOT = Path(imatch.__file__).parents[1]
PACKAGE = ROOT / "imatch"
FLOORS = (
    ("core",),
    ("data",),
    ("features", "retrieval", "matching", "evaluation"),
    ("viz", "export"),
    ("api",),
    ("steps",),
    ("cli",),
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
PLUGIN = re.compile(r"imatch\.\w+\.\w+:\w+")
INSIDE = {name: path for name, path in FILES.items() if path.parent != PACKAGE}


def imported(path):
    """Every file of imatch that a file imports anywhere in it: at its top, in a function, for types alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "imatch")
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            if node.module and node.module.split(".")[0] == "imatch":
                whole = (f"{node.module}.{name.name}" for name in node.names)
                yield from (name if name in FILES else node.module for name in whole)


def named(path):
    """Every file of imatch that a file names in a table of plug-ins, as "imatch.package.file:Class"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and PLUGIN.fullmatch(node.value):
            yield node.value.partition(":")[0]


def package(name):
    return name.split(".")[1]


def test_no_file_lies_outside_a_package():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__"}
    assert {package(name) for name in INSIDE} == set(FLOOR)


@pytest.mark.parametrize("name", INSIDE)
def test_imports_go_down(name):
    for other in [*imported(FILES[name]), *named(FILES[name])]:
        assert other in INSIDE, f"{name} imports {other}, which is no file of a package"
        below = FLOOR[package(other)] < FLOOR[package(name)]
        assert below or package(other) == package(name), f"{name} imports {other}"


def test_nothing_runs_in_a_circle():
    arrows = {name: set(imported(path)) for name, path in INSIDE.items()}
    left = dict(arrows)
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, f"these import each other: {', '.join(left)}"


def test_the_doors_import_nothing():
    """What they list is imported when it is used."""
    assert not [*imported(PACKAGE / "__init__.py"), *imported(PACKAGE / "steps" / "__init__.py")]
    assert list(imported(PACKAGE / "__main__.py")) == ["imatch.cli.main"]


def test_only_those_that_write_steps_know_of_them():
    """Every other room takes embeddings, arrays and small types."""
    know = {name for name, path in INSIDE.items() if "imatch.core.step" in imported(path)}
    assert not {name for name in know if package(name) not in ("steps", "cli")} - {"imatch.data.store"}


def test_no_fact_is_read_from_where_a_folder_lies():
    """What a step is stands in its step.json."""
    place = re.compile(r"folder\.(parents\[|parts\[|parent\.(name|parent))")
    assert not [name for name, path in FILES.items() if place.search(path.read_text())]
