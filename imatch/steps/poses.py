"""The tokens of photographs that are turned or zoomed first: each pose is a step beside the upright one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from imatch import backbones, runs, store
from imatch.engines import Engine, PartDoneError
from imatch.engines.local import LOCAL
from imatch.images import Resize
from imatch.poses import UPRIGHT, Pose
from imatch.records import ImatchError, ImatchWarning, StepError, Tokens
from imatch.runs import Step
from imatch.steps.embed import embed, finish_embed
from imatch.store import Embeddings


def worth_trying(step: Step, poses: Sequence[Pose]) -> list[Pose]:
    """The poses that are worth trying with a step's backbone: the upright one alone, which is said, if it turns and
    zooms with its photographs.

    Raises:
        StepError: the step was imported, without its photographs.
    """
    weight = step.parameters["weight"]
    if len(poses) > 1 and step.parameters.get("imported"):
        raise StepError(f"{step.folder} was imported, and its photographs are not known to be there: run 01_embed")
    if len(poses) > 1 and weight in backbones.INVARIANT:
        print(f"{weight} turns and zooms with its photographs: only the upright ones are used")
        return [UPRIGHT]
    return list(poses)


def embed_poses(
    folder: Path,
    poses: Sequence[Pose],
    *,
    engine: Engine = LOCAL,
    devices: str = "auto",
    workers: int = -1,
    batch_size: int = 8,
    on_change: str = "refuse",
) -> Posed:
    """Embed the photographs of a finished step of embeddings in other poses, those that are missing.

    Each pose becomes a step of its own in a folder beside it, such as `scale1_raw_rot090`, and is reused.

    Args:
        folder: of the 01_embed or 02_references step.
        poses: of `poses.poses`.
        engine, devices, workers, batch_size: as in `embed`.
        on_change: as in `start_embed`.

    Raises:
        StepError: photographs were changed since the upright ones were embedded; or the step was imported.
        ImatchError: a zoom that gives sides which are no multiple of the patch.
    """
    source, upright = runs.read(folder), Embeddings(folder)
    unfinished: PartDoneError | None = None
    for pose in (pose for pose in poses if pose != UPRIGHT):
        _check_zoom(source, pose)
        step = _start(source, pose, on_change)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImatchWarning)  # what was skipped was told when it was upright
            try:
                embeddings = embed(
                    step, engine=engine, devices=devices, workers=workers, batch_size=batch_size, max_skipped=1.0
                )
            except PartDoneError as part:  # this part of the other poses can be done all the same
                unfinished = part
                continue
        _check_whole(upright, embeddings)
        finish_embed(step, embeddings)
    if unfinished:
        raise unfinished
    return open_poses(folder, poses)


def _check_zoom(source: Step, pose: Pose) -> None:
    """Raise ImatchError, before anything is written, when a zoom gives sides that are no multiple of the patch."""
    if pose.zoom == 1 or (_beside(source.folder, pose) / "metrics.json").is_file():
        return
    backbone = backbones.create(source.parameters["weight"], source.parameters["backbone"])
    try:
        Resize(**source.parameters["resize"]).zoomed(pose.zoom).check(backbone.patch)
    except ImatchError as error:
        raise ImatchError(f"zoom {pose.zoom:g}: {error}") from None


def _check_whole(upright: Embeddings, embeddings: Embeddings) -> None:
    """Raise StepError when a photograph could be decoded for 01_embed, but not any more."""
    skipped = store.read_rows(embeddings.folder / "skipped.jsonl")
    seen = {*embeddings.ids, *(row["id"] for row in skipped if "size" in row)}
    gone = [id for id in upright.ids if id not in seen]
    if gone:
        raise StepError(
            f"{len(gone)} photographs of {upright.folder} cannot be read any more, such as {store.printable(gone[0])}: "
            f"bring them back, delete {embeddings.folder} and run again"
        )


def open_poses(folder: Path, poses: Sequence[Pose]) -> Posed:
    """Open what `embed_poses` made."""
    posed = {pose: Embeddings(_beside(folder, pose)) for pose in poses if pose != UPRIGHT}
    return Posed(Embeddings(folder), posed)


def _beside(folder: Path, pose: Pose) -> Path:
    return folder.with_name(f"{folder.name}_{pose}")


def _start(source: Step, pose: Pose, on_change: str) -> Step:
    folder = _beside(source.folder, pose)
    parameters = {**source.parameters, "pose": asdict(pose)}
    links = {name: source.linked(name) for name in source.links}
    return runs.start(folder, source.name, parameters, {"upright": str(source.fingerprint)}, links, on_change)


@dataclass(frozen=True)
class Posed:
    """Photographs in several poses.

    Attributes:
        upright: their embeddings as they are.
        posed: the other poses; a photograph in which the backbone then found nothing is not there.

    Raises:
        StepError: a pose is of other photographs.
    """

    upright: Embeddings
    posed: Mapping[Pose, Embeddings]

    def __post_init__(self) -> None:
        known = dict(zip(self.upright.ids, self.upright.rows, strict=True))
        for embeddings in self.posed.values():
            for row in embeddings.rows:
                if row["id"] in known and row["sha256"] != known[row["id"]]["sha256"]:
                    raise StepError(f"{row['id']} has changed since {self.upright.folder} was made: run 01_embed again")

    @cached_property
    def _places(self) -> dict[Pose, np.ndarray]:
        """(N,) row of each photograph in a pose, -1 where it is not there."""
        places = {}
        for pose, embeddings in self.posed.items():
            row = {id: i for i, id in enumerate(embeddings.ids)}
            places[pose] = np.array([row.get(id, -1) for id in self.upright.ids])
        return places

    def tokens(self, row: int) -> list[tuple[Pose, Tokens]]:
        """A photograph's tokens in each pose, the upright one first; xy in pixels of the upright original."""
        found = [(UPRIGHT, self.upright.tokens(row))]
        for pose, embeddings in self.posed.items():
            if (place := self._places[pose][row]) >= 0:
                found.append((pose, embeddings.tokens(place)))
        return found

    def vectors(self, part: slice) -> list[tuple[Pose, np.ndarray]]:
        """(n, D) float32 global vectors of some photographs in each pose, the upright one first; zero where a
        photograph is not there."""
        found = [(UPRIGHT, store.take(self.upright.vectors, part))]
        for pose, embeddings in self.posed.items():
            places = self._places[pose][part]
            vectors = store.take(embeddings.vectors, np.maximum(places, 0))
            vectors[places < 0] = 0
            found.append((pose, vectors))
        return found
