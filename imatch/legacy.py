"""Per-image files, out and in: a tree of `.npy` + `_meta.json` for people and other tools, and back into a store.

    <folder>/<dataset>/<weight>/<label>/GlobalToken/GlobalToken_res256_raw_dinov3_vits16_LVD_<label>_<frame>.npy
    <folder>/<dataset>/<weight>/<label>/rot045/ReferenceGlobal/ReferenceGlobal_res256_raw_..._<label>_<frame>.npy

    python -m imatch.legacy import DIR [--exports DIR] [--run NAME] [--photographs DIR]

A backbone without hub entry and family (dsift, sift) puts its own name and NONE in their place. A step's tag
follows the configuration after a hyphen (`res256-tag`).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from imatch import denseft, images, plugins, pooling, references, registry, runs, steps, store
from imatch.records import ImatchError, StepError, Tokens
from imatch.runs import Step
from imatch.store import Embeddings, Row

KINDS = {
    "global": ("GlobalToken", "ReferenceGlobal"),
    "patch": ("PatchToken", "ReferencePatch"),
    "grid": ("PatchGrid", "ReferenceGrid"),
    "denseft": ("DenseFT", "ReferenceDenseFT"),
}
"""What an output is called: of a photograph, of a reference."""
OUTPUTS = tuple(f"{name}.{suffix}" for name in KINDS for suffix in ("npy", "png" if name == "denseft" else "json"))
NEUTRAL = ("shard_size", "image_groups", "dataset", "imported", "files")
"""Parameters of a step that change no number of a single photograph."""
SHARD = 64
PATCH = 16
PATCH_CONVNEXT = 32
_ANCHOR = (
    r"_(?P<variant>raw|sub\d+)_(?:(?P<hub>dinov3_[a-z0-9]+(?:_[a-z]+)?)_(?P<family>LVD|SAT)|(?P<name>[^_]+)_NONE)_"
)
_NAME = re.compile(
    r"(?P<reference>Reference)?(?P<kind>Global|PatchGrid|Patch|Grid|DenseFT)(?:Token)?_(?P<cfg>.+)"
    + _ANCHOR
    + "(?P<tail>.+)",
    re.DOTALL,
)
_FOLDER = re.compile(r"(Reference)?(Global|PatchGrid|Patch|Grid|DenseFT)(Token)?")
_ROTATION = re.compile(
    r"(?:rot)?_?(?P<minus>m|-)?(?P<angle>\d+(?:[p.]\d+)?)(?:deg)?(?:_crop(?P<crop>\d+(?:[p.]\d+)?))?", re.I
)
_KIND = {"Global": "global", "Patch": "patch", "PatchGrid": "grid", "Grid": "grid"}


# --- out --------------------------------------------------------------------------------------------------


def export(step: Step, embeddings: Embeddings, outputs: Sequence[str], folder: Path | None = None) -> int:
    """Write per-image files of a step of 01_embed or 02_references, those that are missing.

    Args:
        step: the step; its on_change says what happens to files that were made differently.
        embeddings: its embeddings.
        outputs: names of `OUTPUTS`. "<kind>.npy" is the array with its meta beside it, "<kind>.json" the meta alone,
            "denseft.png" the picture with its meta. DenseFT has one basis for the whole store.
        folder: the tree's root; None is <exports>/<run>/per_image, the same for data sets and references.

    Returns:
        How many files were written.

    Raises:
        ImatchError: an unknown output, or one that needs a grid of a backbone without one; nothing is written.
        StepError: files are there that were made differently, and `step.on_change` is "refuse".

    >>> export(Step(Path("s"), "01_embed", {}, {}), None, ["globl.npy"])
    Traceback (most recent call last):
    imatch.records.ImatchError: unknown output 'globl.npy': did you mean 'global.npy'? Known: ...
    """
    wanted: dict[str, set[str]] = {}
    for output in outputs:
        if output not in OUTPUTS:
            raise ImatchError(plugins.unknown("output", output, OUTPUTS))
        kind, _, suffix = output.partition(".")
        wanted.setdefault(kind, {"json"}).add(suffix)  # an array has a meta, always
    gridless = next((row["id"] for row in embeddings.rows if row["grid"] is None), None)
    if gridless is not None and {*wanted} - {"global"}:
        raise ImatchError(
            f"outputs {', '.join(sorted(o for o in outputs if not o.startswith('global')))} need a grid, and "
            f"{gridless} of {step.folder} has keypoints: leave them out, or use a backbone with a grid (DINOv3, dsift)"
        )
    if not wanted:
        return 0
    return _Export(step, embeddings, folder or step.folder.parents[4 if _is_reference(step) else 3] / "per_image")(
        wanted
    )


@dataclass(frozen=True)
class _File:
    """One array to be: its row, its output, the path of its files without their endings, its fingerprint."""

    row: int
    output: str
    base: Path
    fingerprint: str

    @property
    def at(self) -> dict[str, Path]:
        endings = {"json": "_meta.json", "npy": ".npy", "png": ".png"}
        return {suffix: self.base.with_name(self.base.name + ending) for suffix, ending in endings.items()}


class _Export:
    """What all files of a step share, and the files."""

    def __init__(self, step: Step, embeddings: Embeddings, folder: Path) -> None:
        self.step, self.embeddings, self.folder = step, embeddings, folder
        parameters, reference = step.parameters, _is_reference(step)
        backbone, cfg, variant = (parameters[key] for key in ("backbone", "cfg", "variant"))
        tag = step.folder.name.removeprefix(f"{cfg}_{variant}").removeprefix("_")
        dataset = step.folder.parents[2 if reference else 1].name
        hub = backbone.get("hub_entry") or parameters["weight"].replace("_", "-")
        self.middle = f"{cfg}{'-' if tag else ''}{tag}_{variant}_{hub}_{backbone.get('family') or 'NONE'}"
        self.made_by = {key: value for key, value in parameters.items() if key not in NEUTRAL}
        self.said = {
            "dataset": dataset,
            "weight": parameters["weight"],
            **{key: backbone.get(key) for key in ("hub_entry", "family", "filename", "pooling", "precision")},
            **{key: parameters[key] for key in ("weights_digest", "cfg", "variant", "resize", "backbone")},
            "tag": tag,
        }
        self.names = _names(_sources(step, embeddings), dataset)
        self.views = _views(step) if reference else {}
        self.several = (
            len({view["crop"] for view in self.views.values()} or {r.get("crop") for r in embeddings.rows}) > 1
        )

    def __call__(self, wanted: Mapping[str, set[str]]) -> int:
        """Write what is missing of each output's suffixes; returns how many files that was."""
        todo = self._todo(self._files(sorted(wanted)), wanted)
        basis = denseft.fit(self.embeddings) if any(file.output == "denseft" for file, _ in todo) else None
        return sum(self._write(file, suffixes, basis) for file, suffixes in runs.progress(todo, "per-image files"))

    def _files(self, outputs: Sequence[str]) -> list[_File]:
        """Every file of every photograph. Two that would share a name end it before anything is written."""
        reference, all_of_it = _is_reference(self.step), ""
        if "denseft" in outputs:  # whose colours depend on all photographs
            all_of_it = runs.digest([[row["id"], row["sha256"]] for row in self.embeddings.rows])
        found, taken = [], dict[str, str]()
        for i, row in enumerate(self.embeddings.rows):
            label, frame = self.names[row.get("source", row["id"])]
            place = self.folder / self.said["dataset"] / self.said["weight"] / label
            if reference:
                view = self.views.get(row["id"], row)
                name = references.name("", view["angle"], view["crop"] or 1.0).removeprefix("_")
                place /= name if self.several else name.partition("_crop")[0]
            for output in outputs:
                kind = KINDS[output][reference]
                base = place / kind / f"{kind}_{self.middle}_{label}_{frame}"
                if (other := taken.setdefault(str(base).lower(), row["id"])) != row["id"]:
                    raise ImatchError(f"{row['id']} and {other} would both be written to {base}.npy: rename one")
                made_from = [self.made_by, row["sha256"], all_of_it if output == "denseft" else ""]
                found.append(_File(i, output, base, runs.digest(made_from)))
        return found

    def _todo(self, files: Sequence[_File], wanted: Mapping[str, set[str]]) -> list[tuple[_File, list[str]]]:
        """The files that are missing and which suffixes of them; those made differently are refused or removed."""
        todo, stale, differences = [], [], []
        for file in files:
            there = {suffix: path for suffix, path in file.at.items() if path.is_file()}
            before = _read_meta(there["json"]).get("fingerprint") if "json" in there else None
            if there and before != file.fingerprint:
                said = f"{before} -> {file.fingerprint}" if "json" in there else "no meta says how it was made"
                differences.append(f"{store.relative(file.base, self.folder)}: {said}")
                stale += there.values()
                there = {}
            if missing := sorted(wanted[file.output] - {*there}):
                todo.append((file, missing))
        if differences:
            runs.refuse_or_say(self.step, f"files under {self.folder} were made differently", differences)
        for path in stale:
            path.unlink()
        return todo

    def _write(self, file: _File, suffixes: Sequence[str], basis: denseft.Basis | None) -> int:
        """Write some files of one array: the meta first, so that no array of ours ever lies there without one."""
        tokens, row = self.embeddings.tokens(file.row), self.embeddings.rows[file.row]
        if file.output == "denseft":
            assert basis is not None
            array = basis(tokens)
        elif file.output == "global":
            norm = row.get("global_norm", 1.0)  # of an import: its file had this norm
            array = tokens.vector if norm == 1 else tokens.vector * np.float32(norm)
        else:
            array = tokens.descriptors if file.output == "patch" else tokens.as_grid()
        for suffix in suffixes:
            if suffix == "json":
                store.write_json(file.at[suffix], self._meta(file, row, tokens, array))
            elif suffix == "npy":
                store.write_array(file.at[suffix], array)
            else:
                data = io.BytesIO()
                denseft.picture(array, denseft.covered(tokens, row["size"])).save(data, "PNG")
                store.write_bytes(file.at[suffix], data.getvalue())
        return len(suffixes)

    def _meta(self, file: _File, row: Row, tokens: Tokens, array: np.ndarray) -> Row:
        label, frame = self.names[row.get("source", row["id"])]
        view = {**row, **{key: self.views[row["id"]][key] for key in ("angle", "crop") if row["id"] in self.views}}
        return {
            "kind": KINDS[file.output][_is_reference(self.step)],
            **self.said,
            **{key: row.get(key) for key in ("id", "sha256", "size", "grid", "position", "capture")},
            "label": row.get("label", label),
            "frame": row.get("frame", frame),
            **{key: view[key] for key in ("source", "source_sha256", "angle", "crop") if key in view},
            **_lattice(tokens, row),
            "shape": array.shape,
            "dtype": str(array.dtype),
            "fingerprint": file.fingerprint,
        }


def _is_reference(step: Step) -> bool:
    return step.name == "02_references"


def _lattice(tokens: Tokens, row: Row) -> Row:
    """Where a grid lies that does not cover its photograph (crops, thinned grids): its first centre and its step,
    (x, y) pixels. Nothing for other grids, whose size says it."""
    if not row["xy"] or tokens.grid is None:
        return {}
    dy, dx = (side / n for side, n in zip(denseft.covered(tokens, row["size"]), tokens.grid, strict=True))
    return {"xy_first": tokens.xy[0].tolist(), "xy_step": [dx, dy]}


def _views(step: Step) -> dict[str, Row]:
    if "views" not in step.links:
        return {}
    return {row["id"]: row for row in store.read_rows(step.linked("views") / "references.jsonl")}


def _sources(step: Step, embeddings: Embeddings) -> list[Row]:
    """The rows of the photographs that files are named after: a reference bears the name of its source."""
    if not _is_reference(step):
        return embeddings.rows
    found: dict[str, Row] = {}
    if "embed" in step.links:
        above = step.linked("embed")
        rows = store.read_rows(above / "images.jsonl") + store.read_rows(above / "skipped.jsonl")
        found = {row["id"]: row for row in rows}
    for row in embeddings.rows:
        found.setdefault(row["source"], {**row, "id": row["source"]})
    return [found[id] for id in sorted(found)]


def _names(rows: Sequence[Row], dataset: str) -> dict[str, tuple[str, str]]:
    """Photograph id -> (label, frame) of its files; no two alike, even where case does not count.

    The label is the registry's, with the capture before it where two captures share it, else the folder's name
    (all of its path where two folders share it). The frame is the registry's as the file name pads it, else the
    stem; where two would be one the suffix joins it, and at last a hash of the id.
    """
    shared: dict[str, set[tuple[str, str]]] = defaultdict(set)
    places = {}
    for row in rows:
        above = PurePosixPath(row["id"]).parent
        if row.get("label") is not None:
            capture, label = str(row.get("capture") or ""), str(row["label"])
            places[row["id"]] = (label, f"{capture}_{label}" if capture else label)
            shared[label.lower()].add(("capture", capture))
        else:
            label = above.name or dataset
            places[row["id"]] = (label, "_".join(above.parts) or dataset)
            shared[label.lower()].add(("folder", above.as_posix()))
    labels = {id: _safe(long if len(shared[short.lower()]) > 1 else short) for id, (short, long) in places.items()}
    plain = {row["id"]: (labels[row["id"]], _safe(_frame(row["id"], row.get("frame")))) for row in rows}
    longer = {id: (labels[id], _safe(PurePosixPath(id).name.replace(".", "_"))) for id in labels}
    count = Counter(_folded(name) for name in plain.values())
    names = {id: name if count[_folded(name)] == 1 else longer[id] for id, name in plain.items()}
    count = Counter(_folded(name) for name in names.values())
    for id, (label, frame) in names.items():
        if count[_folded((label, frame))] > 1:
            names[id] = (label, f"{frame}-{hashlib.sha256(os.fsencode(id)).hexdigest()[:8]}")
    return names


def _folded(name: tuple[str, str]) -> str:
    return "/".join(name).lower()


def _frame(id: str, frame: int | str | None) -> str:
    """The frame as its file's name writes it: digits with their padding; the stem where no frame is known."""
    stem = PurePosixPath(id).stem
    if frame is None or isinstance(frame, str):
        return frame or stem
    return ([digits for digits in re.findall(r"\d+", stem, re.ASCII) if int(digits) == frame] or [str(frame)])[-1]


def _safe(text: str) -> str:
    """Text as a part of a file's name on any system, never long.

    >>> _safe("flight 1: low"), _safe("..")
    ('flight-1--low', '-')
    """
    name = "".join(c if c.isalnum() or c in "-_.+" else "-" for c in text).lstrip(".") or "-"
    if len(name.encode()) <= 80:
        return name
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{name.encode()[:70].decode(errors='ignore')}-{digest}"


# --- in ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One photograph's files in a tree.

    Attributes:
        label, frame: as the file names say.
        rotation: name of the reference's folder, such as "rot045"; "" for a photograph.
        files: "global", "patch", "grid" -> the array file.
    """

    label: str
    frame: str
    rotation: str = ""
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """<label>/<frame>, of a reference <label>/<rot>/<frame>.

        >>> Item("low", "0007", "rot045").id
        'low/rot045/0007'
        """
        return "/".join(part for part in (self.label, self.rotation, self.frame) if part)

    @property
    def source(self) -> str:
        """The id of the photograph that a reference was made from, or the own one."""
        return f"{self.label}/{self.frame}"

    def metas(self) -> dict[str, Row]:
        """The content of the meta files that are there, by the array they belong to."""
        paths = {kind: _meta_path(path) for kind, path in self.files.items()}
        return {kind: _read_meta(path) for kind, path in paths.items() if path.is_file()}


@dataclass(frozen=True)
class Group:
    """The files of a tree that make one store.

    Attributes:
        folder: the data set's folder in the tree.
        weight, cfg, variant, hub_entry, family: as folders and file names say; without DINOv3, the entry is the
            backbone's name and the family "NONE".
        reference: whether these are references.
        items: sorted by id.
    """

    folder: Path
    weight: str
    cfg: str
    variant: str
    hub_entry: str
    family: str
    reference: bool
    items: list[Item]

    def __str__(self) -> str:
        what = "references" if self.reference else "photographs"
        return f"{self.folder.name} {self.weight} {self.cfg} {self.variant} {self.hub_entry} {self.family} {what}"


def read_tree(tree: Path) -> list[Group]:
    """Sort the per-image files below a folder into the stores that they make; no array is read.

    Args:
        tree: the root, a data set's folder in it or a weight's; data set and weight are the names of folders above
            the labels' in any case.

    Returns:
        Photographs before references, else by data set, weight, configuration and family.

    Raises:
        ImatchError: no such folder, no files, or names that do not say what they are; each is listed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     name = "beach/vits16/low/GlobalToken/Global_res256_raw_dinov3_vits16_LVD_low_0007.npy"
    ...     store.write_array(Path(folder) / name, np.ones(3))
    ...     (group,) = read_tree(Path(folder))
    >>> str(group), group.items[0].id
    ('beach vits16 res256 raw dinov3_vits16 LVD photographs', 'low/0007')
    """
    if not tree.is_dir():
        raise ImatchError(f"no folder {tree}: give the folder of per-image files, its data set's or its weight's")
    tree = registry.resolve(tree)
    found: dict[tuple[Any, ...], dict[str, Item]] = {}
    problems: list[str] = []
    for path in sorted(tree.rglob("*.npy")):
        if path.name.startswith("."):
            continue
        parsed = _parse(path)
        if isinstance(parsed, str):
            problems.append(f"{store.relative(path, tree)}: {parsed}")
        elif parsed:
            key, kind, item = parsed
            item = found.setdefault(key, {}).setdefault(item.id, item)
            if item.files.setdefault(kind, path) != path:
                problems.append(f"{store.relative(path, tree)}: says the same as {item.files[kind].name}")
    if problems:
        raise _listed(
            f"{tree} holds .npy files whose names do not say what they are",
            problems,
            "they must lie at <dataset>/<weight>/<label>/<Kind>/ and be called "
            "<Kind>_<cfg>_<variant>_<hub_entry>_<LVD|SAT>_<label>_<frame>.npy; rename them or move them away",
        )
    if not found:
        raise ImatchError(
            f"no per-image files below {tree}: give the folder of the tree, its data set's or its weight's"
        )
    return [Group(*key[1:], key[0], [items[id] for id in sorted(items)]) for key, items in sorted(found.items())]


def _parse(path: Path) -> tuple[tuple[Any, ...], str, Item] | str | None:
    """What a file is by its name and folders; text says why that is not clear; None for what is not imported."""
    name = _NAME.fullmatch(path.stem)
    if name is None:
        return "not <Kind>_<cfg>_<variant>_<hub_entry>_<LVD|SAT>_<label>_<frame>"
    if len(re.findall(f"(?={_ANCHOR})", path.stem)) > 1:
        return "a variant, an entry and a family can be read from it in two ways"
    if name["kind"] == "DenseFT":
        return None  # made from the tokens, and made again from the store
    above = path.parent.parent if _FOLDER.fullmatch(path.parent.name) else path.parent
    rotation = ""
    if name["reference"]:
        rotation, above = above.name, above.parent
        if not _ROTATION.fullmatch(rotation):
            return f"a reference in folder {rotation!r}, which names no rotation, such as rot045"
    if not name["tail"].startswith(f"{above.name}_") or len(name["tail"]) == len(above.name) + 1:
        return f"it lies in folder {above.name!r} and ends in {name['tail']!r}, which is not {above.name}_<frame>"
    dataset = above.parent.parent
    if not dataset.name:
        return "there is no folder of a data set above it"
    entry = (name["hub"] or name["name"], name["family"] or "NONE")
    key = (bool(name["reference"]), dataset, above.parent.name, name["cfg"], name["variant"], *entry)
    return key, _KIND[name["kind"]], Item(above.name, name["tail"][len(above.name) + 1 :], rotation)


def import_tree(
    tree: Path, exports: Path, run: str, photographs: Path | None = None, on_change: str = "refuse"
) -> list[Path]:
    """Turn a tree of per-image files, one that `export` wrote or one of another tool, into finished steps.

    One step of 01_embed for every data set, weight, configuration and variant (and family, where there are two),
    one of 02_references, of kind "imported", for their references.

    Args:
        tree: as in `read_tree`.
        exports, run: the steps go to <exports>/<run>/.
        photographs: the data set's folder, if it is at hand: then ids are its files', as 01_embed would have them,
            and pictures can be drawn. Else ids are <label>/<frame>.
        on_change: "refuse" or "recompute" a step that was made from other files.

    Returns:
        The steps' folders.

    Raises:
        ImatchError: files that do not fit each other; every message says which.
        StepError: the tree changed since it was imported, and `on_change` is "refuse".
    """
    groups = read_tree(tree)
    return [import_group(group, groups, exports, run, photographs, on_change) for group in groups]


def import_group(
    group: Group,
    groups: Sequence[Group],
    exports: Path,
    run: str,
    photographs: Path | None = None,
    on_change: str = "refuse",
) -> Path:
    """Turn one group of files into a finished step; see `import_tree`.

    Args:
        group: one of `groups`.
        groups: all that `read_tree` found.
        exports, run, photographs, on_change: as in `import_tree`.
    """
    if not run:
        raise ImatchError("run is empty: name this piece of work (--run NAME)")
    exports = registry.resolve(exports) / run
    photographs = registry.dataset(str(photographs), "").root if photographs else None
    folder, parameters = _folder(group, groups, exports), _parameters(group)
    links, upstream, twin = {"photographs": photographs or group.folder}, {}, {}
    if group.reference:
        data = _folder(_photographs_of(group), groups, exports)
        links["photographs"] = group.folder
        if (data / "step.json").is_file():
            above = runs.read(data)
            links["embed"], upstream = data, {"embed": str(above.fingerprint)}
            rows = store.read_rows(data / "images.jsonl")
            names = _names(rows, group.folder.name)  # of a step that 01_embed made; an import's rows know theirs
            twin = {row.get("name") or "/".join(names[row["id"]]): row for row in rows}
    given = _given(group, photographs) if photographs and not group.reference else {}
    before = _seen(folder)
    seen = _hashes(group, before)
    parameters["files"] = runs.digest([[row["file"], row["sha256"]] for row in seen] + sorted(given.items()))
    if before and _changed(folder, group, before, seen, on_change):
        on_change = "recompute"
    step = runs.start(
        folder, "02_references" if group.reference else "01_embed", parameters, upstream, links, on_change
    )
    if before != seen or not _seen(folder):
        store.write_rows(folder / "seen.jsonl", seen)
    if not store.is_merged(folder):
        _store(step, group, given, photographs, twin)
    steps.finish_embed(step, Embeddings(folder))
    return folder


def _seen(folder: Path) -> list[Row]:
    """Which files the step at `folder` was imported from: file, stat, sha256. Nothing if it is no import."""
    if not (folder / "step.json").is_file() or not (folder / "seen.jsonl").is_file():
        return []
    imported = runs.read(folder, finished=False).parameters.get("imported")
    return store.read_rows(folder / "seen.jsonl") if imported else []


def _hashes(group: Group, before: Sequence[Row]) -> list[Row]:
    """Every file of a group with its SHA-256, read again only where size or time of change differ from before."""
    known = {(row["file"], *row["stat"]): row["sha256"] for row in before}
    paths = [path for item in group.items for path in item.files.values()]
    paths += [meta for path in paths if (meta := _meta_path(path)).is_file()]
    rows = []
    for path in runs.progress(sorted(paths), "hash"):
        name, stat = store.relative(path, group.folder.parent), path.stat()
        sign = [stat.st_size, stat.st_mtime_ns]
        rows.append({"file": name, "stat": sign, "sha256": known.get((name, *sign)) or images.file_digest(path)})
    return rows


def _changed(folder: Path, group: Group, before: Sequence[Row], now: Sequence[Row], on_change: str) -> bool:
    """Whether a step may be made anew because its files changed: an unfinished one may, for it asked for them to be
    mended. False when they did not change; refused when that was not allowed."""
    was, have = ({row["file"]: row["sha256"] for row in rows} for rows in (before, now))
    differences = [f"gone: {file}" for file in sorted({*was} - {*have})]
    differences += [f"new: {file}" for file in sorted({*have} - {*was})]
    differences += [f"changed: {file}" for file in sorted(have) if was.get(file, have[file]) != have[file]]
    if differences and on_change == "refuse" and (folder / "metrics.json").is_file():
        raise _listed(
            f"the files in {group.folder} are not those that {folder} was made from",
            differences,
            "nothing was touched; to import anew: --on-change recompute, to keep both: --run NAME",
            StepError,
        )
    return bool(differences)


def _store(
    step: Step, group: Group, given: Mapping[str, str], photographs: Path | None, twin: Mapping[str, Row]
) -> None:
    """Write the shards that are missing, one in memory at a time, and merge them."""
    ordered = sorted(((given.get(item.id, item.id), item) for item in group.items), key=lambda one: one[0])
    done = store.shard_rows(step.folder)
    todo = [shard for shard in range(-(-len(ordered) // SHARD)) if shard not in done]
    for shard in runs.progress(todo, "import"):
        part = ordered[shard * SHARD : (shard + 1) * SHARD]
        read = [_read(group, item, id, photographs if given else None, twin) for id, item in part]
        store.write_shard(step.folder, shard, [row for row, _ in read], [tokens for _, tokens in read], dtype=None)
    store.merge(step.folder)


def _read(group: Group, item: Item, id: str, photographs: Path | None, twin: Mapping[str, Row]) -> tuple[Row, Tokens]:
    """One photograph's row and tokens."""
    metas = item.metas()
    arrays = {kind: _load(kind, path) for kind, path in item.files.items()}
    for kind, array in arrays.items():
        if not np.isfinite(array).all():
            raise ImatchError(f"{item.files[kind]} holds values that are not finite: export it again")
    grid = _grid(item, metas, arrays)
    norm = float(np.linalg.norm(arrays["global"].astype(np.float64)))
    vector = arrays["global"].astype(np.float32)
    if abs(norm - 1) < 1e-5:
        norm = 1.0  # normalised already: kept bit for bit
    else:
        vector = pooling.normalise(arrays["global"].astype(np.float64)).astype(np.float32)
    local = arrays["grid"].reshape(grid[0] * grid[1], -1) if grid and "grid" in arrays else arrays.get("patch")
    if local is None:
        local = np.zeros((0, len(vector)), np.float32)

    decoded = images.decode(photographs / id) if photographs else None
    sha256 = _known(item, metas, "sha256", str)
    if decoded and sha256 not in (None, decoded.sha256):
        raise ImatchError(f"{photographs}/{id} is not the photograph that {item.files['global']} was made from")
    size = decoded.size if decoded else _known(item, metas, "size", list) or _size(group, grid)
    row: Row = {
        "id": id,
        "size": size,
        "sha256": decoded.sha256 if decoded else sha256 or _name_digest(group, item.id),
        "position": decoded.position if decoded else _known(item, metas, "position", dict),
        "label": item.label,
    }
    if capture := _known(item, metas, "capture", str):
        row["capture"] = capture
    if item.frame.isdecimal():
        row["frame"] = int(item.frame)
    if group.reference:
        row |= _made_from(group, item, metas, twin)
    said = {"cfg": group.cfg, "variant": group.variant, "hub_entry": group.hub_entry, "family": group.family}
    said |= {"label": item.label, "frame": item.frame, **({"rotation": item.rotation} if item.rotation else {})}
    row["name"] = item.id
    row["global_norm"] = norm
    row["meta"] = {kind: metas.get(kind, said) for kind in sorted(item.files)}
    xy = np.zeros((len(local), 2), np.float32) if grid is None else _positions(group, item, metas, grid, tuple(size))
    return row, Tokens(vector, np.ascontiguousarray(local), xy, grid)


def _made_from(group: Group, item: Item, metas: Mapping[str, Row], twin: Mapping[str, Row]) -> Row:
    """What the row of a reference says of its source and of itself as a view."""
    source = twin.get(item.source, {})
    digest = _known(item, metas, "source_sha256", str)
    if source and digest not in (None, source["sha256"]):
        raise ImatchError(
            f"{item.files['global']} was made from another photograph than {source['id']} of the imported data set: "
            "import both from one export"
        )
    named = _ROTATION.fullmatch(item.rotation)
    assert named is not None  # read_tree asked for it
    angle = _decimal(named["angle"]) * (-1 if named["minus"] else 1)
    crop = _decimal(named["crop"]) / 100 if named["crop"] else None
    angle, crop = (
        value if (said := _known(item, metas, key, (int, float))) is None else said
        for key, value in (("angle", angle), ("crop", crop))
    )
    return {
        "source": source.get("id") or _known(item, metas, "source", str) or item.source,
        "source_sha256": source.get("sha256") or digest or _name_digest(group, item.source),
        "angle": angle,
        "crop": crop,
    }


# --- what a group says, and whether its files fit ---------------------------------------------------------


def _parameters(group: Group) -> Row:
    """The parameters of the step, as 01_embed would have them; checks counts, metas and the arrays' headers."""
    _check_counts(group)
    made: Row | None = None
    shapes: dict[str, tuple[str, Path]] = {}
    for item in runs.progress(group.items, "check"):
        metas = item.metas()
        for kind, meta in metas.items() or [("global", None)]:
            one = _described(group, meta)
            made = made or one
            if differences := runs.compare(made, one):
                raise _listed(
                    f"{group}: {item.files[kind]} was made differently from the files before it",
                    differences,
                    "put files of one way of making them into a tree of their own (files without any meta count as "
                    "pooling legacy_mean)",
                )
        arrays = {kind: _load(kind, path) for kind, path in item.files.items()}
        for kind, array in arrays.items():
            meta = metas.get(kind, {})
            if "fingerprint" in meta and meta.get("shape") not in (None, list(array.shape)):
                raise ImatchError(
                    f"{item.files[kind]} is of shape {array.shape}, its meta says {meta['shape']}: export it again"
                )
            what = "global vectors" if kind == "global" else "local descriptors"
            of = f"{array.shape[-1]} numbers" if kind == "global" else f"{array.shape[-1]} {array.dtype}"
            before, path = shapes.setdefault(what, (of, item.files[kind]))
            if before != of:
                raise ImatchError(
                    f"{group}: {what} of one store must be alike, but {path} has {before} each and "
                    f"{item.files[kind]} {of}: move one of them into a tree of its own"
                )
        for key, kinds in _MUST_AGREE.items():
            _known(item, metas, key, kinds)
        _grid(item, metas, arrays, values=False)
    return {
        "weight": group.weight,
        **(made or {}),
        "cfg": group.cfg,
        "variant": group.variant,
        "shard_size": SHARD,
        "dataset": "",
        "image_groups": [],
        "imported": True,
    }


_MUST_AGREE: dict[str, type | tuple[type, ...]] = {
    "id": str,
    "sha256": str,
    "size": list,
    "grid": list,
    "source": str,
    "source_sha256": str,
    "angle": (int, float),
}
"""What the metas of one photograph's files may not say in two ways: its files would not belong together."""


def _check_counts(group: Group) -> None:
    local = {item.id for item in group.items if {*item.files} - {"global"}}
    vectors = {item.id for item in group.items if "global" in item.files}
    for missing, has, lacks in (
        (local - vectors, "PatchToken or PatchGrid", "GlobalToken"),
        (local and vectors - local, "GlobalToken", "PatchToken or PatchGrid"),
    ):
        if missing:
            raise _listed(
                f"{group}: {len(missing)} of {len(group.items)} have a {has} but no {lacks}",
                sorted(missing),
                "export what is missing, or move what is left over away",
            )


def _described(group: Group, meta: Row | None) -> Row:
    """How a file was made; without a meta, what older exports hold."""
    meta = meta or {}
    backbone = meta.get("backbone")
    if not isinstance(backbone, dict):
        entry = {"hub_entry": group.hub_entry, "family": group.family} if group.family != "NONE" else {}
        backbone = {
            **entry,
            "filename": meta.get("filename") or "",
            "source": "imported",
            "pooling": meta.get("pooling") or "legacy_mean",
            "precision": meta.get("precision") or "",
        }
    return {
        "backbone": backbone,
        "weights_digest": meta.get("weights_digest") or "",
        "resize": meta.get("resize") or {},
    }


def _grid(
    item: Item, metas: Mapping[str, Row], arrays: Mapping[str, np.ndarray], values: bool = True
) -> tuple[int, int] | None:
    """The (h, w) of an item's local tokens, None without any; checks that PatchToken and PatchGrid are the same."""
    patch, grid = arrays.get("patch"), arrays.get("grid")
    if grid is not None:
        h, w, d = grid.shape
        if patch is not None:
            both = f"{item.files['patch']} and {item.files['grid']} disagree"
            if patch.shape != (h * w, d):
                raise ImatchError(f"{both}: {patch.shape} is not {grid.shape} in rows; export them again")
            if values and not np.array_equal(patch, grid.reshape(h * w, d)):
                raise ImatchError(f"{both}: their values are not the same, row by row; export them again")
        return h, w
    if patch is None:
        return None
    said = _known(item, metas, "grid", list)
    if said is not None:
        if len(said) != 2 or said[0] * said[1] != len(patch):
            raise ImatchError(
                f"{item.files['patch']} holds {len(patch)} tokens, its meta says a grid of {said}: export it again"
            )
        return int(said[0]), int(said[1])
    side = math.isqrt(len(patch))
    if side * side != len(patch):
        raise ImatchError(
            f"{item.files['patch']} holds {len(patch)} tokens, which is no square, and nothing says their grid: "
            "export PatchGrid as well, or a meta with grid [h, w]"
        )
    return side, side  # older exports were square


def _positions(
    group: Group, item: Item, metas: Mapping[str, Row], grid: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """(h * w, 2) float32, where the tokens lie: as the meta says, else on a grid, thinned for sub<s>."""
    first, step = (_known(item, metas, key, list) for key in ("xy_first", "xy_step"))
    if first and step:
        x, y = np.meshgrid(first[0] + np.arange(grid[1]) * step[0], first[1] + np.arange(grid[0]) * step[1])
        return np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)
    stride = _stride(group)
    h, w = grid[0] * stride, grid[1] * stride
    return store.grid_xy((h, w), size).reshape(h, w, 2)[::stride, ::stride].reshape(-1, 2)


def _stride(group: Group) -> int:
    return int(group.variant.removeprefix("sub")) if group.variant != "raw" else 1


def _size(group: Group, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The (h, w) of a photograph of which nothing is known but its tokens: as the backbone saw it."""
    patch = PATCH_CONVNEXT if "convnext" in group.hub_entry else PATCH
    h, w = grid or (1, 1)
    return h * patch * _stride(group), w * patch * _stride(group)


# --- small things -----------------------------------------------------------------------------------------


def _load(kind: str, path: Path) -> np.ndarray:
    """An array, mapped: (D,) of "global", (n, d) of "patch", (h, w, d) of "grid"; a leading 1 is dropped."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ImatchError(f"{path} is no .npy file of numbers ({error}): export it again or move it away") from error
    wanted = {"global": 1, "patch": 2, "grid": 3}[kind]
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ImatchError(f"{path} holds no floating-point numbers: export it again or move it away")
    if array.ndim == wanted + 1 and len(array) == 1:
        array = array[0]
    if array.ndim != wanted or not array.size:
        raise ImatchError(f"{path} is of shape {array.shape}, a {kind} has {wanted} dimensions: export it again")
    return array


def _meta_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_meta.json")


def _read_meta(path: Path) -> Row:
    try:
        meta = store.read_json(path)
    except ValueError as error:
        raise ImatchError(f"{path} is no JSON ({error}): export it again or delete it") from error
    if not isinstance(meta, dict):
        raise ImatchError(f"{path} holds no JSON object: export it again or delete it")
    return meta


def _known(item: Item, metas: Mapping[str, Row], key: str, wanted: type | tuple[type, ...]) -> Any:
    """What the metas say under `key`, None if nothing of that type; they may not say two things."""
    said = [(kind, meta[key]) for kind, meta in metas.items() if isinstance(meta.get(key), wanted)]
    for kind, value in said[1:]:
        if value != said[0][1]:
            raise ImatchError(
                f"{item.files[said[0][0]]} and {item.files[kind]} do not belong together: {key} is {said[0][1]} in "
                f"the meta of one and {value} in the other's; export them again"
            )
    return said[0][1] if said else None


def _name_digest(group: Group, name: str) -> str:
    """Stands for the SHA-256 of a photograph that is not at hand: of its name, the same for all that show it."""
    return hashlib.sha256(os.fsencode(f"{group.folder.name}/{name}")).hexdigest()


def _given(group: Group, photographs: Path) -> dict[str, str]:
    """Item id -> id of its photograph: that of the meta, else the one file that bears the label and the frame."""
    there = images.list_photographs(photographs)
    folders: dict[str, list[str]] = defaultdict(list)
    for id in there:
        folders[PurePosixPath(id).parent.name or photographs.name].append(id)
    known, found, problems = {*there}, {}, []
    for item in group.items:
        said = _known(item, item.metas(), "id", str)
        near = [name for name in folders if name == item.label or name.endswith(f"_{item.label}")]
        fitting = [id for name in near for id in folders[name] if _bears(PurePosixPath(id).stem, item.frame)]
        fitting = [said] if said in known else fitting
        if len(fitting) == 1:
            found[item.id] = fitting[0]
        else:
            problems.append(f"{item.id}: {', '.join(fitting) or 'none'}")
    twice = [id for id, n in Counter(found.values()).items() if n > 1]
    problems += [f"{item}: {id}, as another" for item, id in found.items() if id in twice]
    if problems:
        raise _listed(
            f"{group}: {len(problems)} of {len(group.items)} do not have one photograph in {photographs}",
            problems,
            "correct --photographs, or leave it out",
        )
    return found


def _bears(stem: str, frame: str) -> bool:
    """Whether a file's stem ends in a frame, whatever its padding."""
    number = re.search(r"\d+$", stem, re.ASCII)
    same = number is not None and frame.isdecimal() and int(number[0]) == int(frame)
    return same or _safe(stem) == frame or stem.endswith(f"_{frame}")


def _photographs_of(group: Group) -> Group:
    return Group(group.folder, *_configuration(group), group.hub_entry, group.family, False, [])


def _configuration(group: Group) -> tuple[str, str, str]:
    return group.weight, group.cfg, group.variant


def _folder(group: Group, groups: Sequence[Group], run: Path) -> Path:
    """Where a group's step goes. Two families of one weight are kept apart; two networks are refused."""
    alike = [g for g in groups if (g.folder, *_configuration(g)) == (group.folder, *_configuration(group))]
    entries = {g.hub_entry for g in alike if g.family == group.family}
    if len(entries) > 1:
        raise ImatchError(
            f"{group.folder / group.weight} holds files of {' and '.join(sorted(entries))}: one weight is one "
            "network, so move one of them into a folder of its own"
        )
    family = f"_{group.family}" if len({g.family for g in alike}) > 1 else ""
    name = f"{group.cfg}_{group.variant}{family}"
    if group.reference:
        return run / "02_references" / group.folder.name / "imported" / group.weight / name
    return run / "01_embed" / group.folder.name / group.weight / name


def _decimal(text: str) -> float:
    return float(text.replace("p", "."))


def _listed(what: str, problems: Sequence[str], remedy: str, kind: type[ImatchError] = ImatchError) -> ImatchError:
    more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
    lines = "\n".join(f"  {store.printable(line)}" for line in [*problems[:10], *more])
    return kind(f"{what}:\n{lines}\n{remedy[0].upper()}{remedy[1:]}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 if every store is there, 1 if one failed, 2 for a bad request."""
    parser = argparse.ArgumentParser(prog="python -m imatch.legacy", description="Per-image files into stores.")
    command = parser.add_subparsers(dest="command", required=True).add_parser("import", help="a tree into stores")
    command.add_argument("tree", type=Path, help="the root of the files, a data set's folder in it or a weight's")
    command.add_argument("--exports", default="", help="where the stores go (default: EXPORT_ROOT, else exports/)")
    command.add_argument("--run", default="imported", help="name of this piece of work (default: imported)")
    command.add_argument("--photographs", help="the data set's folder, if it is at hand")
    command.add_argument("--on-change", default="refuse", choices=runs.ON_CHANGE, help="stores of changed files")
    options = parser.parse_args(arguments)
    try:
        groups = read_tree(registry.resolve(options.tree))
        photographs = registry.dataset(options.photographs, "").root if options.photographs else None
    except ImatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failures = 0
    for group in groups:
        print(f"== {group}: {len(group.items)}", flush=True)
        try:
            exports = registry.exports_folder(options.exports)
            import_group(group, groups, exports, options.run, photographs, options.on_change)
        except ImatchError as error:
            failures += 1
            print(f"FAILED {group}: {error}", file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
