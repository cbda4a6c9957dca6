"""Per-image files, in: a tree of `.npy` + `_meta.json`, of `perimage` or of another tool, becomes a store.

    imatch import DIR [--exports DIR] [--run NAME] [--on-change refuse|recompute]

Names and folders are those of `perimage`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
from pydantic import BeforeValidator, Field, PositiveFloat

from imatch.core import compute, config, files, settings
from imatch.core.rows import Json, Parameters, PhotoRow, Position
from imatch.core.step import check_planned, open_step, start_step
from imatch.core.types import ImatchError, Tokens, grid_xy, normalise
from imatch.data import images
from imatch.data.shards import Shards
from imatch.data.store import Stored
from imatch.export import per_image
from imatch.features import weights
from imatch.steps.embedding import finish_embed

SHARD = 64
_KINDS = {"Global": "global", "Patch": "patch", "PatchGrid": "grid", "Grid": "grid"}
_PATH = re.compile(
    r"(?P<folder>.*/[^/]+)/(?P<weight>[^/]+)/(?P<label>[^/]+)/"
    r"(?:(?P<rotation>(?i:(?:rot)?_?(?P<minus>m|-)?(?P<angle>\d+(?:[p.]\d+)?)(?:deg)?"
    r"(?:_crop(?P<crop>\d+(?:[p.]\d+)?))?))/)?"
    r"(?:(?:Reference)?(?:Global|Patch|PatchGrid|Grid|DenseFT)(?:Token)?/)?"
    r"(?P<reference>Reference)?(?P<kind>Global|PatchGrid|Patch|Grid|DenseFT)(?:Token)?_(?P<cfg>[^/]+)"
    rf"{per_image.ANCHOR}(?P=label)_(?P<frame>[^/]+)\.npy",
    re.DOTALL,
)
_NAMED = "<dataset>/<weight>/<label>/<Kind>/<Kind>_<cfg>_<variant>_<hub_entry>_<LVD|SAT>_<label>_<frame>.npy"


@dataclass(frozen=True)
class Item:
    """One photograph's files in a tree.

    Attributes:
        label, frame: as the file names say.
        rotation: name of a reference's folder, such as "rot045"; "" for a photograph.
        angle, crop: degrees, and the ratio if there is one, that it says.
        files: "global", "patch", "grid" -> the array file.
    """

    label: str
    frame: str
    rotation: str = ""
    angle: float = 0.0
    crop: float | None = None
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

    @property
    def metas(self) -> dict[str, Path]:
        """The meta files that are there, by the array they belong to."""
        paths = {kind: path.with_name(f"{path.stem}_meta.json") for kind, path in sorted(self.files.items())}
        return {kind: path for kind, path in paths.items() if path.is_file()}


@dataclass(frozen=True, order=True)
class Group:
    """The files of a tree that make one store.

    Attributes:
        reference: whether these are references.
        folder: the data set's folder in the tree.
        weight, cfg, variant, hub_entry, family: as folders and file names say; without DINOv3, the entry is the
            backbone's name and the family "NONE".
        items: sorted by id.
    """

    reference: bool
    folder: Path
    weight: str
    cfg: str
    variant: str
    hub_entry: str
    family: str
    items: list[Item] = field(default_factory=list, compare=False, kw_only=True)

    def __str__(self) -> str:
        what = "references" if self.reference else "photographs"
        return f"{self.folder.name} {self.weight} {self.cfg} {self.variant} {self.hub_entry} {self.family} {what}"


def read_tree(tree: Path) -> list[Group]:
    """Sort the per-image files below a folder into the stores that they make; no array is read.

    Args:
        tree: the root, a data set's folder in it or a weight's.

    Returns:
        Photographs before references.

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
    tree = settings.from_workspace(tree)
    found: dict[Group, dict[str, Item]] = {}
    problems: list[str] = []
    for path in (path for path in sorted(tree.rglob("*.npy")) if not path.name.startswith(".")):
        name = _PATH.fullmatch(path.as_posix())
        middles = re.findall(f"(?={per_image.ANCHOR})", path.stem)  # of two, either could be the one
        if not name or len(middles) > 1 or bool(name["reference"]) != bool(name["rotation"]):
            problems.append(files.relative(path, tree))
        elif name["kind"] != "DenseFT":  # made from the tokens, and made again from the store
            made = (name[key] for key in ("weight", "cfg", "variant", "hub", "family"))
            items = found.setdefault(Group(bool(name["reference"]), Path(name["folder"]), *made), {})
            item = _item(name)
            item = items.setdefault(item.id, item)
            kind = _KINDS[name["kind"]]
            if item.files.setdefault(kind, path) != path:
                problems.append(f"{files.relative(path, tree)}: says the same as {item.files[kind].name}")
    if problems:
        raise _listed(
            f"{tree} holds .npy files whose names do not say what they are",
            problems,
            f"they must be called {_NAMED}, references in a folder such as <label>/rot045; rename them or move them "
            "away",
        )
    if not found:
        raise ImatchError(
            f"no per-image files below {tree}: give the folder of the tree, its data set's or its weight's"
        )
    called: dict[str, Path] = {}
    for folder in (group.folder for group in found):
        if (other := called.setdefault(folder.name, folder)) != folder:
            raise ImatchError(
                f"{tree} holds two data sets named {folder.name}, {other} and {folder}, which would become one: "
                "import each by its folder and with a --run of its own, or rename one"
            )
    return [replace(group, items=[items[id] for id in sorted(items)]) for group, items in sorted(found.items())]


def _item(name: re.Match[str]) -> Item:
    angle, crop = (float((name[key] or "0").replace("p", ".").replace("P", ".")) for key in ("angle", "crop"))
    angle = -angle if name["minus"] else angle
    return Item(name["label"], name["frame"], name["rotation"] or "", angle, crop / 100 if name["crop"] else None)


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
    if (folder / "step.json").is_file():
        before = open_step(folder, finished=False)
        if before.parameters.get("imported") and not before.finished:
            on_change = "recompute"  # an import that failed asked for its files to be mended
        elif on_change == "recompute" and before.parameters != parameters:
            for item in group.items:  # so that a file which does not fit takes no finished store with it
                _read(group, item, parameters, twin)
    step = start_step(home, name, about, parameters, upstream, links, on_change)
    if not Shards(folder).merged:
        done, (_, first) = Shards(folder).rows(), _read(group, group.items[0], parameters, twin)
        todo = [shard for shard in range(-(-len(group.items) // SHARD)) if shard not in done]
        for shard in compute.progress(todo, "import"):
            items = group.items[shard * SHARD : (shard + 1) * SHARD]
            read = [_read(group, item, parameters, twin) for item in items]
            for item, (_, tokens) in zip(items, read, strict=True):
                if (here := _shape(tokens)) != _shape(first):
                    raise ImatchError(
                        f"{group}: files of one store must be alike, but {group.items[0].files['global']} has "
                        f"{_shape(first)} and {item.files['global']} {here}: move one of them into a tree of its own"
                    )
            Shards(folder).write(shard, [row for row, _ in read], [tokens for _, tokens in read], dtype=None)
        files.write_rows(folder / "metas.jsonl", map(_metas, group.items))
        Shards(folder).merge()
    stored = Stored(folder)
    check_planned(folder / "images.jsonl", len(stored), len(group.items), "set on_change to recompute and run it again")
    finish_embed(step, stored)
    return folder


def _shape(tokens: Tokens) -> str:
    d, dtype = tokens.descriptors.shape[1], tokens.descriptors.dtype
    return f"a vector of {len(tokens.vector)} numbers and descriptors of {d} {dtype}"


def _metas(item: Item) -> dict[str, dict[str, Json]]:
    return {kind: per_image.read_meta(path) for kind, path in item.metas.items()}


def _parameters(group: Group) -> Parameters:
    """The parameters that 01_embed would have; checks that no file is missing."""
    local = any({*item.files} - {"global"} for item in group.items)
    lack = {item.id: "GlobalToken" for item in group.items if "global" not in item.files}
    lack |= {item.id: "PatchToken or PatchGrid" for item in group.items if local and not {*item.files} - {"global"}}
    if lack:
        raise _listed(
            f"{group}: {len(lack)} of {len(group.items)} lack a file that others have",
            [f"{id}: no {kind}" for id, kind in sorted(lack.items())],
            "export what is missing, or move what is left over away",
        )
    shown: dict[str, Item] = {}
    for item in group.items:
        for meta in _checked(item).values():
            if meta.id and meta.fingerprint and (other := shown.setdefault(meta.id, item)) is not item:
                raise ImatchError(
                    f"{group}: the files of {other.id} and of {item.id} both say that they show {meta.id}: one of the "
                    "two is left from an earlier export; delete it, or export again with on_change recompute"
                )
    paths = [path for item in group.items for path in (*item.files.values(), *item.metas.values())]
    seen = [
        (files.relative(path, group.folder), images.file_digest(path))
        for path in compute.progress(sorted(paths), "hash")
    ]
    return {
        "weight": group.weight,
        **_described(group, next(iter(_checked(group.items[0]).values()))),
        "cfg": group.cfg,
        "variant": group.variant,
        "shard_size": SHARD,
        "dataset": "",
        "image_groups": [],
        "imported": True,
        "files": files.digest(seen),
    }


def _read(group: Group, item: Item, parameters: Parameters, twin: Mapping[str, PhotoRow]) -> tuple[PhotoRow, Tokens]:
    said = _said(group, item, parameters)
    arrays = {kind: _load(kind, path) for kind, path in item.files.items()}
    local, grid = _local(item, said, arrays)
    vector, exact = arrays["global"].astype(np.float32), arrays["global"].astype(np.float64)
    norm = float(np.linalg.norm(exact))
    if abs(norm - 1) < 1e-5:
        norm = 1.0  # normalised already: kept bit for bit
    else:
        vector = normalise(exact).astype(np.float32)
    if local is None:
        local = np.zeros((0, len(vector)), np.float32)
    size, xy = _placed(group, item, said, grid)
    row: PhotoRow = {
        "id": item.id,
        "size": size,
        "sha256": said.sha256 or _name_digest(group, item.id),
        "position": cast("Position | None", said.position),  # as the file has it
        "label": item.label,
        "name": item.id,
        "global_norm": norm,
    }
    if said.capture is not None:
        row["capture"] = said.capture
    if item.frame.isdecimal():
        row["frame"] = int(item.frame)
    if group.reference:
        row["source"], row["source_sha256"] = _source(group, item, said, twin)
        row["angle"] = item.angle if said.angle is None else said.angle
        row["crop"] = item.crop if said.crop is None else said.crop
    return row, Tokens(vector, np.ascontiguousarray(local), xy, grid)


def _source(group: Group, item: Item, said: _Meta, twin: Mapping[str, PhotoRow]) -> tuple[str, str]:
    if (source := twin.get(item.source)) is None:
        return said.source or item.source, said.source_sha256 or _name_digest(group, item.source)
    if said.source_sha256 not in (None, source["sha256"]):
        raise ImatchError(
            f"{item.files['global']} was made from another photograph than {source['id']} of the imported data set: "
            "import both from one export"
        )
    return source["id"], source["sha256"]


def _described(group: Group, meta: _Meta) -> Parameters:
    entry = {"hub_entry": group.hub_entry, "family": group.family} if group.family != "NONE" else {}
    backbone = {
        **entry,
        "filename": meta.filename or "",
        "source": "imported",
        "pooling": "legacy_mean" if meta.pooling is None else meta.pooling,
        "precision": meta.precision or "",
    }
    return {
        "backbone": backbone if meta.backbone is None else meta.backbone,
        "weights_digest": meta.weights_digest or "",
        "resize": meta.resize or {},
    }


def _local(
    item: Item, said: _Meta, arrays: Mapping[str, np.ndarray]
) -> tuple[np.ndarray | None, tuple[int, int] | None]:
    """An item's local tokens (n, d), and the (h, w) that they lie on; None without any."""
    patch, grid = arrays.get("patch"), arrays.get("grid")
    if grid is not None:
        flat = grid.reshape(-1, grid.shape[2])
        if patch is not None and not np.array_equal(patch, flat):
            raise ImatchError(
                f"{item.files['patch']} and {item.files['grid']} are not the same, row by row: export them again"
            )
        return flat, (grid.shape[0], grid.shape[1])
    if patch is None:
        return None, None
    side = math.isqrt(len(patch))  # older exports were square
    h, w = map(int, said.grid or (side, side))
    if h * w != len(patch):
        says = f"its meta says {[h, w]}" if said.grid else "nothing says their grid"
        raise ImatchError(
            f"{item.files['patch']} holds {len(patch)} tokens, but {says}: export PatchGrid, or a meta with grid [h, w]"
        )
    return patch, (h, w)


def _placed(group: Group, item: Item, said: _Meta, grid: tuple[int, int] | None) -> tuple[tuple[int, int], np.ndarray]:
    """The (h, w) of a photograph, and (n, 2) where its tokens lie: as its meta says, else on a grid over what the
    backbone saw."""
    patch = weights.patch_side(group.hub_entry)
    size = (int(said.size[0]), int(said.size[1])) if said.size else None
    if grid is None:
        return size or (patch, patch), np.zeros((0, 2), np.float32)
    stride, raw = 1 if group.variant == "raw" else int(group.variant[3:]), grid
    if stride > 1 and not (said.xy_first and said.xy_step and size):
        number = re.fullmatch(r"res_?(\d+)(-.*)?", group.cfg)
        raw = (int(number[1]) // patch if number else 0,) * 2
        if tuple(-(-side // stride) for side in raw) != grid:
            raise ImatchError(
                f"{item.files.get('grid') or item.files['patch']} is a grid of {grid}, thinned by {stride} from one "
                f"that neither configuration {group.cfg} nor a meta tells: give it a meta with size, xy_first and "
                "xy_step ([x, y] pixels of the first token, and between neighbours), or import the variant raw"
            )
    size = size or (raw[0] * patch, raw[1] * patch)
    if said.xy_first and said.xy_step:
        x, y = (f + np.arange(n) * s for f, n, s in zip(said.xy_first, grid[::-1], said.xy_step, strict=True))
        return size, np.stack([a.ravel() for a in np.meshgrid(x, y)], axis=1).astype(np.float32)
    return size, grid_xy(raw, size).reshape(*raw, 2)[::stride, ::stride].reshape(-1, 2)


def _load(kind: str, path: Path) -> np.ndarray:
    """An array, mapped: (D,) of "global", (n, d) of "patch", (h, w, d) of "grid"; a leading 1 is dropped."""
    wanted = {"global": 1, "patch": 2, "grid": 3}[kind]
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError) as error:
        raise ImatchError(f"{path} is no .npy file of numbers ({error}): export it again or move it away") from error
    if array.ndim == wanted + 1 and len(array) == 1:
        array = array[0]
    if array.dtype.kind != "f" or array.ndim != wanted or not array.size:
        raise ImatchError(
            f"{path} holds {array.dtype} of shape {array.shape}, but a {kind} has floating-point numbers in {wanted} "
            "dimensions: export it again or move it away"
        )
    if not np.isfinite(array).all():
        raise ImatchError(f"{path} holds values that are not finite: export it again")
    return array


def _if(kind: type) -> BeforeValidator:
    return BeforeValidator(lambda given: given if isinstance(given, kind) else None)


_Text = Annotated[str | None, _if(str)]
_Object = Annotated[dict[str, Any] | None, _if(dict)]
_Sides = Annotated[list[Annotated[PositiveFloat, Field(multiple_of=1)]], Field(min_length=2, max_length=2)]


class _Meta(config.Said, extra="ignore"):
    """A meta. Only what would place tokens or photographs wrongly is refused."""

    size: _Sides | None = None
    grid: _Sides | None = None
    xy_first: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    xy_step: Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)] | None = None
    angle: float | None = None
    crop: PositiveFloat | None = None
    position: dict[str, Any] | None = None
    id: _Text = None
    fingerprint: _Text = None
    sha256: _Text = None
    capture: _Text = None
    source: _Text = None
    source_sha256: _Text = None
    filename: _Text = None
    pooling: _Text = None
    precision: _Text = None
    weights_digest: _Text = None
    backbone: _Object = None
    resize: _Object = None


def _checked(item: Item) -> dict[str, _Meta]:
    """What the metas of a photograph's files say."""
    told = {kind: config.checked(_Meta, per_image.read_meta(path), f"{path}: ") for kind, path in item.metas.items()}
    return told or {"global": _Meta()}


def _said(group: Group, item: Item, parameters: Parameters) -> _Meta:
    """What the metas of one photograph's files say of it together; they may not say two things."""
    said: dict[str, Any] = {}
    for kind, meta in _checked(item).items():
        if differences := files.compare(parameters, {**parameters, **_described(group, meta)}):
            raise _listed(
                f"{group}: {item.files[kind]} was made differently from {group.items[0].id}",
                differences,
                "put them into a tree of their own (files without any meta count as pooling legacy_mean)",
            )
        for key, value in meta.model_dump(exclude_none=True).items():
            if value != said.setdefault(key, value):
                raise ImatchError(
                    f"{item.files[kind]} is of another photograph than other files of {item.id}: its meta has {key} "
                    f"{value}, theirs {said[key]}; export them again"
                )
    return _Meta(**said)


def _name_digest(group: Group, name: str) -> str:
    """Stands for the SHA-256 of a photograph that is not at hand."""
    return files.name_digest(f"{group.folder.name}/{name}")


def _about(group: Group, groups: Sequence[Group]) -> dict[str, str]:
    """What a group's step is. Several networks and families of one weight are kept apart."""
    place = attrgetter("folder", "weight", "cfg", "variant")
    alike = [other for other in groups if place(other) == place(group)]
    told = [key for key in ("hub_entry", "family") if len({getattr(other, key) for other in alike}) > 1]
    kind = {"kind": "imported"} if group.reference else {}
    name = "_".join(getattr(group, key) for key in ("cfg", "variant", *told))
    about = {"dataset": group.folder.name, **kind, "weight": group.weight, "configuration": name}
    return {what: files.one_name(said) for what, said in about.items()}


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
