"""Data sets: which photographs belong to one, by what they are called."""

from __future__ import annotations

import fnmatch
import re
import string
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Annotated, cast

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Discriminator, Field, NonNegativeInt, Tag

from imatch.core import config
from imatch.core.config import Said, below, label_token, listed, names, nfc
from imatch.core.rows import About, Json
from imatch.core.types import ImatchError

FRAMES = ("frame", "index", "idx")
FOLDER_TEMPLATE = "{capture_id}_{label}"
FILENAME_TEMPLATE = "{capture_id}_{label}_{frame}.jpg"
Group = tuple[str | None, range | frozenset[int] | None]
"""A capture, its folder or its label, None for all; its frames: an inclusive range, frames one by one, None for all."""


@dataclass(frozen=True)
class Capture:
    """One recording of a data set: a folder of frames.

    Attributes:
        label: what it shows, or from how high; None if it was not given.
        folder: POSIX path relative to the data set's root, in NFC.
        filename_template: how its files are called.
        pattern: of their ids in NFC: a group for every frame, the suffix in either case.
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

    def select(self, ids: Sequence[str], image_groups: Sequence[Mapping[str, Json]] = ()) -> dict[str, About]:
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
        found = self._known(ids)
        if ids and not found:
            wanted = [f"{c.folder}/{c.filename_template}" for c in self.captures.values()] or [self.glob]
            raise ImatchError(
                f"data set {self.key}: none of the {len(ids)} photographs below {self.root} (such as {ids[0]!r}) "
                f"is called as the registry says: {names(wanted)}"
            )
        folders: dict[str, list[str]] = defaultdict(list)
        for id, about in found.items():
            folders[about["capture"] or PurePosixPath(nfc(id)).parent.as_posix()].append(id)
        chosen: set[str] = set()
        asked: set[str] = set()
        for folder, frames in groups(image_groups) if image_groups else [(None, None)]:
            several = [[name] for name in folders]
            if folder is not None and self.captures:
                several = [self.captures_named(folder)]
            elif folder is not None:
                several = [[PurePosixPath(nfc(folder)).as_posix()]]
                if several[0][0] not in folders:
                    raise ImatchError(config.unknown(f"folder of data set {self.key}", folder, folders))
            for part in several:
                there = [id for name in part for id in folders.get(name, [])]
                chosen.update(self._frames(there, found, frames, part))
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
        name = nfc(folder)
        path = PurePosixPath(name).as_posix()
        for same in (
            [id for id in self.captures if nfc(id) == name],
            [id for id, capture in self.captures.items() if capture.folder == path],
        ):
            if same:
                return same
        labelled = [id for id, capture in self.captures.items() if nfc(capture.label or "") == name]
        if len(labelled) > 1:
            raise ImatchError(
                f"data set {self.key}: label {folder!r} means any of {names(labelled)}: name captures, not the label"
            )
        if not labelled:
            known = {*self.captures, *(capture.folder for capture in self.captures.values())}
            known |= {capture.label for capture in self.captures.values() if capture.label}
            raise ImatchError(config.unknown(f"folder of data set {self.key}", folder, known))
        return labelled

    def _known(self, ids: Sequence[str]) -> dict[str, About]:
        found: dict[str, About] = {}
        if not self.captures:
            for id in ids:
                if not self.glob or _matches(nfc(id).split("/"), self.glob.split("/")):
                    digits = re.findall("[0-9]+", PurePosixPath(id).stem)
                    frame = int(digits[-1]) if digits else None
                    found[id] = {"capture": None, "label": None, "frame": frame}
            return found
        taken: dict[tuple[str, int], str] = {}

        @cache
        def near(folder: PurePosixPath) -> list[str]:
            return [name for name, one in self.captures.items() if folder.is_relative_to(one.folder)]

        for id, name in [(one, name) for one in ids for name in near(PurePosixPath(nfc(one)).parent)]:
            capture = self.captures[name]
            match = capture.pattern.fullmatch(nfc(id))
            if not match or len(frames := {int(frame) for frame in match.groups()}) > 1:
                continue
            if id in found:
                both = f"{found[id]['capture']} and {name}"
                raise ImatchError(
                    f"data set {self.key}: {id} belongs to captures {both}: let their folders or files differ"
                )
            frame = frames.pop() if frames else None
            if frame is not None and taken.setdefault((name, frame), id) != id:
                raise ImatchError(
                    f"data set {self.key}: {taken[name, frame]} and {id} are both frame {frame} of {name}: keep one"
                )
            found[id] = {"capture": name, "label": capture.label, "frame": frame}
        return found

    def _frames(
        self,
        ids: list[str],
        found: Mapping[str, About],
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
        there = {frame for id in ids if (frame := found[id]["frame"]) is not None}
        has = f"it has frames {min(there)} to {max(there)}" if there else "its files have no frame number"
        if isinstance(frames, range):
            span = f"frames {frames[0]} to {frames[-1]}"
            if not any(frame in frames for frame in there):
                raise ImatchError(f"no photographs of {span} in {where}: {has}")
            if absent := len(frames) - sum(frame in frames for frame in there):
                _once_a_process(f"{where}: {absent} of {span} are not there; {has}")
        elif missing := sorted(frames - there):
            hint = "leave them out of `indices`, or bring the files"
            raise ImatchError(f"no photographs of frames {names(missing)} in {where}: {has}; {hint}")
        return [id for id in ids if found[id]["frame"] in frames]

    def _tell(self, ids: Sequence[str], found: Mapping[str, About], asked: Sequence[str]) -> None:
        folders = {self.captures[name].folder for name in asked}
        others = [id for id in ids if id not in found]
        above = {id: {folder.as_posix() for folder in PurePosixPath(nfc(id)).parents} for id in others}
        lost = [id for id in others if folders & above[id]]
        full = {meta["capture"] for meta in found.values()}
        said = []
        if lost:
            of = f"{len(lost)} photograph{'s' * (len(lost) > 1)} below {self.root}"
            said.append(f"{of} left out, called otherwise than the registry says, such as {lost[0]}")
        if empty := [name for name in asked if name not in full]:
            said.append(f"captures without photographs: {names(empty)}")
        if said:
            _once_a_process(f"data set {self.key}: {'; '.join(said)}")


@cache
def _once_a_process(line: str) -> None:
    print(line, flush=True)


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not parts
    first, *rest = patterns
    if first == "**":
        return any(_matches(parts[n:], rest) for n in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], rest)


class _Ends(Said):
    first: NonNegativeInt = Field(alias="from")
    to: NonNegativeInt


def _frames(given: _Ends | list[int]) -> range | frozenset[int]:
    numbers = [given.first, given.to] if isinstance(given, _Ends) else given
    if len(numbers) != 2:
        return frozenset(numbers)
    first, last = numbers
    if last < first:
        raise ValueError(f"the range ends at {last} before it begins at {first}: write [{last}, {first}]")
    return range(first, last + 1)


_Frames = Annotated[
    Annotated[_Ends, Tag("[ends]")] | Annotated[list[NonNegativeInt], Field(min_length=1), Tag("[frames]")],
    Discriminator(lambda given: "[ends]" if isinstance(given, Mapping) else "[frames]"),
    AfterValidator(_frames),
]


def _per_folder(given: Json) -> str:
    several = isinstance(given, list) and any(isinstance(part, list | dict) for part in given)
    return "[each]" if several else "[all]"


_Indices = Annotated[
    Annotated[_Frames, Tag("[all]")] | Annotated[list[_Frames], Tag("[each]")], Discriminator(_per_folder)
]


class _Group(Said):
    folder: Annotated[list[str], Field(min_length=1), BeforeValidator(listed)] | None = None
    indices: _Indices | None = None
    rotation: Annotated[list[float], BeforeValidator(listed)] | None = None


def groups(image_groups: Json, where: str = "image_groups") -> list[Group]:
    """Read image groups, a list of {folder, indices, rotation}, into one (folder, frames) a folder.

    `folder` is a name or a list of names; without it, all. `indices`: two are an inclusive range; one, three or
    more are frames one by one; {"from": 1, "to": 132} is a range without doubt; a list of such is one a folder.
    `rotation`, degrees, is for the manifests.

    Raises:
        ImatchError: an unknown field, with the nearest, or a value that cannot be meant.

    >>> groups([{"folder": ["A", "B"], "indices": [[1, 5], [7]]}])
    [('A', range(1, 6)), ('B', frozenset({7}))]
    """
    read: list[Group] = []
    for i, group in enumerate(config.checked(list[_Group], image_groups, where)):
        folders: Sequence[str | None] = group.folder or [None]
        frames = group.indices if isinstance(group.indices, list) else [group.indices] * len(folders)
        if len(frames) != len(folders) or (isinstance(group.indices, list) and not group.folder):
            named = f"{len(folders)} folders" if group.folder else "no folder"
            raise ImatchError(f"{where}[{i}].indices has {len(frames)} lists for {named}: give one list a folder")
        read += zip(folders, cast("list[range | frozenset[int] | None]", frames), strict=True)  # so validated
    return read


def _number_as_text(given: Json) -> Json:
    return f"{given:.15g}" if config.fits(given, float) else given


def _labelled(given: Json) -> Json:
    return given if isinstance(given, Mapping) else {"label": given}


_Text = Annotated[str, Field(min_length=1)]


class _Capture(Said):
    label: Annotated[_Text, BeforeValidator(_number_as_text)] | None = Field(
        None, validation_alias=AliasChoices("label", "altitude")
    )
    folder: str | None = None
    folder_template: _Text | None = None
    filename_template: _Text | None = None


_Captures = Annotated[dict[str, Annotated[_Capture, BeforeValidator(_labelled)]], Field(min_length=1)]


class _Dataset(Said):
    root: str
    glob: str | None = None
    folder_template: str = FOLDER_TEMPLATE
    filename_template: str = FILENAME_TEMPLATE
    captures: _Captures | None = Field(None, validation_alias=AliasChoices("captures", "images"))


def read(key: str, given: Json, above: Path, where: str) -> Dataset:
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
    said = config.checked(_Dataset, given, where)
    folder = above / PurePosixPath(below(said.root, f"{where}.root", "DATASET_ROOT"))
    if said.captures is None:
        if said.model_fields_set & {"folder_template", "filename_template"}:
            raise ImatchError(f"{where} has templates but no captures: add captures, or give a glob instead")
        glob = below(said.glob or "", f"{where}.glob", folder)
        return Dataset(key, folder, glob=glob and PurePosixPath(nfc(glob)).as_posix(), registered=True)
    if said.glob is not None:
        raise ImatchError(f"{where} has both captures and a glob: keep one")
    made = {id: _capture(key, id, capture, said, f"{where}.captures.{id}") for id, capture in said.captures.items()}
    return Dataset(key, folder, made, registered=True)


def _capture(key: str, id: str, said: _Capture, of: _Dataset, where: str) -> Capture:
    values = {"capture_id": id, "label": said.label, "dataset_key": key}
    values["label_token"] = said.label and label_token(said.label)
    folder = said.folder
    if folder is not None and said.folder_template:
        raise ImatchError(f"{where} has both a folder and a folder_template: keep one")
    if folder is None:
        folder = _fill(said.folder_template or of.folder_template, values, f"{where}: folder_template")
    # without "./" and "//", which no id has
    filename = PurePosixPath(said.filename_template or of.filename_template).as_posix()
    below(folder, f"{where}: folder", "the data set's root")
    called = partial(_fill, filename, values, f"{where}: filename_template")
    below(called(frame="0"), f"{where}: file", "the data set's root")
    pattern = called(frame="([0-9]+)", quote=re.escape)
    pattern = re.sub(r"(\\\.\w+)$", r"(?i:\1)", pattern)
    folder = PurePosixPath(nfc(folder)).as_posix()
    above = "" if folder == "." else f"{re.escape(folder)}/"
    return Capture(said.label, folder, filename, re.compile(above + pattern))


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
            raise ImatchError(f"{where} {template!r}: {config.unknown('placeholder', name, known)}")
        if conversion or (name in FRAMES and not re.fullmatch("(0[>=])?[0-9]*d?", spec or "")):
            padded = f", or with a padding such as {{{name}:04d}}" if name in FRAMES else ""
            raise ImatchError(f"{where} {template!r}: write {{{name}}}{padded}")
        if name in FRAMES:
            text += frame
            continue
        value = values[name]
        if value is None:
            raise ImatchError(f"{where} {template!r} wants {{{name}}}: give the capture a label")
        try:
            text += quote(format(value, spec or ""))
        except ValueError as error:
            raise ImatchError(f"{where} {template!r}: {{{name}:{spec}}} does not fit text: {error}") from error
    return nfc(text)
