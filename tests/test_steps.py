"""From a folder to matches through the library's verbs: directions, exclusions, names, refusals."""

import contextlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import imatch.records
from imatch import runs, store
from imatch.records import ImatchError, StepError
from imatch.steps.references import _reference_names
from imatch.steps.shared import flat_name


def embedded(photographs, exports, weight="sift", resize=None, **given):
    max_skipped = given.pop("max_skipped", 0.05)
    options = {"run": "r", "backbone_options": {}, "shard_size": 3, "tag": "", "on_change": "refuse", **given}
    step = imatch.start_embed(
        str(photographs), exports=str(exports), weight=weight, resize=resize or imatch.Resize(), **options
    )
    imatch.finish_embed(step, imatch.embed(step, workers=0, max_skipped=max_skipped))
    return step


def referenced(step, kind="isometric", angles=(0, 90), crops=(1.0,)):
    views = imatch.start_references(
        str(step.folder), kind=kind, angles=angles, crops=crops, quality=95, tag="", on_change="refuse"
    )
    imatch.make_references(views, workers=0)
    tokens = imatch.start_reference_tokens(views)
    imatch.finish_embed(tokens, imatch.embed(tokens, workers=0, max_skipped=1.0))
    return views, tokens


def searched(data, references, direction, k=5, exclude_siblings=False):
    step = imatch.start_index(
        str(data.folder),
        str(references.folder) if references else "",
        direction=direction,
        index="flat",
        k=k,
        exclude_siblings=exclude_siblings,
        tag=f"k{k}s{int(exclude_siblings)}",
        on_change="refuse",
    )
    query, gallery = imatch.query_and_gallery(step)
    index = imatch.build_index(step, gallery)
    twins = imatch.self_check(index, gallery)
    hits = imatch.search(step, index, query, gallery)
    step.finish(imatch.index_metrics(step, query, gallery, hits, twins))
    return step, query, gallery, hits


def matched(index, **given):
    options = {
        "candidates": 2,
        "matcher": "mutual",
        "matcher_options": {},
        "model": "homography",
        "threshold": 0.0,
        "confidence": 0.9999,
        "iterations": 1000,
        "min_inliers": 8,
        "min_share": 0.0,
        "outputs": ["json", "npy", "png"],
        "tag": "",
        "on_change": "refuse",
        **given,
    }
    step = imatch.start_match(str(index.folder), **options)
    pairs = imatch.match(step, workers=0)
    return step, pairs, imatch.finish_match(step, pairs)


@pytest.fixture(scope="module")
def house(few_photographs, tmp_path_factory):
    data = embedded(few_photographs, tmp_path_factory.mktemp("exports"))
    return data, *referenced(data)


def test_references_are_named_and_placed_as_older_exports_were(house):
    _, views, _ = house
    ids = [row["id"] for row in store.read_rows(views.folder / "references.jsonl")]
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
    ids = ["a/b", "a__b", "a_/b", "a/_b", "가/" * 90 + "a", "가/" * 90 + "b"]
    names = [flat_name(id) for id in ids]
    assert len({*names}) == len(ids)
    assert max(len(name.encode()) for name in names) < 200


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
                stack.enter_context(pytest.warns(imatch.records.ImatchWarning, match=r"ramp\.png: nothing to describe"))
            step = embedded(folder, tmp_path / "exports", weight=weight, max_skipped=0.5)
        with contextlib.ExitStack() as stack:
            if weight == "sift":
                stack.enter_context(pytest.warns(imatch.records.ImatchWarning, match="2 of 10"))
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
    assert runs.read(step.folder).linked("photographs") == tmp_path / "one" / "few"


OPEN = """
import resource, sys, pathlib
import imatch
embeddings = imatch.Embeddings(pathlib.Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
print(sum(len(embeddings.tokens(row).xy) for row in range(len(embeddings))))
imatch.Embeddings(pathlib.Path(sys.argv[1]))
"""


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
    assert tokens.upstream["embed"] == runs.read(data.folder).fingerprint


def test_empty_corners_have_a_mask(house):
    from PIL import Image

    data, _, _ = house
    views, _ = referenced(data, kind="legacy", angles=(45,))
    rows = store.read_rows(views.folder / "references.jsonl")
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
    assert pairs == []
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


def test_an_index_that_does_not_belong_is_caught(house):
    data, _, references = house
    step, _, gallery, _ = searched(data, references, "data-data")
    index = imatch.build_index(step, gallery)
    index.build(np.asarray(gallery.vectors)[::-1])
    with pytest.raises(StepError, match="the index answers"):
        imatch.self_check(index, gallery)


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
        folder = step.folder / "pairs" / flat_name(row["query"])
        assert json.loads((folder / f"{row['rank']:02d}.json").read_text()) == row
        table = np.load(folder / f"{row['rank']:02d}.npy")
        assert table["inlier"].sum() == row["inliers"]
        assert (np.diff(table["similarity"]) <= 0).all()


def test_the_own_source_is_matched_though_it_was_not_retrieved(house):
    data, _, references = house
    index, query, gallery, hits = searched(data, references, "reference-data", k=1)
    wrong = (hits.rows + 1) % len(gallery)  # an index that misses everything
    with store.atomic(index.folder / "hits.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, rows=wrong, scores=hits.scores)
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
        ({"candidates": 0}, "at least 1"),
        ({"matcher": "mutal"}, "did you mean 'mutual'"),
        ({"matcher_options": {"min_similarty": 0.5}}, "did you mean 'min_similarity'"),
        ({"model": "rigid"}, "is not known"),
        ({"outputs": ["jpg"]}, "unknown output"),
        ({"confidence": 2.0}, "between 0 and 1"),
        ({"tag": "a/b"}, "part of a folder's name"),
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
        ({"crops": (1.5,)}, "above 0 and up to 1"),
        ({"angles": ()}, "at least one"),
        ({"angles": ("a",)}, "must be numbers"),
        ({"angles": (1.5, 1.50000001)}, "names are equal"),
    ],
    ids=str,
)
def test_references_refuse_wrong_requests(house, given, message):
    with pytest.raises(ImatchError, match=message):
        referenced(house[0], **given)


def test_index_refuses_wrong_requests(house):
    data, _, references = house
    with pytest.raises(ImatchError, match="did you mean 'reference-data'"):
        searched(data, references, "references-data")
    with pytest.raises(ImatchError, match="needs references"):
        searched(data, None, "reference-data")
    with pytest.raises(ImatchError, match="at least 1"):
        searched(data, references, "data-data", k=0)
    with pytest.raises(StepError, match="no step at"):
        runs.read(data.folder.parent)


def test_photographs_of_any_shape_give_grids_of_their_shape(tmp_path, few_photographs):
    step = embedded(few_photographs, tmp_path, weight="dsift", resize=imatch.Resize("long_side", long_side=128))
    embeddings = imatch.Embeddings(step.folder)
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
step = imatch.start_embed(sys.argv[1], exports=sys.argv[2], run="r", weight="sift", backbone_options={},
                          resize=imatch.Resize(), shard_size=16, tag="", on_change="refuse")
imatch.finish_embed(step, imatch.embed(step, workers=0))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_peak_memory_does_not_grow_with_the_number_of_photographs(tmp_path, few_photographs):
    data = [path.read_bytes() for path in sorted(few_photographs.glob("*.png"))]
    peaks = []
    for n in (64, 400):
        folder = tmp_path / f"of {n}"
        folder.mkdir()
        for i in range(n):
            (folder / f"{i:04d}.png").write_bytes(data[i % len(data)])
        command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "exports")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout.splitlines()[-1]))
    stored = sum(path.stat().st_size for path in tmp_path.rglob("of 400/**/*.npy")) / 2**20
    assert stored > 35  # megabytes: kept in memory, they would show
    assert peaks[1] - peaks[0] < 0.25 * stored, peaks


def test_browser_redraws(house):
    data, _, references = house
    index, *_ = searched(data, references, "reference-data")
    step, pairs, _ = matched(index)
    box = imatch.browse(step)
    (query, rank), (threshold, inliers) = (row.children for row in box.children[:2])
    picture, text = box.children[2:]
    first = bytes(picture.value)
    assert first.startswith(b"\x89PNG")
    threshold.value = 0.999
    stricter = bytes(picture.value)
    assert stricter != first
    rank.index = 1
    assert bytes(picture.value) != stricter
    threshold.value = 0.0
    inliers.value = False
    assert f"of {rank.value['matches']} correspondences shown" in text.value
    assert text.value.startswith(f"{rank.value['matches']} of")
    query.value = pairs[-1]["query"]
    assert rank.value["query"] == pairs[-1]["query"]
