"""The registry params/data_key.json: data sets and weights by name, each below its root (`settings.root`)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from imatch.core import config
from imatch.core.config import Said, below, folder_name, names, read_file
from imatch.core.files import printable
from imatch.core.settings import DATA_KEY, from_workspace, root
from imatch.core.types import ImatchError
from imatch.data import datasets
from imatch.data.datasets import Dataset

FAMILIES = {"LVD": "lvd1689m", "SAT": "sat493m"}
"""What weights were trained on, which decides how photographs are normalised -> how their files are called."""


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
            raise ImatchError(f"{where} {config.unknown('family', self.family, FAMILIES)}")
        for family, sign in FAMILIES.items():
            if sign in self.filename.lower() and family != self.family:
                raise ImatchError(
                    f"{where} {self.filename} was trained as {family}, but its family is given as {self.family}: "
                    f"photographs would be normalised wrongly; write {family}"
                )


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
            weight_set: the set, needed only where several sets have that key.

        Raises:
            ImatchError: there is none, with the nearest, or there are several.

        >>> load(Path(__file__).parents[2] / DATA_KEY).weight("cxTiny").hub_entry
        'dinov3_convnext_tiny'
        """
        sets = {weight.set for weight in self.weights}
        if weight_set and weight_set not in sets:
            raise ImatchError(f"{self.path}: {config.unknown('weight_set', weight_set, sets)}")
        there = [weight for weight in self.weights if weight_set in ("", weight.set)]
        found = [weight for weight in there if weight.key == key]
        if not found:
            raise ImatchError(f"{self.path}: {config.unknown('weight', key, {weight.key for weight in there})}")
        if len(found) > 1:
            several = names(f"{weight.set}.{weight.group}" for weight in found)
            raise ImatchError(f"{self.path}: weight {key} is in {several}: say which, such as SET/{key}, or rename one")
        return found[0]

    def dataset(self, key: str) -> Dataset:
        """The data set called `key`.

        Raises:
            ImatchError: there is none; the message has the nearest.

        >>> load(Path(__file__).parents[2] / DATA_KEY).dataset("demo").root.name
        'demo'
        """
        if key not in self.datasets:
            raise ImatchError(f"{self.path}: {config.unknown('data set', key, self.datasets)}")
        return self.datasets[key]


def _three(parts: list[str]) -> list[str]:
    if len(parts) != 3:
        raise ValueError(f"wants [hub entry, file name, LVD or SAT], got {parts!r}")
    return parts


class _File(Said):
    datasets: dict[str, Any] = Field({})
    weights: dict[str, dict[str, dict[str, Annotated[list[str], AfterValidator(_three)]]]] = Field({})


def load(path: str | Path = DATA_KEY) -> DataKey:
    """Read a registry, JSON or YAML, and check all of it.

    Raises:
        ImatchError: an unknown field, with the nearest, a value that cannot be meant, or something that would
            leave its root.

    >>> [weight.key for weight in load(Path(__file__).parents[2] / DATA_KEY).weights][:3]
    ['vits16', 'vits16+', 'vitb16']
    """
    file = from_workspace(path)
    top = f"{file.name}: "
    content = config.checked(_File, read_file(file), top)
    found = {}
    for key, given in content.datasets.items():
        folder_name(key, f"{top}data set")
        found[key] = datasets.read(key, given, root("DATASET_ROOT"), f"{top}datasets.{key}")
    try:
        weights = [
            Weight(key, set_, group, *given)
            for set_, groups in content.weights.items()
            for group, keys in groups.items()
            for key, given in keys.items()
        ]
    except ImatchError as error:
        raise ImatchError(f"{top}{error}") from error
    return DataKey(file, found, tuple(weights))


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
        raise ImatchError("no dataset given: set dataset to a folder of photographs")
    registered = load(data_key).datasets if data_key and from_workspace(data_key).exists() else {}
    if name in registered:
        if not (found := registered[name]).root.is_dir():
            raise ImatchError(
                f"data set {name} of {data_key}: its folder {found.root} does not exist: put its photographs there, "
                f"or set DATASET_ROOT (now {root('DATASET_ROOT')}) to the folder that has it"
            )
        return found
    folder = from_workspace(name)
    places = [folder]
    with contextlib.suppress(ImatchError):
        places += [root(above) / below(name, "", above) for above in ("DATASET_ROOT", "REFERENCE_ROOT")]
    for place in places:
        if place.is_dir():
            return Dataset(place.name, place)
    if folder.is_file():
        raise ImatchError(f"dataset {folder} is a file: give the folder that holds the photographs")
    keys = f"no keys in {data_key}"
    if registered:
        keys = f"in {data_key}: {config.unknown('data set', name, registered)}"
    raise ImatchError(
        f"dataset folder {printable(' or '.join(map(str, places)))} does not exist: give an existing folder of "
        f"photographs or a key ({keys}); `make demo` writes the demo's photographs to data/demo"
    )
