"""Figures for the notebooks, and what is read for them; `show` puts a matplotlib Figure beside the step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from IPython.display import Image as DisplayImage
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from imatch.core import files
from imatch.core.rows import MatchFigures, PairRow, ReferenceRow
from imatch.core.types import ImatchError, Pair, Ranking, StepError, Tokens
from imatch.data import images, references
from imatch.data.embeddings import Embeddings
from imatch.data.pairs import Matched, pair_path
from imatch.evaluation.metrics import best_pairs
from imatch.features.denseft import covered, denseft_picture, fit_embeddings
from imatch.matching import geometry
from imatch.viz import curves, pictures

KOREAN = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "AppleGothic")
rcParams["font.family"] = ["DejaVu Sans", *(name for name in KOREAN if name in font_manager.get_font_names())]
RIGHT, WRONG = "#2ca02c", "#d62728"
EMPTY = (255, 0, 255)


def descriptors(embeddings: Embeddings, root: Path, n: int = 6, strongest: int = 300) -> Figure:
    """The first n photographs with the positions of their local descriptors; where none were kept, that in words."""
    if embeddings.unplaced:
        return curves.words(f"No positions: {embeddings.unplaced}.")
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

    Where there can be none (keypoints lie on no grid, or nothing was kept), the figure says so in words.

    Args:
        embeddings: of the photographs.
        photographs: the folder that their ids are relative to.
        n: how many.
        weighted: darken tokens of small norm.
    """
    try:
        basis = fit_embeddings(embeddings)
    except ImatchError:
        gridless = "keypoints lie on no grid" if embeddings.rows[0]["grid"] is None else "there are too few tokens"
        return curves.words(f"No DenseFT: {embeddings.unplaced or gridless}.")
    shown = np.unique(np.linspace(0, len(embeddings) - 1, max(1, min(n, len(embeddings)))).astype(int)).tolist()
    columns = min(3, len(shown))
    figure, axes = _sheet(-(-len(shown) // columns), 2 * columns)
    pairs = axes.reshape(-1, 2)  # row by row, so a pair stays in its row
    for row, (left, right) in zip(shown, pairs[: len(shown)], strict=True):
        meta, tokens = embeddings.rows[row], embeddings.tokens(row)
        left.imshow(images.thumbnail(photographs / meta["id"], meta["size"], 320))
        left.set_title(_short(meta["id"]), fontsize=7)
        right.imshow(denseft_picture(basis(tokens, weighted), covered(tokens, meta["size"]), 320))
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
    """The first photograph turned by every kind of reference, a row a kind, at the step's largest crop: what a kind
    does to the scale and to the corners, whichever was chosen. Made from a thumbnail, so of any photograph at once.

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
    figure.suptitle(
        "legacy: zooms with the angle and can leave empty corners (magenta)\n"
        f"isometric: one scale at every angle, no empty corner (both at crop {crop:g})",
        fontsize=8,
    )
    return figure


def reference_outlines(photographs: Path, rows: Sequence[ReferenceRow]) -> Figure:
    """The first of the photographs in a folder with the outline of each of its views, by the exact matrices."""
    rows = [row for row in rows if row["source"] == rows[0]["source"]]
    h, w = rows[0]["source_size"]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(
        images.thumbnail(photographs / rows[0]["source"], rows[0]["source_size"], 480),
        extent=(-0.5, w - 0.5, h - 0.5, -0.5),
    )
    for row in rows:
        outline = geometry.transform(np.linalg.inv(row["matrix"]), geometry.corners(row["size"]))
        axis.plot(*np.vstack([outline, outline[:1]]).T, linewidth=1)
    told = "\ncrop 1 is the largest square that fits at every angle" if rows[0]["kind"] == "isometric" else ""
    axis.set_title(f"{_short(rows[0]['source'])}: where its {len(rows)} references lie{told}", fontsize=9)
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

    shown = np.unique(np.linspace(0, len(query) - 1, min(n, len(query))).astype(int)).tolist()
    return [
        {
            "id": id,
            "path": query.photograph(q),
            "size": tuple(query.rows[q]["size"]),
            "angle": query.views.get(id, {}).get("angle"),
            "hits": [hit(q, rank) for rank in range(int((ranking.rows[q, :k] >= 0).sum()))],
        }
        for q, id in ((q, query.ids[q]) for q in shown)
    ]


def hit_sheet(query: Embeddings, gallery: Embeddings, ranking: Ranking, n: int = 6, k: int = 5) -> Figure:
    """The contact sheet: n queries, evenly spread, down, and across their best k hits: framed green where right, red
    where wrong, with the cosine and, where it is known, the distance in metres."""
    shown, k = hits_shown(query, gallery, ranking, n, k), min(k, ranking.rows.shape[1])
    wide, side = 1.5, 1.6  # a query is so much wider than a hit, which is so many inches wide
    sizes = [[row["size"], *(hit["size"] for hit in row["hits"])] for row in shown]
    tall = [max(h / w * (wide if i == 0 else 1) for i, (h, w) in enumerate(of_row)) for of_row in sizes]
    heights = [0.5 + side * min(ratio, 2.0) for ratio in tall]
    figure = Figure(figsize=(side * (wide + k), sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(shown), k + 1, squeeze=False, width_ratios=[wide, *[1] * k], height_ratios=heights)
    for axis in axes.flat:
        axis.axis("off")
    for row, (first, *others) in zip(shown, axes, strict=True):
        first.imshow(images.thumbnail(row["path"], row["size"], 320))
        turned = "" if row["angle"] is None else f", turned by {row['angle']:g} deg"
        first.set_title(f"query{turned}\n{_short(row['id'])}", fontsize=8, fontweight="bold")
        for hit, axis in zip(row["hits"], others, strict=False):  # a small gallery has fewer hits than places
            picture = images.thumbnail(hit["path"], hit["size"], 240)
            axis.imshow(picture)
            metres = "" if hit["metres"] is None else f", {pictures.metres_said(hit['metres'])}"
            verdict, colour = ("right", RIGHT) if hit["right"] else ("wrong", WRONG)
            said = f"{hit['rank'] + 1}: {hit['score']:.3f}{metres}, {verdict}\n{_short(hit['id'])}"
            axis.set_title(said, fontsize=7, color=colour)
            size = (picture.shape[1], picture.shape[0])
            axis.add_patch(Rectangle((-0.5, -0.5), *size, fill=False, edgecolor=colour, linewidth=4, clip_on=False))
    figure.suptitle("queries, and their best hits with cosine: green frames are right, red ones wrong", fontsize=9)
    return figure


def match_summary(pairs: Sequence[PairRow], metrics: MatchFigures) -> Figure:
    """What 1:1 matching adds: Hit@1 before and after re-ranking, and inliers of right and wrong candidates."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    hits, inliers = figure.subplots(1, 2)
    for crop in sorted({view["crop"] for view in metrics["by_view"]}, reverse=True):
        views = [view for view in metrics["by_view"] if view["crop"] == crop]
        angles = [view["angle"] for view in views]
        (line,) = hits.plot(angles, [curves.number(v["hit_at_1"]) for v in views], ".-", label=f"crop {crop:g}")
        again = [curves.number(view["reranked_hit_at_1"]) for view in views]
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


def pair_sheet(folder: Path, pairs: Sequence[PairRow], n: int = 4) -> Figure:
    """The saved pictures of n pairs of the 04_match in a folder, evenly spread over the queries' best candidates."""
    from PIL import Image

    best = best_pairs(row for row in pairs if row["candidate"] is not None)
    shown = [best[i] for i in np.unique(np.linspace(0, max(0, len(best) - 1), min(n, len(best))).astype(int))]
    figure = Figure(figsize=(8, 4 * max(1, len(shown))), layout="constrained")
    for i, row in enumerate(shown):
        axis = figure.add_subplot(len(shown), 1, i + 1)
        axis.axis("off")
        path = pair_path(folder, row).with_suffix(".png")
        if path.is_file():
            with Image.open(path) as picture:
                axis.imshow(np.asarray(picture.convert("RGB")))  # on disk it has a palette
    return figure


def pair_views(matched: Matched, pairs: Sequence[PairRow]) -> Figure:
    """The pair with the most inliers in all views: lines, A warped onto B as a checkerboard and as a blend, how similar
    the patch of its strongest correspondence is to all of B, and the principal components of both. Where there can be
    no picture, words say why.

    Args:
        matched: a 04_match.
        pairs: its rows.
    """
    row = max(pairs, key=lambda row: row["inliers"], default=None)
    if row is None:
        return curves.words("Nothing was matched: there was no pair.")
    if row["candidate"] is None:
        return curves.words(f"{files.printable(row['query'])}: {row['reason']}.")
    try:
        pair, (a, b) = matched.pair(row), matched.tokens(row)
    except StepError as error:
        return curves.words(str(error))
    style = pictures.Style(side=480, alpha=0.8)
    doubt = "" if pair.geometry.verified else " (not verified)"
    drawn = (
        "A, the query, and B: lines join the most similar inliers, brighter is more similar;\n"
        "the frame is A's outline where it was found in B",
        pictures.lines(pair, style),
    )
    checkerboard = (
        f"A warped onto B{doubt}, in every other square:\nedges run on where it fits",
        pictures.checkerboard(pair, style),
    )
    blend = (
        f"A warped onto B{doubt}, half transparent:\nwhat does not fit is seen twice",
        pictures.blend(pair, style),
    )
    return _rows_of(
        [
            [drawn],
            [checkerboard, blend],
            _patch_views(pair, a, b, style),
            [_principal(pair, matched.upright(row), b, style)],
        ]
    )


Titled = tuple[str, np.ndarray | None]
"""A title and its picture, or words alone."""


def _patch_views(pair: Pair, a: Tokens, b: Tokens, style: pictures.Style) -> list[Titled]:
    """The strongest correspondence's patch in A, an inlier if there is one, and how similar all of B is to it."""
    if not len(pair.matches):
        return [("No correspondence, so no patch to follow.", None)]
    patch = int(pair.matches.index_a[pair.geometry.inliers.argmax()])
    similarity = pictures.similarities(a, b, [patch])[0]
    best, rival = pictures.best_two(similarity, b)
    what = "keypoint" if b.grid is None else "patch"
    against = "" if rival is None else f", rival (2) {similarity[rival]:.2f}"
    return [
        (
            f"one {what} of A (ring),\nthat of the strongest correspondence",
            pictures.marked(a.xy[patch], pair.paths[0], pair.sizes[0], style),
        ),
        (
            f"its similarity to every {what} of B:\nbest (1) {similarity[best]:.2f}{against}",
            pictures.heat(a, b, patch, pair.paths[1], pair.sizes[1], style),
        ),
    ]


def _principal(pair: Pair, a: Tokens, b: Tokens, style: pictures.Style) -> Titled:
    try:
        picture = pictures.principal(a, b, pair.sizes, style)
    except ImatchError:
        why = "keypoints lie on no grid" if None in (a.grid, b.grid) else "there are too few patches"
        return f"No principal components: {why}.", None
    said = "patches of A and of B in the colours of their common principal components:\nequal colours are equal patches"
    return said, picture


def _rows_of(rows: Sequence[Sequence[Titled]], width: float = 8) -> Figure:
    """Rows of one or two titled pictures, each as wide as the figure has room for."""
    heights = [
        0.5 + max(0 if shown is None else shown.shape[0] / shown.shape[1] * width / len(row) for _, shown in row)
        for row in rows
    ]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
    for i, row in enumerate(rows):
        for j, (title, shown) in enumerate(row):
            axis = figure.add_subplot(grid[i, j if len(row) > 1 else slice(None)])
            axis.axis("off")
            axis.set_title(title, fontsize=8)
            if shown is not None:
                axis.imshow(shown)
    return figure


def show(figure: Figure, path: Path) -> DisplayImage:
    """Write a figure as PNG, atomically, and return it as the picture that a notebook shows."""
    with files.atomic(path) as temporary, warnings.catch_warnings():
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
    name = files.printable(Path(id).stem).replace("$", r"\$")  # matplotlib would read a formula between dollars
    return name if len(name) <= 22 else f"{name[:9]}...{name[-10:]}"
