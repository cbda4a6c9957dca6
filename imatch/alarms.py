"""Alarms for faults that raise no error: rows that slipped, another backbone's numbers, queries that leak, guessing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from imatch import backbones, runs
from imatch.backbones import Backbone
from imatch.records import ImatchError, ImatchWarning, StepError
from imatch.runs import Step
from imatch.steps.embed import embed_one
from imatch.steps.shared import source_rows
from imatch.store import Embeddings, Row

SAME = 0.9999
"""Cosine that a photograph embedded again has with its stored vector at least: rounding on another device costs a third
of that, and some backbones give different photographs 0.99."""
LOOK = 25
"""Bits of 256 that the looks of near-duplicates differ by at most: compressed, halved, brighter copies do."""
NEAREST = 8
"""How many photographs that look alike are looked for beside each: a hovering drone gives thousands."""
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
        that look alike, a Hit@1 that guessing reaches, a threshold that does not hold, a side that could not be
        checked.

    Raises:
        StepError: numbers that belong to other photographs or to another backbone, which make every figure void.
    """
    sides = {"queries": query} if query.folder == gallery.folder else {"queries": query, "gallery": gallery}
    for embeddings in sides.values():
        embeddings.check_rows()
    said = [
        f"the {name} were embedded by an earlier version that noted no digests: whose vector is whose was not checked"
        for name, embeddings in sides.items()
        if any("vector" not in row for row in embeddings.rows)
    ]
    said += [*_embedded_again(sides, spot_check), *_copies(query, gallery), *_alike(step), *_guessing(metrics)]
    said += _promise(metrics["threshold"])
    for alarm in said:
        warnings.warn(alarm, ImatchWarning, stacklevel=2)
    return said


def _embedded_again(sides: Mapping[str, Embeddings], n: int) -> list[str]:
    """Embed n photographs of each side again: their vectors must be those of the store."""
    if n < 1:
        return []
    steps = {name: runs.read(embeddings.folder) for name, embeddings in sides.items()}
    imported = [name for name, side in steps.items() if side.parameters.get("imported")]
    said = [f"the {name} were imported without their photographs, so none was embedded again" for name in imported]
    there = {name: embeddings for name, embeddings in sides.items() if name not in imported}
    if not there:
        return said
    first = steps[next(iter(there))].parameters  # both sides are made alike, or 03_index would not have started
    try:
        backbone = backbones.create(first["weight"], first["backbone"])
    except ImatchError as error:
        return [*said, f"nothing could be embedded again to compare: {error}"]
    for name, embeddings in there.items():
        for row in np.unique(np.linspace(0, len(embeddings) - 1, n).round().astype(int)):
            said += _compared(embeddings, int(row), steps[name].linked("photographs"), backbone, first)
    return said


def _compared(embeddings: Embeddings, row: int, root: Path, backbone: Backbone, made_by: Row) -> list[str]:
    id = embeddings.ids[row]
    try:
        photograph = embed_one(root / id, backbone, made_by)
        if photograph.sha256 != embeddings.rows[row]["sha256"]:
            return [f"{id} has changed since it was embedded: run its notebook again"]
        again = photograph.tokens.vector
    except ImatchError as error:
        return [f"{id} could not be embedded again to compare: {error}"]
    stored = embeddings.vectors[row]
    cosine = float(again @ stored) if again.shape == stored.shape else math.nan
    if not cosine >= SAME:
        raise StepError(
            f"{id}, embedded again, has cosine {cosine:.3f} with its vector in {embeddings.folder}: the store is "
            "another backbone's, another size's, or its rows have slipped. Delete that folder, run its notebook again"
        )
    return []


def _copies(query: Embeddings, gallery: Embeddings) -> list[str]:
    if query.folder == gallery.folder:
        return []
    held = {row["sha256"] for row in gallery.rows}
    copies = [row["id"] for row in query.rows if row["sha256"] in held]
    if not copies:
        return []
    listed = _some(copies, len(copies))
    return [f"{len(copies)} of {len(query)} queries are files of the gallery and find themselves: {listed}"]


def _alike(step: Step) -> list[str]:
    """Photographs of the two sides that are no copies, yet look alike: near-duplicates."""
    sides = [list(source_rows(step.linked(side)).values()) for side in ("query", "gallery")]
    looks = [[row for row in rows if _tells(row.get("look"))] for rows in sides]
    if not all(looks):
        return []
    query, gallery = (np.array([list(bytes.fromhex(row["look"])) for row in rows], np.uint8) for rows in looks)
    index = faiss.IndexBinaryFlat(256)
    index.add(gallery)
    away, found = index.search(query, min(NEAREST + 1, len(gallery)))
    q, place = np.nonzero(away <= LOOK)
    pairs = np.stack([q, found[q, place]])
    contents = [np.array([row["sha256"] for row in rows], object) for rows in looks]
    pairs = pairs[:, contents[0][pairs[0]] != contents[1][pairs[1]]]
    if np.array_equal(*contents):  # the same photographs on both sides
        pairs = np.unique(np.sort(pairs, axis=0), axis=1)  # each pair once
    if not pairs.shape[1]:
        return []
    listed = sorted(f"{looks[0][q]['id']} ~ {looks[1][g]['id']}" for q, g in pairs[:, :1000].T)
    right = ", though only one counts as right" if step.parameters["truth"] == "photograph" else ""
    return [f"{pairs.shape[1]} pairs of photographs look alike{right}: {_some(listed, pairs.shape[1])}"]


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
    return [f"Hit@1 {hit['value']:.3f} cannot be told from guessing ({chance:.3f})"]


def _promise(threshold: Mapping[str, Any]) -> list[str]:
    wanted, held = threshold["wanted"], threshold["held_out_precision"]
    if held is None or held >= wanted:
        return []
    return [
        f"{held:.0%} of the first hits that are believed are right on photographs that the threshold was not "
        f"calibrated on, not {wanted:.0%}: do not rely on `accepted`, but on `verified` of 04_match"
    ]


def _some(names: Sequence[str], total: int) -> str:
    return ", ".join(names[:NAMED]) + (f" and {total - NAMED} more" if total > NAMED else "")
