"""Embeddings on disk: shards written atomically, read by memory map; and the small files beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import PositiveInt

from imatch.core import config, files
from imatch.core.files import read_array, read_rows
from imatch.core.rows import Parameters, PhotoRow, ReferenceRow
from imatch.core.step import Step, open_step
from imatch.core.types import ImatchError, Ranking, StepError, Tokens, check_finite, grid_xy, normalise
from imatch.data.embeddings import Embeddings, apart, vector_digest
from imatch.data.rotations import UPRIGHT, Pose
from imatch.data.shards import Shards

PLACED = ("grid", "xy", "shard", "first", "n", "vector")
"""Where a row's tokens lie."""
MAPS = 16
"""How many shards are kept mapped: each holds an open file."""


def settled(tokens: Tokens, size: tuple[int, int]) -> Tokens:
    """The same tokens; positions that are those of a grid over the whole photograph but for rounding become just those.

    >>> tokens = Tokens(np.ones(1), np.ones((1, 1)), np.array([[7.50001, 7.5]]), grid=(1, 1))
    >>> settled(tokens, (16, 16)).xy.tolist()
    [[7.5, 7.5]]
    """
    if tokens.grid is None:
        return tokens
    xy = grid_xy(tokens.grid, size)
    return replace(tokens, xy=xy) if np.allclose(tokens.xy, xy, rtol=0, atol=1e-3) else tokens


class Stored(Embeddings):
    """Embeddings in a step's folder, memory-mapped, with what the step says of them.

    Attributes:
        folder: the step's folder.

    Raises:
        StepError: the folder holds no embeddings, or its files do not fit each other.
    """

    folder: Path

    def __init__(self, folder: str | Path) -> None:
        object.__setattr__(self, "folder", Path(folder))
        self._check()

    def __repr__(self) -> str:
        return f"Stored({str(self.folder)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stored) and self.folder == other.folder

    def __hash__(self) -> int:
        return hash(self.folder)

    def _check(self) -> None:
        if not Shards(self.folder).merged:
            raise StepError(f"no embeddings at {self.folder}: run the step's notebook, it goes on where it stopped")
        ends: dict[int, int] = {}
        for row in self.rows:
            if row["first"] != ends.get(row["shard"], 0):
                raise StepError(f"{self.folder}: the row of {row['id']} does not follow the one before it")
            ends[row["shard"]] = row["first"] + row["n"]
        if len(self.rows) != len(self.vectors):
            raise StepError(f"{self.folder}: {len(self.vectors)} vectors for {len(self.rows)} photographs")
        if self.ids != sorted(set(self.ids)):
            raise StepError(f"{self.folder}: the ids of images.jsonl are not sorted and unique")
        placed = {row["shard"] for row in self.rows if apart(row)}
        for shard, end in ends.items():
            local = read_array(self._path(shard))
            parts = {"descriptors": local}
            if local.dtype == np.int8:
                parts["scales"] = read_array(self._path(shard, ".scale.npy"))
            if shard in placed:
                parts["positions"] = read_array(self._path(shard, ".xy.npy"))
            for what, part in parts.items():
                if len(part) != end:
                    raise StepError(f"{self.folder}: shard {shard} holds {len(part)} {what} for {end} descriptors")

    @cached_property
    def rows(self) -> list[PhotoRow]:  # type: ignore[override]  # read when it is asked for
        """See `Embeddings`; also xy (whether positions have a file of their own), and shard and first of the tokens."""
        return read_rows(self.folder / "images.jsonl")

    @cached_property
    def _step(self) -> Step:
        return open_step(self.folder, finished=False)

    @property
    def parameters(self) -> Parameters:
        """How they were made."""
        return self._step.parameters

    @property
    def work(self) -> dict[str, float]:
        """What was computed to make them (`core.step.Step`)."""
        return self._step.work

    @property
    def about(self) -> dict[str, str]:
        """What they are: dataset, kind (of references), weight, configuration."""
        return self._step.about

    @property
    def run(self) -> Path:
        """The folder of their run."""
        return self._step.run

    @property
    def root(self) -> Path:
        """The folder that their ids are relative to: of the photographs, or of the references."""
        return self._step.linked("photographs")

    @property
    def data_key(self) -> Path | None:
        """The registry that knows the photographs, if one does."""
        return self._step.linked("data_key") if "data_key" in self._step.links else None

    @cached_property
    def sources(self) -> Embeddings:
        """Those of the photographs that references were made from; of photographs, and of imported ones, themselves."""
        return Stored(self._step.linked("embed")) if "embed" in self._step.links else self

    @cached_property
    def views(self) -> dict[str, ReferenceRow]:
        """The rows of references.jsonl by id; none of photographs."""
        return {row["id"]: row for row in view_rows(self._step)}

    @cached_property
    def skipped(self) -> list[PhotoRow]:
        """See `Embeddings`."""
        return read_rows(self.folder / "skipped.jsonl")

    @cached_property
    def vectors(self) -> np.ndarray:
        """(N, D) float32, L2-normalised global vectors."""
        return read_array(self.folder / "global.npy")

    def _path(self, shard: int, suffix: str = ".npy") -> Path:
        return self.folder / "local" / f"{shard:05d}{suffix}"

    @cached_property
    def _maps(self) -> dict[Path, np.ndarray]:
        return {}

    def _local(self, shard: int, suffix: str = ".npy") -> np.ndarray:
        path = self._path(shard, suffix)
        self._maps[path] = self._maps.pop(path) if path in self._maps else read_array(path)
        while len(self._maps) > MAPS:
            self._maps.pop(next(iter(self._maps)))  # the one not used for longest
        return self._maps[path]

    def tokens(self, row: int) -> Tokens:
        """See `Embeddings.tokens`; descriptors as stored, or float32 of what int8 and scale say."""
        meta = self.rows[row]
        part = slice(meta["first"], meta["first"] + meta["n"])
        grid = meta["grid"] and (meta["grid"][0], meta["grid"][1])
        local = np.asarray(self._local(meta["shard"])[part])
        if local.dtype == np.int8:
            local = local * self._local(meta["shard"], ".scale.npy")[part, None]
        if apart(meta):
            xy = np.asarray(self._local(meta["shard"], ".xy.npy")[part])
        else:
            xy = np.full((meta["n"], 2), np.nan, np.float32) if grid is None else grid_xy(grid, meta["size"])
        return Tokens(np.asarray(self.vectors[row]), local, xy, grid)

    def photograph(self, row: int) -> Path:
        """See `Embeddings.photograph`."""
        return self.root / self.ids[row]

    def check_rows(self) -> None:
        """Raise StepError if a vector is not the one that was written for its row: a moment for 40,000 of them."""
        found = [vector_digest(vector) for vector in self.vectors]
        wrong = [i for i, row in enumerate(self.rows) if row.get("vector", found[i]) != found[i]]
        if wrong:
            owner = {row.get("vector"): row["id"] for row in self.rows}.get(found[wrong[0]])
            whose = f"the vector of {owner}" if owner else "a vector that no photograph of the list has"
            raise StepError(
                f"{self.folder}: {len(wrong)} of {len(self)} rows of global.npy do not belong to images.jsonl: the row "
                f"of {self.ids[wrong[0]]} holds {whose}. Delete the folder and run its notebook again"
            )


ITERATIONS = 10
"""Of k-means."""


def aggregate(descriptors: np.ndarray, tokens: int) -> np.ndarray:
    """A photograph's local descriptors as a few tokens: the centres of a spherical k-means (FAISS, fixed seed).

    Args:
        descriptors: (n, d) float of one photograph; each is L2-normalised first, and those that are zero left out.
        tokens: K, how many to make.

    Returns:
        (K, d) float32 of L2 norm 1. With K descriptors or fewer, these themselves, then rows of zeros.

    Raises:
        ImatchError: tokens is below 1, or a descriptor is not finite.

    >>> aggregate(np.array([[3.0, 4.0], [0.0, 0.0]]), 2).round(3).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    if tokens < 1:
        raise ImatchError(f"tokens is {tokens}: ask for at least 1")
    check_finite("descriptor", descriptors)
    directions = normalise(descriptors.astype(np.float32))
    directions = np.ascontiguousarray(directions[directions.any(axis=1)])
    n, d = directions.shape
    if n <= tokens:
        return np.pad(directions, ((0, tokens - n), (0, 0)))
    import faiss  # an extra that only this function needs

    # without the last two, FAISS warns of few points and leaves out some of many
    few = {"min_points_per_centroid": 1, "max_points_per_centroid": n}
    means = faiss.Kmeans(d, tokens, niter=ITERATIONS, spherical=True, seed=0, **few)
    means.train(directions)
    return normalise(means.centroids)


KEEPS = {
    "float16": "all local descriptors",
    "int8": "all local descriptors, a byte a number",
    "aggregated": "64 aggregated tokens a photograph, which have no positions",
    "global": "no local descriptors",
}
KEEPS_PLACED = ("float16", "int8")
"""Those that keep positions."""
KEEPS_LOCAL = ("float16", "int8", "aggregated")
"""Those that keep local descriptors."""
AGGREGATED = 64
"""Aggregated tokens a photograph."""


@dataclass(frozen=True)
class StorageOptions:
    """What of the tokens is stored, and how.

    Attributes:
        variant: "raw", or "sub2", "sub3": every second, every third row and column of the grid.
        keep: all local descriptors in "float16" or, in half the bytes, "int8"; "aggregated" are 64 that stand for all,
            "global" none; "" is int8 for sift, whose histograms are whole numbers, else float16.
        cfg: the name of the photographs' size in folders and files; "" takes one from `resize`.
        shard_size: photographs a shard, the unit of resuming.

    Raises:
        ImatchError: a value of the wrong type, or an unknown `keep`.
    """

    variant: str = "raw"
    keep: Literal["", "float16", "int8", "aggregated", "global"] = ""
    cfg: str = ""
    shard_size: PositiveInt = 64

    def __post_init__(self) -> None:
        config.check(self, "storage")


def keep_parameter(keep: str, weight: str) -> Parameters:
    """What `keep` adds to the parameters of a step: nothing for float16, which is all that there was before `keep`.

    >>> keep_parameter("int8", "vits16"), keep_parameter("", "vits16"), keep_parameter("", "sift")
    ({'keep': 'int8'}, {}, {'keep': 'int8'})
    """
    keep = keep or ("int8" if weight == "sift" else "float16")
    return {} if keep == "float16" else {"keep": keep}


def keep_of(parameters: Parameters) -> str:
    """What a step of embeddings with such parameters keeps.

    >>> keep_of({"weight": "vits16"})
    'float16'
    """
    return str(parameters.get("keep", "float16"))


def variant_of(parameters: Parameters) -> str:
    """The variant of a step of embeddings and, where it is not the default, what it keeps: a part of folders' names.

    >>> variant_of({"variant": "sub2", "weight": "vits16", "keep": "int8"})
    'sub2_int8'
    """
    kept = keep_of(parameters)
    default = keep_of(keep_parameter("", parameters["weight"]))
    return parameters["variant"] if kept == default else f"{parameters['variant']}_{kept}"


def check_keeps(folder: Path, parameters: Parameters, what: str, enough: Sequence[str] = KEEPS_PLACED) -> None:
    """Refuse what needs more than a step of embeddings kept.

    Args:
        folder, parameters: of the step.
        what: who needs it, for the message.
        enough: those of `KEEPS` that will do.

    Raises:
        StepError: it keeps another one.

    >>> check_keeps(Path("vits16/res256_raw_global"), {"keep": "global"}, "04_match")
    Traceback (most recent call last):
    imatch.core.types.StepError: 04_match needs local descriptors with positions, and vits16/res256_raw_global keeps ...
    """
    if (keep := keep_of(parameters)) not in enough:
        places = "" if "aggregated" in enough else " with positions"
        raise StepError(
            f"{what} needs local descriptors{places}, and {folder} keeps {KEEPS[keep]} (keep {keep}): run 01_embed, "
            f"and 02_references, with storage.keep {' or '.join(enough)}"
        )


def write_kept_shard(folder: Path, shard: int, rows: Sequence[PhotoRow], tokens: Sequence[Tokens], keep: str) -> None:
    """Write one shard of what is kept.

    Args:
        folder: the step's.
        shard, rows, tokens: as of `Shards.write`.
        keep: one of `KEEPS`. "aggregated" are at most `AGGREGATED` directions (`aggregate`), positions NaN.

    >>> import tempfile
    >>> tokens = Tokens(np.ones(1, "f4"), np.eye(3, dtype="f4"), np.zeros((3, 2), "f4"))
    >>> with tempfile.TemporaryDirectory() as name:
    ...     write_kept_shard(Path(name), 0, [{"id": "a.jpg", "size": (9, 9), "sha256": ""}], [tokens], "int8")
    ...     sorted(path.name for path in (Path(name) / "local").iterdir())
    ['00000.global.npy', '00000.jsonl', '00000.npy', '00000.scale.npy', '00000.xy.npy']
    """
    dtype = np.int8 if keep == "int8" else np.float16
    Shards(folder).write(shard, rows, [_kept(one, keep) for one in tokens], dtype)


def _kept(tokens: Tokens, keep: str) -> Tokens:
    if keep == "float16":
        return tokens
    rounded = tokens.descriptors.astype(np.float16)  # as if they were made from a store of all
    if keep == "int8":
        return replace(tokens, descriptors=rounded)
    if keep == "global":
        return Tokens(tokens.vector, rounded[:0], np.zeros((0, 2), np.float32))
    few = aggregate(rounded, AGGREGATED)
    few = few[few.any(axis=1)]
    return Tokens(tokens.vector, few, np.full((len(few), 2), np.nan, np.float32))


def kept_bytes(keep: str, n: int, d: int) -> int:
    """Bytes of n local descriptors of d numbers on disk, without the 8 n of the positions of keypoints.

    >>> [kept_bytes(keep, 256, 384) for keep in KEEPS]
    [196608, 99328, 49152, 0]
    """
    each = {"float16": 2 * d, "int8": d + 4, "aggregated": 2 * d, "global": 0}
    return each[keep] * (min(n, AGGREGATED) if keep == "aggregated" else n)


def view_rows(step: Step) -> list[ReferenceRow]:
    """The rows of references.jsonl behind a step of reference tokens; none for photographs."""
    return read_rows(intact(step.linked("views"), "references.jsonl")) if "views" in step.links else []


def intact(folder: Path, name: str) -> Path:
    """The path of a file of a step, which is as it was when the step finished.

    Raises:
        StepError: it is not.
    """
    step = open_step(folder, finished=False)
    sealed = {name: step.sealed[name]} if name in step.sealed else {}
    if harmed := files.damage(folder, sealed, again=True):
        raise StepError(f"{folder} is damaged: {files.damage_said(harmed)}")
    return folder / name


def open_poses(upright: Stored, poses: Sequence[Pose]) -> Posed:
    """Open what `embed_poses` made."""
    others = [pose for pose in poses if pose != UPRIGHT]
    return Posed(upright, {pose: Stored(pose_folder(upright.folder, pose)) for pose in others})


def pose_folder(folder: Path, pose: Pose) -> Path:
    """Say where a step of embeddings lies in another pose: beside the upright one."""
    return folder.with_name(files.short_name(f"{folder.name}_{pose}"))


@dataclass(frozen=True)
class Posed:
    """Photographs in several poses.

    Attributes:
        upright: their embeddings as they are.
        posed: the other poses; a photograph in which the backbone then found nothing is not there.

    Raises:
        StepError: a pose is of other photographs.
    """

    upright: Embeddings
    posed: Mapping[Pose, Embeddings]

    def __post_init__(self) -> None:
        known = dict(zip(self.upright.ids, self.upright.rows, strict=True))
        for embeddings in self.posed.values():
            for row in embeddings.rows:
                if row["id"] in known and row["sha256"] != known[row["id"]]["sha256"]:
                    raise StepError(f"{row['id']} has changed since it was embedded upright: run 01_embed again")

    @cached_property
    def _places(self) -> dict[Pose, np.ndarray]:
        """(N,) row of each photograph in a pose, -1 where it is not there."""
        ids = self.upright.ids
        rows = {pose: there.row_of for pose, there in self.posed.items()}
        return {pose: np.array([row_of.get(id, -1) for id in ids]) for pose, row_of in rows.items()}

    def tokens(self, row: int) -> list[tuple[Pose, Tokens]]:
        """A photograph's tokens in each pose, the upright one first; xy in pixels of the upright original."""
        found = [(UPRIGHT, self.upright.tokens(row))]
        for pose, embeddings in self.posed.items():
            if (place := self._places[pose][row]) >= 0:
                found.append((pose, embeddings.tokens(place)))
        return found

    def vectors(self, part: slice) -> list[tuple[Pose, np.ndarray]]:
        """(n, D) float32 global vectors of some in each pose, upright first; zero where one is not there."""
        found = [(UPRIGHT, files.take(self.upright.vectors, part))]
        for pose, embeddings in self.posed.items():
            places = self._places[pose][part]
            vectors = files.take(embeddings.vectors, np.maximum(places, 0))
            vectors[places < 0] = 0
            found.append((pose, vectors))
        return found


def read_ranking(step: Step) -> Ranking:
    """What `search` found.

    Raises:
        StepError: there is no ranking, as in a step of an earlier version.
    """
    if not (step.folder / "ranking.npz").is_file():
        raise StepError(f"no ranking in {step.folder}: run 03_index again and set on_change to recompute")
    path = step.folder / "ranking.npz"
    with files.reading(path, "run 03_index again and set on_change to recompute"), np.load(path) as saved:
        return Ranking(**{name: saved.get(name) for name in Ranking.__dataclass_fields__})
