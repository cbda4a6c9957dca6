"""Options in groups: a class each, whose fields are checked, recorded and shown with their help."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from imatch.core import config
from imatch.core.config import folder_name
from imatch.core.rows import Json, Options
from imatch.core.step import tagged
from imatch.data import datasets

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

NAMES = {
    "direction": "imatch.steps.index:DIRECTIONS",
    "file_type": "imatch.steps.references:FILE_TYPES",
    "files": "imatch.export.per_image:OUTPUTS",
    "on_change": "imatch.core.step:ON_CHANGE",
    "on_error": "imatch.steps.embedding:ON_ERROR",
    "outputs": "imatch.steps.match:OUTPUTS",
}
"""Parameters of the notebooks that are a name, or a list of names -> the table of those."""
PLAIN = {
    "candidates": PositiveInt,
    "image_groups": Annotated[list[Any], AfterValidator(datasets.groups)],
    "k": Annotated[int, Field(gt=0, le=10_000)],  # of all queries at once
    "max_skipped": config.Share,
    "quality": Annotated[int, Field(gt=0, le=100)],
    "run": Annotated[str, AfterValidator(lambda run: run and folder_name(run, "run"))],  # "" is that of the source
    "spot_check": NonNegativeInt,
    "tag": Annotated[str, AfterValidator(tagged)],
}
"""Others that are in no group -> what they may be."""
TOGETHER = {
    ("run", "weight", "backbone_options", "data_key", "storage"): "imatch.steps.embedding:check_asked",
    ("kind", "angles", "crops", "resize_to_original"): "imatch.data.references:check",
    ("pairs",): "imatch.steps.candidates:check_pairs",
    ("weight", "data_key", "matching"): "imatch.steps.match:check_matching",
}
"""Those that a function of a step checks, by each other."""


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


def check(values: Mapping[str, Json]) -> None:
    """Refuse values of parameters of the notebooks that can be none: in a step, and before one is started.

    Args:
        values: by name; those of a group are its fields.

    Raises:
        ImatchError: of a group as `options`; for the others one line says the name, the value, and what would do.

    >>> check({"direction": "data-dta"})
    Traceback (most recent call last):
    imatch.core.types.ImatchError: direction must be 'reference-data', ..., got 'data-dta': did you mean 'data-data'?
    """
    made = {name: create(name, value) if name in GROUPS else value for name, value in values.items()}
    kinds: dict[str, Any] = {**PLAIN}
    for name in filter(values.__contains__, NAMES):
        known = Literal[tuple(pkgutil.resolve_name(NAMES[name]))]
        kinds[name] = list[known] if isinstance(values[name], list) else known
    for name in filter(values.__contains__, kinds):
        config.checked(kinds[name], values[name], name)
    for names, place in TOGETHER.items():
        if made.keys() >= {*names}:
            pkgutil.resolve_name(place)(*(made[name] for name in names))


def fields(name: str) -> dict[str, Option]:
    """The fields of a group, in order.

    >>> fields("compute")["batch_size"]
    Option(default=8, help='photographs, or rotated queries, a forward pass')
    """
    group = pkgutil.resolve_name(GROUPS[name])
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
