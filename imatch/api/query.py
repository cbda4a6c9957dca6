"""Retrieval in memory: an index of embeddings, searched by others; and the photograph that shows the same, verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imatch.api import embed as embedding
from imatch.api.match import Match, look_twice, seen_of, write_table
from imatch.core import files
from imatch.core.rows import Options
from imatch.core.types import Hits, ImatchError
from imatch.data.embeddings import Embeddings, comparable
from imatch.features.base import create_backbone
from imatch.retrieval import index as searcher
from imatch.retrieval.index import Searcher

if TYPE_CHECKING:
    from imatch.api.embed import Photograph


def index(gallery: Embeddings, kind: str = "auto", *, options: Options | None = None, device: str = "auto") -> Searcher:
    """Index the global vectors of a gallery in memory.

    Args:
        gallery: of `embed`, or of a step.
        kind: a name of `retrieval.kinds.INDEXES`; "auto" is exact while that fits and is fast enough.
        options: fields of that kind.
        device: "auto" (all GPUs, if FAISS sees some and knows the kind there), "cpu", "cuda" or "cuda:0".

    Raises:
        ImatchError: an unknown kind, options that do not fit, more than half of the free memory, or a device that is
            not there.

    >>> import imatch
    >>> import numpy as np
    >>> photographs = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), np.uint8)
    >>> index(imatch.embed(list(photographs), "dsift")).plan["kind"]
    'flat'
    """
    return searcher.in_memory(gallery.vectors, kind, options, device=device)


def search(queries: Embeddings, gallery: Embeddings, k: int = 10, *, index: Searcher | None = None) -> Hits:
    """Search a gallery by the global vectors of queries.

    Args:
        queries, gallery: of `embed` or `references`, or of a step, made alike.
        k: neighbours a query.
        index: of the gallery (`index`); None compares with all of it, exactly.

    Returns:
        Rows of the gallery and cosines, (Q, k) each; of a query that is in the gallery, it comes first itself.

    Raises:
        ImatchError: the two sides were made differently, an index of another gallery, or k below 1.

    >>> import imatch
    >>> import numpy as np
    >>> photographs = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), np.uint8)
    >>> gallery = imatch.embed(list(photographs), "dsift")
    >>> search(gallery, gallery, k=1).rows.tolist()
    [[0], [1], [2]]
    """
    comparable(queries.parameters, gallery.parameters, "the queries", "the gallery")
    if index is not None and len(index.vectors) != len(gallery):
        raise ImatchError(f"the index holds {len(index.vectors)} vectors, the gallery {len(gallery)}: index it again")
    return (index or searcher.in_memory(gallery.vectors, "flat", device="cpu")).search(queries.vectors, k)


@dataclass(frozen=True)
class Answer:
    """What a query was found to show. It is true when a candidate is verified.

    Attributes:
        query: its id.
        candidates: ids of the gallery, the most similar first.
        scores: their cosines.
        matches: the query matched 1:1 with each, until one was verified.
    """

    query: str
    candidates: list[str]
    scores: list[float]
    matches: list[Match]

    def __bool__(self) -> bool:
        return self.matches[-1].verified

    def __str__(self) -> str:
        if self:
            return str(self.matches[-1])
        tried = max(self.matches, key=lambda match: match.inliers)
        closest = f"{files.printable(tried.names[1])}, {tried.reason}"
        return f"{files.printable(self.query)}: no match among {len(self.matches)}; the closest: {closest}"

    @property
    def match(self) -> Match | None:
        """The verified one, A the query and B what it shows."""
        return self.matches[-1] if self else None


@dataclass(frozen=True)
class Answers:
    """An answer a query; as text a line each.

    Attributes:
        answers: in the order of the queries.
        skipped: id -> why a query could not be asked.
    """

    answers: list[Answer]
    skipped: dict[str, str]

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, row: int) -> Answer:
        return self.answers[row]

    def __str__(self) -> str:
        left_out = [f"left out: {files.printable(id)}: {why}" for id, why in self.skipped.items()]
        return "\n".join([*map(str, self.answers), *left_out])

    def save(self, path: str | Path) -> Path:
        """Write them as a CSV: query, answer, and the numbers of `Match.row`; of a query without one, why.

        Raises:
            ImatchError: another ending than .csv, or a place that cannot be written to.
        """
        return write_table(path, [answer.matches[-1].row for answer in self.answers])


def query(
    photographs: str | Path | Sequence[Photograph], gallery: Embeddings, k: int = 5, *, device: str = "auto"
) -> Answers:
    """Say which photograph of a gallery each of some shows: search, then match the nearest 1:1 until one is verified.

    Args:
        photographs: as of `embed`.
        gallery: of `embed`, or of a step; its photographs must still be there where pixels are to be compared.
        k: how many of the nearest are matched at most.
        device: where a network runs.

    Raises:
        ImatchError: as `embed` and `search`; or the gallery kept no local descriptors.

    >>> import imatch
    >>> import numpy as np
    >>> noise = np.random.default_rng(0).integers(0, 255, (3, 60, 80, 3), np.uint8).repeat(3, 1).repeat(3, 2)
    >>> gallery = imatch.embed(list(noise))
    >>> (answer,) = query([np.rot90(noise[1])], gallery).answers
    >>> answer.match.names, round(answer.match.rotation)
    (('00000', '00001'), -90)
    """
    if gallery.unplaced:
        raise ImatchError(f"nothing can be matched 1:1: {gallery.unplaced}")
    parameters = gallery.parameters
    backbone = create_backbone(parameters["weight"], parameters["backbone"], device=device)
    asked = embedding.passed(embedding.sources_of(photographs), backbone, parameters)
    hits = search(asked, gallery, min(k, len(gallery)))
    answers = []
    for q, id in enumerate(asked.ids):
        rows = [int(row) for row in hits.rows[q] if row >= 0]
        matches: list[Match] = []
        for row in rows:
            matches.append(look_twice(backbone, seen_of(asked, q, backbone), seen_of(gallery, row, backbone)))
            if matches[-1].verified:
                break
        answers.append(Answer(id, [gallery.ids[row] for row in rows], hits.scores[q, : len(rows)].tolist(), matches))
    return Answers(answers, {row["id"]: row["skipped"] for row in asked.skipped})
