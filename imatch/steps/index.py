"""03_index: one set of global vectors searched by another."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from imatch import (
    evaluate,
    indexes,
    plugins,
    registry,
    runs,
    store,
)
from imatch.indexes import Index
from imatch.records import Hits, ImatchError, StepError
from imatch.runs import Step
from imatch.steps.shared import flat_name, quoted, run_and_dataset, tagged
from imatch.store import Embeddings

if TYPE_CHECKING:
    pass

DIRECTIONS = ("reference-data", "data-reference", "reference-reference", "data-data")


def start_index(
    embed_step: str,
    references_step: str,
    *,
    direction: str,
    index: str,
    k: int,
    exclude_siblings: bool,
    tag: str,
    on_change: str,
) -> Step:
    """Start 03_index: one set of embeddings searched by another.

    Args:
        embed_step: folder of a finished 01_embed.
        references_step: folder of the finished 02_references made from it, or of another 01_embed in their place, made
            with the same backbone at the same size; "" for the direction "data-data".
        direction: "<query>-<gallery>", one of `DIRECTIONS`.
        index: a name of `indexes.INDEXES`.
        k: neighbours a query.
        exclude_siblings: leave out references made from the query's own photograph ("reference-reference").
        tag, on_change: as in `start_embed`.

    Raises:
        StepError: the references were not made from that 01_embed, or differ in backbone, pooling, family or size.
        ImatchError: an unknown direction or index; see also `runs.start`.
    """
    if direction not in DIRECTIONS:
        raise ImatchError(plugins.unknown("direction", direction, DIRECTIONS))
    if k < 1:
        raise ImatchError(f"k is {k}: ask for at least 1 neighbour")
    indexes.create(index)
    sides = dict(zip(("query", "gallery"), direction.split("-"), strict=True))
    found = {"data": runs.read(registry.resolve(embed_step))}
    kind = ""
    if "reference" in sides.values():
        if not references_step:
            raise ImatchError(
                f"direction {direction} needs references: give references_step, the folder of 02_references"
            )
        found["reference"] = runs.read(registry.resolve(references_step))
        kind = _kind_of_reference(found["reference"], found["data"])
    exports, dataset = run_and_dataset(found["data"])
    weight, configuration = found["data"].folder.parts[-2:]
    folder = exports / "03_index" / dataset / weight / configuration / f"{direction}{kind}{tagged(tag)}"
    parameters = {"direction": direction, "index": index, "k": k, "exclude_siblings": exclude_siblings}
    upstream = {side: str(found[name].fingerprint) for side, name in sides.items()}
    links = {side: found[name].folder for side, name in sides.items()}
    return runs.start(folder, "03_index", parameters, upstream, links, on_change)


def _kind_of_reference(reference: Step, data: Step) -> str:
    """The ending that the other side of an index gives to its folder's name, after checking that the two belong
    together: references made from the photographs, or photographs of another 01_embed (queries of a survey, say)."""
    if reference.name == "02_references" and reference.upstream.get("embed") != data.fingerprint:
        raise StepError(f"{reference.folder} was not made from {data.folder} as it is now: run 02_references again")
    compared = ("weight", "backbone", "weights_digest", "resize")
    of_data, of_reference = ({key: step.parameters[key] for key in compared} for step in (data, reference))
    if differences := runs.compare(of_data, of_reference):
        raise StepError(
            f"vectors of {data.folder} and {reference.folder} cannot be compared, they were made differently:\n  "
            + "\n  ".join(differences)
            + "\nEmbed both with the same weight, pooling, precision and size"
        )
    if reference.name == "02_references":
        return f"_{reference.folder.parent.parent.name}"
    _, dataset = run_and_dataset(reference)
    return f"_{dataset}-{reference.folder.name}"


def build_index(step: Step, gallery: Embeddings) -> Index:
    """Build the index of the gallery's global vectors and save it, or load it if that was done."""
    index, path = indexes.create(step.parameters["index"]), step.folder / "index.faiss"
    if step.finished:
        index.load(path)
    else:
        index.build(gallery.vectors)
        index.save(path)
    return index


def self_check(index: Index, gallery: Embeddings, block: int = 4096) -> int:
    """Let every vector of the gallery search for itself.

    Returns:
        How many found an equal-score twin of theirs first (photographs with the same content).

    Raises:
        StepError: a vector finds something else better than itself: rows and index do not belong together.
    """
    twins = 0
    for first in runs.progress(range(0, len(gallery), block), "self-check"):
        vectors = gallery.vectors[first : first + block]
        hits = index.search(vectors, 1)
        row = np.arange(first, first + len(vectors))
        own = np.einsum("nd,nd->n", vectors, vectors)
        # what came first must score, by the store's own vectors, as high as the vector itself
        first_score = np.einsum("nd,nd->n", vectors, gallery.vectors[hits.rows[:, 0]])
        wrong = (hits.rows[:, 0] != row) & (first_score < own - 1e-5)
        if wrong.any():
            other = gallery.ids[hits.rows[wrong, 0][0]]
            raise StepError(
                f"the index answers {other} for {gallery.ids[row[wrong][0]]}: delete its folder and run again"
            )
        twins += int((hits.rows[:, 0] != row).sum())
    return twins


def search(step: Step, index: Index, query: Embeddings, gallery: Embeddings) -> Hits:
    """Search all queries in one call, without the item itself and, if asked, without its siblings.

    Writes hits.npz (rows, scores), hits.csv (one row a hit) and queries/<id>.json (one file a query).
    """
    if step.finished:
        with np.load(step.folder / "hits.npz") as saved:
            return Hits(saved["rows"], saved["scores"])
    same = query.folder == gallery.folder
    k = step.parameters["k"]
    siblings = same and step.parameters["exclude_siblings"]
    most = max(Counter(gallery.shows).values()) if siblings else int(same)
    hits = index.search(query.vectors, k + most)
    hits = _without_own(hits, query, gallery, siblings, k) if same else hits
    right = evaluate.right_answers(hits.rows, query.shows, gallery.shows)
    with store.atomic(step.folder / "hits.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, rows=hits.rows, scores=hits.scores)
    table = ["query,rank,id,score,right"]
    for q, id in runs.progress(list(enumerate(query.ids)), "write hits"):
        found = [
            {"rank": rank, "id": gallery.ids[row], "score": round(float(score), 6)}
            for rank, (row, score) in enumerate(zip(hits.rows[q], hits.scores[q], strict=True))
            if row >= 0
        ]
        table += [
            ",".join(
                [quoted(id), str(hit["rank"]), quoted(str(hit["id"])), f"{hit['score']:.6f}", str(int(right[q, rank]))]
            )
            for rank, hit in enumerate(found)
        ]
        record = {"query": id, "direction": step.parameters["direction"], "k": k, "hits": found}
        store.write_json(step.folder / "queries" / f"{flat_name(id)}.json", record)
    store.write_bytes(step.folder / "hits.csv", ("\n".join(table) + "\n").encode(errors="surrogateescape"))
    return hits


def _without_own(hits: Hits, query: Embeddings, gallery: Embeddings, siblings: bool, k: int) -> Hits:
    shown = np.append(np.asarray(gallery.shows, object), None)
    own = np.asarray(query.shows, object)[:, None] == shown[hits.rows] if siblings else False
    dropped = own | (hits.rows == np.arange(len(hits.rows))[:, None])
    order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
    gone = np.take_along_axis(dropped, order, 1)
    rows, scores = np.take_along_axis(hits.rows, order, 1), np.take_along_axis(hits.scores, order, 1)
    return Hits(np.where(gone, -1, rows), np.where(gone, -np.inf, scores).astype(np.float32))


def index_metrics(step: Step, query: Embeddings, gallery: Embeddings, hits: Hits, twins: int) -> dict[str, Any]:
    """The figures of 03_index: sizes, twins, Hit@1, Hit@5 and Hit@K. Counted apart: queries that have no answer in
    the gallery, and photographs that could not be embedded and so never became queries."""
    right = evaluate.right_answers(hits.rows, query.shows, gallery.shows)
    able = answerable(step, query, gallery)
    k = step.parameters["k"]
    return {
        "queries": len(query),
        "gallery": len(gallery),
        "dimension": gallery.vectors.shape[1],
        "twins": twins,
        "without_answer": int((~able).sum()),
        "queries_skipped": len(store.read_rows(query.folder / "skipped.jsonl")),
        **{f"hit_at_{n}": evaluate.hit_at_k(right, n, able) for n in sorted({1, min(5, k), k})},
    }


def answerable(step: Step, query: Embeddings, gallery: Embeddings) -> np.ndarray:
    """Which queries of a 03_index step have a right answer in its gallery: (Q,) bool."""
    same = query.folder == gallery.folder
    return evaluate.answerable(query.shows, gallery.shows, same, same and step.parameters["exclude_siblings"])
