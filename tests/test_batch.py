"""imatch.cli.batch: the schema is held before anything runs, a sweep goes on past a point that fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from imatch.cli import batch
from imatch.core import learned, settings
from imatch.core.step import step_folder
from imatch.core.types import ImatchError, ImatchWarning
from tests import cells
from tests.command import command

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"


def recipe(tmp_path, **content):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"notebooks": ["01_embed"], **content}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ({"parameters": {"wieght": "sift"}}, [], "did you mean 'weight'"),
        ({"sweep": {"resize.long_sid": [1]}}, [], "did you mean 'resize.long_side'"),
        ({"also": [{"wieght": "sift"}]}, [], "did you mean 'weight'"),
        ({"also": {"weight": "sift"}}, [], r"also must be a valid list"),
        ({}, [("wieght", "sift")], "did you mean 'weight'"),
        ({"parameters": {"resize": {"long_side": "640"}}}, [], "resize.long_side wants int"),
        ({"parameters": {"resize.scale": True}}, [], "resize.scale wants float"),
        ({"parameters": {"dataset": 2024}}, [], "dataset wants str"),
        ({}, [("resize.long_side", "large")], "resize.long_side wants int"),
        ({}, [("resize.long_side", "0")], "resize.long_side must be greater than 0"),
        ({"sweep": {"storage.keep": ["int8", "int9"]}}, [], "storage.keep must be .* 'int8', .* got 'int9'"),
        ({"notebooks": ["03_index"]}, [("ranking", "{whitn: 64}")], "did you mean 'ranking.whiten'"),
        ({"parameters": {"run": "../../x"}}, [], r"run '\.\./\.\./x': it becomes the name of a folder"),
        ({}, [("run", "")], "run '': it becomes the name of a folder"),
        ({}, [("tag", "a\nb")], "tag .* becomes the name of a folder"),
        ({"also": [{"storage": {"cfg": "NUL"}}]}, [], "cfg 'NUL': it becomes the name of a folder.*device of Windows"),
        ({"sweep": {"weight": ["sift", "sfit"]}}, [], "unknown weight 'sfit': did you mean 'sift'"),
        ({}, [("weight", "dinov3/vits17")], "unknown weight 'vits17': did you mean 'vits1"),
        ({}, [("backbone_options", "{max_keypoints: 0}")], "max_keypoints must be greater than 0, got 0"),
        ({}, [("compute.batch_size", "0")], "compute.batch_size must be greater than 0, got 0"),
        ({}, [("compute.batch_size", "9" * 30)], "compute.batch_size wants int, .*; got 9"),
        ({}, [("backbone_options", "{max_keypoints: 99999999999}")], "backbone_options wants dict"),
        ({}, [("compute.devices", "cuda:0,gpu")], "device 'gpu' is not known: use auto"),
        ({}, [("compute.shard", "5/3")], "shard '5/3' is no i/n"),
        ({}, [("max_skipped", "5")], "max_skipped must be less than or equal to 1, got 5"),
        ({}, [("max_skipped", ".nan")], "max_skipped wants float"),
        ({}, [("on_error", "ignore")], "on_error must be 'skip' or 'stop', got 'ignore'"),
        ({}, [("on_change", "no")], "on_change must be 'refuse' or 'recompute'"),
        ({}, [("files", "[globl.npy]")], "got 'globl.npy': did you mean 'global.npy'"),
        ({}, [("image_groups", "[{foldr: a}]")], "did you mean 'folder'"),
        ({"notebooks": ["02_references"]}, [("angles", "[.nan]")], r"angles\[0\] must be a finite number"),
        ({"notebooks": ["02_references"]}, [("angles", "[]")], "at least 1 item"),
        ({"notebooks": ["02_references"]}, [("crops", "[2]")], r"crops\[0\] must be less than or equal to 1, got 2"),
        ({"notebooks": ["02_references"]}, [("kind", "legcy")], "did you mean 'legacy'"),
        ({"notebooks": ["02_references"]}, [("quality", "101")], "quality must be less than or equal to 100, got 101"),
        ({"notebooks": ["03_index"]}, [("direction", "data-dta")], "did you mean 'data-data'"),
        ({"notebooks": ["03_index"]}, [("k", "0")], "k must be greater than 0, got 0"),
        ({"notebooks": ["03_index"]}, [("send.ttl_hours", ".inf")], "send.ttl_hours wants float, .*; got inf"),
        ({"notebooks": ["03_index"]}, [("truth.radius", "-1")], "truth.radius must be greater than 0"),
        ({"notebooks": ["03_index"]}, [("truth.labels", "none.csv")], r"none.csv cannot be read \(no such file\)"),
        ({"notebooks": ["04_match"]}, [("matching.matcher", "mutul")], "did you mean 'mutual'"),
        ({"notebooks": ["01_embed", "04_match"]}, [("matching.weight", "xfaet")], "did you mean 'xfeat'"),
        ({"notebooks": ["01_embed", "04_match"]}, [("matching.options", "{max_ratio: 2.0}")], "max_ratio must be"),
        ({"notebooks": ["04_match"]}, [("geometry.model", "homgraphy")], "did you mean 'homography'"),
        ({"notebooks": ["04_match"]}, [("outputs", "[[png]]")], r"outputs\[0\] must be .* got \['png'\]"),
        ({"notebooks": ["04_match"]}, [("pairs", "al")], "unknown pairs 'al': did you mean 'all'"),
        ({"notebooks": ["03_index"]}, [("index", "flat")], "index is a group of options.*set one of index.kind"),
        ({"notebooks": ["04_match"]}, [("min_inliers", "9")], "min_inliers is geometry.min_inliers now"),
        (
            {"notebooks": ["03_index", "04_match"]},
            [("rotations", "8")],
            "is ranking.rotations or matching.rotations now",
        ),
        ({"notebooks": ["04_match"]}, [("one", "a.jpg")], "one is a part of pairs"),
        ({}, [("exports", "here")], "exports is --exports DIR"),
        ({}, [("backbone_options", "{a: [")], "is not readable"),
        ({"sweep": {"weight": "sift"}}, [], r"sweep\.weight must be a valid list"),
        ({"sweep": {"weight": []}}, [], r"sweep\.weight: List should have at least 1 item"),
        ({"parameters": ["a"]}, [], "parameters must be a valid dictionary"),
        ({"notebooks": "01_embed"}, [], "notebooks must be a valid list"),
        ({"sweeps": {}}, [], "did you mean 'sweep'"),
        ({"notebooks": ["01_embd"]}, [], "did you mean '01_embed'"),
    ],
    ids=str,
)
def test_wrong_names_types_and_values_are_refused(tmp_path, content, overrides, message):
    with pytest.raises(ImatchError, match=message):
        batch.load(recipe(tmp_path, **content), overrides, NOTEBOOKS)


@pytest.mark.parametrize("content", ["", "[]", "parameters: {}", "a: ["])
def test_files_that_are_no_recipe(tmp_path, content):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ImatchError, match=r"must be a valid dictionary|notebooks is missing|is no YAML"):
        batch.load(tmp_path / "recipe.yaml", [], NOTEBOOKS)
    with pytest.raises(ImatchError, match="no file"):
        batch.load(tmp_path / "absent.yaml", [], NOTEBOOKS)


def test_single_points_stand_beside_a_sweep(tmp_path):
    also = [{"weight": "xfeat", "resize.scale": 0.5}]
    path = recipe(tmp_path, sweep={"weight": ["sift", "dsift"]}, also=also)
    swept = {f"weight={weight}": {"weight": weight} for weight in ("sift", "dsift")}
    both = {**swept, "weight=xfeat": also[0]}
    assert batch.load(path, [], NOTEBOOKS).points == both
    assert batch.load(path, [("resize.long_side", "64")], NOTEBOOKS).points == both
    assert batch.load(path, [("weight", "sift")], NOTEBOOKS).points == {"run": {}}


def test_no_point_takes_the_place_of_another(tmp_path):
    also = [{"weight": "dsift"}, {"weight": "dsift", "resize.scale": 0.5}]
    read = batch.load(recipe(tmp_path, sweep={"weight": ["sift"]}, also=also), [], NOTEBOOKS)
    assert list(read.points.values()) == [{"weight": "sift"}, *also]
    assert [*batch.load(recipe(tmp_path, also=also), [], NOTEBOOKS).points.values()] == also


def test_without_the_extra_xfeat_is_left_out_and_said(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(batch, "run", lambda read, _: asked.append(read) or ({}, []))
    path = recipe(tmp_path, also=[{"weight": "xfeat"}])
    given = [("dataset", str(tmp_path))]
    assert batch.main(path, given, "", "") == 0
    assert "left out" not in capsys.readouterr().out
    monkeypatch.setattr(learned, "lacking", lambda: "xfeat is not installed: so and so")
    assert batch.main(path, given, "", "") == 0
    assert "left out: weight xfeat; xfeat is not installed: so and so" in capsys.readouterr().out
    assert [read.points for read in asked] == [{"run": {"weight": "xfeat"}}, {"run": {}}]


def test_command_line_wins_over_file_and_sweep(tmp_path):
    path = recipe(tmp_path, parameters={"resize": {"scale": 2}}, sweep={"weight": ["sift", "dsift"]})
    read = batch.load(path, [("weight", "dsift"), ("resize.scale", "0.5"), ("dataset", "007")], NOTEBOOKS)
    assert read.parameters == {"resize.scale": 0.5, "weight": "dsift", "dataset": "007"}
    assert read.points == {"run": {}}


SHIPPED = sorted([*(ROOT / "params").glob("*.yaml"), *(ROOT / "params").glob("manifest*.json")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_and_manifests_are_right(monkeypatch, path):
    monkeypatch.chdir(ROOT)
    read = batch.load(path, [], NOTEBOOKS)
    assert read.notebooks
    assert read.points


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """What would have been run, from a project whose own exports are elsewhere."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("EXPORT_ROOT", "elsewhere")
    monkeypatch.setenv("DATASET_ROOT", str(tmp_path))
    (tmp_path / "survey" / "flight01_80m").mkdir(parents=True)
    (tmp_path / "data" / "demo").mkdir(parents=True)
    recipes = []
    monkeypatch.setattr(batch, "run", lambda recipe, *_: recipes.append(recipe) or ({}, []))
    return recipes


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_recipe_takes_exports_and_run(ran, tmp_path, path):
    given = ("-p", "dataset", "data/demo") if path.suffix == ".yaml" else ()
    if path.name == "search.yaml":
        given = ("-p", "embed_step", "a", "-p", "references_step", "b")
    if path.name == "report.yaml":
        given = ()
    assert command("run", path, "--exports", tmp_path / "results", "-p", "run", "mine", *given) == 0
    assert settings.root("EXPORT_ROOT") == tmp_path / "results"
    assert step_folder("exports/demo") == tmp_path / "results" / "demo"
    assert ran[0].parameters["run"] == "mine"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"notebooks": ["02_references"]}, "02_references reads a 01_embed, and none runs before it"),
        ({"notebooks": ["01_embed", "03_index"]}, "03_index reads a 02_references.*-p references_step FOLDER"),
        ({"notebooks": ["01_embed", "04_match"]}, "04_match reads a 03_index"),
        ({"notebooks": ["01_embed", "03_index"], "parameters": {"direction": "data-data"}}, None),
        ({"notebooks": ["01_embed", "04_match"], "parameters": {"pairs": "all"}}, None),
        ({"notebooks": ["04_match"], "parameters": {"index_step": "exports/r"}}, None),
    ],
)
@pytest.mark.usefixtures("ran")
def test_a_recipe_reads_no_other_run_s_steps(tmp_path, content, said, capsys):
    assert command("run", recipe(tmp_path, **content)) == (2 if said else 0)
    assert not said or re.search(said, capsys.readouterr().err)


@pytest.mark.usefixtures("ran")
def test_data_sets_that_are_not_there_are_refused_before_anything_runs(tmp_path, capsys):
    content = {"sweep": {"dataset": ["data/demo", "absent"]}}
    assert command("run", recipe(tmp_path, **content)) == 2
    assert re.fullmatch("error: dataset folder .*absent.* does not exist: .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("line", ["a = f()", "a = b", "import os", "a = 1; del a", "a, b = 1, 2"])
def test_parameters_are_literals(tmp_path, line):
    notebook = nbformat.read(NOTEBOOKS / "01_embed.ipynb", 4)
    notebook.cells = [nbformat.v4.new_code_cell(line, metadata={"tags": ["parameters"]})]
    nbformat.write(notebook, tmp_path / "n.ipynb")
    with pytest.raises(ImatchError, match=r"is no literal|has no parameters"):
        batch.schema(tmp_path / "n.ipynb")


def test_swept_parameters_that_name_no_folder_become_its_tag(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(batch, "execute", lambda notebook, values, _: given.append(values) or tmp_path / notebook.stem)
    sweep = {"k": [5, 10], "weight": ["sift"], "resize.scale": [0.5], "resize.limit": [640]}
    sweep |= {"ranking": [{}, {"whiten": 2}]}
    read = batch.load(recipe(tmp_path, notebooks=["01_embed", "03_index"], sweep=sweep), [], NOTEBOOKS)
    batch.run(read, NOTEBOOKS)
    tags = [f"k{k}{whitened}" for k in (5, 10) for whitened in ("", "_whiten2")]
    assert [values.get("tag") for values in given] == ["limit640", *tags]


def test_a_request_that_is_wrong_exits_with_2_and_makes_nothing(tmp_path):
    asked = ["imatch", "run", "params/demo.yaml", "-p", "wieght", "sift", "--exports", str(tmp_path / "exports")]
    done = subprocess.run([sys.executable, "-m", *asked], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'weight'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "exports").exists()


def test_points_that_fail_are_reported_and_the_others_go_on(tmp_path, few_photographs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    content = {
        "parameters": {"dataset": str(few_photographs)},
        "sweep": {"weight": ["dsift"], "resize.scale": [0.5]},
        "also": [{"dataset": str(tmp_path)}],  # without photographs
    }
    assert command("run", recipe(tmp_path, **content), "--exports", tmp_path / "exports") == 1
    said = capsys.readouterr().err
    failed = [line for line in said.splitlines() if line.startswith("FAILED")]
    assert {line.split(":")[0] for line in failed} == {"FAILED run"}
    assert all("no photographs in" in line for line in failed)
    assert [path.parent.name for path in (tmp_path / "exports").rglob("metrics.json")] == ["scale0p5_raw"]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("", "no dataset given"), ("absent", "does not exist"), ("empty", "no photographs in"), ("file.txt", "is a file")],
)
def test_a_folder_that_is_not_there_gives_a_message(tmp_path, dataset, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ImatchError, match=message):
        cells.execute("01_embed", dataset=str(tmp_path / dataset) if dataset else "")


def test_names_that_are_hard_to_draw_go_through_every_notebook(tmp_path, few_photographs, monkeypatch):
    """01_embed in a kernel, whose messages and whose notebook hold the names, too."""
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "한글 폴더"
    folder.mkdir()
    for name, source in {b"a$_$b.png": "a.png", b"caf\xe9.png": "b.png", "커피 잔.jpg".encode(): "c.jpg"}.items():
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes((few_photographs / source).read_bytes())
    exports = tmp_path / "exports"
    assert command("run", recipe(tmp_path), "-p", "dataset", folder, "--exports", exports) == 0
    assert list(exports.rglob("01_embed/**/notebook.ipynb"))
    cells.execute("02_references", angles=[90], crops=[1.0], kind="isometric")
    cells.execute("03_index")
    cells.execute("04_match", candidates=1)
    assert len(list(exports.rglob("pairs/*/00.png"))) == 3


def test_one_photograph_with_nothing_to_match_goes_through_every_notebook(tmp_path, few_photographs, monkeypatch):
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path / "exports"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes((few_photographs / "a.png").read_bytes())
    cells.execute("01_embed", dataset=str(tmp_path / "one"))
    cells.execute("02_references", angles=[0], kind="isometric", crops=[1.0, 0.75])
    with pytest.warns(ImatchWarning, match="no query has a right answer"):
        cells.execute("03_index", direction="data-data")
    matched = cells.execute("04_match", outputs=["json"])
    assert matched["metrics"]["queries"] == 1
    assert matched["step"].finished


def test_exports_that_are_a_file_give_a_message(tmp_path, few_photographs, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (tmp_path / "exports").write_text("")
    given = ["-p", "dataset", few_photographs, "--exports", tmp_path / "exports"]
    assert command("run", "params/folder.yaml", *given) == 1
    said = capsys.readouterr().err
    assert "cannot write to" in said
    assert "Traceback" not in said


def test_a_manifest_without_its_photographs_is_refused_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATASET_ROOT", str(tmp_path / "nowhere"))
    assert command("run", "params/manifest.json", "--exports", tmp_path) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "its folder" in said
    assert "set DATASET_ROOT" in said
