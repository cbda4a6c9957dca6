"""What is told before a run: the registry's table, and the README's."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from imatch import checks, registry
from imatch.checks import cost

ROOT = Path(__file__).parents[1]


def command(data_key, *options):
    line = [sys.executable, "-m", "imatch.registry", "--data-key", str(data_key), *options]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_tells_every_data_set_and_weight(weights):
    done = command(weights / "data_key.json", "--side", "64")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert {"demo", "survey", *(weight.key for weight in registry.load().weights)} <= set(lines)
    assert re.search(r"vits16 +LVD +found .* as its name says", lines["vits16"])
    assert re.search(r"vitl16sat +SAT +missing .*dinov3_vitl16_pretrain_sat493m-eadcf0ff\.pth", lines["vitl16sat"])


def test_a_file_that_is_not_what_its_name_says_is_seen(weights, tmp_path, monkeypatch):
    (file,) = weights.glob("dinov3_vits16_*.pth")
    copy = shutil.copy(file, tmp_path / "dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth")
    monkeypatch.setenv("WEIGHTS_ROOT", str(tmp_path))
    done = command(registry.DATA_KEY, "--side", "64")
    assert done.returncode == 1
    assert re.search(r"vitb16 +LVD +WRONG .*not with 73cec8be", done.stdout)
    assert Path(copy).is_file()


def test_a_bad_request_is_one_line(tmp_path):
    done = command(tmp_path / "none.json")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: no file")


def test_the_table_of_the_readme_is_what_is_counted():
    rows = dict(re.findall(r"^\| `(\w+\+?)` \| ((?:LVD|SAT) .*) \|$", (ROOT / "README.md").read_text(), re.M))
    known = registry.load().weights
    assert list(rows) == [weight.key for weight in known]
    for weight in known:
        at = [cost(weight.hub_entry, (side, side)) for side in (256, 512, 1024)]
        numbers = [f"{at[0].parameters / 1e6:,.0f}", *(f"{one.flop / 1e9:,.0f}" for one in at)]
        numbers += [f"{one.stored / 2**20:.2f}" for one in at]
        assert rows[weight.key].split(" | ") == [weight.family, *numbers]


def test_parameters_are_those_that_meta_publishes():
    """Millions, by the model card of DINOv3; timm's models count no biases of keys."""
    published = {"dinov3_vits16": 21, "dinov3_vitb16": 86, "dinov3_vitl16": 300, "dinov3_vith16plus": 840}
    published |= {"dinov3_vit7b16": 6716, "dinov3_convnext_tiny": 29, "dinov3_convnext_large": 198}
    for hub_entry, millions in published.items():
        assert cost(hub_entry, (256, 256)).parameters / 1e6 == pytest.approx(millions, rel=0.05)


def test_a_rate_is_measured():
    assert checks.rate("cpu", "fp32") > 1e9
    assert checks.free_memory("cpu") > 2**20
