"""Where results go. A sink is one class and one line in a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Protocol

import numpy as np

from imatch.core import files, rows
from imatch.core.rows import PairRow
from imatch.core.types import Pair


class Sink(Protocol):
    """What imatch asks of a sink."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """Put a pair at `path` with the sink's suffix, atomically; the same pair gives the same bytes, durations apart.

        It may be called in any order and by several processes at once.
        """

    def gather(self, folder: Path, pairs: Iterable[tuple[Path, PairRow]]) -> None:
        """Write into `folder` what needs all pairs, when they are done; by default nothing.

        Args:
            folder: the sink's own, of the step.
            pairs: where each pair was put, and its row.
        """


@dataclass(frozen=True)
class Json(Sink):
    """All that is known of a pair, a key a line: its row (ids, score, counts, geometry and, where it is known, the
    truth), weight, settings, time_ms, the tokens that correspond, and where they lie.

    patch: n_a and n_b tokens, of which n_selected_a and n_selected_b have a partner; grid_a and grid_b, [h, w] or null;
    idx_a and idx_b, rows of the partners, strongest first; similarities, their cosines. xy_a and xy_b are the same
    partners in pixels of the originals, to a thousandth; inliers_mask says which the geometry explains.
    """

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.json`."""
        lines = (f"{json.dumps(key)}: {_compact(value)}" for key, value in record(pair).items())
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        files.write_bytes(path.with_name(path.name + ".json"), text.encode(errors="surrogateescape"))


def record(pair: Pair) -> dict[str, rows.Json]:
    """A pair as plain JSON."""
    matches, (n_a, n_b) = pair.matches, pair.row["descriptors"]
    patch = {
        "n_a": n_a,
        "n_b": n_b,
        "n_selected_a": len(np.unique(matches.index_a)),
        "n_selected_b": len(np.unique(matches.index_b)),
        "grid_a": pair.grids[0],
        "grid_b": pair.grids[1],
        "idx_a": matches.index_a.tolist(),
        "idx_b": matches.index_b.tolist(),
        "similarities": np.round(matches.similarity.astype(float), 6).tolist(),
    }
    return {
        **pair.row,
        "weight": pair.weight,
        "settings": dict(pair.settings),
        "time_ms": pair.time_ms,
        "patch": patch,
        "xy_a": np.round(pair.xy_a.astype(float), 3).tolist(),
        "xy_b": np.round(pair.xy_b.astype(float), 3).tolist(),
        "inliers_mask": pair.geometry.inliers.tolist(),
    }


def _compact(value: rows.Json) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


CORRESPONDENCE = np.dtype(
    [
        ("xy_a", "<f4", 2),
        ("xy_b", "<f4", 2),
        ("similarity", "<f4"),
        ("inlier", "?"),
        ("index_a", "<i4"),
        ("index_b", "<i4"),
    ]
)
"""One correspondence: pixels in both originals, cosine, inlier or not, rows of the descriptors."""


@dataclass(frozen=True)
class Npy(Sink):
    """(m,) correspondences, strongest first, as a structured array of `CORRESPONDENCE`."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.npy`."""
        table = np.zeros(len(pair.matches), CORRESPONDENCE)
        table["xy_a"], table["xy_b"] = pair.xy_a, pair.xy_b
        table["similarity"], table["inlier"] = pair.matches.similarity, pair.geometry.inliers
        table["index_a"], table["index_b"] = pair.matches.index_a, pair.matches.index_b
        files.write_array(path.with_name(path.name + ".npy"), table)


@dataclass(frozen=True)
class Csv(Sink):
    """One row a correspondence, strongest first: pixels in both originals to a thousandth, cosine, inlier (1 or 0)."""

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.csv`."""
        table = np.column_stack([pair.xy_a, pair.xy_b, pair.matches.similarity, pair.geometry.inliers])
        text, formats = StringIO(), [*["%.3f"] * 4, "%.6f", "%d"]
        header = "x_a,y_a,x_b,y_b,similarity,inlier"
        np.savetxt(text, table, formats, delimiter=",", header=header, comments="")
        files.write_bytes(path.with_name(path.name + ".csv"), text.getvalue().encode())
