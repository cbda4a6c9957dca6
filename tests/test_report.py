"""05_report: the table against what the steps say, the comparison in pairs, and a page that stands alone."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

import imatch
from imatch.core import files
from imatch.core.step import open_step
from imatch.core.types import ImatchError, StepError
from imatch.evaluation import verdicts
from imatch.steps import report
from imatch.steps.match import labels_path
from imatch.viz import curves
from imatch.viz.figures import show
from tests import grouped
from tests.leaves import dead_leaves
from tests.test_steps import embedded, matched, referenced, searched


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Ten procedural photographs, enough for intervals."""
    folder = tmp_path_factory.mktemp("photographs") / "ten"
    folder.mkdir()
    for i in range(10):
        Image.fromarray(dead_leaves(i, 128)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def exports(photographs, tmp_path_factory):
    """Three finished configurations: sift, and dsift raw and sub2."""
    folder = tmp_path_factory.mktemp("exports")
    for weight, variant in (("sift", "raw"), ("dsift", "raw"), ("dsift", "sub2")):
        data = embedded(photographs, folder, weight=weight, variant=variant)
        _, tokens = referenced(data, angles=(0, 90))
        index, *_ = searched(data, tokens, "reference-data")
        if variant == "raw":
            matched(index, candidates=1, outputs=["npy"])
    return folder


def reported(exports, steps=None, tag=""):
    given = [str(exports / "r")] if steps is None else steps
    return grouped.start_report(given, exports=str(exports), run="r", tag=tag, on_change="recompute")


def drawn(step, rows):
    found = report.gather(step, rows)
    show(curves.pareto(rows, "ms", "hit_at_1"), step.folder / "time.png")
    show(curves.pareto(rows, "megabytes", "hit_at_1"), step.folder / "disk.png")
    show(curves.hit_by_angle(found.metrics), step.folder / "angles.png")
    show(curves.trust(found.queries, found.thresholds, found.k), step.folder / "trust.png")
    show(curves.metres(found.queries), step.folder / "metres.png")
    show(curves.errors(found.pairs), step.folder / "errors.png")
    return report.write(step, rows)


def test_one_row_a_configuration_best_first(exports):
    step = reported(exports)
    rows = report.tabulate(step)
    assert (rows[0]["weight"], rows[0]["variant"]) == ("sift", "raw")
    assert {row["label"] for row in rows} == {"sift raw", "dsift raw", "dsift sub2"}
    assert [row["place"] for row in rows] == ["best", "worse", "worse"]
    for row in rows:
        index = report.chain(open_step(step.linked(row["name"])))["03_index"]
        assert row["hit_at_1"] == pytest.approx(index.metrics["hit_at_1"])
        assert row["low"] <= row["hit_at_1"] <= row["high"]
        assert row["fingerprints"]["03_index"] == files.read_json(index.folder / "step.json")["fingerprint"]
        assert row["ms"] > 0
    thin = next(row for row in rows if row["variant"] == "sub2")
    raw = next(row for row in rows if row["label"] == "dsift raw")
    assert thin["megabytes"] < raw["megabytes"]
    assert thin["reranked_hit_at_1"] is thin["pixels"] is None  # no 04_match went on from it
    assert raw["pixels"] is not None


def test_the_comparison_is_of_the_same_queries(exports):
    rows = report.tabulate(reported(exports))
    best, other = rows[0], rows[1]
    apart = np.mean([best["values"][query] - other["values"][query] for query in best["values"]])
    assert other["apart"] == pytest.approx(-apart)
    assert other["apart_low"] <= -apart <= other["apart_high"]
    assert (best["apart"], best["apart_low"], best["apart_high"]) == pytest.approx(
        (apart, -other["apart_high"], -other["apart_low"])
    )


def test_labels_enter_the_table_and_the_explorer_has_its_names(exports):
    step = reported(exports)
    rows = report.tabulate(step)
    assert {row["labelled"] for row in rows} == {None}
    found = report.matched(step, rows)
    assert set(found) == {"sift raw", "dsift raw"}
    file = labels_path(found["sift raw"])
    pairs = files.read_rows(found["sift raw"].folder / "pairs.jsonl")[:3]
    verdicts.write(file, {(row["query"], row["candidate"]): "accept" for row in pairs})
    try:
        again = reported(exports)  # labels are no part of a fingerprint, but what the report shows
        assert not again.finished
        sift = next(row for row in report.tabulate(again) if row["label"] == "sift raw")
    finally:
        file.unlink()
    assert (sift["labelled"], sift["label_precision"]) == (3, 1.0)
    assert sift["label_recall"] == pytest.approx(np.mean([row["verified"] for row in pairs]))
    assert "accepted of verified" in report.html([sift])


def rows_of(*values):
    """Rows as `tabulate` makes them, of configurations with these hits of twenty photographs."""
    clusters = {str(i): str(i) for i in range(20)}
    found = [dict(zip(clusters, map(float, hits), strict=False)) for hits in values]
    same = {"clusters": clusters, "unit": "photographs", "ms": 1.0, "why": ""}
    return [{**same, "values": v, "hit_at_1": np.mean([*v.values()]), "name": str(i)} for i, v in enumerate(found)]


def test_what_cannot_be_told_apart_is_as_good():
    rows = rows_of([1] * 19 + [0], [1] * 18 + [0, 1], [1] * 5 + [0] * 15)
    report._compare(rows)
    assert [row["place"] for row in rows] == ["best", "as good", "worse"]
    assert rows[1]["apart_low"] <= 0 <= rows[1]["apart_high"]
    assert rows[2]["apart"] == pytest.approx(-0.7)


def queried(hits, answers=1):
    return {
        str(i): {"answers": answers, "cluster": f"c{i}", "right_ranks": [0] if hit else []}
        for i, hit in enumerate(hits)
    }


def test_what_one_configuration_cannot_answer_it_misses():
    """The second has not embedded the answer of query 0 and lacks query 19 altogether."""
    rows = [
        {"queried": queried([1] * 20), "unit": "photographs"},
        {"queried": queried([1] * 19), "unit": "photographs"},
    ]
    rows[1]["queried"]["0"] = {"answers": 0, "cluster": "c0", "right_ranks": []}
    report._count(rows)
    assert [row["queries"] for row in rows] == [20, 20]
    assert [row["hit_at_1"] for row in rows] == [1.0, 0.9]
    assert rows[0]["values"].keys() == rows[1]["values"].keys() == rows[0]["clusters"].keys()


def test_nothing_to_count_is_no_best():
    rows = [{"queried": queried([0] * 3, answers=0), "unit": "captures", "ms": 1.0, "name": "a"}]
    report._count(rows)
    report._compare(rows)
    assert (rows[0]["hit_at_1"], rows[0]["place"], rows[0]["queries"]) == (None, "nothing to count", 0)


def test_equal_names_of_different_photographs_are_different_questions(tmp_path):
    """Two data sets of one name and equal file names, in two runs."""
    for name, seed in (("one", 0), ("two", 50)):
        (tmp_path / name / "beach").mkdir(parents=True)
        for i in range(3):
            image = Image.fromarray(dead_leaves(seed + i, 96))
            image.save(tmp_path / name / "beach" / f"{i}.png")
        data = embedded(tmp_path / name / "beach", tmp_path / "exports", run=name)
        searched(data, None, "data-data")
    step = reported(tmp_path / "exports", steps=[str(tmp_path / "exports")])
    rows = report.tabulate(step)
    assert len({row["question"] for row in rows}) == 2
    assert all(row["place"] in ("best", "nothing to count") for row in rows)


def test_a_report_is_made_anew_when_what_was_measured_changes(exports):
    step = reported(exports, tag="anew")
    step.finish({})
    assert reported(exports, tag="anew").finished
    (embed,) = (path.parent for path in exports.rglob("01_embed/**/sift/*/step.json"))
    record = files.read_json(embed / "step.json", signed=True)
    files.write_signed(embed / "step.json", {**record, "work": {"photographs": 10, "seconds": 99.0}})
    assert not reported(exports, tag="anew").finished
    files.write_signed(embed / "step.json", record)


def test_one_configuration_alone_is_the_best():
    rows = rows_of([1] * 20)
    report._compare(rows)
    assert (rows[0]["place"], rows[0]["apart"]) == ("best", None)


def test_a_query_that_could_not_be_embedded_is_missed(photographs, tmp_path):
    """sift finds nothing in the middle of a photograph that has texture at its rim alone."""
    import shutil

    folder = tmp_path / "ten"
    shutil.copytree(photographs, folder)
    leaves = dead_leaves(99, 160)
    leaves[30:130, 30:130] = np.linspace(100, 140, 100, dtype=np.uint8)[None, :, None]  # texture at its rim alone
    Image.fromarray(leaves).save(folder / "rim.png")
    data = embedded(folder, tmp_path / "exports")
    with pytest.warns(imatch.core.types.ImatchWarning, match="nothing to describe"):
        _, tokens = referenced(data, angles=(0, 90), crops=(0.5,))
    index, query, *_ = searched(data, tokens, "reference-data")
    (row,) = report.tabulate(reported(tmp_path / "exports"))
    assert len(query) == 20
    assert row["queries"] == index.metrics["queries"] == 22
    assert index.metrics["missed"] == 2
    assert row["hit_at_1"] == pytest.approx(index.metrics["hit_at_1"])
    assert index.metrics["hit_at_1"] <= 20 / 22
    assert row["clusters"]["references_ten/Rten/rim_rot000_crop50.jpg"] not in {row["clusters"][id] for id in query.ids}
    _, pairs, metrics = matched(index, candidates=1, outputs=["npy"])
    assert metrics["queries"] == metrics["true_pairs"] == 22
    assert metrics["hit_at_1"] == pytest.approx(index.metrics["hit_at_1"])
    assert sum(pair["candidate"] is None for pair in pairs) == 2


@pytest.fixture
def finished(exports):
    """A finished report, drawn by whoever asks first: its step, its rows and its page."""
    step = reported(exports, tag="kept")
    rows, page = report.tabulate(step), step.folder / "report.html"
    if not step.finished:
        assert drawn(step, rows) == page
        step.finish(report.metrics(rows))
    return step, rows, page


def test_files_agree_with_the_table(finished):
    step, rows, page = finished
    table = files.read_json(step.folder / "table.json")
    assert [row["hit_at_1"] for row in table] == [row["hit_at_1"] for row in rows]
    assert "values" not in table[0]
    with (step.folder / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["hit_at_1"]) for line in lines] == [row["hit_at_1"] for row in rows]
    assert lines[0]["03_index fingerprint"] == rows[0]["fingerprints"]["03_index"]
    text = page.read_text()
    before = page.read_bytes()
    assert report.write(step, rows).read_bytes() == before
    assert step.metrics["configurations"] == 3
    assert step.metrics["best"][0]["name"] == rows[0]["name"]
    assert text.count("<tr") >= 2 * 4


def test_the_page_stands_alone_and_traces_to_fingerprints(exports, finished):
    _, rows, page = finished
    text = page.read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)|<script|@import|url\(", text)
    figures = re.findall(r"<figure.*?</figure>", text, re.S)
    shown = {name: of for name, (_, of) in report.PICTURES.items() if name != "metres.png"}  # no position is known
    assert re.findall(r'<figure id="(.*?)"', text) == list(shown)
    prints = {record["fingerprint"] for record in map(files.read_json, (exports / "r").rglob("step.json"))}
    for row in rows:
        assert set(row["fingerprints"].values()) <= prints
        assert all(value in text for value in row["fingerprints"].values())
    for of, figure in zip(shown.values(), figures, strict=True):
        short = re.findall(r"\b[0-9a-f]{12}\b", re.sub("src=.*?>", "", figure))
        assert short == [row["fingerprints"][step][:12] for row in rows for step in of if step in row["fingerprints"]]
        assert short


def test_names_are_escaped():
    row = {**dict.fromkeys(report.COLUMNS), "question": "<b>", "name": "<i>", "why": "", "said": ["<script>"], "k": 1}
    text = report.html([{**row, "device": "cpu", "fingerprints": {}, "label": "<u>"}])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.usefixtures("finished")
def test_wrong_requests(exports, tmp_path):
    with pytest.raises(ImatchError, match="steps is empty"):
        reported(exports, steps=[])
    with pytest.raises(ImatchError, match="no finished 04_match or 03_index"):
        reported(exports, steps=[str(tmp_path)])
    with pytest.raises(ImatchError, match=r"run '': it becomes the name of a folder"):
        grouped.start_report([str(exports)], exports=str(exports), run="", tag="", on_change="refuse")
    (one,) = [path.parent for path in exports.rglob("04_match/**/metrics.json") if "dsift" not in path.parts]
    with pytest.raises(StepError, match="was made differently"):
        grouped.start_report([str(one)], exports=str(exports), run="r", tag="kept", on_change="refuse")
    assert len(report.tabulate(reported(exports, steps=[str(one)], tag="one"))) == 1


def test_a_step_whose_source_is_gone_is_left_out(exports, tmp_path, capsys):
    import shutil

    shutil.copytree(exports / "r", tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "05_report", ignore_errors=True)
    (lost,) = (tmp_path / "r").rglob("03_index/**/sift/**/metrics.json")
    lost.unlink()
    step = grouped.start_report([str(tmp_path)], exports=str(tmp_path), run="r", tag="", on_change="refuse")
    assert len(step.links) == 2
    assert "left out" in capsys.readouterr().out
