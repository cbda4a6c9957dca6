"""What files and callers say, checked by pydantic; and how a table of plug-ins ("name" -> "module:Class") becomes an
object. Importing a table imports no plug-in.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from imatch.records import ImatchError

Share = Annotated[float, Field(ge=0, le=1)]
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, defer_build=True)
T = TypeVar("T")


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that nobody knows, with the nearest known one.

    >>> unknown("weight", "sfit", ["sift", "dsift"])
    "unknown weight 'sfit': did you mean 'sift'? Known: dsift, sift"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}Known: {', '.join(names)}"


# --- what files say ---------------------------------------------------------------------------------------


def listed(value: Any) -> Any:
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
    def _known(cls, value: Any) -> Any:
        aliases = [field.validation_alias or name for name, field in cls.model_fields.items()]
        known = [name for at in aliases for name in (at.choices if isinstance(at, AliasChoices) else [at])]
        if not isinstance(value, Mapping):
            return value
        for name in value if cls.model_config["extra"] == "forbid" else ():
            if name not in known:  # pydantic forbids it, too, but does not say the nearest
                raise PydanticCustomError("unknown", "{said}", {"said": unknown("field", name, known), "name": name})
        return {name: content for name, content in value.items() if content is not None}


def checked(kind: type[T], value: Any, where: str) -> T:
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
    imatch.records.ImatchError: manifest.json: strid: unknown field 'strid': did you mean 'stride'? Known: stride
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        # not chained: pydantic's own text has everything that was given, over several lines
        raise ImatchError(_line(error, where)) from None


def fits(value: object, wanted: Any) -> bool:
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
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=STRICT if typing.get_origin(kind) is list else None)  # models have their own


def _line(error: ValidationError, where: str) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    kind, path, given, said, about = first["type"], first["loc"], first["input"], first["msg"], first.get("ctx", {})
    parts = [*path, *([about["name"]] if kind == "unknown" else [])]
    # "[...]" is no part of a file: pydantic calls keys of dicts so, and unions here are told apart by such tags
    inside = "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in parts if not str(at).startswith("["))
    place = (where + inside.removeprefix(".") if where.endswith(" ") else where + inside).removesuffix(": ")
    if kind == "missing":
        return f"{place} is missing"
    if kind == "extra_forbidden":  # of a known name
        return f"{place} is another name of a field that is given, too: keep one"
    if kind in ("unknown", "value_error"):
        return f"{place}: {about.get('error', said)}"
    must = said.removeprefix("Input should").split(" or instance")[0]
    return f"{place} must{must}, got {given!r}" if must != said else f"{place}: {said}, got {given!r}"


# --- plug-ins ---------------------------------------------------------------------------------------------


def create(table: Mapping[str, str], what: str, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Make the plug-in `name` of `table`, a dataclass, from its options.

    Args:
        table: name -> "module:Class".
        what: what the table holds, for messages.
        options: the dataclass' fields; those left out keep their defaults.

    Raises:
        ImatchError: for an unknown name, an unknown option, an option of the wrong type or one that must be given.

    >>> from imatch.matching import MATCHERS
    >>> create(MATCHERS, "matcher", "mutual", {"min_similarity": 0.9}).min_similarity
    0.9
    """
    if name not in table:
        raise ImatchError(unknown(what, name, table))
    module, _, attribute = table[name].partition(":")
    plugin = getattr(importlib.import_module(module), attribute)
    known, given = _options(plugin), dict(options or {})
    for option in given:
        if option not in known.model_fields:
            raise ImatchError(unknown(f"option of {what} {name}", option, known.model_fields))
    checked(known, given, f"{what} {name}: option ")
    return plugin(**given)


def check(plugin: Any) -> None:
    """Check a plug-in's fields, for its `__post_init__`: ranges are said by its type hints, as pydantic writes them.

    Raises:
        ImatchError: a field of the wrong type, or out of its range.

    >>> from imatch.matching.mutual import Mutual
    >>> Mutual(k=0)
    Traceback (most recent call last):
    imatch.records.ImatchError: Mutual: option k must be greater than 0, got 0
    """
    fields = {name: getattr(plugin, name) for name in _options(type(plugin)).model_fields}
    checked(_options(type(plugin)), fields, f"{type(plugin).__name__}: option ")


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
