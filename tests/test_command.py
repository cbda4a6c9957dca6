"""The commands of `imatch` beside match and run: what they do, and what they say to mistakes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

import imatch
from imatch.api import match
from imatch.cli import batch, doctor
from imatch.data import images
from imatch.data.store import Stored
from imatch.matching.two_view import Estimator
from tests.command import command
from tests.test_steps import embedded

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def step(few_photographs, tmp_path_factory):
    """A finished 01_embed."""
    return embedded(few_photographs, tmp_path_factory.mktemp("exports"), weight="dsift")


def test_export_writes_files_for_each_photograph(step, capsys):
    assert command("export", step.folder, "--files", "global.npy,grid.json") == 0
    assert "files written" in capsys.readouterr().out
    assert len([*step.folder.parents[3].rglob("per_image/**/*.npy")]) == len(Stored(step.folder))
    assert command("export", step.folder, "--files", "globl.npy") == 2
    assert "did you mean 'global.npy'" in capsys.readouterr().err


def test_send_wants_an_index(step, capsys):
    assert command("send", step.folder) == 2
    assert "is a 01_embed: give the folder of a 03_index" in capsys.readouterr().err
    assert command("send", step.folder.parent) == 2
    assert "no step at" in capsys.readouterr().err


@pytest.mark.parametrize(("ttl", "said"), [("inf", "a finite number"), ("nan", "a finite number"), ("-1", "than 0")])
def test_send_wants_a_time_to_live(step, monkeypatch, ttl, said, capsys):
    monkeypatch.setattr("imatch.core.step.open_step", lambda _: replace(step, name="03_index"))
    assert command("send", step.folder, "--ttl-hours", ttl) == 2
    assert f"send.ttl_hours must be {said}" in capsys.readouterr().err.replace("greater ", "")


def test_report_is_its_recipe_on_the_given_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path))
    ran = []
    monkeypatch.setattr(batch, "run", lambda recipe, *_: ran.append(recipe) or ({}, []))
    assert command("report", "exports/a, b", "exports/c", "--run", "both") == 0
    assert ran[0].parameters["steps"] == ["exports/a, b", "exports/c"]
    assert ran[0].parameters["run"] == "both"


def test_params_lists_every_parameter_with_its_help(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    assert command("params", "04_match") == 0
    assert "  candidates = 3  # hits of each query that are matched" in capsys.readouterr().out
    assert command("params", "04_mtach") == 2
    assert "did you mean '04_match'" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    for arguments in (["params"], ["run", "a.yaml"], ["report", "exports"], ["demo"]):
        assert command(*arguments) == 2
        assert "run this in a clone of imatch" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_demo_writes_its_photographs(tmp_path, capsys):
    assert command("demo", tmp_path / "demo", "--photographs") == 0
    assert capsys.readouterr().out.startswith("18 of 18 demo photographs written")
    assert command("demo", "/proc/none", "--photographs") == 2
    assert "/proc/none" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--side", "--batch-size"])
def test_weights_refuses_sizes_of_nothing(option):
    with pytest.raises(click.UsageError, match="range"):
        command("weights", option, 0)


def test_what_has_no_parts_is_refused(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert command("run", "params/report.yaml", "--shard", "0/3") == 2
    assert "report.yaml has no parts: run it without --shard" in capsys.readouterr().err


def test_a_check_of_the_doctor_that_breaks_is_a_finding():
    assert doctor.examine(lambda: int("N/A"))[0] == "FIX"


def test_an_extra_that_is_missing_is_named():
    code = (
        "import sys; sys.modules['papermill'] = None\n"
        "from imatch.cli.main import main; main(['run', 'params/demo.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "papermill is not installed: pip install 'imatch[notebooks]'" in done.stderr


def test_json_of_a_folder_is_all_that_is_printed(few_photographs, capfd):
    assert command("match", few_photographs, "--json") == 1
    assert len(json.loads(capfd.readouterr().out)["pairs"]) == 6


def test_a_folder_is_matched_alone(few_photographs, capsys):
    assert command("match", few_photographs, few_photographs / "a.png") == 2
    assert "a folder is matched alone" in capsys.readouterr().err


def test_matching_in_memory_and_04_match_have_the_same_defaults():
    wanted = {name: p.default for name, p in batch.schema(ROOT / "notebooks" / "04_match.ipynb").items()}
    estimator = Estimator(**{**match.SETTINGS["geometry"], "threshold": 3, "min_share": 0.01})
    assert match.SETTINGS["refine"] == wanted["matching.refine"]
    assert (wanted["matching.matcher"], wanted["matching.options"]) == ("auto", {}), (
        "as features.base.matcher_for has it"
    )
    for name in ("threshold", "min_share"):
        assert match.SETTINGS["geometry"][name] == wanted[f"geometry.{name}"]
    for name in ("model", "method", "confidence", "iterations", "min_inliers"):
        assert getattr(estimator, name) == wanted[f"geometry.{name}"]


@pytest.mark.parametrize("kind", ["turned", "transparent", "16 bits"])
def test_a_pillow_image_is_seen_as_its_file_is(kind, tmp_path):
    random = np.random.default_rng(0)
    if kind == "turned":
        image, exif = Image.fromarray(random.integers(0, 255, (40, 60, 3), np.uint8)), Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "a.jpg", exif=exif)
    elif kind == "transparent":
        Image.fromarray(random.integers(0, 255, (40, 60, 4), np.uint8)).save(tmp_path / "a.png")
    else:
        Image.fromarray(random.integers(0, 65535, (40, 60), np.uint16)).save(tmp_path / "a.png")
    (file,) = tmp_path.iterdir()
    from_disk = images.decode(file)
    with Image.open(file) as opened:
        in_memory = images.decode(opened)
    assert np.array_equal(in_memory.pixels, from_disk.pixels)
    assert in_memory.size == from_disk.size


def test_an_image_without_pixels_is_refused(few_photographs):
    with pytest.raises(imatch.core.types.PhotographError, match="b: no pixels"):
        imatch.match(few_photographs / "a.png", Image.new("RGB", (0, 0)))
