"""Options in groups: a class each, whose fields are checked, recorded and shown with their help."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from imatch.core import config
from imatch.core.rows import Json, Options

GROUPS = {
    "compute": "imatch.core.compute:ComputeOptions",
    "geometry": "imatch.matching.align:GeometryOptions",
    "index": "imatch.retrieval.index:IndexOptions",
    "matching": "imatch.matching.align:MatchingOptions",
    "ranking": "imatch.retrieval.ranking:RankingOptions",
    "resize": "imatch.data.images:Resize",
    "send": "imatch.steps.sending:SendOptions",
    "storage": "imatch.data.store:StorageOptions",
    "truth": "imatch.retrieval.truth:TruthOptions",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """A field of a group.

    Attributes:
        default: its value where none is given; lists in place of tuples.
        help: what the class' docstring says of it.
    """

    default: Any
    help: str


def options(given: Mapping[str, Options]) -> tuple[Any, ...]:
    """Check groups of options, and print their fields with values and help; those that were set have a star.

    Args:
        given: a name of `GROUPS` -> its fields, such as {"whiten": 64}, or a group that was made of them before.

    Returns:
        The groups, in the order given.

    Raises:
        ImatchError: an unknown group or field, with the nearest known one; a value of the wrong type or out of range.

    >>> ranking, compute = options({"ranking": {"whiten": 64}, "compute": {}})  # doctest: +ELLIPSIS
    * ranking.whiten = 64  # dimensions of a PCA-whitening ...
    >>> ranking.whiten, compute.batch_size
    (64, 8)
    """
    made = [one if dataclasses.is_dataclass(one) else create(name, one) for name, one in given.items()]
    for name, group in zip(given, made, strict=True):
        for field, option in fields(name).items():
            value = plain(getattr(group, field))
            print(f"{' ' if value == option.default else '*'} {name}.{field} = {value!r}  # {option.help}")
    return tuple(made)


def create(name: str, given: Options) -> Any:
    """Make a group of its fields. Raises as `options`."""
    return config.create(GROUPS, "group", name, given, named=name)


def fields(name: str) -> dict[str, Option]:
    """The fields of a group, in order.

    >>> fields("compute")["batch_size"]
    Option(default=8, help='photographs, or rotated queries, a forward pass')
    """
    module, _, attribute = GROUPS[name].partition(":")
    group = getattr(importlib.import_module(module), attribute)
    text = inspect.getdoc(group).partition("Attributes:\n")[2].partition("\n\n")[0]
    helps = {
        key: " ".join(said.split()).removesuffix(".")
        for key, said in re.findall(r"^    (\w+): (.*(?:\n      .*)*)", text, re.M)
    }
    made = group()
    return {
        field.name: Option(plain(getattr(made, field.name)), helps[field.name]) for field in dataclasses.fields(group)
    }


def plain(value: Json) -> Json:
    """A value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
