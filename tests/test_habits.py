"""What holds for the whole repository."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import imatch

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "imatch").rglob("*.py"))
BIN = Path(sys.executable).parent


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_clean(command):
    done = subprocess.run([BIN / "ruff", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_notebooks_are_stripped():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    done = subprocess.run(
        [BIN / "nbstripout", "--verify", "--keep-id", *notebooks], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["faiss", "timm", "cv2", "matplotlib", "torch", "openvino"])
def test_importing_imatch_is_light(module):
    tables = "imatch.backbones, imatch.indexes, imatch.matching, imatch.sinks, imatch.references"
    code = f"import imatch, {tables}, sys; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_verbs_are_there():
    for name in imatch.__all__:
        assert getattr(imatch, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = imatch.nothing


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_only_the_registry_reads_the_environment(path):
    text = path.read_text()
    assert path.name == "registry.py" or not re.search(r"environ|getenv|Path\.cwd|os\.getcwd", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_no_bare_except_and_no_swallowed_options(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None)
        if isinstance(node, ast.FunctionDef) and node.args.kwarg and not node.name.startswith("_"):
            pytest.fail(f"{node.name} takes **{node.args.kwarg.arg}")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for scope in [tree, *classes]:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_every_dependency_is_pinned_and_used():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = [re.split(r"[=<>]", line)[0] for line in project["project"]["dependencies"]]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    assert {name for name in names if name not in pinned} == set()
    modules = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml", "ipython": "IPython"}
    text = "\n".join(path.read_text() for path in SOURCES)
    programs = {"jupyterlab"}  # used by `make lab`
    for name in set(names) - programs:
        assert re.search(rf"^\s*(import|from) {modules.get(name, name)}\b", text, re.M), f"{name} is not used"
