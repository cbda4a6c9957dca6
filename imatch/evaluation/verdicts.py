"""What people say of matched pairs: accept or reject, one CSV for a data set (not the positions that 03_index reads).

A label is about two photographs, so it holds whatever found the pair. References of another kind are other photographs
and have a file of their own. It lies beside the steps: a person's work must not go when a step is computed anew.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from imatch.core import files
from imatch.core.rows import PairRow
from imatch.core.types import ImatchError
from imatch.evaluation.metrics import mean

COLUMNS = ("query", "candidate", "label")
LABELS = ("accept", "reject")
Labels = dict[tuple[str, str], str]
"""(query, candidate) -> accept or reject."""


def read(file: Path) -> Labels:
    """Read a CSV of labels: the columns query, candidate and label (accept or reject), in any order.

    Args:
        file: where it is; none yet is no labels.

    Raises:
        ImatchError: a column is missing, a label is unknown, or a pair has two labels, and the message names the line;
            or the file is damaged.

    >>> read(Path("none.csv"))
    {}
    """
    if not file.is_file():
        return {}
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    lines = csv.DictReader(io.StringIO(text, newline=""))
    if missing := [name for name in COLUMNS if name not in (lines.fieldnames or ())]:
        raise ImatchError(f"{file} has no column {', '.join(missing)}: its first line must be {','.join(COLUMNS)}")
    labels: Labels = {}
    with files.reading(file, "correct it, or bring it back from a backup"):
        rows = [(lines.line_num, row) for row in lines]
    for line, row in rows:
        where = f"{file}, line {line}"
        query, candidate, label = (files.unmarked(row[name] or "") for name in COLUMNS)
        if label not in LABELS:
            known = " or ".join(LABELS)
            raise ImatchError(f"{where}: label {label!r} is not known: use {known}, or remove the line")
        if labels.setdefault((query, candidate), label) != label:
            both = f"{files.printable(query)} and {files.printable(candidate)}"
            raise ImatchError(f"{where}: {both} have both labels")
    return labels


def write(file: Path, labels: Mapping[tuple[str, str], str]) -> None:
    """Write the labels, sorted and atomically.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(Path(folder) / "a.csv", {("b", "x"): "reject", ("a", "x"): "accept"})
    ...     list(read(Path(folder) / "a.csv").items())
    [(('a', 'x'), 'accept'), (('b', 'x'), 'reject')]
    """
    rows = (dict(zip(COLUMNS, (*pair, labels[pair]), strict=True)) for pair in sorted(labels))
    files.write_bytes(file, files.csv_bytes(COLUMNS, rows))


def label_metrics(pairs: Iterable[PairRow], labels: Mapping[tuple[str, str], str]) -> dict[str, float | None] | None:
    """How well `verified` agrees with what people say of pairs.

    Args:
        pairs: rows of pairs.jsonl.
        labels: (query, candidate) -> "accept" or "reject", such as `verdicts.read` gives them.

    Returns:
        labelled (how many of the pairs have a label), accepted and rejected of them; precision: the share of verified
        ones that people accept; recall: the share of those accepted that are verified, None of nothing. None when no
        pair has a label.

    >>> pairs = [{"query": "q", "candidate": c, "verified": c != "c"} for c in "abc"]
    >>> label_metrics(pairs, {("q", "a"): "accept", ("q", "b"): "reject"})
    {'labelled': 2, 'accepted': 1, 'rejected': 1, 'precision': 0.5, 'recall': 1.0}
    """
    named = [(row["verified"], (row["query"], row["candidate"] or "")) for row in pairs]
    said = [(verified, labels[pair] == "accept") for verified, pair in named if pair in labels]
    if not said:
        return None
    accepted = sum(accept for _, accept in said)
    return {
        "labelled": len(said),
        "accepted": accepted,
        "rejected": len(said) - accepted,
        "precision": mean(accept for verified, accept in said if verified),
        "recall": mean(verified for verified, accept in said if accept),
    }
