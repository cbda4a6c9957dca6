"""Photographs and finished steps that several tests use."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from imatch import demo
from imatch.backbones.sift_vocabulary import dead_leaves

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


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
        leaves = dead_leaves(np.random.default_rng(seed), side=160)[:h, :w]
        Image.fromarray(leaves).save(folder / name)
    return folder


@pytest.fixture
def brighton_beach():
    """Real drone photographs beside the repository; absent elsewhere."""
    folder = SHARED / "brighton_beach"
    if not folder.is_dir():
        pytest.skip(f"no photographs at {folder}")
    return folder
