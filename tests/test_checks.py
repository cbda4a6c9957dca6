"""What is told before a run: the registry's table, and the README's."""

import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import click
import pytest

from imatch.core import compute, files
from imatch.data import images, registry, store
from imatch.data.images import Resize
from imatch.features import base
from imatch.steps import checks
from imatch.steps.checks import cost
from tests.command import command
from tools import scaling

ROOT = Path(__file__).parents[1]


def test_the_command_tells_every_data_set_and_weight(weights, capsys):
    assert command("weights", "--data-key", str(weights / "data_key.json"), "--side", "64") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {"demo", "survey", *(weight.key for weight in registry.load().weights)} <= set(lines)
    assert re.search(r"vits16 +LVD +found .* as its name says", lines["vits16"])
    assert re.search(r"vitl16sat +SAT +missing .*dinov3_vitl16_pretrain_sat493m-eadcf0ff\.pth", lines["vitl16sat"])


def test_a_file_that_is_not_what_its_name_says_is_seen(weights, tmp_path, monkeypatch, capsys):
    (file,) = weights.glob("dinov3_vits16_*.pth")
    copy = shutil.copy(file, tmp_path / "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth")
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    assert command("weights", "--side", "64") == 1
    assert re.search(r"vitb16 +LVD +WRONG .*not with 73cec8be", capsys.readouterr().out)
    assert Path(copy).is_file()


def test_a_bad_request_is_one_line(tmp_path, capsys):
    assert command("weights", "--data-key", tmp_path / "none.json") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: no file")


def test_the_table_of_the_readme_is_what_is_counted():
    rows = dict(re.findall(r"^\| `(\w+\+?)` \| ((?:LVD|SAT) .*) \|$", (ROOT / "README.md").read_text(), re.M))
    known = registry.load().weights
    assert list(rows) == [weight.key for weight in known]
    for weight in known:
        at = [cost(weight.hub_entry, (side, side)) for side in (256, 512, 1024)]
        numbers = [f"{at[0].parameters / 1e6:,.0f}", *(f"{one.flop / 1e9:,.0f}" for one in at)]
        numbers += [f"{one.stored / 2**20:.2f}" for one in at]
        assert rows[weight.key].split(" | ") == [weight.family, *numbers]


# --- the plan on paper


def test_the_plan_of_the_readme_is_what_is_counted():
    """All but two numbers that were measured, which it names."""
    text = (ROOT / "README.md").read_text()
    asked = re.search(r"tools.scaling ([\d ]+) --weight vits16 --side 256 --tflops 400 --memory-gb 64", text)
    block = re.search(r"```\n(dinov3_vits16 at 256 x 256 px.*?)\n```", text, re.S).group(1)
    measured = re.search(r"hours, (cpu in bf16 at (\d+) GFLOP/s, measured here), 1 worker", block)
    decoded = re.search(r"core hours of decoding, (\d+) ms", block)
    machines = [
        scaling.Machine(measured[1], "bf16", 1e9 * int(measured[2])),
        scaling.Machine("bf16 at 400 TFLOP/s, computed", "bf16", 4e14),
    ]
    counts = [int(count) for count in asked[1].split()]
    assert counts == [10**4, 10**6, 10**8]
    assert scaling.plan("dinov3_vits16", counts, 256, machines, int(decoded[1]) / 1000, 2**36) == block


def test_the_command_plans_without_photographs_and_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    scaling.main(["1000", "1000000", "--side", "64", "--tflops", "100"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("dinov3_vits16 at 64 x 64 px")
    assert lines[-1] == scaling.FORMULA
    assert sum("measured here" in line for line in lines) == sum("computed" in line for line in lines) == 3
    kinds = [line.split()[4] for line in lines if line.startswith("GB of memory, index")]
    assert kinds == ["flat", "ivf_flat", "hnsw", "ivf_pq", "ivf_rabitq"]
    kept = [line.split()[4].rstrip(",") for line in lines if line.startswith("GB on disk")]
    assert kept == [*store.KEEPS]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["0"], "must be above 0"),
        (["10", "--tflops", "-1"], "must be above 0"),
        (["10", "--side", "250"], "250 is not a multiple of patch 16: use 240 or 256"),
        (["10", "--weight", "vits61"], "did you mean"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(options, said):
    with pytest.raises(click.ClickException) as refused:
        scaling.main(options, standalone_mode=False)
    told = refused.value.format_message()
    assert "\n" not in told
    assert said in told


def test_hours_by_the_formula():
    one = cost("dinov3_vits16", (256, 256))
    assert checks.hours(1000, one.flop, one.flop, "fp32") == pytest.approx(1000 / 0.6 / 3600)
    assert checks.hours(1000, one.flop, one.flop, "bf16", 8) == pytest.approx(1000 / 0.5 / 3600 / 8)


def test_a_plan_says_when_no_index_fits():
    told = scaling.plan("dinov3_vits16", [10**4, 10**9], 256, [], 0.05, 2**30)
    assert told.splitlines()[-2].split()[-3:] == ["flat", "none", "fits"]


def test_rows_take_what_is_said_of_them(tmp_path):
    """On disk, of a registered survey, and in memory."""
    about = {"size": (3000, 4000), "look": "0" * 64, "capture": "flight01", "label": "80m", "frame": 1}
    place = {"latitude": 51.123456789, "longitude": -0.123456789, "altitude": 82.123}
    placed = {"grid": (16, 16), "xy": False, "shard": 12, "first": 12345, "n": 256, "vector": "0123456789abcdef"}
    rows = [
        {"id": f"flight01_80m/flight01_80m_{i:04d}.jpg", "sha256": f"{i:064x}", **about, "position": place, **placed}
        for i in range(2000)
    ]
    seen = {"id": rows[0]["id"], "stat": [10**7, 10**18], "problem": None, "sha256": "0" * 64}
    assert len(files.line(rows[0]) + files.line(seen)) == pytest.approx(checks.LISTED, rel=0.2)
    files.write_rows(tmp_path / "images.jsonl", rows)
    del rows
    tracemalloc.start()
    try:
        held = files.read_rows(tmp_path / "images.jsonl")
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert taken / len(held) == pytest.approx(scaling.HELD, rel=0.2)


def test_parameters_are_those_that_meta_publishes():
    """Millions, by the model card of DINOv3; timm's models count no biases of keys."""
    published = {"dinov3_vits16": 21, "dinov3_vitb16": 86, "dinov3_vitl16": 300, "dinov3_vith16plus": 840}
    published |= {"dinov3_vit7b16": 6716, "dinov3_convnext_tiny": 29, "dinov3_convnext_large": 198}
    for hub_entry, millions in published.items():
        assert cost(hub_entry, (256, 256)).parameters / 1e6 == pytest.approx(millions, rel=0.05)


def test_a_rate_is_measured():
    assert checks.rate("cpu", "fp32") > 1e9


# --- memory


@pytest.mark.parametrize(("version", "group"), [(2, "/"), (2, "/user/job"), (1, "/"), (1, "/docker/of-the-host")])
def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch, version, group):
    """4 MB of which 3 MB are taken, a half of them by pages of files, which make room; the groups above take more."""
    limit, used, kind, prefix = {
        2: ("max", "current", "", ""),
        1: ("limit_in_bytes", "usage_in_bytes", "memory", "total_"),
    }[version]
    (tmp_path / "groups").write_text(f"3:cpu:/else\n0:{kind}:{group}\n")
    inner = tmp_path / kind / ("" if "host" in group else group[1:])  # which a container's tree does not hold
    inner.mkdir(parents=True, exist_ok=True)
    (tmp_path / kind / f"memory.{limit}").write_text("max" if version == 2 else str(2**63 - 4096))
    (inner / f"memory.{limit}").write_text(f"{2**22}\n")
    for folder in {inner, tmp_path / kind}:
        (folder / f"memory.{used}").write_text(f"{3 * 2**20}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {2**20}\n{prefix}active_file {2**19}\n")
    monkeypatch.setattr(compute, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(compute, "LIMITS", tmp_path)
    assert compute.free_memory() == 2**20 + 2**19 + 2**20


PEAKS = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from imatch.data import images
from imatch.features import base

def taken(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    held = status("VmRSS")
    work()
    return status("VmHWM") - held

def status(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])

photograph = np.random.default_rng(0).integers(0, 255, (75, 100, 3), np.uint8).repeat(16, 0).repeat(16, 1)
Image.fromarray(photograph).save(sys.argv[1])
images.decode(photograph[:64, :64])
backbones = [base.create_backbone(name) for name in ("dsift", "sift")]
for one in backbones:
    one.load(), one(photograph[None, :320, :320].copy())
work = [lambda: images.decode(Path(sys.argv[1])), *(lambda one=one: one(photograph[None]) for one in backbones)]
print(*map(taken, work))
"""


def test_the_memory_that_a_photograph_takes_is_what_is_said(tmp_path):
    """Of decoding, and of backbones without a network, at 2 megapixels; `test_variants` looks at a network."""
    ran = subprocess.run(
        [sys.executable, "-c", PEAKS, str(tmp_path / "a.png")], capture_output=True, text=True, check=True
    )
    decoding, *of = (int(number) / (1200 * 1600) for number in ran.stdout.split())
    assert decoding < base.DECODED + images.STRIP * 16 / (1200 * 1600)  # some pixels lie there twice for a while
    for name, taken in zip(("dsift", "sift"), of, strict=True):
        said = base.needed((1200, 1600), Resize(), base.create_backbone(name))["cpu"] / (1200 * 1600)
        assert 0.4 * said < taken < 1.05 * said, name
