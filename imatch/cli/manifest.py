"""Manifests -> what batch runs: one point a weight, size and variant.

A manifest says which photographs of a data set go through which weights, at which sizes, and what is written of them.
There are three: of the data set itself, of queries and of references; the file's name says which.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, PositiveInt, StringConstraints

from imatch.core import config, settings
from imatch.core.config import Said, listed
from imatch.core.rows import Json
from imatch.core.types import ImatchError
from imatch.data import datasets, images, registry
from imatch.features import weights

ROLES = {"dataset": ["01_embed"], "query": ["01_embed"], "reference": ["01_embed", "02_references"]}
"""What a manifest is of -> the notebooks that it runs."""
DENSEFT = ("denseft.png", "denseft.npy")
_ONCE = AfterValidator(lambda given: list(dict.fromkeys(given)))
_Key = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Sub(Said):
    use: bool
    stride: Annotated[list[int], BeforeValidator(listed), _ONCE] = Field([])


class _Variant(Said):
    raw: bool = True
    sub: _Sub = _Sub(use=False)


class _Experiment(Said):
    variant: _Variant = _Variant()


class _Run(Said):
    test_embedding: bool = True
    generate_denseft: bool = False


class _Files(Said):
    npy: bool = False
    json_: bool = Field(False, alias="json")


class _Outputs(Said):
    global_: _Files = Field(_Files(), alias="global")
    patch: _Files = _Files()
    grid: _Files = _Files()


def _by_comma(given: Json) -> Json:
    return given.split(",") if isinstance(given, str) else given


class _Model(Said):
    weights: Annotated[list[_Key], Field(min_length=1), BeforeValidator(_by_comma), _ONCE] = Field(
        validation_alias=AliasChoices("weights", "weight_key")
    )
    target_res: Annotated[list[PositiveInt], Field(min_length=1), BeforeValidator(listed), _ONCE]
    embedding_cfg: str = ""
    image_groups: list[Any] = Field([])
    outputs: _Outputs = _Outputs()
    run: _Run = _Run()


class _Manifest(Said):
    dataset_key: str
    weight_set: str = ""
    experiment: _Experiment = _Experiment()
    models: list[_Model]


def is_manifest(content: Json) -> bool:
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
    path: str | Path, data_key: str | Path = settings.DATA_KEY, given: Mapping[str, Json] | None = None
) -> tuple[dict[str, Json], dict[str, dict[str, Json]]]:
    """Read a manifest, JSON or YAML, check all of it against the registry, and expand it.

    Models that are switched off are said in a printed line and left out.

    Args:
        path: the file.
        data_key: the registry that has its data set and its weights.
        given: parameters that win over what it says, as from the command line.

    Returns:
        The parameters of all its points, and what each point is called by, its weight, size and variant -> its own.

    Raises:
        ImatchError: an unknown field, key or folder, with the nearest known one; a value of the wrong type; a size
            that does not fit the weight; two points that would write different things to the same folder; nothing
            left to run.

    >>> home = Path(__file__).parents[2]
    >>> parameters, points = read(home / "params/manifestQuery.json", home / settings.DATA_KEY)
    >>> parameters["tag"], list(points)
    ('query', ['weight=vits16 cfg=res256 variant=raw'])
    """
    of, top, given = role(path), f"{Path(path).name}: ", given or {}
    content = config.checked(_Manifest, config.read_file(path), top)
    variants = _variants(content.experiment.variant, f"{top}experiment.variant")
    known = registry.load(data_key)
    dataset = known.dataset(content.dataset_key)
    parameters = {
        "dataset": dataset.key,
        "data_key": str(data_key),
        "resize.mode": "stretch",
        "tag": "" if of == "dataset" else of,
        "run": "manifest",
        **({"crops": [1.0]} if of == "reference" else {}),  # whole views, turned
        **given,
    }
    points: dict[str, dict[str, Any]] = {}
    for i, model in enumerate(content.models):
        where = f"{top}models[{i}]"
        try:
            told = _told(model, of, dataset)
            made = list(_points(model, {**told, **given}, variants, known, content.weight_set, parameters))
        except ImatchError as error:
            raise ImatchError(f"{where}: {error}") from error
        if not (model.run.test_embedding or model.run.generate_denseft):
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
    return parameters, points


def _variants(said: _Variant, where: str) -> list[str]:
    strides = said.sub.stride if said.sub.use else []
    if said.sub.use and min(strides, default=0) < 2:
        wanted = "every how many rows and columns to keep, 2 or more, such as [2, 4]"
        raise ImatchError(f"{where}.sub.stride wants {wanted}, got {strides}; `raw` keeps all")
    if not (said.raw or strides):
        raise ImatchError(f"{where} switches off raw and sub: switch one on")
    return [*(["raw"] if said.raw else []), *(f"sub{stride}" for stride in strides)]


def _told(model: _Model, of: str, dataset: datasets.Dataset) -> dict[str, Json]:
    """What all points of a model share."""
    image_groups, angles = _image_groups(model.image_groups, of, dataset)
    outputs = model.outputs.model_dump(by_alias=True).items()
    files = [f"{kind}.{ending}" for kind, chosen in outputs for ending, wanted in chosen.items() if wanted]
    files += DENSEFT if model.run.generate_denseft else ()
    told = {"image_groups": image_groups, "files": files, **angles}
    if cfg := model.embedding_cfg:
        told["storage.cfg"] = config.folder_name(cfg, "embedding_cfg")
        if len(model.target_res) > 1:
            raise ImatchError(f"embedding_cfg {cfg!r} names one size: leave it out, or give one target_res")
    return told


def _points(
    model: _Model,
    told: Mapping[str, Json],
    variants: Sequence[str],
    known: registry.DataKey,
    weight_set: str,
    parameters: Mapping[str, Json],
) -> Iterator[tuple[str, dict[str, Json]]]:
    """The points of a model, each by the name of its folder, which no other point may have."""
    mode, scale = parameters["resize.mode"], parameters.get("resize.scale", 1.0)
    for key, side, variant in itertools.product(model.weights, model.target_res, variants):
        weight = known.weight(key, weight_set)
        asked = f"{weight_set}/{key}" if weight_set else key
        point = {"weight": asked, "resize.long_side": side, "storage.variant": variant, **told}
        size = images.Resize(mode, point["resize.long_side"], scale)
        if point["weight"] == asked:
            size.check(weights.patch_side(weight.hub_entry))
        key, cfg = point["weight"].rpartition("/")[2], point.get("storage.cfg") or size
        yield f"weight={key} cfg={cfg} variant={point['storage.variant']}", point


def _image_groups(
    given: Json, of: str, dataset: datasets.Dataset
) -> tuple[list[dict[str, Json]], dict[str, list[float]]]:
    """The groups as 01_embed takes them, and the angles, if a rotation of references says them."""
    for folder, _ in datasets.groups(given, "image_groups"):
        if dataset.captures and folder is not None:
            dataset.captures_named(folder)
    rotations = [None if group.get("rotation") is None else listed(group["rotation"]) for group in given]
    if of != "reference" and any(rotation not in (None, [], [0]) for rotation in rotations):
        raise ImatchError(
            f"image_groups has a rotation: the photographs of a {of} manifest are embedded as they are; leave it out "
            "and ask for turned views in the reference manifest"
        )
    kept = [{name: group[name] for name in ("folder", "indices") if group.get(name) is not None} for group in given]
    if of != "reference" or all(rotation is None for rotation in rotations):
        return kept, {}
    if any(rotation != rotations[0] for rotation in rotations):
        raise ImatchError(
            "image_groups have different rotations: give all groups of a model the same, or make two models"
        )
    if not rotations[0]:
        raise ImatchError("image_groups[0].rotation names no angle: leave it out for the notebook's own")
    return kept, {"angles": rotations[0]}


def _united(first: dict[str, Json], second: dict[str, Json], where: str) -> dict[str, Json]:
    """Two models that differ in their photographs alone are one point."""
    for name in sorted({*first, *second} - {"image_groups"}):
        if first.get(name) != second.get(name):
            raise ImatchError(
                f"{where} again, but with another {name} ({second.get(name)!r}, not {first.get(name)!r}), for the same "
                "folder: make them equal, give one an embedding_cfg, or leave out a -p that makes them meet"
            )
    groups = [*first["image_groups"], *(g for g in second["image_groups"] if g not in first["image_groups"])]
    everything = not first["image_groups"] or not second["image_groups"]
    return {**first, "image_groups": [] if everything else groups}
