"""Kill `imatch run` at random moments, give the same command again, compare every byte with a run that nobody killed.

    .venv/bin/python -m tests.drills.kills [--kills 60] [--seed 0]

The real command on drawn photographs, all five notebooks: its whole group of processes (papermill, kernels, workers) is
killed by SIGKILL, so nothing can be tidied up. Minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.test_resume import content, write_photographs

NOTEBOOKS = ["01_embed", "02_references", "03_index", "04_match", "05_report"]
WANTED = {
    "run": "run",
    "weight": "sift",
    "kind": "legacy",
    "angles": [0, 30],
    "crops": [0.75],
    "candidates": 1,
    "backbone_options": {"max_keypoints": 120},
    "storage.shard_size": 2,
}
MOST = 8
"""So often one run is killed; then it may end."""


def main() -> None:
    """Kill, compare, print one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chance, killed, wrong, left, runs = random.Random(asked.seed), Counter[str](), list[str](), list[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        recipe = home / "drill.yaml"
        dataset = str(write_photographs(home / "photographs"))
        recipe.write_text(json.dumps({"notebooks": NOTEBOOKS, "parameters": {**WANTED, "dataset": dataset}}))
        started = time.monotonic()
        start(recipe, home / "whole").wait()
        took = time.monotonic() - started
        whole = found(home / "whole")
        while killed.total() < asked.kills:
            exports = home / f"killed {runs}"
            runs += 1
            for _ in range(min(MOST, asked.kills - killed.total())):
                process = start(recipe, exports)
                try:
                    process.wait(chance.uniform(0, took))
                    break
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    killed[step_of(exports)] += 1
            if code := start(recipe, exports).wait():
                wrong.append(f"{exports.name}: exit code {code}")
            here = found(exports)
            left += [name for name in here if name.endswith(".tmp")]  # of a picture that was drawn once more
            kept = {name for name in here.keys() | whole.keys() if not name.endswith(".tmp")}
            wrong += [f"{exports.name}: {name}" for name in sorted(kept) if here.get(name) != whole.get(name)]
            print(f"{runs} runs, {killed.total()} kills, {len(wrong)} wrong", flush=True)
    print(*wrong, sep="\n")
    places = ", ".join(f"{n} in {name}" for name, n in sorted(killed.items()))
    told = f"{killed.total()} SIGKILLs ({places}) in {runs} runs of {len(whole)} files"
    print(f"{told}: {len(wrong)} wrong, {len(left)} hidden temporary files left")
    sys.exit(bool(wrong))


def start(recipe: Path, exports: Path) -> subprocess.Popen[bytes]:
    """Start `imatch run` in a group of processes of its own; it writes to <exports>.log."""
    command = [sys.executable, "-m", "imatch", "run", str(recipe), "--exports", str(exports)]
    with exports.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def found(exports: Path) -> dict[str, Any]:
    """All that a run left, but for what tells milliseconds: executed notebooks, a figure and the report."""
    timed = re.compile(r".*(\.ipynb|\.lock|/recall\.png)|run/05_report/.*")
    return {name: held for name, held in content(exports).items() if not timed.fullmatch(name)}


def step_of(exports: Path) -> str:
    """Where a run was when it was killed: the last of the steps that had begun."""
    begun = [name for name in NOTEBOOKS if (exports / "run" / name).is_dir()]
    return begun[-1] if begun else "the start"


if __name__ == "__main__":
    main()
