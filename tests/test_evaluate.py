"""Every figure against a case worked out by hand."""

import numpy as np
import pytest

from imatch import evaluate


def pair(query, rank, right, inliers=0, verified=False, error=None, angle=0.0, crop=0.5, retrieved=True):
    return {
        "query": query,
        "rank": rank,
        "right": right,
        "answerable": True,
        "retrieved": retrieved,
        "score": 0.0,
        "inliers": inliers,
        "verified": verified,
        "has_truth": right,
        "corner_error": error,
        "angle": angle,
        "crop": crop,
    }


PAIRS = [
    pair("p", 0, True, 50, True, 1.0),
    pair("p", 1, False, 3),
    pair("q", 0, False, 5, angle=90.0),
    pair("q", 1, True, 40, True, 3.0, angle=90.0),
    pair("r", 0, False, 30, True),
    pair("r", None, True, 2, False, None, retrieved=False),
]


def test_match_metrics_by_hand():
    figures = evaluate.match_metrics(PAIRS)
    assert figures["queries"] == 3
    assert figures["hit_at_1"] == pytest.approx(1 / 3)
    assert figures["reranked_hit_at_1"] == pytest.approx(2 / 3)
    assert figures["verified"] == 1.0
    assert figures["verified_right"] == pytest.approx(2 / 3)
    assert figures["corner_error_median"] == 2.0
    assert figures["true_pairs"] == 3
    assert figures["true_corner_error_median"] == 3.0  # of 1, 3 and a failure
    assert figures["true_within_8px"] == pytest.approx(2 / 3)
    assert [(view["angle"], view["hit_at_1"]) for view in figures["by_view"]] == [(0.0, 0.5), (90.0, 0.0)]
    assert figures["by_crop"][0]["queries"] == 3


def test_all_failed_has_no_median():
    figures = evaluate.match_metrics([pair("p", 0, True)])
    assert figures["true_corner_error_median"] is None
    assert figures["true_within_8px"] == 0.0


def test_nothing_to_count_is_none_and_not_zero():
    figures = evaluate.match_metrics([])
    assert figures["queries"] == 0
    assert figures["hit_at_1"] is figures["verified"] is figures["true_within_8px"] is None


def test_queries_without_an_answer_do_not_count():
    right = np.array([[True], [False]])
    assert evaluate.hit_at_k(right, 1) == 0.5
    assert evaluate.hit_at_k(right, 1, np.array([True, False])) == 1.0
    assert evaluate.hit_at_k(right, 1, np.array([False, False])) is None


def test_answerable_with_siblings_excluded():
    assert not evaluate.answerable(["a", "a"], ["a", "a"], True, True).any()


def test_summary_table_shows_each_angle_and_crop():
    table = evaluate.summary_table({"weight=sift": evaluate.match_metrics(PAIRS)})
    head, row = table.splitlines()[:2]
    assert head.split() == ["Hit@1", "crop", "0", "90", "mean", "re-ranked", "verified", "px"]
    assert row.split() == ["weight=sift", "0.5", "0.50", "0.00", "0.33", "0.67", "1.00", "2.00"]
