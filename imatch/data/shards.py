"""Tokens on disk in shards, the unit of resuming: written atomically, then gathered into one list and one array."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatch.core.files import atomic, read_array, read_json, read_rows, write_array, write_json, write_rows
from imatch.core.rows import PhotoRow
from imatch.core.types import StepError, Tokens, grid_xy
from imatch.data.embeddings import vector_digest


@dataclass(frozen=True)
class Shards:
    """The shards of a step's folder.

    Attributes:
        folder: the step's folder.

    >>> import tempfile
    >>> tokens = Tokens(np.ones(1), np.eye(3), np.zeros((3, 2)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     shards = Shards(Path(folder))
    ...     shards.write(0, [{"id": "a.jpg", "size": (9, 9), "sha256": ""}], [tokens])
    ...     shards.has(0), shards.merge(), shards.merged
    (True, {}, True)
    """

    folder: Path

    @property
    def merged(self) -> bool:
        """Whether the shards' rows and vectors have been gathered into images.jsonl and global.npy."""
        return (self.folder / "images.jsonl").is_file()

    def has(self, shard: int) -> bool:
        """Whether a shard is there in full."""
        return self._path(shard, ".jsonl").is_file()

    def begun(self) -> set[int]:
        """The numbers of all shards of which something is there."""
        return {int(path.name.partition(".")[0]) for path in (self.folder / "local").glob("[0-9]*.npy")}

    def rows(self, wanted: Container[int] | None = None) -> dict[int, list[PhotoRow]]:
        """The rows of every whole shard, or of those wanted, sorted by id, skipped ones included."""
        if self.merged:
            images, skipped = (read_rows(self.folder / f"{name}.jsonl") for name in ("images", "skipped"))
            shards: dict[int, list[PhotoRow]] = {}
            for row in sorted([*images, *skipped], key=lambda row: row["id"]):
                if wanted is None or row["shard"] in wanted:
                    shards.setdefault(row["shard"], []).append(row)
            return shards
        paths = {int(path.stem): path for path in sorted((self.folder / "local").glob("*.jsonl"))}
        return {shard: read_rows(path) for shard, path in paths.items() if wanted is None or shard in wanted}

    def write(
        self,
        shard: int,
        rows: Sequence[PhotoRow],
        tokens: Sequence[Tokens],
        dtype: type[np.floating | np.int8] | None = np.float16,
    ) -> None:
        """Write the photographs of one shard; its `.jsonl`, written last, says that it is whole.

        Args:
            shard: its number.
            rows: one a photograph in order, skipped ones (with "skipped") included.
            tokens: those of the rows that are not skipped, in order, xy in pixels of the original photographs.
                Positions are written unless they are those of `grid_xy`, or NaN: nowhere.
            dtype: of the local descriptors on disk; None keeps theirs. int8 has a scale beside it (`to_int8`).
        """
        used = [row for row in rows if "skipped" not in row]
        placed_apart = any(_placed_apart(one, row["size"]) for row, one in zip(used, tokens, strict=True))
        if tokens:
            local = np.concatenate([t.descriptors for t in tokens])
            if dtype is np.int8:
                local, scale = to_int8(local)
                write_array(self._path(shard, ".scale.npy"), scale)
            write_array(self._path(shard, ".npy"), local.astype(dtype or local.dtype))
            vectors = np.stack([t.vector for t in tokens])
            write_array(self._path(shard, ".global.npy"), vectors.astype(np.float32))
            if placed_apart:
                xy = np.concatenate([t.xy for t in tokens])
                write_array(self._path(shard, ".xy.npy"), xy.astype(np.float32))
        first, placed, rest = 0, [], iter(tokens)
        for row in rows:
            if "skipped" not in row:
                one = next(rest)
                n = len(one.descriptors)
                row = {**row, "grid": one.grid, "xy": placed_apart, "shard": shard, "first": first, "n": n}
                row["vector"] = vector_digest(one.vector)
                first += n
            placed.append({**row, "shard": shard})
        write_rows(self._path(shard, ".jsonl"), placed)

    def write_work(self, shard: int, work: Mapping[str, float]) -> None:
        """Put down what a shard took, until `merge` adds up what all processes did."""
        write_json(self._path(shard, ".work.json"), dict(work))

    def merge(self) -> dict[str, float]:
        """Gather the shards' vectors and rows: global.npy, skipped.jsonl and, last, images.jsonl.

        Returns:
            What the shards took (`write_work`), added up.
        """
        rows = sorted((row for rows in self.rows().values() for row in rows), key=lambda row: row["id"])
        images = [row for row in rows if "skipped" not in row]
        places = _places(images)
        shapes = {shard: read_array(self._path(shard, ".global.npy")).shape for shard in places}
        if any(shapes[shard][0] != len(own) for shard, own in places.items()):
            raise StepError(f"{self.folder}: the shards' vectors and rows do not fit; delete the folder and run again")
        with atomic(self.folder / "global.npy") as temporary, temporary.open("wb") as file:
            shape, taken = (len(images), next(iter(shapes.values()))[1]), Counter[int]()
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for shard, run in itertools.groupby(images, lambda row: row["shard"]):  # as a rule, all of a shard
                first, n = taken[shard], len(list(run))
                part = read_array(self._path(shard, ".global.npy"))[first : first + n]
                file.write(np.ascontiguousarray(part).data.cast("B"))
                taken[shard] += n
        write_rows(self.folder / "skipped.jsonl", (row for row in rows if "skipped" in row))
        work: Counter[str] = Counter()
        for path in (self.folder / "local").glob("*.work.json"):
            work.update(read_json(path))
        write_rows(self.folder / "images.jsonl", images)
        self.clean()
        return dict(work)

    def clean(self) -> None:
        """Remove what merging has made needless."""
        for pattern in ("*.jsonl", "*.global.npy", "*.work.json"):
            for path in (self.folder / "local").glob(pattern):
                path.unlink()

    def split(self) -> None:
        """Undo `merge`, so that single shards can be computed again."""
        vectors = read_array(self.folder / "global.npy")
        for shard, own in _places(read_rows(self.folder / "images.jsonl")).items():
            write_array(self._path(shard, ".global.npy"), vectors[own])
        for shard, rows in self.rows().items():
            write_rows(self._path(shard, ".jsonl"), rows)
        (self.folder / "images.jsonl").unlink()

    def remove(self, shard: int) -> None:
        """Remove a shard, its mark of being whole first."""
        for suffix in (".jsonl", ".npy", ".scale.npy", ".xy.npy", ".global.npy", ".work.json"):
            self._path(shard, suffix).unlink(missing_ok=True)

    def _path(self, shard: int, suffix: str) -> Path:
        return self.folder / "local" / f"{shard:05d}{suffix}"


def _places(images: Sequence[PhotoRow]) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for place, row in enumerate(images):
        places.setdefault(row["shard"], []).append(place)
    return places


def to_int8(descriptors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors as whole numbers of a byte times a scale each; no number is off by more than half of it.

    Args:
        descriptors: (n, d) float.

    Returns:
        whole: (n, d) int8 in [-127, 127].
        scale: (n,) float32, max |x| / 127 of each; in float16 it would lose digits where a descriptor is small.

    >>> whole, scale = to_int8(np.array([[254.0, -127.5], [0.0, 0.0]]))
    >>> whole.tolist(), scale.tolist()
    ([[127, -64], [0, 0]], [2.0, 0.0])
    """
    scale = (np.abs(descriptors.astype(np.float32)).max(axis=1, initial=0) / np.float32(127)).astype(np.float32)
    steps = descriptors / np.where(scale > 0, scale, 1)[:, None]
    return np.clip(np.rint(steps), -127, 127).astype(np.int8), scale


def _placed_apart(tokens: Tokens, size: tuple[int, int]) -> bool:
    if len(tokens.xy) and np.isnan(tokens.xy).all():  # nowhere, as aggregated tokens
        return False
    return tokens.grid is None or not np.array_equal(tokens.xy, grid_xy(tokens.grid, size))
