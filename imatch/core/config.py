"""What files and callers say, checked by pydantic; and plug-ins, made from tables of "name" -> "module:Class"."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import pkgutil
import re
import typing
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import UnionType
from typing import Annotated, Any, TypeVar

import pydantic
import yaml
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from imatch.core.rows import Json, Options
from imatch.core.settings import from_workspace
from imatch.core.types import ImatchError

Share = Annotated[float, Field(ge=0, le=1)]
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)
T = TypeVar("T")


def unknown(what: str, name: str | None, known: Iterable[str]) -> str:
    """The message for a name that nobody knows, with the nearest known one.

    >>> unknown("weight", "sfit", ["sift", "dsift"])
    "unknown weight 'sfit': did you mean 'sift'? Known: dsift, sift"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}Known: {', '.join(names)}"


def listed(value: T | list[T]) -> list[T]:
    """One thing as a list of it: a validator that runs before pydantic's.

    >>> listed(256), listed(["A", "B"])
    ([256], ['A', 'B'])
    """
    return value if isinstance(value, list) else [value]


class Said(BaseModel):
    """An object of a file: the fields that it may have, and what each wants to be; null is as if not given."""

    model_config = STRICT

    @pydantic.model_validator(mode="before")
    @classmethod
    def _known(cls, value: T) -> T | dict[str, Json]:
        aliases = [field.validation_alias or name for name, field in cls.model_fields.items()]
        named = [name for at in aliases for name in (at.choices if isinstance(at, AliasChoices) else [at])]
        known = [name for name in named if isinstance(name, str)]
        if not isinstance(value, Mapping):
            return value
        for name in value if cls.model_config["extra"] == "forbid" else ():
            if name not in known:  # pydantic forbids it, too, but does not say the nearest
                raise PydanticCustomError("unknown", "{said}", {"said": unknown("field", name, known), "name": name})
        return {name: content for name, content in value.items() if content is not None}


def checked(kind: type[T], value: object, where: str) -> T:
    """`value` as a `Said`, or a list of them.

    Args:
        kind: the class, or list[class].
        value: what the file holds there.
        where: for messages: "FILE: models[0].run"; at the top of a file "FILE: ".

    Raises:
        ImatchError: it is something else; one line says what, where in the file and what would do.

    >>> class Sub(Said):
    ...     stride: int = 2
    >>> checked(Sub, {"stride": None}, "manifest.json: ")
    Sub(stride=2)
    >>> checked(Sub, {"strid": 2}, "manifest.json: ")
    Traceback (most recent call last):
    imatch.core.types.ImatchError: manifest.json: strid: unknown field 'strid': did you mean 'stride'? Known: stride
    """
    try:
        return _adapter(kind).validate_python(value)  # type: ignore[arg-type]  # mypy: no class is hashable
    except ValidationError as error:
        # not chained: pydantic's own text has all that was given
        raise ImatchError(_line(error, where)) from None


def fits(value: object, wanted: type | UnionType) -> bool:
    """Whether a value may stand where a `wanted` is: an int may be a float, a bool is not an int.

    >>> fits(1, float), fits(True, int), fits("1", int), fits(None, int | None)
    (True, False, False, True)
    """
    try:
        _adapter(wanted).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


@functools.cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    own = isinstance(kind, type) and issubclass(kind, BaseModel)
    return TypeAdapter(kind, config=None if own else STRICT)


def _line(error: ValidationError, where: str) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    kind, given, said, about = first["type"], first["input"], first["msg"], first.get("ctx", {})
    parts = [*first["loc"], *([about["name"]] if kind == "unknown" else [])]
    # "[...]" is no part of a file: pydantic calls keys of dicts so, and unions here are told apart by such tags
    of_file = [at for at in parts if not str(at).startswith("[")]
    inside = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in of_file)
    inside = inside.removeprefix(".") if where.endswith(" ") else inside
    place = (where + inside).removesuffix(": ")
    if kind == "missing":
        return f"{place} is missing"
    if kind == "extra_forbidden":  # of a known name
        return f"{place} is another name of a field that is given, too: keep one"
    if kind in ("unknown", "value_error"):
        return f"{place}: {about.get('error', said)}"
    must = said.removeprefix("Input should").split(" or instance")[0]
    near = difflib.get_close_matches(str(given), re.findall("'([^']+)'", about.get("expected", "")), n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    return f"{place} must{must}, got {given!r}{hint}" if must != said else f"{place}: {said}, got {given!r}"


def create(
    table: Mapping[str, str], what: str, name: str, options: Options | None = None, named: str = "", make: bool = True
) -> Any:
    """Make the plug-in `name` of `table`, a dataclass, from its options.

    Args:
        table: name -> "module:Class".
        what: what the table holds, for messages.
        options: the dataclass' fields; those left out keep their defaults.
        named: as of `check`.
        make: False only checks, and gives None.

    Raises:
        ImatchError: for an unknown name, an unknown option, an option of the wrong type or one that must be given.

    >>> from imatch.matching.matchers import MATCHERS
    >>> create(MATCHERS, "matcher", "mutual", {"min_similarity": 0.9}).min_similarity
    0.9
    """
    if name not in table:
        raise ImatchError(unknown(what, name, table))
    plugin = pkgutil.resolve_name(table[name])
    known, given = _options(plugin), dict(options or {})
    for option in given:
        if option not in known.model_fields:
            raise ImatchError(unknown(f"option of {what} {name}", option, known.model_fields))
    checked(known, given, named or f"{what} {name}: option ")
    return plugin(**given) if make else None


def check(plugin: object, named: str = "") -> None:
    """Check a plug-in's fields, for its `__post_init__`: ranges are said by its type hints, as pydantic writes them.

    Args:
        plugin: a dataclass.
        named: what a message puts before the name of a field, such as "ranking" (then ranking.k); "" is its class.

    Raises:
        ImatchError: a field of the wrong type, or out of its range.

    >>> from imatch.matching.matchers import Mutual
    >>> Mutual(k=0)
    Traceback (most recent call last):
    imatch.core.types.ImatchError: Mutual: option k must be greater than 0, got 0
    """
    of: Any = type(plugin)
    fields = {name: getattr(plugin, name) for name in _options(of).model_fields}
    checked(_options(of), fields, named or f"{of.__name__}: option ")


@functools.cache
def _options(plugin: type) -> type[BaseModel]:
    """The fields of a dataclass as a model."""
    hints = typing.get_type_hints(plugin, include_extras=True)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], ... if field.default is field.default_factory is dataclasses.MISSING else None)
        for field in dataclasses.fields(plugin)
        if field.init
    }
    return pydantic.create_model(plugin.__name__, __config__=STRICT, **fields)


def read_file(path: str | Path) -> Json:
    """What a JSON or YAML file holds; a name given twice is an error, for one of the two would be lost.

    Raises:
        ImatchError: no such file, or it cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "a.yaml").write_text("a: [1, 2]")
    ...     read_file(Path(folder) / "a.yaml")
    {'a': [1, 2]}
    """
    path = from_workspace(path)
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


def _once(pairs: Sequence[tuple[str, Json]]) -> dict[str, Json]:
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ImatchError(f"{name!r} is given {count} times: keep one")
    return dict(pairs)


class _Yaml(yaml.SafeLoader):
    """YAML in which no name may be given twice, as in JSON."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Json]:
        _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)


NAME = 200
"""Bytes of a name at most: file systems take 255, and endings follow it."""
DEVICE = re.compile(r"(con|prn|aux|nul|com[\d¹²³]|lpt[\d¹²³])(\..*)?", re.IGNORECASE)
"""Names that are none on Windows, whatever follows: exports may lie on a disk of it."""


def folder_name(name: str, what: str) -> str:
    """`name` if it may be the name of a folder anywhere: runs, tags, keys and configurations name folders of results.

    Raises:
        ImatchError: it leads out of its folder, hides it, is an option to a command, none on Windows, or too long.

    >>> folder_name("vits16+", "weight")
    'vits16+'
    """
    plain = all(c.isalnum() or c in "-_.+" for c in name) and not name.startswith((".", "-")) and not name.endswith(".")
    if not plain or not name or DEVICE.fullmatch(name) or len(os.fsencode(name)) > NAME:
        said = "it becomes the name of a folder: use letters, digits, '-', '_', '.', '+'"
        limits = f"first no '-' or '.', last no '.', {NAME} bytes at most, and no device of Windows, such as NUL"
        raise ImatchError(f"{what} {name!r}: {said}; {limits}")
    return name


NAMED = 10
"""How many things a message lists."""


def names(listed: Iterable[object]) -> str:
    """What a message lists: the first of many.

    >>> names(range(12))
    '0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more'
    """
    said = [str(name) for name in listed]
    more = f" and {len(said) - NAMED} more" if len(said) > NAMED else ""
    return ", ".join(said[:NAMED]) + more


def below(text: str, where: str, above: str | Path) -> str:
    """`text` if, as a path, it stays below the folder that it is relative to, on any system.

    Links below the folder are followed, on purpose, wherever they lead.

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


def nfc(text: str) -> str:
    """Letters in one piece: names that come from a Mac have them in parts (NFD), Korean ones above all."""
    return unicodedata.normalize("NFC", text)


def label_token(label: str) -> str:
    """A label as part of a file's or folder's name.

    >>> label_token("80 m / north"), label_token("..")
    ('80_m___north', '__')
    """
    token = "".join(c if c.isalnum() or c in "-.+" else "_" for c in label)
    return token if token.strip(".") else "_" * len(token)  # dots alone are no name but a way out of the folder
