"""04_match on lists of pairs: all, ordered, one, a CSV; what is refused, what goes on, what is exported."""

import csv
import itertools
import json
import shutil
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imatch
from imatch.core import files
from imatch.core.step import open_step
from imatch.core.types import ImatchError, ImatchWarning, StepError
from imatch.data.pairs import pair_path
from imatch.data.store import Stored
from imatch.steps import match, report
from imatch.viz import figures
from tests import grouped
from tests.command import command
from tests.grouped import by
from tests.test_images import STORED, orientation
from tests.test_resume import assert_same
from tests.test_steps import embedded, matched, referenced

ROOT = Path(__file__).parents[1]
IDS = ["a.png", "b.png", "c.jpg", "flight 1/d.png"]


@pytest.fixture(scope="module")
def photographs(few_photographs, tmp_path_factory):
    """The four photographs and one that is broken."""
    folder = tmp_path_factory.mktemp("photographs") / "photographs"
    shutil.copytree(few_photographs, folder)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def data(photographs, tmp_path_factory):
    """A finished 01_embed of them."""
    with pytest.warns(ImatchWarning, match="1 of 5 photographs were skipped"):
        return embedded(photographs, tmp_path_factory.mktemp("exports"), max_skipped=0.5)


Index = namedtuple("Index", "folder")
NO_INDEX = Index("")


def listed(data, pairs, **given):
    """A 04_match of a list: the step, its rows, its metrics."""
    given = {"outputs": ["npy"], "embed_step": str(data.folder), "pairs": str(pairs), **given}
    return matched(NO_INDEX, **given)


def named(rows):
    return [(row["query"], row["candidate"]) for row in rows]


def write_list(folder, *pairs, header=("query", "candidate"), name="list.csv"):
    path = folder / name
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *pairs])
    return path


# --- what is matched with what ----------------------------------------------------------------------------


def test_all_pairs_come_once(data):
    step, rows, metrics = listed(data, "all")
    assert sorted(named(rows)) == sorted(itertools.combinations(IDS, 2))
    assert step.folder.name == "pairs-all"
    assert step.folder.parts[-5:-1] == ("04_match", "photographs", "sift", "scale1_raw")
    assert (metrics["pairs"], metrics["queries_skipped"]) == (6, 1)


def test_ordered_pairs_come_in_both_directions_best_first(data):
    _, rows, _ = listed(data, "ordered")
    assert sorted(named(rows)) == sorted(itertools.permutations(IDS, 2))
    vectors = dict(zip(IDS, np.asarray(Stored(data.folder).vectors), strict=True))
    for _, of_query in itertools.groupby(rows, lambda row: row["query"]):
        of_query = list(of_query)
        assert [row["rank"] for row in of_query] == [0, 1, 2]
        assert sorted(row["reranked"] for row in of_query) == [0, 1, 2]
        scores = [row["score"] for row in of_query]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx(
            [vectors[row["query"]] @ vectors[row["candidate"]] for row in of_query], abs=1e-5
        )


def test_one_against_all_others(data):
    step, rows, _ = listed(data, "one:flight 1/d.png")
    assert sorted(named(rows)) == [("flight 1/d.png", id) for id in IDS[:3]]
    assert step.folder.name == "pairs-one-flight 1__d.png"


def test_a_csv_says_which(data, tmp_path, capsys):
    path = write_list(
        tmp_path,
        ("c.jpg", "a.png"),
        ("a.png", "b.png"),
        ("a.png", "broken.png"),
        ("c.jpg", "a.png"),
        ("b.png", "b.png"),
    )
    step, rows, metrics = listed(data, path)
    assert named(rows) == [("a.png", "b.png"), ("b.png", "b.png"), ("c.jpg", "a.png")]
    assert "1 pairs are left out, for a photograph was skipped: a.png and broken.png" in capsys.readouterr().out
    assert step.folder.name == "pairs-csv-list"
    itself = rows[1]
    assert itself["right"]
    assert itself["verified"]
    assert np.allclose(np.array(itself["matrix"]) / itself["matrix"][2][2], np.eye(3), atol=1e-3)
    assert metrics["pairs_verified"] == 1


def test_photographs_against_their_references_know_the_truth(few_photographs, tmp_path):
    data = embedded(few_photographs, tmp_path)
    _, references = referenced(data)
    step, rows, metrics = listed(data, "all", gallery_step=str(references.folder))
    assert len(rows) == 4 * 8
    assert step.folder.name == "pairs-all_isometric"
    assert metrics["true_pairs"] == 8
    assert metrics["true_corner_error_median"] < 0.5
    assert {row["right"] for row in rows if not row["has_truth"]} == {None}


def test_what_nobody_knows_is_none_and_tables_and_figures_cope(data):
    step, rows, metrics = listed(data, "all", outputs=["npy", "png"], tag="shown")
    assert all(row["right"] is row["accepted"] is None for row in rows)
    for name in ("hit_at_1", "reranked_hit_at_1", "wrong_verified", "verified_right", "true_within_8px"):
        assert metrics[name] is None, name
    figure = figures.match_summary(rows, metrics)
    assert "nobody knows whether right (6)" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert figures.pair_sheet(step.folder, rows).axes[0].images
    loaded = imatch.steps.open_match(step).pair(rows[0])
    assert len(loaded.matches) == rows[0]["matches"]
    assert [path.name for path in loaded.paths] == [Path(id).name for id in named(rows)[0]]
    with pytest.raises(StepError, match="matched a list"):
        report.chain(step)


def test_drone_frames_that_overlap_verify_and_others_do_not(brighton_beach, tmp_path):
    """Real parallax over woods, by the defaults; who overlaps is told by GPS."""
    with (brighton_beach / "pairs.csv").open(newline="") as file:
        labels = {(row["query"], row["candidate"]): row["label"] for row in csv.DictReader(file)}
    asked = [pair for name in ("neighbour", "further") for pair in labels if labels[pair] == name]
    asked += [pair for pair in labels if labels[pair] == "none"][::2]
    _, rows, _ = listed(embedded(brighton_beach, tmp_path), write_list(tmp_path, *asked), outputs=[])
    found = Counter(labels[row["query"], row["candidate"]] for row in rows if row["verified"])
    assert found["neighbour"] >= 16
    assert found["further"] >= 28
    assert found["none"] == 0


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "given", "message"),
    [
        ("al", {}, "did you mean 'all'.* or the path of a CSV"),
        ("one:a.jpg", {}, r"unknown photograph.*did you mean 'c\.jpg'"),
        ("one:broken.png", {}, "which was skipped"),
        ("one", {}, "unknown photograph"),
        ("all", {"matcher_options": {"device": "auto"}}, "matching.options.device is auto, but .* on the CPU"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused_before_anything_is_written(data, pairs, given, message):
    before = sorted(data.folder.parents[4].rglob("*"))
    with pytest.raises(ImatchError, match=message):
        listed(data, pairs, **given)
    assert sorted(data.folder.parents[4].rglob("*")) == before


@pytest.mark.parametrize(
    ("lines", "header", "message"),
    [
        (
            [("a.png", "b.jpg"), ("x", "b.jpg"), ("y", "a.png")],
            ("query", "candidate"),
            r"2 unknown ids, 'x' \(line 3\), 'y'",
        ),
        ([("a.png", "b.jpg")], ("query", "candidate"), r"1 unknown ids, 'b\.jpg' \(line 2\): .*did you mean 'c\.jpg'"),
        ([("a.png", "b.png")], ("query", "id"), "no column 'candidate'"),
        ([("a.png", "broken.png")], ("query", "candidate"), "holds no pair"),
    ],
    ids=["unknown", "nearest", "columns", "empty"],
)
def test_a_wrong_csv_is_refused(data, tmp_path, lines, header, message):
    with pytest.raises(ImatchError, match=message):
        listed(data, write_list(tmp_path, *lines, header=header))


def test_a_changed_csv_is_refused(data, tmp_path):
    listed(data, write_list(tmp_path, ("a.png", "b.png"), name="changed.csv"))
    with pytest.raises(StepError, match=r"upstream\.pairs"):
        listed(data, write_list(tmp_path, ("a.png", "c.jpg"), name="changed.csv"))


def test_what_cannot_fit_is_refused_before_it_starts(data, monkeypatch, capsys):
    monkeypatch.setattr(match, "MANY", 6)
    step, *_ = listed(data, "all", tag="fits")
    assert "6 pairs to match\nabout 0.0 GB (npy 0.0, rows 0.0)" in capsys.readouterr().out
    free = namedtuple("Free", "free")(10)
    monkeypatch.setattr(match.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ImatchError, match=r"6 pairs take about .* of disk"):
        listed(data, "all", tag="full")
    assert not (step.folder.with_name("pairs-all_full") / "pairs").exists()


# --- going on ---------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_with_the_same_bytes(data, tmp_path, monkeypatch):
    """Blocks of two pairs: of a query, those that are there stay and the others are matched."""
    monkeypatch.setattr(match, "BLOCK", 2)
    outputs = ["json", "csv", "npy", "png"]
    step, rows, _ = listed(data, "ordered", outputs=outputs, tag="killed")
    whole = tmp_path / "whole"
    shutil.copytree(step.folder, whole)
    first = step.folder / "pairs" / "a.png"
    assert sorted(path.name for path in first.glob("*.jsonl")) == ["00000.jsonl", "00002.jsonl"]
    for path in (step.folder / "metrics.json", step.folder / "pairs.jsonl", *first.glob("*2.*")):
        path.unlink()
    (first / ".02.npy.1.tmp").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in step.folder.rglob("*.npy")}
    again, same, _ = listed(data, "ordered", outputs=outputs, tag="killed")
    assert same == rows
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same(again.folder, whole)


def test_workers_change_no_byte(data):
    step, rows, _ = listed(data, "all", tag="alone", outputs=["json", "npy"])
    other = grouped.start_match(
        "",
        pairs="all",
        embed_step=str(data.folder),
        tag="together",
        **step.parameters["geometry"],
        outputs=step.parameters["outputs"],
        **{key: step.parameters["looks"][0][key] for key in ("matcher", "matcher_options")},
        candidates=1,
    )
    assert imatch.steps.match_pairs(other, resources=by(workers=2)) == rows
    assert_same(other.folder / "pairs", step.folder / "pairs")


# --- what is written --------------------------------------------------------------------------------------


def test_json_holds_all_that_is_known_of_a_pair(tmp_path, few_photographs):
    data = embedded(few_photographs, tmp_path, weight="dsift", resize=imatch.Resize("long_side", long_side=128))
    options = {"rotations": 1, "matcher_options": {"min_similarity": 0.5}}  # a rotated grid is none
    step, rows, _ = listed(data, "all", outputs=["json", "npy"], **options)
    row = max(rows, key=lambda row: row["matches"])
    path = pair_path(step.folder, row)
    found, table = json.loads(path.with_suffix(".json").read_text()), np.load(path.with_suffix(".npy"))
    assert found["weight"] == "dsift"
    assert (
        found["settings"]["matcher_options"] | {"min_similarity": 0.5, "k": 1} == found["settings"]["matcher_options"]
    )
    assert found["settings"]["geometry"]["threshold"] == row["threshold"]
    assert found["time_ms"] > 0
    patch = found["patch"]
    assert [patch["n_a"], patch["n_b"]] == row["descriptors"]
    assert np.prod(patch["grid_a"]) == patch["n_a"]
    assert patch["n_selected_a"] == patch["n_selected_b"] == row["matches"] > 0
    assert patch["idx_a"] == table["index_a"].tolist()
    assert patch["idx_b"] == table["index_b"].tolist()
    assert patch["similarities"] == pytest.approx(table["similarity"].tolist(), abs=1e-6)
    assert np.allclose(found["xy_a"], table["xy_a"], atol=1e-3)
    assert np.allclose(found["xy_b"], table["xy_b"], atol=1e-3)
    assert found["inliers_mask"] == table["inlier"].tolist()
    assert len(files.line(row)) < 2000


def test_csv_has_a_row_a_correspondence(data):
    step, rows, _ = listed(data, "all", outputs=["csv", "npy"], tag="csv")
    path = pair_path(step.folder, rows[0])
    with path.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    table = np.load(path.with_suffix(".npy"))
    assert len(lines) == rows[0]["matches"] > 0
    for line, wanted in zip(lines, table, strict=True):
        assert [float(line[name]) for name in ("x_a", "y_a")] == pytest.approx(wanted["xy_a"].tolist(), abs=1e-3)
        assert [float(line[name]) for name in ("x_b", "y_b")] == pytest.approx(wanted["xy_b"].tolist(), abs=1e-3)
        assert bool(int(line["inlier"])) == wanted["inlier"]


def read_keypoints(path):
    """COLMAP's text of features, read by its definition: a line of counts, then x, y, scale, orientation, bytes."""
    count, dimension = map(int, path.read_text().splitlines()[0].split())
    numbers = np.loadtxt(path, skiprows=1, ndmin=2)
    assert numbers.shape == (count, 4 + dimension) == (count, 132)
    assert ((numbers[:, 4:] >= 0) & (numbers[:, 4:] <= 255)).all()
    return numbers[:, :2]


def read_matches(path):
    """COLMAP's list of matches: blocks that end with an empty line, each two names and rows of two indices."""
    blocks = (block.splitlines() for block in path.read_text().split("\n\n") if block)
    return {tuple(head.split(" ")): np.array([line.split() for line in lines], int) for head, *lines in blocks}


def test_colmap_is_read_back_to_the_same_correspondences(data):
    with pytest.warns(ImatchWarning, match="1 photographs are not in .*'flight 1/d.png'"):
        step, rows, _ = listed(data, "ordered", outputs=["colmap", "npy"], tag="colmap")
    folder = step.folder / "colmap"
    points = {id: read_keypoints(folder / "keypoints" / f"{id}.txt") for id in IDS[:3]}
    assert len(list((folder / "keypoints").rglob("*.*"))) == 3
    for id, xy in points.items():
        assert len(np.unique(xy, axis=0)) == len(xy), id
    matches = read_matches(folder / "matches.txt")
    assert sorted(matches) == list(itertools.combinations(IDS[:3], 2))  # one entry for both orders
    for row in rows:
        if (row["query"], row["candidate"]) in matches:
            table = np.load(pair_path(step.folder, row).with_suffix(".npy"))
            a, b = matches[row["query"], row["candidate"]].T
            assert np.allclose(points[row["query"]][a], table["xy_a"] + 0.5, atol=1e-3)
            assert np.allclose(points[row["candidate"]][b], table["xy_b"] + 0.5, atol=1e-3)
    assert read_matches(folder / "inliers.txt") == {}  # no two of them show the same


def test_colmap_has_a_known_point_where_it_lies(few_photographs, tmp_path):
    """The same photograph under two names: all that verifies is listed, and each point lies on itself."""
    folder = tmp_path / "twins"
    folder.mkdir()
    pixels = np.asarray(Image.open(few_photographs / "a.png"))
    Image.fromarray(pixels).save(folder / "one.png")
    Image.fromarray(pixels).save(folder / "two.png", compress_level=1)
    step, (row,), _ = listed(embedded(folder, tmp_path / "exports"), "all", outputs=["colmap"])
    assert row["verified"]
    ((names, (a, b)),) = ((key, value.T) for key, value in read_matches(step.folder / "colmap" / "inliers.txt").items())
    one, two = (read_keypoints(step.folder / "colmap" / "keypoints" / f"{name}.txt") for name in names)
    assert len(a) == row["inliers"]
    assert np.allclose(one[a], two[b], atol=0.05)
    first = Stored(step.linked("query")).tokens(0).xy[0]
    assert np.linalg.norm(one - (first + 0.5), axis=1).min() < 1e-3


@pytest.mark.parametrize("suffix", [".png", ".tif"])  # Pillow turns TIFFs by itself, COLMAP does not
def test_colmap_has_the_pixels_of_the_stored_file(few_photographs, tmp_path, suffix):
    """Of two that show the same upright, one lies on its side in its file."""
    (tmp_path / "twins").mkdir()
    pixels = np.asarray(Image.open(few_photographs / "a.png").convert("RGB"))
    Image.fromarray(pixels).save(tmp_path / "twins" / f"one{suffix}")
    lying = np.ascontiguousarray(STORED[6](pixels))
    Image.fromarray(lying).save(tmp_path / "twins" / f"two{suffix}", exif=orientation(6))
    step, (row,), _ = listed(embedded(tmp_path / "twins", tmp_path / "exports"), "all", outputs=["colmap"])
    folder = step.folder / "colmap"
    (a, b) = read_matches(folder / "inliers.txt")[f"one{suffix}", f"two{suffix}"].T
    one, two = (read_keypoints(folder / "keypoints" / f"{name}{suffix}.txt") for name in ("one", "two"))
    assert len(a) == row["inliers"] > 0
    assert np.allclose(two[b], np.column_stack([one[a][:, 1], pixels.shape[1] - one[a][:, 0]]), atol=0.05)
    there = [of[tuple(np.floor(xy).astype(int).T[::-1])].astype(int) for of, xy in ((pixels, one[a]), (lying, two[b]))]
    assert np.median(np.abs(there[0] - there[1])) == 0


def test_colmap_has_no_pair_of_a_photograph_with_itself(data, tmp_path):
    step, (row,), _ = listed(data, write_list(tmp_path, ("b.png", "b.png"), name="self.csv"), outputs=["colmap"])
    assert row["verified"]
    assert read_matches(step.folder / "colmap" / "matches.txt") == {}


def test_colmap_wants_one_folder(data, tmp_path):
    twice = tmp_path / "other"
    shutil.copytree(data.linked("photographs"), twice)
    with pytest.warns(ImatchWarning, match="skipped"):
        other = embedded(twice, tmp_path / "exports", max_skipped=0.5)
    with pytest.raises(ImatchError, match="all photographs in one folder"):
        listed(data, "all", gallery_step=str(other.folder), outputs=["colmap"])


# --- through the real notebook ----------------------------------------------------------------------------


def test_the_notebook_matches_all_pairs(few_photographs, tmp_path, monkeypatch, capsys):
    for name in ("notebooks", "params"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert command("run", "params/pairs.yaml", "-p", "dataset", few_photographs, "--exports", "exports") == 0
    assert "0 of 6 pairs verified" in capsys.readouterr().out
    step = open_step(tmp_path / "exports/pairs/04_match/few/sift/scale1_raw/pairs-all_auto")
    assert (step.folder / "notebook.ipynb").is_file()
    assert step.metrics["pairs"] == 6
    assert len(list((step.folder / "pairs" / files.flat_name("a.png")).glob("*.png"))) == 3
    with pytest.raises(ImatchError, match="no finished 04_match or 03_index"):
        grouped.start_report([str(step.folder)], exports=str(tmp_path), run="r", tag="", on_change="refuse")
