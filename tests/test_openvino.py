"""OpenVINO's forward pass of DINOv3 on the CPU, against torch's, with random weights."""

import importlib.metadata
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import imatch
from imatch.core import settings
from imatch.core.step import open_step
from imatch.core.types import ImatchError
from imatch.data.images import Resize
from imatch.features import base, dinov3, openvino
from imatch.features.dinov3 import Dinov3
from tests import grouped, random_weights
from tests.grouped import by

if not openvino.installed():  # not importorskip, whose import would send usage data to Intel
    pytest.skip("no openvino: pip install -c constraints.txt -e '.[openvino]'", allow_module_level=True)

IN_BF16 = dinov3.computes_in_bf16("cpu")
KEYS = ("vits16", "cxTiny")


@pytest.fixture
def create(weights):
    """Backbones on the CPU by the keys of the registry that names the random files."""

    def make(key, engine="openvino", **options):
        given = {"engine_forward": engine, "precision": "fp32", **options}
        return base.create_backbone(key, given, data_key=str(weights / "data_key.json"), device="cpu")

    return make


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A cache folder that remembers nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "imatch" / "openvino"


def textured(h, w, n=2):
    return np.concatenate([openvino.texture(h, w)[:, ::-1, ::s] for s in (1, -1)][:n])


def tokens(backbone, photographs):
    """(B, m, D): every token after the last norm."""
    return backbone.tokens(backbone.normalised(torch.from_numpy(photographs.copy())))[1]


@pytest.mark.parametrize("size", [(64, 160), (128, 96)], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("key", KEYS)
def test_tokens_are_those_of_torch(create, key, precision, size):
    photographs = textured(*size)
    exact, ours = create(key, "torch"), create(key, precision=precision)
    cosine = torch.nn.functional.cosine_similarity(tokens(exact, photographs), tokens(ours, photographs), dim=-1)
    assert cosine.min() >= (0.999999 if precision == "fp32" else 0.999)
    a, b = (backbone.features(torch.from_numpy(photographs.copy())) for backbone in (exact, ours))
    for name in ("cls", "registers", "grid", "before"):
        one, other = getattr(a, name), getattr(b, name)
        assert one.shape == other.shape
        assert other.dtype == torch.float32
        if one.numel():
            assert (one - other).norm() <= (1e-4 if precision == "fp32" else 0.02) * one.norm()


def test_the_rotary_table_is_timms(create):
    rope = create("vits16", "torch").model.rope
    for h, w in ((4, 6), (7, 3), (1, 1)):
        ours = openvino.rotary(rope.periods.numpy(), 5, h, w)[0, 0]
        assert np.allclose(ours[5:], rope.get_embed((h, w)).numpy(), atol=1e-6)
        sines, cosines = np.split(ours[:5], 2, axis=1)
        assert not sines.any()
        assert (cosines == 1).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_rotation_is_one_operation(create, precision):
    """OpenVINO fuses it only as long as it knows the words: those of timm it does not."""
    backbone = create("vits16", precision=precision)
    done = [
        one.get_rt_info()["layerType"].astype(str)
        for one in backbone.openvino.compiled(2).get_runtime_model().get_ops()
    ]
    assert done.count("RoPE") == 2 * len(create("vits16", "torch").model.blocks)


@pytest.mark.parametrize("key", KEYS)
def test_the_same_bytes_twice_and_in_any_batch(create, key):
    photographs, other = textured(96, 128), textured(64, 64)
    backbone = create(key, precision="bf16" if IN_BF16 else "fp32")
    first = backbone(photographs)
    backbone(other)  # another shape in between
    again = create(key, precision=backbone.precision)(photographs)
    for one, same, second, photograph in zip(first, backbone(photographs), again, photographs, strict=True):
        assert one.descriptors.tobytes() == same.descriptors.tobytes() == second.descriptors.tobytes()
        assert one.vector.tobytes() == same.vector.tobytes() == second.vector.tobytes()
        (alone,) = backbone(photograph[None])
        assert alone.vector @ one.vector >= 0.9999
        assert np.allclose(alone.descriptors, one.descriptors, atol=0.1 if IN_BF16 else 2e-2)


def test_a_few_photographs_run_on_all_threads(create, monkeypatch):
    """One of a batch of 1, 2 or 3 would have half of them; larger batches are halved."""
    forward, parts = create("vits16").openvino, []
    made = forward.compiled
    monkeypatch.setitem(vars(forward), "compiled", lambda n: parts.append(n) or made(n))
    for n in (1, 2, 3, 4, 5):
        x = torch.zeros(n, 3, 32, 48)
        assert [len(tokens) for tokens in forward(x)] == [n, n]
    assert parts == [1, 1, 1, 2, 2]


# --- what "auto" becomes


def test_auto_is_openvino_for_vits(create):
    for precision in ("auto", "fp32", "bf16"):
        assert create("vits16", "auto", precision=precision).engine_forward == "openvino"
        assert create("vits16", "auto", precision=precision, compile=True).engine_forward == "torch"
        assert create("cxTiny", "auto", precision=precision).engine_forward == "torch"


def test_auto_leaves_large_weights_to_torch(create, monkeypatch):
    """Converting and compiling takes several times their memory."""
    monkeypatch.setattr(openvino, "KEPT", 10**7)
    assert create("vits16", "auto").engine_forward == "torch"
    monkeypatch.setattr(openvino, "KEPT", 10**8)  # the file is smaller, and in fp32 it is, too
    assert create("vits16", "auto").engine_forward == "openvino"
    monkeypatch.setattr(Dinov3, "bytes", 10**8 + 1)
    assert create("vits16", "auto").engine_forward == "torch"


def test_auto_is_torch_where_openvino_is_missing(create, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert create("vits16", "auto", precision="bf16").engine_forward == "torch"


@pytest.mark.usefixtures("measured")
def test_auto_is_torch_where_the_tokens_are_others(create, monkeypatch):
    """No cosine reaches what is asked for here."""
    monkeypatch.setattr(openvino, "ENOUGH", 1.1)
    assert create("vits16", "auto", precision="bf16").engine_forward == "torch"
    with pytest.raises(
        ImatchError, match=r"their lowest cosine is (0\.99\d+|1\.0000), less than 1\.1: use engine_forward torch"
    ):
        create("vits16", precision="bf16")(textured(32, 32))


def test_agreement_notices_another_model(create, measured):
    """What is kept as the converted model is another one's: the tokens are far from torch's."""
    backbone = create("vits16", "torch")
    good = openvino.agreement(backbone)
    assert good > 0.999999
    (kept,) = (path for path in measured.iterdir() if path.is_dir())
    weights = np.fromfile(kept / "model.bin", np.float32)
    weights[len(weights) // 2 :] *= 0.9
    weights.tofile(kept / "model.bin")
    assert openvino.agreement(backbone) == good  # remembered
    (memory,) = measured.glob("*.json")
    memory.write_text("{ torn")
    assert openvino.agreement(backbone) < openvino.ENOUGH
    with pytest.raises(ImatchError, match=r"tokens of dinov3_vits16_.*\.pth in fp32 are not torch"):
        create("vits16").features(torch.from_numpy(textured(32, 32)))


@pytest.mark.usefixtures("measured")
def test_broken_weights_agree_with_nothing(create, monkeypatch, tmp_path):
    state = random_weights.state("dinov3_vits16")
    state["norm.weight"][0] = float("nan")
    path = random_weights.save(state, tmp_path, "dinov3_vits16_pretrain_lvd1689m")
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    given = {"filename": path.name, "hub_entry": "dinov3_vits16", "family": "LVD", "precision": "bf16"}
    assert create("vits16", "auto", **given).engine_forward == "torch"


def test_agreement_is_remembered_for_each_precision(create, measured):
    for precision in ("fp32", "bf16"):
        openvino.agreement(create("vits16", "torch", precision=precision))
    (memory,) = measured.glob("*.json")
    known = json.loads(memory.read_text())
    assert sorted(key.split()[0] for key in known) == ["bf16", "fp32"]
    assert memory.name.endswith(f"@{importlib.metadata.version('openvino')}-{openvino.FORM}.json")
    memory.write_text(json.dumps(dict.fromkeys(known, 0.5)))
    assert create("vits16", "auto", precision="bf16").engine_forward == "torch"


@pytest.mark.usefixtures("weights")
def test_making_a_backbone_needs_no_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path / "nowhere"))
    given = ("dinov3_vits16", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "LVD")
    assert Dinov3(*given, precision="bf16", device="cpu").engine_forward == "torch"
    made = Dinov3(*given, engine_forward="openvino")
    assert made.device == "cpu"
    with pytest.raises(ImatchError, match="no weights folder"):
        _ = made.openvino


def test_identity_makes_the_same_backbone_and_measures_nothing(create, measured):
    for engine in ("torch", "openvino"):
        made = create("vits16", engine, precision="bf16")
        identity = base.backbone_identity(made)
        assert identity["engine_forward"] == engine
        assert base.create_backbone("vits16", identity, data_key="nowhere.json", device="cpu") == made
        assert pickle.loads(pickle.dumps(made)) == made
    assert not measured.exists()


def test_a_used_backbone_can_go_to_another_process(create):
    backbone, photographs = create("vits16"), textured(32, 48)
    first = backbone(photographs)
    again = pickle.loads(pickle.dumps(backbone))
    assert again(photographs)[0].descriptors.tobytes() == first[0].descriptors.tobytes()


def test_a_model_is_converted_once(create, measured):
    first = create("vits16")(textured(32, 48))
    (kept,) = (path for path in measured.iterdir() if path.is_dir())
    made = (kept / "model.bin").stat().st_mtime_ns
    again = create("vits16")
    assert again(textured(32, 48))[0].descriptors.tobytes() == first[0].descriptors.tobytes()
    assert (kept / "model.bin").stat().st_mtime_ns == made
    assert "model" not in vars(again)  # torch's was not even loaded
    old = kept.with_name(f"{kept.name.partition('@')[0]}@2020.1.0")
    old.mkdir()
    kept.rename(kept.with_name("elsewhere"))
    create("vits16")(textured(32, 48))
    assert kept.is_dir()
    assert not old.exists()


def test_a_cache_that_cannot_be_written_to_is_done_without(create, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert create("vits16")(textured(32, 48))[0].grid == (2, 3)


# --- around it


def test_the_step_records_it(weights, few_photographs, tmp_path):
    def run(engine, name, workers=0):
        step = grouped.start_embed(
            str(few_photographs),
            data_key=str(weights / "data_key.json"),
            exports=str(tmp_path),
            run=name,
            weight="vits16",
            backbone_options={"engine_forward": engine, "precision": "bf16"},
            resize=Resize("long_side", long_side=96),
            shard_size=8,
            tag="",
            on_change="refuse",
        )
        embeddings = imatch.steps.embed(step, resources=by(devices="cpu", workers=workers))
        imatch.steps.finish_embed(step, embeddings)
        return step, embeddings

    step, ours = run("openvino", "ours")
    assert open_step(step.folder).parameters["backbone"]["engine_forward"] == "openvino"
    _, theirs = run("torch", "theirs")
    assert ours.ids == theirs.ids
    assert (np.asarray(ours.vectors) * np.asarray(theirs.vectors)).sum(axis=1).min() >= 0.999
    assert ours.vectors.tobytes() != theirs.vectors.tobytes()
    if IN_BF16:
        chosen, _ = run("auto", "auto", workers=2)  # forked from a process in which OpenVINO has threads
        assert open_step(chosen.folder).parameters == open_step(step.folder).parameters


def test_a_missing_package_names_the_extra(create, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImatchError, match=r"openvino, which is not installed: pip install .* -e '\.\[openvino\]'"):
        create("vits16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "hub"}, "wants source timm, got hub: change it, or use engine_forward torch"),
        ({"compile": True}, "wants compile False, got True"),
        ({"engine_forward": "opnvino"}, "engine_forward must be 'auto', 'torch' or 'openvino', got 'opnvino'"),
    ],
)
def test_what_it_cannot_do_is_refused(create, options, message):
    with pytest.raises(ImatchError, match=message):
        create("vits16", **options)


def test_it_takes_as_many_threads_as_torch_has(create):
    before = torch.get_num_threads()
    try:
        for threads in (1, before):
            torch.set_num_threads(threads)
            assert create("vits16").openvino.compiled(2).get_property("INFERENCE_NUM_THREADS") == threads
    finally:
        torch.set_num_threads(before)


def test_signals_arrive_when_models_have_come_and_gone(weights):
    code = (
        "import os, signal; from imatch.features import openvino; from imatch.features.base import create_backbone\n"
        "given = {'engine_forward': 'openvino', 'precision': 'fp32'}\n"
        f"made = create_backbone('vits16', given, data_key={str(weights / 'data_key.json')!r})\n"
        "one = openvino.forward(made); other = openvino.forward(made); del one; del other\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('arrived')); os.kill(os.getpid(), signal.SIGUSR1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "arrived\n"), done.stderr


def test_neither_imatch_nor_torch_forward_imports_it(weights):
    code = (
        "import sys, imatch; from imatch.features.base import create_backbone\n"
        "given = {'engine_forward': 'torch'}\n"
        f"made = create_backbone('vits16', given, data_key={str(weights / 'data_key.json')!r})\n"
        "assert made.model is not None; sys.exit('openvino' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_sent_to_intel(weights, tmp_path):
    """The package's own import and conversion would send usage data, and keep an identity in the home folder."""
    code = (
        "import socket, sys\n"
        "def refuse(*_): print('the network was asked'); raise OSError\n"
        "socket.socket.connect, socket.getaddrinfo = refuse, refuse\n"
        "import numpy as np; from imatch.features.base import create_backbone\n"
        "given = {'engine_forward': 'openvino', 'precision': 'fp32'}\n"
        f"made = create_backbone('vits16', given, data_key={str(weights / 'data_key.json')!r})\n"
        "made(np.zeros((1, 32, 32, 3), 'u1'))"
    )
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "WEIGHTS_ROOT": str(weights)}
    command = [sys.executable, "-c", code]
    paths = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env={**home, **paths}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert settings.cache_folder().parent != tmp_path / "cache"
