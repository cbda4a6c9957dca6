"""Photographs and finished steps that several tests use."""

import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from PIL import Image

from imatch.cli import demo
from tests.leaves import dead_leaves

sys.modules.setdefault("rfc3987_syntax", None)
"""jsonschema, which nbformat imports, takes it where it is installed, and it takes a second to make its grammars."""
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def environment():
    """What a test sets in its own process, as `imatch run --exports` does, is gone after it."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def demo_photographs(tmp_path_factory):
    """The demo's 18 real photographs."""
    folder = tmp_path_factory.mktemp("photographs") / "demo"
    demo.write(folder)
    return folder


@pytest.fixture(scope="session")
def few_photographs(tmp_path_factory):
    """Four procedural photographs of different shapes, one of them in a folder."""
    folder = tmp_path_factory.mktemp("photographs") / "few"
    (folder / "flight 1").mkdir(parents=True)
    shapes = {"a.png": (96, 128), "b.png": (128, 96), "c.jpg": (120, 120), "flight 1/d.png": (97, 131)}
    for seed, (name, (h, w)) in enumerate(shapes.items()):
        leaves = dead_leaves(seed, 160)[:h, :w]
        Image.fromarray(leaves).save(folder / name)
    return folder


@pytest.fixture(scope="session")
def weights_folder(tmp_path_factory):
    """Files of random numbers in the format of Meta's, and a data_key.json that names them."""
    from tests import random_weights  # with torch, which few tests need

    folder = tmp_path_factory.mktemp("weights")
    random_weights.write(folder, ["vits16", "cxTiny"])
    return folder


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    """Of all tests that use the random weights, for OpenVINO takes seconds to convert a model."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def weights(weights_folder, monkeypatch, cache_folder):
    """WEIGHTS_ROOT is the folder of random weights; the registry that names them is weights / "data_key.json"."""
    monkeypatch.setenv("WEIGHTS_ROOT", str(weights_folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_folder))
    return weights_folder


@pytest.fixture
def brighton_beach():
    """Real drone photographs beside the repository; absent elsewhere."""
    folder = SHARED / "brighton_beach"
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}")
    return folder


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, Debian's, driven by Playwright: `chromium.new_page()`. Not for the whole session: while it
    is open, its event loop is in the way of others in this process, such as nbclient's."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
