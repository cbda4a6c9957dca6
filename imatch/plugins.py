"""How a table of plug-ins ("name" -> "module:Class") becomes an object. Importing a table imports no plug-in."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
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
        ImatchError: for an unknown name, an unknown option or an option of the wrong type.

    >>> from imatch.matching import MATCHERS
    >>> create(MATCHERS, "matcher", "mutual", {"min_similarity": 0.9}).min_similarity
    0.9
    """
    if name not in table:
        raise ImatchError(unknown(what, name, table))
    module, _, attribute = table[name].partition(":")
    plugin = getattr(importlib.import_module(module), attribute)
    fields = {field.name: field for field in dataclasses.fields(plugin)}
    for option, value in (options or {}).items():
        if option not in fields:
            raise ImatchError(unknown(f"option of {what} {name}", option, fields))
        wanted = type(fields[option].default)
        if not fits(value, wanted):
            raise ImatchError(f"option {option} of {what} {name} wants {wanted.__name__}, got {value!r}")
    return plugin(**(options or {}))


def fits(value: object, wanted: type) -> bool:
    """Whether a value may stand where a `wanted` is: an int may be a float, a bool is not an int.

    >>> fits(1, float), fits(True, int), fits("1", int)
    (True, False, False)
    """
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
