"""What is kept of the local descriptors: what comes back, what it takes, what goes on from it and what is refused."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import imatch
from imatch.core.files import write_array
from imatch.core.step import open_step
from imatch.core.types import ImatchError, StepError, Tokens, grid_xy
from imatch.data import rotations, shards, store
from imatch.data.shards import Shards
from imatch.data.store import AGGREGATED, KEEPS, Stored
from imatch.features.sift import DenseSift
from imatch.steps.embedding import embed_poses
from imatch.viz import figures
from tests import cells
from tests.grouped import by
from tests.test_resume import assert_alike
from tests.test_steps import embedded, indexed, judged, matched, referenced, searched

ROOT = Path(__file__).parents[1]
LESS = [keep for keep in KEEPS if keep != "float16"]
SQUARE = imatch.Resize("stretch", long_side=160)  # 100 patches, more than the aggregated tokens
HEADER = 128  # bytes of a .npy before its numbers


def files(folder):
    kept = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".npy", ".jsonl"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept if path.name != "seen.jsonl"}


@pytest.fixture(scope="module")
def stores(few_photographs, tmp_path_factory):
    """(weight, keep) -> the step that embedded four photographs, each in exports of its own."""

    def embed(weight, keep):
        return embedded(few_photographs, tmp_path_factory.mktemp(keep), weight=weight, resize=SQUARE, keep=keep)

    return {(weight, keep): embed(weight, keep) for weight in ("dsift", "sift") for keep in KEEPS}


# --- a byte a number


@pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 6e4])
def test_int8_is_off_by_half_a_scale_at_most(magnitude):
    """From float16 that are subnormal to nearly the largest."""
    given = (np.random.default_rng(0).uniform(-1, 1, (200, 48)) * magnitude).astype(np.float16)
    given[3] = 0
    whole, scale = shards.to_int8(given)
    assert (whole.dtype, scale.dtype, whole.shape, scale.shape) == (np.int8, np.float32, (200, 48), (200,))
    largest = np.abs(given.astype(float)).max(axis=1)
    away = np.abs(whole * scale[:, None] - given.astype(float))
    assert (away <= largest[:, None] / 254 * (1 + 1e-5)).all()
    assert away.max() > largest.max() / 1000  # it is no copy
    assert np.abs(whole[largest > 0]).max(axis=1).tolist() == [127] * int((largest > 0).sum())
    assert not whole[3].any()
    assert scale[3] == 0


def test_int8_of_nothing():
    whole, scale = shards.to_int8(np.zeros((0, 5), np.float16))
    assert (whole.shape, scale.shape) == ((0, 5), (0,))


# --- what comes back


DEFAULT = {"dsift": "float16", "sift": "int8"}


@pytest.mark.parametrize("weight", ["dsift", "sift"])
def test_the_default_needs_no_word(stores, weight, few_photographs, tmp_path):
    """Not a parameter, not a name, not a byte more."""
    step = stores[weight, DEFAULT[weight]]
    assert step.parameters.get("keep", "float16") == DEFAULT[weight]  # steps of before there was `keep` have float16
    assert step.folder.name == "res160_raw"
    kinds = ("", ".xy", ".scale") if weight == "sift" else ("",)
    names = {f"{shard}{kind}.npy" for shard in ("00000", "00001") for kind in kinds}
    assert {path.name for path in (step.folder / "local").iterdir()} == names
    before = embedded(few_photographs, tmp_path, weight=weight, resize=SQUARE)
    assert files(before.folder) == files(step.folder)
    assert open_step(before.folder).fingerprint == open_step(step.folder).fingerprint
    assert Stored(step.folder).tokens(0).descriptors.dtype == (np.float32 if weight == "sift" else np.float16)


@pytest.mark.parametrize("weight", ["dsift", "sift"])
@pytest.mark.parametrize("keep", LESS)
def test_what_is_kept_comes_back(stores, weight, keep):
    step, whole = stores[weight, keep], stores[weight, "float16"]
    assert step.parameters == {**whole.parameters, "keep": keep}
    assert step.folder.name == ("res160_raw" if keep == DEFAULT[weight] else f"res160_raw_{keep}")
    assert open_step(step.folder).fingerprint != open_step(whole.folder).fingerprint
    less, all_of_it = Stored(step.folder), Stored(whole.folder)
    assert np.array_equal(less.vectors, all_of_it.vectors)
    assert bool(less.unplaced) == (keep not in store.KEEPS_PLACED)
    for row in range(len(less)):
        some, every = less.tokens(row), all_of_it.tokens(row)
        if keep == "int8":
            assert some.grid == every.grid
            assert np.array_equal(some.xy, every.xy)
            assert some.descriptors.dtype == np.float32
            largest = np.abs(every.descriptors.astype(np.float32)).max(axis=1, keepdims=True)
            assert (np.abs(some.descriptors - every.descriptors) <= largest / 254 * 1.001).all()
        elif keep == "aggregated":
            assert some.grid is None
            assert np.isnan(some.xy).all()
            expected = store.aggregate(every.descriptors, AGGREGATED)
            assert np.array_equal(some.descriptors, expected[expected.any(axis=1)].astype(np.float16))
            assert len(some.descriptors) == min(AGGREGATED, np.count_nonzero(every.descriptors.any(axis=1)))
        else:
            assert some.descriptors.shape == (0, every.descriptors.shape[1])


@pytest.mark.parametrize("weight", ["dsift", "sift"])
@pytest.mark.parametrize("keep", KEEPS)
def test_bytes_are_as_promised(stores, weight, keep):
    folder = stores[weight, keep].folder
    embeddings, whole = Stored(folder), Stored(stores[weight, "float16"].folder)
    d, places = embeddings.tokens(0).descriptors.shape[1], keep in store.KEEPS_PLACED and weight == "sift"
    promised = sum(store.kept_bytes(keep, row["n"], d) + 8 * row["n"] * places for row in whole.rows)
    arrays = list((folder / "local").glob("*.npy"))
    taken = sum(path.stat().st_size - HEADER for path in arrays)
    if weight == "sift" and keep == "aggregated":  # a flat patch has no direction, and no token
        assert taken <= promised
    else:
        assert taken == promised
    assert len(arrays) <= 6


def test_an_unknown_way_to_keep_is_refused(few_photographs, tmp_path):
    with pytest.raises(ImatchError, match=r"storage\.keep must be .* 'float16', 'int8', .* got 'int16'"):
        embedded(few_photographs, tmp_path, keep="int16")
    assert not [*tmp_path.iterdir()]


def test_a_scale_that_is_missing_or_short_is_refused(few_photographs, tmp_path):
    step = embedded(few_photographs, tmp_path, weight="dsift", resize=SQUARE, keep="int8")
    path = step.folder / "local" / "00000.scale.npy"
    write_array(path, np.load(path)[:-1])
    with pytest.raises(StepError, match="shard 0 holds 299 scales for 300 descriptors"):
        Stored(step.folder)
    path.unlink()
    with pytest.raises(StepError, match=r"00000\.scale\.npy cannot be read .* run the notebook again"):
        Stored(step.folder)


# --- from what lies beside


@pytest.mark.parametrize("keep", LESS)
@pytest.mark.parametrize("variant", ["raw", "sub2"])
def test_a_whole_step_beside_it_spares_the_second_pass(few_photographs, tmp_path, monkeypatch, keep, variant):
    given = {"weight": "dsift", "resize": SQUARE, "keep": keep, "variant": variant}
    alone = embedded(few_photographs, tmp_path / "alone", **given)
    embedded(few_photographs, tmp_path / "beside", weight="dsift", resize=SQUARE)
    passes = []
    called = DenseSift.__call__
    monkeypatch.setattr(DenseSift, "__call__", lambda self, x: passes.append(len(x)) or called(self, x))
    beside = embedded(few_photographs, tmp_path / "beside", **given)
    assert beside.folder.name == f"res160_{variant}_{keep}"
    assert not passes
    assert files(beside.folder) == files(alone.folder)


@pytest.mark.parametrize("keep", LESS)
def test_a_step_that_keeps_less_is_not_taken_for_the_whole(few_photographs, tmp_path, keep):
    """sub2 beside a raw one of which nothing whole is left: it is embedded anew, and right."""
    embedded(few_photographs, tmp_path / "beside", weight="dsift", resize=SQUARE, keep=keep)
    for asked in ("float16", keep):
        given = {"weight": "dsift", "resize": SQUARE, "keep": asked, "variant": "sub2"}
        beside = embedded(few_photographs, tmp_path / "beside", **given)
        assert files(beside.folder) == files(embedded(few_photographs, tmp_path / f"alone {asked}", **given).folder)


@pytest.mark.parametrize("keep", LESS)
def test_turned_photographs_and_references_are_kept_alike(stores, keep):
    step = stores["dsift", keep]
    _, tokens = referenced(step)
    assert tokens.parameters == step.parameters
    assert tokens.folder.name == step.folder.name
    posed = embed_poses(Stored(step.folder), rotations.poses(4), resources=by(workers=0))
    for pose, embeddings in posed.posed.items():
        assert embeddings.folder.name == f"{step.folder.name}_{pose}"
        assert open_step(embeddings.folder).parameters["keep"] == keep
        assert {bool(one.unplaced) for one in (embeddings, posed.upright)} == {keep not in store.KEEPS_PLACED}


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
import imatch
from tests import grouped
step = grouped.start_embed(sys.argv[1], sys.argv[2], run="r", weight="dsift", keep=sys.argv[3], shard_size=1,
                           resize=imatch.Resize("stretch", long_side=160))
def kill():
    while not list((step.folder / "local").glob("*.jsonl")): time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill).start()
imatch.steps.embed(step, imatch.ComputeOptions(workers=0))
time.sleep(60)
"""


@pytest.mark.parametrize("keep", LESS)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(few_photographs, tmp_path, keep):
    command = [sys.executable, "-c", KILLED, str(few_photographs), str(tmp_path / "killed"), keep]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list((tmp_path / "killed").rglob("metrics.json"))
    given = {"weight": "dsift", "resize": SQUARE, "keep": keep, "shard_size": 1}
    step = embedded(few_photographs, tmp_path / "killed", **given)
    assert files(step.folder) == files(embedded(few_photographs, tmp_path / "whole", **given).folder)


@pytest.mark.parametrize("keep", LESS)
def test_a_photograph_that_comes_gets_a_shard_of_its_own(few_photographs, tmp_path, keep):
    folder = shutil.copytree(few_photographs, tmp_path / "few")
    given = {"weight": "dsift", "resize": SQUARE, "keep": keep}
    before = embedded(folder, tmp_path / "exports", **given)
    untouched = {path.name: path.stat().st_mtime_ns for path in (before.folder / "local").glob("00000*")}
    shutil.copy(folder / "a.png", folder / "z.png")
    after = embedded(folder, tmp_path / "exports", on_change="recompute", **given)
    assert {path.name: path.stat().st_mtime_ns for path in (after.folder / "local").glob("00000*")} == untouched
    assert_alike(Stored(after.folder), Stored(embedded(folder, tmp_path / "anew", **given).folder))


# --- what goes on from it, and what is refused


@pytest.mark.parametrize("keep", KEEPS)
def test_from_photographs_to_hits(stores, keep):
    """Plain search finds the same from each; re-ranking works wherever there are local descriptors."""
    step = stores["dsift", keep]
    _, references = referenced(step)
    index, _, _, ranking = searched(step, references, "reference-data")
    whole = stores["dsift", "float16"]
    expected = searched(whole, referenced(whole)[1], "reference-data")[-1]
    assert np.array_equal(ranking.rows, expected.rows)
    assert np.array_equal(ranking.scores, expected.scores)
    if keep == "global":
        with pytest.raises(StepError, match=r"rerank needs local descriptors, and .*_raw_global keeps no local desc"):
            indexed(step, references, "reference-data", rerank=3, tag="tokens")
    else:
        better = indexed(step, references, "reference-data", rerank=3, tokens=AGGREGATED, rotations=4, tag="tokens")
        query, gallery, found, *_ = judged(better)
        assert len(found.rows) == len(query) == 2 * len(gallery)
        assert imatch.steps.index_stages(better)[-1]["stage"] == f"3 by {AGGREGATED} tokens"
        assert imatch.steps.index_stages(better)[-1]["hit_at_1"]["value"] >= 0.5
    if keep in store.KEEPS_PLACED:
        assert matched(index, outputs=["json"])[1]
    else:
        with pytest.raises(StepError, match=r"04_match needs .* with positions, .* with storage.keep float16 or int8"):
            matched(index)
        with pytest.raises(StepError, match=f"keeps {KEEPS[keep]}"):
            matched(index, pairs="all", embed_step=str(step.folder))


def test_aggregated_tokens_rank_as_those_that_are_made_from_all(stores):
    """03_index scores by the same 64 tokens, whether 01_embed kept them or all that they are made from."""
    tokens = {}
    for keep in ("float16", "aggregated"):
        step = stores["sift", keep]
        index = indexed(step, referenced(step)[1], "reference-data", rerank=3, tokens=AGGREGATED, tag="tokens")
        judged(index)
        tokens[keep] = np.load(index.folder / "tokens" / "00000.npy").astype(np.float32)
    assert tokens["float16"].shape == tokens["aggregated"].shape == (4, AGGREGATED, 128)
    assert np.abs(tokens["float16"] - tokens["aggregated"]).max() < 2e-3


def test_more_tokens_than_are_kept_are_refused(stores):
    with pytest.raises(StepError, match=r"ranking.tokens is 65, and .*_raw_aggregated keeps 64 .*: set it to 64"):
        indexed(stores["dsift", "aggregated"], None, "data-data", rerank=3, tokens=AGGREGATED + 1)


def test_queries_in_full_search_a_gallery_that_keeps_less(stores, few_photographs, tmp_path):
    """Vectors are the same whatever is kept beside them; a match wants both sides."""
    gallery = stores["dsift", "aggregated"]
    queries = embedded(few_photographs, tmp_path, weight="dsift", resize=SQUARE, tag="query")
    index, query, _, ranking = searched(gallery, queries, "reference-data", rerank=2)
    assert ranking.rows[:, 0].tolist() == [*range(len(query))]
    with pytest.raises(StepError, match=r"04_match needs local .*_raw_aggregated keeps"):
        matched(index)


@pytest.mark.parametrize("keep", ["aggregated", "global"])
def test_files_for_each_photograph_that_need_more_are_refused(stores, keep):
    step = stores["dsift", keep]
    for output in ("patch.npy", "grid.json", "denseft.png"):
        with pytest.raises(StepError, match=r"needs local descriptors with positions, .*run 01_embed"):
            imatch.export_per_image(Stored(step.folder), ["global.npy", output])
    assert not (step.folder.parents[3] / "per_image").exists()
    assert imatch.export_per_image(Stored(step.folder), ["global.npy"]) == 2 * 4


def test_files_for_each_photograph_of_int8(stores):
    step = stores["dsift", "int8"]
    assert imatch.export_per_image(Stored(step.folder), ["grid.npy", "denseft.png"]) == 4 * 4
    path = next(step.folder.parents[3].rglob("PatchGrid*_b.npy"))
    assert path.name == "PatchGrid_res160-int8_raw_dsift_NONE_few_b.npy"
    embeddings = Stored(step.folder)
    assert np.array_equal(np.load(path), embeddings.tokens(embeddings.ids.index("b.png")).as_grid())


@pytest.mark.parametrize(("keep", "said"), [("aggregated", "only aggregated tokens"), ("global", "no local desc")])
def test_pictures_say_what_is_missing(stores, few_photographs, keep, said):
    embeddings = Stored(stores["dsift", keep].folder)
    for draw in (figures.descriptors, figures.denseft):
        assert said in draw(embeddings, few_photographs)


@pytest.mark.parametrize("keep", LESS)
def test_the_notebook_runs_to_its_end(keep, few_photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EXPORT_ROOT", str(tmp_path))
    given = {"dataset": str(few_photographs), "weight": "dsift", "storage": {"keep": keep}, "compute": {"workers": 0}}
    folder = cells.execute("01_embed", **given)["step"].folder
    assert (folder / "metrics.json").is_file()
    assert folder.name == f"scale1_raw_{keep}"
    drawn = {"descriptors.png", "denseft.png"} if keep in store.KEEPS_PLACED else set()
    assert {path.name for path in folder.glob("*.png")} == {"similarity.png", *drawn}
    assert drawn or "No DenseFT: " in capsys.readouterr().out


# --- what it costs in quality


@pytest.mark.parametrize("weight", ["sift", "dsift"])
def test_int8_finds_the_inliers_of_float16(weight, demo_photographs, tmp_path):
    """Verified inliers of real photographs against their references, summed over all pairs: within 5 %."""
    few, inliers = tmp_path / "few", {}
    few.mkdir()
    for path in sorted(demo_photographs.iterdir())[::3]:
        shutil.copy(path, few)
    for keep in ("float16", "int8"):  # int8 is made from the float16 beside it
        data = embedded(few, tmp_path, weight=weight, resize=imatch.Resize(scale=0.5), keep=keep)
        _, references = referenced(data, angles=(0, 10), crops=(0.75,))
        index, *_ = searched(data, references, "reference-data")
        _, pairs, _ = matched(index, candidates=1, outputs=[])
        inliers[keep] = sum(row["inliers"] for row in pairs if row["verified"] and row["right"])
    print(weight, inliers)
    assert inliers["float16"] > 300
    assert inliers["int8"] == pytest.approx(inliers["float16"], rel=0.05)


def test_a_grid_of_one_descriptor_survives(tmp_path):
    tokens = Tokens(np.ones(2, np.float32), np.array([[3, -4]], np.float32), grid_xy((1, 1), (16, 16)), (1, 1))
    for shard, keep in enumerate(KEEPS):
        store.write_kept_shard(
            tmp_path, shard, [{"id": f"{shard}.jpg", "size": (16, 16), "sha256": ""}], [tokens], keep
        )
    Shards(tmp_path).merge()
    embeddings = Stored(tmp_path)
    found = [embeddings.tokens(row).descriptors for row in range(len(KEEPS))]
    assert [one.shape for one in found] == [(1, 2), (1, 2), (1, 2), (0, 2)]
    assert found[1] == pytest.approx(np.array([[3, -4]]), abs=4 / 254)
    assert found[2] == pytest.approx(np.array([[0.6, -0.8]]), abs=1e-3)
