"""Give `imatch run` wild parameters by seed: each is taken, or refused in one line; nothing is written elsewhere.

    .venv/bin/python -m tests.drills.parameters [--n 1200] [--seed 0] [--first 0] [--wholes 40] [--kernels 2]

The real command in this process, but for kernels: in their place the cells of the notebook up to the start of its step.
Of the sets that are taken, some run to the end, and some of these by papermill. Values that only the kernel refuses are
listed, and hold no bar.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import yaml
from click.testing import CliRunner

from imatch.cli import batch
from imatch.cli.main import main as imatch
from imatch.viz import figures
from tests.drills import chain
from tests.drills.tally import Tally, asked, outcome, quiet

WILD: dict[type, list[Any]] = {
    int: [0, -1, 1, 2, 7, 100, 10**6, 2**31, 2**70],
    float: [0.0, -1.0, 0.5, 1.0, 1.5, 5, 1e-300, 1e308, math.nan, math.inf, -math.inf, -0.5, 360.0],
    str: [
        *("", " ", "1", "nan", "a\nb", "a\0b", "../x", "ELSEWHERE", "..", "a/b", "C:\\x", "~", "x" * 300, "가" * 90),
        *("🙂", "=1+1", "<img src=x onerror=alert(1)>", "null", "SIFT", "\u202egnp", "%s{}$HOME", "abc", "photographs"),
        *("sift", "dsift", "isometric", "sub2", "sub99", "stop", "recompute", "data-data", "all", "one:00.jpg", "cpu"),
    ],
    list: [
        *([], [[]], [0], [-1], [math.nan], [math.inf], [1e308], ["../x"], [1, 1], [None], [10**6], [True], [0.5], [""]),
        *(["json"], ["png", "png"], ["global.npy"], [{}], [{"folder": ".."}], ["exports/run"], ["/etc"], ["a\nb"]),
    ],
    dict: [{}, {"a": 1}, {"max_keypoints": 0}, {"max_keypoints": -5}, {"kind": "x"}, {"": None}, {"../x": []}],
    type(None): [None],
    bool: [True, False],
}
SECONDS = 60
written: set[str] = set()


def main() -> None:
    """Draw, give, look."""
    given, tally = asked(__doc__, n=1200, first=0, wholes=40, kernels=2), Tally()
    sys.addaudithook(watch)
    signal.signal(signal.SIGALRM, late)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        chain.settle(home, 4)
        base = home / "base"
        with quiet():
            for notebook in chain.NOTEBOOKS:
                chain.execute(notebook, base)
        known = {notebook: batch.schema(home / "notebooks" / f"{notebook}.ipynb") for notebook in chain.NOTEBOOKS}
        figures.show = lambda *_: None
        taken = []
        for n in range(given.first, given.first + given.n):
            one = drawn(np.random.default_rng([given.seed, n]), n, known, home)
            if give(one, base, tally, whole=False) == "done":
                taken.append(one)
        for one in taken[: given.wholes]:
            tally.counts[f"run to the end: {give(one, base, tally, whole=True)}"] += 1
        for one in taken[len(taken) - given.kernels :]:
            command = [sys.executable, "-m", "imatch", *one.arguments, "--exports", str(place(one, base))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            tally.counts[f"run by a kernel: exit code {done.returncode}"] += 1
            if "Traceback" in done.stdout + done.stderr:
                tally.fault("tracebacks", one.group, f"{one.label}, by a kernel")
    tally.end(f"{given.n:,} parameter sets ({tally.counted()})", "silent wrong", "tracebacks", "written elsewhere")


@dataclass(frozen=True)
class Asked:
    """A set of parameters: of a notebook, the wild ones, and the command's arguments."""

    notebook: str
    wild: Mapping[str, Any]
    recipe: Path
    arguments: Sequence[str]

    @property
    def group(self) -> str:
        """What its faults are listed by."""
        return next(iter(self.wild))

    @property
    def label(self) -> str:
        """Its number, and what is wild."""
        shown = ", ".join(f"{name}: {value!r:.40}" for name, value in self.wild.items())
        return f"{self.recipe.stem} {self.notebook} {shown}"


def drawn(chance: np.random.Generator, n: int, known: Mapping[str, Any], home: Path) -> Asked:
    """The n-th set; every parameter has its turn, and every fourth set comes by -p in place of the file."""
    every = [(notebook, name) for notebook, schema in known.items() for name in schema]
    notebook, name = every[n % len(every)]
    wild: dict[str, Any] = {}
    if n % 12 == 11:  # a slip of the finger in the name
        at = int(chance.integers(len(name)))
        slips = [name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name[:at] + "x" + name[at + 1 :]]
        wild[str(chance.choice([*slips, name.upper(), "=1+1", "가" * 90]))] = 1
    for one in [name, str(chance.choice(list(known[notebook])))][: 0 if wild else 1 + (n % 3 == 2)]:
        kind = type(known[notebook][one].default)
        of = WILD[kind] if chance.random() < 0.9 else WILD[[*WILD][chance.integers(len(WILD))]]
        value = of[chance.integers(len(of))]
        wild[one] = str(home / "elsewhere") if value == "ELSEWHERE" else value
    recipe = home / f"{n:05d}.yaml"
    parameters = chain.given(notebook) if n % 4 == 1 else {**chain.given(notebook), **wild}
    recipe.write_text(yaml.safe_dump({"notebooks": [notebook], "parameters": parameters}, allow_unicode=True))
    texts = {key: value if isinstance(value, str) else yaml.safe_dump(value).strip() for key, value in wild.items()}
    given = [part for key, text in texts.items() for part in ("-p", key, text)] if n % 4 == 1 else []
    return Asked(notebook, wild, recipe, ["run", str(recipe), *given])


def give(one: Asked, base: Path, tally: Tally, whole: bool) -> str:
    """Give a set to the command; "done" if it was taken, and its step could start, or end."""
    exports = place(one, base)
    began: list[tuple[str, object]] = []

    def execute(path: Path, values: Mapping[str, Any], *_: object) -> str:
        began.append(outcome(lambda: run(path, values, whole)))
        return "stopped here"

    written.clear()
    batch.execute = execute
    signal.alarm(SECONDS)
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        came = CliRunner().invoke(imatch, [*one.arguments, "--exports", str(exports)])
    signal.alarm(0)
    look_around(exports, one, tally)
    what, said = began[-1] if began else ("refused", "")
    if came.exception and not isinstance(came.exception, SystemExit):
        what, said = "traceback", f"{type(came.exception).__name__}: {came.exception}"[:300]
    if what == "traceback":
        tally.fault("tracebacks", one.group, f"{one.label}: {said}")
    if whole:
        return what
    tally.counts[{"done": "taken", "refused": "refused", "traceback": "tracebacks"}[what]] += 1
    if what == "refused" and began:
        tally.fault("refused only by the kernel", one.group, f"{one.label}: {said}"[:300], bar=False)
    elif what == "refused" and (came.stderr.count("\n") != 1 or len(came.stderr) > 1000):
        tally.fault("refused, and not in one line", one.group, f"{one.label}: {came.stderr!r}"[:300])
    elif what == "done" and any(value != value or value in (math.inf, -math.inf) for value in one.wild.values()):
        tally.fault("silent wrong", one.group, f"{one.label}: taken")
    return what


def run(path: Path, values: Mapping[str, Any], whole: bool) -> None:
    """Run a notebook's cells, all or those up to the start of its step."""
    variables: dict[str, Any] = {}
    for cell in (cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"):
        exec(compile(cell.source, path.name, "exec"), variables)
        if "parameters" in cell.metadata.get("tags", []):
            variables.update(values)
        elif ".start_" in cell.source and not whole:
            return


def place(one: Asked, base: Path) -> Path:
    """A folder for exports that holds what the notebook reads, in one that is watched."""
    exports = one.recipe.with_suffix("") / "exports"
    shutil.rmtree(exports.parent, ignore_errors=True)
    (exports / "run").mkdir(parents=True)
    for before in chain.NOTEBOOKS[: chain.NOTEBOOKS.index(one.notebook)]:
        ignored = shutil.ignore_patterns("*.png", "*.html")
        shutil.copytree(base / "run" / before, exports / "run" / before, ignore=ignored)
    return exports


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: which files and folders this process makes, changes or removes."""
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, (str, bytes)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.add(os.fsdecode(path))
    elif event in ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "shutil.rmtree"):
        written.update(os.fsdecode(one) for one in arguments if isinstance(one, (str, bytes)))


def look_around(exports: Path, one: Asked, tally: Tally) -> None:
    """What was written that is not below exports; and what lies beside them."""
    own = (f"{exports}/", "/dev/", "/proc/", str(Path.home() / ".cache"), str(Path.home() / ".config"))
    for path in sorted(written):
        there = os.path.abspath(path)  # noqa: PTH100  (links are not followed)
        if there != str(exports) and not there.startswith(own) and "__pycache__" not in there:
            tally.fault("written elsewhere", one.group, f"{one.label}: {there}")
            break
    shutil.rmtree(exports.parent)


def late(*_: object) -> None:
    raise TimeoutError(f"not done after {SECONDS} s")


if __name__ == "__main__":
    main()
