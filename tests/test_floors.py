"""The floors of the house: a room imports only from floors below its own, a plug-in never from another one."""

import ast
from pathlib import Path

import pytest

import imatch

PACKAGE = Path(imatch.__file__).parent
FLOORS = [
    {"registry", "datasets", "records", "plugins"},
    {
        "devices",
        "images",
        "store",
        "pooling",
        "geometry",
        "refine",
        "neighbours",
        "intervals",
        "calibrate",
        "positions",
        "rerank",
        "keeping",
        "components",
        "pictures",
    },
    {"runs"},
    {"backbones", "references", "indexes", "matching", "sinks", "engines"},
    {"searcher", "poses", "aligning"},
    {"evaluate", "steps", "demo", "denseft"},
    {"labels"},
    {
        "viz",
        "curves",
        "search_curves",
        "explore",
        "canvas",
        "batch",
        "manifest",
        "legacy",
        "perimage",
        "checks",
        "doctor",
        "alarms",
        "report",
        "page",
    },
]
WITHIN = {
    ("calibrate", "intervals"),
    ("refine", "geometry"),
    ("refine", "pooling"),
    ("rerank", "store"),
    ("rerank", "pooling"),
    ("keeping", "rerank"),
    ("keeping", "store"),
    ("components", "pooling"),
    ("pictures", "components"),
    ("pictures", "geometry"),
    ("pictures", "images"),
    ("pictures", "pooling"),
    ("pictures", "store"),
    ("steps", "evaluate"),
    ("explore", "viz"),
    ("explore", "canvas"),
    ("explore", "page"),
    ("page", "viz"),
    ("search_curves", "curves"),
    ("batch", "manifest"),
    ("doctor", "checks"),
    ("legacy", "perimage"),
    ("plugins", "records"),
    ("registry", "records"),
    ("registry", "plugins"),
    ("registry", "datasets"),
    ("datasets", "records"),
    ("datasets", "plugins"),
}
"""Neighbours on one floor of which the first may look at the second."""
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def imported(path):
    """Every imatch module that a file imports anywhere in it, as dotted names below imatch.

    What stands under `if __name__ == "__main__"` is a command at the door and no part of the room.
    """
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name[7:] for name in node.names if name.name.startswith("imatch."))
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            if node.module == "imatch":
                yield from (name.name for name in node.names)
            elif node.module and node.module.startswith("imatch."):
                inside = PACKAGE / node.module[7:].replace(".", "/")
                yield from (f"{node.module[7:]}.{n.name}" if inside.is_dir() else node.module[7:] for n in node.names)


def floor(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set.union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imported(path):
        below = name.split(".")[0]
        if below != room:
            allowed = floor(below) < floor(room) or (room, below) in WITHIN
            assert allowed, f"{room} (floor {floor(room)}) imports {name} (floor {floor(below)})"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parent not in (PACKAGE, PACKAGE / "steps") and p.stem != "__init__"],
    ids=lambda p: p.stem,
)
def test_plugins_know_no_other(path):
    room = path.parent.name
    for name in imported(path):
        parts = name.split(".")
        sibling = parts[0] == room and len(parts) > 1 and (path.parent / f"{parts[1]}.py").exists()
        # what belongs to a plug-in begins with its name: sift_vocabulary to sift, dinov3_weights to dinov3
        family = sibling and (path.stem.startswith(f"{parts[1]}_") or parts[1].startswith(f"{path.stem}_"))
        assert not sibling or family, f"{path.stem} imports {name}"
