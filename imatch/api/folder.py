"""The photographs of a folder matched with each other in memory: what belongs together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm

from imatch.api.match import TURNS, Described, describe, device_of, matched, weights_of, write_table
from imatch.api.query import exact
from imatch.core import compute, files, settings
from imatch.core.rows import Json, MatchRow
from imatch.core.types import ImatchError
from imatch.data import images
from imatch.features.base import create_backbone

RETRIEVED, NEAREST = 200, 20
"""In a folder of more photographs than the first, each is matched with so many nearest ones by global vector."""


@dataclass(frozen=True)
class FolderMatches:
    """The pairs of a folder. As text it is a table of what belongs together.

    Attributes:
        names: of the photographs that were matched, sorted.
        pairs: a row a pair, as `Match.row`.
        groups: names of photographs that belong together, the largest group first; those that match none are in none.
        skipped: name -> why it could not be read.
        retrieved: whether each photograph was matched with its nearest ones alone, and not with all.
        lacking: what weight "auto" had to do without.
        left_out: what else the folder holds (`images.Listed`).
    """

    names: list[str]
    pairs: list[MatchRow]
    groups: list[list[str]]
    skipped: dict[str, str]
    retrieved: bool
    lacking: str = ""
    left_out: str = ""

    def __str__(self) -> str:
        verified = sorted((row for row in self.pairs if row["verified"]), key=lambda row: -row["inliers"])
        wide = max([len(files.printable(row[side])) for row in verified for side in ("query", "candidate")] + [9])
        head = f"{'photograph':<{wide}}  {'shown by':<{wide}}  inliers  by     rotated  times as large"
        lines = [head] if verified else []
        for row in verified:
            shown = (files.printable(row[side]) for side in ("query", "candidate"))
            angle = round(row["rotation"] or 0.0, 1) + 0.0
            text = "  ".join(f"{name:<{wide}}" for name in shown)
            about = "~" if row["kind"] == "general" else ""
            turned = about + format(angle, ".1f")
            lines.append(f"{text}  {row['inliers']:7d}  {row['weight']:<6} {turned:>7}  {row['scale']:14.2f}")
        which = f"nearest {NEAREST} of each" if self.retrieved else "all"
        pairs = f"{len(verified)} of {len(self.pairs)} pairs ({which})"
        lines += ["", f"{pairs} of {len(self.names)} photographs match{self.left_out}"]
        for number, group in enumerate(self.groups, 1):
            lines.append(f"group {number}: {', '.join(map(files.printable, group))}")
        alone = len(self.names) - sum(map(len, self.groups))
        lines += [f"{alone} photographs match no other"] if alone else []
        lines += [self.lacking] if self.lacking else []
        lines += [f"left out: {files.printable(name)}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines).lstrip("\n")

    @property
    def verified(self) -> bool:
        """Whether any pair shows the same."""
        return any(row["verified"] for row in self.pairs)

    def record(self) -> dict[str, Json]:
        """All of it as plain JSON."""
        return {
            "photographs": self.names,
            "pairs": cast("list[Json]", self.pairs),
            "groups": self.groups,
            "skipped": self.skipped,
            "lacking": self.lacking,
            "left_out": self.left_out.removeprefix("; left out: "),
        }

    def save(self, path: str | Path) -> Path:
        """Write the pairs as a CSV, which 04_match takes as its list, too.

        Raises:
            ImatchError: another ending than .csv, or a place that cannot be written to.
        """
        return write_table(path, self.pairs)


def match_folder(
    folder: str | Path, weight: str = "auto", *, device: str = "auto", data_key: str = settings.DATA_KEY
) -> FolderMatches:
    """Match the photographs of a folder with each other.

    All pairs are matched or, of more than 200 photographs, each with its 20 nearest by global vector, without a second
    look. By weight "auto" what sift does not verify is asked of xfeat, for the 20 nearest of each.

    Args:
        folder: of the photographs; those in folders below it count, too.
        weight, device, data_key: as of `match`.

    Raises:
        ImatchError: no such folder, fewer than two photographs that can be read, or more than fit into memory.
    """
    folder = settings.from_workspace(folder)
    weights, lacking = weights_of(weight)
    first, *others = (create_backbone(w, data_key=data_key, device=device_of(w, weight, device)) for w in weights)
    instead = f"use imatch run params/pairs.yaml -p dataset {folder}, which keeps them on disk"
    listed = images.list_photographs(folder)
    sources: dict[str, Path | np.ndarray] = {name: folder / name for name in listed}
    copies = {"xfeat": 1 + len(TURNS)}
    found, skipped = describe(sources, first, weights[0], copies=copies.get(weights[0], 1), instead=instead)
    names = [one.name for one in found]
    if len(names) < 2:
        left_out = "".join(f"; {files.printable(name)}: {why}" for name, why in skipped.items())
        held = f"{folder} holds {len(names)} that can be read"
        raise ImatchError(f"two photographs are needed, and {held}{left_out}{listed.left_out}")
    pairs = _nearest(found) if len(names) > RETRIEVED else list(itertools.combinations(found, 2))
    rows = {(row["query"], row["candidate"]): row for row in _rows(pairs, weights[0], settings.cores())}
    for backbone, other in zip(others, weights[1:], strict=True):
        kept = {name: sources[name] for name in names}
        found, _ = describe(kept, backbone, other, copies=copies.get(other, 1), instead=instead)
        done = {pair for pair, row in rows.items() if row["verified"]}
        pairs = [(a, b) for a, b in _nearest(found) if (a.name, b.name) not in done]
        for row in _rows(pairs, other, 1):  # its network has threads of its own
            before = rows.get(pair := (row["query"], row["candidate"]))
            both = f"{weights[0]}: {before['reason']}; {other}: {row['reason']}" if before else row["reason"]
            rows[pair] = row if row["verified"] or not before else {**before, "reason": both}
    told = [rows[pair] for pair in sorted(rows)]
    together = [(row["query"], row["candidate"]) for row in told if row["verified"]]
    several = len(names) > RETRIEVED
    return FolderMatches(names, told, groups(together), skipped, several, lacking, listed.left_out)


def _rows(pairs: Sequence[tuple[Described, Described]], weight: str, workers: int) -> Iterator[MatchRow]:
    """The rows of pairs in order, by threads; with a bar on a terminal alone."""

    def row(pair: tuple[Described, Described]) -> MatchRow:
        return matched(*pair, rotate=weight == "xfeat").row

    rows = compute.ahead(row, pairs, workers, 2 * workers)
    return iter(tqdm(rows, f"match by {weight}", len(pairs), disable=None, delay=1))


def _nearest(photographs: Sequence[Described]) -> list[tuple[Described, Described]]:
    """Each photograph with its `NEAREST` by cosine, each pair once, in order."""
    vectors = np.array([one.tokens.vector for one in photographs])
    found = exact(vectors, vectors, NEAREST + 1).rows.tolist()
    others = ((q, [i for i in rows if i not in (q, -1)][:NEAREST]) for q, rows in enumerate(found))
    pairs = {(min(q, i), max(q, i)) for q, nearest in others for i in nearest}
    return [(photographs[i], photographs[j]) for i, j in sorted(pairs)]


def groups(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """What is connected by pairs, directly or through others: the largest group first, each sorted.

    >>> groups([("a", "b"), ("x", "y"), ("c", "b")])
    [['a', 'b', 'c'], ['x', 'y']]
    """
    of: dict[str, set[str]] = {}
    for a, b in pairs:
        joined = of.get(a, {a}) | of.get(b, {b})
        for name in joined:
            of[name] = joined
    found = {id(group): sorted(group) for group in of.values()}
    return sorted(found.values(), key=lambda group: (-len(group), group))
