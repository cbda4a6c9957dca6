"""Where things are, and what they are called: params/data_key.json, folders, environment.

The only room that looks at the environment. The registry names data sets and weights; whatever is named in it lies
below its root, or is refused. Roots are checked as text: links below them are followed, on purpose.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, Field

from imatch import datasets, plugins
from imatch.datasets import Dataset, below, names
from imatch.plugins import Said
from imatch.records import ImatchError

DATA_KEY = "params/data_key.json"
ROOTS = {  # variable -> its default in the container, if that is there, and in the working folder
    "DATASET_ROOT": ("/opt/datasets", "data"),
    "REFERENCE_ROOT": ("/opt/references", "references"),
    "WEIGHTS_ROOT": ("/workspace/weights", "weights"),
    "DINOV3_REPO": ("/workspace/dinov3", "dinov3"),
    "EXPORT_ROOT": ("/exports", "exports"),
}
REPLACED = {  # variables of older containers -> what stands for them
    "REPO_DIR": "DINOV3_REPO (CODE_HOST in docker/.env)",
    "IMG_ROOT": "DATASET_ROOT (DATASET_HOST in docker/.env)",
    "EMBED_ROOT": "EXPORT_ROOT (EXPORT_HOST in docker/.env), whose <run>/01_embed it is",
    "REFERENCE_EMBED_ROOT": "EXPORT_ROOT (EXPORT_HOST in docker/.env), whose <run>/02_references it is",
    "MATCH_ROOT": "EXPORT_ROOT (EXPORT_HOST in docker/.env), whose <run>/04_match it is",
    "VIS_ROOT": "EXPORT_ROOT (EXPORT_HOST in docker/.env), for pictures lie beside what they show",
    "VIS_*": "parameters of the notebooks, such as outputs of 04_match",
}
FAMILIES = {"LVD": "lvd1689m", "SAT": "sat493m"}
"""What weights were trained on, which decides how photographs are normalised -> how their files are called."""


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


def step_folder(path: str | Path) -> Path:
    """The folder of a step, or a folder that holds some: what begins with `exports/` lies in EXPORT_ROOT, wherever that
    is (in the container it is a mount of its own).

    >>> step_folder("exports/demo") == root("EXPORT_ROOT") / "demo"
    True
    """
    first, *below = Path(path).parts or ("",)
    return resolve(Path(root("EXPORT_ROOT"), *below) if first == ROOTS["EXPORT_ROOT"][1] else path)


def root(name: str) -> Path:
    """The folder that the variable `name` stands for: what it is set to, else its default.

    Args:
        name: DATASET_ROOT, REFERENCE_ROOT, WEIGHTS_ROOT, DINOV3_REPO or EXPORT_ROOT.

    >>> root("WEIGHTS_ROOT").is_absolute()
    True
    """
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


def redis_url() -> str:
    """REDIS_URL: the Redis server that messages are sent to. It may hold a password: never print or write it.

    Raises:
        ImatchError: it is not set.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, REDIS_URL="redis://localhost:6379/0"):
    ...     redis_url()
    'redis://localhost:6379/0'
    """
    if not (url := os.environ.get("REDIS_URL", "")):
        raise ImatchError(
            "no Redis to send to: set REDIS_URL in the environment, such as redis://:password@host:6379/0 "
            "(rediss:// for TLS)"
        )
    return url


def jupyter_port() -> int:
    """JUPYTER_PORT: the port that JupyterLab listens on; 8888 where it is not set, as Jupyter itself has it.

    Raises:
        ImatchError: it is no port.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, JUPYTER_PORT="8890"):
    ...     jupyter_port()
    8890
    """
    text = os.environ.get("JUPYTER_PORT") or "8888"
    if not (text.isdecimal() and 0 < int(text) < 2**16):
        raise ImatchError(f"JUPYTER_PORT is {text!r}: set it to a port, such as 8888")
    return int(text)


def replaced() -> dict[str, str]:
    """Variables of older containers that are set, and that nothing reads any more -> what stands for them.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, IMG_ROOT="/photographs"):
    ...     replaced()["IMG_ROOT"]
    'DATASET_ROOT (DATASET_HOST in docker/.env)'
    """
    named = {name: REPLACED.get(name) for name, value in sorted(os.environ.items()) if value}
    others = {name: REPLACED["VIS_*"] for name in named if name.startswith("VIS_")}
    return others | {name: said for name, said in named.items() if said}


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


def take_cores(n: int) -> None:
    """Let torch, FAISS and OpenCV use so many threads in this process; they read it when they are loaded."""
    # Dask gives its workers 1 in the first two
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM"):
        os.environ[name] = str(n)


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


def folder_name(name: str, what: str) -> str:
    """`name` if it may be the name of a folder anywhere: keys and configurations name folders of results.

    >>> folder_name("vits16+", "weight")
    'vits16+'
    """
    if not name.strip(".") or not all(c.isalnum() or c in "-_.+" for c in name):
        said = "it becomes the name of a folder: use letters, digits, '-', '_', '.', '+'"
        raise ImatchError(f"{what} {name!r}: {said}")
    return name


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
            weight_set: the set, needed only where several sets have that key.

        Raises:
            ImatchError: there is none, with the nearest, or there are several.

        >>> load(Path(__file__).parents[1] / DATA_KEY).weight("cxTiny").hub_entry
        'dinov3_convnext_tiny'
        """
        sets = {weight.set for weight in self.weights}
        if weight_set and weight_set not in sets:
            raise ImatchError(f"{self.path}: {plugins.unknown('weight_set', weight_set, sets)}")
        there = [weight for weight in self.weights if weight_set in ("", weight.set)]
        found = [weight for weight in there if weight.key == key]
        if not found:
            raise ImatchError(f"{self.path}: {plugins.unknown('weight', key, {weight.key for weight in there})}")
        if len(found) > 1:
            several = names(f"{weight.set}.{weight.group}" for weight in found)
            raise ImatchError(f"{self.path}: weight {key} is in {several}: say which set as weight_set, or rename one")
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

    >>> [weight.key for weight in load(Path(__file__).parents[1] / DATA_KEY).weights][:3]
    ['vits16', 'vits16+', 'vitb16']
    """
    file = resolve(path)
    top = f"{file.name}: "
    content = plugins.checked(_File, read(file), top)
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
    with contextlib.suppress(ImatchError):
        places += [root(above) / below(name, "", above) for above in ("DATASET_ROOT", "REFERENCE_ROOT")]
    for place in places:
        if place.is_dir():
            return Dataset(place.name, place)
    if folder.is_file():
        raise ImatchError(f"dataset {folder} is a file: give the folder that holds the photographs")
    nor = f", nor does it below {' or '.join(str(place.parent) for place in places[1:])}" if places[1:] else ""
    keys = f"in {data_key}: {plugins.unknown('data set', name, registered)}" if registered else f"no keys in {data_key}"
    raise ImatchError(
        f"dataset folder {folder} does not exist{nor}: give an existing folder of photographs or "
        f"a key ({keys}); `make demo` writes the demo's photographs to data/demo"
    )


if __name__ == "__main__":
    from imatch import checks  # a command at the door: what it shows lies on the upper floors

    sys.exit(checks.main())
