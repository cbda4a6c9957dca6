"""Where things are, and what they are called: params/data_key.json, folders, environment.

The only room that looks at the environment. The registry names data sets (where their photographs lie and how their
files are called) and weights; whatever is named in it lies below its root, or is refused.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import string
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from imatch import plugins
from imatch.records import ImatchError

DATA_KEY = "params/data_key.json"
ROOTS = {  # variable -> its default in the container, if that is there, and in the working folder
    "DATASET_ROOT": ("/opt/datasets", "data"),
    "REFERENCE_ROOT": ("/opt/references", "references"),
    "WEIGHTS_ROOT": ("/workspace/weights", "weights"),
    "DINOV3_REPO": ("/workspace/dinov3", "dinov3"),
    "EXPORT_ROOT": ("/exports", "exports"),
}
FAMILIES = {"LVD": "lvd1689m", "SAT": "sat493m"}
"""What weights were trained on, which decides how photographs are normalised -> how their files are called."""
FRAMES = ("frame", "index", "idx")
FOLDER_TEMPLATE = "{capture_id}_{label}"
FILENAME_TEMPLATE = "{capture_id}_{label}_{frame}.jpg"
NAMED = 10
"""How many things a message lists."""


def workspace() -> Path:
    """The folder that relative paths start from.

    It is the working folder; inside `notebooks/`, where JupyterLab starts a notebook's kernel, it is the
    folder above, so that a notebook means the same paths from JupyterLab, papermill and batch.

    >>> workspace().is_absolute()
    True
    """
    here = Path.cwd()
    return here.parent if here.name == "notebooks" else here


def resolve(path: str | Path) -> Path:
    """`path` as an absolute path: `~` expanded, relative ones taken from `workspace()`.

    >>> resolve("data/demo") == workspace() / "data" / "demo"
    True
    """
    return Path(os.path.normpath(workspace() / Path(path).expanduser()))


def root(name: str) -> Path:
    """The folder that the variable `name` stands for: what it is set to, else its default.

    Args:
        name: DATASET_ROOT, REFERENCE_ROOT, WEIGHTS_ROOT, DINOV3_REPO or EXPORT_ROOT.

    Raises:
        ImatchError: another name.

    >>> root("WEIGHTS_ROOT").is_absolute()
    True
    """
    if name not in ROOTS:
        raise ImatchError(plugins.unknown("root", name, ROOTS))
    container, local = ROOTS[name]
    return resolve(os.environ.get(name) or (container if Path(container).is_dir() else local))


def exports_folder(exports: str) -> Path:
    """The folder that results go to; "" is EXPORT_ROOT.

    >>> exports_folder("results") == workspace() / "results"
    True
    """
    return resolve(exports) if exports else root("EXPORT_ROOT")


def cache_folder() -> Path:
    """Where things are remembered that could be worked out again.

    >>> cache_folder().name
    'imatch'
    """
    return resolve(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "imatch"


def cores() -> int:
    """How many CPU cores this process may use.

    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores() -> None:
    """Let the OpenMP threads of torch and FAISS sleep while they wait, unless the user chose otherwise.

    Both bring a pool of threads of their own; spinning ones take the cores from each other. It acts on
    processes started afterwards (the kernels that batch starts), for OpenMP reads it when it is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# --- files of names ---------------------------------------------------------------------------------------


def read(path: str | Path) -> Any:
    """What a JSON or YAML file holds; a name given twice is an error, for one of the two would be lost.

    Raises:
        ImatchError: no such file, or it cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "a.yaml").write_text("a: [1, 2]")
    ...     read(Path(folder) / "a.yaml")
    {'a': [1, 2]}
    """
    path = resolve(path)
    kind = {".json": "JSON", ".yaml": "YAML", ".yml": "YAML"}.get(path.suffix.lower())
    if not path.is_file():
        raise ImatchError(f"no file {path}: give an existing YAML or JSON file")
    if kind is None:
        raise ImatchError(f"{path} ends in {path.suffix!r}: give a file that ends in .json, .yaml or .yml")
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin files with a byte-order mark
        return json.loads(text, object_pairs_hook=_once) if kind == "JSON" else yaml.load(text, _Yaml)
    except OSError as error:
        raise ImatchError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError, ImatchError) as error:
        raise ImatchError(f"{path} is no {kind}: {error}") from error


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ImatchError(f"{name!r} is given {count} times: keep one")
    return dict(pairs)


class _Yaml(yaml.SafeLoader):
    """YAML in which no name may be given twice, as in JSON."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


def fields(value: Any, known: Iterable[str] | None, where: str) -> dict[str, Any]:
    """`value` if it is an object of fields that are known; those that are null are left out, as if not given.

    Args:
        value: what the file holds there.
        known: the names that may be there; None for any.
        where: for messages: "FILE: models[0].run"; at the top of a file "FILE: ".

    Raises:
        ImatchError: it is no object, or has a field that nobody knows, with the nearest known one.

    >>> fields({"use": True, "stride": None}, ["use", "stride"], "manifest.json: variant.sub")
    {'use': True}
    """
    place = where.removesuffix(": ")
    if not isinstance(value, Mapping):
        raise ImatchError(f"{place} wants an object of {_names(known) if known else 'names'}, got {value!r}")
    for name in value:
        if not isinstance(name, str):
            raise ImatchError(f"{place}: {name!r} is read as a {type(name).__name__}: put it in quotes")
        if known is not None and name not in known:
            raise ImatchError(f"{within(where, name)}: {plugins.unknown('field', name, known)}")
    return {name: content for name, content in value.items() if content is not None}


def within(where: str, name: str) -> str:
    """Where a field lies.

    >>> within("manifest.json: ", "run"), within("manifest.json: run", "generate_denseft")
    ('manifest.json: run', 'manifest.json: run.generate_denseft')
    """
    return f"{where}{name}" if where.endswith(": ") else f"{where}.{name}"


def wants(value: Any, kind: type, where: str) -> Any:
    """`value` if it is a `kind`.

    Raises:
        ImatchError: it is something else.

    >>> wants(True, bool, "manifest.json: run.test_embedding")
    True
    """
    if not plugins.fits(value, kind):
        said = {str: "text", bool: "true or false", int: "a whole number", list: "a list"}[kind]
        raise ImatchError(f"{where} wants {said}, got {value!r}")
    return value


def folder_name(name: str, what: str) -> str:
    """`name` if it may be the name of a folder anywhere: keys and configurations name folders of results.

    >>> folder_name("vits16+", "weight")
    'vits16+'
    """
    if not name.strip(".") or not all(c.isalnum() or c in "-_.+" for c in name):
        said = "it becomes the name of a folder: use letters, digits, '-', '_', '.', '+'"
        raise ImatchError(f"{what} {name!r}: {said}")
    return name


def _names(names: Iterable[Any]) -> str:
    listed = [str(name) for name in names]
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def _below(text: str, where: str, above: object) -> str:
    """`text` if, as a path, it stays below the folder that it is relative to, on any system."""
    windows = PureWindowsPath(text)
    leaves = windows.drive or windows.root or PurePosixPath(text).is_absolute() or ".." in re.split(r"[\\/]", text)
    if leaves or "\0" in text:
        raise ImatchError(f"{where} {text!r} would leave {above}: give a path below it, without '..' or a drive")
    return text


# --- weights ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """A file of weights and what it is.

    Attributes:
        key: its name in imatch, such as "vits16"; `set` and `group` are the objects of the registry that it is in.
        hub_entry: the function of Meta's hubconf.py that builds its model.
        filename: its file in WEIGHTS_ROOT.
        family: "LVD" (photographs) or "SAT" (satellite): how it wants photographs normalised.

    Raises:
        ImatchError: a family that is none or that the file's name contradicts, a file that would leave WEIGHTS_ROOT.

    >>> Weight("s", "dinov3", "vit", "dinov3_vits16", "dinov3_vits16_pretrain_lvd1689m-08c60483.pth", "LVD").family
    'LVD'
    """

    key: str
    set: str
    group: str
    hub_entry: str
    filename: str
    family: str

    def __post_init__(self) -> None:
        where = f"weight {self.set}.{self.group}.{self.key}:"
        folder_name(self.key, "weight")
        if not self.hub_entry.isidentifier():
            raise ImatchError(f"{where} hub entry {self.hub_entry!r} is no name, such as dinov3_vits16")
        if not self.filename.strip(". ") or any(c in self.filename for c in "/\\:\0"):
            raise ImatchError(f"{where} file {self.filename!r} would leave WEIGHTS_ROOT: give the bare name of a file")
        if self.family not in FAMILIES:
            near = self.family.strip().upper()
            hint = f"did you mean {near!r}? " if near in FAMILIES else ""
            raise ImatchError(f"{where} unknown family {self.family!r}: {hint}Known: {', '.join(FAMILIES)}")
        for family, sign in FAMILIES.items():
            if sign in self.filename.lower() and family != self.family:
                raise ImatchError(
                    f"{where} {self.filename} was trained as {family}, but its family is given as {self.family}: "
                    f"photographs would be normalised wrongly; write {family}"
                )


# --- data sets --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capture:
    """One recording of a data set: a folder of frames.

    Attributes:
        label: what it shows, or from how high; None if it was not given.
        folder: POSIX path relative to the data set's root.
        filename_template: how its files are called.
        pattern: the same for matching: a group for every frame.
    """

    label: str | None
    folder: str
    filename_template: str
    pattern: re.Pattern[str]


@dataclass(frozen=True)
class Group:
    """A part of the photographs that an image group asks for.

    Attributes:
        folder: a capture, its folder or its label; None for every one that has photographs.
        frames: an inclusive range (which may have gaps), the frames one by one, or None for all.
    """

    folder: str | None
    frames: range | tuple[int, ...] | None


@dataclass(frozen=True)
class Dataset:
    """A folder of photographs, whole or by its captures.

    Attributes:
        key: its name in the registry and in exports; a folder that is not in the registry has its own name.
        root: the folder, absolute; ids of photographs are relative to it.
        folder_template, filename_template: how folders and files are called where a capture does not say.
        captures: capture id -> capture; empty for a plain folder.
        glob: of a plain folder, the ids that belong to it (`**` is any number of folders); "" for all.
        registered: whether it is from the registry, and no folder that was given by its path.
    """

    key: str
    root: Path
    folder_template: str = FOLDER_TEMPLATE
    filename_template: str = FILENAME_TEMPLATE
    captures: Mapping[str, Capture] = field(default_factory=dict)
    glob: str = ""
    registered: bool = False

    def select(self, ids: Sequence[str], image_groups: Sequence[Mapping[str, Any]] = ()) -> dict[str, dict[str, Any]]:
        """The photographs that the data set and the image groups choose.

        Args:
            ids: all photographs below the root, as `images.list_photographs` gives them.
            image_groups: none for all; else what `groups` describes.

        Returns:
            id -> {"capture", "label", "frame"}, sorted by id; None where it is unknown.

        Raises:
            ImatchError: a photograph that was asked for is not there, or cannot be told from another.

        >>> found = Dataset("d", Path("/d")).select(["a/x_07.jpg", "b.jpg"], [{"folder": "a", "indices": [7]}])
        >>> found
        {'a/x_07.jpg': {'capture': None, 'label': None, 'frame': 7}}
        """
        folders, found = self._sorted_into_folders(ids)
        if ids and not found:
            wanted = [f"{c.folder}/{c.filename_template}" for c in self.captures.values()] or [self.glob]
            raise ImatchError(
                f"data set {self.key}: none of the {len(ids)} photographs below {self.root} (such as {ids[0]!r}) "
                f"is called as the registry says: {_names(wanted)}"
            )
        if not image_groups:
            return found
        chosen: set[str] = set()
        for group in groups(image_groups):
            for names in [self._named(group.folder, folders)] if group.folder is not None else [[f] for f in folders]:
                here = [id for name in names for id in folders.get(name, [])]
                chosen.update(self._frames(here, found, group, names))
        return {id: meta for id, meta in found.items() if id in chosen}

    def captures_named(self, folder: str) -> list[str]:
        """The captures that an image group's `folder` means: by id, else by folder, else by label.

        Raises:
            ImatchError: there is none, or a label that several have.

        >>> Dataset("d", Path("/d"), captures={"A1": Capture("80m", "f", "", re.compile(""))}).captures_named("80m")
        ['A1']
        """
        if folder in self.captures:
            return [folder]
        path = PurePosixPath(folder).as_posix()
        if same := [id for id, capture in self.captures.items() if capture.folder == path]:
            return same
        labelled = [id for id, capture in self.captures.items() if capture.label == folder]
        if len(labelled) > 1:
            raise ImatchError(
                f"data set {self.key}: label {folder!r} means any of {_names(labelled)}: name captures, not the label"
            )
        if not labelled:
            known = {*self.captures, *(capture.folder for capture in self.captures.values())}
            known |= {capture.label for capture in self.captures.values() if capture.label}
            raise ImatchError(plugins.unknown(f"folder of data set {self.key}", folder, known))
        return labelled

    def _named(self, folder: str, folders: Mapping[str, Sequence[str]]) -> list[str]:
        if self.captures:
            return self.captures_named(folder)
        path = PurePosixPath(folder).as_posix()
        if path not in folders:
            raise ImatchError(plugins.unknown(f"folder of data set {self.key}", folder, folders))
        return [path]

    def _sorted_into_folders(self, ids: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
        """Capture (of a plain folder: parent folder) -> ids, and id -> what is known of it."""
        folders: dict[str, list[str]] = defaultdict(list)
        found: dict[str, dict[str, Any]] = {}
        taken: dict[tuple[str, int], str] = {}
        by_folder: dict[str, list[str]] = defaultdict(list)
        for name, capture in self.captures.items():
            by_folder[capture.folder].append(name)
        for id in sorted(ids):
            if not self.captures:
                if not self.glob or _matches(id.split("/"), self.glob.split("/")):
                    folders[PurePosixPath(id).parent.as_posix()].append(id)
                    digits = re.findall("[0-9]+", PurePosixPath(id).stem)
                    found[id] = {"capture": None, "label": None, "frame": int(digits[-1]) if digits else None}
                continue
            for name, frame in self._captures_of(id, by_folder):
                if id in found:
                    both = f"{found[id]['capture']} and {name}"
                    raise ImatchError(
                        f"data set {self.key}: {id} belongs to captures {both}: let their folders or files differ"
                    )
                if frame is not None and taken.setdefault((name, frame), id) != id:
                    raise ImatchError(
                        f"data set {self.key}: {taken[name, frame]} and {id} are both frame {frame} of {name}: keep one"
                    )
                folders[name].append(id)
                found[id] = {"capture": name, "label": self.captures[name].label, "frame": frame}
        return folders, found

    def _captures_of(self, id: str, by_folder: Mapping[str, Sequence[str]]) -> list[tuple[str, int | None]]:
        """The captures, of all that lie in a folder above it, that a photograph is called by, and its frame."""
        parts = id.split("/")
        belongs = []
        for depth in range(len(parts)):
            for name in by_folder.get("/".join(parts[:depth]) or ".", []):
                match = self.captures[name].pattern.fullmatch("/".join(parts[depth:]))
                if match and len(frames := {int(frame) for frame in match.groups()}) <= 1:
                    belongs.append((name, frames.pop() if frames else None))
        return belongs

    def _frames(
        self, ids: Sequence[str], found: Mapping[str, Mapping[str, Any]], group: Group, names: Sequence[str]
    ) -> list[str]:
        where = f"{_names(names)} of data set {self.key}"
        if not ids:
            folder = _names(str(self.root / self.captures[name].folder) for name in names)
            called = _names(self.captures[name].filename_template for name in names)
            raise ImatchError(f"no photographs in {where}: none in {folder} is called {called}")
        if group.frames is None:
            return list(ids)
        there = {found[id]["frame"] for id in ids} - {None}
        has = f"it has frames {min(there)} to {max(there)}" if there else "its files have no frame number"
        if isinstance(group.frames, range):
            if not any(frame in group.frames for frame in there):
                raise ImatchError(f"no photographs of frames {group.frames[0]} to {group.frames[-1]} in {where}: {has}")
        elif missing := [frame for frame in group.frames if frame not in there]:
            hint = "leave them out of `indices`, or bring the files"
            raise ImatchError(f"no photographs of frames {_names(missing)} in {where}: {has}; {hint}")
        return [id for id in ids if found[id]["frame"] in group.frames]


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns or patterns[0] == "**":
        return not parts if not patterns else any(_matches(parts[n:], patterns[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def groups(image_groups: Any, where: str = "image_groups") -> list[Group]:
    """Read image groups, a list of {folder, indices, rotation}, into one `Group` a folder.

    `folder` is a name or a list of names; without it, all. `indices`: two are an inclusive range; one, three or
    more are frames one by one; {"from": 1, "to": 132} is a range without doubt; a list of such is one a folder.
    `rotation` is for the manifests.

    Raises:
        ImatchError: an unknown field, with the nearest, or a value that cannot be meant.

    >>> groups([{"folder": ["A", "B"], "indices": [[1, 5], [7]]}])
    [Group(folder='A', frames=range(1, 6)), Group(folder='B', frames=(7,))]
    """
    read = []
    for i, item in enumerate(wants(image_groups, list, where)):
        here = f"{where}[{i}]"
        group = fields(item, ("folder", "indices", "rotation"), here)
        folders: list[str | None] = [None]
        if "folder" in group:
            given = group["folder"]
            folders = [given] if isinstance(given, str) else list(wants(given, list, f"{here}.folder"))
            for folder in folders:
                wants(folder, str, f"{here}.folder")
            if not folders:
                raise ImatchError(f"{here}.folder names no folder: leave it out for all")
        indices = group.get("indices")
        if isinstance(indices, list) and any(isinstance(part, list | dict) for part in indices):
            if folders == [None] or len(indices) != len(folders):
                named = "no folder" if folders == [None] else f"{len(folders)} folders"
                raise ImatchError(f"{here}.indices has {len(indices)} lists for {named}: give one list a folder")
            parts = [_indices(part, f"{here}.indices[{n}]") for n, part in enumerate(indices)]
        else:
            parts = [None if indices is None else _indices(indices, f"{here}.indices")] * len(folders)
        read += [Group(folder, frames) for folder, frames in zip(folders, parts, strict=True)]
    return read


def _indices(given: Any, where: str) -> range | tuple[int, ...]:
    if isinstance(given, Mapping):
        ends = fields(given, ("from", "to"), where)
        if len(ends) != 2:
            raise ImatchError(f'{where} wants both ends, {{"from": 1, "to": 132}}, got {dict(given)!r}')
        numbers = [ends["from"], ends["to"]]
    else:
        numbers = wants(given, list, where)
    for number in numbers:
        if wants(number, int, where) < 0:
            raise ImatchError(f"{where}: frame {number} is negative: frames count from 0")
    if not numbers:
        raise ImatchError(f"{where} is empty: leave it out for all frames")
    if len(numbers) != 2:
        return tuple(sorted(set(numbers)))
    first, last = numbers
    if last < first:
        raise ImatchError(f"{where}: the range ends at {last} before it begins at {first}: write [{last}, {first}]")
    return range(first, last + 1)


# --- the registry -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataKey:
    """What a registry file holds.

    Attributes:
        path: the file.
        datasets: key -> data set.
        weights: all of them, in the file's order.
    """

    path: Path
    datasets: Mapping[str, Dataset]
    weights: tuple[Weight, ...]

    def weight(self, key: str, weight_set: str = "") -> Weight:
        """The weight called `key`.

        Args:
            key: such as "vits16".
            weight_set: "set" or "set.group", needed only where several sets have that key.

        Raises:
            ImatchError: there is none, with the nearest, or there are several.

        >>> load(Path(__file__).parents[1] / DATA_KEY).weight("cxTiny").hub_entry
        'dinov3_convnext_tiny'
        """
        sets = {name for weight in self.weights for name in (weight.set, f"{weight.set}.{weight.group}")}
        if weight_set and weight_set not in sets:
            raise ImatchError(f"{self.path}: {plugins.unknown('weight_set', weight_set, sets)}")
        there = [w for w in self.weights if weight_set in ("", w.set, f"{w.set}.{w.group}")]
        found = [weight for weight in there if weight.key == key]
        if not found:
            raise ImatchError(f"{self.path}: {plugins.unknown('weight', key, {weight.key for weight in there})}")
        if len(found) > 1:
            several = _names(f"{weight.set}.{weight.group}" for weight in found)
            raise ImatchError(f"{self.path}: weight {key} is in {several}: say which as weight_set")
        return found[0]

    def dataset(self, key: str) -> Dataset:
        """The data set called `key`.

        Raises:
            ImatchError: there is none; the message has the nearest.

        >>> load(Path(__file__).parents[1] / DATA_KEY).dataset("demo").root.name
        'demo'
        """
        if key not in self.datasets:
            raise ImatchError(f"{self.path}: {plugins.unknown('data set', key, self.datasets)}")
        return self.datasets[key]


def load(path: str | Path = DATA_KEY) -> DataKey:
    """Read a registry, JSON or YAML, and check all of it.

    Raises:
        ImatchError: an unknown field, with the nearest, a value that cannot be meant, or something that would
            leave its root.

    >>> [weight.key for weight in load(Path(__file__).parents[1] / DATA_KEY).weights][:3]
    ['vits16', 'vits16+', 'vitb16']
    """
    file = resolve(path)
    top = f"{file.name}: "
    content = fields(read(file), ("datasets", "weights"), top)
    datasets = {}
    for key, given in fields(content.get("datasets", {}), None, f"{top}datasets").items():
        datasets[folder_name(key, f"{top}data set")] = _dataset(key, given, f"{top}datasets.{key}")
    weights = []
    for set_, groups_ in fields(content.get("weights", {}), None, f"{top}weights").items():
        for group, keys in fields(groups_, None, f"{top}weights.{set_}").items():
            for key, given in fields(keys, None, f"{top}weights.{set_}.{group}").items():
                where = f"{top}weights.{set_}.{group}.{key}"
                if not (isinstance(given, list) and len(given) == 3 and all(isinstance(part, str) for part in given)):
                    raise ImatchError(f"{where} wants [hub entry, file name, LVD or SAT], got {given!r}")
                weights.append(_said(top, Weight, key, set_, group, *given))
    return DataKey(file, datasets, tuple(weights))


def _said(top: str, make: Callable[..., Weight], *values: str) -> Weight:
    try:
        return make(*values)
    except ImatchError as error:
        raise ImatchError(f"{top}{error}") from error


def _dataset(key: str, given: Any, where: str) -> Dataset:
    known = ("root", "glob", "folder_template", "filename_template", "captures", "images")
    content = fields(given, known, where)
    for name in set(known[:4]) & set(content):
        wants(content[name], str, f"{where}.{name}")
    if "root" not in content:
        raise ImatchError(f'{where} has no root: name its folder below DATASET_ROOT ("" is DATASET_ROOT itself)')
    below = _below(content["root"], f"{where}.root", "DATASET_ROOT")
    folder = Path(os.path.normpath(root("DATASET_ROOT") / below))
    if "captures" in content and "images" in content:
        raise ImatchError(f"{where} has both captures and images, which are one and the same: keep one")
    templates = {name: content[name] for name in known[2:4] if name in content}
    name = "images" if "images" in content else "captures"
    if name not in content:
        if templates:
            raise ImatchError(f"{where} has templates but no captures: add captures, or give a glob instead")
        glob = _below(content.get("glob", ""), f"{where}.glob", folder)
        return Dataset(key, folder, glob=glob and PurePosixPath(glob).as_posix(), registered=True)
    if "glob" in content:
        raise ImatchError(f"{where} has both {name} and a glob: keep one")
    captures = fields(content[name], None, f"{where}.{name}")
    if not captures:
        raise ImatchError(f"{where}.{name} is empty: name a capture, or leave it out for a plain folder")
    made = {id: _capture(key, id, given, templates, f"{where}.{name}.{id}") for id, given in captures.items()}
    return Dataset(key, folder, **templates, captures=made, registered=True)


def _capture(key: str, id: str, given: Any, templates: Mapping[str, str], where: str) -> Capture:
    known = ("label", "altitude", "folder", "folder_template", "filename_template")
    own = {"label": given} if isinstance(given, str) else fields(given, known, where)
    if "label" in own and "altitude" in own:
        raise ImatchError(f"{where} has both a label and an altitude: the altitude is the label; keep one")
    if "folder" in own and "folder_template" in own:
        raise ImatchError(f"{where} has both a folder and a folder_template: keep one")
    if isinstance(altitude := own.get("altitude"), int | float) and not isinstance(altitude, bool):
        own["altitude"] = str(int(altitude)) if altitude == altitude // 1 else str(altitude)
    for name, value in own.items():
        if not wants(value, str, f"{where}.{name}") and name != "folder":
            raise ImatchError(f"{where}.{name} is empty: leave it out, or say it")
    label = own.get("label", own.get("altitude"))
    values = {"capture_id": id, "label": label, "dataset_key": key}
    values["label_token"] = None if label is None else label_token(label)
    folder = own.get("folder")
    if folder is None:
        template = {"folder_template": FOLDER_TEMPLATE, **templates, **own}["folder_template"]
        folder = _fill(template, values, f"{where}: folder_template")
    filename = {"filename_template": FILENAME_TEMPLATE, **templates, **own}["filename_template"]
    _below(folder, f"{where}: folder", "the data set's root")
    _below(_fill(filename, values, f"{where}: filename_template", frame="0"), f"{where}: file", "the data set's root")
    pattern = _fill(filename, values, f"{where}: filename_template", frame="([0-9]+)", quote=re.escape)
    return Capture(label, PurePosixPath(folder).as_posix(), filename, re.compile(pattern))


def _fill(
    template: str, values: Mapping[str, str | None], where: str, frame: str = "", quote: Callable[[str], str] = str
) -> str:
    """`template` with its placeholders filled in; {frame} only where `frame` says what stands for one."""
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ImatchError(f"{where} {template!r} is no template: {error}") from error
    text = ""
    known = [*values, *(FRAMES if frame else ())]
    for literal, name, spec, conversion in pieces:
        text += quote(literal)
        if name is None:
            continue
        if name not in known:
            raise ImatchError(f"{where} {template!r}: {plugins.unknown('placeholder', name, known)}")
        if conversion or "{" in str(spec):
            raise ImatchError(f"{where} {template!r}: write {{{name}}} or {{{name}:FORMAT}}, with nothing more inside")
        if name in FRAMES:
            if not re.fullmatch("[0-9]*d?", spec or ""):
                raise ImatchError(f"{where} {template!r}: {{{name}:{spec}}} is no padding: write it as {{{name}:04d}}")
            text += frame
            continue
        value = values[name]
        if value is None:
            raise ImatchError(f"{where} {template!r} wants {{{name}}}: give the capture a label")
        try:
            text += quote(format(value, spec or ""))
        except ValueError as error:
            raise ImatchError(f"{where} {template!r}: {{{name}:{spec}}} does not fit text: {error}") from error
    return text


def label_token(label: str) -> str:
    """A label as part of a file's or folder's name.

    >>> label_token("80 m / north"), label_token("..")
    ('80_m___north', '__')
    """
    token = "".join(c if c.isalnum() or c in "-.+" else "_" for c in label)
    return token if token.strip(".") else "_" * len(token)  # dots alone are no name but a way out of the folder


def dataset(name: str, data_key: str = DATA_KEY) -> Dataset:
    """The data set that `name` means: a key of the registry, else a folder of photographs.

    Args:
        name: the key, or a path: absolute, relative to the working folder, or below DATASET_ROOT or REFERENCE_ROOT.
        data_key: the registry's file; it may be absent if `name` is a path.

    Raises:
        ImatchError: there is no such data set or folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     dataset(folder, "").captures
    {}
    """
    if not name:
        raise ImatchError("no dataset given: set `dataset` to a folder of photographs (-p dataset PATH)")
    registered = load(data_key).datasets if data_key and resolve(data_key).exists() else {}
    if name in registered:
        if not (found := registered[name]).root.is_dir():
            raise ImatchError(
                f"data set {name} of {data_key}: its folder {found.root} does not exist: put its photographs there, "
                f"or set DATASET_ROOT (now {root('DATASET_ROOT')}) to the folder that has it"
            )
        return found
    folder = resolve(name)
    places = [folder]
    if _stays(name):
        places += [Path(os.path.normpath(root(above) / name)) for above in ("DATASET_ROOT", "REFERENCE_ROOT")]
    for place in places:
        if place.is_dir():
            return Dataset(place.name, place)
    if folder.is_file():
        raise ImatchError(f"dataset {folder} is a file: give the folder that holds the photographs")
    below = f", nor does it below {' or '.join(str(place.parent) for place in places[1:])}" if places[1:] else ""
    keys = f"in {data_key}: {plugins.unknown('data set', name, registered)}" if registered else f"no keys in {data_key}"
    raise ImatchError(
        f"dataset folder {folder} does not exist{below}: give an existing folder of photographs (-p dataset PATH) or "
        f"a key ({keys}); `make demo` writes the demo's photographs to data/demo"
    )


def _stays(name: str) -> bool:
    try:
        return bool(_below(name, "", ""))
    except ImatchError:
        return False


if __name__ == "__main__":
    from imatch import checks  # a command at the door: what it shows lies on the upper floors

    sys.exit(checks.main())
