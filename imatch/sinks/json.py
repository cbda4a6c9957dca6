"""A pair as JSON for people and programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imatch import store
from imatch.records import Pair
from imatch.sinks import Sink


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
        store.write_bytes(path.with_name(path.name + ".json"), text.encode(errors="surrogateescape"))


def record(pair: Pair) -> dict[str, Any]:
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


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
