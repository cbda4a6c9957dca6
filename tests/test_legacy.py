"""Per-image files come back without a changed bit, ours and those of other tools."""

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
from imatch.core.files import read_json, read_rows, write_array, write_json
from imatch.core.step import open_step
from imatch.core.types import ImatchError, StepError, grid_xy
from imatch.data.embeddings import Embeddings
from imatch.data.shards import Shards
from imatch.data.store import Stored
from imatch.steps import import_tree
from tests.command import command
from tests.test_perimage import (
    ALL,
    IDS,
    LOW_7,
    PARAMETERS,
    begun,
    embedded,
    export,
    files,
    row,
    survey,
    tokens,
    with_references,
)
from tests.test_steps import indexed, judged


def imported(tree: Path, exports: Path, run: str = "i", on_change: str = "refuse") -> list[Path]:
    groups = import_tree.read_tree(tree)
    return [import_tree.import_group(group, groups, exports, run, on_change) for group in groups]


@pytest.fixture
def tree(tmp_path) -> Path:
    """The tree of a survey, global and local."""
    export(survey(tmp_path / "exports"), tmp_path / "tree", ("global.npy", "patch.npy", "grid.npy"))
    return tmp_path / "tree"


# --- out and in again -------------------------------------------------------------------------------------


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
    (folder,) = imported(tmp_path / "tree", tmp_path / "back")
    assert folder == tmp_path / "back/i/01_embed/survey/vits16+/res64_raw"
    a, b = Stored(step.folder), Stored(folder)
    assert b.ids == ["high/7", "low/0007", "low/0012", "very_high/0007"]
    same_tokens(a, b, by_sha(a, b))
    back = open_step(folder).parameters
    same = ("weight", "backbone", "weights_digest", "resize", "cfg", "variant")
    assert {key: back[key] for key in same} == {key: step.parameters[key] for key in same}
    assert back["imported"] is True
    low = b.rows[1]
    known = {key: low[key] for key in ("size", "sha256", "position", "capture", "label", "frame", "global_norm")}
    assert known == {
        **{key: a.rows[0][key] for key in ("size", "sha256", "position", "capture", "label", "frame")},
        "global_norm": 1.0,
    }
    assert not {"meta", "global", "patch"} & {*low}
    metas = read_rows(folder / "metas.jsonl")
    low = metas[b.ids.index("low/0007")]
    assert low["global"] == read_json(tmp_path / f"tree/survey/vits16+/low/GlobalToken/GlobalToken{LOW_7}_meta.json")
    assert {*low} == {output[:-4] for output in outputs} - {"denseft"}
    assert [meta["global"]["sha256"] for meta in metas] == [row["sha256"] for row in b.rows]


def test_exported_again_it_is_the_same_tree(tree, tmp_path):
    (folder,) = imported(tree, tmp_path / "back")
    export(open_step(folder), tmp_path / "again", ("global.npy", "patch.npy", "grid.npy"))
    arrays = {name: data for name, data in files(tree).items() if name.endswith(".npy")}
    assert {name: data for name, data in files(tmp_path / "again").items() if name.endswith(".npy")} == arrays
    assert export(open_step(folder), tree, ["global.npy"]) == 0


@pytest.mark.parametrize("variant", ["raw", "sub2"])
def test_dense_sift_comes_back(variant, few_photographs, tmp_path):
    step = embedded(few_photographs, tmp_path / "exports", "dsift", variant=variant)
    export(step, tmp_path / "tree")
    (folder,) = imported(tmp_path / "tree", tmp_path / "back")
    a, b = Stored(step.folder), Stored(folder)
    assert folder.parts[-3:] == ("few", "dsift", f"scale1_{variant}")
    assert b.ids == ["few/a", "few/b", "few/c", "flight_1/d"]
    same_tokens(a, b)
    assert open_step(folder).parameters["backbone"] == step.parameters["backbone"]


@pytest.mark.parametrize("crops", [(1.0,), (0.5, 1.0)], ids=str)
def test_references_come_back_in_a_store_of_their_own(crops, tmp_path):
    data, references = with_references(tmp_path / "exports", crops)
    for step in (data, references):
        export(step, tmp_path / "tree")
    folders = imported(tmp_path / "tree", tmp_path / "back")
    assert [folder.relative_to(tmp_path / "back/i").as_posix() for folder in folders] == [
        "01_embed/survey/vits16+/res64_raw",
        "02_references/survey/imported/vits16+/res64_raw",
    ]
    a, b = Stored(references.folder), Stored(folders[1])
    same_tokens(a, b, by_sha(a, b))
    back = {row["id"]: row for row in b.rows}
    turned = back["low/rotm045/0007" if len(crops) == 1 else "low/rotm045_crop50/0007"]
    assert (turned["angle"], turned["crop"], turned["source"]) == (-45, crops[0], "low/0007")
    assert {*b.shows} == {*Stored(folders[0]).shows}

    index = indexed(*map(open_step, folders), "reference-data", k=2)
    index.finish(judged(index)[-1])
    assert index.metrics["queries"] == len(a)
    assert index.metrics["without_answer"] == 0

    export(open_step(folders[1]), tmp_path / "again", ["grid.npy"])
    wanted = {n: d for n, d in files(tmp_path / "tree").items() if "ReferenceGrid_" in n and n.endswith(".npy")}
    assert {n: d for n, d in files(tmp_path / "again").items() if n.endswith(".npy")} == wanted


def test_cropped_and_thinned_grids_keep_their_places(tmp_path):
    """Positions that no grid over the whole photograph has come back by first centre and step."""
    folder = tmp_path / "exports/r/01_embed/survey/vits16+/res64_raw"
    step = begun(folder, "01_embed", PARAMETERS, {}, {"photographs": tmp_path})
    xy = grid_xy((4, 4), (64, 64)) + np.float32([16, 0])
    Shards(folder).write(0, [row("f/1.jpg", 1), row("f/2.jpg", 2)], [tokens(i, (4, 4), xy=xy) for i in (1, 2)])
    Shards(folder).merge()
    imatch.steps.finish_embed(step, Stored(folder))
    export(step, tmp_path / "tree")
    with Image.open(next((tmp_path / "tree").rglob("*.png"))) as picture:
        assert picture.size == (512, 512)
    (back,) = imported(tmp_path / "tree", tmp_path / "back")
    assert np.array_equal(Stored(back).tokens(1).xy, xy)


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
            write_array(folder / f"{kind}_{middle}_mid_low_{frame}.npy", arrays[what])
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
    (folder,) = imported(tree, tmp_path / "back")
    embeddings = Stored(folder)
    assert folder.parts[-3:] == ("beach", "cxTiny", "res64_raw")
    assert embeddings.ids == ["mid_low/0001", "mid_low/0002"]
    assert open_step(folder).parameters["backbone"] == {
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
        assert np.allclose(one.vector * about["global_norm"], vector, rtol=3e-7, atol=0)


def test_global_files_alone_are_a_store(tmp_path):
    (folder,) = imported(foreign(tmp_path / "tree", {"global": "Global"}), tmp_path / "back")
    embeddings = Stored(folder)
    assert embeddings.vectors.shape == (2, 8)
    assert embeddings.tokens(0).descriptors.shape == (0, 8)
    assert "global 8 numbers" in str(embeddings)


def test_folder_of_a_data_set_or_a_weight_will_do(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global"})
    whole = [str(group) for group in import_tree.read_tree(tree)]
    assert whole == ["beach cxTiny res64 raw dinov3_convnext_tiny SAT photographs"]
    for folder in ("beach", "beach/cxTiny", "beach/cxTiny/mid_low"):
        assert [str(group) for group in import_tree.read_tree(tree / folder)] == whole


def test_references_of_other_tools_know_their_sources(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "grid": "PatchGrid"})
    for rot in ("rot045", "-90", "rot30_crop50"):
        foreign(tree, {"global": f"ReferenceGlobal|{rot}", "grid": f"ReferenceGrid|{rot}"}, seed=1)
    folders = imported(tree, tmp_path / "back")
    assert len(folders) == 2
    data, references = map(Stored, folders)
    assert references.shows == [data.shows[int(id.endswith("2"))] for id in references.ids]
    views = {row["id"].split("/")[1]: (row["angle"], row["crop"]) for row in references.rows}
    assert views == {"rot045": (45, None), "-90": (-90, None), "rot30_crop50": (30, 0.5)}
    export(open_step(folders[1]), tmp_path / "out", ["global.npy"])
    assert len(files(tmp_path / "out")) == 12


def test_references_without_their_photographs_are_a_store_too(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "ReferenceGlobal|rot045"})
    (folder,) = imported(tree, tmp_path / "back")
    assert [row["source"] for row in Stored(folder).rows] == ["mid_low/0001", "mid_low/0002"]


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        (("vitl16_LVD", "vitl16_SAT"), ["res64_raw_LVD", "res64_raw_SAT"]),
        (("vitl16_LVD", "vits16_LVD"), ["res64_raw_dinov3_vitl16", "res64_raw_dinov3_vits16"]),
    ],
    ids=str,
)
def test_two_networks_or_families_of_one_weight_are_two_stores(entries, names, tmp_path):
    for entry in entries:
        tree = foreign(tmp_path / "tree", {"global": "Global"}, entry=f"dinov3_{entry}")
    folders = imported(tree, tmp_path / "back")
    assert [folder.name for folder in folders] == names
    for folder in folders:
        export(open_step(folder), tmp_path / "again", ["global.npy"])
    again = sorted(path.name for path in (tmp_path / "again").rglob("*.npy"))
    assert again == sorted(f"GlobalToken{path.name[6:]}" for path in tree.rglob("*.npy"))
    for path in tree.rglob("*.npy"):
        back = np.load(next((tmp_path / "again").rglob(f"GlobalToken{path.name[6:]}")))
        assert np.allclose(back, np.load(path)[0], rtol=3e-7, atol=0)


def test_configurations_and_variants_are_stores_of_their_own(tmp_path):
    given = {"kinds": {"global": "Global", "patch": "Patch"}, "entry": "dinov3_vits16_LVD"}
    tree = foreign(tmp_path / "tree", **given, cfg="res_240", n=(15, 15))
    foreign(tree, **given, cfg="res_240", variant="sub2", n=(8, 8))
    folders = imported(tree, tmp_path / "back")
    assert [folder.name for folder in folders] == ["res_240_raw", "res_240_sub2"]
    thin = Stored(folders[1])
    assert thin.rows[0]["size"] == [240, 240]
    assert np.array_equal(thin.tokens(0).xy, Stored(folders[0]).tokens(0).thinned(2).xy)


def test_thinned_grids_lie_where_a_meta_says(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "grid": "Grid"}, variant="sub2", n=(2, 3), cfg="wide")
    refused(tree, r"Grid_.*_0001.npy is a grid of \(2, 3\), thinned by 2 from one that neither .* wide nor a meta")
    say(tree, {"size": [64, 96], "xy_first": [7.5, 7.5], "xy_step": [32, 32.0]})
    (folder,) = imported(tree, tmp_path / "back")
    assert Stored(folder).tokens(1).xy[[0, 5]].tolist() == [[7.5, 7.5], [71.5, 39.5]]


# --- refusals ---------------------------------------------------------------------------------------------


def refused(tree: Path, reason: str) -> None:
    with pytest.raises(ImatchError, match=reason):
        imported(tree, tree.parent / "back")


def say(tree: Path, meta: object) -> None:
    """Put a meta beside every file."""
    for path in tree.rglob("*.npy"):
        path.with_name(f"{path.stem}_meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "name",
    [
        "low/GlobalToken/embedding.npy",
        "low/GlobalToken/Global_res64_raw_dinov3_vits16_XYZ_low_1.npy",
        "low/GlobalToken/Global_res64_raw_dinov3_vits16_LVD_high_1.npy",
        "low/GlobalToken/Global_res64_raw_dinov3_vits16_LVD_low_.npy",
        "low/GlobalToken/Global_a_raw_dinov3_vits16_LVD_raw_dinov3_vits16_LVD_low_1.npy",
        "low/ReferenceGlobal/ReferenceGlobal_res64_raw_dinov3_vits16_LVD_low_1.npy",
        "low/rot045/GlobalToken/Global_res64_raw_dinov3_vits16_LVD_low_1.npy",
    ],
)
def test_names_that_do_not_say_what_they_are_are_refused(name, tmp_path):
    write_array(tmp_path / "tree/beach/vits16" / name, np.ones(8))
    refused(
        tmp_path / "tree", rf"whose names do not say what they are:\n  beach/vits16/{name}\nThey must be called <data"
    )


def test_two_files_for_one_thing_are_refused(tmp_path):
    foreign(tmp_path / "tree", {"global": "Global"})
    foreign(tmp_path / "tree", {"global": "GlobalToken"})
    refused(tmp_path / "tree", "GlobalToken.*0001.npy: says the same as Global_")


def test_no_files_are_refused(tmp_path):
    refused(tmp_path / "nowhere", "no per-image files below .*nowhere: give")
    (tmp_path / "tree").mkdir()
    refused(tmp_path / "tree", "no per-image files below")


@pytest.mark.parametrize(("gone", "lacks"), [("PatchGrid", "PatchToken or PatchGrid"), ("GlobalToken", "GlobalToken")])
def test_counts_that_differ_are_refused(gone, lacks, tmp_path):
    frames = [f"{i:04d}" for i in range(14)]
    tree = foreign(tmp_path / "tree", {"global": "GlobalToken", "grid": "PatchGrid"}, frames)
    for frame in frames[2:]:
        next(tree.rglob(f"{gone}_*_{frame}.npy")).unlink()
    listed = "".join(f"\\n  mid_low/{frame}: no {lacks}" for frame in frames[2:12])
    refused(tree, rf"12 of 14 lack a file .*:{listed}\n  \.\.\. and 2 more\nExport what is missing")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("harm", ["shape", "values"])
def test_patches_that_disagree_with_their_grid_are_refused(harm, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch", "grid": "Grid"})
    path = next(tree.rglob("Patch_*_0002.npy"))
    array = np.load(path)
    write_array(path, array[:, :-1] if harm == "shape" else array[:, ::-1])
    refused(tree, "Patch_.*0002.npy and .*Grid_.*0002.npy are not the same, row by row: export them again")


def test_tokens_that_are_no_square_need_a_grid(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch"}, n=(2, 3))
    refused(tree, "Patch_.*0001.npy holds 6 tokens, but nothing says their grid: export PatchGrid")
    for path in tree.rglob("Patch_*.npy"):
        write_json(path.with_name(f"{path.stem}_meta.json"), {"grid": [2, 3]})
    (folder,) = imported(tree, tmp_path / "back")
    assert Stored(folder).rows[0]["grid"] == [2, 3]
    assert Stored(folder).rows[0]["size"] == [64, 96]


def test_meta_whose_grid_does_not_fit_is_refused(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch"})
    path = next(tree.rglob("Patch_*_0002.npy"))
    write_json(path.with_name(f"{path.stem}_meta.json"), {"grid": [4, 5]})
    refused(tree, r"holds 16 tokens, but its meta says \[4, 5\]")


@pytest.mark.parametrize("kind", ["Global", "Grid"])
def test_dimensions_that_differ_are_refused(kind, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "grid": "Grid"})
    path = next(tree.rglob(f"{kind}_*_0002.npy"))
    write_array(path, np.load(path)[..., :-1])
    refused(tree, "of one store must be alike, but .*0001.npy has a vector of 8 .* and .*0002.npy a vector .*of 7 ")


def test_types_that_differ_are_refused(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "grid": "Grid"})
    path = next(tree.rglob("Grid_*_0002.npy"))
    write_array(path, np.load(path).astype(np.float16))
    refused(tree, "of one store must be alike, but .* descriptors of 8 float32 and .* descriptors of 8 float16: move")


@pytest.mark.parametrize(("kind", "value"), [("Global", np.nan), ("Patch", np.inf)])
def test_values_that_are_not_finite_are_refused(kind, value, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch"})
    path = next(tree.rglob(f"{kind}_*_0002.npy"))
    array = np.load(path)
    array.flat[3] = value
    write_array(path, array)
    refused(tree, f"{path.name} holds values that are not finite")


@pytest.mark.parametrize(
    ("key", "value"), [("pooling", "cls"), ("resize", {"mode": "stretch"}), ("weights_digest", "abc")]
)
def test_mixed_metas_are_refused(key, value, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global"})
    path = next(tree.rglob("Global_*_0002.npy"))
    write_json(path.with_name(f"{path.stem}_meta.json"), {key: value})
    refused(tree, rf"0002.npy was made differently from mid_low/0001:\n  .*{key}(?s:.*)a tree of their own")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"nonsense", "is no .npy file of numbers"),
        (b"", "is no .npy file of numbers"),
        (None, "is no .npy file of numbers"),
        (np.ones(8, np.int64), "holds int64 of .* but a global has floating-point numbers"),
        (np.ones((2, 8), np.float32), r"holds float32 of shape \(2, 8\), but a global has .* in 1 dimensions"),
        (np.ones(0, np.float32), r"holds float32 of shape \(0,\)"),
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
        write_array(path, data)
    refused(tree, f"{path.name} {reason}")


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        ({"size": [128]}, "size: List should have at least 2 items .* got .128."),
        ({"size": "128x128"}, "size must be a valid list"),
        ({"size": [float("nan"), 3]}, r"size\[0\] must be a valid number"),
        ({"size": [128.5, 96]}, r"size\[0\] must be a multiple of 1, got 128.5"),
        ({"grid": {"h": 4, "w": 4}}, "grid must be a valid list"),
        ({"grid": [-4, -4]}, r"grid\[0\] must be greater than 0"),
        ({"xy_first": [1], "xy_step": [1, 1]}, "xy_first: List should have at least 2 items"),
        ({"xy_first": [1, 1], "xy_step": [1, 0]}, r"xy_step\[1\] must be greater than 0"),
        ({"angle": "45"}, "angle must be a valid number"),
        ({"position": [1, 2]}, "position must be a valid dictionary"),
    ],
    ids=str,
)
def test_metas_that_would_place_things_wrongly_are_refused(meta, reason, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch"})
    say(tree, meta)
    refused(tree, f"_0001_meta.json: {reason}")


def test_metas_may_say_anything_else(tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global", "patch": "Patch"})
    odd = {"norm": float("nan"), "backbone": "vit", "pooling": ["cls"], "sha256": 7, "id": "../x", "grid": [4.0, 4]}
    say(tree, {**odd, "position": {"lat": float("inf")}})
    (folder,) = imported(tree, tmp_path / "back")
    about = Stored(folder).rows[0]
    assert (about["id"], about["position"], about["grid"]) == ("mid_low/0001", {"lat": None}, [4, 4])
    assert read_rows(folder / "metas.jsonl")[0]["global"]["norm"] is None


def test_two_data_sets_of_one_name_are_refused(tmp_path):
    for place in "ab":
        foreign(tmp_path / "tree" / place, {"global": "Global"})
    refused(tmp_path / "tree", "holds two data sets named beach, .*a/beach and .*b/beach, which would become one")


def test_files_that_an_earlier_export_left_are_refused(tree):
    for path in tree.rglob(f"*{LOW_7}*"):
        shutil.copy(path, path.with_name(path.name.replace("low_0007", "low_7")))
    refused(tree, "the files of low/0007 and of low/7 both say that they show 250912_low/250912_low_0007.JPG: one of")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_broken_metas_are_refused(text, tmp_path):
    tree = foreign(tmp_path / "tree", {"global": "Global"})
    path = next(tree.rglob("Global_*_0002.npy"))
    path.with_name(f"{path.stem}_meta.json").write_text(text)
    refused(tree, f"{path.stem}_meta.json (is no JSON|holds no JSON object)")


def test_files_of_two_photographs_under_one_name_are_refused(tree):
    path = next(tree.rglob(f"PatchToken{LOW_7}_meta.json"))
    write_json(path, {**read_json(path), "sha256": "f" * 64})
    refused(tree, "PatchToken.*is of another photograph than other files of low/0007: its meta has sha256 f")


def test_array_of_another_shape_is_refused(tree):
    path = next(tree.rglob(f"GlobalToken{LOW_7}.npy"))
    write_array(path, np.load(path)[:-1])
    refused(tree, r"must be alike, but .*high_7.npy has a vector of 24 .*low_0007.npy a vector of 23 numbers")


def test_references_of_another_photograph_are_refused(tmp_path):
    data, references = with_references(tmp_path / "exports")
    for step in (data, references):
        export(step, tmp_path / "tree", ["global.npy"])
    for path in (tmp_path / "tree").rglob("rotm045/*/*_low_0007_meta.json"):
        write_json(path, {**read_json(path), "source_sha256": "f" * 64})
    refused(tmp_path / "tree", "was made from another photograph than low/0007")


# --- again ------------------------------------------------------------------------------------------------


def test_second_import_is_there_already(tree, tmp_path, capsys):
    (folder,) = imported(tree, tmp_path / "back")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    imported(tree, tmp_path / "back")
    assert f"there already at {folder}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_changed_tree_is_refused_or_imported_anew(tree, tmp_path):
    (folder,) = imported(tree, tmp_path / "back")
    was = files(folder)
    path = next(tree.rglob(f"GlobalToken{LOW_7}.npy"))
    write_array(path, -np.load(path))
    for gone in tree.rglob("*very_high_0007*"):
        gone.unlink()
    refused(tree, r"res64_raw was made differently:\n  parameters.files: .* -> ")
    assert files(folder) == was
    imported(tree, tmp_path / "back", "i", on_change="recompute")
    embeddings = Stored(folder)
    assert embeddings.ids == ["high/7", "low/0007", "low/0012"]
    assert np.array_equal(embeddings.vectors[1], np.load(path))


def test_mended_files_need_no_permission(tree, tmp_path, monkeypatch):
    """An import that failed asked for it, also after its first shard."""
    monkeypatch.setattr(import_tree, "SHARD", 1)
    path = next(tree.rglob(f"PatchToken{LOW_7}.npy"))
    array = np.load(path)
    write_array(path, array * np.float16(np.nan))
    refused(tree, "not finite")
    write_array(path, array)
    (folder,) = imported(tree, tmp_path / "back")
    assert len(Stored(folder)) == 4


def test_step_of_01_embed_is_not_imported_over(tree, tmp_path):
    survey(tmp_path / "back")
    before = files(tmp_path / "back")
    with pytest.raises(StepError, match="imported: null -> true"):
        imported(tree, tmp_path / "back", "r")
    assert files(tmp_path / "back") == before


def test_references_join_a_step_of_01_embed(tmp_path):
    data, references = with_references(tmp_path / "exports")
    export(references, tmp_path / "tree", ["global.npy"])
    (folder,) = imported(tmp_path / "tree", tmp_path / "exports", "r")
    assert open_step(folder).upstream == {"embed": data.fingerprint}
    assert {row["source"] for row in Stored(folder).rows} == {*IDS}


def test_killed_import_goes_on_to_the_same_bytes(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(import_tree, "SHARD", 2)
    (whole,) = imported(tree, tmp_path / "whole")
    write = Shards.write

    def killed(self, shard, *rest, **options):
        if shard == 1:
            raise KeyboardInterrupt
        write(self, shard, *rest, **options)

    monkeypatch.setattr(Shards, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        imported(tree, tmp_path / "back")
    written = []
    monkeypatch.setattr(Shards, "write", lambda *a, **o: (written.append(a[1]), write(*a, **o)))
    (folder,) = imported(tree, tmp_path / "back")
    assert written == [1]
    same = [name for name in files(whole) if name != "step.json"]  # which says how long it took
    assert {name: files(folder)[name] for name in same} == {name: files(whole)[name] for name in same}


def test_command_line(tree, tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "imatch", "import", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run(str(tree), "--run", "old")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "exports/old/01_embed/survey/vits16+/res64_raw"
    assert f"01_embed finished: {folder}" in done.stdout
    assert len(Stored(folder)) == 4


def test_exit_codes(tmp_path, capsys):
    tree = foreign(tmp_path / "tree", {"global": "Global"})
    foreign(tree, {"global": "Global"}, cfg="res32")
    exports = ["--exports", str(tmp_path / "back")]
    assert command("import", str(tmp_path / "nowhere"), *exports) == 2
    assert command("import", str(tree), "--run", "../../x", *exports) == 2
    assert "error: run '../../x'" in capsys.readouterr().err
    next(tree.rglob("*res32*_0002.npy")).write_bytes(b"")
    assert command("import", str(tree), *exports) == 1
    said = capsys.readouterr()
    assert "FAILED beach cxTiny res32 raw" in said.err
    assert (tmp_path / "back/imported/01_embed/beach/cxTiny/res64_raw/metrics.json").is_file()  # the other one went on
    write_array(
        tree / "beach/cxTiny/mid_low/Global/Global_res64_raw_dinov3_convnext_tiny_SAT_mid_low_3.npy", np.ones(8)
    )
    assert command("import", str(tree), *exports) == 1
    assert "To make it anew: --on-change recompute" in capsys.readouterr().err
