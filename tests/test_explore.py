"""The explorer, driven in process: sliders, clicks, labels and uploads over small finished runs."""

import csv
import datetime
import html
import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backend_bases import MouseEvent
from PIL import Image

import imatch
from imatch.core import files
from imatch.core.step import open_step
from imatch.core.types import ImatchError, ImatchWarning
from imatch.data.pairs import pair_path
from imatch.evaluation import tables, verdicts
from imatch.steps.match import labels_path
from imatch.viz import pictures
from tests import rendered
from tests.test_steps import embedded, matched, matched_scene, referenced, searched, unsealed


@pytest.fixture(scope="module")
def exports(few_photographs, tmp_path_factory):
    """Finished runs of references against photographs: sift, and dsift whose tokens lie on a grid."""
    folder = tmp_path_factory.mktemp("exports")
    for weight in ("sift", "dsift"):
        data = embedded(few_photographs, folder, weight=weight)
        _, tokens = referenced(data, angles=(0, 90))
        matched(searched(data, tokens, "reference-data", tag="")[0], outputs=["npy"])
    return folder


@pytest.fixture(scope="module")
def depth(tmp_path_factory):
    """The 04_match of a rendered scene of depth."""
    folder = tmp_path_factory.mktemp("depth")
    return matched_scene(rendered.scene(rendered.textures(folder / "demo"), 11, 15), folder)


def step_of(exports, weight="sift"):
    (path,) = (exports / "r" / "04_match").glob(f"*/{weight}/*/reference-data_isometric/metrics.json")
    return open_step(path.parent)


@pytest.fixture
def explorer(exports):
    found = imatch.steps.browse(step_of(exports))
    yield found
    labels_path(step_of(exports)).unlink(missing_ok=True)


def picture(explorer):
    explorer.canvas.widget.draw()
    return np.array(explorer.canvas.widget.buffer_rgba())


def drawn(explorer):
    """How many lines are drawn."""
    picture(explorer)
    return len(explorer.canvas._lines.get_segments())


def click(explorer, side, xy):
    """Press the mouse where pixel xy of a photograph is on the canvas."""
    picture(explorer)
    x, y = explorer.canvas.sides[side].axes.transData.transform(xy)
    MouseEvent("button_press_event", explorer.canvas.widget, x, y, 1)._process()


def test_a_pair_opens_as_it_was_saved(explorer):
    for query in explorer.query.options:
        explorer.query.value = query
        for angle in (0.0, 90.0):
            explorer.angle.value = angle
            row = explorer.row
            assert (row["angle"], row["rank"]) == (angle, 0)
            assert row["reason"] in explorer.said.value
            assert drawn(explorer) == min(row["inliers"], explorer.most.value)
            if row["corner_error"] is not None:
                assert f"corners {row['corner_error']:.2f} px" in explorer.said.value


def test_a_reason_is_no_markup(explorer):
    explorer.row["reason"] = "<img src=x onerror=alert(1)> & 'so'"
    explorer.back.click()
    assert html.escape(explorer.row["reason"]) in explorer.said.value
    explorer.said.value = ""
    explorer.row["query"] = "<i>"  # which is not there, and is said
    explorer.back.click()
    assert "&lt;i&gt;" in explorer.said.value


def test_the_backend_of_other_figures_stays():
    code = "import matplotlib; from imatch.viz.explorer import PairCanvas; matplotlib.use('svg'); PairCanvas(print)"
    code += "; print(matplotlib.get_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["svg"]


def test_sliders_choose_the_lines(explorer):
    pair, before = explorer._opened.pair, picture(explorer)
    explorer.most.value = 10
    assert drawn(explorer) == 10
    assert (picture(explorer) != before).any()
    explorer.most.value = explorer.most.max
    explorer.inliers.value = False
    assert drawn(explorer) == len(pair.matches)
    explorer.similarity.value = 0.95
    assert drawn(explorer) == (pair.matches.similarity >= 0.95).sum()
    explorer.model.value = "off"
    assert "geometry is off" in explorer.said.value


def test_ransac_is_computed_anew(explorer):
    explorer.most.value = explorer.most.max
    counts = []
    for threshold in (0.2, 3.0):
        explorer.threshold.value = threshold
        counts.append(drawn(explorer))
    assert counts[0] < counts[1]
    explorer.model.value = "similarity"
    assert "a plane, rotated 0.0 degrees, 1.00 times as large" in explorer.said.value
    explorer.angle.value = 90.0  # another pair: with its own geometry again
    assert (explorer.model.value, explorer.threshold.value) == ("auto", 3.0)


@pytest.mark.parametrize("weight", ["sift", "dsift"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_click_shows_the_similarity_of_the_nearest_token(exports, weight, side):
    explorer = imatch.steps.browse(step_of(exports, weight))
    tokens, other = explorer._opened.tokens[side], explorer._opened.tokens[1 - side]
    one = len(tokens.xy) // 2
    vector = tokens.descriptors[one].astype(float)
    rows = other.descriptors.astype(float)
    cosine = rows @ vector / np.linalg.norm(rows, axis=1) / np.linalg.norm(vector)
    best, second = pictures.best_two(cosine, other)
    assert best == cosine.argmax()
    before = picture(explorer)
    click(explorer, side, tokens.xy[one] + 0.1)
    for i in (best, second):
        assert f"best {cosine[i]:.3f} at ({other.xy[i][0]:.0f}, {other.xy[i][1]:.0f})" in explorer.patch.value
    there = explorer.canvas.sides[1 - side]
    shown = there.dots if weight == "sift" else there.cells
    assert shown.get_visible()
    np.testing.assert_allclose(np.sort(np.ravel(shown.get_array())), np.sort(cosine), atol=1e-3)
    np.testing.assert_allclose(there.marks.get_offsets(), other.xy[[best, second]])
    after = picture(explorer)
    half = before.shape[1] // 2
    far = slice(half, None) if side == 0 else slice(0, half)
    assert (before[:, far] != after[:, far]).any()
    click(explorer, side, tokens.xy[one] + 0.1)  # again: the lines are back
    np.testing.assert_array_equal(picture(explorer), before)


@pytest.mark.parametrize("side", [0, 1])
def test_a_click_draws_the_epipolar_line(depth, side):
    explorer = imatch.steps.browse(depth)
    pair, (here, there) = explorer._opened.pair, (explorer.canvas.sides[side], explorer.canvas.sides[1 - side])
    ends_of = (pair.xy_a, pair.xy_b) if side == 0 else (pair.xy_b, pair.xy_a)
    assert "a scene with depth, rotated about -6." in explorer.said.value
    assert "the camera rotated by 15." in explorer.said.value
    assert explorer.canvas.sides[1].outline.get_linestyle() == "--"
    off = []
    for i in np.flatnonzero(pair.geometry.inliers)[::200]:
        click(explorer, side, ends_of[0][i])
        (start, end), partner = there.epipolar.get_xydata(), ends_of[1][i]
        way = end - start
        off.append(abs(np.linalg.det([way, partner - start])) / np.linalg.norm(way))
        assert not len(here.epipolar.get_xydata())
        assert "it lies on the line" in explorer.patch.value
    assert max(off) < 1
    click(explorer, side, ends_of[0][i])
    assert not len(there.epipolar.get_xydata())
    explorer.model.value = "homography"  # the geometry of now counts
    click(explorer, side, ends_of[0][i])
    assert not len(there.epipolar.get_xydata())
    assert explorer.canvas.sides[1].outline.get_linestyle() == "-"


def test_cells_lie_where_their_patches_are(exports):
    explorer = imatch.steps.browse(step_of(exports, "dsift"))
    click(explorer, 0, explorer._opened.tokens[0].xy[0])
    left, right, bottom, top = explorer.canvas.sides[1].cells.get_extent()
    h, w = explorer._opened.pair.sizes[1]
    assert (left, right, bottom, top) == pytest.approx((-0.5, w - 0.5, h - 0.5, -0.5))


def test_while_zooming_a_click_is_the_toolbar_s(explorer):
    explorer.canvas.widget.toolbar.zoom()
    click(explorer, 0, (50, 50))
    assert "Click a patch" in explorer.patch.value


def test_zoomed_lines_end_inside(explorer):
    everything = drawn(explorer)
    explorer.canvas.sides[0].axes.set(xlim=(0, 40), ylim=(40, 0))
    picture(explorer)
    seen = [segment for segment in explorer.canvas._lines.get_segments() if len(segment) == 2]
    assert 0 < len(seen) < everything


def test_labels_are_written_changed_and_withdrawn(exports, explorer):
    step, file = step_of(exports), labels_path(step_of(exports))
    first = (explorer.row["query"], explorer.row["candidate"])
    explorer.label.value = "accept"
    assert verdicts.read(file) == {first: "accept"}
    assert "1 of 16 pairs" in explorer.progress.value
    explorer.rank.value = 1
    assert explorer.label.value == "unclear"
    second = (explorer.row["query"], explorer.row["candidate"])
    explorer.label.value = "reject"
    assert verdicts.read(file) == {first: "accept", second: "reject"}
    explorer.rank.value = 0
    assert explorer.label.value == "accept"
    explorer.label.value = "reject"
    assert verdicts.read(file)[first] == "reject"
    explorer.label.value = "unclear"
    assert verdicts.read(file) == {second: "reject"}
    assert not file.is_relative_to(step.folder)  # which goes when the step is computed anew
    assert imatch.steps.browse(step).saved.matched.folder == step.folder


def test_the_evaluation_reads_the_labels(exports):
    step = step_of(exports)
    pairs = files.read_rows(step.folder / "pairs.jsonl")
    assert verdicts.label_metrics(pairs, {}) is None
    assert verdicts.label_metrics(pairs, {("no such query", "a.png"): "accept"}) is None
    right = {(row["query"], row["candidate"]): "accept" if row["right"] else "reject" for row in pairs}
    said = verdicts.label_metrics(pairs, right)
    verified = [row for row in pairs if row["verified"]]
    assert said["precision"] == pytest.approx(np.mean([row["right"] for row in verified]))
    assert said["recall"] == pytest.approx(np.mean([row["verified"] for row in pairs if row["right"]]))
    assert said["accepted"] + said["rejected"] == said["labelled"] == len(pairs)
    table = tables.summary_table({"sift": {**step.metrics, "labels": said}})
    assert f"labelled by hand: {len(pairs)} pairs" in table
    assert "labelled" not in tables.summary_table({"sift": {**step.metrics, "labels": None}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("query,label\na,accept\n", "no column candidate"),
        ("query,candidate,label\na,b,maybe\n", "line 2: label 'maybe' is not known"),
        ("query,candidate,label\na,b,accept\na,b,reject\n", "line 3: a and b have both labels"),
        ("", "no column query, candidate, label"),
    ],
)
def test_a_bad_csv_says_what_is_wrong(tmp_path, text, said):
    file = tmp_path / "labels.csv"
    file.write_text(text)
    with pytest.raises(ImatchError, match=said):
        verdicts.read(file)


def test_labels_of_names_that_are_no_text_or_a_formula(tmp_path):
    names = ['caf\udce9, "1".jpg', "b\nc.png", "=1+2", "'=1+2", "''-1", "'a", "@a", "+\r", "\t", "＝1"]
    said = dict.fromkeys(itertools.pairwise(names), "accept")
    verdicts.write(tmp_path / "labels.csv", said)
    assert verdicts.read(tmp_path / "labels.csv") == said
    with (tmp_path / "labels.csv").open(newline="", errors="surrogateescape") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not [cell for cell in cells if cell.startswith(tuple("=+-@\t\r＝"))]


def uploaded(path):
    about = {"type": "image/png", "last_modified": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)}
    data = path.read_bytes()
    return ({"name": path.name, "size": len(data), "content": memoryview(data), **about},)


def test_two_photographs_of_one_s_own(explorer, few_photographs, tmp_path):
    with Image.open(few_photographs / "a.png") as photograph:
        photograph.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png")
    explorer.match.click()
    assert "give two photographs" in explorer.said.value
    explorer.uploads[0].value = uploaded(tmp_path / "turned.png")
    explorer.uploads[1].value = uploaded(few_photographs / "a.png")
    explorer.match.click()
    assert "<b>turned.png</b> → <b>a.png</b>" in explorer.said.value
    assert "a plane, rotated -90.0 degrees, 1.00 times as large" in explorer.said.value
    assert drawn(explorer) > 20
    assert explorer.label.disabled
    click(explorer, 0, (40, 40))
    assert "second best" in explorer.patch.value


def test_an_upload_that_is_no_photograph(explorer, few_photographs, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no photograph")
    explorer.uploads[0].value = uploaded(few_photographs / "a.png")
    explorer.uploads[1].value = uploaded(tmp_path / "broken.png")
    explorer.match.click()
    assert "broken.png: not a photograph" in explorer.said.value


def test_weights_that_are_gone_are_said_in_the_widget(few_photographs, weights, tmp_path):
    torch = {"precision": "fp32", "engine_forward": "torch"}
    given = {"weight": "vits16", "data_key": str(weights / "data_key.json"), "backbone_options": torch}
    data = embedded(few_photographs, tmp_path, **given)
    step, *_ = matched(searched(data, None, "data-data", tag="")[0], outputs=["npy"])
    explorer = imatch.steps.browse(step)
    for path in weights.glob("*.pth"):
        path.rename(path.with_suffix(".away"))
    try:
        for upload in explorer.uploads:
            upload.value = uploaded(few_photographs / "a.png")
        explorer.match.click()
    finally:
        for path in weights.glob("*.away"):
            path.rename(path.with_suffix(".pth"))
    assert "dinov3_vits16" in explorer.said.value
    explorer.match.click()
    assert "<b>a.png</b> → <b>a.png</b>" in explorer.said.value


def test_without_saved_correspondences_a_pair_is_matched_again(exports):
    index = open_step(step_of(exports).linked("index"))
    step, *_ = matched(index, outputs=["json"], tag="json")
    again, saved = imatch.steps.browse(step)._opened.pair, imatch.steps.browse(step_of(exports))._opened.pair
    np.testing.assert_array_equal(again.xy_b, saved.xy_b)
    np.testing.assert_array_equal(again.geometry.inliers, saved.geometry.inliers)


def test_a_query_in_which_nothing_was_found(few_photographs, tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes((few_photographs / name).read_bytes())
    Image.new("RGB", (90, 90), "white").save(folder / "white.png")
    with pytest.warns(ImatchWarning, match="white"):
        data = embedded(folder, tmp_path, max_skipped=1.0)
    step, *_ = matched(searched(data, None, "data-data", tag="")[0], outputs=["npy"])
    explorer = imatch.steps.browse(step)
    explorer.query.value = "white.png"
    assert "found nothing in this query" in explorer.said.value
    assert explorer.label.disabled
    click(explorer, 0, (0, 0))
    explorer.most.value = 10
    explorer.query.value = "a.png"
    assert drawn(explorer) > 0


def test_a_pair_that_the_pixels_did_not_confirm_opens_unverified(few_photographs, tmp_path):
    """What 04_match said stands until a slider asks for something else."""
    folder = tmp_path / "photographs"
    shutil.copytree(few_photographs, folder)
    data = embedded(folder, tmp_path / "exports")
    index = searched(data, referenced(data, angles=(0,))[1], "reference-data", tag="")[0]
    (folder / "a.png").unlink()
    step, *_ = matched(index, outputs=["npy"], refine="pixel", candidates=4)
    explorer = imatch.steps.browse(step)
    explorer.query.value = "a.png"
    explorer.rank.value = [row["candidate"] for row in explorer._candidates()].index("a.png")
    assert "not verified: the photographs cannot be compared" in explorer.said.value
    explorer.threshold.value = 10**0.9
    assert "not verified" not in explorer.said.value


def test_a_pair_that_cannot_be_opened_takes_no_label(exports, explorer):
    path = pair_path(step_of(exports).folder, explorer._candidates()[1]).with_suffix(".npy")
    explorer.label.value = "accept"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        explorer.rank.value = 1
        assert explorer.label.disabled
        assert explorer.label.value == "unclear"
        assert "<b>" in explorer.said.value
    finally:
        path.write_bytes(whole)


def test_a_label_that_could_not_be_written_is_not_shown(explorer, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(verdicts, "write", full)
        explorer.label.value = "accept"
    assert explorer.label.value == "unclear"
    assert "No space left" in explorer.said.value


def test_correspondences_that_are_unlike_are_drawn_too(few_photographs, tmp_path):
    data = embedded(few_photographs, tmp_path / "exports")
    index = searched(data, referenced(data, angles=(0,))[1], "reference-data", tag="")[0]
    step, *_ = matched(index, outputs=["npy"], matcher="mutual", matcher_options={"min_similarity": -1.0})
    path = pair_path(step.folder, files.read_rows(step.folder / "pairs.jsonl")[0]).with_suffix(".npy")
    table = np.load(path)
    table["similarity"][-5:] = -0.5  # descriptors of a network can point away from each other
    np.save(path, table)
    unsealed(step.folder)
    explorer = imatch.steps.browse(step)
    explorer.inliers.value, explorer.most.value = False, 2000
    assert drawn(explorer) == len(table)
    explorer.similarity.value = 0.0
    assert drawn(explorer) == len(table) - 5


def test_the_way_back_from_an_upload(explorer, few_photographs):
    before = explorer.said.value
    for upload in explorer.uploads:
        upload.value = uploaded(few_photographs / "a.png")
    explorer.match.click()
    assert explorer.said.value != before
    explorer.back.click()
    assert explorer.said.value == before
    assert not explorer.label.disabled


def test_another_weight_keeps_the_query(exports):
    explorer = imatch.steps.browse({weight: step_of(exports, weight) for weight in ("sift", "dsift")})
    explorer.query.value, explorer.angle.value = "c.jpg", 90.0
    explorer.weight.value = "dsift"
    assert explorer.row["query"].endswith("c_rot090_crop100.jpg")
    assert explorer._opened.tokens[1].grid is not None
    assert "run 04_match" in imatch.steps.browse({}).value


def test_a_pair_is_saved_as_a_page(exports, explorer):
    explorer.export.click()
    (page,) = (exports / "r" / "pages").rglob("*.html")
    assert str(page) in explorer.progress.value
    assert explorer.row["candidate"] in page.read_text()
