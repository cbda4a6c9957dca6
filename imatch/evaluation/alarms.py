"""Alarms for faults that raise no error: rows that slipped, another backbone's numbers, queries that leak, guessing."""

from __future__ import annotations

import faiss
import numpy as np

from imatch.core import config
from imatch.core.rows import SearchFigures, ThresholdRecord
from imatch.data.embeddings import Embeddings

SAME = 0.9999
"""Cosine of a photograph embedded again with its stored vector at least; other devices round by a third of that."""
LOOK = 25
"""Bits of 256 that the looks of near-duplicates differ by at most: compressed, halved, brighter copies do."""
NEAREST = 8
"""How many photographs that look alike are looked for beside each: a hovering drone gives thousands."""


def copies_of(query: Embeddings, gallery: Embeddings) -> list[str]:
    """Say which queries are files of the gallery, which find themselves."""
    if query == gallery:
        return []
    held = {row["sha256"] for row in gallery.rows}
    copies = [row["id"] for row in query.rows if row["sha256"] in held]
    if not copies:
        return []
    listed = config.names(copies)
    return [f"{len(copies)} of {len(query)} queries are files of the gallery and find themselves: {listed}"]


def alike(query: Embeddings, gallery: Embeddings, truth: str) -> list[str]:
    """Name photographs of the two sides that are no copies, yet look alike: near-duplicates."""
    sides = [side.sources.decodable.values() for side in (query, gallery)]
    looks = [[row for row in rows if _tells(row.get("look"))] for rows in sides]
    if not all(looks):
        return []
    asked, there = (np.array([list(bytes.fromhex(row["look"])) for row in rows], np.uint8) for rows in looks)
    index = faiss.IndexBinaryFlat(256)
    index.add(there)
    away, found = index.search(asked, min(NEAREST + 1, len(there)))
    q, place = np.nonzero(away <= LOOK)
    pairs = np.stack([q, found[q, place]])
    contents = [np.array([row["sha256"] for row in rows], object) for rows in looks]
    pairs = pairs[:, contents[0][pairs[0]] != contents[1][pairs[1]]]
    if np.array_equal(*contents):  # the same photographs on both sides
        pairs = np.unique(np.sort(pairs, axis=0), axis=1)  # each pair once
    if not pairs.shape[1]:
        return []
    listed = config.names(sorted(f"{looks[0][q]['id']} ~ {looks[1][g]['id']}" for q, g in pairs.T))
    right = ", though only one counts as right" if truth == "photograph" else ""
    return [f"{pairs.shape[1]} pairs of photographs look alike{right}: {listed}"]


def _tells(look: str | None) -> bool:
    """Whether a look says something: that of an even grey or a plain gradient is anybody's."""
    return look is not None and look != "" and 32 <= int(look, 16).bit_count() <= 224


def guessing(metrics: SearchFigures) -> list[str]:
    """Say that Hit@1 is no better than guessing, or that nothing can be said."""
    hit, chance = metrics["intervals"]["hit_at_1"], metrics["chance"]
    if hit["value"] is None:
        return ["no query has a right answer in the gallery: nothing can be said of how good the hits are"]
    reached = hit["value"] if hit["low"] is None else hit["low"]
    if reached > chance:
        return []
    return [f"Hit@1 {hit['value']:.3f} cannot be told from guessing ({chance:.3f})"]


def promise_broken(threshold: ThresholdRecord) -> list[str]:
    """Say that the threshold does not hold on photographs that it was not calibrated on."""
    wanted, held = threshold["wanted"], threshold["held_out_precision"]
    if held is None or held >= wanted:
        return []
    return [
        f"{held:.0%} of the first hits that are believed are right on photographs that the threshold was not "
        f"calibrated on, not {wanted:.0%}: do not rely on `accepted`, but on `verified` of 04_match"
    ]
