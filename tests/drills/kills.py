"""Kill runs of all five notebooks at random moments, give the same again, compare every byte with a run nobody killed.

    .venv/bin/python -m tests.drills.kills [--n 110] [--commands 10] [--seed 0]

Of each notebook its cells, in a group of processes of its own, started from this one so that a kill costs no second of
imports; at the end some kills of the command `imatch run` itself, with its kernels. SIGKILL to all of its processes, so
that nothing can be tidied up.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from tests.drills import chain
from tests.drills.tally import Tally, asked
from tests.test_resume import content

MOST = 6
"""So often one step, or one run of the command, is killed; then it may end."""


def main() -> None:
    """Kill, compare, print one line of figures."""
    given, tally = asked(__doc__, n=110, commands=10), Tally()
    chance, runs = random.Random(given.seed), 0
    for room in ("IPython.core.interactiveshell", "torch.utils.data", "imatch.features.sift", "imatch.steps.match"):
        importlib.import_module(room)  # once for all children, and so that none of them has a thread yet
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a killed child had started is reaped here
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        chain.settle(home, 6)
        took = snapshots(home)
        whole = [found(home / f"before {at}") for at in range(len(chain.NOTEBOOKS) + 1)]
        goal = -(-(given.n - given.commands) // len(chain.NOTEBOOKS))
        for at, step in enumerate(chain.NOTEBOOKS):
            while tally.counts[f"in {step}"] < goal:
                exports, workers = home / f"killed {runs}", 2 * (runs % 2)
                runs += 1
                shutil.copytree(home / f"before {at}", exports)
                for _ in range(min(MOST, goal - tally.counts[f"in {step}"])):
                    # early moments more often, for pictures, which come last, take longest
                    if not kill(cells(step, exports, workers), took[at] * chance.random() ** 2):
                        break
                    tally.counts[f"in {step}"] += 1
                if finish(partial(cells, step, exports, workers)):
                    said = exports.with_suffix(".log").read_text().strip().splitlines()[-1:]
                    tally.fault("wrong bytes", f"{step} does not end", f"{exports.name}: {said}")
                compare(found(exports), whole[at + 1], exports.name, tally)
        runs += commands(home, given.commands, sum(took), chance, whole[-1], tally)
    kills = sum(tally.counts.values())
    tally.end(f"{kills} SIGKILLs ({tally.counted()}) in {runs} runs of {len(whole[-1])} files", "wrong bytes")


def snapshots(home: Path) -> list[float]:
    """Run all notebooks; leaves what is there before each, and after the last, as "before 0" to "before 5".

    Returns:
        The seconds that each took.
    """
    took = []
    for at, step in enumerate(chain.NOTEBOOKS):
        exports = home / f"before {at + 1}"
        (shutil.copytree(home / f"before {at}", exports) if at else (home / "before 0").mkdir())
        started = time.monotonic()
        if finish(partial(cells, step, exports, 0)):
            raise SystemExit(exports.with_suffix(".log").read_text())
        took.append(time.monotonic() - started)
    return took


def commands(home: Path, n: int, took: float, chance: random.Random, whole: dict[str, Any], tally: Tally) -> int:
    """Kill `imatch run` n times; returns in how many runs."""
    recipe, killed, runs = home / "drill.yaml", 0, 0
    parameters = {key: value for step in chain.NOTEBOOKS[:4] for key, value in chain.given(step).items()}
    recipe.write_text(json.dumps({"notebooks": chain.NOTEBOOKS, "parameters": parameters}))
    while killed < n:
        exports, runs = home / f"command {runs}", runs + 1
        for _ in range(min(MOST, n - killed)):
            if not kill(command(recipe, exports), chance.uniform(1, took)):
                break
            killed += 1
            tally.counts["of imatch run"] += 1
        if code := finish(partial(command, recipe, exports)):
            said = exports.with_suffix(".log").read_text().strip().splitlines()[-1:]
            tally.fault("wrong bytes", "imatch run", f"{exports.name}: exit code {code}: {said}")
        compare(found(exports), whole, exports.name, tally)
    return runs


def cells(step: str, exports: Path, workers: int) -> int:
    """Start a notebook's cells in a group of processes of its own, which writes to <exports>.log."""
    parameters = chain.given(step) | ({"compute": {"workers": workers}} if step != "05_report" else {})
    if pid := os.fork():
        os.setpgid(pid, pid)  # here, too: it may be killed before it comes to that itself
        return pid
    os.setpgrp()
    code = 1
    try:
        with exports.with_suffix(".log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        chain.execute(step, exports, parameters)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def command(recipe: Path, exports: Path) -> int:
    """Start `imatch run` likewise."""
    arguments = [sys.executable, "-m", "imatch", "run", str(recipe), "--exports", str(exports)]
    with exports.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(arguments, stdout=log, stderr=log, start_new_session=True).pid


def kill(pid: int, after: float) -> bool:
    """Kill a group of processes after some seconds; False if it had ended by then."""
    ends = time.monotonic() + after
    while time.monotonic() < ends:
        if os.waitpid(pid, os.WNOHANG)[0]:
            reap()
            return False
        time.sleep(min(0.01, after / 10))
    os.killpg(pid, signal.SIGKILL)
    while left := psutil.Process().children(recursive=True):  # kernels are in groups of their own
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        reap()
    return True


def finish(start: Callable[[], int]) -> int:
    """Let a group of processes end; its exit code."""
    code = os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1])
    reap()
    return code


def reap() -> None:
    """Wait until the last process is gone, before anybody looks at its files."""
    try:
        while True:
            os.wait()
    except ChildProcessError:
        return


def found(exports: Path) -> dict[str, Any]:
    """All that a run left, but for executed notebooks; of what tells milliseconds only that it is there."""
    timed = re.compile(r".*/recall\.png|run/05_report/.*")
    held = {name: held for name, held in content(exports).items() if not name.endswith((".ipynb", ".lock"))}
    return {name: None if timed.fullmatch(name) else of for name, of in held.items()}


def compare(here: dict[str, Any], whole: dict[str, Any], run: str, tally: Tally) -> None:
    """Count the files that are not those of a run nobody killed."""
    for name in sorted(here.keys() | whole.keys()):
        if name.endswith(".tmp"):
            tally.fault("hidden temporary files left", Path(name).suffixes[0], f"{run}: {name}", bar=False)
        elif name not in here or here[name] != whole.get(name, ""):
            what = "is not there" if name not in here else "is new" if name not in whole else "is another one"
            tally.fault("wrong bytes", f"{name.split('/')[1]} {what}", f"{run}: {name}")


if __name__ == "__main__":
    main()
