"""Per-image files, in: a tree of `.npy` + `_meta.json`, of `perimage` or of another tool, becomes a store.

    imatch import DIR [--exports DIR] [--run NAME] [--on-change refuse|recompute]

Names and folders are those of `perimage`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveFloat

from imatch.core import compute, config, files, settings
from imatch.core.rows import Json, Parameters, PhotoRow
from imatch.core.step import open_step, start_step
from imatch.core.types import ImatchError, Tokens, grid_xy, normalise
from imatch.data import images
from imatch.data.shards import Shards
from imatch.data.store import Stored
from imatch.export import per_image
from imatch.features import weights
from imatch.steps.embedding import finish_embed

Meta = dict[str, Json]
"""What a meta file says."""
Key = tuple[bool, Path, str, str, str, str, str]
"""What the files of a group share: whether they are references, folder, weight and what their names say."""
SHARD = 64
_NAME = re.compile(
    r"(?P<reference>Reference)?(?P<kind>Global|PatchGrid|Patch|Grid|DenseFT)(?:Token)?_(?P<cfg>.+)"
    + per_image.ANCHOR
    + "(?P<tail>.+)",
    re.DOTALL,
)
_FOLDER = re.compile(r"(Reference)?(Global|PatchGrid|Patch|Grid|DenseFT)(Token)?")
_ROTATION = re.compile(
    r"(?:rot)?_?(?P<minus>m|-)?(?P<angle>\d+(?:[p.]\d+)?)(?:deg)?(?:_crop(?P<crop>\d+(?:[p.]\d+)?))?", re.I
)
_KIND = {"Global": "global", "Patch": "patch", "PatchGrid": "grid", "Grid": "grid"}


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

    def metas(self) -> dict[str, Meta]:
        """The content of the meta files that are there, by the array they belong to."""
        paths = {kind: _meta_path(path) for kind, path in sorted(self.files.items())}
        return {kind: _checked(path) for kind, path in paths.items() if path.is_file()}


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
    ...     files.write_array(Path(folder) / name, np.ones(3))
    ...     (group,) = read_tree(Path(folder))
    >>> str(group), group.items[0].id
    ('beach vits16 res256 raw dinov3_vits16 LVD photographs', 'low/0007')
    """
    if not tree.is_dir():
        raise ImatchError(f"no folder {tree}: give the folder of per-image files, its data set's or its weight's")
    tree = settings.from_workspace(tree)
    found: dict[Key, dict[str, Item]] = {}
    problems: list[str] = []
    for path in sorted(tree.rglob("*.npy")):
        if path.name.startswith("."):
            continue
        parsed = _parse(path)
        if isinstance(parsed, str):
            problems.append(f"{files.relative(path, tree)}: {parsed}")
        elif parsed:
            key, kind, item = parsed
            item = found.setdefault(key, {}).setdefault(item.id, item)
            if item.files.setdefault(kind, path) != path:
                problems.append(f"{files.relative(path, tree)}: says the same as {item.files[kind].name}")
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
    called: dict[str, Path] = {}
    for _, folder, *_ in found:
        if (other := called.setdefault(folder.name, folder)) != folder:
            raise ImatchError(
                f"{tree} holds two data sets named {folder.name}, {other} and {folder}, which would become one: "
                "import each by its folder and with a --run of its own, or rename one"
            )
    return [Group(*key[1:], key[0], [items[id] for id in sorted(items)]) for key, items in sorted(found.items())]


def _parse(path: Path) -> tuple[Key, str, Item] | str | None:
    """What a file is by its name and folders; text says why that is not clear; None for what is not imported."""
    name = _NAME.fullmatch(path.stem)
    if name is None:
        return "not <Kind>_<cfg>_<variant>_<hub_entry>_<LVD|SAT>_<label>_<frame>"
    if len(re.findall(f"(?={per_image.ANCHOR})", path.stem)) > 1:
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
    made = (name["cfg"], name["variant"], name["hub"], name["family"])
    key = (bool(name["reference"]), dataset, above.parent.name, *made)
    return key, _KIND[name["kind"]], Item(above.name, name["tail"][len(above.name) + 1 :], rotation)


def import_group(
    group: Group, groups: Sequence[Group], exports: Path, run: str = "imported", on_change: str = "refuse"
) -> Path:
    """Turn one group of files into a finished step: of 01_embed, or of 02_references, of kind "imported".

    Beside the store, metas.jsonl keeps what the metas said, one line a row, by kind of file.

    Args:
        group: one of `groups`.
        groups: all that `read_tree` found; those of photographs are imported before their references.
        exports, run: the step goes to <exports>/<run>/.
        on_change: "refuse" or "recompute" a step that was made from other files.

    Returns:
        The step's folder.

    Raises:
        ImatchError: files that do not fit each other; every message says which.
        StepError: the files changed since they were imported, and `on_change` is "refuse".

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     name = "beach/vits16/low/GlobalToken/Global_res256_raw_dinov3_vits16_LVD_low_0007.npy"
    ...     files.write_array(Path(folder) / name, np.array([3.0, 4]))
    ...     (group,) = read_tree(Path(folder))
    ...     Stored(import_group(group, [group], Path(folder) / "exports")).ids
    01_embed: new at ...
    01_embed finished: ...
    ['low/0007']
    """
    home, about, parameters = exports / config.folder_name(run, "run"), _about(group, groups), _parameters(group)
    name = "02_references" if group.reference else "01_embed"
    folder = Path(home, name, *about.values())
    links, upstream, twin = {"photographs": group.folder}, {}, {}
    data = Path(home, "01_embed", *_about(replace(group, reference=False), groups).values())
    if group.reference and (data / "step.json").is_file():
        links["embed"], upstream = data, {"embed": str(open_step(data).fingerprint)}
        photographs = Stored(data)
        called = per_image.names(photographs.rows, group.folder.name, photographs.data_key)
        twin = {"/".join(called[row["id"]]): row for row in photographs.rows}
    parameters["files"] = _digest(group)
    if (folder / "step.json").is_file():
        before = open_step(folder, finished=False)
        if before.parameters.get("imported") and not before.finished:
            on_change = "recompute"  # an import that failed asked for its files to be mended
    step = start_step(home, name, about, parameters, upstream, links, on_change)
    if not Shards(folder).merged:
        done = Shards(folder).rows()
        todo = [shard for shard in range(-(-len(group.items) // SHARD)) if shard not in done]
        for shard in compute.progress(todo, "import"):
            read = [_read(group, item, twin) for item in group.items[shard * SHARD : (shard + 1) * SHARD]]
            Shards(folder).write(shard, [row for row, _ in read], [tokens for _, tokens in read], dtype=None)
        files.write_rows(folder / "metas.jsonl", (item.metas() for item in group.items))
        Shards(folder).merge()
    finish_embed(step, Stored(folder))
    return folder


def _digest(group: Group) -> str:
    """Of every file of a group."""
    paths = [path for item in group.items for path in item.files.values()]
    paths += [meta for path in paths if (meta := _meta_path(path)).is_file()]
    seen = [
        (files.relative(path, group.folder), images.file_digest(path))
        for path in compute.progress(sorted(paths), "hash")
    ]
    return files.digest(seen)


def _read(group: Group, item: Item, twin: Mapping[str, PhotoRow]) -> tuple[PhotoRow, Tokens]:
    """One photograph's row and tokens."""
    said = _said(item, item.metas())
    arrays = {kind: _load(kind, path) for kind, path in item.files.items()}
    for kind, array in arrays.items():
        if not np.isfinite(array).all():
            raise ImatchError(f"{item.files[kind]} holds values that are not finite: export it again")
    grid = _grid(item, said, arrays)
    norm = float(np.linalg.norm(arrays["global"].astype(np.float64)))
    vector = arrays["global"].astype(np.float32)
    if abs(norm - 1) < 1e-5:
        norm = 1.0  # normalised already: kept bit for bit
    else:
        vector = normalise(arrays["global"].astype(np.float64)).astype(np.float32)
    local = arrays["grid"].reshape(grid[0] * grid[1], -1) if grid and "grid" in arrays else arrays.get("patch")
    if local is None:
        local = np.zeros((0, len(vector)), np.float32)
    size, xy = _placed(group, item, said, grid)
    row: PhotoRow = {
        "id": item.id,
        "size": size,
        "sha256": said.get("sha256") or _name_digest(group, item.id),
        "position": said.get("position"),
        "label": item.label,
        **({"capture": said["capture"]} if "capture" in said else {}),
        **({"frame": int(item.frame)} if item.frame.isdecimal() else {}),
        **(_made_from(group, item, said, twin) if group.reference else {}),
        "name": item.id,
        "global_norm": norm,
    }
    return row, Tokens(vector, np.ascontiguousarray(local), xy, grid)


def _made_from(group: Group, item: Item, said: Meta, twin: Mapping[str, PhotoRow]) -> Meta:
    """What the row of a reference says of its source and of itself as a view."""
    source, digest = twin.get(item.source, {}), said.get("source_sha256")
    if source and digest not in (None, source["sha256"]):
        raise ImatchError(
            f"{item.files['global']} was made from another photograph than {source['id']} of the imported data set: "
            "import both from one export"
        )
    named = _ROTATION.fullmatch(item.rotation)
    assert named is not None  # read_tree asked for it
    angle = _decimal(named["angle"]) * (-1 if named["minus"] else 1)
    crop = _decimal(named["crop"]) / 100 if named["crop"] else None
    return {
        "source": source.get("id") or said.get("source") or item.source,
        "source_sha256": source.get("sha256") or digest or _name_digest(group, item.source),
        "angle": said.get("angle", angle),
        "crop": said.get("crop", crop),
    }


def _parameters(group: Group) -> Parameters:
    """The parameters of the step, as 01_embed would have them; checks counts, metas and the arrays' headers."""
    _check_counts(group)
    made: Parameters | None = None
    claimed: dict[str, Item] = {}
    shapes: dict[str, tuple[str, Path]] = {}
    for item in compute.progress(group.items, "check"):
        metas = item.metas()
        for kind, meta in metas.items() or [("global", None)]:
            one = _described(group, meta)
            made = made or one
            if differences := files.compare(made, one):
                raise _listed(
                    f"{group}: {item.files[kind]} was made differently from the files before it",
                    differences,
                    "put files of one way of making them into a tree of their own (files without any meta count as "
                    "pooling legacy_mean)",
                )
        said = _said(item, metas)
        ours = "id" in said and any("fingerprint" in meta for meta in metas.values())
        if ours and (other := claimed.setdefault(said["id"], item)) is not item:
            raise ImatchError(
                f"{group}: the files of {other.id} and of {item.id} both say that they show {said['id']}: one of the "
                "two is left from an earlier export; delete it, or export anew with on_change recompute"
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
        _placed(group, item, said, _grid(item, said, arrays, values=False))
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


def _described(group: Group, meta: Meta | None) -> Parameters:
    """How a file was made; without a meta, what older exports hold."""
    meta = meta or {}
    text = {key: value for key, value in meta.items() if isinstance(value, str)}
    backbone = meta.get("backbone")
    if not isinstance(backbone, dict):
        entry = {"hub_entry": group.hub_entry, "family": group.family} if group.family != "NONE" else {}
        backbone = {
            **entry,
            "filename": text.get("filename", ""),
            "source": "imported",
            "pooling": text.get("pooling", "legacy_mean"),
            "precision": text.get("precision", ""),
        }
    return {
        "backbone": backbone,
        "weights_digest": text.get("weights_digest", ""),
        "resize": resize if isinstance(resize := meta.get("resize"), dict) else {},
    }


def _grid(item: Item, said: Meta, arrays: Mapping[str, np.ndarray], values: bool = True) -> tuple[int, int] | None:
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
    if "grid" in said:
        h, w = map(int, said["grid"])
        if h * w != len(patch):
            raise ImatchError(
                f"{item.files['patch']} holds {len(patch)} tokens, its meta says a grid of {[h, w]}: export it again"
            )
        return h, w
    side = math.isqrt(len(patch))
    if side * side != len(patch):
        raise ImatchError(
            f"{item.files['patch']} holds {len(patch)} tokens, which is no square, and nothing says their grid: "
            "export PatchGrid as well, or a meta with grid [h, w]"
        )
    return side, side  # older exports were square


def _placed(group: Group, item: Item, said: Meta, grid: tuple[int, int] | None) -> tuple[tuple[int, int], np.ndarray]:
    """The (h, w) of a photograph, as its meta says or else as the backbone saw it, and (n, 2) float32 where its tokens
    lie: as the meta says, else on a grid over all of it, thinned for sub<s>."""
    patch = weights.patch_side(group.hub_entry)
    size = tuple(map(int, said.get("size", ())))
    if grid is None:
        return size or (patch, patch), np.zeros((0, 2), np.float32)
    lattice = "xy_first" in said and "xy_step" in said
    stride, raw = 1 if group.variant == "raw" else int(group.variant[3:]), grid
    if stride > 1 and not (lattice and size):
        number = re.fullmatch(r"res_?(\d+)(-.*)?", group.cfg)
        raw = (int(number[1]) // patch if number else 0,) * 2
        if tuple(-(-side // stride) for side in raw) != grid:
            raise ImatchError(
                f"{item.files.get('grid') or item.files['patch']} is a grid of {grid}, thinned by {stride} from one "
                f"that neither configuration {group.cfg} nor a meta tells: give it a meta with size, xy_first and "
                "xy_step ([x, y] pixels of the first token, and between neighbours), or import the variant raw"
            )
    size = size or (raw[0] * patch, raw[1] * patch)
    if lattice:
        x, y = (f + np.arange(n) * s for f, n, s in zip(said["xy_first"], grid[::-1], said["xy_step"], strict=True))
        return size, np.stack([a.ravel() for a in np.meshgrid(x, y)], axis=1).astype(np.float32)
    return size, grid_xy(raw, size).reshape(*raw, 2)[::stride, ::stride].reshape(-1, 2)


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


_Sides = Annotated[list[Annotated[PositiveFloat, Field(multiple_of=1)]], Field(min_length=2, max_length=2)]


class _Meta(config.Said, extra="ignore"):
    """Of a meta, what would place tokens or photographs wrongly."""

    size: _Sides | None = None
    grid: _Sides | None = None
    xy_first: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    xy_step: Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)] | None = None
    angle: float | None = None
    crop: PositiveFloat | None = None
    position: dict[str, Any] | None = None


_TOLD = (*_Meta.model_fields, "id", "sha256", "capture", "source", "source_sha256")


def _checked(path: Path) -> Meta:
    """What a meta file says."""
    meta = per_image.read_meta(path)
    config.checked(_Meta, meta, f"{path}: ")
    return meta


def _said(item: Item, metas: Mapping[str, Meta]) -> Meta:
    """What the metas of one photograph's files say of it; they may not say two things."""
    said: Meta = {}
    for key in _TOLD:
        wanted = object if key in _Meta.model_fields else str
        told = [
            (kind, meta[key])
            for kind, meta in metas.items()
            if meta.get(key) is not None and isinstance(meta[key], wanted)
        ]
        for kind, value in told:
            if value != said.setdefault(key, value):
                raise ImatchError(
                    f"{item.files[told[0][0]]} and {item.files[kind]} do not belong together: {key} is {said[key]} in "
                    f"the meta of one and {value} in the other's; export them again"
                )
    return said


def _name_digest(group: Group, name: str) -> str:
    """Stands for the SHA-256 of a photograph that is not at hand: of its name, the same for all that show it."""
    return hashlib.sha256(os.fsencode(f"{group.folder.name}/{name}")).hexdigest()


def _about(group: Group, groups: Sequence[Group]) -> dict[str, str]:
    """What a group's step is. Two families of one weight are kept apart; two networks are refused."""
    alike = [
        g for g in groups if all(getattr(g, k) == getattr(group, k) for k in ("folder", "weight", "cfg", "variant"))
    ]
    entries = {g.hub_entry for g in alike if g.family == group.family}
    if len(entries) > 1:
        raise ImatchError(
            f"{group.folder / group.weight} holds files of {' and '.join(sorted(entries))}: one weight is one "
            "network, so move one of them into a folder of its own"
        )
    family = f"_{group.family}" if len({g.family for g in alike}) > 1 else ""
    kind = {"kind": "imported"} if group.reference else {}
    name = f"{group.cfg}_{group.variant}{family}"
    return {"dataset": group.folder.name, **kind, "weight": group.weight, "configuration": name}


def _decimal(text: str) -> float:
    return float(text.replace("p", "."))


def _listed(what: str, problems: Sequence[str], remedy: str) -> ImatchError:
    more = [f"... and {len(problems) - 10} more"] if len(problems) > 10 else []
    lines = "\n".join(f"  {files.printable(line)}" for line in [*problems[:10], *more])
    return ImatchError(f"{what}:\n{lines}\n{remedy[0].upper()}{remedy[1:]}.")


def import_all(tree: str, exports: str, run: str, on_change: str) -> int:
    """Read a tree of per-image files into stores, one after the other, and say how each went.

    Args:
        tree: the root of the files, a data set's folder in it or a weight's.
        exports: where the stores go; "" is EXPORT_ROOT, else exports/.
        run: name of this piece of work.
        on_change: "refuse" or "recompute" stores of changed files.

    Returns:
        0 if every store is there, 1 if one failed.

    Raises:
        ImatchError: there is nothing to read, or `run` is no name of a folder.
    """
    groups = read_tree(settings.from_workspace(tree))
    home = settings.from_workspace(exports or settings.root("EXPORT_ROOT"))
    config.folder_name(run, "run")
    failures = 0
    for group in groups:
        print(f"== {group}: {len(group.items)}", flush=True)
        try:
            import_group(group, groups, home, run, on_change)
        except ImatchError as error:
            failures += 1
            said = str(error).replace("set on_change to recompute", "--on-change recompute")
            print(f"FAILED {group}: {said}", file=sys.stderr, flush=True)
    return 1 if failures else 0
