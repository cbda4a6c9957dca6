"""Manifests -> what batch runs: one point a weight, size and variant.

A manifest says which photographs of a data set go through which weights, at which sizes, and what is written of them.
There are three: of the data set itself, of queries and of references; the file's name says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imatch import datasets, images, plugins, registry
from imatch.backbones import dinov3_weights
from imatch.datasets import fields, wants
from imatch.records import ImatchError

ROLES = {"dataset": ["01_embed"], "query": ["01_embed"], "reference": ["01_embed", "02_references"]}
"""What a manifest is of -> the notebooks that it runs."""
FIELDS = ("dataset_key", "weight_set", "experiment", "models")
MODEL = ("weights", "weight_key", "target_res", "embedding_cfg", "image_groups", "outputs", "run")
OUTPUTS = {"global": ("npy", "json"), "patch": ("npy", "json"), "grid": ("npy", "json")}
DENSEFT = ("denseft.png", "denseft.npy")


@dataclass(frozen=True)
class Manifest:
    """A manifest, expanded.

    Attributes:
        role: "dataset", "query" or "reference".
        notebooks: what it runs, in order.
        parameters: of all its points.
        points: what each point is called by, its weight, size and variant -> its parameters.
    """

    role: str
    notebooks: list[str]
    parameters: dict[str, Any]
    points: dict[str, dict[str, Any]]


def is_manifest(content: object) -> bool:
    """Whether what a file holds is a manifest, and no recipe of notebooks.

    >>> is_manifest({"models": []}), is_manifest({"notebooks": []})
    (True, False)
    """
    return isinstance(content, Mapping) and ("models" in content or "dataset_key" in content)


def role(path: str | Path) -> str:
    """What a manifest is of, by the name of its file.

    Raises:
        ImatchError: the name says two things.

    >>> role("params/manifestQuery.json"), role("query/manifest.json")
    ('query', 'dataset')
    """
    name = Path(path).name
    found = [role for role in ("query", "reference") if role in name.lower()]
    if len(found) > 1:
        raise ImatchError(f"{name} says both query and reference: rename it, for its name says what it is of")
    return found[0] if found else "dataset"


def read(
    path: str | Path, data_key: str | Path = registry.DATA_KEY, given: Mapping[str, Any] | None = None
) -> Manifest:
    """Read a manifest, JSON or YAML, check all of it against the registry, and expand it.

    Models that are switched off are said in a printed line and left out.

    Args:
        path: the file.
        data_key: the registry that has its data set and its weights.
        given: parameters that win over what it says, as from the command line.

    Raises:
        ImatchError: an unknown field, key or folder, with the nearest known one; a value of the wrong type; a size
            that does not fit the weight; two points that would write different things to the same folder; nothing
            left to run.

    >>> home = Path(__file__).parents[1]
    >>> found = read(home / "params/manifestQuery.json", home / registry.DATA_KEY)
    >>> found.role, found.notebooks, list(found.points)
    ('query', ['01_embed'], ['weight=vits16 cfg=res256 variant=raw'])
    """
    of, top = role(path), f"{Path(path).name}: "
    content = fields(registry.read(path), FIELDS, top)
    for name in ("dataset_key", "models"):
        if name not in content:
            raise ImatchError(f"{top}{name} is missing: a manifest has dataset_key and models")
    known = registry.load(data_key)
    dataset = known.dataset(wants(content["dataset_key"], str, f"{top}dataset_key"))
    weight_set = wants(content.get("weight_set", ""), str, f"{top}weight_set")
    parameters = {
        "dataset": dataset.key,
        "data_key": str(data_key),
        "weight_set": weight_set,
        "resize": "stretch",
        "tag": "" if of == "dataset" else of,
        "run": "manifest",
        **({"crops": [1.0]} if of == "reference" else {}),  # whole views, turned
        **(given or {}),
    }
    variants = _variants(content.get("experiment", {}), f"{top}experiment")
    points: dict[str, dict[str, Any]] = {}
    for i, said in enumerate(wants(content["models"], list, f"{top}models")):
        where = f"{top}models[{i}]"
        model = fields(said, MODEL, where)
        made = [
            _called(point, parameters, given or {}, known, where)
            for point in _points(model, variants, of, dataset, where)
        ]
        if not _runs(model, where):
            print(f"{where} is skipped: its run switches off both test_embedding and generate_denseft", flush=True)
            continue
        for label, point in made:
            points[label] = _united(points[label], point, f"{where} asks for {label}") if label in points else point
    if not points:
        raise ImatchError(f"{top}models: there is nothing to run: name a model, or switch one on by its run")
    if of == "reference":  # views of other photographs, or at other angles, need a folder of their own
        views: list[tuple[Any, ...]] = []
        for point in points.values():
            if (view := (point["image_groups"], point.get("angles"))) not in views:
                views.append(view)
            if number := views.index(view):
                point["tag"] = f"{parameters['tag']}{number + 1}"
    return Manifest(of, ROLES[of], parameters, points)


def _called(
    point: dict[str, Any],
    parameters: Mapping[str, Any],
    given: Mapping[str, Any],
    known: registry.DataKey,
    where: str,
) -> tuple[str, dict[str, Any]]:
    """A point with what was given, and what it is called by: as its folder, which no other point may have."""
    try:
        weight = known.weight(point["weight"], parameters["weight_set"])
        point = {**point, **given}
        size = images.Resize(parameters["resize"], point["long_side"], parameters.get("scale", 1.0))
        if "weight" not in given:
            size.check(dinov3_weights.patch(weight.hub_entry))
    except ImatchError as error:
        raise ImatchError(f"{where}: {error}") from error
    return f"weight={point['weight']} cfg={point.get('cfg') or size} variant={point['variant']}", point


def _variants(given: Any, where: str) -> list[str]:
    experiment, where = fields(given, ("variant",), where), f"{where}.variant"
    variant = fields(experiment.get("variant", {}), ("raw", "sub"), where)
    names = ["raw"] if wants(variant.get("raw", True), bool, f"{where}.raw") else []
    if "sub" in variant:
        sub = fields(variant["sub"], ("use", "stride"), f"{where}.sub")
        if "use" not in sub:
            raise ImatchError(f"{where}.sub.use is missing: say true or false")
        strides = _numbers(sub.get("stride", []), f"{where}.sub.stride")
        if wants(sub["use"], bool, f"{where}.sub.use"):
            if not strides or min(strides) < 2:
                said = f"wants every how many rows and columns to keep, 2 or more, such as [2, 4], got {strides}"
                raise ImatchError(f"{where}.sub.stride {said}; `raw` keeps all")
            names += [f"sub{stride}" for stride in strides]
    if not names:
        raise ImatchError(f"{where} switches off raw and sub: switch one on")
    return names


def _points(
    model: Mapping[str, Any], variants: Sequence[str], of: str, dataset: datasets.Dataset, where: str
) -> Iterator[dict[str, Any]]:
    """The points of one model, whether it is switched on or not: what is switched off is checked, too."""
    if "target_res" not in model:
        raise ImatchError(f"{where}.target_res is missing: pixels of the side, such as 256 or [256, 512]")
    sizes = _numbers(model["target_res"], f"{where}.target_res")
    if not sizes or min(sizes) < 1:
        raise ImatchError(f"{where}.target_res wants pixels of the side, such as 256 or [256, 512], got {sizes}")
    cfg = wants(model.get("embedding_cfg", ""), str, f"{where}.embedding_cfg")
    if cfg:
        registry.folder_name(cfg, f"{where}.embedding_cfg")
        if len(sizes) > 1:
            raise ImatchError(f"{where}.embedding_cfg {cfg!r} names one size: leave it out, or give one target_res")
    image_groups, angles = _image_groups(model.get("image_groups", []), of, dataset, f"{where}.image_groups")
    shared = {"image_groups": image_groups, "files": _outputs(model, where), **angles}
    if cfg:
        shared["cfg"] = cfg
    for weight in _weights(model, where):
        for size in sizes:
            for variant in variants:
                yield {"weight": weight, "long_side": size, "variant": variant, **shared}


def _weights(model: Mapping[str, Any], where: str) -> list[str]:
    given = [name for name in ("weights", "weight_key") if name in model]
    if len(given) != 1:
        raise ImatchError(f"{where} has {' and '.join(given) or 'no weights'}: give weights, a list or comma text")
    where, value = f"{where}.{given[0]}", model[given[0]]
    keys = value.split(",") if isinstance(value, str) else wants(value, list, where)
    keys = list(dict.fromkeys(wants(key, str, where).strip() for key in keys))
    if not keys or not all(keys):
        raise ImatchError(f"{where} wants keys of weights, such as vits16, got {value!r}")
    return keys


def _numbers(given: Any, where: str) -> list[int]:
    numbers = given if isinstance(given, list) else [given]
    return list(dict.fromkeys(wants(number, int, where) for number in numbers))


def _image_groups(
    given: Any, of: str, dataset: datasets.Dataset, where: str
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """The groups as 01_embed takes them, and for references the angles, if a rotation says them."""
    for folder, _ in datasets.groups(given, where):
        if dataset.captures and folder is not None:
            try:
                dataset.captures_named(folder)
            except ImatchError as error:
                raise ImatchError(f"{where}: {error}") from error
    rotations = [_rotation(group.get("rotation"), f"{where}[{i}].rotation") for i, group in enumerate(given)]
    if of != "reference" and any(rotation not in (None, [], [0]) for rotation in rotations):
        raise ImatchError(
            f"{where} has a rotation: the photographs of a {of} manifest are embedded as they are; leave it out and "
            "ask for turned views in the reference manifest"
        )
    kept = [{name: group[name] for name in ("folder", "indices") if group.get(name) is not None} for group in given]
    if of != "reference" or all(rotation is None for rotation in rotations):
        return kept, {}
    if any(rotation != rotations[0] for rotation in rotations):
        raise ImatchError(f"{where} have different rotations: give all groups of a model the same, or make two models")
    if not rotations[0]:
        raise ImatchError(f"{where}[0].rotation names no angle: leave it out for the notebook's own")
    return kept, {"angles": rotations[0]}


def _rotation(given: Any, where: str) -> list[float] | None:
    if given is None:
        return None
    angles = given if isinstance(given, list) else [given]
    for angle in angles:
        if not plugins.fits(angle, float) or not math.isfinite(angle):
            raise ImatchError(f"{where} wants degrees, a number or a list of numbers, got {given!r}")
    return angles


def _outputs(model: Mapping[str, Any], where: str) -> list[str]:
    outputs = fields(model.get("outputs", {}), OUTPUTS, f"{where}.outputs")
    names = []
    for kind, endings in OUTPUTS.items():
        chosen = fields(outputs.get(kind, {}), endings, f"{where}.outputs.{kind}")
        for ending in endings:
            if wants(chosen.get(ending, False), bool, f"{where}.outputs.{kind}.{ending}"):
                names.append(f"{kind}.{ending}")
    return [*names, *(DENSEFT if _run(model, where)["generate_denseft"] else ())]


def _run(model: Mapping[str, Any], where: str) -> dict[str, bool]:
    default = {"test_embedding": True, "generate_denseft": False}
    run = {**default, **fields(model.get("run", {}), default, f"{where}.run")}
    return {name: wants(value, bool, f"{where}.run.{name}") for name, value in run.items()}


def _runs(model: Mapping[str, Any], where: str) -> bool:
    return any(_run(model, where).values())


def _united(first: dict[str, Any], second: dict[str, Any], where: str) -> dict[str, Any]:
    """Two models that differ in their photographs alone are one point: both write to one folder."""
    for name in sorted({*first, *second} - {"image_groups"}):
        if first.get(name) != second.get(name):
            raise ImatchError(
                f"{where} again, but with another {name} ({second.get(name)!r}, not {first.get(name)!r}), for the same "
                "folder: make them equal, give one an embedding_cfg, or leave out a -p that makes them meet"
            )
    groups = [*first["image_groups"], *(g for g in second["image_groups"] if g not in first["image_groups"])]
    everything = not first["image_groups"] or not second["image_groups"]
    return {**first, "image_groups": [] if everything else groups}
