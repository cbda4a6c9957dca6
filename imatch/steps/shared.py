"""What the steps share: names of folders and files, and the rows of views."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from imatch import registry, runs, store
from imatch.records import ImatchError, StepError
from imatch.runs import Step
from imatch.store import Embeddings, Row


def core_each() -> list[str]:
    """A device for each core: where loops that need no network run in several processes."""
    return ["cpu"] * registry.cores()


def flat_name(id: str) -> str:
    """An id as one file name: another for every id, and never too long for a file system.

    >>> flat_name("flight 1/a.jpg"), flat_name("flight 1__a.jpg")
    ('flight 1__a.jpg', 'flight 1__a.jpg~66900298')
    """
    name, data = id.replace("/", "__"), os.fsencode(id)
    if len(data) <= 160 and not any(twice in id for twice in ("__", "_/", "/_")):
        return name
    return f"{os.fsencode(name)[:140].decode(errors='ignore')}~{hashlib.sha256(data).hexdigest()[:8]}"


def tagged(tag: str) -> str:
    """What a tag adds to a folder's name."""
    return f"_{named('tag', tag)}" if tag else ""


def named(what: str, name: str) -> str:
    """`name` if it may be part of a folder's name; ImatchError if it may not."""
    if not all(c.isalnum() or c in "-_.+" for c in name):
        raise ImatchError(f"{what} {name!r} becomes part of a folder's name: use letters, digits, '-', '_', '.', '+'")
    return name


def run_and_dataset(step: Step) -> tuple[Path, str]:
    """<exports>/<run> and the data set's name, from where a step of 01 or 02 lies."""
    for folder in step.folder.parents:
        if folder.parent.name == step.name:
            return folder.parent.parent, folder.name
    raise StepError(f"{step.folder} does not lie under a folder {step.name}: move the exports as a whole")


def view_rows(step: Step) -> list[Row]:
    """The rows of references.jsonl behind a step of reference tokens; none for photographs."""
    return store.read_rows(step.linked("views") / "references.jsonl") if "views" in step.links else []


def views_by_id(folder: Path) -> dict[str, Row]:
    """`view_rows` of the step in a folder, by id."""
    return {row["id"]: row for row in view_rows(runs.read(folder))}


def _photographs(folder: Path) -> Step:
    """The step of the photographs behind one of embeddings: itself or, of references, the one they were made from."""
    step = runs.read(folder)
    return runs.read(step.linked("embed")) if "embed" in step.links else step


def source_rows(folder: Path) -> dict[str, Row]:
    """id -> row of the photographs of a step of embeddings or, when it has references, of their sources."""
    return {row["id"]: row for row in decodable(_photographs(folder).folder)}


def photographs_root(folder: Path) -> Path:
    """The folder that those photographs lie in; of imported ones, which have none, that of the data set's steps."""
    step = _photographs(folder)
    return step.linked("photographs") if "photographs" in step.links else step.folder.parents[1]


def decodable(folder: Path) -> list[Row]:
    """The rows of all photographs that could be decoded, whether the backbone found something in them or not."""
    rows = store.read_rows(folder / "images.jsonl") + store.read_rows(folder / "skipped.jsonl")
    return sorted((row for row in rows if "size" in row), key=lambda row: row["id"])


def missed(embeddings: Embeddings) -> list[Row]:
    """The photographs that could be decoded, but in which the backbone found nothing: queries that find nothing."""
    return [row for row in store.read_rows(embeddings.folder / "skipped.jsonl") if "size" in row]


def sides(step: Step) -> tuple[Step, Step]:
    """The steps of embeddings behind a 03_index or 04_match: that of the queries, and that of what they are shown."""
    of = step if "query" in step.links else runs.read(step.linked("index"))
    return runs.read(of.linked("query")), runs.read(of.linked("gallery"))


def query_and_gallery(step: Step) -> tuple[Embeddings, Embeddings]:
    """The embeddings that a 03_index step searches with, and those it searches; of a 04_match, what it matches."""
    query, gallery = sides(step)
    return Embeddings(query.folder), Embeddings(gallery.folder)


def pair_path(step: Step, row: Row) -> Path:
    """Where 04_match puts a pair, without the suffix of the sink."""
    name = "source" if row["rank"] is None else f"{row['rank']:02d}"
    return step.folder / "pairs" / flat_name(row["query"]) / name


def clusters(step: Step, queries: Sequence[Row]) -> list[str]:
    """What the queries are counted by: those of one photograph, or of one capture, fall or stand together."""
    if step.parameters["cluster"] == "photograph":
        return [row.get("source_sha256", row["sha256"]) for row in queries]
    sources = source_rows(step.linked("query"))
    captures = [sources.get(row.get("source", row["id"]), {}).get("capture") for row in queries]
    if None in captures:
        raise ImatchError(
            f"cluster is capture, but {queries[captures.index(None)]['id']} belongs to none: name the captures in "
            "data_key.json and run 01_embed anew, or set cluster to photograph"
        )
    return captures
