"""Per-image files: out under the names that were agreed on, and back in without a changed bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imatch
from imatch import legacy, runs, steps, store
from imatch.records import ImatchError, StepError, Tokens
from imatch.runs import Step
from imatch.store import Embeddings

ALL = ("global.npy", "patch.npy", "grid.npy", "denseft.npy", "denseft.png")
PATCH, D = 16, 24
PARAMETERS = {
    "dataset": "survey",
    "image_groups": [],
    "weight": "vits16+",
    "backbone": {
        "hub_entry": "dinov3_vits16plus",
        "filename": "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
        "family": "LVD",
        "source": "timm",
        "pooling": "cls",
        "precision": "fp32",
    },
    "weights_digest": "4057cbaa",
    "resize": {"mode": "stretch", "long_side": 64},
    "cfg": "res64",
    "variant": "raw",
    "shard_size": 3,
}
IDS = {  # id -> capture, label, frame
    "250912_low/250912_low_0007.JPG": ("250912", "low", 7),
    "250912_low/250912_low_0012.JPG": ("250912", "low", 12),
    "250912_very_high/250912_very_high_0007.JPG": ("250912", "very_high", 7),
    "251001_high/251001_high_7.JPG": ("251001", "high", 7),
}
LOW_7 = "_res64_raw_dinov3_vits16plus_LVD_low_0007"


def tokens(seed: int, grid=(4, 6), size=(64, 96), dtype=np.float16, xy=None) -> Tokens:
    random = np.random.default_rng(seed)
    vector = random.normal(size=D)
    descriptors = random.normal(size=(grid[0] * grid[1], D)).astype(dtype)
    xy = store.grid_xy(grid, size) if xy is None else xy
    return Tokens((vector / np.linalg.norm(vector)).astype(np.float32), descriptors, xy, grid)


def made(folder: Path, rows: list[dict], name="01_embed", upstream=None, links=None, **given) -> Step:
    """A finished step as 01_embed or 02_references leaves it."""
    given = {**PARAMETERS, **given}
    links = {"photographs": folder.parent, **(links or {})}
    step = runs.start(folder, name, given, upstream or {}, links)
    for shard in range(0, len(rows), 3):
        part = rows[shard : shard + 3]
        every = [tokens(shard + i, size=row["size"]) for i, row in enumerate(part)]
        store.write_shard(folder, shard // 3, part, every)
    store.merge(folder)
    steps.finish_embed(step, Embeddings(folder))
    return step


def row(id: str, number: int, **about) -> dict:
    return {"id": id, "size": (64, 96), "sha256": f"{number:064x}", "position": {"latitude": 1.5}, **about}


def survey(exports: Path, **given) -> Step:
    rows = [
        row(id, i, capture=capture, label=label, frame=frame)
        for i, (id, (capture, label, frame)) in enumerate(IDS.items())
    ]
    return made(exports / "r" / "01_embed" / "survey" / "vits16+" / "res64_raw", rows, **given)


def with_references(exports: Path, crops=(1.0,)) -> tuple[Step, Step]:
    data = survey(exports)
    views = exports / "r" / "02_references" / "survey" / "isometric"
    step = runs.start(views / "views", "02_references", {"crops": list(crops)}, {}, {"embed": data.folder})
    rows, described = [], []
    for number, source in enumerate(store.read_rows(data.folder / "images.jsonl")):
        for angle in (0.0, 22.5, -45.0):
            for crop in crops:
                id = f"{source['id'][:-4]}_{angle}_{crop}.jpg"
                made_of = {"source": source["id"], "source_sha256": source["sha256"]}
                rows.append(row(id, 100 + len(rows), **made_of))
                described.append({"id": id, "angle": angle, "crop": crop, "source": source["id"]})
                assert number < 4
    order = sorted(range(len(rows)), key=lambda i: rows[i]["id"])
    store.write_rows(views / "views" / "references.jsonl", [described[i] for i in order])
    step.finish({})
    links = {"views": step.folder, "embed": data.folder}
    upstream = {"embed": str(data.fingerprint)}
    references = made(
        views / "vits16+" / "res64_raw", [rows[i] for i in order], "02_references", upstream=upstream, links=links
    )
    return data, references


def export(step: Step, folder: Path, outputs=ALL) -> int:
    return legacy.export(step, Embeddings(step.folder), outputs, folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tree(tmp_path) -> Path:
    """The tree of a survey, global and local."""
    export(survey(tmp_path / "exports"), tmp_path / "tree", ("global.npy", "patch.npy", "grid.npy"))
    return tmp_path / "tree"


# --- out --------------------------------------------------------------------------------------------------


def test_files_have_the_names_that_were_agreed_on(tmp_path):
    assert export(survey(tmp_path / "exports"), tmp_path / "tree") == 4 * (4 * 2 + 1)
    names = sorted(files(tmp_path / "tree"))
    for name in (
        "survey/vits16+/low/GlobalToken/GlobalToken_res64_raw_dinov3_vits16plus_LVD_low_0007.npy",
        "survey/vits16+/low/GlobalToken/GlobalToken_res64_raw_dinov3_vits16plus_LVD_low_0007_meta.json",
        "survey/vits16+/low/PatchToken/PatchToken_res64_raw_dinov3_vits16plus_LVD_low_0012.npy",
        "survey/vits16+/very_high/PatchGrid/PatchGrid_res64_raw_dinov3_vits16plus_LVD_very_high_0007.npy",
        "survey/vits16+/high/DenseFT/DenseFT_res64_raw_dinov3_vits16plus_LVD_high_7.npy",
        "survey/vits16+/high/DenseFT/DenseFT_res64_raw_dinov3_vits16plus_LVD_high_7.png",
        "survey/vits16+/high/DenseFT/DenseFT_res64_raw_dinov3_vits16plus_LVD_high_7_meta.json",
    ):
        assert name in names
    assert len(names) == 36


@pytest.mark.parametrize(("crops", "rot"), [((1.0,), "rot22p5"), ((0.5, 1.0), "rot22p5_crop50")], ids=str)
def test_references_bear_the_names_of_their_sources(crops, rot, tmp_path):
    _, references = with_references(tmp_path / "exports", crops)
    export(references, tmp_path / "tree", ("global.npy", "patch.json", "grid.npy", "denseft.png"))
    names = files(tmp_path / "tree")
    for kind, suffix in (
        ("ReferenceGlobal", ".npy"),
        ("ReferencePatch", "_meta.json"),
        ("ReferenceGrid", ".npy"),
        ("ReferenceDenseFT", ".png"),
    ):
        assert f"survey/vits16+/low/{rot}/{kind}/{kind}_res64_raw_dinov3_vits16plus_LVD_low_0007{suffix}" in names
    turned = "rotm045" if len(crops) == 1 else "rotm045_crop100"
    place = f"survey/vits16+/very_high/{turned}/ReferenceGlobal"
    meta = json.loads(names[f"{place}/ReferenceGlobal_res64_raw_dinov3_vits16plus_LVD_very_high_0007_meta.json"])
    assert (meta["angle"], meta["crop"], meta["source"]) == (-45, 1, "250912_very_high/250912_very_high_0007.JPG")
    assert meta["source_sha256"] == f"{2:064x}"


def test_arrays_are_those_of_the_store(tmp_path):
    step = survey(tmp_path / "exports")
    export(step, tmp_path / "tree")
    low = tmp_path / "tree/survey/vits16+/low"
    one = Embeddings(step.folder).tokens(0)
    for kind, wanted in (("GlobalToken", one.vector), ("PatchToken", one.descriptors), ("PatchGrid", one.as_grid())):
        array = np.load(low / kind / f"{kind}{LOW_7}.npy")
        assert array.dtype == wanted.dtype
        assert np.array_equal(array, wanted)
    colours = np.load(low / f"DenseFT/DenseFT{LOW_7}.npy")
    assert colours.shape == (4, 6, 3)
    with Image.open(low / f"DenseFT/DenseFT{LOW_7}.png") as picture:
        assert picture.size == (512, 341)


def test_meta_says_how_it_was_made(tmp_path):
    step = survey(tmp_path / "exports")
    export(step, tmp_path / "tree", ["patch.npy"])
    meta = store.read_json(tmp_path / f"tree/survey/vits16+/low/PatchToken/PatchToken{LOW_7}_meta.json")
    fingerprint = meta.pop("fingerprint")
    assert len(fingerprint) == 64
    assert meta == {
        "kind": "PatchToken",
        "dataset": "survey",
        "weight": "vits16+",
        "hub_entry": "dinov3_vits16plus",
        "family": "LVD",
        "filename": "dinov3_vits16plus_pretrain_lvd1689m-4057cbaa.pth",
        "weights_digest": "4057cbaa",
        "cfg": "res64",
        "variant": "raw",
        "tag": "",
        "resize": {"mode": "stretch", "long_side": 64},
        "pooling": "cls",
        "precision": "fp32",
        "backbone": PARAMETERS["backbone"],
        "id": "250912_low/250912_low_0007.JPG",
        "sha256": "0" * 64,
        "size": [64, 96],
        "grid": [4, 6],
        "position": {"latitude": 1.5},
        "capture": "250912",
        "label": "low",
        "frame": 7,
        "shape": [24, 24],
        "dtype": "float16",
    }


def test_json_is_the_meta_alone(tmp_path):
    step = survey(tmp_path / "exports")
    export(step, tmp_path / "tree", ["global.json"])
    assert all(name.endswith("_meta.json") for name in files(tmp_path / "tree"))
    assert export(step, tmp_path / "tree", ["global.json", "global.npy"]) == 4


def test_second_export_writes_nothing(tmp_path):
    step = survey(tmp_path / "exports")
    export(step, tmp_path / "tree")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tree").rglob("*")}
    assert export(step, tmp_path / "tree") == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "tree").rglob("*")} == before


def test_killed_export_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    step = survey(tmp_path / "exports")
    export(step, tmp_path / "whole")
    write, calls = store.write_array, []

    def killed(path: Path, array: np.ndarray) -> None:
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        write(path, array)

    monkeypatch.setattr(store, "write_array", killed)
    with pytest.raises(KeyboardInterrupt):
        export(step, tmp_path / "tree")
    monkeypatch.setattr(store, "write_array", write)
    assert 0 < len(files(tmp_path / "tree")) < 36
    export(step, tmp_path / "tree")
    assert files(tmp_path / "tree") == files(tmp_path / "whole")


def test_files_made_differently_are_refused_or_made_anew(tmp_path):
    export(survey(tmp_path / "a"), tmp_path / "tree")
    before = files(tmp_path / "tree")
    other = survey(tmp_path / "b", weights_digest="another")
    with pytest.raises(
        StepError, match=r"were made differently:\n  survey/vits16\+/low/.* -> (?s:.*)Nothing was touched"
    ):
        export(other, tmp_path / "tree", ["global.npy"])
    assert files(tmp_path / "tree") == before
    other.on_change = "recompute"
    export(other, tmp_path / "tree", ["denseft.npy"])
    names = files(tmp_path / "tree")
    assert len([n for n in names if "DenseFT_" in n]) == 8  # the pictures of before are gone, not blessed
    assert sum(before.get(name) != data for name, data in names.items()) >= 4


def test_foreign_files_are_not_overwritten(tmp_path):
    path = tmp_path / f"tree/survey/vits16+/low/GlobalToken/GlobalToken{LOW_7}.npy"
    store.write_array(path, np.ones(3))
    with pytest.raises(StepError, match="no meta says how it was made"):
        export(survey(tmp_path / "exports"), tmp_path / "tree")
    assert list(files(tmp_path / "tree")) == [path.relative_to(tmp_path / "tree").as_posix()]


def test_other_shards_and_groups_are_the_same_files(tmp_path):
    """What changes no number of a photograph changes nothing of its files."""
    export(survey(tmp_path / "a"), tmp_path / "tree", ["global.npy"])
    assert (
        export(survey(tmp_path / "b", shard_size=2, image_groups=[{"folder": "x"}]), tmp_path / "tree", ["global.npy"])
        == 0
    )


@pytest.mark.parametrize(("output", "said"), [("glob.npy", "did you mean 'global.npy'"), ("denseft.json", "Known: ")])
def test_unknown_output_is_refused_before_anything_is_written(output, said, tmp_path):
    with pytest.raises(ImatchError, match=f"unknown output '{output}'.*{said}"):
        export(survey(tmp_path / "exports"), tmp_path / "tree", ["global.npy", output])
    assert not (tmp_path / "tree").exists()


def test_keypoints_have_global_files_only(few_photographs, tmp_path):
    step = embedded(few_photographs, tmp_path / "exports", "sift")
    with pytest.raises(
        ImatchError, match=r"outputs grid.npy, patch.npy need a grid, and a.png .* has keypoints: leave"
    ):
        export(step, tmp_path / "tree", ["patch.npy", "grid.npy", "global.npy"])
    assert not (tmp_path / "tree").exists()
    assert export(step, tmp_path / "tree", ["global.npy"]) == 8
    assert "few/sift/few/GlobalToken/GlobalToken_scale1_raw_sift_NONE_few_a.npy" in files(tmp_path / "tree")


def test_tree_lies_beside_the_steps_unless_told(tmp_path):
    data, references = with_references(tmp_path / "exports")
    for step in (data, references):
        assert legacy.export(step, Embeddings(step.folder), []) == 0
        assert legacy.export(step, Embeddings(step.folder), ["global.json"]) == len(Embeddings(step.folder))
    assert {path.name for path in (tmp_path / "exports/r/per_image").iterdir()} == {"survey"}
    assert len(files(tmp_path / "exports/r/per_image/survey/vits16+/low")) == 2 + 2 * 3


def test_tag_follows_the_configuration(tmp_path):
    plain = survey(tmp_path / "exports")
    tagged = plain.folder.with_name("res64_raw_new_try")
    shutil.copytree(plain.folder, tagged)
    for step in (plain, runs.read(tagged)):
        export(step, tmp_path / "tree", ["global.npy"])
    names = {Path(name).name for name in files(tmp_path / "tree")}
    assert {f"GlobalToken{LOW_7}.npy", f"GlobalToken{LOW_7.replace('_raw', '-new_try_raw')}.npy"} <= names
    groups = {(group.cfg, group.variant, len(group.items)) for group in legacy.read_tree(tmp_path / "tree")}
    assert groups == {("res64", "raw", 4), ("res64-new_try", "raw", 4)}


# --- names ------------------------------------------------------------------------------------------------


def named(*ids: str) -> dict[str, str]:
    return {id: "/".join(name) for id, name in legacy._names([{"id": id} for id in ids], "beach").items()}


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (["a.jpg", "b/c.jpg"], ["beach/a", "b/c"]),
        (["x/1/a.jpg", "y/1/a.jpg", "y/2/a.jpg"], ["x_1/a", "y_1/a", "2/a"]),
        (["a.jpg", "a.png", "b.png"], ["beach/a_jpg", "beach/a_png", "beach/b"]),
        (["flight 1/a:b.jpg"], ["flight-1/a-b"]),
        (["서울/사진 1.jpg"], ["서울/사진-1"]),
    ],
    ids=str,
)
def test_names_of_plain_folders_are_safe(ids, wanted):
    assert [*named(*ids).values()] == wanted


@pytest.mark.parametrize("ids", [["a.png", "A.PNG"], ["f/a b.jpg", "f/a-b.jpg"], ["a/b_c/1.jpg", "a_b/c/1.jpg"]])
def test_no_two_names_are_alike_even_without_case(ids):
    names = {name.lower() for name in named(*ids, "z/b/c/1.jpg").values()}
    assert len(names) == len(ids) + 1


def test_two_captures_with_one_label_are_told_apart():
    rows = [
        {"id": "1_low/1_low_0007.jpg", "capture": "1", "label": "low", "frame": 7},
        {"id": "2_low/2_low_0007.jpg", "capture": "2", "label": "low", "frame": 7},
        {"id": "2_high/2_high_2.jpg", "capture": "2", "label": "high", "frame": 2},
        {"id": "3_60/3_60.jpg", "capture": "3", "label": 60, "frame": 9},
    ]
    assert ["/".join(name) for name in legacy._names(rows, "beach").values()] == [
        "1_low/0007",
        "2_low/0007",
        "high/2",
        "60/9",
    ]


def test_long_names_stay_short():
    ids = [f"{'folder' * 40}/{'é' * 100}{end}.jpg" for end in "ab"]
    found = [*named(*ids).values()]
    assert len({*found}) == 2
    assert max(len(part.encode()) for name in found for part in name.split("/")) < 100


# --- out and in again -------------------------------------------------------------------------------------


def embedded(photographs: Path, exports: Path, weight: str, **given) -> Step:
    step = imatch.start_embed(
        str(photographs),
        exports=str(exports),
        run="r",
        weight=weight,
        backbone_options={},
        resize=imatch.Resize(),
        shard_size=3,
        tag="",
        on_change="refuse",
        **given,
    )
    imatch.finish_embed(step, imatch.embed(step, workers=0))
    return step


def same_tokens(a: Embeddings, b: Embeddings, rows: dict[int, int] | None = None) -> None:
    assert len(a) == len(b)
    for i in range(len(a)):
        one, other = a.tokens(i), b.tokens((rows or {}).get(i, i))
        for name in ("vector", "descriptors"):
            assert getattr(one, name).dtype == getattr(other, name).dtype
            assert np.array_equal(getattr(one, name), getattr(other, name))
        assert np.allclose(one.xy, other.xy, atol=1e-3, rtol=0)
        assert one.grid == other.grid


def by_sha(a: Embeddings, b: Embeddings) -> dict[int, int]:
    place = {row["sha256"]: i for i, row in enumerate(b.rows)}
    return {i: place[row["sha256"]] for i, row in enumerate(a.rows)}


@pytest.mark.parametrize("outputs", [ALL, ("global.npy", "patch.npy"), ("global.npy", "grid.npy")], ids=len)
def test_import_gives_back_equal_arrays(outputs, tmp_path):
    step = survey(tmp_path / "exports")
    export(step, tmp_path / "tree", outputs)
    (folder,) = legacy.import_tree(tmp_path / "tree", tmp_path / "back", "i")
    assert folder == tmp_path / "back/i/01_embed/survey/vits16+/res64_raw"
    a, b = Embeddings(step.folder), Embeddings(folder)
    assert b.ids == ["high/7", "low/0007", "low/0012", "very_high/0007"]
    same_tokens(a, b, by_sha(a, b))
    back = runs.read(folder).parameters
    same = ("weight", "backbone", "weights_digest", "resize", "cfg", "variant")
    assert {key: back[key] for key in same} == {key: step.parameters[key] for key in same}
    assert back["imported"] is True
    low = b.rows[1]
    known = {key: low[key] for key in ("size", "sha256", "position", "capture", "label", "frame", "global_norm")}
    assert known == {
        **{key: a.rows[0][key] for key in ("size", "sha256", "position", "capture", "label", "frame")},
        "global_norm": 1.0,
    }
    assert low["meta"]["global"] == store.read_json(
        tmp_path / f"tree/survey/vits16+/low/GlobalToken/GlobalToken{LOW_7}_meta.json"
    )
    assert {*low["meta"]} == {output[:-4] for output in outputs} - {"denseft"}


def test_exported_again_it_is_the_same_tree(tree, tmp_path):
    (folder,) = legacy.import_tree(tree, tmp_path / "back", "i")
    export(runs.read(folder), tmp_path / "again", ("global.npy", "patch.npy", "grid.npy"))
    arrays = {name: data for name, data in files(tree).items() if name.endswith(".npy")}
    assert {name: data for name, data in files(tmp_path / "again").items() if name.endswith(".npy")} == arrays
    assert export(runs.read(folder), tree, ["global.npy"]) == 0


@pytest.mark.parametrize("variant", ["raw", "sub2"])
def test_dense_sift_comes_back(variant, few_photographs, tmp_path):
    step = embedded(few_photographs, tmp_path / "exports", "dsift", variant=variant)
    export(step, tmp_path / "tree")
    (folder,) = legacy.import_tree(tmp_path / "tree", tmp_path / "back", "i")
    a, b = Embeddings(step.folder), Embeddings(folder)
    assert folder.parts[-3:] == ("few", "dsift", f"scale1_{variant}")
    assert b.ids == ["few/a", "few/b", "few/c", "flight-1/d"]
    same_tokens(a, b)
    assert runs.read(folder).parameters["backbone"] == step.parameters["backbone"]


def test_photographs_at_hand_give_their_ids(few_photographs, tmp_path):
    step = embedded(few_photographs, tmp_path / "exports", "dsift")
    export(step, tmp_path / "tree", ["global.npy", "patch.npy"])
    (folder,) = legacy.import_tree(tmp_path / "tree", tmp_path / "back", "i", few_photographs)
    a, b = Embeddings(step.folder), Embeddings(folder)
    assert a.ids == b.ids
    same_tokens(a, b)
    same = ("id", "size", "sha256", "position", "grid")
    assert [[row[key] for key in same] for row in a.rows] == [[row[key] for key in same] for row in b.rows]
    assert runs.read(folder).linked("photographs") == few_photographs


def test_photographs_are_found_without_a_meta(few_photographs, tmp_path):
    step = embedded(few_photographs, tmp_path / "exports", "dsift")
    export(step, tmp_path / "tree", ["global.npy", "grid.npy"])
    for path in (tmp_path / "tree").rglob("*_meta.json"):
        path.unlink()
    shutil.copytree(few_photographs, tmp_path / "few")
    (tmp_path / "few/flight 1").rename(tmp_path / "few/1_flight-1")
    (folder,) = legacy.import_tree(tmp_path / "tree", tmp_path / "back", "i", tmp_path / "few")
    assert Embeddings(folder).ids == ["1_flight-1/d.png", "a.png", "b.png", "c.jpg"]
    (tmp_path / "few/b.png").unlink()
    with pytest.raises(ImatchError, match=r"1 of 4 do not have one photograph in .*:\n  few/b: none\nCorrect --photo"):
        legacy.import_tree(tmp_path / "tree", tmp_path / "back", "j", tmp_path / "few")


def test_another_photograph_under_the_name_is_refused(few_photographs, tmp_path):
    export(embedded(few_photographs, tmp_path / "exports", "dsift"), tmp_path / "tree", ["global.npy"])
    shutil.copytree(few_photographs, tmp_path / "few")
    shutil.copy(few_photographs / "b.png", tmp_path / "few/a.png")
    with pytest.raises(ImatchError, match=r"few/a.png is not the photograph that .*_a.npy was made from"):
        legacy.import_tree(tmp_path / "tree", tmp_path / "back", "i", tmp_path / "few")


@pytest.mark.parametrize("crops", [(1.0,), (0.5, 1.0)], ids=str)
def test_references_come_back_in_a_store_of_their_own(crops, tmp_path):
    data, references = with_references(tmp_path / "exports", crops)
    for step in (data, references):
        export(step, tmp_path / "tree")
    folders = legacy.import_tree(tmp_path / "tree", tmp_path / "back", "i")
    assert [folder.relative_to(tmp_path / "back/i").as_posix() for folder in folders] == [
        "01_embed/survey/vits16+/res64_raw",
        "02_references/survey/imported/vits16+/res64_raw",
    ]
    a, b = Embeddings(references.folder), Embeddings(folders[1])
    same_tokens(a, b, by_sha(a, b))
    back = {row["id"]: row for row in b.rows}
    turned = back["low/rotm045/0007" if len(crops) == 1 else "low/rotm045_crop50/0007"]
    assert (turned["angle"], turned["crop"], turned["source"]) == (-45, crops[0], "low/0007")
    assert {*b.shows} == {*Embeddings(folders[0]).shows}

    index = imatch.start_index(
        str(folders[0]),
        str(folders[1]),
        direction="reference-data",
        index="flat",
        k=2,
        exclude_siblings=False,
        tag="",
        on_change="refuse",
    )
    query, gallery = imatch.query_and_gallery(index)
    built = imatch.build_index(index, gallery)
    hits = imatch.search(index, built, query, gallery)
    index.finish(imatch.index_metrics(index, query, gallery, hits, imatch.self_check(built, gallery)))
    assert index.metrics["queries"] == len(a)
    assert index.metrics["without_answer"] == 0

    export(runs.read(folders[1]), tmp_path / "again", ["grid.npy"])
    wanted = {n: d for n, d in files(tmp_path / "tree").items() if "ReferenceGrid_" in n and n.endswith(".npy")}
    assert {n: d for n, d in files(tmp_path / "again").items() if n.endswith(".npy")} == wanted


def test_cropped_and_thinned_grids_keep_their_places(tmp_path):
    """Positions that no grid over the whole photograph has come back by first centre and step."""
    folder = tmp_path / "exports/r/01_embed/survey/vits16+/res64_raw"
    step = runs.start(folder, "01_embed", PARAMETERS, {}, {"photographs": tmp_path})
    xy = store.grid_xy((4, 4), (64, 64)) + np.float32([16, 0])
    store.write_shard(folder, 0, [row("f/1.jpg", 1), row("f/2.jpg", 2)], [tokens(i, (4, 4), xy=xy) for i in (1, 2)])
    store.merge(folder)
    steps.finish_embed(step, Embeddings(folder))
    export(step, tmp_path / "tree")
    with Image.open(next((tmp_path / "tree").rglob("*.png"))) as picture:
        assert picture.size == (512, 512)
    (back,) = legacy.import_tree(tmp_path / "tree", tmp_path / "back", "i")
    assert np.array_equal(Embeddings(back).tokens(1).xy, xy)


# --- theirs -----------------------------------------------------------------------------------------------


def foreign(tree: Path, kinds: dict[str, str], frames=("0001", "0002"), seed=0, **given) -> Path:
    """Files as another tool leaves them: no meta, a leading 1 in every shape, and kinds (of a reference "kind|rot")
    as it calls them."""
    options = {"entry": "dinov3_convnext_tiny_SAT", "cfg": "res64", "variant": "raw", "n": (4, 4), **given}
    middle = f"{options['cfg']}_{options['variant']}_{options['entry']}"
    random = np.random.default_rng(seed)
    h, w = options["n"]
    for frame in frames:
        grid = random.normal(size=(1, h, w, 8)).astype(np.float32)
        vector = 3 * random.normal(size=(1, 8)).astype(np.float32)
        arrays = {"global": vector, "grid": grid, "patch": grid.reshape(1, h * w, 8)}
        for what, name in kinds.items():
            kind, _, rot = name.partition("|")
            folder = tree / "beach" / "cxTiny" / "mid_low" / rot / kind
            store.write_array(folder / f"{kind}_{middle}_mid_low_{frame}.npy", arrays[what])
    return tree


@pytest.mark.parametrize(
    "kinds",
    [
        {"global": "Global", "patch": "Patch"},
        {"global": "GlobalToken", "patch": "PatchToken", "grid": "PatchGrid"},
        {"global": "Global", "grid": "Grid"},
    ],
    ids=lambda kinds: "-".join(kinds.values()),
)
def test_trees_of_other_tools_are_read(kinds, tmp_path):
    tree = foreign(tmp_path / "tree", kinds)
    (folder,) = legacy.import_tree(tree, tmp_path / "back", "i")
    embeddings = Embeddings(folder)
    assert folder.parts[-3:] == ("beach", "cxTiny", "res64_raw")
    assert embeddings.ids == ["mid_low/0001", "mid_low/0002"]
    assert runs.read(folder).parameters["backbone"] == {
        "hub_entry": "dinov3_convnext_tiny",
        "family": "SAT",
        "filename": "",
        "source": "imported",
        "pooling": "legacy_mean",
        "precision": "",
    }
    for i, frame in enumerate(("0001", "0002")):
        one, about = embeddings.tokens(i), embeddings.rows[i]
        local = np.load(next(path for path in tree.rglob(f"*_{frame}.npy") if not path.name.startswith("Global")))
        assert one.descriptors.dtype == np.float32
        assert np.array_equal(one.descriptors, local.reshape(-1, 8))
        assert one.grid == (4, 4)
        assert about["size"] == [128, 128]
        vector = np.load(next(tree.rglob(f"Global*_{frame}.npy")))[0]
        assert np.linalg.norm(one.vector) == pytest.approx(1, abs=1e-6)
        assert np.allclose(one.vector * about["global_norm"], vector, rtol=1e-6, atol=0)
        assert about["meta"]["global"] == {
            "cfg": "res64",
            "variant": "raw",
            "hub_entry": "dinov3_convnext_tiny",
            "family": "SAT",
            "label": "mid_low",
            "frame": frame,
        }


def test_global_files_alone_are_a_store(tmp_path):
    (folder,) = legacy.import_tree(foreign(tmp_path / "tree", {"global": "Global"}), tmp_path / "back", "i")
    embeddings = Embeddings(folder)
    assert embeddings.vectors.shape == (2, 8)
    assert embeddings.tokens(0).descriptors.shape == (0, 8)
    assert "global 8 numbers" in str(embeddings)


def test_folder_of_a_data_set_or_a_weight_will_do(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global"})
    whole = [str(group) for group in legacy.read_tree(tree)]
    assert whole == ["beach cxTiny res64 raw dinov3_convnext_tiny SAT photographs"]
    for folder in ("beach", "beach/cxTiny", "beach/cxTiny/mid_low"):
        assert [str(group) for group in legacy.read_tree(tree / folder)] == whole


def test_references_of_other_tools_know_their_sources(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "grid": "PatchGrid"})
    for rot in ("rot045", "-90", "rot30_crop50"):
        foreign(tree, {"global": f"ReferenceGlobal|{rot}", "grid": f"ReferenceGrid|{rot}"}, seed=1)
    folders = legacy.import_tree(tree, tmp_path / "back", "i")
    assert len(folders) == 2
    data, references = map(Embeddings, folders)
    assert references.shows == [data.shows[int(id.endswith("2"))] for id in references.ids]
    views = {row["id"].split("/")[1]: (row["angle"], row["crop"]) for row in references.rows}
    assert views == {"rot045": (45, None), "-90": (-90, None), "rot30_crop50": (30, 0.5)}
    export(runs.read(folders[1]), tmp_path / "out", ["global.npy"])
    assert len(files(tmp_path / "out")) == 12


def test_references_without_their_photographs_are_a_store_too(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "ReferenceGlobal|rot045"})
    (folder,) = legacy.import_tree(tree, tmp_path / "back", "i")
    assert [row["source"] for row in Embeddings(folder).rows] == ["mid_low/0001", "mid_low/0002"]


def test_two_families_of_one_weight_are_two_stores(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global"}, entry="dinov3_vitl16_LVD")
    foreign(tree, {"global": "Global"}, entry="dinov3_vitl16_SAT")
    folders = legacy.import_tree(tree, tmp_path / "back", "i")
    assert [folder.name for folder in folders] == ["res64_raw_LVD", "res64_raw_SAT"]


def test_configurations_and_variants_are_stores_of_their_own(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch"}, cfg="res_64")
    foreign(tree, {"global": "Global", "patch": "Patch"}, cfg="res_64", variant="sub2", n=(2, 2))
    folders = legacy.import_tree(tree, tmp_path / "back", "i")
    assert [folder.name for folder in folders] == ["res_64_raw", "res_64_sub2"]
    thin = Embeddings(folders[1])
    assert thin.rows[0]["size"] == [128, 128]
    assert thin.tokens(0).xy.tolist() == [[15.5, 15.5], [79.5, 15.5], [15.5, 79.5], [79.5, 79.5]]


# --- refusals ---------------------------------------------------------------------------------------------


def refused(tree: Path, reason: str, **given) -> None:
    with pytest.raises(ImatchError, match=reason):
        legacy.import_tree(tree, tree.parent / "back", "i", **given)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("low/GlobalToken/embedding.npy", "not <Kind>_<cfg>"),
        ("low/GlobalToken/Global_res64_raw_dinov3_vits16_XYZ_low_1.npy", "not <Kind>_<cfg>"),
        ("low/GlobalToken/Global_res64_raw_dinov3_vits16_LVD_high_1.npy", "ends in 'high_1', which is not low_<frame>"),
        ("low/GlobalToken/Global_res64_raw_dinov3_vits16_LVD_low_.npy", "ends in 'low_', which is not low_<frame>"),
        ("low/GlobalToken/Global_a_raw_dinov3_vits16_LVD_raw_dinov3_vits16_LVD_low_1.npy", "in two ways"),
        (
            "low/ReferenceGlobal/ReferenceGlobal_res64_raw_dinov3_vits16_LVD_low_1.npy",
            "folder 'low', which names no rot",
        ),
    ],
)
def test_names_that_do_not_say_what_they_are_are_refused(name, reason, tmp_path):
    store.write_array(tmp_path / "tree/beach/vits16" / name, np.ones(8))
    refused(tmp_path / "tree", rf"whose names do not say what they are:\n  beach.*{reason}(?s:.*)rename them")


def test_two_files_for_one_thing_are_refused(tmp_path):
    foreign(tmp_path / "tree", {"global": "Global"})
    foreign(tmp_path / "tree", {"global": "GlobalToken"})
    refused(tmp_path / "tree", "GlobalToken.*0001.npy: says the same as Global_")


def test_no_files_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "no folder .*nowhere: give")
    (tmp_path / "tree").mkdir()
    refused(tmp_path / "tree", "no per-image files below")


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("PatchGrid", "have a GlobalToken but no PatchToken"),
        ("GlobalToken", "have a PatchToken or PatchGrid but no GlobalToken"),
    ],
)
def test_counts_that_differ_are_refused(gone, reason, tmp_path):
    frames = [f"{i:04d}" for i in range(14)]
    tree = foreign(tmp_path / "tree", {"global": "GlobalToken", "grid": "PatchGrid"}, frames)
    for frame in frames[2:]:
        next(tree.rglob(f"{gone}_*_{frame}.npy")).unlink()
    listed = "".join(f"\\n  mid_low/{frame}" for frame in frames[2:12])
    refused(tree, rf"12 of 14 {reason}.*:{listed}\n  \.\.\. and 2 more\nExport what is missing")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("harm", ["shape", "values"])
def test_patches_that_disagree_with_their_grid_are_refused(harm, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch", "grid": "Grid"})
    path = next(tree.rglob("Patch_*_0002.npy"))
    array = np.load(path)
    store.write_array(path, array[:, :-1] if harm == "shape" else array[:, ::-1])
    said = r"is not \(4, 4, 8\) in rows" if harm == "shape" else "values are not the same, row by row"
    refused(tree, f"Patch_.*0002.npy and .*Grid_.*0002.npy disagree: .*{said}")


def test_tokens_that_are_no_square_need_a_grid(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch"}, n=(2, 3))
    refused(tree, "Patch_.*0001.npy holds 6 tokens, which is no square, and nothing says their grid: export PatchGrid")
    for path in tree.rglob("Patch_*.npy"):
        store.write_json(path.with_name(f"{path.stem}_meta.json"), {"grid": [2, 3]})
    (folder,) = legacy.import_tree(tree, tmp_path / "back", "i")
    assert Embeddings(folder).rows[0]["grid"] == [2, 3]
    assert Embeddings(folder).rows[0]["size"] == [64, 96]


def test_meta_whose_grid_does_not_fit_is_refused(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch"})
    path = next(tree.rglob("Patch_*_0002.npy"))
    store.write_json(path.with_name(f"{path.stem}_meta.json"), {"grid": [4, 5]})
    refused(tree, r"holds 16 tokens, its meta says a grid of \[4, 5\]")


@pytest.mark.parametrize("kind", ["Global", "Grid"])
def test_dimensions_that_differ_are_refused(kind, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "grid": "Grid"})
    path = next(tree.rglob(f"{kind}_*_0002.npy"))
    store.write_array(path, np.load(path)[..., :-1])
    refused(tree, "of one store must be alike, but .*0001.npy has 8.* and .*0002.npy 7")


def test_types_that_differ_are_refused(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "grid": "Grid"})
    path = next(tree.rglob("Grid_*_0002.npy"))
    store.write_array(path, np.load(path).astype(np.float16))
    refused(tree, "local descriptors of one store must be alike, but .* 8 float32 each and .* 8 float16")


@pytest.mark.parametrize(("kind", "value"), [("Global", np.nan), ("Patch", np.inf)])
def test_values_that_are_not_finite_are_refused(kind, value, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch"})
    path = next(tree.rglob(f"{kind}_*_0002.npy"))
    array = np.load(path)
    array.flat[3] = value
    store.write_array(path, array)
    refused(tree, f"{path.name} holds values that are not finite")


@pytest.mark.parametrize(
    ("key", "value"), [("pooling", "cls"), ("resize", {"mode": "stretch"}), ("weights_digest", "abc")]
)
def test_mixed_metas_are_refused(key, value, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global"})
    path = next(tree.rglob("Global_*_0002.npy"))
    store.write_json(path.with_name(f"{path.stem}_meta.json"), {key: value})
    refused(tree, rf"0002.npy was made differently from the files before it:\n  .*{key}(?s:.*)a tree of their own")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"nonsense", "is no .npy file of numbers"),
        (b"", "is no .npy file of numbers"),
        (None, "is no .npy file of numbers"),
        (np.ones(8, np.int64), "holds no floating-point numbers"),
        (np.ones((2, 8), np.float32), r"is of shape \(2, 8\), a global has 1 dimensions"),
        (np.ones(0, np.float32), r"is of shape \(0,\)"),
    ],
    ids=["nonsense", "empty", "pickle", "integers", "two", "nothing"],
)
def test_files_that_are_no_arrays_of_tokens_are_refused(data, reason, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global"})
    path = next(tree.rglob("Global_*_0002.npy"))
    if data is None:
        np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif isinstance(data, bytes):
        path.write_bytes(data)
    else:
        store.write_array(path, data)
    refused(tree, f"{path.name} {reason}")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_metas_are_refused(text, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global"})
    path = next(tree.rglob("Global_*_0002.npy"))
    path.with_name(f"{path.stem}_meta.json").write_text(text)
    refused(tree, f"{path.stem}_meta.json (is no JSON|holds no JSON object)")


def test_files_of_two_photographs_under_one_name_are_refused(tree):
    path = next(tree.rglob(f"PatchToken{LOW_7}_meta.json"))
    store.write_json(path, {**store.read_json(path), "sha256": "f" * 64})
    refused(tree, "GlobalToken.*do not belong together: sha256 is")


def test_array_of_another_shape_than_its_meta_is_refused(tree):
    path = next(tree.rglob(f"GlobalToken{LOW_7}.npy"))
    store.write_array(path, np.load(path)[:-1])
    refused(tree, r"is of shape \(23,\), its meta says \[24\]")


def test_references_of_another_photograph_are_refused(tmp_path):
    data, references = with_references(tmp_path / "exports")
    for step in (data, references):
        export(step, tmp_path / "tree", ["global.npy"])
    for path in (tmp_path / "tree").rglob("rotm045/*/*_low_0007_meta.json"):
        store.write_json(path, {**store.read_json(path), "source_sha256": "f" * 64})
    refused(tmp_path / "tree", "was made from another photograph than low/0007")


def test_two_networks_under_one_weight_are_refused(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global"}, entry="dinov3_vitl16_LVD")
    foreign(tree, {"global": "Global"}, ("0003",), entry="dinov3_vits16_LVD")
    refused(tree, "holds files of dinov3_vitl16 and dinov3_vits16: one weight is one network")


# --- again ------------------------------------------------------------------------------------------------


def test_second_import_is_there_already(tree, tmp_path, capsys):
    (folder,) = legacy.import_tree(tree, tmp_path / "back", "i")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    legacy.import_tree(tree, tmp_path / "back", "i")
    assert f"there already at {folder}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_second_import_reads_no_array_again(tree, tmp_path, monkeypatch):
    legacy.import_tree(tree, tmp_path / "back", "i")
    monkeypatch.setattr("imatch.images.file_digest", pytest.fail)
    legacy.import_tree(tree, tmp_path / "back", "i")


def test_changed_tree_is_refused_or_imported_anew(tree, tmp_path):
    (folder,) = legacy.import_tree(tree, tmp_path / "back", "i")
    was = files(folder)
    path = next(tree.rglob(f"GlobalToken{LOW_7}.npy"))
    store.write_array(path, -np.load(path))
    for gone in tree.rglob("*very_high_0007*"):
        gone.unlink()
    refused(
        tree,
        r"not those that .*res64_raw was made from:\n  gone: survey.*/very(?s:.*)changed: .*Global.*low_0007",
    )
    assert files(folder) == was
    legacy.import_tree(tree, tmp_path / "back", "i", on_change="recompute")
    embeddings = Embeddings(folder)
    assert embeddings.ids == ["high/7", "low/0007", "low/0012"]
    assert np.array_equal(embeddings.vectors[1], np.load(path))


def test_mended_files_need_no_permission(tree, tmp_path):
    """An import that failed asked for it."""
    path = next(tree.rglob(f"PatchToken{LOW_7}.npy"))
    array = np.load(path)
    store.write_array(path, array * np.float16(np.nan))
    refused(tree, "not finite")
    store.write_array(path, array)
    (folder,) = legacy.import_tree(tree, tmp_path / "back", "i")
    assert len(Embeddings(folder)) == 4


def test_step_of_01_embed_is_not_imported_over(tree, tmp_path):
    survey(tmp_path / "back")
    before = files(tmp_path / "back")
    with pytest.raises(StepError, match="imported: null -> true"):
        legacy.import_tree(tree, tmp_path / "back", "r")
    assert files(tmp_path / "back") == before


def test_references_join_a_step_of_01_embed(tmp_path):
    data, references = with_references(tmp_path / "exports")
    export(references, tmp_path / "tree", ["global.npy"])
    (folder,) = legacy.import_tree(tmp_path / "tree", tmp_path / "exports", "r")
    assert runs.read(folder).upstream == {"embed": data.fingerprint}
    assert {row["source"] for row in Embeddings(folder).rows} == {*IDS}


def test_killed_import_goes_on_to_the_same_bytes(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(legacy, "SHARD", 2)
    (whole,) = legacy.import_tree(tree, tmp_path / "whole", "i")
    write = store.write_shard

    def killed(folder: Path, shard: int, *rest, **options) -> None:
        if shard == 1:
            raise KeyboardInterrupt
        write(folder, shard, *rest, **options)

    monkeypatch.setattr(store, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        legacy.import_tree(tree, tmp_path / "back", "i")
    written = []
    monkeypatch.setattr(store, "write_shard", lambda *a, **o: (written.append(a[1]), write(*a, **o)))
    (folder,) = legacy.import_tree(tree, tmp_path / "back", "i")
    assert written == [1]
    same = [name for name in files(whole) if name != "step.json"]  # which says how long it took
    assert {name: files(folder)[name] for name in same} == {name: files(whole)[name] for name in same}


def test_command_line(tree, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "imatch.legacy", "import", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run(str(tree), "--run", "old")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "exports/old/01_embed/survey/vits16+/res64_raw"
    assert f"01_embed finished: {folder}" in done.stdout
    assert len(Embeddings(folder)) == 4


def test_exit_codes(tmp_path, capsys):
    tree = foreign(tmp_path / "tree", {"global": "Global"})
    foreign(tree, {"global": "Global"}, cfg="res32")
    exports = ["--exports", str(tmp_path / "back")]
    assert legacy.main(["import", str(tmp_path / "nowhere"), *exports]) == 2
    assert legacy.main(["import", str(tree), "--photographs", str(tmp_path / "nowhere"), *exports]) == 2
    assert "error: dataset folder" in capsys.readouterr().err
    next(tree.rglob("*res32*_0002.npy")).write_bytes(b"")
    assert legacy.main(["import", str(tree), *exports]) == 1
    said = capsys.readouterr()
    assert "FAILED beach cxTiny res32 raw" in said.err
    assert (tmp_path / "back/imported/01_embed/beach/cxTiny/res64_raw/metrics.json").is_file()  # the other one went on
