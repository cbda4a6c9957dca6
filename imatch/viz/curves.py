"""Figures that compare configurations: how often, how far and how surely, each with the words to read it alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from imatch.core import files
from imatch.core.rows import (
    IndexFigures,
    IntervalRecord,
    PairRow,
    QueryRow,
    ReportRow,
    RetrievalFigures,
    StageRow,
    ViewFigures,
)
from imatch.core.types import ImatchError
from imatch.evaluation import calibration, intervals, tables
from imatch.evaluation.calibration import Threshold
from imatch.evaluation.metrics import PIXELS, asked_twice, hit_at_k, recall_at_k, right_hits
from imatch.retrieval import truth

LOOK = {"font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8, "legend.fontsize": 8, "text.parse_math": False}
"""Of matplotlib, while a figure is made: sizes of letters, and that a dollar in a name begins no formula."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito, "Color Universal Design", 2008, with grey for the yellow that white swallows."""
DASHES = ("-", "--", ":", "-.")
"""One a crop, the largest first."""
MEANS = {"ms": "milliseconds a photograph", "megabytes": "megabytes a photograph", "hit_at_1": "Hit@1"}
"""What columns of a table of configurations are called on an axis."""
JOINED = 45
"""Degrees up to which neighbouring angles are joined."""
EDGES = {"corner_error": (1e-2, 1e3), "rotation_error": (1e-3, 180.0), "scale_error": (1e-5, 1.0)}
"""Logarithmic axes have no 0: smaller errors are drawn at the left edge."""


@rc_context(LOOK)
def hit_by_angle(metrics: Mapping[str, RetrievalFigures]) -> Figure:
    """How often a turned and cropped photograph is found first: a polar panel a crop, a heat map a configuration.

    Args:
        metrics: name of a configuration -> `metrics.retrieval_metrics`, of which `by_view` is drawn: crop, angle
            (degrees counter-clockwise), value, low and high (Hit@1 and its 95 % interval), clusters, why.

    Returns:
        The figure; words where no query is a reference.

    >>> view = {"crop": 0.5, "angle": 0, "value": 1.0, "low": None, "high": None, "clusters": 3, "why": "3 are too few"}
    >>> hit_by_angle({"sift": {"by_view": [view]}}).axes[0].get_title()
    'crop 0.5'
    """
    views = {name: of["by_view"] for name, of in metrics.items() if of["by_view"]}
    if not views:
        return words("No Hit@1 by angle: no query that has an answer is a reference with an angle and a crop.")
    every = [view for of in views.values() for view in of]
    crops = sorted({view["crop"] for view in every}, reverse=True)
    angles = sorted({view["angle"] for view in every})
    caption = (
        "Each circle is one crop: the size of the view as a share of the largest one. Around it: by how many degrees "
        "the view is turned counter-clockwise, 0 at the top. Outwards from the centre: Hit@1, the share of views whose "
        f"first hit is the photograph that they were cut from; 1 is best. Points up to {JOINED} degrees apart are "
        f"joined. {_interval_words(every)} Below: the same values, the numbers in per cent."
    )
    if absent := [files.printable(name) for name in metrics if name not in views]:
        caption += f" Not drawn, for no query is a reference: {', '.join(absent)}."
    columns = 1 if len(views) == 1 or len(angles) > 14 else 2
    lines = -(-len(views) // columns)
    width, heat = max(10.0, 3.3 * len(crops)), (0.75 + 0.3 * len(crops)) * lines
    question = "A photograph is turned and cropped: how often is it itself the first hit?"
    figure, body = _frame(width, 5.2 + heat, question, caption)
    above, below = body.subfigures(2, 1, height_ratios=(3.7, heat))

    looks = _looks(views)
    for axis, crop in zip(
        above.subplots(1, len(crops), subplot_kw={"projection": "polar"}, squeeze=False).flat, crops, strict=True
    ):
        axis.set_theta_zero_location("N")
        axis.set_thetagrids(range(0, 360, 45))
        axis.set_title(f"crop {crop:g}")
        for name, of in views.items():
            _around(axis, name, sorted((v for v in of if v["crop"] == crop), key=_turned), looks[name])
        axis.set(ylim=(0, 1.06), yticks=(0.25, 0.5, 0.75, 1), yticklabels=("0.25", "0.5", "0.75", ""))
        axis.tick_params(labelsize=7)
    maps = below.subplots(lines, columns, squeeze=False)
    cell = ((width - 0.9) / columns - 0.65) / len(angles)  # inches
    for axis, (name, of) in zip(maps.flat[: len(views)], views.items(), strict=True):
        found = {(view["crop"], view["angle"]): view["value"] for view in of}
        cells = [[number(found.get((crop, angle))) for angle in angles] for crop in crops]
        shown = axis.imshow(cells, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axis.set_facecolor("white")
        axis.set_title(files.printable(name), fontsize=8, color=looks[name].colour, fontweight="bold", loc="left")
        every_nth = math.ceil(0.3 / cell)
        axis.set_xticks(range(0, len(angles), every_nth), [f"{angle:g}°" for angle in angles[::every_nth]], fontsize=7)
        axis.set_yticks(range(len(crops)), [f"crop {crop:g}" for crop in crops], fontsize=7)
        for (crop, angle), value in found.items() if cell > 0.25 else ():
            colour = "white" if value < 0.5 else "black"
            place = angles.index(angle), crops.index(crop)
            axis.text(*place, f"{100 * value:.0f}", color=colour, fontsize=7, ha="center", va="center")
    for axis in maps.flat[len(views) :]:
        axis.remove()
    bar = below.colorbar(shown, ax=list(maps.flat[: len(views)]), fraction=0.02, pad=0.01)
    bar.set_label("Hit@1", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    _legend(figure, looks)
    return figure


def _around(axis: Axes, name: str, views: Sequence[ViewFigures], look: _Look) -> None:
    """One configuration at one crop; views by angle from 0 to 360."""
    if not views:
        return
    angles = np.array([_turned(view) for view in views])
    value, low, high = (np.array([number(view[key]) for view in views]) for key in ("value", "low", "high"))
    ends = np.append(angles, angles[0] + 360)
    wide = np.diff(ends) > JOINED
    # a straight line between two points of a circle runs inside it, so the arc is drawn degree by degree
    fine = np.union1d(np.arange(math.ceil(ends[0]), ends[-1]), ends)
    apart = wide[np.clip(np.searchsorted(ends, fine, "right") - 1, 0, len(wide) - 1)] & ~np.isin(fine, ends)
    arc, inner, outer = (np.where(apart, np.nan, np.interp(fine, ends, np.append(r, r[0]))) for r in (value, low, high))
    axis.plot(np.radians(fine), arc, color=look.colour, linewidth=look.width)
    axis.fill_between(np.radians(fine), inner, outer, color=look.colour, alpha=0.15, linewidth=0)
    single = wide & np.roll(wide, 1) & np.isfinite(low)
    axis.vlines(np.radians(angles[single]), low[single], high[single], color=look.colour, linewidth=look.width)
    axis.plot(
        np.radians(angles), value, "o", color=look.colour, markersize=look.size, label=name, markeredgecolor="white"
    )


def _turned(view: ViewFigures) -> float:
    return view["angle"] % 360


def _interval_words(views: Sequence[ViewFigures]) -> str:
    counts = sorted({view["clusters"] for view in views if view["low"] is not None})
    why = sorted({view["why"] for view in views if view["low"] is None})
    over = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else ""
    shaded = (
        f"Shaded, or a bar at a single point: 95 % interval over {over} {views[0].get('unit', 'photographs')}."
        if counts
        else ""
    )
    return " ".join([shaded, *(f"No interval: {reason}." for reason in why)]).strip()


@rc_context(LOOK)
def trust(rows: Mapping[str, Sequence[QueryRow]], thresholds: Mapping[str, Threshold], k: int) -> Figure:
    """What is found among the first K, how the scores of right and wrong first hits lie, and what "no match" costs.

    Args:
        rows: name of a configuration -> its rows of queries.jsonl.
        thresholds: name of a configuration -> of `steps.index.judge_index`; one that has none here gets no mark.
        k: up to which K; no configuration's queries were given fewer hits.

    >>> row = {"answers": 1, "right_ranks": [0], "score": 0.9, "score_without": 0.5, "cluster": "a"}
    >>> trust({"sift": [row]}, {}, 3).axes[0].lines[0].get_ydata().tolist()
    [1.0, 1.0, 1.0]
    """
    if not any(rows.values()):
        return words("Nothing to trust or to doubt: there are no queries.")
    rows = {name: of for name, of in rows.items() if of}
    looks = _looks(rows)
    caption = (
        "Left: queries that have an answer in the gallery. Middle and right: each of them is asked as it is, and every "
        "query once more with its answers left out of the gallery, when nothing that it finds is right; were queries "
        "without an answer more common than that, precision would be lower. Right: first hits are believed from some "
        "score on; a lower one believes more right hits (to the right) and more wrong ones (downwards)."
    )
    question = "Is the right photograph found, and when is the first hit to be believed?"
    figure, body = _frame(13.0, max(5.4, 2.3 + 1.2 * len(rows)), question, caption)
    columns = body.add_gridspec(1, 3)
    _depth(body.add_subplot(columns[0]), rows, k, looks)
    stack = columns[1].subgridspec(len(rows), 1)
    for line, (name, of) in enumerate(rows.items()):
        axis = body.add_subplot(stack[line])
        _scores(axis, name, of, thresholds.get(name), looks[name])
        axis.tick_params(labelsize=7)
    axis.set_xlabel("score of the first hit (cosine)")
    _believed(body.add_subplot(columns[2]), rows, thresholds, looks)
    keys = [
        Patch(facecolor="#bbbbbb", label="first hit is right"),
        Patch(facecolor="white", edgecolor="black", hatch="/////", label="first hit is wrong"),
        Line2D([], [], color="black", linewidth=1, label="first hit when its answer is left out"),
    ]
    if thresholds:
        keys += [
            Line2D([], [], color="black", linewidth=1.2, linestyle=":", label="believed from here on"),
            Line2D([], [], color="black", linewidth=1, linestyle="--", label="wanted precision"),
            _mark("o", "believed from the chosen score on"),
            _mark("D", "likewise, on held-out photographs"),
        ]
    _legend(figure, looks, more=keys)
    return figure


def _depth(axis: Axes, rows: Mapping[str, Sequence[QueryRow]], k: int, looks: Mapping[str, _Look]) -> None:
    """Hit@K and Recall@K for K from 1 to k."""
    ks, equal = range(1, k + 1), True
    for name, of in rows.items():
        counted = [row for row in of if row["answers"]]
        if not counted:
            continue
        deepest = max([k, *(rank + 1 for row in counted for rank in row["right_ranks"])])  # k may be another's
        right, answers = right_hits(counted, deepest), np.array([row["answers"] for row in counted])
        hit = [hit_at_k(right, depth).mean() for depth in ks]
        recall = [recall_at_k(right, answers, depth).mean() for depth in ks]
        clusters = [row["cluster"] for row in counted]
        _band(axis, ks, [hit_at_k(right, depth) for depth in ks], clusters, looks[name].colour)
        axis.plot(ks, hit, **looks[name].line(), marker="o", markersize=looks[name].size, label=f"{name} Hit@K")
        if (answers > 1).any():
            equal = False
            axis.plot(ks, recall, color=looks[name].colour, linestyle=":", linewidth=1.5, label=f"{name} Recall@K")
    means = (
        "each query has one right answer,\nso Hit@K and Recall@K are the same"
        if equal
        else "solid, Hit@K: a right answer is among the first K\ndotted, Recall@K: share of right answers among them"
    )
    axis.set(title="found among the first K", xlabel="K", ylabel="share, mean over queries", xlim=(0.7, k + 0.3))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    _plain_axis(axis)
    if axis.lines:
        axis.set_xlabel(f"K\n{means}")
        _up_to_one(axis)
    else:
        _inside(axis, "No query has an answer in the gallery.")


def _scores(axis: Axes, name: str, rows: Sequence[QueryRow], threshold: Threshold | None, look: _Look) -> None:
    scores, right, has_answer, _ = asked_twice(rows)
    there = np.isfinite(scores)
    bins = np.histogram_bin_edges(scores[there], 40)
    groups = [scores[there & mask] for mask in (right, has_answer & ~right, ~has_answer)]
    axis.hist(groups[0], bins, color=look.colour, alpha=0.6)
    axis.hist(groups[1], bins, facecolor="none", edgecolor="black", hatch="/////", linewidth=0)
    axis.hist(groups[2], bins, histtype="step", color="black", linewidth=1)
    counts = "{} right, {} wrong, {} left out".format(*map(len, groups))
    if threshold and threshold.value is not None:
        axis.axvline(threshold.value, color="black", linewidth=1.2, linestyle=":")
        counts += f"; believed from {threshold.value:.4g} on"
    axis.set_title(f"{files.printable(name)}\n{counts}", fontsize=7.5, loc="left", color=look.colour)
    axis.set_yscale("symlog", linthresh=1, linscale=0.4)  # so that a single wrong one is seen
    axis.set_ylim(bottom=0)
    axis.set_ylabel("queries", fontsize=7)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))


def _believed(
    axis: Axes, rows: Mapping[str, Sequence[QueryRow]], thresholds: Mapping[str, Threshold], looks: Mapping[str, _Look]
) -> None:
    """Precision against coverage; reasons stand below the panel."""
    reasons = []
    for name, of in rows.items():
        scores, right, has_answer, _ = asked_twice(of)
        _, precision, coverage = calibration.curve(scores, right, has_answer)
        axis.plot(coverage, precision, **looks[name].line(), label=name)
        if name not in thresholds:
            continue
        chosen = thresholds[name]
        dot = {"color": looks[name].colour, "markeredgecolor": "black", "markersize": looks[name].size + 3}
        if chosen.coverage is not None and chosen.precision is not None:
            axis.plot(chosen.coverage, chosen.precision, "o", **dot)
        if chosen.held_out_coverage is not None and chosen.held_out_precision is not None:
            axis.plot(chosen.held_out_coverage, chosen.held_out_precision, "D", **dot)
        if chosen.why:
            none = "no threshold, " if chosen.value is None else ""
            reasons += textwrap.wrap(f"{files.printable(name)}: {none}{chosen.why}", 62)
    for wanted in sorted({threshold.wanted for threshold in thresholds.values()}):
        axis.axhline(wanted, color="black", linestyle="--", linewidth=1)
    axis.set(xlim=(-0.02, 1.02), ylim=(0, 1.03), title="what believing costs")
    axis.set_xlabel("\n".join(["coverage: share of queries with an answer that are believed", *reasons]))
    axis.set_ylabel("precision: share of the believed that is right")
    _plain_axis(axis)


@rc_context(LOOK)
def errors(pairs: Mapping[str, Sequence[PairRow]]) -> Figure:
    """How exact the found geometry is where the true one is known, over all such pairs and by the reference's angle.

    Args:
        pairs: name of a configuration -> its rows of pairs.jsonl, of which those count that have a true
            matrix. One without a geometry (corner error), or without a verified one (rotation and scale), counts
            as infinitely wrong.

    >>> errors({"sift": []}).texts[0].get_text()[:13]
    'No true error'
    """
    true = {name: [row for row in of if row["has_truth"]] for name, of in pairs.items()}
    if not any(true.values()):
        return words("No true error: of no right pair is the true matrix known; a reference and its source have one.")
    caption = (
        "All pairs of a reference and the photograph that it was cut from, whose true matrix is known exactly. Above: "
        "share of the pairs below an error; a curve ends below 1 by the share of failures; shaded: 95 % intervals, by "
        "resampling whole photographs. Below: medians over all pairs by the rotation of the reference, failures "
        "counted as infinitely wrong, so a line breaks where more than half fail. A corner error fails without a "
        f"geometry, rotation and scale without a verified one. Errors below {EDGES['corner_error'][0]:g} pixels, "
        f"{EDGES['rotation_error'][0]:g} degrees and {100 * EDGES['scale_error'][0]:g} % are drawn as that."
    )
    looks = _looks(true)
    every = [row for of in true.values() for row in of]
    edges = {key: (low, max([high, *(number(row[key], 0) for row in every)])) for key, (low, high) in EDGES.items()}
    crops = sorted({row["crop"] for row in every}, key=lambda crop: -number(crop, math.inf))
    figure, body = _frame(12.5, 7.6, "How exact is the geometry that was found?", caption)
    above, below = body.subplots(2, 3)
    for name, of in true.items():
        for crop, dashes in zip(crops, cycle(DASHES), strict=False):
            part = [row for row in of if row["crop"] == crop]
            if part:
                line = {**looks[name].line(), "linestyle": dashes, "label": f"{name}, {_crop(crop)}"}
                if dashes != "-":  # white gaps show on a solid line of the same colour
                    line |= {"linewidth": 0.7 * looks[name].width, "gapcolor": "white"}
                _errors(part, above, below, edges, line, looks[name].size)
    titles = ("corner error", "rotation error", "scale error")
    units = ("pixels", "degrees", "1 % is one hundredth too large or too small")
    for axis, title, unit in zip(above, titles, units, strict=True):
        axis.set_title(title, pad=16)
        axis.set(xlabel=unit, ylabel="share of pairs below" if axis is above[0] else "", ylim=(-0.02, 1.03))
    _thresholds(above[0], PIXELS, "px")
    turned = [0.0, 330.0, *(number(row["angle"], 0) for row in every)]
    titles = ("median rotation error by angle", "median scale error by angle", "failures by angle")
    units = ("degrees", "too large or too small", "share of pairs not verified")
    for axis, title, unit in zip(below, titles, units, strict=True):
        axis.set(title=title, xlabel="rotation of the reference, degrees counter-clockwise", ylabel=unit)
        axis.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 1.5, 3, 4.5, 9, 10]))
        axis.set_xlim(min(turned) - 8, max(turned) + 8)
    below[2].set_ylim(-0.02, 1.03)
    for axis in below[:2]:
        drawn = np.concatenate([[0.01], *(line.get_ydata() for line in axis.lines)])
        low, high = np.nanmin(drawn), np.nanmax(drawn)
        axis.set_ylim(10 ** math.floor(np.log10(low) - 0.05), 10 ** math.ceil(np.log10(high) + 0.05))
    for axis in (*above, *below):
        _plain_axis(axis)
    for ruler in (above[0].xaxis, above[1].xaxis, below[0].yaxis):
        _decades(ruler)
    for ruler in (above[2].xaxis, below[1].yaxis):
        _decades(ruler, 100, " %")
    for axis in below:
        if not axis.lines:
            _inside(axis, "No angle: the queries are no references.")
    told = {name: f"{files.printable(name)} ({_failed(of)})" for name, of in true.items()}
    styles = [
        Line2D([], [], color="grey", linestyle=dashes, label=_crop(crop))
        for crop, dashes in zip(crops, cycle(DASHES), strict=False)
    ]
    _legend(figure, looks, told, styles)
    return figure


def _errors(
    rows: Sequence[PairRow],
    above: Sequence[Axes],
    below: Sequence[Axes],
    edges: Mapping[str, tuple[float, float]],
    line: dict[str, str | float],
    size: float,
) -> None:
    """One configuration at one crop in all six panels."""
    angles = sorted({row["angle"] for row in rows if row["angle"] is not None})
    parts = [[row for row in rows if row["angle"] == angle] for angle in angles]
    for axis, (key, ends) in zip(above, edges.items(), strict=True):
        values = np.array([number(row[key], math.inf) for row in rows])
        at = np.geomspace(*ends, 13)
        _band(axis, at, [values <= error for error in at], [row["cluster"] for row in rows], line["color"])
        _cumulated(axis, values, ends, **line)
    marked = {**line, "marker": "o", "markersize": size}
    for axis, key in zip(below[:2], ("rotation_error", "scale_error"), strict=True):
        medians = [np.median([number(row[key], math.inf) for row in part]) for part in parts]
        if angles:
            drawn = np.where(np.isfinite(medians), np.maximum(medians, edges[key][0]), np.nan)
            axis.plot(angles, drawn, **marked)
    if angles:
        below[2].plot(angles, [np.mean([row["rotation_error"] is None for row in part]) for part in parts], **marked)


def _crop(crop: float | None) -> str:
    return "no crop" if crop is None else f"crop {crop:g}"


def _failed(rows: Sequence[PairRow]) -> str:
    failed = sum(row["rotation_error"] is None for row in rows)
    return f"{len(rows)} pairs, {failed / len(rows):.1%} not verified" if rows else "no such pair"


@rc_context(LOOK)
def metres(rows: Mapping[str, Sequence[QueryRow]]) -> Figure:
    """How far from where a query was taken its first hit was, and the nearest of all its hits.

    Args:
        rows: name of a configuration -> its rows of queries.jsonl: metres (of the first hit) and least_metres (of
            the nearest of all k), None where unknown. As in `truth.position_figures`, queries without any known
            distance are left out, and a first hit of unknown distance is within no distance.

    >>> metres({"sift": [{"metres": None, "least_metres": None}]}).texts[0].get_text()[:9]
    'No metres'
    """
    known = {name: [row for row in of if row["least_metres"] is not None] for name, of in rows.items()}
    known = {name: of for name, of in known.items() if of}
    if not known:
        return words("No metres: of no query and hit are both positions known (EXIF, or a file of labels).")
    caption = (
        "Share of the queries whose hit was taken within a distance of the query. Hits nearer than a metre stand at "
        "the left edge; a curve that ends below 1 lacks hits whose position is unknown."
    )
    looks = _looks(known)
    figure, body = _frame(9.5, 4.8, "How many metres from the query was the hit taken?", caption)
    left, right = body.subplots(1, 2, sharey=True)
    every = [row for of in known.values() for row in of]
    furthest = max([1e3, *(number(row[key], 0) for row in every for key in ("metres", "least_metres"))])
    for axis, key, title in ((left, "metres", "first hit"), (right, "least_metres", "nearest of all K hits")):
        for name, of in known.items():
            values = [number(row[key], math.inf) for row in of]
            _cumulated(axis, values, (1.0, furthest), label=name, **looks[name].line())
        axis.set_title(title, pad=16)
        axis.set(xlabel="metres", ylim=(-0.02, 1.03))
        _thresholds(axis, truth.METRES, "m")
        _plain_axis(axis)
        _decades(axis.xaxis)
    left.set_ylabel("share of queries within")
    told = {}
    for name, of in known.items():
        unknown = len(rows[name]) - len(of)
        told[name] = (
            f"{files.printable(name)} ({len(of)} queries{f', {unknown} more of unknown place' if unknown else ''})"
        )
    _legend(figure, looks, told)
    return figure


@rc_context(LOOK)
def pareto(table: Sequence[ReportRow], x: str, y: str) -> Figure:
    """What a configuration costs and what it gives, a panel a question; those that no other beats in both are joined.

    Args:
        table: one row a configuration: name (or label, a shorter one), the cost under the name `x` (above 0), the
            worth under the name `y` (in [0, 1]), low and high of its 95 % interval (None: no interval), question
            (what it answers, if rows answer several: only answers to the same one are compared). Rows without a cost or
            a worth (None) are named below the figure.
        x, y: names of columns, which name the axes too; `MEANS` has words for some.

    Raises:
        ImatchError: a cost is not above 0.

    >>> table = [{"name": "sift", "ms a photograph": 20, "Recall@1": 0.9, "low": 0.8, "high": 0.95}]
    >>> pareto(table, "ms a photograph", "Recall@1").axes[0].get_xlabel()
    'ms a photograph (logarithmic; less is better)'
    """
    shown = [row for row in table if row[x] is not None and row[y] is not None]
    if not shown:
        return words(f"Nothing to weigh: no configuration has both {MEANS.get(x, x)} and {MEANS.get(y, y)}.")
    if wrong := [row for row in shown if not row[x] > 0]:
        raise ImatchError(f"{x} of {_named(wrong[0])} is {wrong[0][x]}: a cost is above 0, and None if unknown")
    caption = (
        "One point a configuration, its bar the 95 % interval. Blue and joined: no other one is at least as cheap and "
        "as good. Grey: some other one is."
    )
    if absent := [_named(row) for row in table if row[x] is None or row[y] is None]:
        caption += textwrap.shorten(f" Not measured: {', '.join(absent)}", 300, placeholder=" ...")
    questions: dict[str, list[ReportRow]] = {}
    for row in shown:
        questions.setdefault(row.get("question", ""), []).append(row)
    columns = min(2, len(questions))
    lines = -(-len(questions) // columns)
    figure, body = _frame(4 + 4.5 * columns, 1.3 + 3.6 * lines, "What does it cost, and what is it worth?", caption)
    panels = body.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axis in panels.flat[len(questions) :]:
        axis.set_visible(False)
    for axis, (question, rows) in zip(panels.flat, questions.items(), strict=False):
        _weigh(axis, rows, x, y)
        axis.set_title(files.printable(question))
        axis.set_xlabel(f"{MEANS.get(x, x)} (logarithmic; less is better)")
        axis.set_ylabel(f"{MEANS.get(y, y)} (more is better)")
    return figure


def _named(row: ReportRow) -> str:
    return files.printable(row.get("label", row["name"]))


def _beats(other: ReportRow, row: ReportRow, x: str, y: str) -> bool:
    return other[x] <= row[x] and other[y] >= row[y] and (other[x] < row[x] or other[y] > row[y])


def _coincide(row: ReportRow, other: ReportRow, x: str, y: str) -> bool:
    return math.isclose(row[x], other[x], rel_tol=0.02) and math.isclose(row[y], other[y], abs_tol=0.01)


def _weigh(axis: Axes, rows: Sequence[ReportRow], x: str, y: str) -> None:
    """The points by number, best first, and beside the panel what the numbers mean."""
    ranked = sorted(rows, key=lambda row: (-row[y], row[x], _named(row)))
    best = [row for row in ranked if not any(_beats(other, row, x, y) for other in ranked)]
    front = sorted(best, key=lambda row: (row[x], row[y]))
    axis.plot([r[x] for r in front], [r[y] for r in front], color=COLOURS[0], linewidth=2, zorder=2)
    marks = []
    for number, row in reversed([*enumerate(ranked, 1)]):  # the best on top
        colour = COLOURS[0] if row in best else "#7F7F7F"
        label = f"{number}  {_named(row)}"
        marks += axis.plot(
            row[x], row[y], "o", color=colour, markersize=13, label=label, zorder=4, markeredgecolor="white"
        )
        together = [n for n, other in enumerate(ranked, 1) if _coincide(row, other, x, y)]
        if number == together[0]:  # of points that coincide, one bears the numbers of all
            aside, ink, side = (9, colour, "left") if len(together) > 1 else (0, "white", "center")
            told, look = ", ".join(map(str, together)), {"color": ink, "ha": side, "va": "center", "fontsize": 7}
            axis.annotate(told, (row[x], row[y]), (aside, 0), textcoords="offset points", zorder=5, **look)
        if row["low"] is not None and row["high"] is not None:
            axis.vlines(row[x], row["low"], row["high"], color=colour, linewidth=1.5, zorder=3)
    axis.set_xscale("log")
    axis.margins(0.1)
    _plain_axis(axis)
    _decades(axis.xaxis)
    axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # costs may all lie within one decade
    axis.tick_params(which="minor", labelsize=7)
    axis.legend(handles=marks[::-1], fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0), markerscale=0.5)


@dataclass(frozen=True)
class _Look:
    """How a configuration is drawn: later ones narrower, so that lines and points that coincide are all seen."""

    colour: str
    width: float
    size: float

    def line(self) -> dict[str, str | float]:
        return {"color": self.colour, "linewidth": self.width}


def _looks(names: Collection[str]) -> dict[str, _Look]:
    n = len(names)
    clear = n <= len(COLOURS)
    widths = np.linspace(1.3 + min(1.2 * (n - 1), 5.0), 1.3, n) if clear else np.full(n, 0.8)
    colours = COLOURS[:n] if clear else [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, 0.88, n))]
    return {
        name: _Look(colour, float(width), float(width) + (2.5 if clear else 1.5))
        for name, colour, width in zip(names, colours, widths, strict=True)
    }


def _frame(width: float, height: float, question: str, caption: str) -> tuple[Figure, SubFigure]:
    """A figure with a question above, the words to read it below that, and the part to draw on."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07)
    figure.suptitle(question, x=0.01, ha="left", fontsize=12, fontweight="bold")
    body = figure.subfigures(1, 1)
    body.suptitle(textwrap.fill(caption, int(width * 17.5)), x=0.01, ha="left", fontsize=8)
    return figure, body


@rc_context(LOOK)
def words(sentence: str) -> Figure:
    """A figure that says why there is none.

    >>> words("No photograph costs $.").texts[0].get_text()
    'No photograph costs $.'
    """
    figure = Figure(figsize=(8, 1), layout="constrained")
    figure.text(0.02, 0.5, textwrap.fill(sentence, 110), fontsize=9, va="center")
    return figure


def _inside(axis: Axes, sentence: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.minorticks_off()
    axis.text(0.5, 0.5, textwrap.fill(sentence, 40), ha="center", va="center", transform=axis.transAxes)


def _legend(
    figure: Figure, looks: Mapping[str, _Look], told: Mapping[str, str] | None = None, more: Sequence[Artist] = ()
) -> None:
    """Below all panels: a line a configuration, then what else needs a word."""
    lines = [Line2D([], [], **look.line(), label=(told or {}).get(n, files.printable(n))) for n, look in looks.items()]
    for handles, place, share in ((lines, "left", 0.55), (more, "right", 0.45)):
        room = figure.get_figwidth() * (share if more else 1)  # inches
        longest = max((len(handle.get_label()) for handle in handles), default=0)
        columns = max(1, int(room / (0.056 * longest + 0.45)))
        if handles:
            place = place if more else "center"
            figure.legend(handles=handles, loc=f"outside lower {place}", ncols=min(columns, len(handles)))


def _mark(marker: str, label: str) -> Line2D:
    return Line2D([], [], color="#bbbbbb", marker=marker, markeredgecolor="black", linestyle="none", label=label)


def _cumulated(axis: Axes, values: Sequence[float], edges: tuple[float, float], **line: str | float) -> None:
    """The share of values up to each, drawn from edge to edge; infinite ones are never reached."""
    ranked = np.sort(np.asarray(values, float))
    ranked = ranked[np.isfinite(ranked)]
    share = np.arange(len(ranked) + 1) / len(values)
    axis.step([edges[0], *np.maximum(ranked, edges[0]), edges[1]], [*share, share[-1]], where="post", **line)
    axis.set(xscale="log", xlim=edges)


def _decades(ruler: Axis, factor: float = 1, unit: str = "") -> None:
    """A logarithmic axis in plain numbers, one a decade."""
    ruler.axes.set(**{f"{ruler.axis_name}scale": "log"})
    ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:g}{unit}"))
    ruler.set_minor_formatter(NullFormatter())


def _band(axis: Axes, x: Sequence[float], shares: Sequence[np.ndarray], clusters: Sequence[str], colour: str) -> None:
    """The 95 % intervals of the shares at each x; nothing where there are too few clusters."""
    found = [intervals.interval(values.astype(float), clusters, resamples=500) for values in shares]
    if found and all(one.low is not None for one in found):
        low, high = ([getattr(one, end) for one in found] for end in ("low", "high"))
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0, zorder=0)


def _thresholds(axis: Axes, at: Sequence[float], unit: str) -> None:
    """Thin lines at round values, named above the panel, where no data is."""
    for value in at:
        axis.axvline(value, color="grey", linewidth=0.8, zorder=0)
        named = f"{value:g} {unit}" if value == at[-1] else f"{value:g}"
        side = "left" if value == at[-1] else "right" if value == at[0] else "center"
        axis.annotate(named, (value, 1), (0, 2), ("data", "axes fraction"), "offset points", fontsize=7, ha=side)


def _up_to_one(axis: Axes) -> None:
    """The axis of shares from the tenth below all that is drawn."""
    floor = max(0.0, math.floor(axis.dataLim.y0 * 10 - 0.5) / 10)
    axis.set_ylim(floor, 1 + 0.04 * (1 - floor))


def _plain_axis(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=7)


def number(value: float | None, missing: float = math.nan) -> float:
    """What is unknown as a number that can be drawn.

    >>> number(0.5), number(None), number(None, 0)
    (0.5, nan, 0)
    """
    return missing if value is None else value


LABELS = 12
"""Efforts that are named on an axis at most."""
SAID = {"better": (COLOURS[2], "better"), "worse": (COLOURS[1], "worse: it hurts")}
"""Colour and words for what `tables.difference_said` says; the rest is grey."""
GREY = COLOURS[7]


@rc_context(LOOK)
def recall_curve(index: IndexFigures) -> Figure:
    """What an approximate index finds of that which exact search finds, against its effort and against time.

    Args:
        index: of `steps.index.tune_index`. Drawn: curve (effort, recall in [0, 1] and ms a query of each point that was
            tried; empty for an exact kind), effort (name and value, None without one), wanted_recall, and search_ms and
            exact_ms (milliseconds a query), which are timed alike, so that search_ms is drawn as the time of the chosen
            effort. Told: kind, reason, vectors, dimension, bytes_a_vector, backend, k, sample (queries).

    Returns:
        The figure, without the panel of efforts where there is none to choose; words for an exact kind.

    >>> exact = {"kind": "flat", "curve": [], "search_ms": 0.9, "bytes_a_vector": 1536.0}
    >>> recall_curve(exact).texts[0].get_text()
    'flat is exact: recall 1 by definition; 0.9 ms a query, 1536 bytes a vector'
    """
    kind, points, size = files.printable(index["kind"]), index["curve"], f"{index['bytes_a_vector']:.0f} bytes a vector"
    if not points:
        return words(f"{kind} is exact: recall 1 by definition; {_short(index['search_ms'])} ms a query, {size}")
    effort, k, exact = index["effort"], index["k"], index["exact_ms"]
    at = next(i for i, point in enumerate(points) if effort is None or point["effort"] == effort["value"])
    chosen = {**points[at], "ms": index["search_ms"]}
    points = [*points[:at], chosen, *points[at + 1 :]]
    caption = (
        f"Why {kind}: {files.printable(index['reason']).rstrip('.')}. Recall@{k}: of the {k} neighbours of exact "
        f"search, what share the index finds, too, right or wrong; mean over {index['sample']} queries. "
        f"Times: {files.printable(index['backend'])}, all these queries in one batch."
    )
    if exact <= chosen["ms"]:
        caption += " Exact search is no slower here: the index saves no time."
    title = f"{kind} of {index['vectors']:,} vectors: {size} beside {4 * index['dimension']} of the exact index"
    figure, body = _frame(10.5 if effort else 7.5, 5.0, title, caption)
    panels = body.subplots(1, 2 if effort else 1, squeeze=False).flat
    told = f"recall {chosen['recall']:.3f}"
    if effort:
        told = f"{files.printable(effort['name'])} {effort['value']}, {told}"
        _tried(panels[0], index, points, chosen, "effort")
        efforts = [point["effort"] for point in points]
        shown = efforts[:: math.ceil(len(efforts) / LABELS)]
        panels[0].set_xscale("log", base=2)
        panels[0].set_xlim(efforts[0] / 1.5, efforts[-1] * 1.5)
        panels[0].set_xticks(shown, [f"{value:g}" for value in shown])
        panels[0].minorticks_off()
        panels[0].set_title(f"recall for effort\nchosen: {told}")
        panels[0].set_xlabel(f"{files.printable(effort['name'])} (more looks at more of the vectors)")
    axis = panels[-1]
    _tried(axis, index, points, chosen, "ms")
    named = f"exact search: {_short(exact)} ms a query"
    axis.plot(exact, 1.0, "D", color="black", markeredgecolor="white", markersize=9, zorder=5, label=named)
    axis.margins(x=0.1)
    _decades(axis.xaxis)
    low, high = axis.get_xlim()
    if high < 100 * low:  # there may be no whole decade within
        axis.xaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.tick_params(which="minor", labelsize=7)
    axis.set_title(f"recall for time\nchosen: {told}, {_short(chosen['ms'])} ms a query")
    axis.set_xlabel("milliseconds a query (logarithmic; less is better)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4 if effort else 2)
    return figure


_Point = Mapping[str, float | None]


def _tried(axis: Axes, index: IndexFigures, points: Sequence[_Point], chosen: _Point, key: str) -> None:
    """All points that were tried, against what `key` names, with the recall that was asked for."""
    recalls, wanted = [point["recall"] for point in points], index["wanted_recall"]
    colour, word = (COLOURS[2], "the first to reach it")
    if chosen["recall"] < wanted:
        colour, word = (COLOURS[1], "the best there is, which FALLS SHORT")
    axis.plot([point[key] for point in points], recalls, "o-", color=COLOURS[0], label="what was tried")
    axis.axhline(wanted, color="black", linestyle="--", linewidth=1, label=f"asked for: recall {wanted:g}")
    axis.plot(
        chosen[key],
        chosen["recall"],
        "o",
        color=colour,
        markeredgecolor="black",
        markersize=11,
        label=f"chosen: {word}",
    )
    _up_to_one(axis)
    axis.set_ylabel(f"recall@{index['k']} against exact search")
    _plain_axis(axis)


@rc_context(LOOK)
def stages(stages: Sequence[StageRow]) -> Figure:
    """What each option of a search adds: Hit@1 by row, and beside it the change from the row above.

    Args:
        stages: at least one row, as `tables.stage_table` takes them.

    Returns:
        The figure; words where nothing was added to the plain search, or no query has an answer.

    >>> few = {"low": None, "high": None, "clusters": 3, "why": "3 photographs are too few, 8 are the least"}
    >>> plain = {"stage": "plain", "hit_at_1": {"value": 0.5} | few, "ms": 0.2, "difference": None}
    >>> stages([plain]).texts[0].get_text()[:34]
    'plain search; nothing was added: H'
    """
    start = stages[0]["hit_at_1"]
    if start["value"] is None:
        return words(f"What the options add cannot be told: {start['why']}.")
    if len(stages) == 1:
        found = intervals.Interval(**start)
        return words(f"plain search; nothing was added: Hit@1 {found}, {_short(stages[0]['ms'])} ms a query")
    records = [row[key] for row in stages for key in ("hit_at_1", "difference") if row[key]]
    caption = (
        "Each row adds one option to all that the row above has, and asks the same queries. Left: Hit@1, the share of "
        "queries whose first hit is right. Right: by how much the row changes it, query by query, against the row "
        "above; where the bar lies on one side of the zero line, it is more than chance."
    )
    if any(record["low"] is not None for record in records):
        caption += f" Bars: 95 % intervals over {start['clusters']} photographs or captures."
    caption += "".join(f" No interval: {why}." for why in sorted({record["why"] for record in records} - {""}))
    figure, body = _frame(10.5, 2.0 + 0.6 * len(stages), "What does each option of the search add?", caption)
    left, right = body.subplots(1, 2, sharey=True)
    for line, row in enumerate(stages):
        _bar(left, line, row["hit_at_1"], COLOURS[0], f"{row['hit_at_1']['value']:z.2f}")
        if row["difference"]:
            colour, word = SAID.get(said := tables.difference_said(row["difference"]), (GREY, said))
            _bar(right, line, row["difference"], colour, f"{row['difference']['value']:+z.3f}")
            _aside(right, line, word, colour)
        else:
            _aside(right, line, "to start from", GREY)
    left.set_yticks(
        range(len(stages)), [f"{files.printable(row['stage'])}\n{_short(row['ms'])} ms a query" for row in stages]
    )
    left.set_ylim(len(stages) - 0.5, -0.6)
    right.axvline(0, color="black", linewidth=1, zorder=1)
    left.set_title("Hit@1 (more is better)")
    right.set_title("change of Hit@1 from the row above")
    for axis in (left, right):
        axis.margins(x=0.1)
        _plain_axis(axis)
        axis.tick_params(axis="y", length=0, labelsize=8)
    return figure


def _bar(axis: Axes, line: int, record: IntervalRecord, colour: str, told: str) -> None:
    if record["low"] is not None:
        axis.hlines(line, record["low"], record["high"], color=colour, linewidth=2.5)
    axis.plot(record["value"], line, "o", color=colour, markersize=8, markeredgecolor="white", label=told)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axis.annotate(told, (record["value"], line), (0, 8), textcoords="offset points", ha="center", bbox=paper)


def _aside(axis: Axes, line: int, word: str, colour: str) -> None:
    """Words beside the panel, where nothing is drawn."""
    axis.text(1.02, line, word, transform=axis.get_yaxis_transform(), color=colour, fontweight="bold", va="center")


def _short(ms: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{float(f'{ms:.3g}'):,g}"
