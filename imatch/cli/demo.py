"""The demo's photographs: those that scikit-image carries inside its wheel, written to a folder once."""

from __future__ import annotations

import shutil
from importlib import resources
from importlib.resources import as_file
from pathlib import Path

from imatch.core import files

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",  # without its right twin: the same scene would make two answers right
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)


def write(folder: Path) -> int:
    """Write the photographs that are not in `folder` yet; returns how many were written."""
    written = 0
    for name in PHOTOGRAPHS:
        target = folder / name
        if not target.exists():
            with as_file(resources.files("skimage") / "data" / name) as source, files.atomic(target) as temporary:
                shutil.copyfile(source, temporary)
            written += 1
    return written
