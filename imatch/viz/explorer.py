"""Two photographs side by side on a canvas that can be clicked (ipympl), with lines and similarities over them."""

from __future__ import annotations

import html
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import ipywidgets as widgets
import matplotlib
import numpy as np
from matplotlib.backend_bases import MouseButton, MouseEvent, RendererBase
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.transforms import IdentityTransform

from imatch.core.files import flat_name, printable, read_rows
from imatch.core.rows import PairRow
from imatch.core.types import Geometry, ImatchError, Pair, PhotographError, Tokens
from imatch.data import exif, images
from imatch.data.pairs import Looked, Matched, pair_path
from imatch.data.rotations import UPRIGHT, Pose
from imatch.evaluation import verdicts
from imatch.features import base
from imatch.features.base import Backbone, Embedded, embed_one
from imatch.matching import geometry, two_view
from imatch.matching.align import Tried, aligner, first_verified
from imatch.matching.two_view import Estimator
from imatch.viz import pictures
from imatch.viz.pictures import BAD, CHOSEN, GOOD

if TYPE_CHECKING:
    from ipympl.backend_nbagg import Canvas
    from matplotlib.axes import Axes


BEST, SECOND = "#7fff00", "#ff9f1c"
"""Colours of the best match of a patch that was clicked, and of the second best."""


class PairCanvas:
    """A figure of two photographs, A on the left and B on the right, each in pixels of its original.

    Artists stay and only their data changes, so that a slider redraws at once.

    Args:
        clicked: called with the side (0 for A, 1 for B) and (x, y) in its pixels when a photograph is clicked.

    Attributes:
        widget: the ipympl canvas, to be put among other widgets.

    >>> canvas = PairCanvas(lambda side, xy: None)
    >>> canvas.show([np.zeros((2, 3, 3), np.uint8)] * 2, [(20, 30), (20, 30)])
    >>> canvas.lines(np.array([[5, 5]]), np.array([[25, 15]]), np.array([0.9]), np.array([True]))
    >>> canvas.widget.draw()
    """

    def __init__(self, clicked: Callable[[int, tuple[float, float]], None]) -> None:
        figure = Figure(figsize=(9.6, 4.8), dpi=100, facecolor="#181818")
        self.sides = [_Side(figure.add_axes((left, 0.01, 0.49, 0.98))) for left in (0.005, 0.505)]
        self._lines = _Lines(self.sides[0].axes, self.sides[1].axes)
        figure.add_artist(self._lines)
        self._clicked = clicked
        self.widget = _ipympl_canvas(figure)  # last, for from here on JupyterLab may draw it, in a thread of its own
        self.widget.mpl_connect("button_press_event", self._pressed)

    def show(self, photographs: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> None:
        """Show two photographs, (h, w, 3) uint8 RGB, whose originals have these sizes (h, w), and nothing over them."""
        for side, pixels, size in zip(self.sides, photographs, sizes, strict=True):
            side.show(pixels, size)
        none = np.zeros((0, 2))
        self.lines(none, none, np.zeros(0), np.zeros(0, bool))

    def lines(self, xy_a: np.ndarray, xy_b: np.ndarray, similarity: np.ndarray, inliers: np.ndarray) -> None:
        """Join correspondences, (m, 2) pixels of A and of B: inliers in the colours of `pictures.lines`, others red."""
        for side in self.sides:
            side.forget()
        colours = matplotlib.colormaps["viridis"]((similarity - pictures.LOW) / (pictures.HIGH - pictures.LOW))
        colours[~inliers] = to_rgba(BAD, 0.6)
        self._lines.join(xy_a, xy_b, colours)
        self.widget.draw_idle()

    def outline(self, corners: np.ndarray | None, found: Geometry) -> None:
        """Draw the outline of A, (4, 2) pixels of B: green when verified, else red; dashed where it is approximate."""
        closed = np.zeros((0, 2)) if corners is None else np.vstack([corners, corners[:1]])
        self.sides[1].outline.set_data(*closed.T)
        self.sides[1].outline.set_color(GOOD if found.verified else BAD)
        self.sides[1].outline.set_linestyle("--" if found.kind == "general" else "-")
        self.widget.draw_idle()

    def similar(self, side: int, xy: np.ndarray, other: Tokens, similarity: np.ndarray, best: Sequence[int]) -> None:
        """Show how similar a token of one side is to every token of the other one, in place of the lines.

        Args:
            side: 0 when the token is of A, 1 when it is of B.
            xy: (2,) its pixel.
            other: the tokens of the other side.
            similarity: (n,) cosine with each of them.
            best: of `pictures.best_two`.
        """
        ends, colours = other.xy[list(best)], [BEST, SECOND][: len(best)]
        here, there = self.sides[side], self.sides[1 - side]
        here.forget()
        here.mark(xy[None], [CHOSEN])
        there.colour(other, similarity)
        there.mark(ends, colours)
        starts = np.repeat(xy[None], len(ends), axis=0)
        a, b = (starts, ends) if side == 0 else (ends, starts)
        self._lines.join(a, b, to_rgba_array(colours))
        self.widget.draw_idle()

    def _pressed(self, event: MouseEvent) -> None:
        zooming = self.widget.widgetlock.locked()
        for number, side in enumerate(self.sides):
            if event.inaxes is side.axes and event.button == MouseButton.LEFT and not zooming:
                self._clicked(number, (event.xdata, event.ydata))


class _Side:
    """A photograph, and over it the similarity of a token of the other one."""

    def __init__(self, axes: Axes) -> None:
        axes.set_axis_off()
        self.axes, self.size = axes, (1, 1)
        self.photograph = axes.imshow(np.zeros((1, 1, 3), np.uint8))
        self.cells = axes.imshow(np.zeros((1, 1)), cmap="magma", alpha=0.65, interpolation="nearest")
        self.dots = axes.scatter([], [], c=[], s=14, cmap="magma")
        self.marks = axes.scatter([], [], s=110, facecolors="none", linewidths=2.5, zorder=4)
        (self.outline,) = axes.plot([], [], linewidth=2)
        (self.epipolar,) = axes.plot([], [], linewidth=2, color=CHOSEN)

    def show(self, pixels: np.ndarray, size: tuple[int, int]) -> None:
        self.size = h, w = size
        self.photograph.set_data(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA))  # without alpha it is drawn in float, slowly
        self.photograph.set_extent((-0.5, w - 0.5, h - 0.5, -0.5))
        self.axes.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))
        self.outline.set_data([], [])
        self.forget()

    def forget(self) -> None:
        """Take the similarity and the epipolar line away."""
        self.cells.set_visible(False)
        self.dots.set_visible(False)
        self.marks.set_visible(False)
        self.epipolar.set_data([], [])

    def colour(self, tokens: Tokens, similarity: np.ndarray) -> None:
        self.forget()
        span = (similarity.min(), similarity.max()) if len(similarity) else (0, 1)
        if tokens.grid is None:
            order = np.argsort(similarity, kind="stable")  # the most similar on top
            self.dots.set_offsets(tokens.xy[order])
            self.dots.set(array=similarity[order], clim=span, visible=True)
            return
        self.cells.set(data=similarity.reshape(tokens.grid), clim=span, visible=True)
        self.cells.set_extent(pictures.extent(tokens, self.size))

    def mark(self, xy: np.ndarray, colours: Sequence[str]) -> None:
        self.marks.set_offsets(xy)
        self.marks.set(edgecolors=colours, visible=True)


class _Lines(LineCollection):
    """Lines from points of one axes to points of another, wherever these lie when they are drawn."""

    def __init__(self, *axes: Axes) -> None:
        super().__init__([], transform=IdentityTransform(), linewidths=0.9, zorder=3)
        self._pair = axes
        self.join(np.zeros((0, 2)), np.zeros((0, 2)), np.zeros((0, 4)))

    def join(self, xy_a: np.ndarray, xy_b: np.ndarray, colours: np.ndarray) -> None:
        """What to draw: (m, 2) ends in the data of each axes, the first on top, and (m, 4) RGBA."""
        self.ends = (xy_a[::-1], xy_b[::-1])
        self.set_color(colours[::-1])

    def draw(self, renderer: RendererBase) -> None:
        ends = [axes.transData.transform(xy) for axes, xy in zip(self._pair, self.ends, strict=True)]
        for axes, pixels in zip(self._pair, ends, strict=True):  # no line to what zooming has put out of sight
            pixels[((pixels < axes.bbox.min) | (pixels > axes.bbox.max)).any(axis=1)] = np.nan
        self.set_segments(np.stack(ends, axis=1))
        super().draw(renderer)


def _ipympl_canvas(figure: Figure) -> Canvas:
    backend = matplotlib.get_backend()
    from ipympl.backend_nbagg import Canvas, FigureManager

    matplotlib.use(backend)  # importing ipympl makes it the backend of every later figure
    canvas = Canvas(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Passing unrecognized arguments", DeprecationWarning)  # by ipympl's toolbar
        manager = FigureManager(canvas, 0)
    canvas.syncing_data_url = False  # the front end keeps the picture; to send it twice would take twice the time
    manager.resize(*figure.bbox.size)  # again, for JupyterLab may have asked before there was a manager
    canvas.header_visible = canvas.footer_visible = canvas.resizable = False
    canvas.toolbar_position, canvas.toolbar_visible = "right", "visible"
    canvas.layout.width = f"{figure.bbox.width + 48:.0f}px"  # room for the toolbar beside the picture
    return canvas


SIDE = 960
"""Pixels of a photograph's longer side: enough to zoom in, little enough to redraw at once."""
UNCLEAR = "unclear"
"""What a pair without a label is."""


@dataclass(frozen=True)
class Opened:
    """A pair as the explorer shows it.

    Attributes:
        pair: as it was saved, or has just been matched.
        tokens: of A and of B.
        estimator: what finds its geometry.
    """

    pair: Pair
    tokens: tuple[Tokens, Tokens]
    estimator: Estimator

    @classmethod
    def of(cls, row: PairRow, tried: Tried) -> Opened:
        """Make one of what has just been matched."""
        return cls(tried.pair(row), (tried.a, tried.b), tried.align.estimator)


class Saved:
    """A finished 04_match, as it is chosen from.

    Attributes:
        matched: the 04_match and what it was made from.
        photographs: id of what queries show -> (crop, angle), of a photograph itself (1, 0) -> query.
        candidates: query -> its rows of pairs.jsonl, by rank; none where nothing was found.
    """

    def __init__(self, matched: Matched) -> None:
        self.matched = matched
        self._backbones: dict[str, Backbone] = {}
        views = matched.query.views
        self.photographs: dict[str, dict[tuple[float, float], str]] = {}
        self.candidates: dict[str, list[PairRow]] = {}
        for row in read_rows(matched.folder / "pairs.jsonl"):
            query = row["query"]
            shown = views[query]["source"] if query in views else query
            self.photographs.setdefault(shown, {})[row["crop"] or 1.0, row["angle"] or 0.0] = query
            self.candidates.setdefault(query, []).extend([row] if row["candidate"] is not None else [])

    def open(self, row: PairRow) -> Opened:
        """A pair of pairs.jsonl; it is matched again where the outputs had no "npy"."""
        looked, (a, b) = self.matched.looked[row["weight"]], self.matched.tokens(row)
        files, sizes = self.matched.files(row)
        if not pair_path(self.matched.folder, row).with_suffix(".npy").is_file():
            return Opened.of(row, Tried.by(looked, [(Pose(row["turn"], row["zoom"]), a)], b, sizes, files))
        return Opened(self.matched.pair(row), (a, b), aligner(looked.settings, b, sizes[1]).estimator)

    def match(self, names: tuple[str, str], files: tuple[Path, Path]) -> Opened:
        """Embed two photographs as 01_embed did and match them as 04_match did.

        Args:
            names: what they are called.
            files: where they are.

        Raises:
            ImatchError: a photograph cannot be decoded, or the weights are not there or have changed.
        """
        tried = first_verified(self._tries(names, files))
        score = float(tried.seen[0][1].vector @ tried.b.vector)
        return Opened.of({"query": names[0], "candidate": names[1], "score": score}, tried)

    def _tries(self, names: tuple[str, str], files: tuple[Path, Path]) -> Iterator[Tried]:
        """Embed and align two photographs by one look after the other."""
        for looked in self.matched.looked.values():
            seen = [(pose, self._embed(names[0], files[0], pose, looked)) for pose in looked.look.poses]
            a, b = seen[0][1], self._embed(names[1], files[1], UPRIGHT, looked)
            yield Tried.by(looked, [(pose, one.tokens) for pose, one in seen], b.tokens, (a.size, b.size), files)

    def _embed(self, name: str, file: Path, pose: Pose, looked: Looked) -> Embedded:
        try:
            return embed_one(file, self._backbone(looked), looked.gallery.parameters, pose)
        except PhotographError as error:
            raise PhotographError(f"{name}: {error}") from None

    def _backbone(self, looked: Looked) -> Backbone:
        made_by, weight = looked.gallery.parameters, looked.look.weight
        if weight not in self._backbones:
            self._backbones[weight] = base.backbone_of(made_by)
        return self._backbones[weight]


class Explorer(widgets.VBox):
    """Choose a pair, move the sliders, click a patch, say whether the pair is right.

    Every pair opens with the geometry that 04_match gave it; moved sliders find it anew from the saved correspondences.

    Args:
        names: of finished 04_match steps.
        matched: opens one of them.

    Attributes:
        weight, query, crop, angle, rank: what pair is shown.
        similarity, model, threshold: what its geometry is found from.
        most, inliers: which lines are drawn.
        label: accept, reject or unclear (which takes the label back).
        uploads, match, back: two photographs from the reader's disk, and the way back to the chosen pair.
        export: writes the pair as a page that opens without a kernel.
        canvas: the picture.
        said, patch, progress: what was found, what was clicked, and how many pairs have a label.
    """

    def __init__(self, names: Sequence[str], matched: Callable[[str], Matched]) -> None:
        self._saved = cache(lambda name: Saved(matched(name)))
        self._opened: Opened | None = None
        self._clicked: tuple[int, int] | None = None
        self._filling = False

        wide, style = {"width": "480px"}, {"description_width": "80px"}
        self.weight = widgets.Dropdown(options=list(names), description="weight", layout=wide, style=style)
        self.query = widgets.Combobox(
            description="query", ensure_option=True, placeholder="type to search", layout=wide, style=style
        )
        self.crop = widgets.SelectionSlider(options=[1.0], description="crop", style=style)
        self.angle = widgets.SelectionSlider(options=[0.0], description="angle", style=style)
        self.rank = widgets.Dropdown(description="candidate", layout=wide, style=style)
        self.similarity = widgets.FloatSlider(-1, min=-1, max=1, step=0.01, description="similarity", style=style)
        self.most = widgets.IntSlider(200, min=0, max=2000, step=10, description="most lines", style=style)
        self.inliers = widgets.Checkbox(True, description="inliers only", indent=False)
        self.model = widgets.Dropdown(options=list(two_view.MODELS), description="geometry", style=style)
        self.threshold = widgets.FloatLogSlider(
            3, min=-1, max=2.5, step=0.02, readout_format=".1f", description="within px", style=style
        )
        self.label = widgets.ToggleButtons(
            options=[*verdicts.LABELS, UNCLEAR], value=UNCLEAR, style={"button_width": "80px"}
        )
        self.export = widgets.Button(description="save as HTML", icon="save")
        kinds = ",".join(sorted(images.SUFFIXES))
        self.uploads = [widgets.FileUpload(accept=kinds, description=side) for side in ("query", "candidate")]
        self.match = widgets.Button(description="match", icon="link")
        self.back = widgets.Button(description="back to the pair above", icon="undo")
        self.canvas = PairCanvas(self._click)
        self.said, self.patch, self.progress = widgets.HTML(), widgets.HTML(), widgets.HTML()

        own = widgets.HBox([widgets.HTML("two photographs of your own:"), *self.uploads, self.match, self.back])
        super().__init__(
            [
                widgets.HBox([self.weight], layout={"display": "" if len(names) > 1 else "none"}),
                widgets.HBox([self.query, self.crop, self.angle]),
                widgets.HBox([self.rank, self.label, self.progress]),
                widgets.HBox([self.similarity, self.most, self.inliers]),
                widgets.HBox([self.threshold, self.model, self.export]),
                self.canvas.widget,
                self.said,
                self.patch,
                own,
            ]
        )
        drawing = (self.similarity, self.most, self.inliers, self.model, self.threshold)
        for controls, reaction in (
            ((self.weight,), self._choose_weight),
            ((self.query,), self._choose_query),
            ((self.crop, self.angle), self._choose_view),
            ((self.rank,), self._choose_rank),
            (drawing, self._draw),
            ((self.label,), self._label),
        ):
            for control in controls:
                control.observe(self._reacting(reaction), names="value")
        self.match.on_click(self._reacting(self._match))
        self.back.on_click(self._reacting(self._choose_rank))
        self.export.on_click(self._reacting(self._export))
        self._choose_weight()

    # --- choosing ------------------------------------------------------------------------------------------

    @property
    def saved(self) -> Saved:
        """The 04_match that is shown."""
        return self._saved(self.weight.value)

    @property
    def row(self) -> PairRow | None:
        """The row of pairs.jsonl that is chosen; None where nothing was found."""
        return None if self.rank.value is None else self._candidates()[self.rank.value]

    def _candidates(self) -> list[PairRow]:
        query = self._views().get((self.crop.value, self.angle.value))
        return [] if query is None else self.saved.candidates[query]

    def _views(self) -> dict[tuple[float, float], str]:
        return self.saved.photographs[self._named[self.query.value]]

    def _choose_weight(self) -> None:
        self._named = _names(sorted(self.saved.photographs))
        with self._fill():
            wanted = self.query.value
            self.query.options = list(self._named)
            self.query.value = wanted if wanted in self._named else next(iter(self._named), "")
        if self._named:
            self._choose_query()
        else:
            self._nothing("Nothing was matched: there was no pair.")

    def _choose_query(self) -> None:
        crops, angles = (sorted({view[i] for view in self._views()}) for i in (0, 1))
        with self._fill():
            for control, values in ((self.crop, crops), (self.angle, angles)):
                _offer(control, [(f"{value:g}", value) for value in values])
                control.layout.display = "" if len(values) > 1 else "none"
        self._choose_view()

    def _choose_view(self) -> None:
        with self._fill():
            _offer(self.rank, [(_candidate(row), i) for i, row in enumerate(self._candidates())])
        self._choose_rank()

    def _choose_rank(self) -> None:
        row = self.row
        self._nothing("The backbone found nothing in this query, so nothing was matched.")
        with self._fill():
            self.label.value, self.label.disabled = UNCLEAR, True  # until the pair that it is of can be seen
        if row is not None:
            self._show(self.saved.open(row))
        self._show_label()

    # --- showing -------------------------------------------------------------------------------------------

    def _show(self, opened: Opened) -> None:
        self._opened = opened
        with self._fill():
            self.model.value, self.threshold.value = opened.estimator.model, opened.estimator.threshold
            self.similarity.value = -1.0
        self._as_opened = self._found_from()
        pair = opened.pair
        thumbnails = [_thumbnail(path, size) for path, size in zip(pair.paths, pair.sizes, strict=True)]
        self.canvas.show(thumbnails, pair.sizes)
        self._draw()

    def _nothing(self, said: str) -> None:
        self._opened = None
        self.canvas.show([np.zeros((1, 1, 3), np.uint8)] * 2, [(1, 1)] * 2)
        self._say(said)

    def _found_from(self) -> tuple[float, str, float]:
        """What the sliders say the geometry is found from."""
        return self.similarity.value, self.model.value, self.threshold.value

    def _draw(self) -> None:
        """Draw the pair, with a geometry that is found anew once a slider says so."""
        if self._opened is None:
            return
        pair, self._clicked = self._opened.pair, None
        alike, found = np.arange(len(pair.matches)), pair.geometry
        if self._found_from() != self._as_opened:
            alike = np.flatnonzero(pair.matches.similarity >= self.similarity.value)
            estimator, model = self._opened.estimator, self.model.value
            method = estimator.method if model == estimator.model else "auto"
            estimator = replace(estimator, model=model, method=method, threshold=self.threshold.value)
            found = estimator(pair.xy_a[alike], pair.xy_b[alike], *pair.sizes, exif.focal_lengths(*pair.paths))
        shown = np.flatnonzero(found.inliers | (not self.inliers.value))[: self.most.value]
        lines = alike[shown]
        similarity = pair.matches.similarity[lines]
        self.canvas.lines(pair.xy_a[lines], pair.xy_b[lines], similarity, found.inliers[shown])
        self.canvas.outline(pictures.outline(found, pair.sizes[0]), found)
        self._geometry = found
        self._say(_found(pair, found, len(alike), len(lines)))

    def _click(self, side: int, xy: tuple[float, float]) -> None:
        """Show what the nearest token of one side resembles in the other; a second click ends that."""
        if self._opened is None:
            return
        tokens, other = self._opened.tokens[side], self._opened.tokens[1 - side]
        if not len(tokens.xy) or not len(other.xy):
            return
        nearest = int(np.linalg.norm(tokens.xy - xy, axis=1).argmin())
        if self._clicked == (side, nearest):
            self._draw()
            return
        self._clicked = (side, nearest)
        (similarity,) = pictures.similarities(tokens, other, [nearest])
        best = [row for row in pictures.best_two(similarity, other) if row is not None]
        f, size = self._geometry.fundamental, self._opened.pair.sizes[1 - side]
        line = None if f is None else geometry.epipolar_line(f if side == 0 else f.T, tokens.xy[nearest], size)
        self.canvas.similar(side, tokens.xy[nearest], other, similarity, best)
        self.patch.value = _similar(side, tokens.xy[nearest], other, similarity, best)
        if line is not None:
            self.canvas.sides[1 - side].epipolar.set_data(*line.T)
            self.patch.value += " By the geometry it lies on the line."

    def _say(self, said: str) -> None:
        self.said.value, self.patch.value = said, "Click a patch to see what it resembles in the other photograph."

    # --- labels, uploads, pages ------------------------------------------------------------------------------

    def _label(self) -> None:
        row, file = self.row, self.saved.matched.labels
        if row is None:
            return
        said = verdicts.read(file)  # anew, for another notebook may have written it
        said.pop((row["query"], row["candidate"]), None)
        if self.label.value != UNCLEAR:
            said[row["query"], row["candidate"]] = self.label.value
        try:
            verdicts.write(file, said)
        except (ImatchError, OSError):
            self._show_label()  # what is on the disk, not what was wanted
            raise
        self._count(said)

    def _show_label(self) -> None:
        row, said = self.row, verdicts.read(self.saved.matched.labels)
        with self._fill():
            known = None if row is None else said.get((row["query"], row["candidate"]))
            self.label.value, self.label.disabled = known or UNCLEAR, row is None
        self._count(said)

    def _count(self, said: verdicts.Labels) -> None:
        pairs = [(row["query"], row["candidate"]) for rows in self.saved.candidates.values() for row in rows]
        self.progress.value = f"{sum(pair in said for pair in pairs)} of {len(pairs)} pairs have a label"

    def _match(self) -> None:
        given = [upload.value for upload in self.uploads]
        if not all(given):
            raise ImatchError("give two photographs: the buttons query and candidate upload them")
        folder = Path(tempfile.mkdtemp(prefix="imatch-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        files = [folder / str(number) for number in range(2)]
        for file, (upload,) in zip(files, given, strict=True):
            file.write_bytes(upload["content"])
        opened = self.saved.match((given[0][0]["name"], given[1][0]["name"]), (files[0], files[1]))
        with self._fill():
            self.label.value, self.label.disabled = UNCLEAR, True  # labels are of the step's own pairs
        self._show(opened)

    def _export(self) -> None:
        from imatch.viz.html import pair_page

        if self._opened is None:
            raise ImatchError("there is no pair to save: choose a query that found something")
        pair = self._opened.pair
        names = [flat_name(pair.row[side]) for side in ("query", "candidate")]
        path = self.saved.matched.pages / names[0] / f"{names[1]}.html"
        pair_page(pair, *self._opened.tokens, path)
        self.progress.value = f"saved: {_escaped(str(path))}"

    # --- reacting ------------------------------------------------------------------------------------------

    def _reacting(self, reaction: Callable[[], None]) -> Callable[[object], None]:
        """A handler that runs unless the explorer itself is filling its controls, and tells what goes wrong."""

        def react(_: object) -> None:
            if self._filling:
                return
            try:
                reaction()
            except (ImatchError, OSError, ValueError, KeyError) as error:  # to be read, not a traceback in a log
                self._say(f"<b>{'<br>'.join(map(_escaped, str(error).splitlines()))}</b>")

        return react

    @contextmanager
    def _fill(self) -> Iterator[None]:
        self._filling = True
        try:
            yield
        finally:
            self._filling = False


_thumbnail = lru_cache(maxsize=32)(lambda path, size: images.thumbnail(path, size, min(SIDE, max(size))))


def _offer(control: widgets.Dropdown | widgets.SelectionSlider, options: Sequence[tuple[str, str | float]]) -> None:
    """Offer other options; what was chosen stays, where it is among them."""
    wanted, values = control.value, [value for _, value in options]
    control.options = options
    control.value = wanted if wanted in values else values[0] if values else None


def _names(ids: Iterable[str]) -> dict[str, str]:
    """Names that people can read and type -> ids; two that look alike are numbered."""
    named: dict[str, str] = {}
    for id in ids:
        name = printable(id)
        named[name if name not in named else f"{name} ({len(named)})"] = id
    return named


def _candidate(row: PairRow) -> str:
    place = "own photograph" if row["rank"] is None else f"{row['rank'] + 1}, re-ranked {row['reranked'] + 1}"
    return f"{place}: {printable(row['candidate'])} ({row['inliers']} inliers)"


def _found(pair: Pair, found: Geometry, alike: int, drawn: int) -> str:
    """What a pair's geometry says, as HTML."""
    row = pair.row
    names = [f"<b>{_escaped(row[side])}</b>" for side in ("query", "candidate")]
    told = [f"{'verified' if found.verified else 'not verified'}: {found.reason}"]
    told += pictures.told(found, pair.sizes[0])
    if found.matrix is not None and row.get("true_matrix") is not None:
        error = geometry.corner_error(found.matrix, np.array(row["true_matrix"]), pair.sizes[0])
        told.append(f"corners {error:.2f} px from where they truly are")
    colour = GOOD if found.verified else BAD
    return (
        f"{names[0]} → {names[1]}, cosine of the global vectors {row['score']:.3f}<br>"
        f'<span style="border-left: 4px solid {colour}; padding-left: 6px">{_escaped("; ".join(told))}</span><br>'
        f"{drawn} of {alike} correspondences drawn"
    )


def _escaped(text: str) -> str:
    """Text of a name or a reason, as HTML."""
    return html.escape(printable(text))


def _similar(side: int, xy: np.ndarray, other: Tokens, similarity: np.ndarray, best: Sequence[int]) -> str:
    """What a patch resembles in the other photograph, as HTML."""
    told = [
        f'<span style="color: {colour}">●</span> {name} {similarity[i]:.3f} at {_at(other.xy[i])}'
        for i, name, colour in zip(best, ("best", "second best"), (BEST, SECOND), strict=False)
    ]
    return (
        f'<span style="color: {CHOSEN}">●</span> the patch at {_at(xy)} of the '
        f"{('query', 'candidate')[side]}: {', '.join(told)}; all others from {similarity.min():.3f} (dark) on. "
        "Click it again for the lines."
    )


def _at(xy: np.ndarray) -> str:
    return f"({xy[0]:.0f}, {xy[1]:.0f})"
