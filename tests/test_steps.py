"""From a folder to matches through the library's verbs: directions, exclusions, names, refusals."""

import contextlib
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

import imatch
from imatch.core import config, files
from imatch.core.step import open_step
from imatch.core.types import ImatchError, ImatchWarning, StepError, Tokens
from imatch.data import rotations
from imatch.data.store import Stored
from imatch.evaluation import intervals, tables
from imatch.features import base
from imatch.retrieval import index as searcher
from imatch.steps.embedding import embed_poses
from imatch.steps.references import _reference_names
from tests import grouped, rendered
from tests.grouped import by
from tests.leaves import dead_leaves


def embedded(photographs, exports, weight="sift", resize=None, **given):
    max_skipped = given.pop("max_skipped", 0.05)
    options = {"run": "r", "shard_size": 3, "resize": resize or imatch.Resize(), **given}
    step = grouped.start_embed(photographs, exports, weight=weight, **options)
    imatch.steps.finish_embed(step, imatch.steps.embed(step, resources=by(workers=0), max_skipped=max_skipped))
    return step


def referenced(step, kind="isometric", angles=(0, 90), crops=(1.0,), resize_to_original=False, file_type="jpg"):
    views = imatch.steps.start_references(
        str(step.folder),
        kind=kind,
        angles=angles,
        crops=crops,
        resize_to_original=resize_to_original,
        file_type=file_type,
        quality=95,
        tag="",
        on_change="refuse",
    )
    imatch.steps.make_references(views, resources=by(workers=0))
    tokens = imatch.steps.start_reference_tokens(views)
    imatch.steps.finish_embed(tokens, imatch.steps.embed(tokens, resources=by(workers=0), max_skipped=1.0))
    return views, tokens


def indexed(data, references, direction, **given):
    """A 03_index, just started."""
    other = str(references.folder) if references else ""
    return grouped.start_index(str(data.folder), other, direction=direction, **{"index": "flat", "k": 5, **given})


def judged(step):
    """All of a 03_index but its alarms and its end: both sides, the ranking, the rows of queries.jsonl, the metrics."""
    query, gallery = imatch.steps.open_embeddings(step)
    index = imatch.steps.build_index(step, gallery)
    figures = imatch.steps.tune_index(step, index, query)
    checked = imatch.steps.check_index(index, gallery)
    ranking = imatch.steps.search(step, index, query, gallery)
    rows, threshold = imatch.steps.judge_index(step, query, gallery, ranking, figures)
    metrics = imatch.steps.index_metrics(step, query, gallery, ranking, rows, threshold, figures, checked)
    return query, gallery, ranking, rows, metrics


def searched(data, references, direction, k=5, exclude_siblings=False, **given):
    tag = given.pop("tag", f"k{k}s{int(exclude_siblings)}")
    step = indexed(data, references, direction, k=k, exclude_siblings=exclude_siblings, tag=tag, **given)
    query, gallery, ranking, _, metrics = judged(step)
    step.finish(metrics)
    return step, query, gallery, ranking


def matched(index, **given):
    step = grouped.start_match(str(index.folder), **{"candidates": 2, "iterations": 1000, **given})
    pairs = imatch.steps.match_pairs(step, resources=by(workers=0))
    return step, pairs, step.finish(imatch.steps.match_metrics(step, pairs))


def matched_scene(scene, folder):
    """The 04_match of a rendered scene's a.jpg and b.jpg, of which one explains the other."""
    (folder / "scene").mkdir()
    for name, pixels in zip("ab", scene.photographs, strict=True):
        rendered.save(pixels, folder / "scene" / f"{name}.jpg")
    index, *_ = searched(embedded(folder / "scene", folder / "exports"), None, "data-data")
    return matched(index, model="auto", matcher="auto", min_inliers=0, outputs=["npy"])[0]


def unsealed(folder):
    """Let a finished step hold what a test has put there: nothing is known of its files, as of an earlier version."""
    record = files.read_json(folder / "step.json", signed=True)
    files.write_signed(folder / "step.json", {**record, "files": {}})


def without_times(path):
    """What a file of a step holds: its bytes; JSON of 03_index and of pairs without durations, and without what an
    index was chosen by, the memory that was free."""
    timed = path.name in ("metrics.json", "results.json", "index.json", "stages.json") or path.parent.name == "queries"
    if not timed and (path.suffix != ".json" or "pairs" not in path.parts):
        return path.read_bytes()
    return _without_times(files.read_json(path))


def _without_times(value):
    if isinstance(value, dict):
        times = re.compile(r"(^|_)ms$|^reason$|^digest$")
        return {key: _without_times(part) for key, part in value.items() if not times.search(key)}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Toy:
    """A backbone that knows a photograph by the 64 x 64 pixels in its middle."""

    device: ClassVar[str] = "cpu"
    patch: ClassVar[int] = 1
    side: ClassVar[int] = 0
    resampling: ClassVar[str] = "opencv"
    held: ClassVar[int] = 0
    bytes_per_pixel: ClassVar[float] = 1
    digest: ClassVar[str] = "a toy"

    def load(self):
        pass

    def __call__(self, photographs):
        h, w = photographs.shape[1:3]
        return [self._tokens(p[h // 2 - 32 : h // 2 + 32, w // 2 - 32 : w // 2 + 32, 0]) for p in photographs]

    def _tokens(self, middle):
        vector = self.vector(middle).astype(np.float32)
        return Tokens(vector / np.linalg.norm(vector), np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32))


@dataclass(frozen=True)
class Histogram(Toy):
    """Blind to rotation: how often each grey is there."""

    def vector(self, middle):
        return np.sqrt(np.histogram(middle, 64, (0, 256))[0])


@dataclass(frozen=True)
class Pixels(Toy):
    """Sees rotation: the means of 8 x 8 cells, without their mean."""

    def vector(self, middle):
        cells = cv2.resize(middle, (8, 8), interpolation=cv2.INTER_AREA).astype(float)
        return (cells - cells.mean()).ravel()


@dataclass(frozen=True)
class Lottery(Toy):
    """Sees nothing: numbers drawn by lot for each photograph."""

    def vector(self, middle):
        return np.random.default_rng(middle.ravel()).normal(size=32)


def with_toys(monkeypatch):
    """Put the toys into the table of backbones until the test ends."""
    toys = {cls.__name__.lower(): f"tests.test_steps:{cls.__name__}" for cls in (Histogram, Pixels, Lottery)}
    monkeypatch.setattr(base, "BACKBONES", {**base.BACKBONES, **toys})
    monkeypatch.setattr(base, "CLASSICAL", (*base.CLASSICAL, *toys))
    monkeypatch.setattr(base, "NAMED", (*base.NAMED, *toys))


def write_leaves(folder):
    """Twelve square procedural photographs."""
    folder.mkdir()
    whole = dead_leaves(0, 512)
    for i in range(12):
        y, x = i // 4 * 128, i % 4 * 128
        Image.fromarray(whole[y : y + 128, x : x + 128]).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    return write_leaves(tmp_path_factory.mktemp("photographs") / "leaves")


@pytest.fixture(scope="module")
def drawn(leaves, tmp_path_factory):
    """The leaves and their references by lot, and labels that put them into a row, 10 metres apart."""
    folder = tmp_path_factory.mktemp("drawn")
    with pytest.MonkeyPatch.context() as patch:
        with_toys(patch)
        data = embedded(leaves, folder, weight="lottery")
        _, references = referenced(data, file_type="png")
    (folder / "labels.csv").write_text("id,x,y\n" + "".join(f"{i:02d}.png,{10 * i},0\n" for i in range(12)))
    return data, references, folder / "labels.csv"


@pytest.fixture(scope="module")
def house(few_photographs, tmp_path_factory):
    data = embedded(few_photographs, tmp_path_factory.mktemp("exports"))
    return data, *referenced(data)


def test_references_are_named_and_placed_as_older_exports_were(house):
    _, views, _ = house
    ids = [row["id"] for row in files.read_rows(views.folder / "references.jsonl")]
    assert ids == [
        f"references_few/{name}_rot{angle}_crop100.jpg"
        for name in ("Rfew/a", "Rfew/b", "Rfew/c", "Rflight 1/d")
        for angle in ("000", "090")
    ]
    assert all((views.folder / id).is_file() for id in ids)


def test_names_that_would_collide_keep_their_suffix():
    names = _reference_names(["a.jpg", "a.png", "b.jpg", "few/B.png"], "few")
    assert len({name.lower() for name in names.values()}) == 4
    assert names["a.jpg"] == "references_few/Rfew/a_jpg"
    names = _reference_names(["a.jpg", "few/a.jpg"], "few")
    assert len({*names.values()}) == 2


def test_file_names_of_ids_differ_and_fit():
    ids = ["a/b", "a__b", "a_/b", "a/_b", *("가/" * 90 + end for end in "ab"), *("가__" * 90 + end for end in "ab")]
    names = [files.flat_name(id) for id in ids]
    assert len({*names}) == len(ids)
    assert max(len(name.encode()) for name in names) <= config.NAME


def test_views_are_shared_though_the_backbones_see_different_photographs(tmp_path, few_photographs):
    """A photograph in which one backbone finds nothing is left out by it alone."""
    from PIL import Image

    folder = tmp_path / "mixed"
    shutil.copytree(few_photographs, folder)
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)  # a gradient, but no keypoint
    Image.fromarray(np.repeat(ramp[None], 96, axis=0)).save(folder / "ramp.png")
    kept, views = [], []
    for weight in ("sift", "dsift"):
        with contextlib.ExitStack() as stack:
            if weight == "sift":
                stack.enter_context(pytest.warns(ImatchWarning, match=r"ramp\.png: nothing to describe"))
            step = embedded(folder, tmp_path / "exports", weight=weight, max_skipped=0.5)
        with contextlib.ExitStack() as stack:
            if weight == "sift":
                stack.enter_context(pytest.warns(ImatchWarning, match="2 of 10"))
            view, _ = referenced(step)
        kept.append(step.metrics["photographs"])
        views.append(view.fingerprint)
    assert kept == [4, 5]
    assert views[0] == views[1]


def test_results_inside_the_data_set_are_no_photographs(tmp_path, few_photographs):
    folder = tmp_path / "few"
    shutil.copytree(few_photographs, folder)
    for _ in range(2):
        step = embedded(folder, folder / "results")
        referenced(step)
    assert step.metrics["photographs"] == 4


def test_a_folder_of_the_same_name_does_not_take_a_step_over(tmp_path, few_photographs):
    for name in ("one", "two"):
        shutil.copytree(few_photographs, tmp_path / name / "few")
    (tmp_path / "two" / "few" / "a.png").write_bytes((few_photographs / "b.png").read_bytes())
    step = embedded(tmp_path / "one" / "few", tmp_path / "exports")
    with pytest.raises(StepError, match=r"(?s)two/few are not those.*changed: a\.png"):
        embedded(tmp_path / "two" / "few", tmp_path / "exports")
    assert open_step(step.folder).linked("photographs") == tmp_path / "one" / "few"


OPEN = """
import resource, sys, pathlib
from imatch.data.store import Stored
embeddings = Stored(pathlib.Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
print(sum(len(embeddings.tokens(row).xy) for row in range(len(embeddings))))
Stored(pathlib.Path(sys.argv[1]))
"""


def test_a_step_says_what_it_is_and_one_of_an_earlier_version_is_to_be_run_again(tmp_path, few_photographs):
    step = embedded(few_photographs, tmp_path, tag="tried")
    record = files.read_json(step.folder / "step.json", signed=True)
    assert record["about"] == {"dataset": "few", "weight": "sift", "configuration": "scale1_raw_tried"}
    assert open_step(step.folder).run == tmp_path / "r"
    before = {key: value for key, value in record.items() if key not in ("about", "run")}
    files.write_signed(step.folder / "step.json", before)
    with pytest.raises(StepError, match="is of an earlier version: run its notebook again, it keeps what is there"):
        open_step(step.folder)
    embedded(few_photographs, tmp_path, tag="tried")
    assert files.read_json(step.folder / "step.json", signed=True) == record


def test_a_step_that_failed_before_any_result_takes_its_correction(tmp_path, few_photographs):
    with pytest.raises(ImatchError, match=r"cannot be used.*max_skipped"):
        embedded(few_photographs, tmp_path, backbone_options={"contrast": 1e9})
    step = embedded(few_photographs, tmp_path)
    assert len(Stored(step.folder)) == 4
    with pytest.raises(StepError, match="was made differently"):
        embedded(few_photographs, tmp_path, backbone_options={"contrast": 0.03})


def test_any_number_of_shards_can_be_read(tmp_path, few_photographs):
    data = (few_photographs / "a.png").read_bytes()
    (tmp_path / "many").mkdir()
    for i in range(60):
        (tmp_path / "many" / f"{i:02d}.png").write_bytes(data)
    step = embedded(tmp_path / "many", tmp_path / "exports", shard_size=1)
    command = [sys.executable, "-c", OPEN, str(step.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == step.metrics["descriptors"]


def test_reference_tokens_come_from_the_backbone_of_01(house):
    data, _, tokens = house
    assert tokens.parameters == data.parameters
    assert tokens.upstream["embed"] == open_step(data.folder).fingerprint


def test_empty_corners_have_a_mask(house):
    from PIL import Image

    data, _, _ = house
    views, _ = referenced(data, kind="legacy", angles=(45,))
    rows = files.read_rows(views.folder / "references.jsonl")
    assert all(row["covered"] < 1 for row in rows)
    for row in rows:
        mask = np.asarray(Image.open(views.folder / row["mask"]))
        assert mask.shape == tuple(row["size"])
        assert mask.mean() == pytest.approx(row["covered"])


def test_reference_data_finds_every_source(house):
    data, _, references = house
    step, query, _, hits = searched(data, references, "reference-data")
    assert len(query) == 8
    assert step.metrics["hit_at_1"] == 1.0
    assert np.isneginf(hits.scores[:, 4]).all()  # five neighbours of four photographs
    record = json.loads((step.folder / "queries" / "references_few__Rfew__a_rot000_crop100.jpg.json").read_text())
    assert record["hits"][0]["id"] == "a.png"
    assert len(record["hits"]) == 4
    assert len((step.folder / "hits.csv").read_text().splitlines()) == 1 + 8 * 4


def test_data_reference_finds_its_references(house):
    data, _, references = house
    step, query, gallery, hits = searched(data, references, "data-reference", k=2)
    assert step.metrics["hit_at_1"] == 1.0
    assert {gallery.rows[row]["source"] for row in hits.rows[0]} == {query.ids[0]}


def test_items_do_not_find_themselves(house):
    data, _, references = house
    for direction in ("data-data", "reference-reference"):
        step, query, _, hits = searched(data, references, direction)
        assert not (hits.rows == np.arange(len(query))[:, None]).any()
        assert step.metrics["without_answer"] == (4 if direction == "data-data" else 0)


def test_siblings_can_be_left_out(house):
    data, _, references = house
    step, query, gallery, hits = searched(data, references, "reference-reference", k=7, exclude_siblings=True)
    for q in range(len(query)):
        found = [row for row in hits.rows[q] if row >= 0]
        assert len(found) == 6
        assert query.rows[q]["source"] not in {gallery.rows[row]["source"] for row in found}
    assert step.metrics["hit_at_1"] is None
    assert step.metrics["without_answer"] == 8


def test_one_photograph_has_no_neighbour(tmp_path, few_photographs):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.png").write_bytes((few_photographs / "a.png").read_bytes())
    data = embedded(tmp_path / "one", tmp_path / "exports")
    step, _, _, hits = searched(data, None, "data-data")
    assert (hits.rows == -1).all()
    _, pairs, metrics = matched(step)
    assert [(row["candidate"], row["reason"]) for row in pairs] == [(None, "nothing was found")]
    assert metrics["hit_at_1"] is None


def test_photographs_of_equal_content_are_right_answers_for_each_other(tmp_path, few_photographs):
    (tmp_path / "twins").mkdir()
    for name, source in {"a.png": "a.png", "again.png": "a.png", "b.png": "b.png"}.items():
        (tmp_path / "twins" / name).write_bytes((few_photographs / source).read_bytes())
    data = embedded(tmp_path / "twins", tmp_path / "exports")
    step, query, gallery, hits = searched(data, None, "data-data")
    assert step.metrics["twins"] == 1  # the second finds the first, which scores the same
    assert step.metrics["hit_at_1"] == 1.0
    assert step.metrics["without_answer"] == 1
    assert [gallery.ids[row] for row in hits.rows[:2, 0]] == ["again.png", "a.png"]
    assert len(query) == 3
    _, references = referenced(data)
    step, *_ = searched(data, references, "reference-data")
    assert step.metrics["hit_at_1"] == 1.0


def test_references_of_another_embedding_are_refused(house, tmp_path, few_photographs):
    _, _, references = house
    other = embedded(few_photographs, tmp_path, weight="dsift")
    with pytest.raises(StepError, match="was not made from"):
        searched(other, references, "reference-data")


def test_an_index_that_does_not_belong_is_caught(house, tmp_path):
    data, _, references = house
    _, _, gallery, _ = searched(data, references, "data-data")
    searcher.build(tmp_path / "index", gallery.vectors[::-1], gallery.digest)
    index = searcher.build(tmp_path / "index", gallery.vectors, gallery.digest)
    with pytest.raises(StepError, match="the index answers"):
        imatch.steps.check_index(index, gallery)


def test_matches_agree_with_the_truth(house):
    data, _, references = house
    index, *_ = searched(data, references, "reference-data")
    step, pairs, metrics = matched(index)
    assert metrics["reranked_hit_at_1"] == 1.0
    assert metrics["true_corner_error_median"] < 0.5
    for row in pairs:
        if row["right"]:
            assert row["verified"], row["reason"]
            assert row["rotation"] == pytest.approx(-row["angle"], abs=1)
            assert row["scale"] == pytest.approx(1, abs=0.02)
        folder = step.folder / "pairs" / files.flat_name(row["query"])
        written = json.loads((folder / f"{row['rank']:02d}.json").read_text())
        assert {key: written.get(key) for key in row} == {**row, "reranked": None}  # the place needs all pairs
        table = np.load(folder / f"{row['rank']:02d}.npy")
        assert table["inlier"].sum() == row["inliers"]
        assert (np.diff(table["similarity"]) <= 0).all()


def test_the_own_source_is_matched_though_it_was_not_retrieved(house):
    data, _, references = house
    index, query, gallery, hits = searched(data, references, "reference-data", k=1)
    wrong = (hits.rows + 1) % len(gallery)  # an index that misses everything
    missed = {**vars(hits), "rows": wrong, "right": np.zeros_like(hits.right)}
    with files.atomic(index.folder / "ranking.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **{name: values for name, values in missed.items() if values is not None})
    unsealed(index.folder)
    _, pairs, metrics = matched(index, candidates=1, outputs=["npy"], tag="wrong")
    own = [row for row in pairs if not row["retrieved"]]
    assert len(own) == len(query)
    assert all(row["right"] and row["rank"] is None for row in own)
    assert metrics["hit_at_1"] == metrics["reranked_hit_at_1"] == 0.0
    assert metrics["true_within_8px"] == 1.0


def test_pairs_of_two_references_know_their_truth(house):
    data, _, references = house
    index, *_ = searched(data, references, "reference-reference", k=1)
    _, pairs, _ = matched(index, candidates=1, model="similarity", tag="rr")
    assert all(row["right"] and row["corner_error"] < 1 for row in pairs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"candidates": 0}, "must be greater than 0"),
        ({"matcher": "mutal"}, "did you mean 'mutual'"),
        ({"matcher_options": {"max_ratios": 0.5}}, "did you mean 'max_ratio'"),
        ({"model": "rigid"}, "unknown model 'rigid'"),
        ({"outputs": ["jpg"]}, "did you mean 'png'"),
        ({"confidence": 2.0}, "confidence must be less than 1"),
        ({"tag": "a/b"}, "the name of a folder"),
    ],
    ids=str,
)
def test_match_refuses_wrong_requests_before_anything_runs(house, given, message):
    data, _, references = house
    index, *_ = searched(data, references, "reference-data")
    with pytest.raises(ImatchError, match=message):
        matched(index, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "legcy"}, "did you mean 'legacy'"),
        ({"crops": (1.5,)}, "less than or equal to 1"),
        ({"angles": ()}, "at least 1 item"),
        ({"angles": ("a",)}, "must be a valid number"),
        ({"angles": (1.5, 1.50000001)}, "names are equal"),
    ],
    ids=str,
)
def test_references_refuse_wrong_requests(house, given, message):
    with pytest.raises(ImatchError, match=message):
        referenced(house[0], **given)


def test_an_index_goes_to_another_run_and_what_follows_it_too(house):
    data, _, references = house
    step, *_ = searched(data, references, "reference-data", run="later")
    assert (data.folder.parts[-5], step.folder.parts[-6]) == ("r", "later")
    assert matched(step)[0].folder.parts[-6] == "later"
    with pytest.raises(ImatchError, match=r"run '\.\./up': it becomes the name of a folder"):
        indexed(data, references, "reference-data", run="../up")


def test_index_refuses_wrong_requests(house):
    data, _, references = house
    with pytest.raises(ImatchError, match="did you mean 'reference-data'"):
        searched(data, references, "references-data")
    with pytest.raises(ImatchError, match="needs references"):
        searched(data, None, "reference-data")
    with pytest.raises(ImatchError, match="k must be greater than 0"):
        searched(data, references, "data-data", k=0)
    with pytest.raises(StepError, match="no step at"):
        open_step(data.folder.parent)


def test_photographs_of_any_shape_give_grids_of_their_shape(tmp_path, few_photographs):
    step = embedded(few_photographs, tmp_path, weight="dsift", resize=imatch.Resize("long_side", long_side=128))
    embeddings = Stored(step.folder)
    assert [tuple(row["grid"]) for row in embeddings.rows] == [(6, 8), (8, 6), (8, 8), (6, 8)]
    tokens = embeddings.tokens(3)
    assert tokens.as_grid().shape == (6, 8, 128)
    h, w = embeddings.rows[3]["size"]
    assert tokens.xy.min(axis=0).tolist() == pytest.approx([w / 16 - 0.5, h / 12 - 0.5])
    assert not list((step.folder / "local").glob("*.xy.npy"))  # the grid says it
    with pytest.raises(ImatchError, match="use 112 or 128"):
        embedded(few_photographs, tmp_path, weight="dsift", resize=imatch.Resize("long_side", long_side=120))


MEASURE = """
import resource, sys
import imatch
larger, storage = imatch.Resize("scale", scale=4.0), imatch.StorageOptions(shard_size=16)
step = imatch.steps.start_embed(sys.argv[1], run="r", weight="dsift", resize=larger, storage=storage)
imatch.steps.finish_embed(step, imatch.steps.embed(step, imatch.ComputeOptions(workers=0)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_peak_memory_does_not_grow_with_the_number_of_photographs(tmp_path, few_photographs):
    data = [path.read_bytes() for path in sorted(few_photographs.glob("*.png"))]
    peaks = []
    for n in (32, 160):
        folder = tmp_path / f"of {n}"
        folder.mkdir()
        for i in range(n):
            (folder / f"{i:04d}.png").write_bytes(data[i % len(data)])
        environment = {**os.environ, "EXPORT_ROOT": str(tmp_path / "exports")}
        command = [sys.executable, "-c", MEASURE, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.splitlines()[-1]))
    stored = sum(path.stat().st_size for path in tmp_path.rglob("of 160/**/*.npy")) / 2**20
    assert stored > 25  # megabytes: kept in memory, they would show
    assert peaks[1] - peaks[0] < 0.25 * stored, peaks


def test_steps_are_found_where_exports_are(few_photographs, tmp_path, monkeypatch):
    """In the container EXPORT_ROOT is a mount of its own, and the notebooks' defaults begin with exports/."""
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path / "elsewhere"))
    step = embedded(few_photographs, "", run="demo")
    assert step.folder.is_relative_to(tmp_path / "elsewhere" / "demo")
    step.folder = "exports" / step.folder.relative_to(tmp_path / "elsewhere")
    views, _ = referenced(step, angles=(0,))
    assert views.folder.is_relative_to(tmp_path / "elsewhere" / "demo")


def test_the_last_finished_step_of_a_run_is_found(few_photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path))
    with pytest.raises(StepError, match=r"no finished 01_embed in .*run it first"):
        imatch.steps.last_finished("", "01_embed", "r")
    one, other = embedded(few_photographs, tmp_path), embedded(few_photographs, tmp_path, weight="dsift")
    _, references = referenced(one, angles=(0,))
    embed_poses(Stored(one.folder), rotations.poses(4), resources=by(workers=0))  # later, but of no use by itself
    imatch.steps.start_embed(str(few_photographs), run="r", tag="unfinished")
    capsys.readouterr()
    assert imatch.steps.last_finished("", "01_embed", "r") == str(other.folder)
    assert capsys.readouterr().out == f"also there: {one.folder}\nthe last finished 01_embed: {other.folder}\n"
    assert imatch.steps.last_finished("", "02_references", "r", of=str(one.folder)) == str(references.folder)
    with pytest.raises(StepError, match="no finished 02_references"):
        imatch.steps.last_finished("", "02_references", "r", of=str(other.folder))
    assert imatch.steps.last_finished("exports/given", "01_embed", "r") == "exports/given"


# --- rotation -----------------------------------------------------------------------------------------------


def test_a_backbone_that_is_blind_to_rotation_is_told_from_one_that_sees_it(monkeypatch, tmp_path, leaves):
    with_toys(monkeypatch)
    angles, metrics, hits = (0, 90, 180, 270), {}, {}
    for weight in ("histogram", "pixels"):
        data = embedded(leaves, tmp_path, weight=weight)
        _, references = referenced(data, angles=angles, file_type="png")  # lossless: right angles are exact copies
        step = indexed(data, references, "reference-data", k=3)
        _, _, _, rows, figures = judged(step)
        metrics[weight] = step.finish(figures)
        hits[weight] = {row["query"]: float(0 in row["right_ranks"]) for row in rows}
        clusters = {row["query"]: row["cluster"] for row in rows}
    blind, sees = (metrics[weight]["by_view"] for weight in metrics)
    assert [view["angle"] for view in blind] == [view["angle"] for view in sees] == list(angles)
    assert [view["value"] for view in blind] == [1.0] * 4
    assert sees[0]["value"] == 1.0
    assert all(view["value"] <= 0.25 for view in sees[1:])
    for upright, turned in zip(blind[1:], sees[1:], strict=True):
        assert turned["clusters"] == 12
        assert turned["high"] < upright["low"]
    assert metrics["histogram"]["hit_at_1"] == 1.0
    assert metrics["pixels"]["hit_at_1"] == pytest.approx(np.mean([view["value"] for view in sees]))
    difference = intervals.paired_difference(hits["histogram"], hits["pixels"], clusters)
    assert difference.value == pytest.approx(1 - metrics["pixels"]["hit_at_1"])
    assert 0 < difference.low < difference.value < difference.high
    table = tables.retrieval_table(metrics["histogram"]).splitlines()
    assert table[0] == "48 queries in a gallery of 12"
    assert table[1] == "Hit@1        1.00 [0.74, 1.00]"


# --- what a search says against every pair ------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["reference-data", "data-reference", "reference-reference", "data-data"])
@pytest.mark.parametrize("siblings", [False, True], ids=["", "without siblings"])
@pytest.mark.parametrize(("truth", "k"), [("photograph", 15), ("photograph", 1), ("nearest", 1), ("radius", 2)])
def test_a_ranking_is_what_looking_at_every_pair_gives(drawn, direction, siblings, truth, k):
    """Hits, which are right, how many answers there are, and what is found when they are gone."""
    data, references, labels = drawn
    x = {f"{i:02d}.png": 10.0 * i for i in range(12)}
    given = {"labels": str(labels), "radius": 25.0, "exclude_siblings": siblings, "k": k, "truth": truth}
    given["tag"] = f"{truth}{k}{int(siblings)}"
    query, gallery, ranking, rows, _ = judged(indexed(data, references, direction, **given))

    def source(row):
        return row.get("source", row["id"])

    similarity = np.asarray(query.vectors) @ np.asarray(gallery.vectors).T
    same = query.folder == gallery.folder
    for q, asks in enumerate(query.rows):
        gone = {
            g
            for g, row in enumerate(gallery.rows)
            if (same and g == q) or (siblings and (same or truth != "photograph") and source(row) == source(asks))
        }
        metres = {g: abs(x[source(row)] - x[source(asks)]) for g, row in enumerate(gallery.rows) if g not in gone}
        answers = {
            "photograph": {g for g in metres if source(gallery.rows[g]) == source(asks)},
            "nearest": {g for g, far in metres.items() if far == min(metres.values())},
            "radius": {g for g, far in metres.items() if far <= 25},
        }[truth]
        order = sorted(metres, key=lambda g: (-similarity[q, g], g))[:k]
        found = ranking.rows[q][ranking.rows[q] >= 0]
        assert len(found) == min(k, len(metres))
        assert ranking.scores[q, : len(found)] == pytest.approx(similarity[q, order], abs=1e-5)
        assert ranking.metres[q, : len(found)].tolist() == pytest.approx([metres[g] for g in found])
        assert np.isnan(ranking.metres[q, len(found) :]).all()
        assert [*map(bool, ranking.right[q])] == [g in answers for g in found] + [False] * (k - len(found))
        assert ranking.answers[q] == rows[q]["answers"] == len(answers)
        assert ranking.candidates[q] == len(metres)
        wrong = [similarity[q, g] for g in metres if g not in answers]
        assert ranking.without[q] == pytest.approx(max(wrong, default=-np.inf), abs=1e-5)
        assert rows[q]["right_ranks"] == [rank for rank, g in enumerate(found) if g in answers]


# --- positions ----------------------------------------------------------------------------------------------

METRE = 180 / math.pi / 6_371_000  # degrees of latitude


@pytest.fixture(scope="module")
def shore(leaves, tmp_path_factory):
    """Three photographs by EXIF: a and c at one place, b 40 metres north. a and b look most alike, c more like a."""
    folder = tmp_path_factory.mktemp("photographs") / "shore"
    folder.mkdir()
    one, two, three = (np.asarray(Image.open(leaves / f"{i:02d}.png"), float) for i in range(3))
    shown = {"a": (one, 0), "b": (0.9 * one + 0.1 * two, 40), "c": (0.6 * one + 0.4 * three, 0)}
    for name, (pixels, north) in shown.items():
        exif = Image.Exif()
        exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (37 + north * METRE, 0.0, 0.0), 3: "E", 4: (127.0, 0.0, 0.0)}
        Image.fromarray(pixels.round().astype(np.uint8)).save(folder / f"{name}.jpg", exif=exif, quality=100)
    return folder


@pytest.fixture
def pixels(monkeypatch, tmp_path, shore):
    """The three on the shore by their pixels."""
    with_toys(monkeypatch)
    return embedded(shore, tmp_path, weight="pixels")


def labelled(tmp_path, text):
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return str(path)


PLANE = "id,x,y,yaw\na.jpg,0,0,0\nb.jpg,0,40,10\nc.jpg,0,0,180\n"


def table_of(step):
    with (step.folder / "hits.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metres_of_hits_by_hand(pixels):
    step, _, gallery, ranking = searched(pixels, None, "data-data", k=2)
    assert [[gallery.ids[row] for row in rows] for rows in ranking.rows] == [
        ["b.jpg", "c.jpg"],
        ["a.jpg", "c.jpg"],
        ["a.jpg", "b.jpg"],
    ]
    metres = [[40, 0], [40, 40], [0, 40]]
    assert ranking.metres == pytest.approx(np.array(metres), abs=0.01)
    figures = step.metrics["positions"]
    assert (figures["queries"], figures["unknown"]) == (3, 0)
    assert figures["top1_metres_median"] == pytest.approx(40, abs=0.01)
    assert figures["top1_metres_mean"] == pytest.approx(80 / 3, abs=0.01)
    assert figures["least_metres_median"] == pytest.approx(0, abs=0.01)
    thirds = pytest.approx({"10": 1 / 3, "20": 1 / 3, "50": 1.0, "100": 1.0})
    assert figures["within"] == thirds
    assert figures["within_top_k"] == pytest.approx({"10": 2 / 3, "20": 2 / 3, "50": 1.0, "100": 1.0})
    rows = files.read_rows(step.folder / "queries.jsonl")
    assert [row["metres"] for row in rows] == pytest.approx([40, 40, 0], abs=0.01)
    assert [row["least_metres"] for row in rows] == pytest.approx([0, 40, 0], abs=0.01)
    assert [float(row["metres"]) for row in table_of(step)] == pytest.approx([40, 0, 40, 40, 0, 40], abs=0.01)
    for q, name in enumerate("abc"):
        record = files.read_json(step.folder / "queries" / f"{name}.jpg.json")
        assert [hit["metres"] for hit in record["hits"]] == pytest.approx(metres[q], abs=0.01)
    assert "first hit 40.00 (median), nearest of all hits 0.00" in tables.retrieval_table(step.metrics)


# truth and radius -> answers and right ranks of a, b and c
BY_PLACE = {
    ("nearest", 60.0): ([1, 2, 1], [[1], [0, 1], [0]]),
    ("radius", 30.0): ([1, 0, 1], [[1], [], [0]]),
    ("radius", 60.0): ([2, 2, 2], [[0, 1], [0, 1], [0, 1]]),
}


@pytest.mark.parametrize(("truth", "radius"), BY_PLACE, ids=str)
def test_right_answers_by_place(pixels, truth, radius):
    step, *_ = searched(pixels, None, "data-data", k=2, truth=truth, radius=radius)
    rows = files.read_rows(step.folder / "queries.jsonl")
    answers, ranks = BY_PLACE[truth, radius]
    assert [row["answers"] for row in rows] == answers
    assert [row["right_ranks"] for row in rows] == ranks
    assert step.metrics["without_answer"] == answers.count(0)
    hits = [float(0 in found) for found, many in zip(ranks, answers, strict=True) if many]
    assert step.metrics["hit_at_1"] == pytest.approx(np.mean(hits))
    wanted = [len(found) / many for found, many in zip(ranks, answers, strict=True) if many]
    assert step.metrics["recall_at_2"] == pytest.approx(np.mean(wanted))


def test_labels_stand_before_the_exif(pixels, tmp_path):
    labels = labelled(tmp_path, "id,x,y\na.jpg,0,0\nb.jpg,3,4\n")  # c is nowhere
    step, *_ = searched(pixels, None, "data-data", k=2, truth="radius", radius=10.0, labels=labels)
    rows = files.read_rows(step.folder / "queries.jsonl")
    assert [row["answers"] for row in rows] == [1, 1, 0]
    assert [row["metres"] for row in rows] == [5.0, 5.0, None]
    assert [row["metres"] for row in table_of(step)] == ["5.0", "", "5.0", "", "", ""]
    figures = step.metrics["positions"]
    assert (figures["queries"], figures["unknown"], figures["top1_metres_mean"]) == (2, 1, 5.0)


def test_headings_may_differ_so_much_and_no_more(pixels, tmp_path):
    labels = labelled(tmp_path, PLANE)
    step, *_ = searched(pixels, None, "data-data", truth="radius", heading=90.0, labels=labels, tag="90")
    assert [row["answers"] for row in files.read_rows(step.folder / "queries.jsonl")] == [1, 1, 0]
    step, *_ = searched(pixels, None, "data-data", truth="radius", heading=5.0, labels=labels, tag="5")
    assert step.metrics["without_answer"] == 3
    step, *_ = searched(pixels, None, "data-data", truth="nearest", heading=90.0, labels=labels, tag="nearest")
    assert [row["right_ranks"] for row in files.read_rows(step.folder / "queries.jsonl")] == [[0], [0], []]


def test_headings_come_from_photographs_too(pixels, capsys):
    rows = files.read_rows(pixels.folder / "images.jsonl")
    for row, yaw in zip(rows, ({"yaw": 350.0}, {"yaw": 10.0}, {}), strict=True):
        row["position"] |= yaw
    files.write_rows(pixels.folder / "images.jsonl", rows)
    unsealed(pixels.folder)
    step, *_ = searched(pixels, None, "data-data", truth="radius", heading=30.0)
    assert [row["answers"] for row in files.read_rows(step.folder / "queries.jsonl")] == [1, 1, 0]
    assert "1 of 3 photographs (query side) have no heading and do not count" in capsys.readouterr().out


def test_a_reference_lies_where_its_source_does_and_is_turned_from_it(pixels, tmp_path):
    _, references = referenced(pixels, angles=(0, 170, 180), file_type="png")
    labels = labelled(tmp_path, PLANE)
    given = {"truth": "radius", "heading": 90.0, "labels": labels, "k": 3}
    step, query, gallery, ranking = searched(pixels, references, "reference-data", **given)
    right = {
        id: {gallery.ids[row][0] for row, is_right in zip(rows, found, strict=True) if is_right}
        for id, rows, found in zip(query.ids, ranking.rows, ranking.right, strict=True)
    }
    # a points north, b 10 degrees east of it, c south: turned by 180 it is the other way round
    assert {id.rpartition("/")[2][:8]: "".join(sorted(found)) for id, found in right.items()} == {
        "a_rot000": "ab",
        "a_rot170": "c",  # 170, and b at 10 is 160 away
        "a_rot180": "c",
        "b_rot000": "ab",
        "b_rot170": "c",
        "b_rot180": "c",
        "c_rot000": "c",
        "c_rot170": "ab",  # 350
        "c_rot180": "ab",
    }
    assert ranking.metres.shape == (9, 3)
    assert step.metrics["positions"]["unknown"] == 0


def test_a_reference_turned_to_the_east_finds_what_looks_east(pixels, tmp_path):
    """Turned by 90 degrees counter-clockwise, what was on the right, the east, is on top."""
    _, references = referenced(pixels, angles=(90,), file_type="png")
    labels = labelled(tmp_path, "id,x,y,yaw\na.jpg,0,0,0\nb.jpg,0,0,90\nc.jpg,0,0,270\n")
    given = {"truth": "radius", "heading": 45.0, "labels": labels, "k": 3}
    _, query, gallery, ranking = searched(pixels, references, "reference-data", **given)
    found = {
        row["source"]: [gallery.ids[hit] for hit in hits[right]]
        for row, hits, right in zip(query.rows, ranking.rows, ranking.right, strict=True)
    }
    assert found == {"a.jpg": ["b.jpg"], "b.jpg": [], "c.jpg": ["a.jpg"]}


def test_changed_labels_are_refused_or_computed_again(pixels, tmp_path):
    labels = labelled(tmp_path, PLANE)
    given = {"truth": "radius", "radius": 30.0, "labels": labels, "tag": "places"}
    step, *_ = searched(pixels, None, "data-data", **given)
    assert step.metrics["without_answer"] == 1
    assert searched(pixels, None, "data-data", **given)[0].metrics == step.metrics
    labelled(tmp_path, PLANE.replace("0,40,10", "0,20,10"))
    with pytest.raises(StepError, match=r"(?s)made differently.*upstream\.labels"):
        searched(pixels, None, "data-data", **given)
    with pytest.raises(StepError, match=r"(?s)made differently.*labels"):
        searched(pixels, None, "data-data", **{**given, "labels": ""})
    step, *_ = searched(pixels, None, "data-data", **given, on_change="recompute")
    assert step.metrics["without_answer"] == 0


def test_places_that_nobody_knows_are_said(house, pixels, tmp_path):
    data, _, references = house
    step, *_ = searched(data, references, "reference-data")
    assert step.metrics["positions"] is None
    assert {row["metres"] for row in table_of(step)} == {""}
    for truth in ("radius", "nearest"):
        with pytest.raises(
            ImatchError,
            match=rf"truth.kind is {truth}, but no photograph of the queries .* set truth.labels to",
        ):
            searched(data, references, "reference-data", truth=truth, tag=truth)
    with pytest.raises(ImatchError, match=r"truth\.heading 90 wants headings, and not one of the queries is known"):
        searched(pixels, None, "data-data", truth="radius", heading=90.0)
    elsewhere = labelled(tmp_path, "id,x,y\nflight 9/z.png,0,0\n")
    with pytest.raises(ImatchError, match=r"names none of the photographs .*such as a\.png"):
        searched(data, references, "reference-data", labels=elsewhere, tag="labels")


def test_queries_of_a_capture_count_together(pixels):
    with pytest.raises(ImatchError, match=r"truth.cluster is capture, but a\.jpg belongs to none"):
        searched(pixels, None, "data-data", cluster="capture", tag="none")
    rows = files.read_rows(pixels.folder / "images.jsonl")
    files.write_rows(pixels.folder / "images.jsonl", [{**row, "capture": row["id"] == "a.jpg"} for row in rows])
    unsealed(pixels.folder)
    _, references = referenced(pixels)
    given = {"cluster": "capture", "truth": "radius", "radius": 60.0}
    for other, direction in ((None, "data-data"), (references, "reference-data")):
        step, *_ = searched(pixels, other, direction, **given)
        said = step.metrics["intervals"]["hit_at_1"]
        assert (said["clusters"], said["why"]) == (2, "2 captures are too few, 8 are the least")


def test_an_index_refuses_a_wrong_truth_before_anything_is_written(house):
    data, _, references = house
    wrong = {
        "did you mean 'radius'": {"truth": "radiu"},
        "did you mean 'capture'": {"cluster": "captures"},
        "radius must be greater than 0": {"radius": 0.0},
        "heading must be less than or equal to 180": {"heading": 181.0},
        "precision must be less than 1": {"precision": 1.0},
        "give the path of a file": {"labels": "no/such.csv"},
    }
    for message, given in wrong.items():
        with pytest.raises(ImatchError, match=message):
            searched(data, references, "reference-data", tag="wrong", **given)
    assert not list(data.folder.parents[3].glob("03_index/**/*wrong*"))


# --- no match -----------------------------------------------------------------------------------------------


def test_what_is_believed_is_the_same_everywhere(house):
    """In the rows, the table, each query's file and 04_match it is a score of the threshold or above."""
    data, _, references = house
    index, query, _, ranking = searched(data, references, "reference-data", precision=0.6, tag="believed")
    threshold = index.metrics["threshold"]["value"]
    believed = ranking.scores >= threshold
    assert believed.any()
    assert not believed[:, :4].all()
    found = ranking.rows >= 0
    assert [row["accepted"] for row in files.read_rows(index.folder / "queries.jsonl")] == believed[:, 0].tolist()
    assert [row["accepted"] == "1" for row in table_of(index)] == believed[found].tolist()
    for q, id in enumerate(query.ids):
        record = files.read_json(index.folder / "queries" / f"{files.flat_name(id)}.json")
        assert record["accepted"] == believed[q, 0]
        assert [hit["accepted"] for hit in record["hits"]] == believed[q][found[q]].tolist()
    _, pairs, _ = matched(index, outputs=["json"], candidates=4)
    place = {id: q for q, id in enumerate(query.ids)}
    assert [row["accepted"] for row in pairs] == [bool(believed[place[r["query"]], r["rank"]]) for r in pairs]
    asked = ranking.right[:, 0][believed[:, 0]]
    alone = int((ranking.without >= threshold).sum())
    assert index.metrics["threshold"]["precision"] == pytest.approx(asked.sum() / (len(asked) + alone))
    assert index.metrics["threshold"]["coverage"] == pytest.approx(believed[:, 0].mean())


def test_nothing_is_believed_where_too_few_queries_could_tell(house):
    data, _, references = house
    index, *_ = searched(data, references, "reference-data")
    assert index.metrics["threshold"]["value"] is None
    assert "59 of 59 would do" in index.metrics["threshold"]["why"]
    assert not any(row["accepted"] for row in files.read_rows(index.folder / "queries.jsonl"))
    assert {row["accepted"] for row in table_of(index)} == {"0"}
    _, pairs, _ = matched(index, outputs=["json"], tag="none")
    assert not any(row["accepted"] for row in pairs)


def test_matches_say_how_far_they_are_from_the_truth_over_the_seam(few_photographs, tmp_path):
    """Turned by 180 degrees, some are found at 179.9 and others at -179.9: all are right to a degree."""
    data = embedded(few_photographs, tmp_path)
    views, references = referenced(data, kind="legacy", angles=(180,), crops=(0.75,))
    index, *_ = searched(data, references, "reference-data")
    _, pairs, metrics = matched(index, candidates=1)
    assert len(pairs) == 4
    for row in pairs:
        assert abs(row["rotation"]) == pytest.approx(180, abs=1)
        assert row["rotation_error"] < 1
        assert row["scale_error"] < 0.01
        assert row["accuracy"] == sorted(row["accuracy"])
        assert row["accuracy"][-1] >= row["inliers"] / row["matches"] - 0.05
    assert metrics["rotation_error_median"] < 1
    assert metrics["corner_auc"]["10"] > 0.8
    assert views.metrics["references"] == 4


def test_a_reference_in_which_nothing_was_found_counts_as_wrong(few_photographs, tmp_path):
    """Of one photograph the middle is even: its references are no excuse, they find nothing and are wrong."""
    folder = tmp_path / "hollow"
    shutil.copytree(few_photographs, folder)
    pixels = np.asarray(Image.open(few_photographs / "c.jpg")).copy()
    pixels[24:96, 24:96] = 128
    Image.fromarray(pixels).save(folder / "hollow.png")
    data = embedded(folder, tmp_path / "exports", weight="dsift")
    with pytest.warns(ImatchWarning, match="2 of 10 photographs were skipped"):
        _, references = referenced(data, crops=(0.5,), file_type="png")
    step, query, _, ranking = searched(data, references, "reference-data", k=2)
    assert len(query) == 8
    rows = files.read_rows(step.folder / "queries.jsonl")
    missed = [row for row in rows if not row["embedded"]]
    assert {row["photograph"] for row in missed} == {"hollow.png"}
    assert [row["angle"] for row in missed] == [0.0, 90.0]
    for row in missed:
        assert (row["answers"], row["right_ranks"], row["score"], row["accepted"]) == (1, [], None, False)
    assert (ranking.rows[8:] == -1).all()
    figures = step.metrics
    assert (figures["queries"], figures["missed"], figures["without_answer"], figures["queries_skipped"]) == (
        10,
        2,
        0,
        0,
    )
    found = [0 in row["right_ranks"] for row in rows]
    assert figures["hit_at_1"] == pytest.approx(np.mean(found))
    assert sum(found) <= 8
    match_step, pairs, metrics = matched(step, outputs=["json"])
    lost = [row for row in pairs if row["candidate"] is None]
    assert [row["query"] for row in lost] == [row["query"] for row in missed]
    assert metrics["queries"] == 10
    assert metrics["pairs"] == len(pairs) - 2
    assert sum(row["retrieved"] and row["candidate"] is not None for row in pairs) == 8 * 2
    assert metrics["hit_at_1"] == figures["hit_at_1"]
    assert metrics["verified"] <= 0.8
    assert match_step.finished
