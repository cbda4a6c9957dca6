"""Per-image files, out: a tree of `.npy` + `_meta.json` for people and other tools (`import_tree` reads such trees).

    <folder>/<dataset>/<weight>/<label>/GlobalToken/GlobalToken_res256_raw_dinov3_vits16_LVD_<label>_<frame>.npy
    <folder>/<dataset>/<weight>/<label>/rot045/ReferenceGlobal/ReferenceGlobal_res256_raw_..._<label>_<frame>.npy

A backbone without hub entry and family (dsift, sift) puts its own name and NONE in their place. A step's tag
follows the configuration after a hyphen (`res256-tag`).
"""

from __future__ import annotations

import glob
import io
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from imatch.core import compute, config
from imatch.core.files import (
    digest,
    name_digest,
    refuse_or_say,
    relative,
    short_name,
    write_array,
    write_bytes,
    write_json,
)
from imatch.core.rows import Json, PhotoRow
from imatch.core.types import ImatchError, Tokens
from imatch.data import references, registry, store
from imatch.data.store import Stored
from imatch.features import denseft

KINDS = {
    "global": ("GlobalToken", "ReferenceGlobal"),
    "patch": ("PatchToken", "ReferencePatch"),
    "grid": ("PatchGrid", "ReferenceGrid"),
    "denseft": ("DenseFT", "ReferenceDenseFT"),
}
"""What an output is called: of a photograph, of a reference."""
_SECOND = {name: "png" if name == "denseft" else "json" for name in KINDS}
OUTPUTS = tuple(f"{name}.{suffix}" for name in KINDS for suffix in ("npy", _SECOND[name]))
ENDINGS = {"json": "_meta.json", "npy": ".npy", "png": ".png"}
NEUTRAL = ("shard_size", "image_groups", "dataset", "imported", "files")
"""Parameters of a step that change no number of a single photograph."""
HUB = r"dinov3_[a-z0-9]+(?:_[a-z]+)?"
ANCHOR = rf"_(?P<variant>raw|sub\d+)_(?P<hub>{HUB}|[^_]+)_(?P<family>LVD|SAT|NONE)_"
"""The middle of every file's name, which tells the configuration before it from the label behind it."""


def export_per_image(
    embeddings: Stored, outputs: Sequence[str], folder: Path | None = None, on_change: str = "refuse"
) -> int:
    """Write per-image files of photographs or of references, those that are missing.

    Args:
        embeddings: their embeddings.
        outputs: names of `OUTPUTS`. "<kind>.npy" is the array with its meta beside it, "<kind>.json" the meta alone,
            "denseft.png" the picture with its meta, of one basis for the whole store.
        folder: the tree's root; None is <exports>/<run>/per_image, the same for data sets and references.
        on_change: "refuse" or "recompute" files that were made differently, or of photographs that are gone.

    Returns:
        How many files were written.

    Raises:
        ImatchError: an unknown output, or one that needs a grid of a backbone without one; nothing is written.
        StepError: an output needs local descriptors that were not kept; or files were made differently.

    >>> export_per_image(None, ["globl.npy"])
    Traceback (most recent call last):
    imatch.core.types.ImatchError: unknown output 'globl.npy': did you mean 'global.npy'? Known: ...
    """
    wanted: dict[str, set[str]] = {}
    for output in outputs:
        if output not in OUTPUTS:
            raise ImatchError(config.unknown("output", output, OUTPUTS))
        kind, _, suffix = output.partition(".")
        wanted.setdefault(kind, {"json"}).add(suffix)  # an array has a meta, always
    if not wanted:
        return 0
    if local := sorted(output for output in outputs if not output.startswith("global")):
        store.check_keeps(embeddings.folder, embeddings.parameters, "a file such as patch.npy")
        without = next((row["id"] for row in embeddings.rows if row["grid"] is None), None)
        if without is not None:
            raise ImatchError(
                f"outputs {', '.join(local)} need a grid, and {without} of {embeddings.folder} has keypoints: "
                "leave them out, or use a backbone with a grid (DINOv3, dsift)"
            )
    return _Export(embeddings, folder or embeddings.run / "per_image", on_change)(wanted)


def names(rows: Sequence[PhotoRow], dataset: str, data_key: Path | None = None) -> dict[str, tuple[str, str]]:
    """Photograph id -> (label, frame) of its files; no two alike, even where case does not count.

    Of a registered capture they are its label, with the capture before it where another capture of the data set has
    that label, and the frame as the file's name pads it. Else they are the folder and the file's stem.

    Args:
        rows: of the photographs.
        dataset: name of their data set.
        data_key: the registry that knows it, if one does.

    >>> names([{"id": "house 1.jpg"}, {"id": "a/2.jpg"}], "beach")
    {'house 1.jpg': ('beach', 'house_1'), 'a/2.jpg': ('a', '2')}
    """
    labels = {}
    if data_key and data_key.is_file():
        known = registry.load(data_key).datasets.get(dataset)
        labels = {name: capture.label for name, capture in known.captures.items()} if known else {}
    labels |= {row["capture"]: row["label"] for row in rows if row.get("capture") and row.get("label")}
    shared = Counter(_label(label).lower() for label in labels.values() if label)
    found = {row["id"]: _name(row, dataset, shared) for row in rows}
    count = Counter(map(_folded, found.values()))
    for id, (label, frame) in found.items():
        if count[_folded((label, frame))] > 1:
            found[id] = label, f"{frame}~{name_digest(id)[:8]}"
    return found


def _name(row: PhotoRow, dataset: str, shared: Mapping[str, int]) -> tuple[str, str]:
    if "name" in row:  # of an import: its files were called so
        parts = row["name"].split("/")
        return parts[0], parts[-1]
    path = PurePosixPath(row["id"])
    label, frame = _label("_".join(path.parent.parts) or dataset), path.stem
    if row.get("capture") and row.get("label"):
        label = _label(row["label"])
        if shared[label.lower()] > 1:
            label = _label(f"{row['capture']}_{row['label']}")
        numbers = reversed(re.findall("[0-9]+", frame))
        frame = next((digits for digits in numbers if int(digits) == row.get("frame")), frame)
    return label, _plain(_short(config.label_token(frame)), f"{label}_")


def _label(text: str) -> str:
    """Text as the name of a folder on any system."""
    token = config.label_token(text)
    token = f"{token.rstrip('.')}_" if token.endswith(".") else token
    return _plain(_short(f"_{token}" if config.DEVICE.fullmatch(token) else token))


def _plain(text: str, before: str = "") -> str:
    """`text` so that, behind `before`, no middle of a file's name can be read in it."""
    return f"{text.replace('_', '-')}-" if re.search(ANCHOR, f"_{before}{text}_") else text


def _short(text: str, most: int = 48) -> str:
    """`text` of at most so many bytes, so that no file's name is longer than 200; `names` looks whether two are one."""
    return short_name(text, most, digits=8)


def _folded(name: tuple[str, str]) -> str:
    return unicodedata.normalize("NFC", "/".join(name)).lower()


def read_meta(path: Path) -> dict[str, Json]:
    """The content of a meta file; numbers that JSON does not have (NaN) become null.

    Raises:
        ImatchError: it holds no JSON object.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "a_meta.json").write_text('{"size": [2, NaN]}')
    ...     read_meta(Path(folder) / "a_meta.json")
    {'size': [2, None]}
    """

    def finite(text: str) -> float | None:
        return number if math.isfinite(number := float(text)) else None

    try:
        meta = json.loads(path.read_bytes(), parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise ImatchError(f"{path} is no JSON ({error}): export it again or delete it") from error
    if not isinstance(meta, dict):
        raise ImatchError(f"{path} holds no JSON object: export it again or delete it")
    return meta


@dataclass(frozen=True)
class _File:
    """One array to be; `base` is the path of its files without their endings."""

    row: int
    output: str
    base: str
    fingerprint: str


class _Export:
    """What all files of a step share, and the files."""

    def __init__(self, embeddings: Stored, folder: Path, on_change: str) -> None:
        self.embeddings, self.folder, self.on_change = embeddings, folder, on_change
        parameters, self.reference = embeddings.parameters, "kind" in embeddings.about
        backbone, cfg, variant = (parameters[key] for key in ("backbone", "cfg", "variant"))
        tag = ""
        if "imported" not in parameters:
            tag = embeddings.about["configuration"].removeprefix(f"{cfg}_{variant}").removeprefix("_")
        entry = backbone.get("hub_entry") or parameters["weight"]
        hub = entry if re.fullmatch(HUB, entry) else entry.replace("_", "-")
        size = _short(_plain(f"{cfg}-{tag}" if tag else cfg), 40)
        self.middle = f"{size}_{variant}_{_short(hub, 24)}_{backbone.get('family') or 'NONE'}"
        self.said = {
            "dataset": embeddings.about["dataset"],
            "weight": parameters["weight"],
            **{key: backbone.get(key) for key in ("hub_entry", "family", "filename", "pooling", "precision")},
            **{key: parameters[key] for key in ("weights_digest", "cfg", "variant", "resize", "backbone")},
            "tag": tag,
        }
        self.root = folder / self.said["dataset"] / embeddings.about["weight"]
        self.names, self.views = _names_of_sources(embeddings, self.said["dataset"]), embeddings.views
        crops = [view["crop"] for view in self.views.values()] or [row.get("crop") for row in embeddings.rows]
        self.several = len({*crops}) > 1

    def __call__(self, wanted: Mapping[str, set[str]]) -> int:
        todo = self._todo(self._files(sorted(wanted)), wanted)
        coloured = any(file.output == "denseft" for file, _ in todo)
        basis = denseft.fit_embeddings(self.embeddings) if coloured else None
        listed = compute.progress(todo, "per-image files")
        return sum(self._write(file, suffixes, basis) for file, suffixes in listed)

    def _name(self, row: PhotoRow) -> tuple[str, str]:
        return _name(row, "", {}) if "name" in row else self.names[row.get("source", row["id"])]

    def _files(self, outputs: Sequence[str]) -> list[_File]:
        parameters = self.embeddings.parameters.items()
        made_by = digest({key: value for key, value in parameters if key not in NEUTRAL})
        all_of_it = digest([[row["id"], row["sha256"]] for row in self.embeddings.rows])
        found, taken = [], dict[str, str]()
        for i, row in enumerate(self.embeddings.rows):
            label, frame = self._name(row)
            place = f"{self.root}/{label}"
            if self.reference:
                view = self.views.get(row["id"], row)
                rotation = references.name("", view["angle"], view["crop"] or 1.0).removeprefix("_")
                place += f"/{rotation if self.several else rotation.partition('_crop')[0]}"
            if (other := taken.setdefault(f"{place}_{frame}".lower(), row["id"])) != row["id"]:
                raise ImatchError(f"{row['id']} and {other} would share the files of {place}, {frame}: rename one")
            own = digest([made_by, row["sha256"]])
            for output in outputs:
                kind = KINDS[output][self.reference]
                base = f"{place}/{kind}/{kind}_{self.middle}_{label}_{frame}"
                # DenseFT's colours depend on all photographs
                fingerprint = digest([own, all_of_it]) if output == "denseft" else own
                found.append(_File(i, output, base, fingerprint))
        return found

    def _there(self, outputs: Collection[str]) -> dict[str, set[str]]:
        """The files of this step that lie in the tree: path without ending -> suffixes."""
        found: dict[str, set[str]] = defaultdict(set)
        for kind in (KINDS[output][self.reference] for output in outputs):
            called = glob.escape(f"{kind}/{kind}_{self.middle}_")
            for path in self.root.glob(f"{'*/*' if self.reference else '*'}/{called}*"):
                for suffix in (suffix for suffix, ending in ENDINGS.items() if path.name.endswith(ending)):
                    found[str(path).removesuffix(ENDINGS[suffix])].add(suffix)
        return found

    def _todo(self, files: Sequence[_File], wanted: Mapping[str, set[str]]) -> list[tuple[_File, list[str]]]:
        """What is missing; what was made differently is refused or removed."""
        there, todo, stale = self._there(wanted), [], dict[str, str]()
        for file in compute.progress(files, "look"):
            have = there.get(file.base, set())
            before = read_meta(_path(file.base, "json")).get("fingerprint") if "json" in have else None
            if have and before != file.fingerprint:
                changed = f"{before} -> {file.fingerprint}"
                stale[file.base] = changed if before else "no meta says how it was made"
                have = set()
            if missing := sorted(wanted[file.output] - have):
                todo.append((file, missing))
        for base in sorted({*there} - {file.base for file in files}):
            if "json" in there[base] and "fingerprint" in read_meta(_path(base, "json")):
                stale[base] = "of a photograph that the step does not have (any more), or has under another name"
        if stale:
            told = [f"{relative(Path(base), self.folder)}: {why}" for base, why in stale.items()]
            name = "02_references" if self.reference else "01_embed"
            refuse_or_say(name, self.on_change, f"files under {self.folder} were made differently", told)
        for base in stale:
            for suffix in there[base]:
                _path(base, suffix).unlink()
        return todo

    def _write(self, file: _File, suffixes: Sequence[str], basis: denseft.Basis | None) -> int:
        """Write the meta first, so that no array ever lies there without one."""
        tokens, row = self.embeddings.tokens(file.row), self.embeddings.rows[file.row]
        if file.output == "denseft":
            assert basis is not None
            array = basis(tokens)
        elif file.output == "global":
            norm = row.get("global_norm", 1.0)  # of an import: its file had this norm
            array = tokens.vector if norm == 1 else tokens.vector * np.float32(norm)
        else:
            array = tokens.descriptors if file.output == "patch" else tokens.as_grid()
        for suffix in suffixes:
            path = _path(file.base, suffix)
            if suffix == "json":
                write_json(path, self._meta(file, row, tokens, array))
            elif suffix == "npy":
                write_array(path, array)
            else:
                data = io.BytesIO()
                denseft.denseft_picture(array, denseft.covered(tokens, row["size"])).save(data, "PNG")
                write_bytes(path, data.getvalue())
        return len(suffixes)

    def _meta(self, file: _File, row: PhotoRow, tokens: Tokens, array: np.ndarray) -> dict[str, Json]:
        label, frame = self._name(row)
        view = {**row, **{key: self.views[row["id"]][key] for key in ("angle", "crop") if row["id"] in self.views}}
        return {
            "kind": KINDS[file.output][self.reference],
            **self.said,
            **{key: row.get(key) for key in ("id", "sha256", "size", "grid", "position", "capture")},
            "label": row.get("label", label),
            "frame": row.get("frame", frame),
            **{key: view[key] for key in ("source", "source_sha256", "angle", "crop") if key in view},
            **_lattice(tokens, row),
            "shape": array.shape,
            "dtype": str(array.dtype),
            "fingerprint": file.fingerprint,
        }


def _path(base: str, suffix: str) -> Path:
    return Path(base + ENDINGS[suffix])


def _lattice(tokens: Tokens, row: PhotoRow) -> dict[str, list[float]]:
    """First centre and step, (x, y) pixels, of a grid that does not cover its photograph; nothing of others."""
    if not row["xy"] or tokens.grid is None:
        return {}
    dy, dx = (side / n for side, n in zip(denseft.covered(tokens, row["size"]), tokens.grid, strict=True))
    return {"xy_first": tokens.xy[0].tolist(), "xy_step": [dx, dy]}


def _names_of_sources(embeddings: Stored, dataset: str) -> dict[str, tuple[str, str]]:
    """A reference bears the name of the photograph that it was made from."""
    above = embeddings.sources
    if above is embeddings:  # an import's references have rows with names of their own
        return {} if "kind" in embeddings.about else names(above.rows, dataset, above.data_key)
    rows = [*above.rows, *above.skipped]
    gone = sorted({row["source"] for row in embeddings.rows} - {row["id"] for row in rows})
    return names([*rows, *({"id": id} for id in gone)], dataset, above.data_key)
