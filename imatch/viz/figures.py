"""Figures for the notebooks, and what is read for them; `show` puts a matplotlib Figure beside the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from IPython.display import Image as DisplayImage
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from imatch.core import files
from imatch.core.rows import MatchFigures, PairRow, ReferenceRow
from imatch.core.types import ImatchError, Pair, Ranking, StepError, Tokens
from imatch.data import images, references
from imatch.data.embeddings import Embeddings
from imatch.data.pairs import Matched, pair_path
from imatch.evaluation.metrics import best_pairs
from imatch.features.denseft import covered, denseft_picture, fit, fit_embeddings
from imatch.matching import geometry
from imatch.viz import curves, pictures

EMPTY = (255, 0, 255)
"""Where a reference shows nothing of its photograph."""


def descriptors(embeddings: Embeddings, root: Path, n: int = 6, strongest: int = 300) -> Figure | str:
    """The first n photographs with the positions of their local descriptors; a sentence where none were kept."""
    if embeddings.unplaced:
        return f"No positions: {embeddings.unplaced}."
    n = min(n, len(embeddings))
    figure, axes = _sheet(1, n)
    for row, axis in enumerate(axes.flat):
        meta, xy = embeddings.rows[row], embeddings.tokens(row).xy
        xy = xy if meta["grid"] else xy[:strongest]
        h, w = meta["size"]
        told = ", strongest shown" if meta["grid"] is None and meta["n"] > strongest else ""
        photograph = images.thumbnail(root / meta["id"], meta["size"], 320)
        axis.imshow(photograph, extent=(-0.5, w - 0.5, h - 0.5, -0.5))
        axis.plot(*xy.T, ".", color="#ffd500", markersize=1.5)
        axis.set_title(f"{_short(meta['id'])}\n{meta['n']} descriptors{told}", fontsize=7)
    return figure


def denseft(embeddings: Embeddings, photographs: Path, n: int = 6, weighted: bool = False) -> Figure | str:
    """n photographs, evenly spread, each beside its DenseFT: colours of one basis, so equal colours are equal tokens.

    Where there can be none (keypoints lie on no grid, or nothing was kept), a sentence says so.

    Args:
        embeddings: of the photographs.
        photographs: the folder that their ids are relative to.
        n: how many.
        weighted: darken tokens of small norm.
    """
    try:
        basis = fit_embeddings(embeddings)
    except ImatchError as error:
        return f"No DenseFT: {embeddings.unplaced or error}."
    shown = _spread(len(embeddings), n)
    columns = min(3, len(shown))
    figure, axes = _sheet(-(-len(shown) // columns), 2 * columns)
    pairs = axes.reshape(-1, 2)  # row by row, so a pair stays in its row
    for row, (left, right) in zip(shown, pairs[: len(shown)], strict=True):
        meta, tokens = embeddings.rows[row], embeddings.tokens(row)
        left.imshow(images.thumbnail(photographs / meta["id"], meta["size"], 320))
        left.set_title(_short(meta["id"]), fontsize=7)
        right.imshow(denseft_picture(basis(tokens, weighted), covered(tokens, meta["size"]), 320))
        right.set_title(f"{meta['grid'][0]} x {meta['grid'][1]} tokens", fontsize=7)
    return figure


@rc_context(curves.STYLE)
def similarity(embeddings: Embeddings, n: int = 40) -> Figure:
    """Cosine between the global vectors of the first n photographs; the diagonal is 1, dark is the least alike."""
    vectors = np.asarray(embeddings.vectors[:n])
    cosine = vectors @ vectors.T
    figure = Figure(figsize=(6, 5))
    axis = figure.add_subplot()
    shown = axis.imshow(cosine, vmin=min(cosine.min(), 0.999), vmax=1, cmap="viridis")
    names = [_short(id) for id in embeddings.ids[:n]]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.grid(visible=False)
    figure.colorbar(shown, label="cosine of global vectors")
    return figure


def reference_sheet(views: Path, rows: Sequence[ReferenceRow], columns: int = 12) -> Figure:
    """All views of the first photograph in their folder: a row a crop, a column an angle (at most `columns`)."""
    rows = [row for row in rows if row["source"] == rows[0]["source"]]
    crops = sorted({row["crop"] for row in rows}, reverse=True)
    angles = sorted({row["angle"] for row in rows})[:columns]
    figure, axes = _sheet(len(crops), len(angles), side=1.3)
    by_view = {(row["crop"], row["angle"]): row for row in rows}
    for (i, crop), (j, angle) in ((c, a) for c in enumerate(crops) for a in enumerate(angles)):
        row, axis = by_view[crop, angle], axes[i, j]
        axis.imshow(images.thumbnail(views / row["id"], row["size"], 200))
        axis.set_title(f"{angle:g} deg, crop {crop:g}\nscale {row['scale']:.2f}, {row['covered']:.0%}", fontsize=6)
    return figure


def reference_kinds(photographs: Path, rows: Sequence[ReferenceRow], resize_to_original: bool = False) -> Figure:
    """The first photograph turned by every kind of reference, a row a kind, at the step's largest crop; it is made from
    a thumbnail.

    Args:
        photographs: the folder that the ids of the photographs are relative to.
        rows: of `make_references`.
        resize_to_original: as `start_references` was given it.
    """
    source, crop, made_at = rows[0], max(row["crop"] for row in rows), sorted({row["angle"] for row in rows})
    shown = sorted({min(made_at, key=lambda a: abs((a - angle + 180) % 360 - 180)) for angle in (0, 30, 45, 90, 150)})
    photograph = images.thumbnail(photographs / source["source"], source["source_size"], 320)
    made = [
        (kind, angle, make(photograph, angle, crop, resize_to_original))
        for kind, make in references.REFERENCES.items()
        for angle in shown
    ]
    h, w = np.max([view.mask.shape for *_, view in made], axis=0) / 2
    figure, axes = _sheet(len(references.REFERENCES), len(shown))
    for (kind, angle, view), axis in zip(made, axes.flat, strict=True):
        y, x = np.array(view.mask.shape) / 2
        axis.imshow(np.where(view.mask[..., None], view.pixels, np.uint8(EMPTY)), extent=(-x, x, y, -y))
        axis.set(xlim=(-w, w), ylim=(h, -h))  # a pixel is as large in all of them, so that zooms can be compared
        scale = math.sqrt(np.linalg.det(view.matrix[:2, :2]))
        axis.set_title(f"{kind}, {angle:g} deg\nscale {scale:.2f}, {view.mask.mean():.0%} covered", fontsize=7)
    return figure


@rc_context(curves.STYLE)
def reference_outlines(photographs: Path, rows: Sequence[ReferenceRow]) -> Figure:
    """The first of the photographs in a folder with the outline of each of its views, by the exact matrices."""
    rows = [row for row in rows if row["source"] == rows[0]["source"]]
    h, w = rows[0]["source_size"]
    figure, axes = _sheet(1, 1, side=5)
    (axis,) = axes.flat
    photograph = images.thumbnail(photographs / rows[0]["source"], rows[0]["source_size"], 480)
    axis.imshow(photograph, extent=(-0.5, w - 0.5, h - 0.5, -0.5))
    for row in rows:
        outline = geometry.transform(np.linalg.inv(row["matrix"]), geometry.corners(row["size"]))
        axis.plot(*np.vstack([outline, outline[:1]]).T, linewidth=1)
    axis.set_title(f"{_short(rows[0]['source'])}: where its {len(rows)} references lie")
    return figure


def hits_shown(query: Embeddings, gallery: Embeddings, ranking: Ranking, n: int, k: int) -> list[dict[str, object]]:
    """n queries of a 03_index, evenly spread, with their best k hits: what contact sheets show.

    Returns:
        A row a query: id, path, size, angle (by which a reference is turned; None of a photograph) and hits, a row
        each: rank from 0, id, path, size, score, right and metres (None where not known).
    """

    def hit(q: int, rank: int) -> dict[str, object]:
        place = int(ranking.rows[q, rank])
        row = gallery.rows[place]
        metres = np.nan if ranking.metres is None else float(ranking.metres[q, rank])
        return {
            "rank": rank,
            "id": row["id"],
            "path": gallery.photograph(place),
            "size": tuple(row["size"]),
            "score": float(ranking.scores[q, rank]),
            "right": bool(ranking.right[q, rank]),
            "metres": None if np.isnan(metres) else metres,
        }

    return [
        {
            "id": id,
            "path": query.photograph(q),
            "size": tuple(query.rows[q]["size"]),
            "angle": query.views.get(id, {}).get("angle"),
            "hits": [hit(q, rank) for rank in range(int((ranking.rows[q, :k] >= 0).sum()))],
        }
        for q, id in ((q, query.ids[q]) for q in _spread(len(query), n))
    ]


@rc_context(curves.STYLE)
def hit_sheet(query: Embeddings, gallery: Embeddings, ranking: Ranking, n: int = 6, k: int = 5) -> Figure:
    """The contact sheet: n queries down, and across their best k hits, framed green where right, orange where wrong."""
    shown = hits_shown(query, gallery, ranking, n, k)
    k = max(len(row["hits"]) for row in shown)  # a small gallery has fewer than were asked for
    wide, side = 1.5, 1.6  # a query is so much wider than a hit, which is so many inches wide
    sizes = [[row["size"], *(hit["size"] for hit in row["hits"])] for row in shown]
    tall = [max(h / w * (wide if i == 0 else 1) for i, (h, w) in enumerate(of_row)) for of_row in sizes]
    heights = [0.5 + side * min(ratio, 2.0) for ratio in tall]
    figure = Figure(figsize=(side * (wide + k), sum(heights) + 0.3))
    axes = figure.subplots(len(shown), k + 1, squeeze=False, width_ratios=[wide, *[1] * k], height_ratios=heights)
    for axis in axes.flat:
        axis.axis("off")
    for row, (first, *others) in zip(shown, axes, strict=True):
        first.imshow(images.thumbnail(row["path"], row["size"], 320))
        turned = "" if row["angle"] is None else f", turned by {row['angle']:g} deg"
        first.set_title(f"query{turned}\n{_short(row['id'])}", fontsize=8, fontweight="bold")
        for hit, axis in zip(row["hits"], others, strict=False):
            picture = images.thumbnail(hit["path"], hit["size"], 240)
            axis.imshow(picture)
            metres = "" if hit["metres"] is None else f", {pictures.metres_said(hit['metres'])}"
            verdict, colour = ("right", curves.RIGHT) if hit["right"] else ("wrong", curves.WRONG)
            said = f"{hit['rank'] + 1}: {hit['score']:.3f}{metres}, {verdict}\n{_short(hit['id'])}"
            axis.set_title(said, fontsize=7, color=colour)
            size = (picture.shape[1], picture.shape[0])
            axis.add_patch(Rectangle((-0.5, -0.5), *size, fill=False, edgecolor=colour, linewidth=4, clip_on=False))
    return figure


@rc_context(curves.STYLE)
def match_summary(pairs: Sequence[PairRow], metrics: MatchFigures) -> Figure | str:
    """Inliers of right and wrong candidates and, of references, Hit@1 before and after re-ranking by their angle."""
    if not pairs:
        return "Nothing was matched: there was no pair."
    figure = Figure(figsize=(11, 3.6) if metrics["by_view"] else (6, 3.6))
    axes = figure.subplots(1, 2 if metrics["by_view"] else 1, squeeze=False)[0]
    looks = {
        True: ("right candidate", curves.RIGHT),
        False: ("wrong candidate", curves.WRONG),
        None: ("nobody knows whether right", curves.UNKNOWN),
    }
    bins = np.linspace(0, max(1, *(row["inliers"] for row in pairs)), 41)
    for right, (name, colour) in looks.items():
        if count := [row["inliers"] for row in pairs if row["right"] is right]:
            axes[0].hist(count, bins, alpha=0.6, label=f"{name} ({len(count)})", color=colour)
    axes[0].set(xlabel="inliers of a pair", ylabel="pairs", yscale="symlog")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].legend()
    for crop in sorted({view["crop"] for view in metrics["by_view"]}, reverse=True):
        views = [view for view in metrics["by_view"] if view["crop"] == crop]
        angles = [view["angle"] for view in views]
        first = [curves.number(view["hit_at_1"]) for view in views]
        (line,) = axes[1].plot(angles, first, ".-", label=f"crop {crop:g}")
        again = [curves.number(view["reranked_hit_at_1"]) for view in views]
        axes[1].plot(angles, again, ":", color=line.get_color(), label=f"crop {crop:g}, re-ranked")
    for axis in axes[1:]:
        axis.set(ylabel="Hit@1", ylim=(-0.03, 1.03))
        axis.legend()
        curves.angles(axis)
    return figure


def pair_sheet(folder: Path, pairs: Sequence[PairRow], n: int = 4) -> Figure | str:
    """The saved pictures of n pairs of the 04_match in a folder, evenly spread over the queries' best candidates."""
    best = best_pairs(row for row in pairs if row["candidate"] is not None)
    shown = [pair_path(folder, best[i]).with_suffix(".png") for i in _spread(len(best), n)]
    paths = [path for path in shown if path.is_file()]
    if not paths:
        return "No pictures of pairs: nothing was matched, or outputs is without 'png'."
    figure, axes = _sheet(len(paths), 1, side=8, aspect=0.5)
    for path, axis in zip(paths, axes.flat, strict=True):
        with Image.open(path, formats=["PNG"]) as picture:
            axis.imshow(np.asarray(picture.convert("RGB")))  # on disk it has a palette
    return figure


@rc_context(curves.STYLE)
def pair_views(matched: Matched, pairs: Sequence[PairRow]) -> Figure | str:
    """The pair with the most inliers in all views that it has, from lines to the principal components of both.

    Args:
        matched: a 04_match.
        pairs: its rows.
    """
    row = max(pairs, key=lambda row: row["inliers"], default=None)
    if row is None:
        return "Nothing was matched: there was no pair."
    if row["candidate"] is None:
        return f"{files.printable(row['query'])}: {row['reason']}."
    try:
        pair, (a, b) = matched.pair(row), matched.tokens(row)
    except StepError as error:
        return str(error)
    flaw = pictures.flaw(pair)
    views = [["lines"], *([] if flaw else [["checkerboard", "blend"]])]
    views += [["patch", "similarity"]] if len(pair.matches) else []
    components = _principal((matched.upright(row), b), pair.sizes)
    views += [["A", "B"]] if components else []
    h, w = np.max(pair.sizes, axis=0)
    figure = Figure(figsize=(8, 4.2 * len(views) * max(0.75, h / w)))
    axes = figure.subplot_mosaic([row if len(row) == 2 else row * 2 for row in views])
    for axis in axes.values():
        axis.axis("off")
    axes["lines"].imshow(pictures.lines(pair, 480))
    axes["lines"].set_title(f"A cannot be warped onto B: {flaw}" if flaw else "A, and where it lies in B")
    if not flaw:
        axes["checkerboard"].imshow(pictures.checkerboard(pair, 480))
        axes["blend"].imshow(pictures.blend(pair, 480))
        axes["checkerboard"].set_title("A warped onto B, in every other square")
        axes["blend"].set_title("A warped onto B, half transparent")
    if len(pair.matches):
        _patch(axes["patch"], axes["similarity"], pair, a, b)
    for name, picture in zip("AB", components, strict=False):
        axes[name].imshow(picture)
        axes[name].set_title(f"principal components of {name}")
    return figure


def _principal(tokens: Sequence[Tokens], sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Both grids in the colours of their common principal components; nothing of keypoints and of very few tokens."""
    try:
        basis = fit(np.concatenate([one.descriptors for one in tokens]))
        return [denseft_picture(basis(one), covered(one, size)) for one, size in zip(tokens, sizes, strict=True)]
    except ImatchError:
        return []


def _patch(here: Axes, there: Axes, pair: Pair, a: Tokens, b: Tokens) -> None:
    """The strongest correspondence's patch in A, an inlier if there is one, and the heat of B."""
    patch = int(pair.matches.index_a[pair.geometry.inliers.argmax()])
    similarity = pictures.similarities(a, b, [patch])[0]
    best = [i for i in pictures.best_two(similarity, b) if i is not None]
    for axis, path, (h, w), xy in zip((here, there), pair.paths, pair.sizes, (a.xy[[patch]], b.xy[best]), strict=True):
        grey = images.thumbnail(path, (h, w), 480).mean(axis=2)
        axis.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(-0.5, w - 0.5, h - 0.5, -0.5))
        axis.autoscale(enable=False)
        axis.scatter(*xy.T, s=110, facecolors="none", edgecolors=pictures.CHOSEN, linewidths=2, zorder=3)
    heat = {"cmap": "viridis", "vmin": float(np.median(similarity))}
    if b.grid is None:
        order = np.argsort(similarity, kind="stable")  # the most similar on top
        there.scatter(*b.xy[order].T, c=similarity[order], s=6, **heat)
    else:
        there.imshow(similarity.reshape(b.grid), extent=pictures.extent(b, pair.sizes[1]), alpha=0.6, **heat)
    what = "keypoint" if a.grid is None else "patch"
    here.set_title(f"{what} of the strongest correspondence")
    scores = ", ".join(f"{name} {similarity[i]:.2f}" for name, i in zip(("best", "elsewhere"), best, strict=False))
    there.set_title(f"its similarity to those of B: {scores}")


def show(figure: Figure | str, path: Path) -> DisplayImage | None:
    """Write a figure as PNG, atomically, and return it as the picture that a notebook shows.

    A sentence, which stands where there is nothing to draw, is printed, and an earlier picture at that path goes.
    """
    if isinstance(figure, str):
        print(figure)
        path.unlink(missing_ok=True)
        return None
    with files.atomic(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # no installed font knows a name's letters
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    return DisplayImage(data=path.read_bytes(), format="png")


@rc_context(curves.STYLE)
def _sheet(rows: int, columns: int, side: float = 2.2, aspect: float = 1.15) -> tuple[Figure, np.ndarray]:
    """A figure of rows and columns of photographs, each so many inches wide."""
    figure = Figure(figsize=(side * columns, side * aspect * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _spread(n: int, most: int) -> list[int]:
    """Places of n that are evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)).tolist()


def _short(id: str) -> str:
    name = files.printable(Path(id).stem)
    return name if len(name) <= 22 else f"{name[:9]}...{name[-10:]}"
