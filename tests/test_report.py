"""05_report: the table against what the steps say, the comparison in pairs, and a page that stands alone."""

import csv
import re

import numpy as np
import pytest
from PIL import Image

import imatch
from imatch import curves, report, runs, store, viz
from imatch.backbones.sift_vocabulary import dead_leaves
from imatch.records import ImatchError, StepError
from tests.test_steps import embedded, matched, referenced, searched


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Ten procedural photographs, enough for intervals."""
    folder = tmp_path_factory.mktemp("photographs") / "ten"
    folder.mkdir()
    for i in range(10):
        Image.fromarray(dead_leaves(np.random.default_rng(i), side=128)).save(folder / f"{i}.png")
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
    return imatch.start_report(given, exports=str(exports), run="r", tag=tag, on_change="recompute")


def drawn(step, rows):
    found = report.gather(step, rows)
    viz.show(curves.pareto(rows, "ms", "hit_at_1"), step.folder / "time.png")
    viz.show(curves.pareto(rows, "megabytes", "hit_at_1"), step.folder / "disk.png")
    viz.show(curves.hit_by_angle(found.metrics), step.folder / "angles.png")
    viz.show(curves.trust(found.queries, found.thresholds, found.k), step.folder / "trust.png")
    viz.show(curves.metres(found.queries), step.folder / "metres.png")
    viz.show(curves.errors(found.pairs), step.folder / "errors.png")
    return report.write(step, rows)


def test_one_row_a_configuration_best_first(exports):
    step = reported(exports)
    rows = report.tabulate(step)
    assert (rows[0]["weight"], rows[0]["variant"]) == ("sift", "raw")
    assert {row["label"] for row in rows} == {"sift raw", "dsift raw", "dsift sub2"}
    assert [row["place"] for row in rows] == ["best", "worse", "worse"]
    for row in rows:
        index = report.chain(runs.read(step.linked(row["name"])))["03_index"]
        assert row["hit_at_1"] == pytest.approx(index.metrics["hit_at_1"])
        assert row["low"] <= row["hit_at_1"] <= row["high"]
        assert row["fingerprints"]["03_index"] == store.read_json(index.folder / "step.json")["fingerprint"]
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
    assert other["behind"] == pytest.approx(apart)
    assert other["behind_low"] <= apart <= other["behind_high"]
    assert (best["behind"], best["behind_low"], best["behind_high"]) == pytest.approx(
        (-apart, -other["behind_high"], -other["behind_low"])
    )


def rows_of(*values):
    """Rows as `tabulate` makes them, of configurations with these hits of twenty photographs."""
    clusters = {str(i): str(i) for i in range(20)}
    found = [dict(zip(clusters, map(float, hits), strict=False)) for hits in values]
    return [{"values": v, "clusters": clusters, "hit_at_1": np.mean([*v.values()]), "why": ""} for v in found]


def test_what_cannot_be_told_apart_is_as_good():
    rows = rows_of([1] * 19 + [0], [1] * 18 + [0, 1], [1] * 5 + [0] * 15)
    report._compare(rows)
    assert [row["place"] for row in rows] == ["best", "as good", "worse"]
    assert rows[1]["behind_low"] <= 0 <= rows[1]["behind_high"]
    assert rows[2]["behind"] == pytest.approx(0.7)


def test_other_queries_are_not_compared():
    rows = rows_of([1] * 20, [1] * 12)
    report._compare(rows)
    assert rows[1]["place"] == "not comparable"
    assert rows[1]["behind"] is None
    assert "8 are only in the first" in rows[1]["why"]


def test_one_configuration_alone_is_the_best():
    rows = rows_of([1] * 20)
    report._compare(rows)
    assert (rows[0]["place"], rows[0]["behind"]) == ("best", None)


def test_a_query_that_could_not_be_embedded_is_missed(photographs, tmp_path):
    """sift finds nothing in the middle of a photograph that has texture at its rim alone."""
    import shutil

    folder = tmp_path / "ten"
    shutil.copytree(photographs, folder)
    leaves = dead_leaves(np.random.default_rng(99), side=160)
    leaves[30:130, 30:130] = np.linspace(100, 140, 100, dtype=np.uint8)[None, :, None]  # texture at its rim alone
    Image.fromarray(leaves).save(folder / "rim.png")
    data = embedded(folder, tmp_path / "exports")
    with pytest.warns(imatch.records.ImatchWarning, match="nothing to describe"):
        _, tokens = referenced(data, angles=(0, 90), crops=(0.5,))
    index, query, *_ = searched(data, tokens, "reference-data")
    (row,) = report.tabulate(reported(tmp_path / "exports"))
    assert len(query) == 20
    assert row["queries"] == 22
    assert row["hit_at_1"] == pytest.approx(index.metrics["hit_at_1"] * 20 / 22)
    assert row["clusters"]["references_ten/Rten/rim_rot000_crop50.jpg"] not in {row["clusters"][id] for id in query.ids}


def test_files_agree_with_the_table(exports):
    step = reported(exports, tag="files")
    rows = report.tabulate(step)
    page = drawn(step, rows)
    table = store.read_json(step.folder / "table.json")
    assert [row["hit_at_1"] for row in table] == [row["hit_at_1"] for row in rows]
    assert "values" not in table[0]
    with (step.folder / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["hit_at_1"]) for line in lines] == [row["hit_at_1"] for row in rows]
    assert lines[0]["03_index fingerprint"] == rows[0]["fingerprints"]["03_index"]
    text = page.read_text()
    step.finish(report.metrics(rows))
    before = page.read_bytes()
    assert report.write(step, rows).read_bytes() == before
    assert step.metrics["configurations"] == 3
    assert step.metrics["best"][0]["name"] == rows[0]["name"]
    assert text.count("<tr") >= 2 * 4


def test_the_page_stands_alone_and_traces_to_fingerprints(exports):
    step = reported(exports, tag="page")
    rows = report.tabulate(step)
    text = drawn(step, rows).read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)|<script|@import|url\(", text)
    figures = re.findall(r"<figure.*?</figure>", text, re.S)
    assert len(figures) == len(report.PICTURES)
    prints = {record["fingerprint"] for record in map(store.read_json, (exports / "r").rglob("step.json"))}
    for row in rows:
        assert set(row["fingerprints"].values()) <= prints
        assert all(value in text for of, value in row["fingerprints"].items() if of != "queries")
    for name, figure in zip(report.PICTURES, figures, strict=True):
        short = re.findall(r">([0-9a-f]{12})<", figure)
        of = report.PICTURES[name][1]
        assert short == [row["fingerprints"][of][:12] for row in rows if of in row["fingerprints"]]
        assert short


def test_names_are_escaped():
    row = {**dict.fromkeys(report.COLUMNS), "question": "<b>", "name": "<i>", "why": "", "said": ["<script>"], "k": 1}
    text = report.html([{**row, "device": "cpu", "fingerprints": {}, "label": "<u>"}])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_wrong_requests(exports, tmp_path):
    with pytest.raises(ImatchError, match="steps is empty"):
        reported(exports, steps=[])
    with pytest.raises(ImatchError, match="no finished 04_match or 03_index"):
        reported(exports, steps=[str(tmp_path)])
    with pytest.raises(ImatchError, match="run is empty"):
        imatch.start_report([str(exports)], exports=str(exports), run="", tag="", on_change="refuse")
    reported(exports, tag="kept")
    (one,) = [path.parent for path in exports.rglob("04_match/**/metrics.json") if "dsift" not in path.parts]
    step = reported(exports, tag="kept")
    rows = report.tabulate(step)
    drawn(step, rows)
    step.finish(report.metrics(rows))
    with pytest.raises(StepError, match="was made differently"):
        imatch.start_report([str(one)], exports=str(exports), run="r", tag="kept", on_change="refuse")
    assert len(report.tabulate(reported(exports, steps=[str(one)], tag="one"))) == 1
