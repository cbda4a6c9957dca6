"""Pairs for COLMAP, as text that its `feature_importer` and `matches_importer` read
(https://colmap.github.io/tutorial.html, "Feature Detection and Extraction" and "Feature Matching")."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatch.core import files
from imatch.core.config import below
from imatch.core.rows import PairRow
from imatch.core.types import ImatchError, ImatchWarning, Pair
from imatch.data import exif
from imatch.export.outputs import Sink

CENTRE = 0.5
"""Where COLMAP has the centre of the top-left pixel; ours is at 0. It takes pixels as they lie in the file, so what
EXIF says of the orientation is undone."""
DESCRIPTOR = " ".join(["1 0"] + ["0"] * 128)
"""Scale, orientation and 128 numbers that the format asks for, and nobody reads."""


@dataclass(frozen=True)
class Colmap(Sink):
    """Keypoints, and matches between them.

    The folder colmap/ of the step has keypoints/<id>.txt, the positions of a photograph over all its pairs;
    matches.txt, all correspondences, for COLMAP to verify; inliers.txt, those that the geometry of a verified pair
    explains:

        colmap feature_importer --database_path D --image_path PHOTOGRAPHS --import_path colmap/keypoints
        colmap matches_importer --database_path D --match_list_path colmap/inliers.txt --match_type inliers

    or matches.txt with --match_type raw. <path>.colmap holds a pair until then: a .npy, (m, 5) float32, x and y in
    A and B in COLMAP's pixels, inlier (1 or 0).
    """

    def __call__(self, path: Path, pair: Pair) -> None:
        """See `Sink`; writes `<path>.colmap`.

        Raises:
            ImatchError: the photographs do not lie in one folder, which COLMAP's names are relative to.
        """
        roots = {
            str(of).removesuffix(pair.row[side]) for of, side in zip(pair.paths, ("query", "candidate"), strict=True)
        }
        if len(roots) > 1:
            raise ImatchError(
                f"COLMAP wants all photographs in one folder, but {' and '.join(sorted(roots))} are two: match the "
                "pairs of one 01_embed, or leave colmap out of outputs"
            )
        a, b = (
            exif.stored(xy, size, exif.orientation(of)) + CENTRE
            for xy, size, of in zip((pair.xy_a, pair.xy_b), pair.sizes, pair.paths, strict=True)
        )
        table = np.column_stack([a, b, pair.geometry.inliers]).astype(np.float32)
        files.write_array(path.with_name(path.name + ".colmap"), table)

    def gather(self, folder: Path, pairs: Iterable[tuple[Path, PairRow]]) -> None:
        """See `Sink`. Refined positions are of one pair alone, so a photograph's keypoints are all that its pairs have.

        A photograph whose name holds a space, or is so long that no .txt can follow it, is left out, with a warning: a
        list of matches cannot name the one, nor a folder hold the other's keypoints.
        """
        tables: dict[tuple[str, str], tuple[Path, bool]] = {}
        left_out = set()
        for path, row in pairs:
            names = (row["query"], row["candidate"])
            unfit = {name for name in names if any(c.isspace() for c in name) or os.fsencode(Path(name).name)[251:]}
            left_out |= unfit
            if not unfit and names[0] != names[1] and names[::-1] not in tables:  # COLMAP has one for both orders
                tables[names] = path.with_name(path.name + ".colmap"), row["verified"]
        if left_out:
            warnings.warn(
                f"{len(left_out)} photographs are not in {folder}, such as {min(left_out)!r}: COLMAP's lists of "
                "matches cannot hold names with spaces, nor folders longer ones; rename them if you need them there",
                ImatchWarning,
                stacklevel=2,
            )
        keypoints: dict[str, np.ndarray] = {}
        for names, (path, _) in tables.items():
            for name, points in zip(names, _points(files.read_array(path)), strict=True):
                keypoints[name] = np.union1d(keypoints.get(name, points[:0]), points)
        files.check_apart(folder.parent, keypoints)
        for name, points in keypoints.items():
            lines = [f"{len(points)} 128", *(f"{p.real:.3f} {p.imag:.3f} {DESCRIPTOR}" for p in points)]
            files.write_bytes(folder / "keypoints" / below(f"{name}.txt", "photograph", folder), _text(lines))
        for name, only_inliers in (("matches.txt", False), ("inliers.txt", True)):
            with files.atomic(folder / name) as temporary, temporary.open("wb") as file:
                for names, (path, verified) in tables.items():
                    table = files.read_array(path)
                    table = table[table[:, 4] > 0] if only_inliers else table
                    if len(table) and (verified or not only_inliers):
                        found = zip(names, _points(table), strict=True)
                        places = [np.searchsorted(keypoints[name], points).tolist() for name, points in found]
                        rows = (f"{a} {b}" for a, b in zip(*places, strict=True))
                        file.write(_text([" ".join(names), *rows, ""]))


def _points(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where A and B have them, each (m,) complex64, which numpy can sort and look up."""
    both = np.ascontiguousarray(table[:, :4], np.float32).view(np.complex64)
    return both[:, 0], both[:, 1]


def _text(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
