"""Let the disk fill up in each step: one line says so, and once there is space the same ends with the same bytes.

    .venv/bin/python -m tests.drills.disks [--n 12] [--commands 2] [--seed 0]

Exports lie on a tmpfs of this drill's own mount namespace (Linux's `unshare`; where that is not allowed, it says so).
Its size is drawn so that each step in turn is what fills it; the last ones are of the command `imatch run` itself.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from tests.drills import chain, kills
from tests.drills.tally import Tally, asked

PAGE = 4096
INSIDE = "IMATCH_DRILL_HAS_ITS_OWN_MOUNTS"


def main() -> None:
    """Fill, look, make space, compare."""
    given, tally = asked(__doc__, n=12, commands=2), Tally()
    if INSIDE not in os.environ:
        apart = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
        if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
            print("0 full disks: `unshare --mount` is not allowed here")
            return
        os.environ[INSIDE] = "1"
        os.execvp("unshare", [*apart, sys.executable, "-m", "tests.drills.disks", *sys.argv[1:]])
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        chain.settle(home, 4)
        kills.snapshots(home)
        used = [mount(home / "probe", 2**30)]
        for at in range(len(chain.NOTEBOOKS)):
            shutil.copytree(home / f"before {at + 1}", home / "probe", dirs_exist_ok=True)
            used.append(filled(home / "probe"))
        unmount(home / "probe")
        for n in range(given.n):
            at = n % len(chain.NOTEBOOKS)
            size, exports = used[at] + round((used[at + 1] - used[at]) * chance.uniform(0.02, 0.9)), home / f"full {n}"
            if n < given.n - given.commands:
                by_cells(exports, at, size, tally)
            else:
                by_command(exports, at, size, tally)
                at = len(chain.NOTEBOOKS) - 1
            whole = kills.found(home / f"before {at + 1}")
            kills.compare(kills.found(exports), whole, f"{chain.NOTEBOOKS[at]}, {size} bytes", tally)
            unmount(exports)
    tally.end(f"{given.n} full disks ({tally.counted()})", "not said", "wrong bytes")


def by_cells(exports: Path, at: int, size: int, tally: Tally) -> None:
    """Run a notebook on a disk that it fills, then once more on a larger one."""
    step = chain.NOTEBOOKS[at]
    mount(exports, size)
    shutil.copytree(exports.with_name(f"before {at}"), exports, dirs_exist_ok=True)
    look(exports, step, size, kills.finish(partial(kills.cells, step, exports, 0)), tally)
    mount(exports, 2**30, "remount,")
    if kills.finish(partial(kills.cells, step, exports, 0)):
        tally.fault("wrong bytes", f"{step} does not end", f"after {size} bytes")


def by_command(exports: Path, at: int, size: int, tally: Tally) -> None:
    """The same by `imatch run`."""
    recipe = exports.with_suffix(".yaml")
    parameters = {key: value for step in chain.NOTEBOOKS[:4] for key, value in chain.given(step).items()}
    recipe.write_text(json.dumps({"notebooks": chain.NOTEBOOKS, "parameters": parameters}))
    mount(exports, size + at * 2**19)  # with the executed notebooks
    code = kills.finish(partial(kills.command, recipe, exports))
    look(exports, "imatch run", size, code, tally)
    mount(exports, 2**30, "remount,")
    if kills.finish(partial(kills.command, recipe, exports)):
        tally.fault("wrong bytes", "imatch run does not end", f"after {size} bytes")


def look(exports: Path, step: str, size: int, code: int, tally: Tally) -> None:
    """Whether it is said that the disk is full, in the last line, and nothing is left half."""
    lines = exports.with_suffix(".log").read_text().strip().splitlines() or [""]
    told = [line for line in lines if re.search("disk (is )?full", line)]
    tally.counts[f"in {step}" if code else "not full"] += 1
    if code == 0:
        return
    if not told:
        tally.fault("not said", step, f"{size} bytes, exit code {code}: {lines[-1][:200]}")
    elif step != "imatch run" and told[-1] != lines[-1]:
        tally.fault("not said", f"{step}, in its last line", f"{size} bytes: {lines[-1][:200]}")
    elif step == "imatch run" and any(line.startswith("Traceback") for line in lines):
        tally.fault("tracebacks", step, f"{size} bytes: {lines[-1][:200]}")
    for left in exports.rglob(".*.tmp"):
        tally.fault("temporary files left", step, str(left.relative_to(exports)), bar=False)


def mount(folder: Path, size: int, again: str = "") -> int:
    """A tmpfs of so many bytes, or make it so large; returns what is used."""
    folder.mkdir(exist_ok=True)
    options = f"{again}size={-(-size // PAGE) * PAGE}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "drill", str(folder)], check=True)
    return filled(folder)


def filled(folder: Path) -> int:
    return shutil.disk_usage(folder).used


def unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], check=True)


if __name__ == "__main__":
    main()
