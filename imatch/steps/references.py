"""02_references: photographs to rotated and cropped views with their exact matrix."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

from PIL import Image

from imatch.core import compute, files, settings
from imatch.core.compute import ComputeOptions, PartDoneError
from imatch.core.rows import PhotoRow, ReferenceRow
from imatch.core.step import Step, check_planned, open_step, start_step, step_folder, tagged
from imatch.core.types import ImatchError, PhotographError, StepError
from imatch.data import images, references
from imatch.data.store import Stored
from imatch.steps import groups

FILE_TYPES = {"jpg": "JPEG", "png": "PNG"}
_Job = tuple[PhotoRow, str, int]
"""A photograph, the name of its views, and its number."""


def start_references(
    embed_step: str,
    *,
    kind: str,
    angles: Sequence[float],
    crops: Sequence[float],
    resize_to_original: bool,
    file_type: str,
    quality: int,
    tag: str,
    on_change: str,
) -> Step:
    """Start the first half of 02_references: rotated and cropped views of every photograph of an 01_embed step.

    The views depend on the photographs alone (all that can be decoded), so all backbones share them.

    Args:
        embed_step: folder of a finished 01_embed.
        kind: a name of `references.REFERENCES`.
        angles: degrees counter-clockwise.
        crops: ratios in (0, 1].
        resize_to_original: enlarge each view to the photograph's own size (`isometric`: a square of its shorter side).
        file_type: "jpg" or, lossless, "png".
        quality: of the JPEG files, 1 to 100.
        tag, on_change: as in `start_embed`.

    Raises:
        ImatchError: an unknown kind or file type, or a number out of its range; see also `step.start_step`.
    """
    source = open_step(step_folder(embed_step))
    if source.parameters.get("imported"):
        raise StepError(f"{source.folder} was imported, and its photographs are not known to be there: run 01_embed")
    references.check(kind, angles, crops, resize_to_original)
    groups.check({"file_type": file_type, "quality": quality})
    about = {"dataset": source.about["dataset"], "kind": f"{kind}{tagged(tag)}", "part": "views"}
    parameters = {
        "kind": kind,
        "angles": sorted({float(angle) for angle in angles}),
        "crops": sorted({float(crop) for crop in crops}),
        "resize_to_original": resize_to_original,
        "file_type": file_type,
        "quality": quality,
    }
    upstream = {"photographs": source.metrics["photographs_digest"]}
    links = {"photographs": source.linked("photographs"), "embed": source.folder}
    return start_step(source.run, "02_references", about, parameters, upstream, links, on_change)


def make_references(step: Step, resources: ComputeOptions = ComputeOptions()) -> list[ReferenceRow]:
    """Make the views that are missing and finish the step of views.

    Every view is a JPEG at references_<dataset>/R<folder>/<stem>_rot045_crop50.jpg (or a PNG, .png), with a PNG mask
    in masks/ when a corner is empty, and a row of references.jsonl. Long names are shortened (`files.short_name`).

    Args:
        step: of `start_references`.
        resources: who does the work; `workers` are processes.

    Returns:
        The rows, sorted by id: id, source, source_sha256, kind, angle (degrees), crop, size and source_size (h, w),
        matrix (3 x 3, photograph -> view), scale, covered (share of its pixels that show the photograph), mask.

    Raises:
        ImatchError: a photograph changed since it was embedded, or cannot be read any more.
        PartDoneError: see `compute.do`.
    """
    with files.alone(step.folder, resources.shard):
        if not step.finished:
            _finish_views(step, resources)
        shutil.rmtree(step.folder / "rows", ignore_errors=True)
    return files.read_rows(step.folder / "references.jsonl")


def _finish_views(step: Step, resources: ComputeOptions) -> None:
    source = list(Stored(step.linked("embed")).decodable.values())
    names = _reference_names([row["id"] for row in source], step.about["dataset"])
    jobs = [(row, names[row["id"]], i) for i, row in enumerate(source)]
    make = partial(_make_views, step=step, root=step.linked("photographs"))
    work = compute.Each(make, partial(_are_made, step.folder), resources.workers, "references")
    problems, part = [], None
    try:
        for row in compute.do(resources.machines, work, jobs, ["cpu"] * settings.cores()):
            problems += [row["problem"]] if row["problem"] else []
    except PartDoneError as error:
        part = error
    if problems:
        raise ImatchError("\n".join([*problems[:10], "run 01_embed again, then this"]))
    if part:
        raise part
    rows: list[ReferenceRow] = []
    for path in (_rows_of(step.folder, job) for job in jobs):
        rows += (of_one := files.read_rows(path, "delete it and run the same again"))
        check_planned(path, len(of_one), len(step.parameters["crops"]) * len(step.parameters["angles"]))
    rows.sort(key=lambda row: row["id"])
    files.write_rows(step.folder / "references.jsonl", rows)
    step.finish({"references": len(rows), "photographs": len(source)})


def _rows_of(folder: Path, job: _Job) -> Path:
    """The file that is there when the views of a photograph are made."""
    return folder / "rows" / f"{job[2]:08d}.jsonl"


def _are_made(folder: Path, job: _Job) -> bool:
    return _rows_of(folder, job).is_file()


def _make_views(job: _Job, step: Step, root: Path) -> dict[str, str | None]:
    """All views of one photograph; its rows are written last."""
    row, name, _ = job
    try:
        photograph = images.decode(root / row["id"])
    except PhotographError as error:
        return {"problem": f"{row['id']}: {error}"}
    if photograph.sha256 != row["sha256"]:
        return {"problem": f"{row['id']} has changed since it was embedded"}
    given = step.parameters
    make = references.REFERENCES[given["kind"]]
    lossy = {"quality": given["quality"], "subsampling": 0} if given["file_type"] == "jpg" else {}
    rows = []
    for crop in given["crops"]:
        for angle in given["angles"]:
            view = make(photograph.pixels, angle, crop, given["resize_to_original"])
            id = f"{references.name(name, angle, crop)}.{given['file_type']}"
            data = BytesIO()
            Image.fromarray(view.pixels).save(data, FILE_TYPES[given["file_type"]], **lossy)
            files.write_bytes(step.folder / id, data.getvalue())
            mask = None
            if not view.mask.all():
                mask = f"{references.name(name, angle, crop)}_mask.png"
                data = BytesIO()
                Image.fromarray(view.mask).save(data, "PNG")
                files.write_bytes(step.folder / "masks" / mask, data.getvalue())
            made = references.record(view, id, row, given["kind"], angle, crop)
            rows.append({**made, "mask": mask and f"masks/{mask}"})
    files.write_rows(_rows_of(step.folder, job), rows)
    return {"problem": None}


def _reference_names(ids: Sequence[str], dataset: str) -> dict[str, str]:
    """Photograph id -> references_<dataset>/R<folder>/<stem>, with the suffix, or a hash of the id, in the stem
    where two would be one; names that are too long are shortened."""

    def named(id: str, stem: str) -> str:
        folder = Path(id).parent.as_posix()
        place = f"references_{dataset}/R{dataset if folder == '.' else folder}/{stem}"
        return "/".join(map(files.one_name, place.split("/")))

    plain = {id: named(id, Path(id).stem) for id in ids}
    longer = {id: named(id, Path(id).name.replace(".", "_")) for id in ids}
    count = Counter(map(str.lower, plain.values()))
    names = {id: plain[id] if count[plain[id].lower()] == 1 else longer[id] for id in ids}
    taken: dict[str, str] = {}
    for id, name in names.items():
        if taken.setdefault(name.lower(), id) != id:
            names[id] = f"{name}-{files.name_digest(id)[:8]}"
    return names


def start_reference_tokens(views: Step) -> Step:
    """Start the second half of 02_references: the tokens of the views, by the backbone of the 01_embed step."""
    source = open_step(views.linked("embed"))
    about = {**{name: views.about[name] for name in ("dataset", "kind")}, **source.about}
    links = {"photographs": views.folder, "views": views.folder, "embed": source.folder}
    upstream = {"views": str(open_step(views.folder).fingerprint), "embed": str(source.fingerprint)}
    return start_step(views.run, "02_references", about, source.parameters, upstream, links, views.on_change)
