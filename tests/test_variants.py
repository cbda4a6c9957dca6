"""Sizes, variants, devices and poolings through the steps: what is embedded, and what may be compared with what."""

import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

import imatch
from imatch.core import compute, settings
from imatch.core.files import read_json
from imatch.core.step import open_step
from imatch.core.types import ImatchError, StepError
from imatch.data import store
from imatch.data.images import Resize
from imatch.features.dinov3 import Dinov3
from imatch.steps import checks
from imatch.steps.references import start_reference_tokens, start_references
from tests import grouped
from tests.grouped import by
from tests.test_steps import indexed

TORCH = {"precision": "fp32", "engine_forward": "torch"}


@pytest.fixture
def start(few_photographs, tmp_path):
    """Start 01_embed on four small photographs."""

    def start(weight="dsift", resize=None, **options):
        chosen = {"exports": str(tmp_path / "exports"), "run": "r", "backbone_options": {}, "shard_size": 2, "tag": ""}
        chosen |= {"resize": resize or Resize("stretch", long_side=96), "on_change": "refuse"} | options
        return grouped.start_embed(str(few_photographs), weight=weight, **chosen)

    return start


@pytest.fixture
def dinov3(start, weights):
    """The same by a network of random weights."""

    def begin(weight="vits16", **options):
        chosen = {"backbone_options": TORCH, "data_key": str(weights / "data_key.json")} | options
        return start(weight, **chosen)

    return begin


def embedded(step, max_skipped=0.05, **options):
    embeddings = imatch.steps.embed(step, by(workers=0, **options), max_skipped=max_skipped)
    imatch.steps.finish_embed(step, embeddings)
    return embeddings


def files(folder):
    kept = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".npy", ".jsonl"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in kept if path.name != "seen.jsonl"}


# --- sizes


def test_stretch_is_a_square_whatever_the_aspect(start):
    step = start()
    assert step.folder.name == "res96_raw"
    embeddings = embedded(step)
    assert {tuple(row["grid"]) for row in embeddings.rows} == {(6, 6)}
    row = embeddings.ids.index("a.png")  # 128 x 96: its patches are 21.3 x 16 pixels
    assert np.allclose(embeddings.tokens(row).xy[[0, 1, 6]], [[10.167, 7.5], [31.5, 7.5], [10.167, 23.5]], atol=1e-3)


def test_crop_sees_the_middle_and_says_where(start):
    embeddings = embedded(start(resize=Resize("crop", long_side=96)))
    wide, tall = (embeddings.tokens(embeddings.ids.index(id)) for id in ("a.png", "b.png"))
    assert wide.grid == tall.grid == (6, 6)
    assert np.allclose(wide.xy[[0, -1]], [[23.5, 7.5], [103.5, 87.5]])  # of 128 x 96: 16 pixels are cut off each side
    assert np.allclose(tall.xy[[0, -1]], [[7.5, 23.5], [87.5, 103.5]])


def test_crop_shows_the_pixels_that_it_says(tmp_path):
    """EXIF-turned JPEGs are cropped and decoded at reduced size before they are turned: the middle stays the middle."""
    from imatch.data.images import decode

    y, x = np.mgrid[:1200, :1800]
    pixels = np.stack([x * 255 / 1799, y * 255 / 1199, 0 * x], axis=2).round().astype(np.uint8)
    for orientation, transpose in ((1, None), (6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)):
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        exif[274] = orientation
        stored = image if transpose is None else image.transpose(transpose)
        stored.save(tmp_path / "a.jpg", quality=98, exif=exif)
        seen = decode(tmp_path / "a.jpg", Resize("crop", long_side=128), 16)
        assert seen.size == (1200, 1800)
        assert seen.box == (300.0, 0.0, 1500.0, 1200.0)
        xy = seen.to_original(np.array([[0, 0], [127, 127], [64, 20]], np.float32))
        wanted = np.column_stack([xy[:, 0] * 255 / 1799, xy[:, 1] * 255 / 1199])
        got = seen.pixels[[0, 127, 20], [0, 127, 64], :2]
        assert np.abs(got - wanted).max() < 2.5, orientation


def test_a_size_that_is_no_multiple_of_the_patch_is_refused(dinov3):
    with pytest.raises(ImatchError, match="long_side 518 is not a multiple of patch 16: use 512 or 528"):
        dinov3(resize=Resize("stretch", long_side=518))


# --- variants


@pytest.mark.parametrize("variant", ["sub1", "sub", "sub-2", "half", "sub0"])
def test_unknown_variants_are_refused(start, variant):
    with pytest.raises(ImatchError, match=f"variant '{variant}' is not known: use raw, or sub2"):
        start(variant=variant)


def test_keypoints_have_no_variant(start):
    with pytest.raises(ImatchError, match="keypoints lie on no grid"):
        embedded(start("sift", variant="sub2"))


def test_sub_is_every_second_row_and_column_of_raw(start):
    raw, sub = embedded(start()), embedded(start(variant="sub2"))
    assert np.array_equal(raw.vectors, sub.vectors)
    for i in range(len(raw)):
        all_of_it, thin = raw.tokens(i), sub.tokens(i)
        assert thin.grid == (3, 3)
        assert np.array_equal(thin.as_grid(), all_of_it.as_grid()[::2, ::2])
        assert np.array_equal(thin.xy.reshape(3, 3, 2), all_of_it.xy.reshape(6, 6, 2)[::2, ::2])


@pytest.mark.parametrize("mode", ["stretch", "crop"])
def test_sub_takes_its_tokens_from_raw_without_another_pass(dinov3, monkeypatch, tmp_path, mode):
    resize = Resize(mode, long_side=96)
    alone = embedded(dinov3(resize=resize, variant="sub2", exports=str(tmp_path / "alone")))
    embedded(dinov3(resize=resize))
    passes = []
    features = Dinov3.features
    monkeypatch.setattr(Dinov3, "features", lambda self, x: passes.append(len(x)) or features(self, x))
    beside = embedded(dinov3(resize=resize, variant="sub2"))
    assert not passes
    assert files(beside.folder) == files(alone.folder)


def test_sub_computes_what_raw_does_not_hold(dinov3, few_photographs, tmp_path):
    """A photograph that changed since raw was made is embedded again, and only its shard."""
    import shutil

    photographs = shutil.copytree(few_photographs, tmp_path / "few")
    step = grouped.start_embed(str(photographs), **options(dinov3()))
    embedded(step)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)).save(photographs / "a.png")
    sub = embedded(grouped.start_embed(str(photographs), **options(dinov3()) | {"variant": "sub2"}))
    alone = options(dinov3()) | {"variant": "sub2", "exports": str(tmp_path / "alone")}
    assert files(sub.folder) == files(embedded(grouped.start_embed(str(photographs), **alone)).folder)


def options(step):
    """What `start_embed` was given to make a step like this one, in a run of its own."""
    parameters = step.parameters
    return {
        "weight": parameters["weight"],
        "backbone_options": parameters["backbone"],
        "resize": Resize(**parameters["resize"]),
        "shard_size": parameters["shard_size"],
        "exports": str(step.folder.parents[4]),
        "run": "other",
        "tag": "",
        "on_change": "refuse",
    }


# --- devices


def test_several_devices_write_the_bytes_of_one(dinov3, tmp_path):
    one = embedded(dinov3(exports=str(tmp_path / "one")), devices="cpu")
    step = dinov3(shard_size=1, exports=str(tmp_path / "other"))
    apart = dinov3(shard_size=1, exports=str(tmp_path / "apart"))
    two = embedded(step, devices="cpu,cpu")
    assert files(two.folder) == files(embedded(apart, devices="cpu").folder)
    assert read_json(step.folder / "step.json")["device"] == "cpu,cpu"
    assert np.allclose(one.vectors, two.vectors, atol=1e-5)


@pytest.fixture
def some_broken(weights, tmp_path):
    """Starts 01_embed on eight photographs, two of them truncated, one photograph a shard."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
    for i in (4, 7):  # one for each of two devices
        (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:5000])
    given = {"data_key": str(weights / "data_key.json"), "exports": str(tmp_path / "e"), "run": "r", "tag": ""}
    given |= {"resize": Resize("stretch", long_side=64), "on_change": "refuse"}
    return lambda weight, options: grouped.start_embed(
        str(folder), weight=weight, backbone_options=options, shard_size=1, **given
    )


def test_bad_photographs_stop_several_devices_as_they_stop_one(some_broken):
    step = some_broken("dsift", {})
    with pytest.raises(ImatchError, match=r"(4|7)\.png: .* \(on_error is stop"):
        imatch.steps.embed(step, resources=by(devices="cpu,cpu", workers=0), on_error="stop")
    for devices in ("cpu,cpu", "cpu"):
        with pytest.raises(ImatchError, match="2 of 8 photographs cannot be used, more than max_skipped"):
            imatch.steps.embed(step, resources=by(devices=devices, workers=0))
    with pytest.warns(imatch.core.types.ImatchWarning, match="2 of 8 photographs were skipped"):
        embeddings = imatch.steps.embed(step, resources=by(devices="cpu,cpu", workers=0), max_skipped=0.5)
    assert embeddings.ids == [f"{i}.png" for i in (0, 1, 2, 3, 5, 6)]


def test_a_killed_run_leaves_no_process_behind(some_broken):
    """Each device's process sees between shards that the one above it is gone."""
    step = some_broken("vits16", TORCH)
    code = (
        "import sys; from pathlib import Path; import imatch; from imatch.core.step import open_step\n"
        "import multiprocessing, threading, os, time, signal\n"
        "step = open_step(Path(sys.argv[1]), finished=False)\n"
        "def kill():\n"
        "    while not list((step.folder / 'local').glob('*.jsonl')): time.sleep(0.05)\n"
        "    print('pids', *[p.pid for p in multiprocessing.active_children()], file=sys.stderr, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=kill).start()\n"
        "imatch.steps.embed(step, imatch.ComputeOptions(devices='cpu,cpu', workers=0), max_skipped=1.0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(step.folder)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("pids")]
    children = [int(pid) for pid in told.split()[1:]]
    assert len(children) == 2
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in children)
    with pytest.warns(imatch.core.types.ImatchWarning):
        assert len(imatch.steps.embed(step, resources=by(workers=0), max_skipped=1.0)) == 6


def test_weights_that_give_no_numbers_end_the_run(dinov3, monkeypatch, tmp_path):
    from tests import random_weights

    state = random_weights.state("dinov3_vits16")
    state["norm.weight"][0] = float("nan")
    path = random_weights.save(state, tmp_path, "dinov3_vits16_pretrain_lvd1689m")
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    with pytest.raises(ImatchError, match="numbers are not finite: its weights are broken"):
        embedded(
            dinov3(backbone_options=TORCH | {"filename": path.name, "hub_entry": "dinov3_vits16", "family": "LVD"})
        )


def test_a_device_that_is_not_there_is_named(dinov3, start):
    for devices in ("cpu,cuda:9", "cuda:9"):
        with pytest.raises(ImatchError, match="cuda:9 is not there"):
            imatch.steps.embed(dinov3(), resources=by(devices=devices, workers=0))
        with pytest.raises(ImatchError, match="cuda:9 is not there"):
            imatch.steps.preflight(dinov3(), resources=by(devices=devices, batch_size=1))
    with pytest.raises(ImatchError, match="sift runs on the CPU, not on cuda"):
        imatch.steps.embed(start("sift"), resources=by(devices="cuda", workers=0))


# --- what belongs together


def test_references_come_from_the_same_backbone_and_weights(dinov3, monkeypatch, tmp_path):
    data = dinov3()
    embedded(data)
    views = start_references(
        str(data.folder),
        kind="isometric",
        angles=[0, 90],
        crops=[1.0],
        resize_to_original=False,
        file_type="jpg",
        quality=95,
        tag="",
        on_change="refuse",
    )
    imatch.steps.make_references(views, resources=by(workers=0))
    tokens = start_reference_tokens(views)
    assert tokens.parameters == data.parameters
    # another file under the same name: 01 was made by the first
    other = tmp_path / "other"
    other.mkdir()
    from tests import random_weights

    state = random_weights.state("dinov3_vits16", seed=99)
    random_weights.save(state, other, "x").rename(other / "model.pth")
    monkeypatch.setenv("WEIGHTS_ROOT", str(other))
    tokens.parameters["backbone"]["filename"] = "model.pth"
    with pytest.raises(StepError, match="the weights of vits16 have changed since 01_embed"):
        imatch.steps.embed(tokens, resources=by(workers=0))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"backbone_options": TORCH | {"pooling": "mean"}}, 'backbone.pooling: "cls" -> "mean"'),
        ({"weight": "cxTiny"}, 'backbone.hub_entry: "dinov3_vits16" -> "dinov3_convnext_tiny"'),
        ({"resize": Resize("stretch", long_side=64)}, "resize.long_side: 96 -> 64"),
        ({"backbone_options": TORCH | {"family": "SAT"}}, 'backbone.family: "LVD" -> "SAT"'),
        ({"backbone_options": TORCH | {"precision": "bf16"}}, 'backbone.precision: "fp32" -> "bf16"'),
    ],
)
def test_an_index_refuses_vectors_made_otherwise(dinov3, other, difference):
    data, queries = dinov3(), dinov3(**other | {"tag": "query"})
    for step in (data, queries):
        embedded(step)
    with pytest.raises(StepError, match="cannot be compared") as raised:
        index(data, queries)
    assert difference in str(raised.value)


def index(data, other):
    return indexed(data, other, "reference-data", k=3)


def test_queries_of_another_embed_search_the_photographs(dinov3):
    data, queries = dinov3(), dinov3(image_groups=[{"folder": "flight 1"}], tag="query")
    embedded(data)
    assert embedded(queries).ids == ["flight 1/d.png"]
    step = index(data, queries)
    assert step.folder.name == "reference-data_few-res96_raw_query"
    query, gallery = imatch.steps.open_embeddings(step)
    hits = imatch.steps.search(step, imatch.steps.build_index(step, gallery), query, gallery)
    assert gallery.ids[hits.rows[0, 0]] == "flight 1/d.png"
    assert hits.scores[0, 0] == pytest.approx(1, abs=1e-5)


def test_image_groups_are_part_of_what_was_asked(dinov3):
    embedded(dinov3(image_groups=[{"folder": "flight 1"}]))
    with pytest.raises(StepError, match="image_groups"):
        dinov3()


# --- preflight


def test_preflight_tells_and_refuses_what_cannot_fit(dinov3, capsys, monkeypatch):
    step = dinov3()
    imatch.steps.preflight(step, resources=by(batch_size=8))
    said = capsys.readouterr().out
    for part in (
        "photographs  4 in",
        "SHA-256",
        "21.6 million parameters, normalises as LVD",
        "GFLOP a photograph",
        "disk",
    ):
        assert part in said
    one = checks.cost("dinov3_vits16", (96, 96))
    with monkeypatch.context() as small:
        small.setattr(compute, "free_memory", lambda _: one.weights + int(2.5 * one.working))
        imatch.steps.preflight(step, resources=by(batch_size=8))
        assert "0.08 GB of 0.08 GB free on cpu (fp32, batches of 2)" in capsys.readouterr().out
        small.setattr(compute, "free_memory", lambda _: one.weights - 1)
        with pytest.raises(ImatchError, match="use a smaller model or size, or precision bf16"):
            imatch.steps.preflight(step, resources=by(batch_size=1))
        by_openvino = dinov3(backbone_options={"precision": "fp32", "engine_forward": "openvino"}, tag="openvino")
        small.setattr(compute, "free_memory", lambda _: 4 * one.weights)
        with pytest.raises(ImatchError, match="use a smaller model or size, or engine_forward torch"):
            imatch.steps.preflight(by_openvino, resources=by(batch_size=1))
    with monkeypatch.context() as full:
        full.setattr(checks.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(ImatchError, match=r"the result takes .* choose another disk for exports"):
            imatch.steps.preflight(step, resources=by(batch_size=8))
    embedded(step)
    capsys.readouterr()
    imatch.steps.preflight(step, resources=by(batch_size=8))
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("keep", store.KEEPS)
def test_preflight_tells_disk_by_what_is_kept_and_hours(dinov3, capsys, keep):
    step = dinov3(keep=keep)
    imatch.steps.preflight(step, resources=by(batch_size=8))
    said = capsys.readouterr().out
    assert re.search(r"time +about .* h here \(forward .* ms and decoding .* ms a photograph\), .* with 64 such", said)
    assert f"stored is {store.KEEPS[keep]}\n" in said
    promised = 2**20 * float(re.search(r"disk +([\d.]+) MB a photograph", said)[1])
    embedded(step)
    kept = [path for path in step.folder.rglob("*") if path.suffix in (".npy", ".jsonl")]
    headers = 128 * sum(path.suffix == ".npy" for path in kept)
    taken = (sum(path.stat().st_size for path in kept) - headers) / 4
    assert taken == pytest.approx(promised, rel=0.1)


def test_hours_here_are_of_the_network_and_of_the_decoding(monkeypatch):
    """A GPU leaves the cores to the decoding; without one both are done by them."""
    monkeypatch.setattr(settings, "cores", lambda: 2)
    million = checks._time(1_000_000, 0.36, 0.072, ["cpu"])
    assert million.startswith("about 110 h here (forward 360 ms and decoding 36 ms a photograph), 14 h with 8, ")
    assert checks._time(1_000_000, 0.36, 0.072, ["cuda:0"]).startswith("about 100 h here")
    assert checks._time(1_000_000, 0.001, 0.072, ["cuda:0"]).startswith("about 10 h here")


@pytest.mark.parametrize(("key", "entry"), [("vits16", "dinov3_vits16"), ("cxTiny", "dinov3_convnext_tiny")])
def test_preflight_knows_the_memory_that_a_pass_takes(weights, key, entry):
    """The estimate holds what torch really allocates, and not ten times as much."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from imatch.features import base
    from imatch.steps.checks import cost

    backbone = base.create_backbone(key, TORCH, data_key=str(weights / "data_key.json"))
    photographs = torch.zeros(4, 256, 256, 3, dtype=torch.uint8)
    backbone.features(photographs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        backbone.features(photographs)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in events])
    estimate = 4 * cost(entry, (256, 256)).working
    assert 0.8 < estimate / held.max() < 4


def test_a_large_photograph_among_small_ones_is_not_what_a_run_is_told_by(weights, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (64, 64)).save(folder / f"{i}.png")
    Image.new("RGB", (640, 480)).save(folder / "large.png")
    given = {"data_key": str(weights / "data_key.json"), "exports": str(tmp_path / "e"), "run": "r", "tag": ""}
    given |= {"backbone_options": {}, "resize": Resize("scale"), "on_change": "refuse", "shard_size": 64}
    step = grouped.start_embed(str(folder), weight="vits16", **given)
    imatch.steps.preflight(step, resources=by(batch_size=8))
    said = capsys.readouterr().out
    assert "photograph of 64 x 64" in said
    assert "batches of 8" in said
    assert "disk         0.10 MB a photograph" in said  # (9 x 16 + 1200) tokens of 384 numbers, by ten


def test_runs_records_what_was_asked(dinov3):
    parameters = open_step(embedded(dinov3(variant="sub2", cfg="own")).folder).parameters
    assert parameters["backbone"]["pooling"] == "cls"
    assert parameters["backbone"]["family"] == "LVD"
    assert (parameters["cfg"], parameters["variant"]) == ("own", "sub2")


def test_a_run_that_was_refused_before_it_began_blocks_no_other(start):
    """Frames that are not there: the corrected request needs no permission to recompute what was never computed."""
    with pytest.raises(ImatchError):
        imatch.steps.embed(start(image_groups=[{"folder": "flight 1", "indices": [77]}]), resources=by(workers=0))
    assert len(embedded(start(image_groups=[{"folder": "flight 1"}]))) == 1


def test_spacing_knows_crops_and_variants(start):
    """What half a patch is, in pixels of the photograph."""
    crop = Resize("crop", long_side=64)
    assert embedded(start(resize=crop)).tokens(0).spacing == (24.0, 24.0)  # 96 of 128 x 96 pixels on 64
    assert embedded(start(resize=crop, variant="sub3")).tokens(0).spacing == (72.0, 72.0)
