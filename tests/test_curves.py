"""What the figures draw, looked at through matplotlib's own objects: lines, bands, cells and words."""

import math

import numpy as np
import pytest
from matplotlib.text import Text

from imatch.core.types import ImatchError
from imatch.evaluation import calibration, intervals, metrics
from imatch.evaluation.calibration import Threshold
from imatch.retrieval import truth
from imatch.viz import curves, figures


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text) if text.get_text()).replace("\n", " ")


def view(angle, value, crop=0.5, low=None, high=None, why="3 photographs are too few, 8 are the least"):
    why = why if low is None else ""
    return {"crop": crop, "angle": angle, "value": value, "low": low, "high": high, "clusters": 9, "why": why}


def query(score, without, right_ranks=(0,), answers=1, cluster="a", **more):
    return {
        "answers": answers,
        "right_ranks": list(right_ranks),
        "score": score,
        "score_without": without,
        "cluster": cluster,
        **more,
    }


def pair(corner, rotation, scale, angle=0.0, crop=0.5, right=True, has_truth=True, cluster="a"):
    return {
        "cluster": cluster,
        "right": right,
        "has_truth": has_truth,
        "crop": crop,
        "angle": angle,
        "corner_error": corner,
        "rotation_error": rotation,
        "scale_error": scale,
    }


ROUND = [
    view(angle, value, crop, value / 2, (1 + value) / 2)
    for crop in (0.5, 0.75)
    for angle, value in zip(range(0, 360, 30), np.linspace(0.1, 0.9, 12).tolist(), strict=True)
]


# --- by angle -------------------------------------------------------------------------------------------------


def bars(axis):
    """The ends of the intervals that are drawn: x, low and high."""
    segments = [ends for bar in axis.containers for ends in bar[2][0].get_segments()]
    return [(*ends[0].tolist(), float(ends[1, 1])) for ends in segments if ends.size]


def test_points_are_the_metrics_and_the_bars_are_the_intervals():
    figure = curves.hit_by_angle({"sift": {"by_view": ROUND}})
    axis = figure.axes[0]
    assert [panel.get_title() for panel in figure.axes] == ["crop 0.75", "crop 0.5"]
    points = axis.lines[0]
    assert points.get_xdata().tolist() == list(range(0, 360, 30))
    assert points.get_ydata().tolist() == [view["value"] for view in ROUND[12:]]
    expected = [(view["angle"], view["low"], view["high"]) for view in ROUND[12:]]
    assert np.array(bars(axis)) == pytest.approx(np.array(expected))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sift"]


def test_angles_are_drawn_in_order_and_what_is_missing_is_not():
    given = [view(90, 1.0), view(0, 0.25), view(-30, 0.5, crop=1.0)]
    figure = curves.hit_by_angle({"sift": {"by_view": given}, "dsift": {"by_view": [view(0, 0.125)]}})
    whole, half = figure.axes
    assert [line.get_xydata().tolist() for line in half.lines if line.get_marker() == "o"] == [
        [[0, 0.25], [90, 1.0]],
        [[0, 0.125]],
    ]
    assert whole.lines[0].get_xydata().tolist() == [[-30, 0.5]]


def test_without_intervals_no_bar_and_without_a_reference_no_figure():
    given = {"sift": {"by_view": [view(0, 1.0)]}, "queries": {"by_view": []}}
    assert bars(curves.hit_by_angle(given).axes[0]) == []
    assert curves.hit_by_angle({"queries": {"by_view": []}}).startswith("No Hit@1 by angle")
    assert curves.hit_by_angle({}).startswith("No Hit@1 by angle")


# --- trust ----------------------------------------------------------------------------------------------------


def many_queries():
    rng = np.random.default_rng(0)
    found = []
    for i in range(240):
        right = i % 6 > 0
        score, without = 0.9 - 0.3 * (not right) + rng.normal(0, 0.05), 0.5 + rng.normal(0, 0.05)
        found.append(query(score, without, [0] if right else [3], cluster=str(i // 6)))
    return found


def test_hit_and_recall_are_one_line_when_there_is_one_answer():
    rows = [query(0.9, 0.1, [0]), query(0.8, 0.1, [2]), query(0.7, 0.1, []), query(0.6, 0.6, [], answers=0)]
    figure = curves.trust({"sift": rows}, {}, 4)
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [1, 2, 3, 4]
    assert line.get_ydata().tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])


def test_hit_and_recall_are_two_lines_when_there_are_more_answers():
    figure = curves.trust({"sift": [query(0.9, 0.1, [0, 2], answers=4)]}, {}, 3)
    hit, recall = figure.axes[0].lines
    assert hit.get_ydata().tolist() == [1, 1, 1]
    assert recall.get_ydata().tolist() == [0.25, 0.25, 0.5]
    assert "sift, Recall@K" in words(figure)


def test_k_may_be_less_than_one_configuration_was_given():
    figure = curves.trust({"deep": [query(0.9, 0.1, [7])], "flat": [query(0.9, 0.1, [1])]}, {}, 2)
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines] == [[0, 0], [0, 1]]


def test_scores_are_counted_by_what_they_are_of():
    rows = [query(0.9, 0.5), query(0.8, 0.5), query(0.6, 0.6, []), query(None, None, [])]
    axis = curves.trust({"sift": rows}, {}, 1).axes[2]
    told = [text.get_text() for text in axis.get_legend().get_texts()]
    assert told == ["2 right", "1 wrong", "3 with the answer left out"]  # one query found nothing at all
    right, wrong = (sum(bar.get_height() for bar in bars) for bars in axis.containers[:2])
    assert (right, wrong) == (2, 1)


def test_believing_is_the_curve_of_the_calibration_with_its_threshold():
    rows = many_queries()
    threshold = calibration.calibrate(*metrics.asked_twice(rows))
    assert threshold.value is not None
    assert threshold.held_out_precision is not None
    figure = curves.trust({"sift": rows}, {"sift": threshold}, 5)
    axis, scores = figure.axes[1:]
    line = axis.lines[0]
    _, precision, coverage = calibration.curve(*metrics.asked_twice(rows)[:3])
    assert line.get_xdata().tolist() == coverage.tolist()
    assert line.get_ydata().tolist() == precision.tolist()
    marks = {mark.get_marker(): mark.get_xydata().tolist() for mark in axis.lines if mark.get_marker() in ("o", "D")}
    assert marks["o"] == [[threshold.coverage, threshold.precision]]
    assert marks["D"] == [[threshold.held_out_coverage, threshold.held_out_precision]]
    assert any(list(other.get_ydata()) == [0.95, 0.95] and other.get_linestyle() == "--" for other in axis.lines)
    assert any(list(other.get_xdata()) == [threshold.value] * 2 for other in scores.lines)
    assert f"believed from {threshold.value:.4g} on" in words(figure)


def test_the_marked_point_lies_on_the_curve():
    rows = many_queries()
    threshold = calibration.calibrate(*metrics.asked_twice(rows))
    scores, precision, coverage = calibration.curve(*metrics.asked_twice(rows)[:3])
    at = scores.tolist().index(threshold.value)
    assert (coverage[at], precision[at]) == (threshold.coverage, threshold.precision)


def test_no_threshold_no_answers_and_no_queries_are_said():
    threshold = Threshold(None, 0.95, None, 0.0, None, None, "no score shows a precision of 0.95")
    figure = curves.trust({"sift": many_queries()}, {"sift": threshold}, 5)
    assert "sift: no score is believed" in words(figure)
    unanswered = [query(0.5, 0.5, [], answers=0)]
    assert "no query has an answer" in curves.trust({"sift": unanswered}, {"sift": threshold}, 3)
    assert "no query has an answer" in curves.trust({"sift": []}, {}, 3)
    assert "queries" not in words(curves.trust({"sift": many_queries(), "none": unanswered}, {}, 3)).split("none")


def test_asked_twice_by_hand():
    rows = [query(0.9, 0.2, [0]), query(0.3, 0.3, [], answers=0, cluster="b"), query(0.8, None, [1], cluster="c")]
    scores, right, has_answer, clusters = metrics.asked_twice(rows)
    assert scores.tolist() == [0.9, 0.8, 0.2, 0.3, -math.inf]
    assert right.tolist() == [True, False, False, False, False]
    assert has_answer.tolist() == [True, True, False, False, False]
    assert clusters == ["a", "c", "a", "b", "c"]
    assert [each.tolist() for each in metrics.asked_twice([])[:3]] == [[], [], []]


# --- errors ---------------------------------------------------------------------------------------------------


def test_errors_are_cumulated_and_failures_never_reached():
    rows = [pair(2.0, 0.1, 0.01), pair(7.0, 0.2, 0.02), pair(400.0, None, None), pair(None, None, None)]
    others = [pair(0.1, 0.1, 0.1, right=False, has_truth=False), pair(0.1, 0.1, 0.1, has_truth=False)]
    figure = curves.errors({"sift": rows + others})
    corner, rotation, scale = (reached(axis.lines[0]) for axis in figure.axes[:3])
    assert corner == {2: 0.25, 7: 0.5, 400: 0.75}
    assert rotation == {0.1: 0.25, 0.2: 0.5}
    assert scale == {0.01: 0.25, 0.02: 0.5}
    assert "sift, crop 0.5: 4 pairs, 50.0% not verified" in words(figure)


def reached(line):
    """What share of values lies up to each; it begins at 0 and goes on over the edge of its panel."""
    assert line.get_drawstyle() == "steps-post"
    (first, *steps, (end, last)) = line.get_xydata().tolist()
    assert first == [0, 0]
    assert end > line.axes.get_xlim()[1]
    assert last == (steps[-1][1] if steps else 0)
    return dict(steps)


def test_medians_by_angle_count_failures_as_infinitely_wrong():
    rows = [
        *(pair(1.0, error, error, angle=0.0) for error in (0.1, 0.3, None)),
        *(pair(1.0, error, error, angle=90.0) for error in (0.1, None, None)),
        *(pair(1.0, error, error, angle=180.0) for error in (0.0, 0.0, 0.0)),
    ]
    _, _, _, rotation, scale, failed = curves.errors({"sift": rows}).axes
    assert rotation.lines[0].get_ydata().tolist() == scale.lines[0].get_ydata().tolist() == [0.3, math.inf, 0]
    assert failed.lines[0].get_xdata().tolist() == [0, 90, 180]
    assert failed.lines[0].get_ydata().tolist() == pytest.approx([1 / 3, 2 / 3, 0])


def test_crops_differ_by_dashes_and_configurations_by_colour():
    rows = [pair(1.0, 0.1, 0.1, crop=crop) for crop in (0.5, 0.75)]
    axis = curves.errors({"sift": rows, "dsift": rows}).axes[0]
    drawn = {line.get_label().partition(":")[0]: line for line in axis.lines}
    assert list(drawn) == ["sift, crop 0.75", "sift, crop 0.5", "dsift, crop 0.75", "dsift, crop 0.5"]
    first, second, other, _ = drawn.values()
    assert first.get_color() == second.get_color() != other.get_color()
    assert first.get_linestyle() == other.get_linestyle() != second.get_linestyle()
    assert first.get_linewidth() > other.get_linewidth()  # where they coincide, both are seen


def test_no_truth_is_said_and_without_angles_there_is_no_panel_of_them():
    assert curves.errors({"sift": [pair(1.0, 1.0, 1.0, has_truth=False)]}).startswith("No true error")
    assert curves.errors({}).startswith("No true error")
    failed = [pair(None, None, None, angle=angle) for angle in (0.0, 180.0)]
    assert all(axis.get_xlim() == (-9, 189) for axis in curves.errors({"sift": failed}).axes[3:])
    figure = curves.errors({"sift": [pair(1.0, 0.1, 0.1, angle=None, crop=None)]})
    assert len(figure.axes) == 3
    assert "sift, no crop: 1 pairs, 0.0% not verified" in words(figure)


# --- metres ---------------------------------------------------------------------------------------------------


def test_metres_are_those_of_the_figures():
    metres = np.array([[40.0, 0.0], [5.0, 70.0], [np.nan, 15.0], [3000.0, 90.0], [np.nan, np.nan]])
    told = [[None if np.isnan(value) else float(value) for value in row] for row in metres]
    least = [None if np.isnan(row).all() else float(np.nanmin(row)) for row in metres]
    rows = [{"metres": row[0], "least_metres": nearest} for row, nearest in zip(told, least, strict=True)]
    figure = curves.metres({"sift": rows})
    expected = truth.position_figures(metres)
    for axis, key in zip(figure.axes, ("within", "within_top_k"), strict=True):
        x, y = axis.lines[0].get_data()
        for limit in truth.METRES:
            assert y[np.searchsorted(x, limit, "right") - 1] == expected[key][str(limit)]
        assert [other.get_xdata()[0] for other in axis.lines[1:]] == list(truth.METRES)
    assert "4 queries, 1 more of unknown place" in words(figure)


def test_far_metres_are_in_sight():
    first, least = curves.metres({"sift": [{"metres": None, "least_metres": 5000.0}]}).axes
    assert first.get_xlim() == least.get_xlim() == (1, 5000)
    assert reached(least.lines[0]) == {5000: 1}
    assert reached(first.lines[0]) == {}


def test_unknown_metres_are_said():
    assert curves.metres({"sift": [{"metres": None, "least_metres": None}]}).startswith("No metres")
    assert curves.metres({}).startswith("No metres")


# --- pareto ---------------------------------------------------------------------------------------------------


def config(name, ms, worth, low=None, high=None):
    return {"name": name, "ms": ms, "hit_at_1": worth, "low": low, "high": high}


def points(axis):
    """label -> the point, and whether it is filled"""
    of = {container.get_label(): container[0] for container in axis.containers}
    return {label: (point.get_xydata().tolist(), point.get_markerfacecolor() != "white") for label, point in of.items()}


def test_those_that_none_beats_are_joined():
    table = [config("b", 20, 0.8, 0.7, 0.9), config("a", 10, 0.5), config("worse", 30, 0.8), config("c", 40, 0.9)]
    (axis,) = curves.pareto(table, "ms", "hit_at_1").axes
    assert axis.lines[0].get_xydata().tolist() == [[10, 0.5], [20, 0.8], [40, 0.9]]
    found = points(axis)
    assert list(found) == ["c (40, 0.90)", "b (20, 0.80)", "worse (30, 0.80)", "a (10, 0.50)"]
    assert [label for label, (_, filled) in found.items() if not filled] == ["worse (30, 0.80)"]
    assert found["b (20, 0.80)"][0] == [[20, 0.8]]
    assert bars(axis) == [pytest.approx((20, 0.7, 0.9))]  # the others have no interval
    assert axis.get_xscale() == "log"
    assert "milliseconds a photograph" in axis.get_xlabel()


def test_only_answers_to_one_question_are_weighed_against_each_other():
    table = [{**config("easy", 10, 0.9), "question": "one"}, {**config("hard", 20, 0.5), "question": "two"}]
    figure = curves.pareto(table, "ms", "hit_at_1")
    assert [axis.get_title() for axis in figure.axes] == ["one", "two"]
    assert all(filled for axis in figure.axes for _, filled in points(axis).values())


def test_many_points_differ_by_colour_or_mark():
    table = [config(f"{i:02d}", 10 + i, 0.5) for i in range(20)]
    (axis,) = curves.pareto(table, "ms", "hit_at_1").axes
    assert len({(bar[0].get_marker(), bar[0].get_color()) for bar in axis.containers}) == 20


@pytest.mark.parametrize("costs", [(150, 180), (0.2, 4000)])
def test_costs_can_be_read_off(costs):
    figure = curves.pareto([config(str(cost), cost, 0.5) for cost in costs], "ms", "hit_at_1")
    figure.draw_without_rendering()
    (axis,) = figure.axes
    ticks = [*axis.xaxis.get_major_ticks(), *axis.xaxis.get_minor_ticks()]
    low, high = axis.get_xlim()
    assert len([tick for tick in ticks if tick.label1.get_text() and low <= tick.get_loc() <= high]) >= 2


def test_what_was_not_measured_is_left_out_and_a_free_cost_refused():
    figure = curves.pareto([config("a", 10, 0.5), config("gone", None, 0.5)], "ms", "hit_at_1")
    assert list(points(figure.axes[0])) == ["a (10, 0.50)"]
    assert "no configuration has both" in curves.pareto([config("a", None, 0.5)], "ms", "hit_at_1")
    assert "no configuration has both" in curves.pareto([], "ms", "hit_at_1")
    with pytest.raises(ImatchError, match="above 0"):
        curves.pareto([config("a", 0, 0.5)], "ms", "hit_at_1")


# --- all ------------------------------------------------------------------------------------------------------


def drawn(n):
    """Every figure with n configurations, of which the first bears signs that matplotlib would read as a formula."""
    names = ["$\\frac$ cost", *(f"configuration {i}" for i in range(1, n))]
    rows = [{**row, "metres": 12.0, "least_metres": 0.0} for row in many_queries()]
    threshold = calibration.calibrate(*metrics.asked_twice(rows))
    pairs = [pair(1.0 + i, 0.1, 0.1, angle=90.0 * (i % 4), crop=(0.5, 1.0)[i % 2]) for i in range(8)]
    return {
        "angles": curves.hit_by_angle({name: {"by_view": ROUND} for name in names}),
        "trust": curves.trust(dict.fromkeys(names, rows), dict.fromkeys(names, threshold), 5),
        "errors": curves.errors(dict.fromkeys(names, pairs)),
        "metres": curves.metres(dict.fromkeys(names, rows)),
        "pareto": curves.pareto([config(name, 10 + i, 0.5) for i, name in enumerate(names)], "ms", "hit_at_1"),
    }


def test_the_same_bytes_again(tmp_path):
    for (name, figure), again in zip(drawn(2).items(), drawn(2).values(), strict=True):
        first, second = (figures.show(f, tmp_path / f"{name}{i}.png").data for i, f in enumerate((figure, again)))
        assert first == second


@pytest.mark.parametrize("n", [1, 11])
def test_all_is_laid_out_and_no_letter_too_small(n):
    for figure in drawn(n).values():
        figure.draw_without_rendering()  # a layout that fails warns, and warnings are errors here
        small = [text for text in figure.findobj(Text) if text.get_text() and text.get_fontsize() < 7]
        assert not small


def test_no_legend_covers_a_panel():
    for name, figure in drawn(3).items():
        figure.draw_without_rendering()
        boxes = [legend.get_window_extent() for legend in figure.legends]
        for i, box in enumerate(boxes):
            assert box.x0 >= 0, name
            assert not any(box.overlaps(axis.get_tightbbox()) for axis in figure.axes), name
            assert not any(box.overlaps(other) for other in boxes[:i]), name


def test_bands_are_the_intervals_of_what_they_surround():
    pairs = [pair(0.1 if i % 5 else 50.0, 0.1, 0.1, cluster=str(i // 4)) for i in range(80)]
    axis = curves.errors({"sift": pairs}).axes[0]
    (band,) = axis.collections
    found = intervals.interval([float(i % 5 > 0) for i in range(80)], [i // 4 for i in range(80)], resamples=500)
    inside = [y for x, y in band.get_paths()[0].vertices if 0.2 < x < 40]
    assert inside
    assert all(min(abs(y - found.low), abs(y - found.high)) < 1e-9 for y in inside)
    few = [pair(0.1, 0.1, 0.1, cluster=str(i)) for i in range(3)]
    assert not curves.errors({"sift": few}).axes[0].collections
    axis = curves.trust({"sift": many_queries()}, {}, 5).axes[0]
    assert len(axis.collections) == 1
