"""Figures for the notebooks: every function returns a matplotlib Figure, and `show` puts it beside the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from IPython.display import Image as DisplayImage
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from imatch import evaluate, geometry, images, references, store
from imatch.denseft import covered, fit, picture
from imatch.records import ImatchError, Ranking
from imatch.runs import Step
from imatch.steps.shared import pair_path, sides
from imatch.store import Embeddings, Row

KOREAN = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "AppleGothic")
rcParams["font.family"] = ["DejaVu Sans", *(name for name in KOREAN if name in font_manager.get_font_names())]
RIGHT, WRONG = "#2ca02c", "#d62728"
EMPTY = (255, 0, 255)


def descriptors(embeddings: Embeddings, root: Path, n: int = 6, strongest: int = 300) -> Figure:
    """The first n photographs with the positions of their local descriptors."""
    n = min(n, len(embeddings))
    figure, axes = _sheet(1, n)
    for row, axis in enumerate(axes.flat):
        meta, xy = embeddings.rows[row], embeddings.tokens(row).xy
        xy = xy if meta["grid"] else xy[:strongest]
        h, w = meta["size"]
        told = ", strongest shown" if meta["grid"] is None and meta["n"] > strongest else ""
        axis.imshow(images.thumbnail(root / meta["id"], meta["size"], 320), extent=(-0.5, w - 0.5, h - 0.5, -0.5))
        axis.plot(*xy.T, ".", color="#ffd500", markersize=1.5)
        axis.set_title(f"{_short(meta['id'])}\n{meta['n']} descriptors{told}", fontsize=7)
    return figure


def denseft(embeddings: Embeddings, photographs: Path, n: int = 6, weighted: bool = False) -> Figure:
    """n photographs, evenly spread, each beside its DenseFT: colours of one basis, so equal colours are equal tokens.

    Where there can be none (keypoints lie on no grid), the figure says so in words.

    Args:
        embeddings: of the photographs.
        photographs: the folder that their ids are relative to.
        n: how many.
        weighted: darken tokens of small norm.
    """
    try:
        basis = fit(embeddings)
    except ImatchError:
        why = "keypoints lie on no grid" if embeddings.rows[0]["grid"] is None else "there are too few tokens"
        figure = Figure(figsize=(6, 1), layout="constrained")
        figure.text(0.02, 0.5, f"No DenseFT: {why}.", fontsize=9, va="center")
        return figure
    shown = np.unique(np.linspace(0, len(embeddings) - 1, max(1, min(n, len(embeddings)))).astype(int)).tolist()
    columns = min(3, len(shown))
    figure, axes = _sheet(-(-len(shown) // columns), 2 * columns)
    pairs = axes.reshape(-1, 2)  # row by row, so a pair stays in its row
    for row, (left, right) in zip(shown, pairs[: len(shown)], strict=True):
        meta, tokens = embeddings.rows[row], embeddings.tokens(row)
        left.imshow(images.thumbnail(photographs / meta["id"], meta["size"], 320))
        left.set_title(_short(meta["id"]), fontsize=7)
        right.imshow(picture(basis(tokens, weighted), covered(tokens, meta["size"]), 320))
        right.set_title("{} x {} tokens".format(*meta["grid"]), fontsize=7)
    return figure


def similarity(embeddings: Embeddings, n: int = 40) -> Figure:
    """Cosine between the global vectors of the first n photographs; the diagonal is 1, dark is the least alike."""
    vectors = np.asarray(embeddings.vectors[:n])
    cosine = vectors @ vectors.T
    figure = Figure(figsize=(6, 5), layout="constrained")
    axis = figure.add_subplot()
    shown = axis.imshow(cosine, vmin=min(cosine.min(), 0.999), vmax=1, cmap="viridis")
    names = [_short(id) for id in embeddings.ids[:n]]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.set_title("how alike the photographs are (cosine of global vectors)", fontsize=9)
    figure.colorbar(shown)
    return figure


def reference_sheet(views: Step, rows: Sequence[Row], columns: int = 12) -> Figure:
    """All views of the first photograph: a row a crop, a column an angle (at most `columns`)."""
    rows = [row for row in rows if row["source"] == rows[0]["source"]]
    crops = sorted({row["crop"] for row in rows}, reverse=True)
    angles = sorted({row["angle"] for row in rows})[:columns]
    figure, axes = _sheet(len(crops), len(angles), side=1.3)
    by_view = {(row["crop"], row["angle"]): row for row in rows}
    for (i, crop), (j, angle) in ((c, a) for c in enumerate(crops) for a in enumerate(angles)):
        row, axis = by_view[crop, angle], axes[i, j]
        axis.imshow(images.thumbnail(views.folder / row["id"], row["size"], 200))
        axis.set_title(f"{angle:g} deg, crop {crop:g}\nscale {row['scale']:.2f}, {row['covered']:.0%}", fontsize=6)
    return figure


def reference_kinds(views: Step, rows: Sequence[Row], angles: Sequence[float] = (0, 30, 45, 90, 150)) -> Figure:
    """The first photograph turned by every kind of reference, a row a kind, at the step's largest crop: what a kind
    does to the scale and to the corners, whichever was chosen. Made from a thumbnail, so of any photograph at once.

    Args:
        views: of `start_references`.
        rows: of `make_references`.
        angles: degrees; for each, the nearest of the step's angles is shown.
    """
    source, crop = rows[0], max(views.parameters["crops"])
    shown = [min(views.parameters["angles"], key=lambda a: abs((a - angle + 180) % 360 - 180)) for angle in angles]
    shown = sorted({*shown})
    photograph = images.thumbnail(views.linked("photographs") / source["source"], source["source_size"], 320)
    options = {"resize_to_original": views.parameters["resize_to_original"]}
    makers = {kind: references.create(kind, options) for kind in references.REFERENCES}
    made = [(kind, angle, make(photograph, angle, crop)) for kind, make in makers.items() for angle in shown]
    h, w = np.max([view.mask.shape for *_, view in made], axis=0) / 2
    figure, axes = _sheet(len(makers), len(shown))
    for (kind, angle, view), axis in zip(made, axes.flat, strict=True):
        y, x = np.array(view.mask.shape) / 2
        axis.imshow(np.where(view.mask[..., None], view.pixels, np.uint8(EMPTY)), extent=(-x, x, y, -y))
        axis.set(xlim=(-w, w), ylim=(h, -h))  # a pixel is as large in all of them, so that zooms can be compared
        scale = math.sqrt(np.linalg.det(view.matrix[:2, :2]))
        axis.set_title(f"{kind}, {angle:g} deg\nscale {scale:.2f}, {view.mask.mean():.0%} covered", fontsize=7)
    figure.suptitle(
        "legacy: zooms with the angle and can leave empty corners (magenta)\n"
        f"isometric: one scale at every angle, no empty corner (both at crop {crop:g})",
        fontsize=8,
    )
    return figure


def reference_outlines(views: Step, rows: Sequence[Row]) -> Figure:
    """The first photograph with the outline of each of its views, by the exact matrices."""
    rows = [row for row in rows if row["source"] == rows[0]["source"]]
    h, w = rows[0]["source_size"]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(
        images.thumbnail(views.linked("photographs") / rows[0]["source"], rows[0]["source_size"], 480),
        extent=(-0.5, w - 0.5, h - 0.5, -0.5),
    )
    for row in rows:
        outline = geometry.transform(np.linalg.inv(row["matrix"]), geometry.corners(row["size"]))
        axis.plot(*np.vstack([outline, outline[:1]]).T, linewidth=1)
    told = "\ncrop 1 is the largest square that fits at every angle" if rows[0]["kind"] == "isometric" else ""
    axis.set_title(f"{_short(rows[0]['source'])}: where its {len(rows)} references lie{told}", fontsize=9)
    return figure


def hit_sheet(step: Step, query: Embeddings, gallery: Embeddings, ranking: Ranking, n: int = 6, k: int = 5) -> Figure:
    """n queries, evenly spread, and their best k hits: framed green where right, red where wrong."""
    shown = np.unique(np.linspace(0, len(query) - 1, min(n, len(query))).astype(int))
    k = min(k, ranking.rows.shape[1])
    from_query, from_gallery = (side.linked("photographs") for side in sides(step))
    figure, axes = _sheet(len(shown), k + 1, side=1.5)
    for i, q in enumerate(shown):
        axes[i, 0].imshow(images.thumbnail(from_query / query.ids[q], query.rows[q]["size"], 200))
        axes[i, 0].set_title(f"query\n{_short(query.ids[q])}", fontsize=6)
        for rank in range(k):
            row, axis = ranking.rows[q, rank], axes[i, rank + 1]
            if row < 0:
                continue
            picture = images.thumbnail(from_gallery / gallery.ids[row], gallery.rows[row]["size"], 200)
            axis.imshow(picture)
            axis.set_title(f"{rank + 1}: {ranking.scores[q, rank]:.3f}\n{_short(gallery.ids[row])}", fontsize=6)
            size = (picture.shape[1], picture.shape[0])
            colour = RIGHT if ranking.right[q, rank] else WRONG
            axis.add_patch(Rectangle((-0.5, -0.5), *size, fill=False, edgecolor=colour, linewidth=3))
    figure.suptitle("queries, and their best hits with cosine: green frames are right, red ones wrong", fontsize=8)
    return figure


def match_summary(pairs: Sequence[Row], metrics: Mapping[str, Any]) -> Figure:
    """What 1:1 matching adds: Hit@1 before and after re-ranking, and inliers of right and wrong candidates."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    hits, inliers = figure.subplots(1, 2)
    for crop in sorted({view["crop"] for view in metrics["by_view"]}, reverse=True):
        views = [view for view in metrics["by_view"] if view["crop"] == crop]
        angles = [view["angle"] for view in views]
        (line,) = hits.plot(angles, [_number(v["hit_at_1"]) for v in views], ".-", label=f"crop {crop:g}")
        again = [_number(view["reranked_hit_at_1"]) for view in views]
        hits.plot(angles, again, ":", color=line.get_color(), label=f"crop {crop:g}, re-ranked")
    hits.set(title="Hit@1 before and after re-ranking", xlabel="rotation of the query, degrees", ylim=(-0.03, 1.03))
    if not metrics["by_view"]:
        hits.text(0.5, 0.5, "the queries are no references", transform=hits.transAxes, ha="center", color="grey")
    looks = {
        True: ("right candidate", RIGHT),
        False: ("wrong candidate", WRONG),
        None: ("nobody knows whether right", "grey"),
    }
    counts = {right: [row["inliers"] for row in pairs if row["right"] is right] for right in looks}
    bins = np.linspace(0, max([1, *(n for of in counts.values() for n in of)]), 41)
    for right, count in counts.items():
        if count or right is not None:
            name, colour = looks[right]
            inliers.hist(count, bins, alpha=0.6, label=f"{name} ({len(count)})", color=colour)
    inliers.set(title="do inliers tell right from wrong?", xlabel="inliers of a pair", ylabel="pairs", yscale="symlog")
    for axis in (hits, inliers):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    return figure


def pair_sheet(step: Step, pairs: Sequence[Row], n: int = 4) -> Figure:
    """The saved pictures of n pairs, evenly spread over the queries' best candidates."""
    from PIL import Image

    best = evaluate.best_pairs(row for row in pairs if row["candidate"] is not None)
    shown = [best[i] for i in np.unique(np.linspace(0, max(0, len(best) - 1), min(n, len(best))).astype(int))]
    figure = Figure(figsize=(8, 4 * max(1, len(shown))), layout="constrained")
    for i, row in enumerate(shown):
        axis = figure.add_subplot(len(shown), 1, i + 1)
        axis.axis("off")
        path = pair_path(step, row).with_suffix(".png")
        if path.is_file():
            with Image.open(path) as picture:
                axis.imshow(np.asarray(picture.convert("RGB")))  # on disk it has a palette
    return figure


def show(figure: Figure, path: Path) -> DisplayImage:
    """Write a figure as PNG, atomically, and return it as the picture that a notebook shows."""
    with store.atomic(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # no installed font knows a name's letters
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return DisplayImage(data=path.read_bytes(), format="png")


def _sheet(rows: int, columns: int, side: float = 2.2) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(side * columns, side * 1.15 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _short(id: str) -> str:
    name = store.printable(Path(id).stem).replace("$", r"\$")  # matplotlib would read a formula between dollars
    return name if len(name) <= 22 else f"{name[:9]}...{name[-10:]}"


def _number(value: float | None, missing: float = np.nan) -> float:
    return missing if value is None else value
