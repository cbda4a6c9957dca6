"""One notebook, headless: papermill, in a kernel of the Python that runs this."""

from __future__ import annotations

import io
import logging
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, TextIO

import ipykernel  # noqa: F401  # which the kernel is: if it is not installed, that is said at once
import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError
from traitlets import default

from imatch.core import files, settings
from imatch.core.compute import PartDoneError
from imatch.core.rows import Json
from imatch.core.step import MIME
from imatch.core.types import ImatchError

PATIENCE = 300
"""Seconds that a kernel may take to start, from a network's disk, and to hand over what a cell shows."""

MEMORY = "mostly for want of memory: use fewer compute.workers, a smaller compute.batch_size or resize.limit"


def execute(notebook: Path, values: Mapping[str, Json], exports: Path) -> Path | str | None:
    """Run one notebook and put it, executed, into its step's folder as notebook.ipynb; if it fails, see `failed`.

    Returns:
        The step's folder; what went wrong; or None when it did its part (`compute.do`), and others are to do theirs.
    """
    with tempfile.TemporaryDirectory(prefix="imatch_") as folder:
        report = Path(folder, notebook.name)
        try:
            return _step(_executed(notebook, report, values), report)
        except PapermillExecutionError as error:
            if error.ename == PartDoneError.__name__:
                print(error.evalue, flush=True)
                return None
            said = f"{error.ename}: {error.evalue}"
        except DeadKernelError:
            said = f"the notebook's process ended ({_Kernel.ended}); the same command goes on where it stopped"
        except RuntimeError as error:
            why = f"no kernel of {sys.executable} starts ({_Kernel.ended or error})"
            said = f"{why}: run it again, or install it anew: pip install --force-reinstall ipykernel"
        except (ImatchError, OSError) as error:
            said = str(error)
        with suppress(ImatchError, OSError):  # a full disk has no room for it
            files.write_bytes(failed(exports, notebook.stem), report.read_bytes())
            said = f"{said}\n  see {failed(exports, notebook.stem)}"
        return said


def failed(exports: Path, notebook: str) -> Path:
    """Where the last executed notebook of a name lies that failed.

    >>> failed(Path("exports"), "01_embed").as_posix()
    'exports/.failed/01_embed.ipynb'
    """
    return exports / ".failed" / f"{notebook}.ipynb"


def _executed(notebook: Path, report: Path, values: Mapping[str, Json]) -> NotebookNode:
    for name in ("papermill", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they say of a kernel that ended is said here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # papermill's and nbclient's own
        return papermill.execute_notebook(
            notebook,
            report,
            dict(values),
            kernel_name=NATIVE_KERNEL_NAME,
            kernel_manager_class=_Kernel,
            start_timeout=PATIENCE,
            iopub_timeout=PATIENCE,
            progress_bar=False,
            cwd=str(settings.workspace()),
            stdout_file=_Lines(sys.stdout),
            stderr_file=_Lines(sys.stderr),
            extra_arguments=["--IPKernelApp.log_level=50"],  # its words on encryption and on being stopped alarm
        )


def _step(executed: NotebookNode, report: Path) -> Path:
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    published = [output["data"][MIME] for output in outputs if MIME in output.get("data", {})]
    if not published:
        raise ImatchError("it finished no step (its last cell must call finish)")
    folder = Path(published[-1]["folder"])
    files.write_bytes(folder / "notebook.ipynb", report.read_bytes())
    return folder


class _Kernel(AsyncKernelManager):
    """A kernel of this Python, whatever JUPYTER_PATH or a home have under its name."""

    ended: ClassVar[str] = ""
    """How the last one ended, if it did so by itself."""

    @default("kernel_spec_manager")
    def _native(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    async def start_kernel(self, extra_arguments: Sequence[str]) -> None:
        """Start it; what it says on standard error before it can send messages is kept for `ended`."""
        _Kernel.ended, self.words = "", tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process
        await super().start_kernel(extra_arguments=extra_arguments, stderr=self.words)

    async def cleanup_resources(self, restart: bool = False) -> None:
        """Note how it ended, which nobody knows afterwards."""
        code = await self.provisioner.poll() if self.provisioner else None
        with self.words:
            self.words.seek(0)
            last = self.words.read().decode(errors="replace").strip().rpartition("\n")[2]
        if code:
            _Kernel.ended = f"exit {code}, {MEMORY if code == -9 else last or 'in a library'}"
        await super().cleanup_resources(restart)


class _Lines(io.TextIOBase):
    """A notebook's output; where nobody watches a terminal, a bar becomes a line of the log every ten seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, -math.inf

    def write(self, text: str) -> int:
        shown = text
        if not self.stream.isatty() and text.startswith("\r"):
            now = time.monotonic()
            if now - self.last < 10 and "100%" not in text:
                return len(text)
            self.last = now
            shown = text.strip("\r\n") + "\n"
        self.stream.write(shown)
        self.stream.flush()
        return len(text)
