"""`imatch match` and `imatch.match`: two photographs, or a folder of them, as a person would ask."""

import csv
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import imatch
from imatch.core.types import ImatchError, PhotographError
from tests.command import command


@pytest.fixture
def match(photographs, monkeypatch, capsys):
    """`imatch match` among the photographs: its exit code, what it prints and what it says of errors."""
    monkeypatch.chdir(photographs)

    def run(*arguments):
        code = command("match", *arguments)
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, demo_photographs):
    """coffee.png, a rotated crop of it, another photograph, and what is no photograph."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("coffee.png", "rocket.jpg"):
        shutil.copy(demo_photographs / name, folder / name)
    turned = Image.open(folder / "coffee.png").convert("RGB").rotate(60, Image.Resampling.BICUBIC)
    turned.crop((150, 50, 450, 350)).save(folder / "part.png")
    (folder / "text.jpg").write_text("no photograph")
    Image.new("RGB", (200, 150), "grey").save(folder / "flat.png")
    return folder


def test_a_rotated_crop_is_found(photographs, tmp_path):
    asked = [sys.executable, "-m", "imatch", "match", "coffee.png", "part.png", "-o", tmp_path / "out.png"]
    done = subprocess.run(asked, cwd=photographs, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("part.png shows coffee.png: ")
    assert "rotated 60." in line or "rotated 59.9" in line
    assert "1.00 times as large" in line
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 600


def test_two_different_photographs_are_no_match(match):
    done = match("coffee.png", "rocket.jpg")
    assert (done.code, done.err) == (1, "")
    (line,) = done.out.splitlines()
    assert line.startswith("no match: ")
    assert "; try " in line


def test_json_holds_everything_and_nothing_is_written_unless_asked(match, photographs, tmp_path):
    before = sorted(photographs.iterdir())
    asked = match("coffee.png", "part.png", "--json", "-o", tmp_path / "out.json")
    said = json.loads(asked.out)
    assert said == json.loads((tmp_path / "out.json").read_text())
    assert said["verified"]
    assert said["sizes"] == [[400, 600], [300, 300]]
    found = said["correspondences"]
    assert len(found["xy_a"]) == len(found["xy_b"]) == len(found["score"]) == len(found["inlier"])
    assert sum(found["inlier"]) == said["inliers"]
    points = np.column_stack([found["xy_a"], np.ones(len(found["xy_a"]))]) @ np.array(said["matrix"]).T
    away = np.linalg.norm(points[:, :2] / points[:, 2:] - found["xy_b"], axis=1)
    assert away[np.array(found["inlier"])].max() < 3.1
    match("coffee.png", "part.png")
    assert sorted(photographs.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["coffee.png", "gone.png"], 2, "gone.png: No such file or directory"),
        (["coffee.png", "text.jpg"], 2, "text.jpg: not a photograph"),
        (["coffee.png", "coffee.png"], 0, "the same file"),
        (["coffee.png", "flat.png"], 1, "flat.png has no texture to describe"),
        (["coffee.png"], 2, "is not a folder: give two photographs, or a folder of them"),
        (["coffee.png", "part.png", "--weight", "shift"], 2, "did you mean 'sift'"),
        (["coffee.png", "part.png", "-o", "out.gif"], 2, "ends in '.gif'"),
        (["coffee.png", "part.png", "-o", "/proc/none/out.png"], 2, "cannot be written"),
    ],
)
def test_bad_input_is_one_line(match, arguments, code, said):
    done = match(*arguments)
    assert done.code == code, done.out + done.err
    (line,) = (done.out + done.err).splitlines()
    assert said in line


def test_a_folder_is_matched_with_itself_and_nothing_written_but_what_is_asked(match, photographs, tmp_path):
    before = sorted(photographs.iterdir())
    done = match(".", "-o", tmp_path / "pairs.csv")
    assert done.code == 0, done.err
    assert "1 of 6 pairs (all) of 4 photographs match" in done.out
    assert "group 1: coffee.png, part.png" in done.out
    assert "2 photographs match no other" in done.out
    assert "left out: text.jpg: not a photograph: no decoder knows its bytes" in done.out
    with (tmp_path / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["query"], row["candidate"]) for row in rows if row["verified"] == "True"] == [
        ("coffee.png", "part.png")
    ]
    assert sorted(photographs.iterdir()) == before


def test_a_folder_of_one_photograph_is_refused(match, tmp_path, photographs):
    shutil.copy(photographs / "coffee.png", tmp_path)
    (tmp_path / "part.CR2").touch()
    done = match(tmp_path)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "holds 1 that can be read; left out: 1 .cr2 (raw of a camera: " in line


def test_large_folders_are_matched_through_retrieval(monkeypatch, photographs):
    from imatch.api import folder

    monkeypatch.setattr(folder, "RETRIEVED", 2)
    monkeypatch.setattr(folder, "NEAREST", 1)
    found = folder.match_folder(photographs)
    assert found.retrieved
    assert len(found.pairs) < 6
    assert found.groups == [["coffee.png", "part.png"]]


def test_paths_arrays_and_pillow_images_are_alike(photographs):
    paths = [photographs / name for name in ("coffee.png", "part.png")]
    images = [Image.open(path).convert("RGB") for path in paths]
    found = [imatch.match(*given) for given in (paths, map(str, paths), images, map(np.asarray, images))]
    assert [one.verified for one in found] == [True] * 4
    for one in found[1:]:
        assert one.inliers == found[0].inliers
        assert np.array_equal(one.matrix, found[0].matrix)
    for one, other in ((0, 1), (2, 3)):  # those of the files are called by their names
        assert np.array_equal(found[one].picture(), found[other].picture())
    assert found[0].rotation == pytest.approx(60, abs=0.5)
    assert found[0].scale == pytest.approx(1, abs=0.01)
    assert found[0].show().axes
    assert found[0]
    assert not imatch.match(photographs / "coffee.png", photographs / "rocket.jpg")
    assert found[3].names == ("a", "b")


def test_grids_are_matched_too(photographs):
    found = imatch.match(photographs / "coffee.png", photographs / "coffee.png", weight="dsift")
    assert found.verified
    assert abs(found.rotation) < 0.1


@pytest.mark.parametrize(
    "array",
    [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)],
    ids=["grey", "four bands", "float", "empty"],
)
def test_other_arrays_are_refused(photographs, array):
    with pytest.raises(ImatchError, match=r"b is an array \(.*\) of .*: give \(h, w, 3\) uint8 RGB"):
        imatch.match(photographs / "coffee.png", array)


def test_other_things_are_refused(photographs):
    with pytest.raises(ImatchError, match="b is a int: give a path, an array or a Pillow image"):
        imatch.match(photographs / "coffee.png", 3)
    with pytest.raises(PhotographError, match=r"none\.png: No such file"):
        imatch.match(photographs / "none.png", photographs / "coffee.png")
    with pytest.raises(ImatchError, match=r"ends in '\.tif': give a path that ends in \.png or \.json"):
        imatch.match(photographs / "coffee.png", photographs / "coffee.png").save("a.tif")


@pytest.mark.parametrize("old", ["batch", "doctor", "demo", "registry", "legacy"])
def test_old_names_say_the_new_one(old):
    done = subprocess.run([sys.executable, "-m", f"imatch.{old}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"python -m imatch.{old} is `imatch " in done.stderr
    assert "Traceback" not in done.stderr


def test_matching_needs_no_torch(photographs):
    code = (
        "import sys, imatch; found = imatch.match('coffee.png', 'part.png'); assert found.verified; "
        "heavy = {'torch', 'timm', 'matplotlib', 'faiss', 'scipy', 'pandas', 'IPython'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=photographs, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
