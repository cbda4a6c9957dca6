"""Widgets over saved steps: they need no model."""

from __future__ import annotations

from pathlib import Path

import ipywidgets as widgets
import numpy as np

from imatch import store, viz
from imatch.records import Geometry, Matches, Pair, StepError
from imatch.runs import Step
from imatch.sinks import png
from imatch.steps.shared import sides
from imatch.store import Row


def load_pair(step: Step, row: Row) -> Pair:
    """Read a pair that 04_match saved (its outputs must have "npy").

    Raises:
        StepError: the correspondences were not saved.
    """
    path = viz.pair_path(step, row).with_suffix(".npy")
    if not path.is_file():
        raise StepError(f"no correspondences at {path}: run 04_match with outputs that have 'npy'")
    table = np.load(path)
    both = list(zip(sides(step), (row["query"], row["candidate"]), strict=True))
    paths = [side.linked("photographs") / id for side, id in both]
    sizes = [_size(side.folder, id) for side, id in both]
    matrix = None if row["matrix"] is None else np.array(row["matrix"])
    error = np.nan if row["reprojection_error"] is None else row["reprojection_error"]
    return Pair(
        row,
        (paths[0], paths[1]),
        (sizes[0], sizes[1]),
        table["xy_a"],
        table["xy_b"],
        Matches(table["index_a"], table["index_b"], table["similarity"]),
        Geometry(matrix, table["inlier"], error, row["verified"], row["reason"]),
    )


def browse(step: Step) -> widgets.VBox:
    """A browser over the saved matches of a 04_match step: choose a query, a rank and a similarity.

    Returns:
        The widget. Its children are the controls (query, rank, threshold, what to draw), the picture and a line
        of text that says what was found.
    """
    pairs: dict[str, list[Row]] = {}
    for row in (row for row in store.read_rows(step.folder / "pairs.jsonl") if row["candidate"] is not None):
        pairs.setdefault(row["query"], []).append(row)
    names = [(store.printable(id), id) for id in sorted(pairs)]
    query = widgets.Dropdown(options=names, description="query", layout={"width": "480px"})
    rank = widgets.Dropdown(description="rank")
    threshold = widgets.FloatSlider(0.8, min=0, max=1, step=0.01, description="similarity", continuous_update=False)
    inliers = widgets.Checkbox(True, description="inliers only")
    picture, text = widgets.Image(format="png"), widgets.HTML()

    def show(*_: object) -> None:
        if rank.value is None:
            return
        try:
            pair = load_pair(step, rank.value)
        except StepError as error:
            picture.value, text.value = b"", str(error)
            return
        shown = pair.matches.similarity >= threshold.value
        shown &= pair.geometry.inliers | (not inliers.value)
        picture.value = png.encode(png.draw(pair, 300, shown))
        row = pair.row
        text.value = (
            f"{int(shown.sum())} of {row['matches']} correspondences shown; cosine of the global vectors "
            f"{row['score']:.3f}; {row['reason']}"
        )

    def choose(*_: object) -> None:
        rank.options = [(_label(row), row) for row in pairs.get(query.value, [])]
        rank.index = 0 if rank.options else None

    for control, reaction in ((query, choose), (rank, show), (threshold, show), (inliers, show)):
        control.observe(reaction, names="value")
    choose()
    show()
    return widgets.VBox([widgets.HBox([query, rank]), widgets.HBox([threshold, inliers]), picture, text])


def _label(row: Row) -> str:
    place = "own source" if row["rank"] is None else f"{row['rank'] + 1}, re-ranked {row['reranked'] + 1}"
    return f"{place}: {store.printable(row['candidate'])} ({row['inliers']} inliers)"


def _size(folder: Path, id: str) -> tuple[int, int]:
    h, w = next(row["size"] for row in store.read_rows(folder / "images.jsonl") if row["id"] == id)
    return h, w
