"""Faults that raise no error by themselves are named: slipped rows, other backbones, leaks, near-duplicates, chance."""

import itertools
import json
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image, ImageEnhance

import imatch
from imatch.core import files
from imatch.core.step import open_step
from imatch.core.types import ImatchError, ImatchWarning, StepError
from imatch.data import images, store
from imatch.data.images import Resize
from imatch.data.shards import Shards
from imatch.data.store import Stored
from imatch.evaluation import alarms
from tests import random_weights, test_legacy, test_perimage
from tests.leaves import dead_leaves
from tests.test_steps import embedded, indexed, judged, referenced, unsealed, with_toys, write_leaves

EVERY_ROW = 10**6


def audited(step, spot_check=2, **planted):
    """The alarms of a step that was searched; each is a warning, too."""
    query, gallery, _, _, metrics = judged(step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ImatchWarning)
        said = imatch.steps.audit_index(step, query, gallery, {**metrics, **planted}, spot_check=spot_check)
    assert [str(one.message) for one in caught] == said
    step.finish({**metrics, "alarms": said})
    return said


def among(step, **given):
    """The alarms of a step's photographs searched among themselves, but that none of them has an answer."""
    said = audited(indexed(step, None, "data-data"), **given)
    return [one for one in said if not one.startswith("no query has a right answer")]


def asked(queries, gallery, **given):
    """The alarms of one set of photographs as queries of another."""
    return audited(indexed(gallery, queries, "reference-data"), **given)


@pytest.fixture(scope="module")
def demo(demo_photographs, tmp_path_factory):
    """The demo's photographs, of which 18 show 18 things."""
    return embedded(
        demo_photographs, tmp_path_factory.mktemp("demo"), weight="dsift", resize=Resize("scale", scale=0.5)
    )


@pytest.fixture
def few(few_photographs, tmp_path):
    step = embedded(few_photographs, tmp_path / "exports", shard_size=2)
    unsealed(step.folder)  # as of an earlier version: no digest of a file tells what is wrong
    return step


# --- nothing wrong ------------------------------------------------------------------------------------------


def test_a_good_store_raises_no_alarm(few):
    _, references = referenced(few)
    for direction in ("reference-data", "data-reference", "reference-reference"):
        assert audited(indexed(few, references, direction), spot_check=EVERY_ROW) == []
    assert among(few, spot_check=EVERY_ROW) == []


def test_an_audit_can_be_had_again_of_a_finished_step(few):
    step = indexed(few, None, "data-data")
    first = audited(step)
    assert step.finished
    assert audited(step) == first == step.metrics["alarms"]
    assert len(first) == 1
    assert first[0].startswith("no query has a right answer in the gallery")


# --- rows that slipped --------------------------------------------------------------------------------------


def test_shuffled_vectors_are_refused_and_named(few):
    _, references = referenced(few)
    vectors = np.load(few.folder / "global.npy")
    np.save(few.folder / "global.npy", vectors[[1, 0, 3, 2]])
    wanted = r"4 of 4 rows of global\.npy .*: the row of a\.png holds the vector of b\.png\. Delete the folder"
    with pytest.raises(StepError, match=wanted):
        among(few, spot_check=0)
    with pytest.raises(StepError, match=wanted):
        audited(indexed(few, references, "reference-data"), spot_check=0)


def test_a_strange_vector_is_refused_and_named(few):
    vectors = np.load(few.folder / "global.npy")
    vectors[2] = np.roll(vectors[2], 1)
    np.save(few.folder / "global.npy", vectors)
    with pytest.raises(StepError, match=r"1 of 4 rows .* the row of c\.jpg holds a vector that no photograph"):
        among(few, spot_check=0)


def test_shuffled_vectors_of_references_are_refused(few):
    _, references = referenced(few)
    path = references.folder / "global.npy"
    np.save(path, np.roll(np.load(path), 1, axis=0))
    unsealed(references.folder)
    with pytest.raises(StepError, match=r"8 of 8 rows .* holds the vector of references_few/"):
        audited(indexed(few, references, "reference-data"), spot_check=0)


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]], ids=str)
def test_a_list_in_another_order_is_refused_when_it_is_opened(few, order):
    rows = files.read_rows(few.folder / "images.jsonl")
    files.write_rows(few.folder / "images.jsonl", [rows[i] for i in order])
    with pytest.raises(StepError, match=r"does not follow|not sorted"):
        Stored(few.folder)


def swap(step, kept):
    """Swap the numbers of the first two photographs, and what their rows say of themselves but for what is kept."""
    rows = files.read_rows(step.folder / "images.jsonl")
    n = rows[0]["n"]
    assert [(row["shard"], row["first"]) for row in rows[:2]] == [(0, 0), (0, n)]
    first = {**rows[1], **{name: rows[0][name] for name in kept}, "first": 0}
    second = {**rows[0], **{name: rows[1][name] for name in kept}, "first": rows[1]["n"]}
    files.write_rows(step.folder / "images.jsonl", [first, second, *rows[2:]])
    vectors = np.load(step.folder / "global.npy")
    np.save(step.folder / "global.npy", vectors[[1, 0, *range(2, len(vectors))]])
    for path in step.folder.glob("local/00000*.npy"):
        values = np.load(path)
        np.save(path, np.concatenate([values[n:], values[:n]]))


def test_numbers_that_slipped_with_their_rows_are_found_by_embedding_again(few):
    """Nothing but the photographs themselves can tell: every row fits its vector, and the names are sorted."""
    swap(few, ("id", "sha256", "size", "look"))
    assert among(few, spot_check=0) == []
    with pytest.raises(StepError, match=r"a\.png, embedded again, has cosine 0\.\d+ .* its rows have slipped"):
        among(few)


def test_photographs_that_are_others_by_now_are_named(few):
    swap(few, ("id",))
    assert among(few, spot_check=0) == []
    assert among(few, spot_check=4) == [
        "a.png has changed since it was embedded: run its notebook again",
        "b.png has changed since it was embedded: run its notebook again",
    ]


# --- another backbone's numbers -----------------------------------------------------------------------------


def plant(source, into):
    """The numbers of one store under the name of another: its rows and vectors fit each other."""
    record, metrics = ((into.folder / name).read_bytes() for name in ("step.json", "metrics.json"))
    shutil.rmtree(into.folder)
    shutil.copytree(source.folder, into.folder)
    (into.folder / "step.json").write_bytes(record)
    (into.folder / "metrics.json").write_bytes(metrics)
    unsealed(into.folder)


ANOTHER = {
    "another backbone": ({"weight": "sift"}, {"weight": "dsift"}),
    "another option": ({"weight": "sift"}, {"weight": "sift", "backbone_options": {"max_keypoints": 100}}),
    "another size": ({"weight": "sift"}, {"weight": "sift", "resize": Resize("scale", scale=0.5)}),
}
ALIKE = pytest.param(
    {"weight": "dsift"},
    {"weight": "dsift", "backbone_options": {"width": 32.0}},
    id="another option, where all photographs' vectors are alike",
)


@pytest.mark.parametrize(("said", "true"), [*(pytest.param(*given, id=name) for name, given in ANOTHER.items()), ALIKE])
def test_a_store_of_another_backbone_is_found_by_embedding_again(few_photographs, tmp_path, said, true):
    step = embedded(few_photographs, tmp_path / "exports", **said)
    assert among(step) == []
    shutil.rmtree(tmp_path / "exports" / "r" / "03_index")
    plant(embedded(few_photographs, tmp_path / "other", **true), step)
    assert among(step, spot_check=0) == []  # nothing else can tell
    shutil.rmtree(tmp_path / "exports" / "r" / "03_index")
    with pytest.raises(StepError, match="another backbone's, another size's"):
        among(step)


def test_a_network_is_asked_again_by_its_weights(weights, monkeypatch, few_photographs, tmp_path):
    given = {"weight": "vits16", "data_key": str(weights / "data_key.json")}
    given |= {
        "backbone_options": {"precision": "fp32", "engine_forward": "torch"},
        "resize": Resize("stretch", long_side=64),
    }
    step = embedded(few_photographs, tmp_path / "exports", **given)
    assert among(step, spot_check=EVERY_ROW) == []
    shutil.rmtree(tmp_path / "exports" / "r" / "03_index")
    entry = {"hub_entry": "dinov3_vits16", "family": "LVD"}
    other = random_weights.save(random_weights.state("dinov3_vits16", seed=99), tmp_path / "w", "x_lvd1689m")
    with monkeypatch.context() as patch:
        patch.setenv("WEIGHTS_ROOT", str(other.parent))
        given["backbone_options"] |= {**entry, "filename": other.name}
        plant(embedded(few_photographs, tmp_path / "other", **given), step)
    with pytest.raises(StepError, match=r"a\.png, embedded again, has cosine"):
        among(step)
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    first, last = among(step)
    for said, id in ((first, "a.png"), (last, "flight 1/d.png")):
        assert said.startswith(f"{id} could not be embedded again to compare: ")
        assert open_step(step.folder).parameters["backbone"]["filename"] in said


def test_what_cannot_be_embedded_again_is_said(few, few_photographs, tmp_path):
    folder = tmp_path / "gone"
    shutil.copytree(few_photographs, folder)
    queries = embedded(folder, tmp_path / "exports")
    shutil.rmtree(folder)
    said = asked(queries, few)
    for id in ("a.png", "flight 1/d.png"):
        assert f"{id} could not be embedded again to compare: No such file or directory" in said


def test_imported_stores_are_said_to_be_unchecked(tmp_path):
    data = test_perimage.survey(tmp_path / "exports")
    test_perimage.export(data, tmp_path / "tree")
    (folder,) = test_legacy.imported(tmp_path / "tree", tmp_path / "back")
    rows = files.read_rows(folder / "images.jsonl")
    files.write_rows(folder / "images.jsonl", [{**row, "position": None} for row in rows])
    unsealed(folder)
    assert among(open_step(folder)) == [
        "the queries were imported without their photographs, so none was embedded again"
    ]
    vectors = np.load(folder / "global.npy")
    np.save(folder / "global.npy", vectors[::-1].copy())
    shutil.rmtree(tmp_path / "back" / "i" / "03_index")
    shutil.rmtree(folder / "index")
    with pytest.raises(StepError, match="holds the vector of"):  # their rows are checked all the same
        among(open_step(folder))


# --- positions that cannot be true --------------------------------------------------------------------------

SHORE = [(46.8425, -91.9944), (46.8426, -91.9944), (46.8427, -91.9944)]
COUNT_NOT = "and do not count (give true ones in truth.labels): "


def placed(step, places, **more):
    """Write that photographs were taken at some places."""
    rows = files.read_rows(step.folder / "images.jsonl")
    for row, place in zip(rows, places, strict=True):
        row["position"] = place and {"latitude": place[0], "longitude": place[1], "altitude": None, **more}
    files.write_rows(step.folder / "images.jsonl", rows)
    return step


@pytest.mark.parametrize(
    ("fourth", "said", "answers"),
    [
        ((0.0, 0.0), f"1 photographs are 0 N 0 E, {COUNT_NOT}flight 1/d.png", [2, 2, 2, 0]),
        (
            (46.8425, 91.9944),
            f"1 photographs lie more than 1,000 km from all others, {COUNT_NOT}flight 1",
            [2, 2, 2, 0],
        ),
        ((0.0, -91.9944), f"1 photographs lie more than 1,000 km from all others, {COUNT_NOT}flight 1", [2, 2, 2, 0]),
        ((47.0, -91.9944), "", [2, 2, 2, 0]),
        ((46.8428, -91.9944), "", [3, 3, 3, 3]),
    ],
    ids=["no fix", "wrong side", "half a fix", "elsewhere", "there"],
)
def test_positions_that_cannot_be_true_are_named_and_do_not_count(few, fourth, said, answers):
    step = indexed(placed(few, [*SHORE, fourth]), None, "data-data", truth="radius", radius=100.0)
    told = [one for one in audited(step, spot_check=0) if one.startswith("positions of ")]
    assert [one[: len(said) + 13] for one in told] == ([f"positions of {said}"] if said else [])
    assert [row["answers"] for row in files.read_rows(step.folder / "queries.jsonl")] == answers
    assert step.metrics["positions"]["unknown"] == len(told)


def test_one_position_for_all_is_none(few):
    every = "positions of 4 photographs are one and the same"
    (said,) = among(placed(few, SHORE[:1] * 4), spot_check=0)
    assert said == f"{every}, {COUNT_NOT}a.png, b.png, c.jpg, flight 1/d.png"
    wanted = f"no photograph of the queries has a position in its EXIF: .*truth.labels to its path; {every}"
    with pytest.raises(ImatchError, match=wanted):
        judged(indexed(few, None, "data-data", truth="nearest", tag="nearest"))


def test_positions_of_labels_are_doubted_and_count(few, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("id,latitude,longitude\na.png,46,-91\nb.png,46,-91\nc.jpg,46,-91\nd.png,46,91\n")
    step = indexed(placed(few, [(0.0, 0.0)] * 4), None, "data-data", truth="nearest", labels=str(labels))
    far = "positions of 1 photographs lie more than 1,000 km from all others, but count, for the labels say so"
    assert f"{far}: flight 1/d.png" in audited(step, spot_check=0)
    assert [row["answers"] for row in files.read_rows(step.folder / "queries.jsonl")] == [2, 2, 2, 3]


def test_what_a_header_says_in_vain_is_counted(few):
    rows = files.read_rows(placed(few, [*SHORE, None]).folder / "images.jsonl")
    rows[3]["doubt"] = "latitude is past 90: 95"
    files.write_rows(few.folder / "images.jsonl", rows)
    (said,) = among(few, spot_check=0)
    assert said == "not taken from the headers of 1 photographs (latitude is past 90: 95): flight 1/d.png"


# --- queries that are in the gallery ------------------------------------------------------------------------


def test_queries_that_are_files_of_the_gallery_are_named(few, few_photographs, tmp_path):
    folder = tmp_path / "asked"
    folder.mkdir()
    shutil.copy(few_photographs / "b.png", folder / "holiday.png")
    Image.fromarray(dead_leaves(99, 128)).save(folder / "new.png")
    said = asked(embedded(folder, tmp_path / "exports"), few)
    assert said == ["1 of 2 queries are files of the gallery and find themselves: holiday.png"]


def changed(photograph):
    """Near-duplicates of a photograph as (name, picture, options of Pillow)."""
    w, h = photograph.size
    yield "compressed.jpg", photograph, {"quality": 60}
    yield "half.png", photograph.resize((w // 2, h // 2), Image.Resampling.BICUBIC), {}
    yield "brighter.png", ImageEnhance.Brightness(photograph).enhance(1.1), {}


def test_near_duplicates_are_found_and_what_is_new_is_not(demo, demo_photographs, tmp_path):
    folder = tmp_path / "asked"
    folder.mkdir()
    for name in ("chelsea.png", "coffee.png"):
        for ending, picture, options in changed(Image.open(demo_photographs / name).convert("RGB")):
            picture.save(folder / f"{name[:-4]}_{ending}", **options)
    Image.fromarray(dead_leaves(99, 256)).save(folder / "new.png")
    queries = embedded(folder, tmp_path / "exports", weight="dsift", resize=Resize("scale", scale=0.5))
    (said,) = [one for one in asked(queries, demo) if "look alike" in one]
    assert said.startswith("6 pairs of photographs look alike")
    for pair in ("chelsea_brighter.png ~ chelsea.png", "chelsea_half.png ~ chelsea.png", "coffee_half.png ~ coffee"):
        assert pair in said
    assert "new.png" not in said


def test_near_duplicates_within_one_set_are_found(few_photographs, tmp_path):
    folder = tmp_path / "photographs"
    shutil.copytree(few_photographs, folder)
    for ending, picture, options in changed(Image.open(few_photographs / "a.png")):
        picture.save(folder / f"a_{ending}", **options)
    shutil.copy(folder / "b.png", folder / "b again.png")  # the same file is no near-duplicate: it is a twin
    step = embedded(folder, tmp_path / "exports")
    (said,) = [one for one in among(step) if "look alike" in one]
    wanted = itertools.combinations(["a.png", "a_brighter.png", "a_compressed.jpg", "a_half.png"], 2)
    assert said.startswith("6 pairs")
    assert [f"{one} ~ {other}" for one, other in wanted] == said.rpartition(": ")[2].split(", ")
    _, references = referenced(step)  # and so are they behind their references
    (said,) = [one for one in audited(indexed(step, references, "reference-data")) if "look alike" in one]
    assert said.startswith("6 pairs")


def test_near_duplicates_are_found_where_queries_are_a_part_of_the_gallery(few_photographs, tmp_path):
    folder = tmp_path / "photographs"
    shutil.copytree(few_photographs, folder)
    Image.open(folder / "flight 1" / "d.png").save(folder / "0.jpg", quality=60)
    gallery = embedded(folder, tmp_path / "exports")
    queries = embedded(folder, tmp_path / "exports", image_groups=[{"folder": "flight 1"}], tag="part")
    (said,) = [one for one in asked(queries, gallery) if "look alike" in one]
    assert said.startswith("1 pairs of photographs look alike")
    assert "flight 1/d.png ~ 0.jpg" in said or "0.jpg ~ flight 1/d.png" in said


def apart(rows):
    """By how many bits the two looks differ that differ least."""
    looks = [int(row["look"], 16) for row in rows]
    return min((one ^ other).bit_count() for one, other in itertools.combinations(looks, 2))


def test_different_photographs_do_not_look_alike(demo):
    assert not [one for one in among(demo) if "look alike" in one]
    assert apart(Stored(demo.folder).decodable.values()) > 2 * alarms.LOOK


def test_overlapping_frames_of_a_flight_do_not_look_alike(brighton_beach, tmp_path):
    step = embedded(brighton_beach, tmp_path, weight="dsift", resize=Resize("long_side", long_side=320))
    assert len(Stored(step.folder)) == 18
    assert not [one for one in among(step) if "look alike" in one]
    assert apart(Stored(step.folder).decodable.values()) > 2 * alarms.LOOK


def test_plain_photographs_look_like_nothing(monkeypatch, tmp_path):
    with_toys(monkeypatch)
    folder = tmp_path / "plain"
    folder.mkdir()
    for grey in (60, 128, 200):
        Image.new("RGB", (96, 96), (grey, grey, grey)).save(folder / f"grey {grey}.jpg")
    ramp = np.tile(np.linspace(20, 235, 96).astype(np.uint8), (96, 1))
    for name, picture in {"ramp": ramp, "darker": ramp // 2, "falling": ramp[:, ::-1], "upright": ramp.T}.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    assert among(embedded(folder, tmp_path / "exports", weight="histogram")) == []


# --- guessing -----------------------------------------------------------------------------------------------


def test_vectors_that_tell_nothing_apart_are_named(monkeypatch, tmp_path):
    with_toys(monkeypatch)
    leaves = write_leaves(tmp_path / "leaves")
    said = {}
    for weight in ("lottery", "histogram"):
        data = embedded(leaves, tmp_path, weight=weight)
        _, references = referenced(data, angles=(10, 100, 190, 280), file_type="png")
        said[weight] = audited(indexed(data, references, "reference-data"), spot_check=EVERY_ROW)
    assert said["histogram"] == []
    (alarm,) = said["lottery"]
    assert alarm.startswith("Hit@1 0.")
    assert "(0.083)" in alarm  # one of twelve


@pytest.mark.parametrize(
    ("low", "value", "named"),
    [(0.26, 0.4, False), (0.25, 0.4, True), (0.1, 0.4, True), (None, 0.26, False), (None, 0.25, True)],
)
def test_a_hit_counts_only_when_it_is_surely_above_chance(few, low, value, named):
    hit = {"value": value, "low": low, "high": None, "clusters": 9, "why": ""}
    said = audited(indexed(few, None, "data-data"), 0, intervals={"hit_at_1": hit}, chance=0.25)
    assert [one.startswith(f"Hit@1 {value:.3f}") for one in said] == [True] * named


# --- what the alarms need is there --------------------------------------------------------------------------


def signs(folder):
    """Of each photograph: its look and whose vector it is, checked."""
    embeddings = Stored(folder)
    embeddings.check_rows()
    assert [row["vector"] for row in embeddings.rows] == [store.vector_digest(v) for v in embeddings.vectors]
    return {row["id"]: (row["look"], row["vector"]) for row in embeddings.rows}


def test_rows_have_a_look_and_their_vector_however_they_were_made(few_photographs, tmp_path):
    given = {"weight": "dsift", "resize": Resize("long_side", long_side=128)}
    whole = embedded(few_photographs, tmp_path / "whole", shard_size=100, **given)
    wanted = signs(whole.folder)
    assert len(wanted) == 4
    for id, (look, vector) in wanted.items():
        assert look == images.look(images.decode(few_photographs / id, given["resize"], 16).pixels)
        assert (len(look), len(vector)) == (64, 16)
    parts = embedded(few_photographs, tmp_path / "parts", shard_size=1, **given)
    assert signs(parts.folder) == wanted
    parts.unfinish()  # a run that was killed before its third shard
    Shards(parts.folder).split()
    Shards(parts.folder).remove(2)
    assert signs(embedded(few_photographs, tmp_path / "parts", shard_size=1, **given).folder) == wanted
    beside = embedded(few_photographs, tmp_path / "parts", shard_size=1, variant="sub2", **given)
    alone = embedded(few_photographs, tmp_path / "alone", shard_size=3, variant="sub2", **given)
    assert signs(beside.folder) == signs(alone.folder) == wanted


def test_references_have_a_look_and_their_vector(few):
    _, references = referenced(few)
    found = signs(references.folder)
    assert len(found) == 8
    assert all(len(look) == 64 for look, _ in found.values())


def test_alarms_are_plain_json(few):
    assert json.loads(json.dumps(among(few))) == []


def test_a_store_without_digests_is_said_to_be_unchecked(few):
    rows = files.read_rows(few.folder / "images.jsonl")
    files.write_rows(few.folder / "images.jsonl", [{k: v for k, v in row.items() if k != "vector"} for row in rows])
    assert among(few) == [
        "the queries were embedded by an earlier version that noted no digests: whose vector is whose was not checked"
    ]


def test_a_threshold_that_does_not_hold_is_an_alarm():
    kept = {"wanted": 0.95, "held_out_precision": 0.95}
    assert alarms.promise_broken(kept) == alarms.promise_broken({**kept, "held_out_precision": None}) == []
    (said,) = alarms.promise_broken({**kept, "held_out_precision": 0.69})
    assert said.startswith("69% of the first hits that are believed are right")
    assert alarms.promise_broken({**kept, "held_out_precision": 0.0})
