"""Per-image files go out under the names that were agreed on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import imatch
from imatch.core.files import read_json, read_rows, write_array, write_json, write_rows, write_signed
from imatch.core.step import Step, open_step, start_step
from imatch.core.types import ImatchError, StepError, Tokens, grid_xy
from imatch.data.shards import Shards
from imatch.data.store import Stored
from imatch.export import per_image
from imatch.steps import import_tree
from tests import grouped
from tests.grouped import by

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
    xy = grid_xy(grid, size) if xy is None else xy
    return Tokens((vector / np.linalg.norm(vector)).astype(np.float32), descriptors, xy, grid)


WORDS = {
    "01_embed": ("dataset", "weight", "configuration"),
    "02_references": ("dataset", "kind", "weight", "configuration"),
}


def begun(folder: Path, name: str, parameters: dict, upstream: dict, links: dict) -> Step:
    """The step that writes to <exports>/<run>/<name>/<dataset>/..."""
    place = folder.parts.index(name)
    about = dict(zip(WORDS[name], folder.parts[place + 1 :], strict=False))
    return start_step(Path(*folder.parts[:place]), name, about, parameters, upstream, links)


def made(folder: Path, rows: list[dict], name="01_embed", upstream=None, links=None, **given) -> Step:
    """A finished step as 01_embed or 02_references leaves it."""
    given = {**PARAMETERS, **given}
    links = {"photographs": folder.parent, **(links or {})}
    step = begun(folder, name, given, upstream or {}, links)
    for shard in range(0, len(rows), 3):
        part = rows[shard : shard + 3]
        every = [tokens(shard + i, size=row["size"]) for i, row in enumerate(part)]
        Shards(folder).write(shard // 3, part, every)
    Shards(folder).merge()
    imatch.steps.finish_embed(step, Stored(folder))
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
    step = begun(views / "views", "02_references", {"crops": list(crops)}, {}, {"embed": data.folder})
    rows, described = [], []
    for number, source in enumerate(read_rows(data.folder / "images.jsonl")):
        for angle in (0.0, 22.5, -45.0):
            for crop in crops:
                id = f"{source['id'][:-4]}_{angle}_{crop}.jpg"
                made_of = {"source": source["id"], "source_sha256": source["sha256"]}
                rows.append(row(id, 100 + len(rows), **made_of))
                described.append({"id": id, "angle": angle, "crop": crop, "source": source["id"]})
                assert number < 4
    order = sorted(range(len(rows)), key=lambda i: rows[i]["id"])
    write_rows(views / "views" / "references.jsonl", [described[i] for i in order])
    step.finish({})
    links = {"views": step.folder, "embed": data.folder}
    upstream = {"embed": str(data.fingerprint)}
    references = made(
        views / "vits16+" / "res64_raw", [rows[i] for i in order], "02_references", upstream=upstream, links=links
    )
    return data, references


def export(step: Step, folder: Path, outputs=ALL) -> int:
    return per_image.export_per_image(Stored(step.folder), outputs, folder, step.on_change)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def embedded(photographs: Path, exports: Path, weight: str, **given) -> Step:
    step = grouped.start_embed(
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
    imatch.steps.finish_embed(step, imatch.steps.embed(step, resources=by(workers=0)))
    return step


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
    one = Stored(step.folder).tokens(0)
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
    meta = read_json(tmp_path / f"tree/survey/vits16+/low/PatchToken/PatchToken{LOW_7}_meta.json")
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
    write, calls = write_array, []

    def killed(path: Path, array: np.ndarray) -> None:
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        write(path, array)

    monkeypatch.setattr(per_image, "write_array", killed)
    with pytest.raises(KeyboardInterrupt):
        export(step, tmp_path / "tree")
    monkeypatch.setattr(per_image, "write_array", write)
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
    write_array(path, np.ones(3))
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
        assert per_image.export_per_image(Stored(step.folder), []) == 0
        assert per_image.export_per_image(Stored(step.folder), ["global.json"]) == len(Stored(step.folder))
    assert {path.name for path in (tmp_path / "exports/r/per_image").iterdir()} == {"survey"}
    assert len(files(tmp_path / "exports/r/per_image/survey/vits16+/low")) == 2 + 2 * 3


def test_tag_follows_the_configuration(tmp_path):
    plain = survey(tmp_path / "exports")
    tagged = plain.folder.with_name("res64_raw_new_try")
    shutil.copytree(plain.folder, tagged)
    record = read_json(tagged / "step.json", signed=True)
    write_signed(tagged / "step.json", {**record, "about": {**record["about"], "configuration": tagged.name}})
    for step in (plain, open_step(tagged)):
        export(step, tmp_path / "tree", ["global.npy"])
    names = {Path(name).name for name in files(tmp_path / "tree")}
    assert {f"GlobalToken{LOW_7}.npy", f"GlobalToken{LOW_7.replace('_raw', '-new_try_raw')}.npy"} <= names
    groups = {(group.cfg, group.variant, len(group.items)) for group in import_tree.read_tree(tmp_path / "tree")}
    assert groups == {("res64", "raw", 4), ("res64-new_try", "raw", 4)}


# --- names ------------------------------------------------------------------------------------------------


def named(*ids: str) -> list[str]:
    rows = [{"id": id, "frame": 3} for id in ids]
    return ["/".join(name) for name in per_image.names(rows, "beach").values()]


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        (["a3.jpg", "b/c_3.jpg"], ["beach/a3", "b/c_3"]),
        (["x/1/a.jpg", "y/1/a.jpg"], ["x_1/a", "y_1/a"]),
        (["flight 1/a:b.jpg"], ["flight_1/a_b"]),
        (["서울/사진 1.jpg"], ["서울/사진_1"]),
        (["con/nul.jpg", "aux.x/a.jpg", "b./a.jpg"], ["_con/nul", "_aux.x/a", "b_/a"]),
        (["sub2_sift_NONE_x/a.jpg"], ["sub2-sift-NONE-x-/a"]),
        (["a_raw/sift_LVD_1.jpg", "sub3_x/SAT.jpg"], ["a_raw/sift-LVD-1-", "sub3_x/SAT-"]),
    ],
    ids=str,
)
def test_names_of_plain_folders_are_safe(ids, wanted):
    assert named(*ids) == wanted
    assert [named(id)[0] for id in ids] == wanted  # whatever else is there


@pytest.mark.parametrize(
    "ids",
    [
        ["a.png", "A.PNG"],
        ["a.png", "a.jpg"],
        ["f/a b.jpg", "f/a-b.jpg", "f/a_b.jpg"],
        ["a/b_c/1.jpg", "a_b/c/1.jpg"],
        ["f/é.jpg", "f/e\u0301.jpg", "f/e_.jpg"],
        [f"{'f' * 100}/{'é' * 100}{end}.jpg" for end in "ab"],
    ],
    ids=str,
)
def test_no_two_names_are_alike_even_without_case(ids):
    found = named(*ids, "z/b/c/1.jpg")
    assert len({name.lower() for name in found}) == len(ids) + 1
    assert max(len(part.encode()) for name in found for part in name.split("/")) < 60


def test_longest_names_fit_a_file_system(tmp_path):
    folder = tmp_path / "e/r/01_embed/survey/vits16+" / f"res64_raw_{'tag' * 40}"
    export(made(folder, [row(f"{'f' * 100}/{'g' * 100}.jpg", 1)]), tmp_path / "tree", ["global.npy"])
    assert max(len(Path(name).name) for name in files(tmp_path / "tree")) < 200
    (group,) = import_tree.read_tree(tmp_path / "tree")
    assert group.cfg.startswith("res64-tagtag")


@pytest.mark.parametrize("tag", ["a_raw_sift_NONE_x", "sub2"])
def test_our_own_trees_read_back(tag, tmp_path):
    folder = tmp_path / f"e/r/01_embed/survey/vits16+/res64_raw_{tag}"
    rows = [row(id, i) for i, id in enumerate(["NONE/SAT.jpg", "a_raw/x_NONE_raw.jpg", "sub2_sift_NONE_x/1.jpg"])]
    backbone = {**PARAMETERS["backbone"], "hub_entry": "dinov2_vitb14_reg"}
    export(made(folder, rows, backbone=backbone), tmp_path / "tree", ["global.npy"])
    (group,) = import_tree.read_tree(tmp_path / "tree")
    assert (group.variant, group.hub_entry, len(group.items)) == ("raw", "dinov2-vitb14-reg", 3)
    assert {item.label for item in group.items} == {path.name for path in (tmp_path / "tree/survey/vits16+").iterdir()}


CAPTURED = [
    {"id": "1_low/1_low_0007.jpg", "capture": "1", "label": "low", "frame": 7},
    {"id": "2_low/2_low_0007.jpg", "capture": "2", "label": "low", "frame": 7},
    {"id": "2_high/2_high_2.jpg", "capture": "3", "label": "high", "frame": 2},
]


@pytest.mark.parametrize("rows", [CAPTURED, CAPTURED[:1], CAPTURED[1:]], ids=len)
def test_two_captures_with_one_label_are_told_apart_whatever_is_selected(rows, tmp_path):
    wanted = {CAPTURED[0]["id"]: ("1_low", "0007"), CAPTURED[1]["id"]: ("2_low", "0007")}
    wanted[CAPTURED[2]["id"]] = ("high", "2")
    key = tmp_path / "data_key.json"
    write_json(key, {"datasets": {"beach": {"root": "b", "captures": {"1": "low", "2": "low", "3": "high"}}}})
    assert per_image.names(rows, "beach", key) == {row["id"]: wanted[row["id"]] for row in rows}
    key.unlink()
    assert per_image.names(CAPTURED, "beach", key) == wanted


# --- what changes, and what does not ----------------------------------------------------------------------


def changed(tmp_path: Path, number: int, **about) -> tuple[Step, Step]:
    """A step, and the same with one photograph changed (or gone, without anything about it)."""
    rows = [row(f"f/{i}.jpg", i) for i in range(4)]
    other = [*rows[:number], *([{**rows[number], **about}] if about else []), *rows[number + 1 :]]
    return tuple(made(tmp_path / name / "r/01_embed/survey/w/res64_raw", r) for name, r in (("a", rows), ("b", other)))


@pytest.mark.parametrize(("output", "stale"), [("global.npy", [2]), ("denseft.npy", [0, 1, 2, 3])])
def test_fingerprints_depend_on_the_photographs(output, stale, tmp_path):
    before, after = changed(tmp_path, 2, sha256="f" * 64)
    export(before, tmp_path / "tree", [output])
    with pytest.raises(StepError) as raised:
        export(after, tmp_path / "tree", [output])
    assert [f"_f_{i}: " in str(raised.value) for i in range(4)] == [i in stale for i in range(4)]


def test_files_of_photographs_that_are_gone_are_refused_or_removed(tmp_path):
    before, after = changed(tmp_path, 3)
    export(before, tmp_path / "tree", ["global.npy"])
    write_array(tmp_path / "tree/survey/w/f/GlobalToken/GlobalToken_res64_raw_x_LVD_f_9.npy", np.ones(3))
    with pytest.raises(StepError, match=r"_f_3: of a photograph that the step does not have \(any more\)"):
        export(after, tmp_path / "tree", ["global.npy"])
    after.on_change = "recompute"
    assert export(after, tmp_path / "tree", ["global.npy"]) == 0
    left = {name.rpartition("_f_")[2] for name in files(tmp_path / "tree")}
    assert left == {f"{i}{end}" for i in range(3) for end in (".npy", "_meta.json")} | {"9.npy"}
