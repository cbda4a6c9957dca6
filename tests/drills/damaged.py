"""Damage each kind of file of a finished run of all five notebooks, and let everything that reads it read it.

    .venv/bin/python -m tests.drills.damaged [--n 450] [--seed 0] [--first 0]

Readers are the notebooks' own cells without their pictures: those after it, each afresh, whose results are compared
with those of the whole run, then its own once more; and `imatch doctor STEP`. Fine is: noticed by one of them, and no
reader gives another result without a word.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner

from imatch.cli.main import main as imatch
from imatch.core import files
from imatch.core.step import open_step
from imatch.viz import curves, figures, html
from tests.drills import chain
from tests.drills.tally import Tally, asked, outcome, quiet
from tests.test_resume import content
from tests.test_steps import without_times

READERS = {
    "01_embed": ["03_index", "02_references", "04_match", "05_report"],
    "02_references": ["03_index", "04_match", "05_report"],
    "03_index": ["04_match", "05_report"],
    "04_match": ["05_report"],
    "05_report": [],
}
"""Step -> the notebooks that read its files."""
HOW = ("empty", "half", "all but a byte", "flip", "NULs", "delete", "swap")
PICTURES = (".png", ".html", ".jpg")


def main() -> None:
    """Damage, read, count."""
    given, tally = asked(__doc__, n=450, first=0), Tally()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        chain.settle(home, 4)
        with quiet():
            for notebook in chain.NOTEBOOKS:
                chain.execute(notebook, home / "whole")
            for module in (figures, curves, html):
                for drawing in [key for key, one in vars(module).items() if isinstance(one, types.FunctionType)]:
                    setattr(module, drawing, lambda *_, **__: "")
        every = kinds(home / "whole")
        expected = {name: results(home / "whole", name) for name in chain.NOTEBOOKS}
        for name in chain.NOTEBOOKS:  # first, a run that nobody damaged: the readers have nothing to say of it
            read(home, every[f"{name} step.json"][0], "not at all", expected, tally)
        if tally.faults or tally.counts["noticed"]:
            raise SystemExit(f"the drill is wrong, for of a whole run is said: {tally.faults} {tally.counts}")
        tally.counts.clear()
        # each kind of file has its turn with each kind of damage; of pictures two kinds are enough
        todo = [(kind, how) for how in HOW for kind in every if not kind.endswith(PICTURES) or how in HOW[1:4:2]]
        for n in range(given.first, given.first + given.n):
            (kind, how), chance = todo[n % len(todo)], np.random.default_rng([given.seed, n])
            read(home, every[kind][chance.integers(len(every[kind]))], how, expected, tally, chance, n)
    doctor = "" if tally.counts.pop("doctor", 0) else "; there is no `imatch doctor STEP`"
    tally.end(f"{given.n} damaged files ({tally.counted()}{doctor})", "silent wrong", "tracebacks", "noticed by nobody")


def kinds(exports: Path) -> dict[str, list[Path]]:
    """Step and name without its numbers -> such files, relative to exports."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in exports.rglob("*") if path.is_file()):
        below = path.relative_to(exports)
        part = "views " if "views" in below.parts else ""
        name = "PAIR" if "pairs" in below.parts else re.sub(r"\d+", "#", path.stem)
        found.setdefault(f"{below.parts[1]} {part}{name}{path.suffix}", []).append(below)
    return found


def results(exports: Path, notebook: str) -> dict[str, Any]:
    """What a notebook made, but for pictures, the record of it, and times."""
    held = content(exports / "run" / notebook)
    return {name: of for name, of in held.items() if not name.endswith((*PICTURES, "step.json", "seen.jsonl", ".lock"))}


def read(
    home: Path, file: Path, how: str, expected: Mapping[str, Any], tally: Tally, chance: Any = None, n: int = 0
) -> None:
    """Damage a file of a copy of the whole run, and let its readers say what it holds."""
    exports, notebook = home / "damaged", file.parts[1]
    shutil.rmtree(exports, ignore_errors=True)
    shutil.copytree(home / "whole", exports)
    if how != "not at all" and not damage(exports / file, how, chance):
        tally.counts["nothing to damage"] += 1
        return
    label, group = f"{n:04d} {how}: {file}", f"{notebook} {re.sub(r'[0-9]+', '#', file.name)}"
    said = [examined(exports, file, tally)]
    for reader in [] if file.suffix in PICTURES else READERS[notebook]:
        kept = exports.with_name("kept")
        shutil.rmtree(kept, ignore_errors=True)
        (exports / "run" / reader).rename(kept)
        with quiet() as lines:
            what, held = outcome(lambda reader=reader: chain.execute(reader, exports))
        left = [line for line in lines if line.startswith("left out: ") and "is damaged" in line]
        if what == "refused":
            said.append(str(held))
        elif what == "traceback":
            tally.fault("tracebacks", f"{group} by {reader}", f"{label}: {held}")
            tally.counts["crashed"] += 1
        else:
            said += left or [compared(exports, reader, expected[reader], (group, label), tally)]
        shutil.rmtree(exports / "run" / reader, ignore_errors=True)
        kept.rename(exports / "run" / reader)
    with quiet():
        what, held = outcome(lambda: chain.execute(notebook, exports))
    if what == "traceback":
        tally.fault("tracebacks", f"{group} by {notebook} again", f"{label}: {held}")
        tally.counts["crashed"] += 1
    healed = (
        what == "done"
        and (exports / file).is_file()
        and (outcome(lambda: same(exports / file, home / "whole" / file)) == ("done", True))
    )
    said.append(str(held) if what == "refused" else "")
    told, crashed = [one for one in said if one], tally.counts.pop("crashed", 0)
    where = str(exports / file)
    if told and not any(file.name in one or str(Path(where).parent) in one for one in told):
        tally.fault("noticed, and the file not named", group, f"{label}: {told[0]}"[:300], bar=False)
    tally.counts["noticed" if told else "made anew" if healed else "tracebacks" if crashed else "unnoticed"] += 1
    if not (told or healed or crashed):
        tally.fault("noticed by nobody", group, label)


def damage(path: Path, how: str, chance: Any) -> bool:
    """Damage a file; False if there is nothing to damage."""
    data, beside = path.read_bytes(), [one for one in path.parent.glob(f"*{path.suffix}") if one != path]
    if how == "delete":
        path.unlink()
        return True
    at = int(chance.integers(max(len(data), 1)))
    flipped = data[:at] + bytes([data[at] ^ 1 << chance.integers(8)]) + data[at + 1 :] if data else data
    other = {"empty": b"", "half": data[: len(data) // 2], "all but a byte": data[:-1], "flip": flipped}
    other |= {"NULs": bytes(len(data)), "swap": beside[0].read_bytes() if beside else data}
    path.write_bytes(other[how])
    return other[how] != data


def examined(exports: Path, file: Path, tally: Tally) -> str:
    """What `imatch doctor STEP` says of the step that a file belongs to; "" if nothing."""
    step = next((one for one in (exports / file).parents if (one / "step.json").exists()), (exports / file).parent)
    with quiet():
        came = CliRunner().invoke(imatch, ["doctor", str(step)])
    if came.exception and not isinstance(came.exception, SystemExit):
        tally.fault("tracebacks", f"doctor of {file.parts[1]}", f"{file}: {came.exception!r}")
    if "unexpected extra argument" in came.output:
        return ""
    tally.counts["doctor"] += 1
    return came.output if came.exit_code else ""


def compared(exports: Path, reader: str, right: Mapping[str, Any], named: Sequence[str], tally: Tally) -> str:
    """An alarm of a notebook that read a damaged file; results that differ without one are counted."""
    what, found = outcome(lambda: results(exports, reader))
    other = (
        [name for name in right.keys() | found.keys() if found.get(name) != right.get(name)] if what == "done" else []
    )
    steps = [open_step(path.parent, finished=False) for path in (exports / "run" / reader).rglob("step.json")]
    alarms = [alarm for step in steps if step.finished for alarm in step.metrics.get("alarms", [])]
    if other and not alarms:
        # without one of its marks a step is not finished, or none, and a report is of the others
        mark = reader == "05_report" and re.search(r"delete: .*(step|metrics)\.json", named[1])
        kind = "a report without a step that lost its mark" if mark else "silent wrong"
        tally.fault(kind, f"{named[0]} by {reader}", f"{named[1]}: {', '.join(sorted(other))[:120]}", bar=not mark)
    return "; ".join(alarms) if other else ""


def same(path: Path, right: Path) -> bool:
    """Whether a file that was made anew holds what it held, but for times."""
    if path.name in ("step.json", "metrics.json"):  # the record of it
        held = [{**files.read_json(one), "seconds": 0, "work": 0} for one in (path, right)]
    else:
        held = [without_times(one) for one in (path, right)]
    return held[0] == held[1]


if __name__ == "__main__":
    main()
