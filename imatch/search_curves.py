"""Figures of a search: what an approximate index loses and saves, and what each option adds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from imatch import evaluate, intervals
from imatch.curves import COLOURS, _decades, _frame, _plain, _plain_axis, _words

Row = Mapping[str, Any]
LABELS = 12
"""Efforts that are named on an axis at most."""
SAID = {"better": (COLOURS[2], "better"), "worse": (COLOURS[1], "worse: it hurts")}
"""Colour and words for what `evaluate.verdict` says; the rest is grey."""
GREY = COLOURS[7]


# --- the index ------------------------------------------------------------------------------------------------


def recall_curve(index: Row) -> Figure:
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
    kind, points, size = _plain(index["kind"]), index["curve"], f"{index['bytes_a_vector']:.0f} bytes a vector"
    if not points:
        return _words(f"{kind} is exact: recall 1 by definition; {_short(index['search_ms'])} ms a query, {size}")
    effort, k, exact = index["effort"], index["k"], index["exact_ms"]
    at = next(i for i, point in enumerate(points) if effort is None or point["effort"] == effort["value"])
    chosen = {**points[at], "ms": index["search_ms"]}
    points = [*points[:at], chosen, *points[at + 1 :]]
    caption = (
        f"Why {kind}: {_plain(index['reason']).rstrip('.')}. Recall@{k}: of the {k} neighbours of exact search, what "
        f"share the index finds, too, right or wrong; mean over {index['sample']} queries. "
        f"Times: {_plain(index['backend'])}, all these queries in one batch."
    )
    if exact <= chosen["ms"]:
        caption += " Exact search is no slower here: the index saves no time."
    title = f"{kind} of {index['vectors']:,} vectors: {size} beside {4 * index['dimension']} of the exact index"
    figure, body = _frame(10.5 if effort else 7.5, 5.0, title, caption)
    panels = body.subplots(1, 2 if effort else 1, squeeze=False).flat
    told = f"recall {chosen['recall']:.3f}"
    if effort:
        told = f"{_plain(effort['name'])} {effort['value']}: {told}"
        _tried(panels[0], index, points, chosen, "effort")
        efforts = [point["effort"] for point in points]
        shown = efforts[:: math.ceil(len(efforts) / LABELS)]
        panels[0].set_xscale("log", base=2)
        panels[0].set_xlim(efforts[0] / 1.5, efforts[-1] * 1.5)
        panels[0].set_xticks(shown, [f"{value:g}" for value in shown])
        panels[0].minorticks_off()
        panels[0].set_title("recall for effort", fontsize=9)
        panels[0].set_xlabel(f"{_plain(effort['name'])} (more looks at more of the vectors)", fontsize=8)
        _call_out(panels[0], (chosen["effort"], chosen["recall"]), told)
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
    axis.set_title("recall for time", fontsize=9)
    axis.set_xlabel("milliseconds a query (logarithmic; less is better)", fontsize=8)
    _call_out(axis, (chosen["ms"], chosen["recall"]), f"{told}\n{_short(chosen['ms'])} ms a query")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4 if effort else 2, fontsize=8)
    return figure


def _tried(axis: Axes, index: Row, points: Sequence[Row], chosen: Row, key: str) -> None:
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
        zorder=4,
        label=f"chosen: {word}",
    )
    floor = max(0.0, math.floor(min([*recalls, wanted]) * 10 - 0.5) / 10)
    axis.set(ylim=(floor, 1 + 0.05 * (1 - floor)))
    axis.set_ylabel(f"recall@{index['k']} against exact search", fontsize=8)
    _plain_axis(axis)


def _call_out(axis: Axes, point: tuple[float, float], told: str) -> None:
    """Words for a point, joined to it by a line, at the nearest place in the panel where nothing else is drawn."""
    axis.get_xlim()  # lays out the axis: until then the transforms below are old ones
    to_panel = axis.transAxes.inverted().transform
    ends = [to_panel(line.get_transform().transform(line.get_xydata())) for line in axis.lines]
    drawn = np.concatenate([*ends, *(np.linspace(a, b, 50) for line in ends for a, b in pairwise(line))])
    places = np.array([(x, y) for y in np.linspace(0.1, 0.9, 17) for x in np.linspace(0.2, 0.8, 13)])
    # the words take some 0.34 of the panel's width and 0.1 of its height
    room = (np.abs(places[:, None] - drawn) / (0.2, 0.09)).max(2).min(1)
    far = np.hypot(*(places - to_panel(axis.transData.transform(point))).T)
    place = places[np.lexsort((far, -np.minimum(room, 1)))[0]]
    axis.annotate(
        told,
        point,
        tuple(place),
        textcoords="axes fraction",
        ha="center",
        va="center",
        fontsize=8,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        arrowprops={"arrowstyle": "-", "color": "black", "linewidth": 0.8, "shrinkB": 6},
        zorder=3,
    )


# --- the options ----------------------------------------------------------------------------------------------


def stages(stages: Sequence[Row]) -> Figure:
    """What each option of a search adds: Hit@1 by row, and beside it the change from the row above.

    Args:
        stages: at least one row, as `evaluate.stage_table` takes them.

    Returns:
        The figure; words where nothing was added to the plain search, or no query has an answer.

    >>> few = {"low": None, "high": None, "clusters": 3, "why": "3 photographs are too few, 8 are the least"}
    >>> plain = {"stage": "plain", "hit_at_1": {"value": 0.5} | few, "ms": 0.2, "difference": None}
    >>> stages([plain]).texts[0].get_text()[:34]
    'plain search; nothing was added: H'
    """
    start = stages[0]["hit_at_1"]
    if start["value"] is None:
        return _words(f"What the options add cannot be told: {start['why']}.")
    if len(stages) == 1:
        found = intervals.Interval(**start)
        return _words(f"plain search; nothing was added: Hit@1 {found}, {_short(stages[0]['ms'])} ms a query")
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
            colour, word = SAID.get(said := evaluate.verdict(row["difference"]), (GREY, said))
            _bar(right, line, row["difference"], colour, f"{row['difference']['value']:+z.3f}")
            _aside(right, line, word, colour)
        else:
            _aside(right, line, "to start from", GREY)
    left.set_yticks(range(len(stages)), [f"{_plain(row['stage'])}\n{_short(row['ms'])} ms a query" for row in stages])
    left.set_ylim(len(stages) - 0.5, -0.6)
    right.axvline(0, color="black", linewidth=1, zorder=1)
    left.set_title("Hit@1 (more is better)", fontsize=9)
    right.set_title("change of Hit@1 from the row above", fontsize=9)
    for axis in (left, right):
        axis.margins(x=0.1)
        _plain_axis(axis)
        axis.tick_params(axis="y", length=0, labelsize=8)
    return figure


def _bar(axis: Axes, line: int, record: Row, colour: str, told: str) -> None:
    if record["low"] is not None:
        axis.hlines(line, record["low"], record["high"], color=colour, linewidth=2.5)
    axis.plot(record["value"], line, "o", color=colour, markersize=8, markeredgecolor="white", label=told)
    axis.annotate(
        told,
        (record["value"], line),
        (0, 8),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def _aside(axis: Axes, line: int, word: str, colour: str) -> None:
    """Words beside the panel, where nothing is drawn."""
    axis.annotate(
        word,
        (1, line),
        (6, 0),
        ("axes fraction", "data"),
        "offset points",
        color=colour,
        fontsize=8,
        fontweight="bold",
        va="center",
    )


def _short(ms: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{float(f'{ms:.3g}'):,g}"
