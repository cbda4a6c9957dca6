"""What the figures of a search draw, looked at through matplotlib's own objects, and its table."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from imatch.evaluation import intervals, tables
from imatch.viz import curves, figures

FEW = "3 photographs are too few, 8 are the least"
GREEN, RED, GREY = "#009e73", "#d55e00", "#7f7f7f"


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(Text) if text.get_text()).replace("\n", " ")


def labelled(axis, beginning):
    (line,) = (line for line in axis.lines if line.get_label().startswith(beginning))
    return line


def index(recalls=(0.31, 0.61, 0.86, 0.967, 1.0), value=8, **given):
    efforts = [2**i for i in range(len(recalls))]
    points = [
        {"effort": effort, "recall": recall, "ms": 0.025 * effort}
        for effort, recall in zip(efforts, recalls, strict=True)
    ]
    return {
        "kind": "ivf_pq",
        "reason": "exact vectors would not fit",
        "vectors": 200_000,
        "dimension": 384,
        "bytes_a_vector": 104.2,
        "backend": "faiss-cpu",
        "effort": {"name": "nprobe", "value": value},
        "wanted_recall": 0.95,
        "k": 10,
        "sample": 256,
        "search_ms": 0.21,
        "exact_ms": 1.9,
        "curve": points,
        **given,
    }


def record(value, low=None, high=None):
    return intervals.Interval(value, low, high, 42 if low is not None else 3, "" if low is not None else FEW).record()


def stage(name, value, ms=0.2, difference=None, sure=True):
    around = (value - 0.06, value + 0.05) if sure else ()
    return {
        "stage": name,
        "hit_at_1": record(value, *around),
        "map": record(value - 0.1, *around),
        "ms": ms,
        "difference": difference,
    }


STAGES = [
    stage("plain", 0.62),
    stage("+ whitening", 0.7, difference=record(0.08, 0.03, 0.13)),
    stage("+ expansion", 0.67, 1.83, record(-0.03, -0.052, -0.008)),
    stage("+ tokens", 0.676, 1234.5, record(0.005, -0.01, 0.02)),
]
UNSURE = [stage("plain", 0.62, sure=False), stage("+ whitening", 0.7, difference=record(0.08), sure=False)]

# --- the index ------------------------------------------------------------------------------------------------


def test_both_panels_show_every_point_that_was_tried():
    given = index()
    left, right = curves.recall_curve(given).axes
    expected = [(point["effort"], point["recall"]) for point in given["curve"]]
    assert [tuple(point) for point in labelled(left, "what was tried").get_xydata()] == expected
    # the chosen one as it was timed beside exact search, not as the first of a row of searches
    expected = [(0.21 if p["effort"] == 8 else p["ms"], p["recall"]) for p in given["curve"]]
    assert [tuple(point) for point in labelled(right, "what was tried").get_xydata()] == expected
    assert left.xaxis.get_transform().base == 2
    assert right.get_xscale() == "log"
    assert [text.get_text() for text in left.get_xticklabels()] == ["1", "2", "4", "8", "16"]
    assert left.get_xlabel().startswith("nprobe")
    for axis in (left, right):
        wanted = labelled(axis, "asked for")
        assert set(wanted.get_ydata()) == {0.95}
        assert wanted.get_linestyle() == "--"


def test_the_chosen_point_and_exact_search_are_marked_and_named():
    left, right = curves.recall_curve(index()).axes
    assert labelled(left, "chosen").get_xydata().tolist() == [[8, 0.967]]
    assert labelled(right, "chosen").get_xydata().tolist() == [[0.21, 0.967]]
    assert to_hex(labelled(left, "chosen").get_color()) == GREEN
    assert labelled(right, "exact search: 1.9 ms").get_xydata().tolist() == [[1.9, 1.0]]
    assert left.get_title().endswith("\nchosen: nprobe 8, recall 0.967")
    assert right.get_title().endswith("\nchosen: nprobe 8, recall 0.967, 0.21 ms a query")


def test_the_words_say_what_it_is_and_what_it_is_measured_on():
    told = words(curves.recall_curve(index()))
    assert "ivf_pq of 200,000 vectors: 104 bytes a vector beside 1536 of the exact index" in told
    assert "Why ivf_pq: exact vectors would not fit. Recall@10" in told
    assert "256 queries" in told
    assert "Times: faiss-cpu" in told


def test_falling_short_and_saving_no_time_are_said():
    figure = curves.recall_curve(index((0.3, 0.6, 0.8), 4))
    assert "FALLS SHORT" in labelled(figure.axes[0], "chosen").get_label()
    assert to_hex(labelled(figure.axes[1], "chosen").get_color()) == RED
    reaching = curves.recall_curve(index())
    assert "FALLS SHORT" not in words(reaching)
    assert "saves no time" not in words(reaching)
    assert "saves no time" in words(curves.recall_curve(index(exact_ms=0.205)))


def test_exact_kinds_are_words_and_a_factory_has_no_panel_of_efforts():
    figure = curves.recall_curve(index(kind="flat", curve=[], effort=None, bytes_a_vector=1536.0, search_ms=0.9))
    assert not figure.axes
    assert words(figure) == "flat is exact: recall 1 by definition; 0.9 ms a query, 1536 bytes a vector"
    point = {"effort": None, "recall": 0.93, "ms": 0.4}
    (axis,) = curves.recall_curve(index(kind="factory", curve=[point], effort=None)).axes
    assert labelled(axis, "chosen").get_xydata().tolist() == [[0.21, 0.93]]
    assert axis.get_title().endswith("\nchosen: recall 0.930, 0.21 ms a query")


def test_many_efforts_leave_room_between_their_names():
    figure = curves.recall_curve(index(np.linspace(0.05, 0.96, 17).tolist(), 2**16))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    assert len(boxes) == 9


RISING = (0.3, 0.6, 0.86, 0.967, 1.0)


@pytest.mark.parametrize(
    ("recalls", "chosen"),
    [(RISING, 8), (RISING, 1), (RISING, 16), ((0.952, 0.981, 0.993, 1.0), 1), ((0.1, 0.3, 0.5, 0.7), 8), ((1.0,), 1)],
)
def test_what_names_the_chosen_point_covers_nothing(recalls, chosen):
    figure = curves.recall_curve(index(recalls, chosen))
    figure.draw_without_rendering()
    for axis in figure.axes:
        panel, named = axis.get_window_extent(), axis.title.get_window_extent()
        assert not axis.texts
        assert named.y0 > panel.y1
        assert panel.x0 < named.x0
        assert named.x1 < panel.x1


# --- the options ----------------------------------------------------------------------------------------------


def bars(axis):
    """(colour, row, low, high) of each bar."""
    return [
        (to_hex(bar.get_color()[0]), segment[0, 1], *segment[:, 0].tolist())
        for bar in axis.collections
        for segment in bar.get_segments()
    ]


def points(axis):
    return [
        (to_hex(line.get_color()), *line.get_xydata()[0].tolist()) for line in axis.lines if line.get_marker() == "o"
    ]


def test_each_stage_is_a_row_with_its_interval_and_its_difference():
    left, right = curves.stages(STAGES).axes
    assert [text.get_text() for text in left.get_yticklabels()] == [
        "plain\n0.2 ms a query",
        "+ whitening\n0.2 ms a query",
        "+ expansion\n1.83 ms a query",
        "+ tokens\n1,230 ms a query",
    ]
    assert left.yaxis_inverted()
    assert [point[1:] for point in points(left)] == [(0.62, 0), (0.7, 1), (0.67, 2), (0.676, 3)]
    expected = [(i, row["hit_at_1"]["low"], row["hit_at_1"]["high"]) for i, row in enumerate(STAGES)]
    assert [bar[1:] for bar in bars(left)] == expected
    assert points(right) == [(GREEN, 0.08, 1), (RED, -0.03, 2), (GREY, 0.005, 3)]
    assert bars(right) == [(GREEN, 1, 0.03, 0.13), (RED, 2, -0.052, -0.008), (GREY, 3, -0.01, 0.02)]
    assert any(list(line.get_xdata()) == [0, 0] for line in right.lines)
    beside = [text.get_text() for text in right.texts if text.get_transform() == right.get_yaxis_transform()]
    assert beside == ["to start from", "better", "worse: it hurts", "no difference that can be told"]


def test_without_intervals_nothing_is_told_apart_and_the_reason_is_given():
    figure = curves.stages(UNSURE)
    assert not any(axis.collections for axis in figure.axes)
    assert points(figure.axes[1]) == [(GREY, 0.08, 1)]
    assert f"No interval: {FEW}." in words(figure)
    assert "95 %" not in words(figure)
    assert "95 % intervals over 42 photographs" in words(curves.stages(STAGES))


def test_nothing_added_and_nothing_to_count_are_said():
    told = words(curves.stages(STAGES[:1]))
    assert told == "plain search; nothing was added: Hit@1 0.62 [0.56, 0.67], 0.2 ms a query"
    none = intervals.interval([], []).record()
    row = {"stage": "plain", "hit_at_1": none, "map": none, "ms": 0.2}
    told = words(curves.stages([{**row, "difference": None}, {**row, "difference": none}]))
    assert told == "What the options add cannot be told: no queries to count."


def test_every_line_of_the_table():
    assert tables.stage_table(STAGES).splitlines() == [
        "stage        Hit@1              mAP                ms a query  difference to the row above",
        "plain        0.62 [0.56, 0.67]  0.52 [0.56, 0.67]  0.20",
        "+ whitening  0.70 [0.64, 0.75]  0.60 [0.64, 0.75]  0.20        +0.080 [+0.030, +0.130]  better",
        "+ expansion  0.67 [0.61, 0.72]  0.57 [0.61, 0.72]  1.83        -0.030 [-0.052, -0.008]  worse",
        "+ tokens     0.68 [0.62, 0.73]  0.58 [0.62, 0.73]  1234.50     +0.005 [-0.010, +0.020]  "
        "no difference that can be told",
    ]
    assert tables.stage_table(UNSURE).splitlines()[1:] == [
        "plain        0.62   0.52  0.20",
        "+ whitening  0.70   0.60  0.20        +0.080  no difference that can be told",
        f"No interval: {FEW}.",
    ]
    none = intervals.interval([], []).record()
    table = tables.stage_table([{"stage": "plain", "hit_at_1": none, "map": none, "ms": 0.2, "difference": None}])
    assert table.splitlines()[1:] == ["plain  -      -    0.20", "No interval: no queries to count."]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.001, 0.2, "better"),
        (-0.2, -0.001, "worse"),
        (0.0, 0.2, "no difference that can be told"),
        (-0.2, 0.0, "no difference that can be told"),
        (None, None, "no difference that can be told"),
    ],
)
def test_an_interval_that_touches_zero_tells_nothing(low, high, said):
    assert tables.difference_said({"value": 0.1, "low": low, "high": high}) == said


# --- how they look --------------------------------------------------------------------------------------------


def drawn():
    point = {"effort": None, "recall": 0.93, "ms": 0.4}
    costs = "$\\frac$ costs"  # signs that matplotlib would read as a formula
    return [
        curves.recall_curve(index(reason=costs)),
        curves.recall_curve(index(kind="factory", curve=[point], effort=None)),
        curves.stages([*STAGES, stage(costs, 0.676, difference=record(0.005, -0.01, 0.02))]),
        curves.stages(UNSURE),
    ]


def test_all_is_laid_out_inside_and_no_letter_too_small():
    for figure in drawn():
        figure.draw_without_rendering()  # a layout that fails warns, and warnings are errors here
        shown = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert not [text for text in shown if text.get_fontsize() < 7]
        for axis in figure.axes:
            box = axis.get_tightbbox()
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(legend.get_window_extent()) for legend in figure.legends)
            others = [other.get_tightbbox() for other in figure.axes if other is not axis]
            assert not any(box.overlaps(other) for other in others)


def test_the_same_bytes_again(tmp_path):
    for i, (figure, again) in enumerate(zip(drawn()[::2], drawn()[::2], strict=True)):
        first, second = (figures.show(f, tmp_path / f"{i}{j}.png").data for j, f in enumerate((figure, again)))
        assert first == second
