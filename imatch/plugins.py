"""How a table of plug-ins ("name" -> "module:Class") becomes an object. Importing a table imports no plug-in."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from imatch.records import ImatchError


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that nobody knows, with the nearest known one.

    >>> unknown("weight", "sfit", ["sift", "dsift"])
    "unknown weight 'sfit': did you mean 'sift'? Known: dsift, sift"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {what} {name!r}: {hint}Known: {', '.join(names)}"


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
    fields = {field.name: field for field in dataclasses.fields(plugin)}
    given = options or {}
    hints = typing.get_type_hints(plugin)
    for option, value in given.items():
        if option not in fields:
            raise ImatchError(unknown(f"option of {what} {name}", option, fields))
        if not fits(value, hints[option]):
            raise ImatchError(f"option {option} of {what} {name} wants {_say(hints[option])}, got {value!r}")
    for option, field in fields.items():
        must = field.init and field.default is field.default_factory is dataclasses.MISSING
        if must and option not in given:
            raise ImatchError(f"{what} {name} wants option {option} ({_say(hints[option])}), which was not given")
    return plugin(**given)


def fits(value: object, wanted: Any) -> bool:
    """Whether a value may stand where a `wanted` is: an int may be a float, a bool is not an int.

    Args:
        value: what was given.
        wanted: a type or a type hint; of list[int] and the like, only the list is looked at.

    >>> fits(1, float), fits(True, int), fits("1", int), fits(None, int | None)
    (True, False, False, True)
    """
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(wanted))
    kind = typing.get_origin(wanted) or wanted
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _say(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) and not typing.get_origin(wanted) else str(wanted)
