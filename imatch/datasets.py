"""Data sets: which photographs belong to one, by what they are called.

What a registry says of them and what an image group asks for is checked here, field by field.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from imatch import plugins
from imatch.records import ImatchError

FRAMES = ("frame", "index", "idx")
FOLDER_TEMPLATE = "{capture_id}_{label}"
FILENAME_TEMPLATE = "{capture_id}_{label}_{frame}.jpg"
NAMED = 10
"""How many things a message lists."""
Group = tuple[str | None, range | frozenset[int] | None]
"""A capture, its folder or its label, None for every one that has photographs; its frames: an inclusive range (which
may have gaps), frames one by one, or None for all."""


# --- fields of a file -------------------------------------------------------------------------------------


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
    inside = where if where.endswith(": ") else f"{where}."
    if not isinstance(value, Mapping):
        raise ImatchError(f"{place} wants an object of {names(known) if known else 'names'}, got {value!r}")
    for name in value:
        if not isinstance(name, str):
            raise ImatchError(f"{place}: {name!r} is read as a {type(name).__name__}: put it in quotes")
        if known is not None and name not in known:
            raise ImatchError(f"{inside}{name}: {plugins.unknown('field', name, known)}")
    return {name: content for name, content in value.items() if content is not None}


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


def names(listed: Iterable[object]) -> str:
    """What a message lists: the first of many.

    >>> names(range(12))
    '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    said = [str(name) for name in listed]
    more = f" and {len(said) - NAMED} more" if len(said) > NAMED else ""
    return ", ".join(said[:NAMED]) + more


def below(text: str, where: str, above: object) -> str:
    """`text` if, as a path, it stays below the folder that it is relative to, on any system.

    Only the text is looked at: a link that lies below the folder is followed, on purpose, wherever it leads.

    Raises:
        ImatchError: it is absolute, has a drive, or goes up by "..".

    >>> below("flights/2024", "root", "DATASET_ROOT")
    'flights/2024'
    """
    windows = PureWindowsPath(text)
    leaves = windows.drive or windows.root or PurePosixPath(text).is_absolute() or ".." in re.split(r"[\\/]", text)
    if leaves or "\0" in text:
        raise ImatchError(f"{where} {text!r} would leave {above}: give a path below it, without '..' or a drive")
    return text


def _nfc(text: str) -> str:
    """Letters in one piece: names that come from a Mac have them in parts (NFD), Korean ones above all."""
    return unicodedata.normalize("NFC", text)


# --- data sets --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capture:
    """One recording of a data set: a folder of frames.

    Attributes:
        label: what it shows, or from how high; None if it was not given.
        folder: POSIX path relative to the data set's root, in NFC.
        filename_template: how its files are called.
        pattern: the same for matching names in NFC: a group for every frame, the suffix in either case.
    """

    label: str | None
    folder: str
    filename_template: str
    pattern: re.Pattern[str]


@dataclass(frozen=True)
class Dataset:
    """A folder of photographs, whole or by its captures.

    Attributes:
        key: its name in the registry and in exports; a folder that is not in the registry has its own name.
        root: the folder, absolute; ids of photographs are relative to it.
        captures: capture id -> capture; empty for a plain folder.
        glob: of a plain folder, the ids that belong to it (`**` is any number of folders); "" for all.
        registered: whether it is from the registry, and no folder that was given by its path.
    """

    key: str
    root: Path
    captures: Mapping[str, Capture] = field(default_factory=dict)
    glob: str = ""
    registered: bool = False

    def select(self, ids: Sequence[str], image_groups: Sequence[Mapping[str, Any]] = ()) -> dict[str, dict[str, Any]]:
        """The photographs that the data set and the image groups choose.

        Photographs in a chosen capture's folder whose names do not fit, and captures without any, are told in a line.

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
        ids = sorted(ids)
        folders, found = self._sorted_into_folders(ids)
        if ids and not found:
            wanted = [f"{c.folder}/{c.filename_template}" for c in self.captures.values()] or [self.glob]
            raise ImatchError(
                f"data set {self.key}: none of the {len(ids)} photographs below {self.root} (such as {ids[0]!r}) "
                f"is called as the registry says: {names(wanted)}"
            )
        chosen: set[str] = set()
        asked: set[str] = set()
        for folder, frames in groups(image_groups) if image_groups else [(None, None)]:
            several = [[name] for name in folders]
            if folder is not None and self.captures:
                several = [self.captures_named(folder)]
            elif folder is not None:
                several = [[PurePosixPath(_nfc(folder)).as_posix()]]
                if several[0][0] not in folders:
                    raise ImatchError(plugins.unknown(f"folder of data set {self.key}", folder, folders))
            for part in several:
                chosen.update(self._frames([id for name in part for id in folders.get(name, [])], found, frames, part))
            asked.update(self.captures if folder is None else several[0])
        if self.captures:
            self._tell(ids, found, [name for name in self.captures if name in asked])
        return {id: meta for id, meta in found.items() if id in chosen}

    def captures_named(self, folder: str) -> list[str]:
        """The captures that an image group's `folder` means: by id, else by folder, else by label.

        Raises:
            ImatchError: there is none, or a label that several have.

        >>> Dataset("d", Path("/d"), captures={"A1": Capture("80m", "f", "", re.compile(""))}).captures_named("80m")
        ['A1']
        """
        name = _nfc(folder)
        path = PurePosixPath(name).as_posix()
        for same in (
            [id for id in self.captures if _nfc(id) == name],
            [id for id, capture in self.captures.items() if capture.folder == path],
        ):
            if same:
                return same
        labelled = [id for id, capture in self.captures.items() if _nfc(capture.label or "") == name]
        if len(labelled) > 1:
            raise ImatchError(
                f"data set {self.key}: label {folder!r} means any of {names(labelled)}: name captures, not the label"
            )
        if not labelled:
            known = {*self.captures, *(capture.folder for capture in self.captures.values())}
            known |= {capture.label for capture in self.captures.values() if capture.label}
            raise ImatchError(plugins.unknown(f"folder of data set {self.key}", folder, known))
        return labelled

    def _sorted_into_folders(self, ids: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, dict[str, Any]]]:
        """Capture (of a plain folder: parent folder) -> ids, and id -> what is known of it."""
        folders: dict[str, list[str]] = defaultdict(list)
        found: dict[str, dict[str, Any]] = {}
        taken: dict[tuple[str, int], str] = {}
        by_folder: dict[str, list[str]] = defaultdict(list)
        for name, capture in self.captures.items():
            by_folder[capture.folder].append(name)
        for id in ids:
            if not self.captures:
                if not self.glob or _matches(_nfc(id).split("/"), self.glob.split("/")):
                    folders[PurePosixPath(_nfc(id)).parent.as_posix()].append(id)
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
        parts = _nfc(id).split("/")
        belongs = []
        for depth in range(len(parts)):
            for name in by_folder.get("/".join(parts[:depth]) or ".", []):
                match = self.captures[name].pattern.fullmatch("/".join(parts[depth:]))
                if match and len(frames := {int(frame) for frame in match.groups()}) <= 1:
                    belongs.append((name, frames.pop() if frames else None))
        return belongs

    def _frames(
        self,
        ids: list[str],
        found: Mapping[str, Mapping[str, Any]],
        frames: range | frozenset[int] | None,
        part: Sequence[str],
    ) -> list[str]:
        where = f"{names(part)} of data set {self.key}"
        if not ids:
            folder = names(str(self.root / self.captures[name].folder) for name in part)
            called = names(self.captures[name].filename_template for name in part)
            raise ImatchError(f"no photographs in {where}: none in {folder} is called {called}")
        if frames is None:
            return ids
        there = {found[id]["frame"] for id in ids} - {None}
        has = f"it has frames {min(there)} to {max(there)}" if there else "its files have no frame number"
        if isinstance(frames, range):
            if not any(frame in frames for frame in there):
                raise ImatchError(f"no photographs of frames {frames[0]} to {frames[-1]} in {where}: {has}")
            if absent := len(frames) - sum(frame in frames for frame in there):
                _once_a_process(f"{where}: {absent} of frames {frames[0]} to {frames[-1]} are not there; {has}")
        elif missing := sorted(frames - there):
            hint = "leave them out of `indices`, or bring the files"
            raise ImatchError(f"no photographs of frames {names(missing)} in {where}: {has}; {hint}")
        return [id for id in ids if found[id]["frame"] in frames]

    def _tell(self, ids: Sequence[str], found: Mapping[str, Mapping[str, Any]], asked: Sequence[str]) -> None:
        folders = {self.captures[name].folder for name in asked}
        lost = [
            id for id in ids if id not in found and folders & {p.as_posix() for p in PurePosixPath(_nfc(id)).parents}
        ]
        full = {meta["capture"] for meta in found.values()}
        said = []
        if lost:
            of = f"{len(lost)} photograph{'s' * (len(lost) > 1)} below {self.root}"
            said.append(f"{of} left out, called otherwise than the registry says, such as {lost[0]}")
        if empty := [name for name in asked if name not in full]:
            said.append(f"captures without photographs: {names(empty)}")
        if said:
            _once_a_process(f"data set {self.key}: {'; '.join(said)}")


@functools.cache
def _once_a_process(line: str) -> None:
    print(line, flush=True)


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns or patterns[0] == "**":
        return not parts if not patterns else any(_matches(parts[n:], patterns[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def groups(image_groups: Any, where: str = "image_groups") -> list[Group]:
    """Read image groups, a list of {folder, indices, rotation}, into one (folder, frames) a folder.

    `folder` is a name or a list of names; without it, all. `indices`: two are an inclusive range; one, three or
    more are frames one by one; {"from": 1, "to": 132} is a range without doubt; a list of such is one a folder.
    `rotation` is for the manifests.

    Raises:
        ImatchError: an unknown field, with the nearest, or a value that cannot be meant.

    >>> groups([{"folder": ["A", "B"], "indices": [[1, 5], [7]]}])
    [('A', range(1, 6)), ('B', frozenset({7}))]
    """
    read: list[Group] = []
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
        read += zip(folders, parts, strict=True)
    return read


def _indices(given: Any, where: str) -> range | frozenset[int]:
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
        return frozenset(numbers)
    first, last = numbers
    if last < first:
        raise ImatchError(f"{where}: the range ends at {last} before it begins at {first}: write [{last}, {first}]")
    return range(first, last + 1)


# --- what a registry says of them -----------------------------------------------------------------------


def read(key: str, given: Any, above: Path, where: str) -> Dataset:
    """What a registry says of a data set, checked.

    Args:
        key: its name.
        given: {"root", "glob"} or {"root", "folder_template", "filename_template", "captures" (or "images")}.
        above: the folder that its root lies below: DATASET_ROOT.
        where: for messages, "FILE: datasets.KEY".

    Raises:
        ImatchError: an unknown field, with the nearest, a value that cannot be meant, or a path that would leave
            its root.

    >>> read("d", {"root": "survey", "captures": {"A1": "80m"}}, Path("/data"), "key.json: d").captures["A1"].folder
    'A1_80m'
    """
    known = ("root", "glob", "folder_template", "filename_template", "captures", "images")
    content = fields(given, known, where)
    for name in set(known[:4]) & set(content):
        wants(content[name], str, f"{where}.{name}")
    if "root" not in content:
        raise ImatchError(f'{where} has no root: name its folder below DATASET_ROOT ("" is DATASET_ROOT itself)')
    folder = above / PurePosixPath(below(content["root"], f"{where}.root", "DATASET_ROOT"))
    if "captures" in content and "images" in content:
        raise ImatchError(f"{where} has both captures and images, which are one and the same: keep one")
    templates = {name: content[name] for name in known[2:4] if name in content}
    name = "images" if "images" in content else "captures"
    if name not in content:
        if templates:
            raise ImatchError(f"{where} has templates but no captures: add captures, or give a glob instead")
        glob = below(content.get("glob", ""), f"{where}.glob", folder)
        return Dataset(key, folder, glob=glob and PurePosixPath(_nfc(glob)).as_posix(), registered=True)
    if "glob" in content:
        raise ImatchError(f"{where} has both {name} and a glob: keep one")
    captures = fields(content[name], None, f"{where}.{name}")
    if not captures:
        raise ImatchError(f"{where}.{name} is empty: name a capture, or leave it out for a plain folder")
    made = {id: _capture(key, id, given, templates, f"{where}.{name}.{id}") for id, given in captures.items()}
    return Dataset(key, folder, made, registered=True)


def _capture(key: str, id: str, given: Any, templates: Mapping[str, str], where: str) -> Capture:
    known = ("label", "altitude", "folder", "folder_template", "filename_template")
    own = fields(given, known, where) if isinstance(given, Mapping) else {"label": given}
    if "label" in own and "altitude" in own:
        raise ImatchError(f"{where} has both a label and an altitude: the altitude is the label; keep one")
    if "folder" in own and "folder_template" in own:
        raise ImatchError(f"{where} has both a folder and a folder_template: keep one")
    for name, value in own.items():
        if name in ("label", "altitude") and plugins.fits(value, float):
            value = own[name] = f"{value:.15g}"
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
    filename = PurePosixPath(filename).as_posix()  # without "./" and "//", which no id has
    below(folder, f"{where}: folder", "the data set's root")
    below(_fill(filename, values, f"{where}: filename_template", frame="0"), f"{where}: file", "the data set's root")
    pattern = _fill(filename, values, f"{where}: filename_template", frame="([0-9]+)", quote=re.escape)
    pattern = re.sub(r"(\\\.\w+)$", r"(?i:\1)", pattern)
    return Capture(label, PurePosixPath(_nfc(folder)).as_posix(), filename, re.compile(pattern))


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
            if not re.fullmatch("(0[>=])?[0-9]*d?", spec or ""):
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
    return _nfc(text)


def label_token(label: str) -> str:
    """A label as part of a file's or folder's name.

    >>> label_token("80 m / north"), label_token("..")
    ('80_m___north', '__')
    """
    token = "".join(c if c.isalnum() or c in "-.+" else "_" for c in label)
    return token if token.strip(".") else "_" * len(token)  # dots alone are no name but a way out of the folder
