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


def test_importing_imatch_is_light():
    tables = ("retrieval.kinds", "matching.matchers", "export.outputs", "data.references", "cli.main")
    heavy = {"faiss", "timm", "cv2", "matplotlib", "torch", "openvino"}
    code = f"import {', '.join(f'imatch.{table}' for table in tables)}, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("tool", sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py")))
def test_tools_run_as_commands(tool):
    done = subprocess.run([sys.executable, "-m", f"tools.{tool}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().startswith("usage:")


def test_two_photographs_are_matched_without_torch(tmp_path):
    """From the files to the geometry, resized on the way; torch alone would take longer than all of it."""
    code = f"""
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from imatch.data import images
from imatch.data.rotations import UPRIGHT
from imatch.features.sift import Sift
from imatch.matching import matchers
from imatch.matching.align import Aligner
from imatch.matching.two_view import Estimator
from tools.vocabulary import dead_leaves
path = Path({str(tmp_path)!r}) / "leaves.png"
Image.fromarray(dead_leaves(np.random.default_rng(0), side=320)).save(path)
decoded = [images.decode(path, images.Resize("scale", scale=scale)) for scale in (0.8, 1.2)]
a, b = (Sift()(one.pixels[None])[0] for one in decoded)
homography = Estimator("homography")
for matcher in ("mutual", "ratio"):
    align = Aligner(matchers.create_matcher(matcher), Estimator("similarity"), homography)
    found = align([(UPRIGHT, a)], b, *(one.pixels.shape[:2] for one in decoded)).geometry
    assert found.verified, found.reason
print(sorted({{"torch", "timm", "matplotlib", "faiss"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_run_with_sift_needs_no_torch(tmp_path, monkeypatch):
    """01_embed to 04_match, by the verbs of the notebooks."""
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path))
    code = f"""
import sys
from pathlib import Path
import numpy as np
from PIL import Image
import imatch
from tools.vocabulary import dead_leaves
here = Path({str(tmp_path)!r})
(here / "leaves").mkdir()
for seed in range(3):
    Image.fromarray(dead_leaves(np.random.default_rng(seed), side=160)).save(here / "leaves" / f"{{seed}}.png")
resize, storage = imatch.Resize("scale", scale=1.5), imatch.StorageOptions(shard_size=2)
step = imatch.steps.start_embed(str(here / "leaves"), run="r", resize=resize, storage=storage)
imatch.steps.preflight(step)
imatch.steps.finish_embed(step, imatch.steps.embed(step))
index = imatch.steps.start_index(str(step.folder), direction="data-data", k=2)
query, gallery = imatch.steps.open_embeddings(index)
built = imatch.steps.build_index(index, gallery, device="cpu")
figures, checked = imatch.steps.tune_index(index, built, query), imatch.steps.check_index(built, gallery)
ranking = imatch.steps.search(index, built, query, gallery)
rows, threshold = imatch.steps.judge_index(index, query, gallery, ranking, figures)
index.finish(imatch.steps.index_metrics(index, query, gallery, ranking, rows, threshold, figures, checked))
match = imatch.steps.start_match(str(index.folder), candidates=2, outputs=["npy"])
assert imatch.steps.match_pairs(match, imatch.ComputeOptions(workers=2))
print("torch" in sys.modules, "timm" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("False False\n"), done.stdout + done.stderr


def test_public_verbs_are_there():
    for door in (imatch, imatch.steps):
        for name in door.__all__:
            assert getattr(door, name) is not None
        with pytest.raises(AttributeError, match="nothing"):
            _ = door.nothing


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_only_the_settings_read_the_environment(path):
    text = path.read_text()
    assert path.name == "settings.py" or not re.search(r"environ|getenv|Path\.cwd|os\.getcwd", text)


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
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + extras["notebooks"] + extras["dinov3"]
    names = [re.split(r"[=<>]", line)[0] for line in wanted]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    assert {name for name in names if name not in pinned} == set()
    modules = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml", "ipython": "IPython"}
    modules["lazy-loader"] = "lazy_loader"
    text = "\n".join(path.read_text() for path in SOURCES)
    for name in names:
        assert re.search(rf"^\s*(import|from) {modules.get(name, name)}\b|\"-m\", \"{name}\"", text, re.M), (
            f"{name} is not used"
        )
