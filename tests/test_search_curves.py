"""What the figures of a search draw, looked at through matplotlib's own objects, and its table."""

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from imatch.evaluation import intervals, tables
from imatch.viz import curves, figures

FEW = "3 photographs are too few, 8 are the least"
GREEN, RED = "#009e73", "#d55e00"


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


def test_both_panels_show_every_effort_that_was_tried():
    given = index()
    found, took = curves.recall_curve(given).axes
    expected = [(point["effort"], point["recall"]) for point in given["curve"]]
    assert [tuple(point) for point in labelled(found, "tried").get_xydata()] == expected
    # the chosen one as it was timed beside exact search, not as the first of a row of searches
    expected = [(p["effort"], 0.21 if p["effort"] == 8 else p["ms"]) for p in given["curve"]]
    assert [tuple(point) for point in labelled(took, "tried").get_xydata()] == expected
    assert found.xaxis.get_transform().base == took.xaxis.get_transform().base == 2
    assert took.get_yscale() == "log"
    assert found.get_xlabel().startswith("nprobe")
    assert set(labelled(found, "asked for").get_ydata()) == {0.95}
    assert set(labelled(took, "exact search").get_ydata()) == {1.9}


def test_the_chosen_point_is_marked_and_named():
    figure = curves.recall_curve(index())
    found, took = figure.axes
    assert labelled(found, "chosen: 8").get_xydata().tolist() == [[8, 0.967]]
    assert labelled(took, "chosen: 8").get_xydata().tolist() == [[8, 0.21]]
    assert to_hex(labelled(found, "chosen").get_color()) == GREEN
    told = words(figure)
    assert "ivf_pq of 200,000 vectors, 104 bytes a vector" in told
    assert "faiss-cpu, 256 queries at once" in told
    assert "FALLS SHORT" not in told


def test_falling_short_is_said():
    figure = curves.recall_curve(index((0.3, 0.6, 0.8), 4))
    assert "FALLS SHORT" in labelled(figure.axes[0], "chosen").get_label()
    assert to_hex(labelled(figure.axes[1], "chosen").get_color()) == RED


def test_exact_kinds_and_a_factory_are_sentences():
    told = curves.recall_curve(index(kind="flat", curve=[], effort=None, bytes_a_vector=1536.0, search_ms=0.9))
    assert told == "flat is exact: recall 1 by definition; 0.9 ms a query, 1536 bytes a vector."
    point = {"effort": None, "recall": 0.93, "ms": 0.4}
    told = curves.recall_curve(index(kind="factory", curve=[point], effort=None))
    assert told == "factory: recall 0.930, 0.21 ms a query (1.9 by exact search), 104 bytes a vector."


def test_many_efforts_leave_room_between_their_names():
    figure = curves.recall_curve(index(np.linspace(0.05, 0.96, 17).tolist(), 2**16))
    figure.draw_without_rendering()
    for axis in figure.axes:
        boxes = [text.get_window_extent() for text in axis.get_xticklabels() if text.get_text()]
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
        assert len(boxes) >= 3


# --- the options ----------------------------------------------------------------------------------------------


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
    return [
        curves.recall_curve(index(kind="$\\frac$ costs")),  # signs that matplotlib would read as a formula
        curves.recall_curve(index((0.3, 0.6, 0.8), 4)),
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
    for i, (figure, again) in enumerate(zip(drawn(), drawn(), strict=True)):
        first, second = (figures.show(f, tmp_path / f"{i}{j}.png").data for j, f in enumerate((figure, again)))
        assert first == second
