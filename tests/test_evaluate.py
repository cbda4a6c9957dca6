"""Every figure against a case worked out by hand."""

import math

import numpy as np
import pytest

from imatch.core.types import Truth
from imatch.evaluation import metrics as evaluation_metrics
from imatch.evaluation import tables
from imatch.evaluation.calibration import calibrate
from imatch.evaluation.metrics import (
    ACCURACY,
    average_precision,
    corner_auc,
    hit_at_k,
    match_metrics,
    recall_at_k,
    retrieval_metrics,
)
from imatch.matching import geometry
from imatch.retrieval.truth import same_photograph


def near(**figures):
    """What the figures should be, but for rounding."""
    return {name: pytest.approx(value) for name, value in figures.items()}


def of(figures, wanted):
    return {name: figures[name] for name in wanted}


# --- what is right ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_truth_says_what_a_search_through_all_pairs_says(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    answers = [rng.choice(n, rng.integers(0, n + 1), replace=False).tolist() for _ in range(9)]
    truth = Truth.of(answers)
    hits = rng.integers(-1, n, (9, 7))
    wanted = [[row in found for row in rows] for rows, found in zip(hits.tolist(), answers, strict=True)]
    assert truth.right(hits).tolist() == wanted
    assert truth.right(hits[3:6], slice(3, 6)).tolist() == wanted[3:6]
    assert truth.count.tolist() == [len(found) for found in answers]


def test_truth_takes_a_row_that_is_named_twice_once_and_none_at_all():
    assert Truth.of([[3, 1, 3]]).rows.tolist() == [1, 3]
    nothing = Truth.of([[], []])
    assert nothing.count.tolist() == [0, 0]
    assert not nothing.right(np.array([[0, -1], [5, 1]])).any()
    assert Truth.of([]).right(np.zeros((0, 3), int)).shape == (0, 3)


# three photographs, of which b and c are the same file, and two references each
DATA, REFERENCES = ["A", "B", "B"], ["A", "A", "B", "B", "B", "B"]
DIRECTIONS = {
    "reference-data": (REFERENCES, DATA, None, [[0], [0], [1, 2], [1, 2], [1, 2], [1, 2]]),
    "data-reference": (DATA, REFERENCES, None, [[0, 1], [2, 3, 4, 5], [2, 3, 4, 5]]),
    "data-data": (DATA, DATA, "self", [[], [2], [1]]),
    "reference-reference": (
        REFERENCES,
        REFERENCES,
        "self",
        [[1], [0], [3, 4, 5], [2, 4, 5], [2, 3, 5], [2, 3, 4]],
    ),
    "reference-reference without siblings": (REFERENCES, REFERENCES, "siblings", [[]] * 6),
}


@pytest.mark.parametrize(("query", "gallery", "left_out", "wanted"), DIRECTIONS.values(), ids=DIRECTIONS)
def test_what_is_right_in_every_direction(query, gallery, left_out, wanted):
    own = {
        None: None,
        "self": (np.arange(len(query)), np.arange(len(gallery))),
        "siblings": tuple(np.array([names.index(name) for name in names]) for names in (query, gallery)),
    }[left_out]
    truth = same_photograph(query, gallery, own)
    assert [rows.tolist() for rows in np.split(truth.rows, truth.first[1:-1])] == wanted


@pytest.mark.parametrize("seed", range(4))
def test_same_photograph_against_every_pair(seed):
    rng = np.random.default_rng(seed)
    query, gallery = (rng.choice(list("abcde"), n).tolist() for n in (8, 11))
    own, there = rng.integers(0, 3, 8), rng.integers(0, 3, 11)
    truth = same_photograph(query, gallery, (own, there))
    hits = np.tile(np.arange(11), (8, 1))
    wanted = [[query[q] == gallery[g] and own[q] != there[g] for g in range(11)] for q in range(8)]
    assert truth.right(hits).tolist() == wanted


# --- retrieval ----------------------------------------------------------------------------------------------

RIGHT = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
ANSWERS = np.array([2, 1, 7])


def test_one_answer_by_hand():
    right = np.array([[0, 1, 0]], bool)
    assert [hit_at_k(right, k).item() for k in (1, 2, 3)] == [0, 1, 1]
    assert [recall_at_k(right, np.array([1]), k).item() for k in (1, 2, 3)] == [0, 1, 1]
    assert average_precision(right, np.array([1])).item() == 0.5


def test_several_answers_by_hand():
    assert hit_at_k(RIGHT, 1).tolist() == [1, 0, 0]
    assert hit_at_k(RIGHT, 2).tolist() == [1, 1, 0]
    assert recall_at_k(RIGHT, ANSWERS, 1).tolist() == [0.5, 0, 0]
    assert recall_at_k(RIGHT, ANSWERS, 4).tolist() == [1, 1, 0]
    assert average_precision(RIGHT, ANSWERS).tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 2, 0])


def test_average_precision_counts_at_most_k_answers_and_what_was_not_found():
    all_right = np.ones((1, 3), bool)
    assert average_precision(all_right, np.array([40])).tolist() == [1.0]  # no more than 3 could be shown
    one = np.array([[True, False, False]])
    assert average_precision(one, np.array([2])).tolist() == [0.5]
    assert average_precision(one, np.array([40])).tolist() == pytest.approx([1 / 3])


def test_a_gallery_smaller_than_k_leaves_places_that_count_as_wrong():
    right = np.pad(np.array([[True]]), ((0, 0), (0, 9)))
    assert retrieval_metrics([asked(1, [0])], 10)["precision_at_10"] == 0.1
    assert recall_at_k(right, np.array([1]), 10).tolist() == [1.0]
    assert average_precision(right, np.array([1])).tolist() == [1.0]


def test_a_query_without_an_answer_has_no_share_of_them():
    nothing = np.zeros((1, 3), bool)
    assert np.isnan(recall_at_k(nothing, np.array([0]), 3)).all()
    assert np.isnan(average_precision(nothing, np.array([0]))).all()


@pytest.mark.parametrize("seed", range(3))
def test_ranked_figures_against_loops(seed):
    rng = np.random.default_rng(seed)
    right = rng.random((20, 8)) < 0.3
    answers = right.sum(axis=1) + rng.integers(0, 4, 20)
    for q in np.flatnonzero(answers):
        found, precisions = 0, []
        for rank in range(8):
            if right[q, rank]:
                found += 1
                precisions.append(found / (rank + 1))
        one, many = right[q : q + 1], answers[q : q + 1]
        assert average_precision(one, many).item() == pytest.approx(sum(precisions) / min(many[0], 8))
        assert recall_at_k(one, many, 8).item() == pytest.approx(found / many[0])


def test_chance_is_the_share_of_right_rows():
    assert evaluation_metrics.chance(np.array([2, 0, 5]), np.array([10, 10, 20])) == pytest.approx((0.2 + 0.25) / 2)
    assert evaluation_metrics.chance(np.array([0, 0]), np.array([10, 0])) is None
    assert evaluation_metrics.chance(np.zeros(0, int), np.zeros(0, int)) is None


def test_guessing_reaches_chance():
    """A ranking drawn by lot has the Hit@1 that is called chance."""
    rng = np.random.default_rng(0)
    shows = np.repeat(np.arange(10), np.arange(1, 11))  # 1 to 10 rows of each of 10 photographs
    truth = same_photograph(list(range(10)), shows.tolist())
    hits = [hit_at_k(truth.right(rng.integers(0, 55, (10, 1))), 1).mean() for _ in range(4000)]
    chance = evaluation_metrics.chance(truth.count, np.full(10, 55))
    assert np.mean(hits) == pytest.approx(chance, abs=4 * np.std(hits) / math.sqrt(4000))


def asked(answers, ranks, cluster="a", angle=0.0, crop=0.5, **given):
    """A row of queries.jsonl."""
    view = {"angle": angle, "crop": crop}
    return {"answers": answers, "right_ranks": ranks, "cluster": cluster, "embedded": True, **view, **given}


ROWS = [
    asked(2, [0, 2], "a"),
    asked(1, [1], "a", angle=90.0),
    asked(5, [], "b"),
    asked(0, [], "b"),
]


def test_retrieval_metrics_by_hand():
    figures = retrieval_metrics(ROWS, 3)
    assert (figures["queries"], figures["without_answer"]) == (4, 1)
    wanted = near(
        hit_at_1=1 / 3,
        hit_at_3=2 / 3,
        recall_at_1=0.5 / 3,
        recall_at_3=2 / 3,
        precision_at_1=1 / 3,
        precision_at_3=(2 / 3 + 1 / 3) / 3,
        map_at_3=(5 / 6 + 1 / 2) / 3,
        mrr_at_3=0.5,
    )
    assert of(figures, wanted) == wanted
    assert [(view["crop"], view["angle"], view["value"]) for view in figures["by_view"]] == [
        (0.5, 0.0, 0.5),
        (0.5, 90.0, 0.0),
    ]
    for name in ("hit_at_1", "map", "mrr"):
        said = figures["intervals"][name]
        assert said["value"] == pytest.approx(figures[name if name == "hit_at_1" else f"{name}_at_3"])
        assert (said["low"], said["high"], said["clusters"]) == (None, None, 2)
        assert said["why"] == "2 photographs are too few, 8 are the least"


@pytest.mark.parametrize(("k", "depths"), [(1, [1]), (3, [1, 3]), (5, [1, 5]), (7, [1, 5, 7]), (20, [1, 5, 10, 20])])
def test_figures_go_as_deep_as_the_ranking(k, depths):
    figures = retrieval_metrics(ROWS[1:2] if k > 1 else ROWS[2:3], k)
    for name in ("hit", "recall", "precision"):
        assert [int(key.rpartition("_")[2]) for key in figures if key.startswith(f"{name}_at_")] == depths


@pytest.mark.parametrize("rows", [[], [asked(0, []), asked(0, [])]], ids=["no query", "no answer"])
def test_nothing_to_count_is_none_and_never_zero(rows):
    figures = retrieval_metrics(rows, 10)
    assert figures.pop("queries") == figures.pop("without_answer") == len(rows)
    assert (figures.pop("k"), figures.pop("missed")) == (10, 0)
    assert figures.pop("by_view") == []
    for said in figures.pop("intervals").values():
        assert (said["value"], said["low"], said["high"], said["clusters"]) == (None, None, None, 0)
    assert len(figures) == 11
    assert all(value is None for value in figures.values())


def test_a_query_without_an_answer_moves_no_figure():
    with_it, without = retrieval_metrics(ROWS, 3), retrieval_metrics(ROWS[:3], 3)
    for figures in (with_it, without):
        del figures["queries"], figures["without_answer"]
    assert with_it == without


def test_a_query_in_which_nothing_was_found_is_wrong_and_is_told():
    missed = [asked(1, [], "c", embedded=False), asked(0, [], "c", embedded=False)]
    figures = retrieval_metrics([asked(1, [0], "a"), *missed], 3)
    assert (figures["queries"], figures["without_answer"], figures["missed"]) == (3, 1, 1)
    assert figures["hit_at_1"] == figures["map_at_3"] == 0.5
    assert table([asked(1, [0], "a"), *missed])[0] == (
        "3 queries in a gallery of 9; 1 of them have no right answer there and are not counted below; "
        "1 of them could not be embedded and count as wrong"
    )


def test_intervals_count_clusters_and_not_queries():
    """The same 40 queries, all of one photograph, of 4, and each of its own."""
    ranks = [[0] if i % 4 else [] for i in range(40)]
    widths = []
    for photographs in (8, 40):
        rows = [asked(1, found, str(i * photographs // 40)) for i, found in enumerate(ranks)]
        said = retrieval_metrics(rows, 1)["intervals"]["hit_at_1"]
        assert said["value"] == 0.75
        assert said["low"] < 0.75 < said["high"]
        assert said["clusters"] == photographs
        widths.append(said["high"] - said["low"])
    rows = [asked(1, found, str(i * 4 // 40)) for i, found in enumerate(ranks)]
    said = retrieval_metrics(rows, 1, "captures")["intervals"]["hit_at_1"]
    assert (said["low"], said["why"]) == (None, "4 captures are too few, 8 are the least")


def test_each_view_has_an_interval_of_its_own():
    rows = [asked(1, [0] if angle == 0 or i % 2 else [], str(i), angle) for i in range(10) for angle in (0.0, 30.0)]
    rows += [asked(1, [0], str(i), None, None) for i in range(10)]  # photographs have no angle
    upright, turned = retrieval_metrics(rows, 1)["by_view"]
    assert (upright["angle"], upright["value"], upright["high"]) == (0.0, 1.0, 1.0)
    assert upright["low"] == pytest.approx(0.025 ** (1 / 10))  # Clopper-Pearson, 10 of 10
    assert (turned["angle"], turned["value"]) == (30.0, 0.5)
    assert 0 < turned["low"] < 0.5 < turned["high"] < 1


# --- the table ----------------------------------------------------------------------------------------------


def believed(**given):
    return {
        "value": 0.8,
        "wanted": 0.95,
        "precision": 1.0,
        "coverage": 0.6,
        "held_out_precision": 0.93,
        "held_out_coverage": 0.5,
        "why": "",
        **given,
    }


def table(rows=ROWS, k=3, threshold=None, positions=None, chance=0.12):
    metrics = retrieval_metrics(rows, k)
    more = {"gallery": 9, "chance": chance, "threshold": threshold or believed(), "positions": positions}
    return tables.retrieval_table({**metrics, **more}).splitlines()


def test_every_line_of_the_table():
    few = "(no interval: 2 photographs are too few, 8 are the least)"
    assert table() == [
        "4 queries in a gallery of 9; 1 of them have no right answer there and are not counted below",
        f"Hit@1        0.33 {few}",
        f"mAP@3        0.44 {few}",
        f"MRR@3        0.50 {few}",
        "Hit@K        0.33 @1   0.67 @3",
        "Recall@K     0.17 @1   0.67 @3",
        "Precision@K  0.33 @1   0.33 @3",
        "by chance    0.12",
        "no match     a first hit is believed from cosine 0.800 on, for a precision of 0.95: 0.60 of the queries that "
        "have an answer",
        "             on photographs that it was not calibrated on: precision 0.93, BELOW what was asked "
        "for: do not rely on it; coverage 0.50",
    ]


def test_the_table_says_an_interval_where_there_is_one():
    lines = table([asked(1, [0], str(i)) for i in range(10)], k=1)
    assert lines[0] == "10 queries in a gallery of 9"
    assert lines[1:4] == [
        "Hit@1        1.00 [0.69, 1.00]",
        "mAP@1        1.00 [0.69, 1.00]",
        "MRR@1        1.00 [0.69, 1.00]",
    ]


def test_the_table_of_nothing_has_dashes():
    lines = table([asked(0, [])], chance=None)
    assert lines[1:4] == ["Hit@1        -", "mAP@3        -", "MRR@3        -"]
    assert lines[4:8] == [
        "Hit@K        - @1   - @3",
        "Recall@K     - @1   - @3",
        "Precision@K  - @1   - @3",
        "by chance    -",
    ]


def test_the_table_says_why_there_is_no_threshold_or_nothing_held_out():
    why = "no score shows a precision of 0.95"
    lines = table(threshold=believed(value=None, precision=None, coverage=0.0, held_out_precision=None, why=why))
    assert lines[8:] == [f"no match     none is believed: {why}"]
    why = "no held-out figure: 2 clusters are too few, 8 are the least"
    lines = table(threshold=believed(held_out_precision=None, held_out_coverage=None, why=why))
    assert lines[9:] == [f"             {why}"]


def test_the_table_takes_what_calibrate_gives():
    scores = np.linspace(0, 1, 200)
    found = calibrate(scores, scores > 0.5, scores > 0.5, np.arange(200) % 10)
    assert table(threshold=found.record())[8].startswith("no match     a first hit is believed from cosine 0.4")
    none = calibrate(scores[:4], scores[:4] > 9, scores[:4] > -1, np.arange(4))
    assert "none is believed: no score shows" in table(threshold=none.record())[8]


def test_the_table_says_when_what_was_held_out_falls_short():
    for held, short in ((0.94, True), (0.0, True), (0.95, False), (0.96, False)):
        assert ("BELOW what was asked for" in table(threshold=believed(held_out_precision=held))[9]) == short


def test_the_table_says_metres():
    positions = {
        "queries": 3,
        "unknown": 1,
        "top1_metres_median": 40.0,
        "top1_metres_mean": 40.0,
        "least_metres_median": None,
        "within": {"10": 0.25, "50": 1.0},
        "within_top_k": {"10": 0.5, "50": 1.0},
    }
    assert table(positions=positions)[-2:] == [
        "metres       first hit 40.00 (median), nearest of all hits - (1 queries without a position are not counted)",
        "             first hit: 0.25 within 10 m   1.00 within 50 m",
    ]
    assert "not counted)" not in table(positions={**positions, "unknown": 0})[-2]


# --- geometry -----------------------------------------------------------------------------------------------


def pose_auc(errors, thresholds):
    """As SuperGlue's code has it, written down once more."""
    errors = sorted(errors)
    recall = [(i + 1) / len(errors) for i in range(len(errors))]
    errors, recall = [0.0, *errors], [0.0, *recall]
    areas = []
    for limit in thresholds:
        last = next((i for i, error in enumerate(errors) if error >= limit), len(errors))
        xs, ys = [*errors[:last], limit], [*recall[:last], recall[last - 1]]
        area = sum((xs[i + 1] - xs[i]) * (ys[i + 1] + ys[i]) / 2 for i in range(len(xs) - 1))
        areas.append(area / limit)
    return areas


@pytest.mark.parametrize("seed", range(6))
def test_corner_auc_is_that_of_superglue(seed):
    rng = np.random.default_rng(seed)
    errors = rng.exponential(4, int(rng.integers(1, 40))).tolist()
    errors += [math.inf] * int(rng.integers(0, 5)) + [0.0] * int(rng.integers(0, 3)) + [3.0, 5.0, 10.0][: seed % 4]
    assert [corner_auc(errors, limit) for limit in (3, 5, 10)] == pytest.approx(pose_auc(errors, (3, 5, 10)))


def test_corner_auc_by_hand():
    assert corner_auc([], 5) is None
    assert corner_auc([math.inf, math.inf], 5) == 0.0
    assert corner_auc([5.0], 5) == 0.0  # as SuperGlue counts it: only what lies below
    assert corner_auc([0.0, 0.0], 5) == 1.0
    # rises from (0, 0) to (2, 1), then stays: a triangle of 1 and a rectangle of 2, of 4
    assert corner_auc([2.0], 4) == pytest.approx(3 / 4)
    # (0, 0) (1, 0.5) and, at 4, still 0.5: 0.25 + 1.5, of 4
    assert corner_auc([9.0, 1.0], 4) == pytest.approx(1.75 / 4)


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [(-179.5, 180, 0.5), (180, -180, 0), (10, -10, 20), (0, 180, 180), (90, -90, 180), (-170, 175, 15), (359, 1, 2)],
)
def test_directions_lie_apart_over_the_seam(one, other, apart):
    assert geometry.turned_apart(one, other) == geometry.turned_apart(other, one) == pytest.approx(apart)


def test_matching_accuracy_by_hand():
    """Correspondences 0, 1, 3 and 6 pixels away from where the truth, a shift by (10, 0), puts them."""
    xy = np.array([[0.0, 0], [5, 5], [7, 1], [2, 9]])
    there = xy + np.array([[10.0, 0], [10, 1], [7, 0], [10, 6]])
    truth = np.array([[1.0, 0, 10], [0, 1, 0], [0, 0, 1]])
    assert geometry.matching_accuracy(xy, there, truth, ACCURACY) == [0.5, 0.75, 0.75, 1.0]
    assert geometry.matching_accuracy(xy[:0], there[:0], truth, ACCURACY) is None


# --- 1:1 matching -------------------------------------------------------------------------------------------


def pair(query, rank, right, inliers=0, verified=False, error=None, angle=0.0, crop=0.5, retrieved=True, **given):
    return {
        "query": query,
        "candidate": "x",
        "rank": rank,
        "right": right,
        "answerable": True,
        "retrieved": retrieved,
        "cluster": query,
        "score": 0.0,
        "matches": 100,
        "inliers": inliers,
        "verified": verified,
        "has_truth": right,
        "corner_error": error,
        "accuracy": [0.25, 0.5, 0.75, 1.0] if right else None,
        "rotation_error": None,
        "scale_error": None,
        "angle": angle,
        "crop": crop,
        **given,
    }


PAIRS = [
    pair("p", 0, True, 50, True, 1.0, rotation_error=0.5, scale_error=0.02),
    pair("p", 1, False, 3),
    pair("q", 0, False, 5, angle=90.0),
    pair("q", 1, True, 40, True, 3.0, angle=90.0, rotation_error=2.5, scale_error=0.01),
    pair("r", 0, False, 30, True),
    pair("r", None, True, 0, False, None, retrieved=False, matches=0, accuracy=None),
]


def test_match_metrics_by_hand():
    figures = match_metrics(PAIRS)
    wanted = near(
        queries=3,
        hit_at_1=1 / 3,
        reranked_hit_at_1=2 / 3,
        verified=1.0,
        verified_right=2 / 3,
        wrong_verified=1 / 3,
        corner_error_median=2.0,
        true_pairs=3,
        true_corner_error_median=3.0,  # of 1, 3 and a failure
        true_within_8px=2 / 3,
        inlier_ratio=(0.5 + 0.4 + 0) / 3,
        rotation_error_median=2.5,
        scale_error_median=0.02,
    )
    assert of(figures, wanted) == wanted
    assert figures["corner_auc"] == near(
        **{
            # up to (1, 1/3), where it stays to 3: what lies at the limit is not below it
            "3": (1 * 1 / 6 + 2 * 1 / 3) / 3,
            # to (1, 1/3), (3, 2/3), and stays
            "5": (1 / 6 + 2 * 1 / 2 + 2 * 2 / 3) / 5,
            "10": (1 / 6 + 2 * 1 / 2 + 7 * 2 / 3) / 10,
        }
    )
    # a pair without any correspondence has none in the right place
    accuracy = {"1": 0.5 / 3, "3": 1 / 3, "5": 0.5, "10": 2 / 3}
    assert figures["matching_accuracy"] == near(**accuracy)


def test_match_metrics_by_view_and_crop():
    figures = match_metrics(PAIRS)
    assert [(view["angle"], view["hit_at_1"]) for view in figures["by_view"]] == [(0.0, 0.5), (90.0, 0.0)]
    assert figures["by_crop"][0]["queries"] == 3
    upright, turned = figures["by_view"]
    assert (upright["true_pairs"], turned["true_pairs"]) == (2, 1)
    assert upright["wrong_verified"] == 0.5
    assert turned["wrong_verified"] == 0.0
    assert turned["rotation_error_median"] == 2.5
    assert upright["rotation_error_median"] is None  # of 0.5 and a failure
    assert turned["intervals"]["hit_at_1"]["why"] == "1 photographs are too few, 8 are the least"


def test_match_metrics_have_intervals_by_view():
    rows = [
        pair(f"{i} {angle}", 0, right := angle == 0 or i % 2 == 0, 9, True, 1.0 if right else None, angle, cluster=i)
        for i in range(10)
        for angle in (0.0, 90.0)
    ]
    figures = match_metrics(rows)
    upright, turned = figures["by_view"]
    assert upright["intervals"]["hit_at_1"]["low"] == pytest.approx(0.025 ** (1 / 10))
    assert 0 < turned["intervals"]["hit_at_1"]["low"] < 0.5 < turned["intervals"]["hit_at_1"]["high"]
    assert figures["intervals"]["hit_at_1"]["value"] == figures["hit_at_1"] == 0.75
    assert figures["intervals"]["true_within_8px"] == {**figures["intervals"]["true_within_8px"], "value": 1.0}
    assert figures["by_crop"][0]["intervals"] == figures["intervals"]


def test_a_wrong_candidate_counts_once_a_query_and_the_own_source_never():
    rows = [
        pair("p", 0, False, 30, True),
        pair("p", 1, False, 30, True),
        pair("q", 0, False),
        pair("q", None, True, 30, True, 1.0, retrieved=False),
        pair("r", 0, True, 30, True, 1.0),  # of which no wrong candidate is known
    ]
    assert match_metrics(rows)["wrong_verified"] == 0.5


def test_the_own_photograph_tells_of_geometry_also_where_it_is_no_answer():
    """By place, with siblings left out, a query's own photograph is not right, and yet it matches rightly."""
    own = pair("p", 0, False, 50, True, 2.0, has_truth=True, accuracy=[1.0] * 4, rotation_error=0.0, scale_error=0.0)
    figures = match_metrics([own, pair("p", 1, True, 3, has_truth=False, accuracy=None)])
    assert figures["wrong_verified"] is None  # no other candidate is wrong
    assert (figures["true_pairs"], figures["true_corner_error_median"]) == (1, 2.0)
    assert figures["hit_at_1"] == 0.0


def test_a_query_that_has_no_answer_counts_among_the_wrong_alone():
    figures = match_metrics([*PAIRS, pair("s", 0, False, 20, True, answerable=False)])
    assert figures["hit_at_1"] == pytest.approx(1 / 3)
    assert figures["reranked_hit_at_1"] == pytest.approx(2 / 3)
    assert figures["wrong_verified"] == 0.5
    assert figures["queries"] == 4


def test_all_failed_has_no_median():
    figures = match_metrics([pair("p", 0, True)])
    assert figures["true_corner_error_median"] is None
    assert figures["rotation_error_median"] is figures["scale_error_median"] is None
    assert figures["true_within_8px"] == 0.0
    assert figures["corner_auc"] == {"3": 0.0, "5": 0.0, "10": 0.0}


def test_nothing_matched_is_none_and_not_zero():
    figures = match_metrics([])
    assert figures["queries"] == figures["true_pairs"] == 0
    for name in ("hit_at_1", "verified", "true_within_8px", "wrong_verified", "inlier_ratio", "rotation_error_median"):
        assert figures[name] is None, name
    assert figures["corner_auc"] == {"3": None, "5": None, "10": None}
    assert figures["matching_accuracy"] == {"1": None, "3": None, "5": None, "10": None}
    assert {said["value"] for said in figures["intervals"].values()} == {None}


def test_summary_table_shows_each_angle_and_crop():
    table = tables.summary_table({"weight=sift": {**match_metrics(PAIRS), "queries_skipped": 2}})
    few = "(no interval: 3 photographs are too few, 8 are the least)"
    assert [" ".join(line.split()) for line in table.splitlines()] == [
        "Hit@1 crop 0 90 mean [95 % interval]",
        f"weight=sift 0.5 0.50 0.00 0.33 {few}",
        "",
        f"weight=sift: 3 queries, Hit@1 0.33 {few}, re-ranked by 1:1 matching 0.67 {few}",
        "re-ranking changes Hit@1 by +0.333: no difference that can be told",
        "verified: 1.00 of the queries, 0.67 of those are right, 0.33 have a wrong candidate that verifies",
        "median corner error of verified right matches: 2.00 px",
        "of all 3 pairs of a reference and its source: median corner error 3.00 px, within 8 px 0.67",
        "not counted above: 2 queries that could not be decoded",
    ]


def test_reranking_that_hurts_is_called_worse():
    """Twelve queries that retrieval answers; re-ranking moves a wrong candidate that verifies before the right one."""
    rows = [
        row
        for i in range(12)
        for row in (pair(f"q{i:02d}", 0, True, 5, cluster=i), pair(f"q{i:02d}", 1, False, 30, True, cluster=i))
    ]
    figures = match_metrics(rows)
    changed = figures["intervals"]["reranking"]
    assert (figures["hit_at_1"], figures["reranked_hit_at_1"], changed["value"]) == (1.0, 0.0, -1.0)
    assert changed["high"] < 0
    assert "  re-ranking changes Hit@1 by -1.000 [" in (table := tables.summary_table({"sift": figures}))
    assert "]: worse" in table


def test_summary_table_of_a_list_says_how_many_pairs_verified():
    unknown = pair("p", 0, None, 30, True, answerable=False, has_truth=False, accuracy=None)
    rows = [{**unknown, "angle": None, "crop": None}]
    figures = {"pairs": 1, "pairs_verified": 1, **match_metrics(rows)}
    assert figures["hit_at_1"] is figures["wrong_verified"] is figures["verified_right"] is None
    said = "1 of 1 pairs verified; no query has a right answer that is known, so there is no Hit@1"
    assert tables.summary_table({"sift": figures}) == f"\nsift: {said}"


def test_summary_table_of_nothing():
    table = tables.summary_table({"weight=sift": match_metrics([])})
    assert table == "\nweight=sift: 0 queries, Hit@1 -, re-ranked by 1:1 matching -"
