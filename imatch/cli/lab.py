"""JupyterLab on the notebooks, after a word on what the machine lacks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

from imatch.cli import demo, doctor
from imatch.core import settings
from imatch.core.types import ImatchError


def main(cpu: bool, jupyter: Sequence[str]) -> int:
    """Say what the doctor finds, write the demo's photographs, and become JupyterLab.

    Args:
        cpu: expect no GPU.
        jupyter: further arguments, Jupyter's own.
    """
    found = doctor.main(cpu, settings.DATA_KEY)
    if found == doctor.NO_GPU:
        settings.hide_gpus()
        print("JupyterLab opens all the same, on the CPU.", flush=True)
    elif found:
        print("JupyterLab opens all the same.", flush=True)
    try:
        demo.write(settings.from_workspace("data/demo"))
    except (OSError, ImportError, ImatchError) as error:
        print(f"no demo photographs in data/demo: {error}", flush=True)
    if importlib.util.find_spec("jupyterlab") is None:
        raise ImatchError("jupyterlab is not installed: pip install 'imatch[notebooks]'")
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *jupyter])
