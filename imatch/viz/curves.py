"""Figures of numbers, which compare configurations; a sentence in place of one where there is nothing to draw.

What one shows stands above it in the notebook and below it in report.html.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle

import numpy as np
from cycler import cycler
from matplotlib import colormaps, font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator

from imatch.core import files
from imatch.core.rows import IndexFigures, PairRow, QueryRow, ReportRow, RetrievalFigures
from imatch.core.types import ImatchError
from imatch.evaluation import calibration, intervals
from imatch.evaluation.calibration import Threshold
from imatch.evaluation.metrics import asked_twice, hit_at_k, recall_at_k, right_hits
from imatch.retrieval import truth

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
"""Okabe and Ito, "Color Universal Design", 2008, with grey for the yellow that white swallows."""
RIGHT, WRONG, UNKNOWN = COLOURS[2], COLOURS[1], COLOURS[7]
"""On paper: what is right, what is wrong, and of what nobody knows."""
KOREAN = ("Noto Sans CJK KR", "NanumGothic", "Malgun Gothic", "AppleGothic")
STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.titlesize": 9,
    "figure.constrained_layout.h_pad": 0.1,  # inches; with less, titles of photographs are cut
    "figure.constrained_layout.use": True,
    "font.family": ["DejaVu Sans", *(name for name in KOREAN if name in font_manager.get_font_names())],
    "font.size": 8,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a dollar in a name begins no formula
}
"""Of matplotlib, while a figure is made."""
DASHES = ("-", "--", ":", "-.")
"""One a crop, the largest first."""
MARKS = [{"marker": marker, "color": colour} for marker in "os^Dv" for colour in COLOURS]
"""One a configuration, where each is a point."""
MEANS = {"ms": "milliseconds a photograph", "megabytes": "megabytes a photograph", "hit_at_1": "Hit@1"}
"""What columns of a table of configurations are called on an axis."""
ERRORS = {
    "corner_error": ("corner error, pixels", (1e-2, 1e3)),
    "rotation_error": ("rotation error, degrees", (1e-3, 180.0)),
    "scale_error": ("scale error (0.01 is 1 %)", (1e-5, 1.0)),
}
"""Their names, and between which ones they are drawn."""


@rc_context(STYLE)
def hit_by_angle(metrics: Mapping[str, RetrievalFigures]) -> Figure | str:
    """How often a rotated and cropped photograph is itself the first hit: a panel a crop, a line a configuration.

    Args:
        metrics: name of a configuration -> `metrics.retrieval_metrics`, of which `by_view` is drawn.

    >>> view = {"crop": 0.5, "angle": 0, "value": 1.0, "low": None, "high": None}
    >>> hit_by_angle({"sift": {"by_view": [view]}}).axes[0].get_title()
    'crop 0.5'
    """
    shown = {name: of["by_view"] for name, of in metrics.items() if of["by_view"]}
    crops = sorted({view["crop"] for views in shown.values() for view in views}, reverse=True)
    if not crops:
        return "No Hit@1 by angle: no query that has an answer is a reference with an angle and a crop."
    figure = Figure(figsize=(3.0 + 4.0 * len(crops), 3.6))
    panels = figure.subplots(1, len(crops), sharex=True, sharey=True, squeeze=False).flat
    for axis, crop in zip(panels, crops, strict=True):
        for name, look in _looks(shown).items():
            views = sorted((view for view in shown[name] if view["crop"] == crop), key=lambda view: view["angle"])
            value, low, high = (np.array([number(view[key]) for view in views]) for key in ("value", "low", "high"))
            turns, around = [view["angle"] for view in views], [value - low, high - value]
            label = files.printable(name)
            axis.errorbar(turns, value, around, fmt="o-", elinewidth=1, capsize=2, label=label, **look)
        axis.set(title=f"crop {crop:g}", ylim=(-0.03, 1.03), ylabel="Hit@1" if crop == crops[0] else "")
        angles(axis)
    _legend(figure)
    return figure


@rc_context(STYLE)
def trust(rows: Mapping[str, Sequence[QueryRow]], thresholds: Mapping[str, Threshold], k: int) -> Figure | str:
    """What is found among the first K, how the scores of right and wrong first hits lie, and what "no match" costs.

    Args:
        rows: name of a configuration -> its rows of queries.jsonl.
        thresholds: name of a configuration -> of `steps.index.judge_index`; one that has none here gets no mark.
        k: up to which K; no configuration's queries were given fewer hits.

    >>> row = {"answers": 1, "right_ranks": [0], "score": 0.9, "score_without": 0.5, "cluster": "a"}
    >>> trust({"sift": [row]}, {}, 3).axes[0].lines[0].get_ydata().tolist()
    [1.0, 1.0, 1.0]
    """
    rows = {name: of for name, of in rows.items() if any(row["answers"] for row in of)}
    if not rows:
        return "Nothing to trust or to doubt: no query has an answer in the gallery."
    figure = Figure(figsize=(14.0, max(4.0, 1.4 * len(rows))))
    grid = figure.add_gridspec(len(rows), 3)
    found, believed = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:, 2])
    for line, (name, look) in enumerate(_looks(rows).items()):
        label, threshold = files.printable(name), thresholds.get(name)
        _depth(found, rows[name], k, label, look)
        scores = figure.add_subplot(grid[line, 1])
        _scores(scores, rows[name], threshold, look["color"])
        doubted = threshold is not None and threshold.value is None
        scores.set_title(f"{label}: no score is believed" if doubted else label, color=look["color"])
        _believed(believed, rows[name], threshold, look)
    scores.set_xlabel("score of the first hit (cosine)")
    found.set(title="found among the first K", xlabel="K", ylabel="share of queries (Recall@K: of answers)")
    found.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    _up_to_one(found)
    for wanted in sorted({threshold.wanted for threshold in thresholds.values()}):
        believed.axhline(wanted, color="black", linestyle="--", linewidth=1, label="wanted precision")
    believed.set(xlim=(-0.02, 1.02), ylim=(0, 1.03), title="what believing costs")
    believed.set(xlabel="coverage: share of answerable queries", ylabel="precision: share that is right")
    _legend(figure, (found, believed))
    return figure


def _depth(axis: Axes, rows: Sequence[QueryRow], k: int, label: str, look: Mapping[str, str | float]) -> None:
    """Hit@K for K from 1 to k and, where it is another, Recall@K."""
    counted, ks = [row for row in rows if row["answers"]], range(1, k + 1)
    deepest = max([k, *(rank + 1 for row in counted for rank in row["right_ranks"])])  # k may be another's
    right, answers = right_hits(counted, deepest), np.array([row["answers"] for row in counted])
    hits = [hit_at_k(right, depth) for depth in ks]
    axis.plot(ks, [hit.mean() for hit in hits], "o-", label=f"{label}, Hit@K", **look)
    _band(axis, ks, hits, [row["cluster"] for row in counted], look["color"])
    if (answers > 1).any():
        recall = [recall_at_k(right, answers, depth).mean() for depth in ks]
        axis.plot(ks, recall, label=f"{label}, Recall@K", **{**look, "linestyle": ":"})


def _scores(axis: Axes, rows: Sequence[QueryRow], threshold: Threshold | None, colour: str | float) -> None:
    """How the scores of first hits lie: of right ones, of wrong ones, and of queries whose answer is left out."""
    scores, right, has_answer, _ = asked_twice(rows)
    there = np.isfinite(scores)
    bins = np.histogram_bin_edges(scores[there], 40)
    for name, mask, look in (
        ("right", right, {"color": colour, "alpha": 0.6}),
        ("wrong", has_answer & ~right, {"facecolor": "none", "edgecolor": "black", "hatch": "/////", "linewidth": 0}),
        ("with the answer left out", ~has_answer, {"histtype": "step", "color": "black", "linewidth": 1}),
    ):
        axis.hist(scores[there & mask], bins, label=f"{(there & mask).sum()} {name}", **look)
    if threshold and threshold.value is not None:
        axis.axvline(threshold.value, color="black", linestyle=":", label=f"believed from {threshold.value:.4g} on")
    axis.set_yscale("symlog", linthresh=1, linscale=0.4)  # so that a single wrong one is seen
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(ylabel="queries", ylim=(0, None))
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1.03))


def _believed(
    axis: Axes, rows: Sequence[QueryRow], threshold: Threshold | None, look: Mapping[str, str | float]
) -> None:
    """Precision against coverage, with what was chosen, as it is and on photographs that were held out."""
    _, precision, coverage = calibration.curve(*asked_twice(rows)[:3])
    axis.plot(coverage, precision, **look)
    if threshold is None:
        return
    for mark, label, x, y in (
        ("o", "believed from the chosen score on", threshold.coverage, threshold.precision),
        ("D", "likewise, on held-out photographs", threshold.held_out_coverage, threshold.held_out_precision),
    ):
        if x is not None and y is not None:
            axis.plot(x, y, mark, color=look["color"], markeredgecolor="black", markersize=8, label=label)


@rc_context(STYLE)
def errors(pairs: Mapping[str, Sequence[PairRow]]) -> Figure | str:
    """How exact the found geometry is where the true one is known, over all such pairs and by the reference's angle.

    Args:
        pairs: name of a configuration -> its rows of pairs.jsonl. One without a geometry (corner error), or without a
            verified one (rotation and scale), counts as infinitely wrong.

    >>> errors({"sift": []})[:13]
    'No true error'
    """
    true = {name: [row for row in of if row["has_truth"]] for name, of in pairs.items()}
    every = [row for of in true.values() for row in of]
    if not every:
        return "No true error: of no right pair is the true matrix known; a reference and its source have one."
    crops = sorted({row["crop"] for row in every}, key=lambda crop: -number(crop, math.inf))
    parts = []
    for name, look in _looks(true).items():
        for crop, dashes in zip(crops, cycle(DASHES), strict=False):
            if part := [row for row in true[name] if row["crop"] == crop]:
                failed = np.mean([row["rotation_error"] is None for row in part])
                label = f"{files.printable(name)}, {'no crop' if crop is None else f'crop {crop:g}'}: "
                label += f"{len(part)} pairs, {failed:.1%} not verified"
                parts.append((part, {**look, "linestyle": dashes, "label": label}))
    turned = any(row["angle"] is not None for row in every)
    figure = Figure(figsize=(16.0, 6.4 if turned else 3.4))
    above, *below = figure.subplots(1 + turned, 3, squeeze=False)
    for axis, (key, (name, ends)) in zip(above, ERRORS.items(), strict=True):
        for part, look in parts:
            values, at = np.array([number(row[key], math.inf) for row in part]), np.geomspace(*ends, 13)
            _cumulated(axis, values, look)
            clusters = [row["cluster"] for row in part]
            _band(axis, at, [values <= error for error in at], clusters, look["color"])
        _log(axis.xaxis)
        axis.set(xlabel=name, ylabel="share of pairs below" if axis is above[0] else "", xlim=ends, ylim=(-0.02, 1.03))
    for row in below:
        _errors_by_angle(row, parts)
    _legend(figure, above[:1])
    return figure


def _errors_by_angle(axes: Sequence[Axes], parts: Sequence[tuple[Sequence[PairRow], dict[str, str | float]]]) -> None:
    """Medians by the angle of the reference, failures counted as infinitely wrong; and how many failed."""
    for part, look in parts:
        turns = sorted({row["angle"] for row in part if row["angle"] is not None})
        at = [[row for row in part if row["angle"] == turn] for turn in turns]
        for axis, key in zip(axes, ("rotation_error", "scale_error"), strict=False):
            medians = [np.median([number(row[key], math.inf) for row in rows]) for rows in at]
            axis.plot(turns, medians, marker="o", **look)
        axes[2].plot(turns, [np.mean([row["rotation_error"] is None for row in rows]) for rows in at], "o", **look)
    for axis, key in zip(axes, ("rotation_error", "scale_error"), strict=False):
        axis.set_ylabel(f"median {ERRORS[key][0]}")
        _log(axis.yaxis)
    axes[2].set(ylabel="share of pairs not verified", ylim=(-0.02, 1.03))
    for axis in axes:
        axis.set_xlim(axes[2].get_xlim())  # where all have failed there is no median to make room for
        angles(axis)


@rc_context(STYLE)
def metres(rows: Mapping[str, Sequence[QueryRow]]) -> Figure | str:
    """How far from where a query was taken its first hit was, and the nearest of all its hits.

    Args:
        rows: name of a configuration -> its rows of queries.jsonl. As in `truth.position_figures`, queries without any
            known distance are left out, and a first hit of unknown distance is within no distance.

    >>> metres({"sift": [{"metres": None, "least_metres": None}]})[:9]
    'No metres'
    """
    known = {name: [row for row in of if row["least_metres"] is not None] for name, of in rows.items()}
    known = {name: of for name, of in known.items() if of}
    if not known:
        return "No metres: of no query and hit are both positions known (EXIF, or a file of labels)."
    every = [number(row[key], 0) for of in known.values() for row in of for key in ("metres", "least_metres")]
    figure = Figure(figsize=(11.0, 3.8))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, key, hit in zip(panels, ("metres", "least_metres"), ("first hit", "nearest of all K hits"), strict=True):
        for name, look in _looks(known).items():
            of, lost = known[name], len(rows[name]) - len(known[name])
            label = f"{files.printable(name)}: {len(of)} queries{f', {lost} more of unknown place' if lost else ''}"
            values = np.array([number(row[key], math.inf) for row in of])
            _cumulated(axis, values, {**look, "label": label})
        _log(axis.xaxis)
        axis.set(title=hit, xlabel="metres", xlim=(1, max(1e3, *every)), ylim=(-0.02, 1.03))
        for limit in truth.METRES:
            axis.axvline(limit, color="grey", linewidth=0.8, zorder=0)
    panels[0].set_ylabel("share of queries within")
    _legend(figure, panels[:1])
    return figure


@rc_context(STYLE)
def pareto(table: Sequence[ReportRow], x: str, y: str) -> Figure | str:
    """What a configuration costs and what it gives, a panel a question; those that no other beats in both are filled
    and joined.

    Args:
        table: one row a configuration: name (or label, a shorter one), `x` (its cost, above 0), `y` (its worth, in
            [0, 1]), low and high (None: no interval) and, if rows answer several, question. Rows without a cost or a
            worth (None) are left out, and counted below.
        x, y: names of columns, which name the axes, too.

    Raises:
        ImatchError: a cost is not above 0.

    >>> table = [{"name": "sift", "ms a photograph": 20, "Recall@1": 0.9, "low": 0.8, "high": 0.95}]
    >>> pareto(table, "ms a photograph", "Recall@1").axes[0].get_ylabel()
    'Recall@1'
    """
    asked: dict[str, list[ReportRow]] = {}
    for row in table:
        if row[x] is not None and row[y] is not None:
            asked.setdefault(row.get("question", ""), []).append(row)
            if not row[x] > 0:
                raise ImatchError(f"{x} of {_named(row)} is {row[x]}: a cost is above 0, and None if unknown")
    if not asked:
        return f"Nothing to weigh: no configuration has both {MEANS.get(x, x)} and {MEANS.get(y, y)}."
    figure = Figure(figsize=(9.0, 0.3 + 3.6 * len(asked)))
    panels = figure.subplots(len(asked), 1, sharex=True, sharey=True, squeeze=False).flat
    for axis, (question, rows) in zip(panels, asked.items(), strict=True):
        best = [row for row in rows if not any(_beats(other, row, x, y) for other in rows)]
        axis.plot(*zip(*sorted((row[x], row[y]) for row in best), strict=True), color=UNKNOWN, zorder=1)
        ranked = sorted(rows, key=lambda row: (-row[y], row[x], _named(row)))
        for row, look in zip(ranked, cycle(MARKS), strict=False):
            spread = [[row[y] - number(row["low"])], [number(row["high"]) - row[y]]]
            label = f"{_named(row)} ({row[x]:.4g}, {row[y]:.2f})"
            fill = look["color"] if row in best else "white"
            axis.errorbar(row[x], row[y], spread, **look, markersize=8, markerfacecolor=fill, ls="none", label=label)
        _log(axis.xaxis, (1, 2, 5))
        axis.set(title=files.printable(question), ylabel=MEANS.get(y, y))
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    absent = len(table) - sum(map(len, asked.values()))
    told = f"\n{absent} of {len(table)} configurations lack one of the two" if absent else ""
    axis.set_xlabel(f"{MEANS.get(x, x)} (logarithmic; less is better){told}")
    return figure


def _named(row: ReportRow) -> str:
    return files.printable(row.get("label", row["name"]))


def _beats(other: ReportRow, row: ReportRow, x: str, y: str) -> bool:
    return other[x] <= row[x] and other[y] >= row[y] and (other[x] < row[x] or other[y] > row[y])


@rc_context(STYLE)
def recall_curve(index: IndexFigures) -> Figure | str:
    """What an approximate index finds of that which exact search finds, and the time that takes, against its effort.

    Args:
        index: of `steps.index.tune_index`.

    Returns:
        The figure; a sentence for an index whose effort is not to be chosen: an exact one, or one of FAISS' own keys.

    >>> exact = {"kind": "flat", "curve": [], "search_ms": 0.9, "bytes_a_vector": 1536.0}
    >>> recall_curve(exact)
    'flat is exact: recall 1 by definition; 0.9 ms a query, 1536 bytes a vector.'
    """
    kind, points = files.printable(index["kind"]), index["curve"]
    size = f"{index['bytes_a_vector']:.0f} bytes a vector"
    if not points:
        return f"{kind} is exact: recall 1 by definition; {index['search_ms']:.3g} ms a query, {size}."
    if (chosen := index["effort"]) is None:
        told = (
            f"{points[0]['recall']:.3f}, {index['search_ms']:.3g} ms a query ({index['exact_ms']:.3g} by exact search)"
        )
        return f"{kind}: recall {told}, {size}."
    efforts, recalls = [point["effort"] for point in points], [point["recall"] for point in points]
    at = efforts.index(chosen["value"])
    # the chosen effort by the time that was taken as that of exact search was
    times = [index["search_ms"] if i == at else point["ms"] for i, point in enumerate(points)]
    reached = recalls[at] >= index["wanted_recall"]
    said = f"chosen: {chosen['value']}{'' if reached else ', which FALLS SHORT of the recall asked for'}"
    figure = Figure(figsize=(11.0, 3.6))
    found, took = figure.subplots(1, 2)
    found.axhline(index["wanted_recall"], color="black", linestyle="--", linewidth=1, label="asked for")
    took.axhline(index["exact_ms"], color="black", linestyle=":", linewidth=1, label="exact search")
    for axis, values in ((found, recalls), (took, times)):
        axis.plot(efforts, values, "o-", label="tried")
        mark = {"color": RIGHT if reached else WRONG, "markeredgecolor": "black", "markersize": 10}
        axis.plot(efforts[at], values[at], "o", label=said, **mark)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel(f"{files.printable(chosen['name'])} (more looks at more of the vectors)")
    _up_to_one(found)
    _log(took.yaxis, (1, 2, 5))
    found.set(title=f"{kind} of {index['vectors']:,} vectors, {size}", ylabel=f"recall@{index['k']} of exact search")
    took.set(title=f"{files.printable(index['backend'])}, {index['sample']} queries at once", ylabel="ms a query")
    _legend(figure, (found, took))
    return figure


def _looks(names: Collection[str]) -> dict[str, dict[str, str | float]]:
    """How configurations are drawn: later ones narrower, so that lines that coincide are all seen."""
    n = len(names)
    many = [to_hex(colour) for colour in colormaps["viridis"](np.linspace(0, 0.88, n))]
    colours = COLOURS if n <= len(COLOURS) else many
    widths = np.linspace(1.2 + min(n - 1, 4), 1.2, n).tolist()
    drawn = zip(names, colours, widths, strict=False)
    return {name: {"color": colour, "linewidth": width, "markersize": 3 + width} for name, colour, width in drawn}


def _legend(figure: Figure, axes: Sequence[Axes] | None = None) -> None:
    """One beside the panels, of all that has a name in them."""
    named = {}
    for axis in figure.axes if axes is None else axes:
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named.keys(), loc="outside right upper")


def _cumulated(axis: Axes, values: np.ndarray, look: Mapping[str, str | float]) -> None:
    """The share of values up to each, from 0 to far beyond the panel; infinite ones are never reached."""
    ranked = np.sort(values[np.isfinite(values)])
    shares = np.arange(len(ranked) + 1) / len(values)
    axis.step([0, *ranked, 1e9], [*shares, shares[-1]], where="post", **look)


def _log(ruler: Axis, steps: Sequence[float] = (1,)) -> None:
    """A logarithmic axis in plain numbers; of less than two decades in those between them, too."""
    ruler.axes.set(**{f"{ruler.axis_name}scale": "log"})
    ruler.set_major_locator(LogLocator(subs=steps))
    ruler.set_major_formatter("{x:g}")
    ruler.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _band(
    axis: Axes, x: Sequence[float], shares: Sequence[np.ndarray], clusters: Sequence[str], colour: str | float
) -> None:
    """The 95 % intervals of the shares at each x; nothing where there are too few clusters."""
    found = [intervals.interval(values.astype(float), clusters, resamples=500) for values in shares]
    if all(one.low is not None for one in found):
        low, high = ([getattr(one, end) for one in found] for end in ("low", "high"))
        axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0, zorder=0)


def _up_to_one(axis: Axes) -> None:
    """The axis of shares from the tenth below all that is drawn."""
    axis.set_ylim(max(0.0, math.floor(axis.dataLim.y0 * 10 - 0.5) / 10), 1.02)


def angles(axis: Axes) -> None:
    """Name an axis of angles, and mark it at round ones."""
    axis.set_xlabel("rotation of the reference, degrees counter-clockwise")
    axis.xaxis.set_major_locator(MaxNLocator(9, steps=[1, 1.5, 3, 4.5, 9, 10]))


def number(value: float | None, missing: float = math.nan) -> float:
    """What is unknown as a number that can be drawn.

    >>> number(0.5), number(None), number(None, 0)
    (0.5, nan, 0)
    """
    return missing if value is None else value
