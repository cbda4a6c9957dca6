"""Two photographs side by side on a canvas that can be clicked (ipympl), with lines and similarities over them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import cv2
import matplotlib
import numpy as np
from matplotlib.backend_bases import MouseButton, MouseEvent, RendererBase
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.transforms import IdentityTransform

from imatch.denseft import covered
from imatch.records import Tokens

if TYPE_CHECKING:
    from ipympl.backend_nbagg import Canvas
    from matplotlib.axes import Axes

BEST, SECOND, CHOSEN = "#7fff00", "#ff9f1c", "#00e5ff"
"""Colours of the best match, the second best, and the patch that was clicked."""
FOUND, NOT_FOUND = "#5adc5a", "#eb5a50"
"""Colours of the outline of a verified geometry and of one that is not."""
OUTLIER = (0.92, 0.35, 0.31, 0.6)


class PairCanvas:
    """A figure of two photographs, A on the left and B on the right, each in pixels of its original.

    Artists stay and only their data changes, so that a slider redraws at once. Zooming moves one photograph; the lines
    follow.

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
        """Show two photographs and nothing over them.

        Args:
            photographs: two (h, w, 3) uint8 RGB of any resolution.
            sizes: (h, w) of the originals, in whose pixels everything is drawn.
        """
        for side, pixels, size in zip(self.sides, photographs, sizes, strict=True):
            side.show(pixels, size)
        none = np.zeros((0, 2))
        self.lines(none, none, np.zeros(0), np.zeros(0, bool))

    def lines(self, xy_a: np.ndarray, xy_b: np.ndarray, similarity: np.ndarray, inliers: np.ndarray) -> None:
        """Join correspondences by lines, inliers from dark blue (similarity 0.7) to yellow (1.0), others red.

        Args:
            xy_a, xy_b: (m, 2) pixels of A and of B.
            similarity: (m,) cosine.
            inliers: (m,) bool.
        """
        for side in self.sides:
            side.forget()
        colours = matplotlib.colormaps["viridis"]((similarity - 0.7) / 0.3)
        colours[~inliers] = OUTLIER
        self._lines.join(xy_a, xy_b, colours)
        self.widget.draw_idle()

    def outline(self, corners: np.ndarray | None, verified: bool) -> None:
        """Draw the outline of A in B, (4, 2) pixels of B: green when verified, else red. None draws none."""
        closed = np.zeros((0, 2)) if corners is None else np.vstack([corners, corners[:1]])
        self.sides[1].outline.set_data(*closed.T)
        self.sides[1].outline.set_color(FOUND if verified else NOT_FOUND)
        self.widget.draw_idle()

    def similar(self, side: int, xy: np.ndarray, other: Tokens, similarity: np.ndarray, best: Sequence[int]) -> None:
        """Show how similar a token of one side is to every token of the other one, in place of the lines.

        Args:
            side: 0 when the token is of A, 1 when it is of B.
            xy: (2,) its pixel.
            other: the tokens of the other side; cells when they lie on a grid, else dots.
            similarity: (n,) cosine with each of them.
            best: which of them is the most similar and, if there is one, the second best (`pictures.best_two`).
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

    def show(self, pixels: np.ndarray, size: tuple[int, int]) -> None:
        self.size = h, w = size
        self.photograph.set_data(cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA))  # without alpha it is drawn in float, slowly
        self.photograph.set_extent((-0.5, w - 0.5, h - 0.5, -0.5))
        self.axes.set(xlim=(-0.5, w - 0.5), ylim=(h - 0.5, -0.5))
        self.outline.set_data([], [])
        self.forget()

    def forget(self) -> None:
        """Take the similarity away."""
        self.cells.set_visible(False)
        self.dots.set_visible(False)
        self.marks.set_visible(False)

    def colour(self, tokens: Tokens, similarity: np.ndarray) -> None:
        self.forget()
        span = (similarity.min(), similarity.max()) if len(similarity) else (0, 1)
        if tokens.grid is None:
            order = np.argsort(similarity, kind="stable")  # the most similar on top
            self.dots.set_offsets(tokens.xy[order])
            self.dots.set(array=similarity[order], clim=span, visible=True)
            return
        h, w = covered(tokens, self.size)
        (rows, columns), (x, y) = tokens.grid, tokens.xy[0]
        left, top = x - w / columns / 2, y - h / rows / 2
        self.cells.set(data=similarity.reshape(tokens.grid), clim=span, visible=True)
        self.cells.set_extent((left, left + w, top + h, top))

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
