"""Retrieval in memory: embeddings searched by others; and the photograph that shows the same, verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imatch.api.embed import embed_sources, sources_of
from imatch.api.match import Match, described, look_twice, write_table
from imatch.core import files
from imatch.core.rows import Json, Options
from imatch.core.types import Hits, ImatchError
from imatch.data.embeddings import Embeddings, comparable
from imatch.features.base import backbone_of

if TYPE_CHECKING:
    from imatch.api.embed import Photograph
    from imatch.retrieval.index import Searcher

BLOCK = 256
"""Queries that are compared with all of a gallery at once."""


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
    try:
        from imatch.retrieval.index import IndexOptions, in_memory
    except ImportError as error:
        raise ImatchError("an index needs FAISS: pip install 'imatch[cpu]', or 'imatch[gpu]'") from error
    return in_memory(gallery.vectors, IndexOptions(kind, options or {}, device=device), gallery.digest)


def search(queries: Embeddings, gallery: Embeddings, k: int = 10, *, index: Searcher | None = None) -> Hits:
    """Search a gallery by the global vectors of queries.

    Args:
        queries, gallery: of `embed` or `references`, or of a step, made alike.
        k: neighbours a query.
        index: of the gallery (`index`); None compares with all of it, exactly.

    Returns:
        Rows of the gallery and cosines, (Q, k) each, ties by the smaller row; -1 and -inf where the gallery has fewer
        than k. A query that is in the gallery finds itself.

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
    if k < 1:
        raise ImatchError(f"k is {k}: ask for at least 1 neighbour")
    if index is None:
        return exact(queries.vectors, gallery.vectors, k)
    if index.plan["gallery"] != gallery.digest:
        raise ImatchError("the index is of another gallery: index this one")
    return index.search(queries.vectors, k)


def exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> Hits:
    """Find the k nearest of all (N, D) vectors to each of (Q, D) queries by cosine, ties by the smaller row."""
    rows = np.full((len(queries), k), -1)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    most = min(k, len(vectors))
    for first in range(0, len(queries), BLOCK):
        part = slice(first, first + BLOCK)
        cosine = queries[part] @ vectors.T
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :most]
        rows[part, :most] = order
        scores[part, :most] = np.take_along_axis(cosine, order, 1)
    return Hits(rows, scores)


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
        return self.best.verified

    @property
    def best(self) -> Match:
        """The verified match or, if there is none, that with the most inliers; A is the query."""
        last = self.matches[-1]  # the others did not verify
        return last if last.verified else max(self.matches, key=lambda match: match.inliers)

    def __str__(self) -> str:
        if self:
            return str(self.best)
        closest = f"{files.printable(self.best.names[1])}, {self.best.reason}"
        return f"{files.printable(self.query)}: no match among {len(self.matches)}; the closest: {closest}"

    @property
    def match(self) -> Match | None:
        """The verified match."""
        return self.best if self else None


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
        """Write them as a CSV, a line a query (`Match.row` of `Answer.best`), those that could not be asked last.

        Raises:
            ImatchError: another ending than .csv, or a place that cannot be written to.
        """
        left_out: list[dict[str, Json]] = []
        for id, why in self.skipped.items():
            left_out.append({"query": id, "verified": False, "reason": why})
        return write_table(path, [answer.best.row for answer in self.answers], left_out)


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
    backbone = backbone_of(gallery.parameters, device)
    asked = embed_sources(sources_of(photographs), backbone, gallery.parameters)
    hits = search(asked, gallery, min(k, len(gallery)))
    answers = []
    for q, id in enumerate(asked.ids):
        a, matches = described(asked, q, backbone), list[Match]()
        rows = hits.rows[q].tolist()
        for row in rows:
            matches.append(look_twice(a, described(gallery, row, backbone)))
            if matches[-1].verified:
                break
        answers.append(Answer(id, [gallery.ids[row] for row in rows], hits.scores[q].tolist(), matches))
    return Answers(answers, {row["id"]: row["skipped"] for row in asked.skipped})
