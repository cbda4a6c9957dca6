"""What all drills share: their arguments, the count of what happened, and the line of figures at the end."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from imatch.core.types import ImatchError

LISTED = 20
"""So many faults of a kind are listed."""


def asked(doc: str | None, **numbers: int) -> argparse.Namespace:
    """The command line: whole numbers with their defaults, and the seed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**numbers, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


class Tally:
    """How often what happened; what is wrong also by name.

    Attributes:
        counts: what -> how often.
        faults: kind -> group -> a line each.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: dict[str, dict[str, list[str]]] = {}
        self.lenient: set[str] = set()
        self.started = time.monotonic()

    def fault(self, kind: str, group: str, line: str, bar: bool = True) -> None:
        """Count something wrong; of each group, one is listed. What holds no bar is only listed."""
        if not bar:
            self.lenient.add(kind)
        self.faults.setdefault(kind, {}).setdefault(group, []).append(line)

    def end(self, figures: str, *kinds: str) -> None:
        """List faults and print the line of figures with how many of each kind; exit code 1 if there are any."""
        for kind, groups in self.faults.items():
            print(f"{kind}:")
            for group, lines in [*groups.items()][:LISTED]:
                print(f"  {group} ({len(lines)}): {lines[0]}")
            if len(groups) > LISTED:
                print(f"  ... and {len(groups) - LISTED} more kinds")
        wrong = dict.fromkeys(kinds, 0) | {kind: sum(map(len, of.values())) for kind, of in self.faults.items()}
        shown = ", ".join(f"{kind} {n}" for kind, n in wrong.items())
        print(f"{figures}: {shown} ({time.monotonic() - self.started:.0f} s)", flush=True)
        sys.exit(bool(self.faults.keys() - self.lenient))

    def counted(self) -> str:
        """The counts, the most frequent first."""
        return ", ".join(f"{n:,} {what}" for what, n in self.counts.most_common())


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Show nothing that is said in the block, by C libraries and other processes neither: its lines, after it."""
    sys.stdout.flush()
    kept, lines = [os.dup(1), os.dup(2)], list[str]()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            said.seek(0)
            lines += said.read().splitlines()
            for stream, was in zip((1, 2), kept, strict=True):
                os.dup2(was, stream)
                os.close(was)


def outcome(call: Callable[[], object]) -> tuple[str, object]:
    """Give ("done", what it returns), ("refused", the message) or ("traceback", what was raised, in a line)."""
    try:
        return "done", call()
    except ImatchError as error:
        return "refused", str(error)
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
