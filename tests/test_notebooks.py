"""The contract of a notebook, and the same bytes from every door."""

import ast
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from imatch.cli import batch
from imatch.core import files
from imatch.steps.groups import GROUPS, fields
from imatch.viz import figures
from tests import cells
from tests.test_steps import without_times

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def statements(cell):
    """The source of a cell without imports and blank lines, one line a statement (ruff wraps long calls)."""
    return [ast.unparse(node) for node in ast.parse(cell.source).body if not isinstance(node, ast.Import)]


def test_few_short_cells(notebook):
    cells = code(notebook)
    assert 8 <= len(cells) <= 12
    assert statistics.median(len(cell.source.splitlines()) for cell in cells) <= 3
    assert max(len(statements(cell)) for cell in cells if "tags" not in cell.metadata) <= 4


def test_no_functions_and_no_loops(notebook):
    forbidden = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.For, ast.While)
    for cell in code(notebook):
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, forbidden)]


def test_a_sentence_before_each_cell(notebook):
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown"
            assert before.source.rstrip().endswith((".", "`."))


def test_one_cell_of_parameters_each_with_help(notebook, tmp_path):
    nbformat.write(notebook, tmp_path / "n.ipynb")
    schema = batch.schema(tmp_path / "n.ipynb")
    assert len(schema) >= 4
    assert all(parameter.help for parameter in schema.values())
    cell = next(cell for cell in code(notebook) if "parameters" in cell.metadata.get("tags", []))
    assert len(cell.source.splitlines()) == len([name for name in schema if "." not in name])


def test_groups_have_at_most_ten_fields():
    assert max(len(fields(group)) for group in GROUPS) <= 10


def test_starts_a_step_and_finishes_it(notebook):
    cells = code(notebook)
    assert "start_" in cells[1].source
    assert "finish" in cells[-1].source


def test_cells_have_ids_that_stay(notebook):
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert all(not cell.outputs and cell.execution_count is None for cell in code(notebook))


def arrays(exports):
    """Every file that a step made, but for the report and the file about the run itself."""
    kept = (path for path in sorted(exports.rglob("*")) if path.is_file())
    own = {"notebook.ipynb", "step.json", "seen.jsonl"}  # hold times and places
    own |= {"table.csv", "table.json", "report.html", "time.png", "recall.png"}  # show times
    return {path.relative_to(exports).as_posix(): without_times(path) for path in kept if path.name not in own}


def fingerprints(exports):
    return {
        path.relative_to(exports).as_posix(): files.read_json(path)["fingerprint"]
        for path in sorted(exports.rglob("step.json"))
        if "05_report" not in path.parts  # shows times, so it is of one run
    }


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, few_photographs):
    """A folder like the repository: notebooks, params and data/demo (two photographs)."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "data").mkdir()
    shutil.copytree(few_photographs, folder / "data" / "demo", ignore=shutil.ignore_patterns("b.png", "c.jpg"))
    for name in ("notebooks", "params"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def by_batch(workspace):
    asked = ["params/demo.yaml", "-p", "weight", "sift", "-p", "kind", "legacy", "--exports", "by_batch"]
    command = [sys.executable, "-m", "imatch", "run", *asked]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Hit@1" in done.stdout
    return workspace / "by_batch"


def test_batch_leaves_reports_with_pictures(by_batch):
    reports = sorted(by_batch.rglob("notebook.ipynb"))
    assert [path.relative_to(by_batch).parts[1] for path in reports] == [path.stem for path in NOTEBOOKS]
    for path in reports:
        outputs = [output for cell in code(nbformat.read(path, 4)) for output in cell.outputs]
        assert any("image/png" in output.get("data", {}) for output in outputs)
        assert not any(output.output_type == "error" for output in outputs)
    assert not list(by_batch.glob(".*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # papermill's own
@pytest.mark.filterwarnings("ignore::imatch.core.types.ImatchWarning")  # of two photographs there is little to tell
def test_papermill_and_a_process_without_a_kernel_give_the_same_bytes(workspace, by_batch, monkeypatch):
    """papermill where photographs come in and where a step is handed on, the cells alone from there."""
    from papermill.cli import papermill

    exports = workspace / "by_papermill"
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("EXPORT_ROOT", str(exports))
    finished = {path.relative_to(by_batch).parts[1]: path.parent for path in by_batch.rglob("notebook.ipynb")}
    step = {name: str(exports / folder.relative_to(by_batch)) for name, folder in finished.items()}
    reads = ["-p", "embed_step", step["01_embed"], "-y", "crops: [0.75, 0.5]"]
    for name, options in (("01_embed", []), ("02_references", reads)):
        papermill([f"notebooks/{name}.ipynb", f"{name}_out.ipynb", *options], standalone_mode=False)
    cells.execute("03_index", embed_step=step["01_embed"], references_step=step["02_references"])
    cells.execute("04_match", index_step=step["03_index"])
    cells.execute("05_report", steps=[step["04_match"]])
    assert arrays(exports).keys() == arrays(by_batch).keys()
    assert arrays(exports) == arrays(by_batch)
    assert fingerprints(exports) == fingerprints(by_batch)


@pytest.mark.filterwarnings("ignore::imatch.core.types.ImatchWarning")  # of two photographs there is little to tell
def test_every_notebook_run_from_the_top_finds_the_steps_of_the_demo(tmp_path, workspace, by_batch, monkeypatch):
    """From the notebook's own folder, as JupyterLab does, and the cells as they are; their pictures are there."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").symlink_to(workspace / "data")
    (tmp_path / "exports").symlink_to(by_batch)
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr(figures, "show", lambda *_: None)
    before = {path: path.read_bytes() for name in ("step.json", "metrics.json") for path in by_batch.rglob(name)}
    assert len(before) == 2 * (len(NOTEBOOKS) + 1)  # 02_references has two, of its views and of their tokens
    for path in NOTEBOOKS:
        cells.execute(path.stem)
    assert {
        path: path.read_bytes() for name in ("step.json", "metrics.json") for path in by_batch.rglob(name)
    } == before


def test_running_from_the_top_in_jupyterlab_gives_the_same_bytes(workspace, by_batch):
    """JupyterLab starts a kernel in the notebook's own folder and sends the cells as they are."""
    from nbclient import NotebookClient

    executed = nbformat.read(ROOT / "notebooks" / "01_embed.ipynb", 4)
    here = workspace / "lab"
    (here / "notebooks").mkdir(parents=True)
    (here / "data").symlink_to(workspace / "data")
    NotebookClient(executed, kernel_name="python3", resources={"metadata": {"path": str(here / "notebooks")}}).execute()
    made, expected = arrays(here / "exports"), arrays(by_batch)
    expected = {name: data for name, data in expected.items() if name.startswith("demo/01_embed/")}
    assert made == {name: data for name, data in expected.items() if "/index/" not in name}  # nobody has searched it
