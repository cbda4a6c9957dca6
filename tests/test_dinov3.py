"""DINOv3 without its gated weights: random ones in the same format, against transformers' own implementation."""

import os
import pickle
import shutil
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from imatch.core import compute
from imatch.core.types import ImatchError, PassingError, normalise
from imatch.data import images
from imatch.features import base, dinov3, pipeline
from imatch.features import weights as features_weights
from imatch.features.dinov3 import Dinov3
from imatch.features.weights import ARCHITECTURES, _in_metas_names, check_name, read, skeleton, weight_digest
from tests import random_weights

LVD_MEAN, LVD_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def create(weights):
    """Backbones by the keys of the registry that names the random files."""

    def make(key, **options):
        given = {"precision": "fp32", "engine_forward": "torch", **options}
        return base.create_backbone(key, given, data_key=str(weights / "data_key.json"))

    return make


def pixels(h, w, n=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), np.uint8)


def normalised(photographs, mean=LVD_MEAN, std=LVD_STD):
    return ((torch.from_numpy(photographs) / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


# --- the numbers


def vit(**sizes):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    return DINOv3ViTModel(DINOv3ViTConfig(num_hidden_layers=12, num_register_tokens=4, **sizes))


def convnext():
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

    return DINOv3ConvNextModel(DINOv3ConvNextConfig())


FOREIGN = {
    "dinov3_vits16": lambda: vit(hidden_size=384, intermediate_size=1536, num_attention_heads=6),
    "dinov3_vits16plus": lambda: vit(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6, use_gated_mlp=True, hidden_act="silu"
    ),
    "dinov3_convnext_tiny": convnext,
}


@pytest.fixture(scope="module", params=sorted(FOREIGN))
def foreign(request):
    """transformers' model with random weights, no bias or layer scale at 0."""
    torch.manual_seed(0)
    model = FOREIGN[request.param]().eval()
    for name, parameter in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        middle = 1.0 if is_scale else 0.3 if "lambda" in name or "gamma" in name else 0.0
        width = 0.05 if parameter.ndim > 1 else 0.1
        torch.nn.init.normal_(parameter.data, middle, width)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):  # Meta's files, and so imatch, have the periods in bfloat16
            buffer.copy_(1 / (1 / buffer).bfloat16().float())
    return request.param, model


@pytest.mark.parametrize("layout", [".pth", ".safetensors"])
def test_tokens_agree_with_transformers(foreign, layout, tmp_path, monkeypatch):
    """From a file in Meta's names and from one in Hugging Face's."""
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub_entry, model = foreign
    if layout == ".pth":
        state = _in_metas_names(dict(model.state_dict()))
        path = random_weights.save(state, tmp_path, f"{hub_entry}_pretrain_lvd1689m")
    else:
        path = tmp_path / "model.safetensors"
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    ours = Dinov3(hub_entry, path.name, "LVD", precision="fp32", engine_forward="torch")
    for size in ((96, 96), (128, 192)):
        assert_agree(ours, model, pixels(*size))


def assert_agree(ours, model, photographs):
    seen = ours.features(torch.from_numpy(photographs))
    with torch.inference_mode():
        theirs = model(normalised(photographs)).last_hidden_state
    before_patches = 1 + seen.registers.shape[1]
    for a, b in (
        (seen.cls, theirs[:, 0]),
        (seen.registers, theirs[:, 1:before_patches]),
        (seen.grid.flatten(1, 2), theirs[:, before_patches:]),
    ):
        assert a.shape == b.shape
        if a.numel():
            assert torch.nn.functional.cosine_similarity(a, b, dim=-1).min() >= 0.9999
            assert (a - b).norm() / b.norm() <= 1e-3


def test_periods_of_the_file_are_used(create):
    """Meta's files hold them rounded to bfloat16: timm's own, exact ones would be a little beside Meta's code."""
    backbone = create("vits16")
    in_file = read(backbone.path)["rope_embed.periods"]
    assert torch.equal(backbone.model.rope.periods, in_file)
    assert not torch.equal(in_file, 100 ** (torch.arange(16) / 16))


def test_one_forward_pass_a_batch(create):
    backbone = create("vits16", pooling="legacy_mean")
    passes = []
    backbone.model.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    tokens = backbone(pixels(64, 96, n=3))
    assert len(tokens) == 3
    assert len(passes) == 1


def test_rotary_angles_are_worked_out_once_a_shape(create, monkeypatch):
    backbone = create("vits16")
    worked, work = [], backbone.model.rope._create_embed
    monkeypatch.setattr(
        backbone.model.rope, "_create_embed", lambda shape, **given: worked.append(shape) or work(shape, **given)
    )
    first = backbone(pixels(32, 48))
    backbone(pixels(48, 32))
    again = backbone(pixels(32, 48))
    assert [tuple(shape) for shape in worked] == [(2, 3), (3, 2)]
    assert first[0].descriptors.tobytes() == again[0].descriptors.tobytes()


def test_grids_need_not_be_square(create):
    (tokens,) = create("vits16")(pixels(96, 160, n=1))
    assert tokens.grid == (6, 10)  # 160 x 96 pixels are 10 x 6 patches
    assert tokens.xy[:2].tolist() == [[7.5, 7.5], [23.5, 7.5]]
    (tokens,) = create("cxTiny")(pixels(96, 160, n=1))
    assert tokens.grid == (3, 5)


@pytest.mark.parametrize("key", ["vits16", "cxTiny"])
def test_a_photograph_does_not_depend_on_its_batch(create, key):
    photographs = pixels(96, 128, n=3)
    together = create(key)(photographs)
    again = create(key)(photographs)
    for one, same, photograph in zip(together, again, photographs, strict=True):
        (alone,) = create(key)(photograph[None])
        assert same.descriptors.tobytes() == one.descriptors.tobytes()
        assert np.allclose(alone.vector, one.vector, atol=1e-5)
        assert np.allclose(alone.descriptors, one.descriptors, atol=2e-2)


def test_each_family_is_normalised_as_it_was_trained(create):
    """A mixed run: the same weights, once as web and once as satellite, differ as their normalisations do."""
    photographs = pixels(64, 64, n=1)
    lvd = create("vits16")
    sat = Dinov3("dinov3_vits16", lvd.filename, "SAT", precision="fp32", engine_forward="torch")
    for backbone, mean, std in ((lvd, LVD_MEAN, LVD_STD), (sat, (0.430, 0.411, 0.296), (0.213, 0.156, 0.143))):
        seen = []
        hook = backbone.model.patch_embed.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0]))
        backbone(photographs)
        hook.remove()
        assert torch.allclose(seen[0], normalised(photographs, mean, std), atol=1e-5)
    assert not np.allclose(lvd(photographs)[0].vector, sat(photographs)[0].vector, atol=1e-3)


def test_poolings_are_what_they_say(create):
    photographs = pixels(64, 96, n=2)
    seen = create("vits16").features(torch.from_numpy(photographs))
    patches = seen.grid.flatten(1, 2)
    unit = torch.nn.functional.normalize
    expected = {
        "cls": seen.cls,
        "mean": patches.mean(1),
        "cls+mean": torch.cat([unit(seen.cls), unit(patches.mean(1))], 1),
        "gem": (patches**3).mean(1).sign() * (patches**3).mean(1).abs() ** (1 / 3),
        # 1 class token, 4 registers and 24 patches, before the last normalisation
        "legacy_mean": seen.before.sum(1) / 29,
    }
    assert seen.before.shape == (2, 29, 384)
    assert set(expected) == set(base.POOLINGS)
    for name, wanted in expected.items():
        got = np.stack([tokens.vector for tokens in create("vits16", pooling=name)(photographs)])
        assert np.allclose(got, unit(wanted).numpy(), atol=1e-5), name
    model = create("vits16").model
    assert torch.allclose(model.last_norm(seen.before)[:, 0], seen.cls, atol=1e-5)


@pytest.mark.parametrize("key", ["vits16", "cxTiny"])
def test_bf16_stays_close_to_fp32(create, key, demo_photographs):
    from imatch.data.images import Resize, decode

    resize = Resize("stretch", long_side=256)
    paths = sorted(demo_photographs.iterdir())[:3]
    photographs = np.stack([decode(path, resize, 16, by="torch").pixels for path in paths])
    for full, half in zip(create(key)(photographs), create(key, precision="bf16")(photographs), strict=True):
        assert full.vector @ half.vector >= 0.999
        cosine = (normalise(full.descriptors.astype("f4")) * normalise(half.descriptors.astype("f4"))).sum(1)
        assert np.median(cosine) >= 0.999


def test_compiled_tokens_are_the_same(create, monkeypatch):
    """Up to the graph of the whole pass: what a C++ compiler makes of that is torch's, and takes it a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    photographs = pixels(32, 32, n=1)
    (eager,), (compiled,) = create("vits16")(photographs), create("vits16", compile=True)(photographs)
    assert np.allclose(eager.vector, compiled.vector, atol=1e-5)
    assert np.allclose(eager.descriptors, compiled.descriptors, atol=1e-2)


def test_auto_becomes_what_the_device_does(create):
    made = create("vits16", precision="auto")
    if made.device == "cpu":
        assert made.precision == ("bf16" if dinov3.computes_in_bf16("cpu") else "fp32")
    assert base.backbone_identity(made)["precision"] == made.precision
    assert "device" not in base.backbone_identity(made)


def test_identity_makes_the_same_backbone_without_the_registry(create):
    made = create("cxTiny", pooling="gem")
    again = base.create_backbone("cxTiny", base.backbone_identity(made), data_key="nowhere.json")
    assert again == made
    assert pickle.loads(pickle.dumps(made)) == made


def test_all_architectures_have_a_model():
    for hub_entry in ARCHITECTURES:
        shapes = features_weights.layout(skeleton(hub_entry))
        assert ("storage_tokens" in shapes) == ("convnext" not in hub_entry)
        assert ("blocks.0.attn.qkv.bias" in shapes) == ("vit" in hub_entry and "7b" not in hub_entry)


# --- strictness


@pytest.fixture
def broken(weights, tmp_path, monkeypatch):
    """Change the tensors of the random vits16, save them under a right name and load that."""
    original = torch.load(next(weights.glob("dinov3_vits16_*.pth")), weights_only=True)
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))

    def load(change, hub_entry="dinov3_vits16"):
        state = dict(original)
        change(state)
        path = random_weights.save(state, tmp_path, "dinov3_vits16_pretrain_lvd1689m")
        return Dinov3(hub_entry, path.name, "LVD", precision="fp32", engine_forward="torch").model

    return load


def test_an_untouched_file_loads(broken):
    broken(dict)


def test_a_missing_tensor_is_refused(broken):
    with pytest.raises(ImatchError, match=r"is no dinov3_vits16.*\n  blocks.3.ls1.gamma is missing"):
        broken(lambda state: state.pop("blocks.3.ls1.gamma"))


@pytest.mark.parametrize("name", ["blocks.12.norm1.weight", "rope_new", "projectors.0.weight", "head.weight"])
def test_an_extra_tensor_is_refused(broken, name):
    with pytest.raises(ImatchError, match=f"{name} has no place"):
        broken(lambda state: state.update({name: torch.zeros(3)}))


def test_a_wrong_shape_is_refused(broken):
    """timm by itself would resample a patch embedding of another size."""
    with pytest.raises(ImatchError, match=r"patch_embed.proj.weight is \(384, 3, 14, 14\), not \(384, 3, 16, 16\)"):
        broken(lambda state: state.update({"patch_embed.proj.weight": torch.zeros(384, 3, 14, 14)}))


def test_another_architecture_is_named(broken):
    with pytest.raises(ImatchError, match="is no dinov3_vitb16, it is a dinov3_vits16: correct its hub entry"):
        broken(dict, hub_entry="dinov3_vitb16")


MASK = "blocks.0.attn.qkv.bias_mask"


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update({MASK: torch.ones(1152)}),
        lambda state: state.pop(MASK),
        lambda state: state.update({MASK: torch.full((1152,), torch.nan)}),
    ],
    ids=["unmasked", "no mask", "nan"],
)
def test_biases_of_keys_are_refused(broken, change):
    with pytest.raises(ImatchError, match=r"blocks\.0\.attn\.qkv\.bias gives keys a bias"):
        broken(change)


def test_masks_are_multiplied_into_the_biases(broken):
    """The files that Meta released hold masks, and biases, of zeros only."""
    masks = {MASK.replace("0", str(i), 1): torch.zeros(1152) for i in range(12)}
    model = broken(lambda state: state.update(masks))
    assert all(not block.attn.q_bias.any() and not block.attn.v_bias.any() for block in model.blocks)


@pytest.mark.parametrize("shape", [(3,), (1,)])
def test_a_mask_of_another_shape_is_refused(broken, shape):
    with pytest.raises(ImatchError, match=r"bias_mask is \(\d,\), not \(1152,\)"):
        broken(lambda state: state.update({MASK: torch.ones(shape)}))


@pytest.mark.parametrize("periods", [torch.ones(16), torch.ones(1), torch.ones(32), torch.full((16,), torch.nan)])
def test_other_periods_are_refused(broken, periods):
    with pytest.raises(ImatchError, match=r"rope_embed\.periods are not those of DINOv3"):
        broken(lambda state: state.update({"rope_embed.periods": periods}))


def test_a_file_without_periods_gives_the_same_tokens(broken):
    with_them, without = broken(dict), broken(lambda state: state.pop("rope_embed.periods"))
    assert torch.equal(with_them.rope.periods, without.rope.periods)


def test_every_needless_tensor_is_let_pass(broken):
    broken(
        lambda state: state.update({"local_cls_norm.weight": torch.ones(384), "local_cls_norm.bias": torch.ones(384)})
    )


@pytest.fixture
def file(weights, tmp_path, monkeypatch):
    """A copy of the random vits16 in a folder of its own."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.setenv("WEIGHTS_ROOT", str(folder))
    return Path(shutil.copy(next(weights.glob("dinov3_vits16_*.pth")), folder))


def load(filename):
    return Dinov3("dinov3_vits16", filename, "LVD", precision="fp32", engine_forward="torch").model


@pytest.mark.usefixtures("file")
def test_a_missing_file_says_where_it_belongs():
    with pytest.raises(ImatchError, match=r"no dinov3_vitl16.*\.pth in .*own: ask for DINOv3's weights at https"):
        load("dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth")


def test_a_missing_folder_says_so(file, monkeypatch, tmp_path):
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(ImatchError, match=r"no weights folder .*nowhere: make it"):
        load(file.name)


def test_a_renamed_file_is_found_out(file):
    name = file.name
    file.rename(file.with_name(f"backup of {name}"))
    with pytest.raises(ImatchError, match=f"no {name} in .*, but backup of {name}: if it is that file renamed"):
        load(name)


def test_a_file_under_another_ones_name_is_refused(file):
    other = file.with_name("dinov3_vits16_pretrain_lvd1689m-08c60483.pth")
    file.rename(other)
    with pytest.raises(ImatchError, match=r"its SHA-256 begins with .*, not with 08c60483. Download it again"):
        load(other.name)


def test_a_truncated_file_is_refused(file):
    with file.open("rb+") as opened:
        opened.truncate(1_000_000)
    with pytest.raises(ImatchError, match=r"is truncated \(1.0 MB\): its end is missing. Download it again"):
        load(file.name)


def test_a_page_saved_as_weights_is_refused(file):
    file.write_text("<html>Your link has expired</html>")
    with pytest.raises(ImatchError, match="is no weight file of PyTorch"):
        load(file.name)


def test_a_pickle_with_code_is_not_run(file):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(file.parent / "ran"),)

    path = random_weights.save({"cls_token": Code()}, file.parent, "dinov3_vits16_pretrain_lvd1689m")
    with pytest.raises(ImatchError, match="loading it would run code, so it was not loaded"):
        load(path.name)
    assert not (file.parent / "ran").exists()


def test_a_training_checkpoint_is_refused(file):
    path = random_weights.save({"teacher": {}, "epoch": 3}, file.parent, "dinov3_vits16_pretrain_lvd1689m")
    with pytest.raises(ImatchError, match=r"is no state dict of a backbone \(it holds teacher, epoch\)"):
        load(path.name)


def test_truncated_safetensors_are_refused(file):
    path = file.parent / "model.safetensors"
    save_file({"cls_token": torch.zeros(1, 1, 384)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImatchError, match="it is truncated; download it again"):
        load("model.safetensors")


def test_checksums_are_remembered_by_size_and_time(file, monkeypatch):
    digest = check_name(file)
    reads = []
    monkeypatch.setattr(compute, "progress", lambda blocks, *_, **__: reads.append(1) or blocks)
    assert weight_digest(file) == digest
    assert not reads
    with file.open("ab") as opened:
        opened.write(b"x")
    assert weight_digest(file) != digest
    assert reads


def test_the_hub_needs_a_checkout(file, monkeypatch, tmp_path):
    monkeypatch.setenv("DINOV3_REPO", str(tmp_path / "none"))
    with pytest.raises(ImatchError, match=r"no checkout of Meta's DINOv3 at .*none"):
        assert Dinov3("dinov3_vits16", file.name, "LVD", source="hub").model


def test_a_checkout_that_misses_packages_names_the_extra(file, monkeypatch, tmp_path):
    (tmp_path / "hubconf.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.setenv("DINOV3_REPO", str(tmp_path))
    with pytest.raises(ImatchError, match=r"imports a_package_that_nobody_has, .*pip install .* -e '\.\[hub\]'"):
        assert Dinov3("dinov3_vits16", file.name, "LVD", source="hub").model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "clss"}, "option pooling must be 'cls', 'mean', .* or 'legacy_mean', got 'clss'"),
        ({"family": "SAD"}, "option family must be 'LVD' or 'SAT', got 'SAD'"),
        ({"source": "hubb"}, "option source must be 'timm' or 'hub', got 'hubb'"),
        ({"precision": "fp16"}, "option precision must be .*, got 'fp16'"),
        ({"hub_entry": "dinov3_vits14"}, "unknown hub entry 'dinov3_vits14': did you mean 'dinov3_vits16'"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(create, options, message):
    with pytest.raises(ImatchError, match=message):
        create("vits16", **options)


def test_a_device_that_is_not_there_is_refused():
    for device in ("cuda:99", "tpu", "mps", "", "cpu:0"):
        with pytest.raises(ImatchError, match="device"):
            Dinov3("dinov3_vits16", "x.pth", "LVD", device=device)


def through(backbone, n, room=2**40):
    """What comes out of n photographs, eight at once where there is room."""
    photographs = ((str(i), images.decode(one)) for i, one in enumerate(pixels(32, 48, n=n)))
    return [one for _, told, *_ in pipeline.passed(backbone, photographs, 8, room) for one in told]


@pytest.mark.parametrize("n", [1, 8])
def test_a_device_without_memory_leaves_photographs_to_the_next_run(create, monkeypatch, n):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Dinov3, "features", full)
    told = through(create("vits16"), n)
    assert [*map(type, told)] == [PassingError] * n
    assert str(told[0]) == "cpu had no memory left for its 48 x 32 pixels"


def test_a_batch_that_does_not_fit_is_halved(create, monkeypatch):
    """Memory for three photographs, which is known beforehand, or not: then eight are tried at once, by four, by two.
    One that is larger than all of the room is passed all the same."""
    backbone, features, asked = create("vits16"), Dinov3.features, []

    def small(self, photographs):
        asked.append(len(photographs))
        if len(photographs) > 3:
            raise torch.OutOfMemoryError
        return features(self, photographs)

    expected, each = through(backbone, 8), base.pass_bytes((32, 48), backbone)
    monkeypatch.setattr(Dinov3, "features", small)
    for room, passes in ((2**40, [8, 4, 2, 2, 4, 2, 2]), (3.5 * each, [3, 3, 2]), (0, [1] * 8)):
        for one, other in zip(through(backbone, 8, room), expected, strict=True):
            assert np.allclose(one.vector, other.vector, atol=1e-5)
        assert asked == passes
        asked.clear()


def test_unknown_weight_names_the_nearest_of_all(weights):
    with pytest.raises(ImatchError, match="unknown weight 'vits61': did you mean 'vits16'"):
        base.create_backbone("vits61", data_key=str(weights / "data_key.json"))


def test_nothing_goes_to_the_network(create, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert create("cxTiny").model is not None


def test_nothing_warns_when_a_model_is_built():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skeleton("dinov3_vits16")
