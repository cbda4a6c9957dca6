"""What a person sees: a real JupyterLab in a headless Chromium runs 04_match and uses the explorer in it."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

import imatch
from imatch.core.step import open_step
from imatch.evaluation import verdicts
from imatch.steps.match import labels_path
from tests.test_steps import embedded, matched, referenced, searched

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "exports" / "screenshots"
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "apputils-extension/themes": {"theme": "JupyterLab Light"},
}
"""What JupyterLab would ask a new user."""
CANVAS = ".jupyter-matplotlib-canvas-div canvas"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, demo_photographs):
    """A folder like the repository's: the notebooks, three photographs and a finished run over them."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    (folder / "data" / "demo").mkdir(parents=True)
    for path in sorted(demo_photographs.iterdir())[:3]:
        shutil.copy(path, folder / "data" / "demo" / path.name)
    exports = folder / "exports"
    data = embedded(folder / "data" / "demo", exports, weight="dsift", run="demo", resize=imatch.Resize())
    _, tokens = referenced(data, kind="legacy", angles=(0, 15, 90), crops=(0.75,))
    index, *_ = searched(data, tokens, "reference-data", tag="")
    matched(index, candidates=3, iterations=10_000)
    path = folder / "notebooks" / "04_match.ipynb"
    notebook = nbformat.read(path, 4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source = cell.source.replace(
        'index_step = ""', f'index_step = "{index.folder.relative_to(folder).as_posix()}"'
    )
    nbformat.write(notebook, path)
    return folder


@pytest.fixture(scope="module")
def lab(workspace):
    """A JupyterLab over the workspace: its address. It is always stopped; its log is printed when a test fails."""
    config = workspace / ".jupyter"
    for name, value in SETTINGS.items():
        path = config / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={workspace}"]
    command += ["--IdentityProvider.token=imatch", "--LabApp.news_url=None"]
    places = {"JUPYTER_CONFIG_DIR": config, "JUPYTER_DATA_DIR": config / "data", "JUPYTER_RUNTIME_DIR": config / "run"}
    places |= {"JUPYTERLAB_WORKSPACES_DIR": config / "workspaces", "IPYTHONDIR": config / "ipython"}
    there = {**os.environ, **{name: str(place) for name, place in places.items()}, "PYTHONPATH": str(ROOT)}
    log = workspace / "lab.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=workspace, env=there, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(server, f"{address}/api?token=imatch", log)
        yield f"{address}/lab/tree/notebooks/04_match.ipynb?token=imatch"
    finally:
        server.terminate()
        server.wait(timeout=30)
        print(log.read_text()[-5000:])  # shown by pytest when something failed


def _wait_for(server, address, log):
    for _ in range(300):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
    pytest.fail(f"JupyterLab did not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def page(chromium, lab):
    """04_match, run from the top, at its explorer."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page = chromium.new_page(viewport={"width": 1440, "height": 1100})
    page.set_default_timeout(120_000)
    try:
        page.goto(lab)
        idle = page.get_by_text("Python 3 (ipykernel) | Idle")
        idle.wait_for()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.locator(CANVAS).first.wait_for()
        idle.wait_for()
        yield page
    finally:
        page.screenshot(path=SCREENSHOTS / "last.png")
        page.close()


def pixels(page):
    """The picture on the canvas as it is seen, once it no longer changes."""
    before = None
    for _ in range(50):
        now = np.asarray(Image.open(io.BytesIO(page.locator(CANVAS).first.screenshot())).convert("RGB"))
        if before is not None and np.array_equal(now, before):
            return now
        before = now
        page.wait_for_timeout(300)
    pytest.fail("the canvas never came to rest")


def shot(page, name):
    page.mouse.move(5, 500)
    page.locator(CANVAS).first.scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def slide(page, name, key, times):
    """Move a slider by the keyboard."""
    row = page.locator(".widget-hslider", has=page.get_by_text(name, exact=True))
    row.locator(".noUi-handle").focus()
    for _ in range(times):
        page.keyboard.press(key)


def click(page, side, x, y):
    """Click a photograph, 0 or 1, at a share of its half of the canvas."""
    box = page.locator(CANVAS).first.bounding_box()
    page.mouse.click(box["x"] + (side + x) * box["width"] / 2, box["y"] + y * box["height"])


def test_a_slider_redraws_the_lines(page):
    before = pixels(page)
    shot(page, "explorer")
    slide(page, "most lines", "ArrowLeft", 15)
    page.get_by_text("50 of 543 correspondences drawn").wait_for()
    after = pixels(page)
    shot(page, "fewer_lines")
    assert (before != after).any(axis=2).mean() > 0.01


def test_a_click_shows_what_a_patch_resembles(page):
    before = pixels(page)
    click(page, 0, 0.6, 0.55)
    page.get_by_text(re.compile(r"best [01]\.\d+ at .*second best [01]\.\d+ at")).wait_for()
    after = pixels(page)
    shot(page, "click")
    middle = before.shape[1] // 2
    changed = (before != after).any(axis=2)
    assert changed[:, middle:].mean() > 0.5  # the similarity covers the other photograph
    assert changed[:, :middle].mean() < 0.2  # and not the one that was clicked


def test_another_angle_is_another_query(page):
    before = pixels(page)
    slide(page, "angle", "ArrowRight", 1)
    page.get_by_text("astronaut_rot015_crop75.jpg").first.wait_for()
    assert (before != pixels(page)).any(axis=2).mean() > 0.1
    shot(page, "angle")


def test_a_label_is_written(page, workspace):
    page.get_by_role("button", name="accept").click()
    page.get_by_text("1 of 27 pairs have a label").wait_for()
    shot(page, "label")
    (step,) = (open_step(path.parent) for path in (workspace / "exports" / "demo" / "04_match").rglob("step.json"))
    query = "references_demo/Rdemo/astronaut_rot015_crop75.jpg"
    assert verdicts.read(labels_path(step)) == {(query, "astronaut.png"): "accept"}
