"""Alarms for faults that raise no error: rows that slipped, another backbone's numbers, queries that leak, guessing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import faiss
import numpy as np

from imatch import backbones, images, runs
from imatch.images import Resize
from imatch.records import ImatchError, ImatchWarning, StepError
from imatch.runs import Step
from imatch.steps.shared import source_rows
from imatch.store import Embeddings

SAME = 0.99
"""Cosine that a photograph embedded again has with its stored vector at least, on whatever device."""
LOOK = 25
"""Bits of 256 that the looks of near-duplicates differ by at most."""
NAMED = 5


def audit(
    step: Step, query: Embeddings, gallery: Embeddings, metrics: Mapping[str, Any], *, spot_check: int = 2
) -> list[str]:
    """Look for silent faults of a 03_index step.

    Args:
        step: a 03_index step.
        query, gallery: its two sides.
        metrics: of `index_metrics`.
        spot_check: how many photographs of each side are embedded again and compared with what is stored; 0 is none.

    Returns:
        One sentence an alarm, each also given as a warning: queries that are photographs of the gallery, photographs
        that look alike, a Hit@1 that guessing reaches, a side that could not be checked.

    Raises:
        StepError: numbers that belong to other photographs or to another backbone, which make every figure void.
    """
    sides = {"queries": query} if query.folder == gallery.folder else {"queries": query, "gallery": gallery}
    said = []
    for name, embeddings in sides.items():
        embeddings.check_rows()
        said += _embedded_again(name, embeddings, spot_check)
    said += _copies(query, gallery)
    said += _alike(step)
    said += _guessing(metrics)
    for alarm in said:
        warnings.warn(alarm, ImatchWarning, stacklevel=2)
    return said


def _embedded_again(name: str, embeddings: Embeddings, n: int) -> list[str]:
    """Embed n photographs again: their vectors must be those of the store."""
    side = runs.read(embeddings.folder)
    if n < 1:
        return []
    if side.parameters.get("imported"):
        return [f"the {name} were imported without their photographs, so none was embedded again to compare"]
    try:
        backbone = backbones.create(side.parameters["weight"], side.parameters["backbone"])
        resize, root = Resize(**side.parameters["resize"]), side.linked("photographs")
        rows = np.unique(np.linspace(0, len(embeddings) - 1, n).round().astype(int))
        decoded = [images.decode(root / embeddings.ids[row], resize, backbone.patch) for row in rows]
        again = [backbone(np.stack([photograph.pixels]))[0] for photograph in decoded]
    except ImatchError as error:
        return [f"none of the {name} could be embedded again to compare: {error}"]
    for row, tokens in zip(rows, again, strict=True):
        stored = embeddings.vectors[row]
        cosine = float(tokens.vector @ stored) if tokens.vector.shape == stored.shape else float("nan")
        if not cosine >= SAME:
            raise StepError(
                f"{embeddings.ids[row]}, embedded again by {side.parameters['weight']}, has cosine {cosine:.3f} with "
                f"its vector in {embeddings.folder}: the store is another backbone's, another size's, or its rows have "
                "slipped. Delete that folder and run its notebook again"
            )
    return []


def _copies(query: Embeddings, gallery: Embeddings) -> list[str]:
    if query.folder == gallery.folder:
        return []
    held = {row["sha256"] for row in gallery.rows}
    copies = [row["id"] for row in query.rows if row["sha256"] in held]
    if not copies:
        return []
    return [f"{len(copies)} of {len(query)} queries are files of the gallery and find themselves: {_some(copies)}"]


def _alike(step: Step) -> list[str]:
    """Photographs of the two sides that are no copies, yet look alike: near-duplicates."""
    sides = [list(source_rows(step.linked(side)).values()) for side in ("query", "gallery")]
    looks = [[row for row in rows if _tells(row.get("look"))] for rows in sides]
    if not all(looks):
        return []
    query, gallery = (np.array([list(bytes.fromhex(row["look"])) for row in rows], np.uint8) for rows in looks)
    index = faiss.IndexBinaryFlat(256)
    index.add(gallery)
    limits, _, found = index.range_search(query, LOOK + 1)
    pairs = set()
    for q, row in enumerate(looks[0]):
        for other in (looks[1][g] for g in found[limits[q] : limits[q + 1]]):
            if row["sha256"] != other["sha256"]:
                pairs.add(tuple(sorted((row["id"], other["id"]))))
    if not pairs:
        return []
    listed = [f"{one} ~ {other}" for one, other in sorted(pairs)]
    return [f"{len(pairs)} pairs of photographs look alike, though only one counts as right: {_some(listed)}"]


def _tells(look: str | None) -> bool:
    """Whether a look says something: that of an even grey or a plain gradient is anybody's."""
    return look is not None and look != "" and 32 <= int(look, 16).bit_count() <= 224


def _guessing(metrics: Mapping[str, Any]) -> list[str]:
    hit, chance = metrics["intervals"]["hit_at_1"], metrics["chance"]
    if hit["value"] is None:
        return ["no query has a right answer in the gallery: nothing can be said of how good the hits are"]
    reached = hit["value"] if hit["low"] is None else hit["low"]
    if reached > chance:
        return []
    return [f"Hit@1 {hit['value']:.3f} is what guessing reaches ({chance:.3f}): these vectors tell nothing apart"]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
