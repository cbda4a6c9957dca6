"""03_index over kinds of index: recall in its figures, results for programs, an index that outlives its step."""

import shutil

import numpy as np
import pytest

import imatch
from imatch.core import files
from imatch.core.types import ImatchError, ImatchWarning
from imatch.retrieval import index as searcher
from tests.test_steps import embedded, indexed, judged, referenced, searched


@pytest.fixture(scope="module")
def house(few_photographs, tmp_path_factory):
    data = embedded(few_photographs, tmp_path_factory.mktemp("exports"))
    _, references = referenced(data, angles=range(0, 360, 30))
    return data, references


def test_an_approximate_index_is_measured_and_tuned(house):
    step, *_ = searched(*house, "data-reference", index="ivf_flat", index_options={"centroids": 4}, tag="ivf", recall=1)
    figures = step.metrics["index"]
    assert (figures["kind"], figures["asked"], figures["backend"]) == ("ivf_flat", "ivf_flat", "faiss-cpu")
    assert [point["effort"] for point in figures["curve"]] == [1, 2, 4][: len(figures["curve"])]
    assert figures["recall"] == figures["curve"][-1]["recall"] == 1.0
    assert figures["effort"] == {"name": "nprobe", "value": figures["curve"][-1]["effort"]}
    assert figures["bytes_a_vector"] >= 4 * figures["dimension"] + 8
    exact, *_ = searched(*house, "data-reference", tag="exact")
    assert exact.metrics["index"]["curve"] == []
    assert exact.metrics["index"]["recall"] == 1.0
    for name in ("hit_at_1", "map_at_5", "not_found"):
        assert step.metrics[name] == exact.metrics[name]


def test_a_recall_out_of_reach_is_said(house):
    coarse = {"key": "PQ1x4", "refine": 0}  # one of 16 patterns for a whole vector
    step = indexed(*house, "data-reference", index="factory", index_options=coarse, tag="low", recall=0.99)
    query, gallery = imatch.steps.open_embeddings(step)
    built = imatch.steps.build_index(step, gallery)
    with pytest.warns(ImatchWarning, match=r"recall@5 is 0\.\d+ at most, below the 0\.99"):
        assert imatch.steps.tune_index(step, built, query)["recall"] < 0.99


def test_results_for_programs(house):
    step, query, gallery, ranking = searched(*house, "data-reference", k=3, tag="results")
    results = files.read_json(step.folder / "results.json")
    assert (results["weight"], results["variant"], results["direction"], results["k"]) == (
        "sift",
        "raw",
        "data-reference",
        3,
    )
    assert [record["query"] for record in results["queries"]] == query.ids
    ids, scores = np.load(step.folder / "ids.npy"), np.load(step.folder / "scores.npy")
    assert ids.shape == scores.shape == (len(query), 3)
    for q, record in enumerate(results["queries"]):
        assert [hit["id"] for hit in record["hits"]] == ids[q].tolist()
        assert [hit["score"] for hit in record["hits"]] == pytest.approx(scores[q].tolist(), abs=1e-6)
        assert set(record["timing_ms"]) == {"embed", "search", "total"}
        assert {"rank", "id", "path", "score", "accepted"} <= set(record["hits"][0])
    assert scores.tobytes() == ranking.scores.tobytes()
    assert ids[0].tolist() == [gallery.ids[row] for row in ranking.rows[0]]


def test_an_index_is_the_gallery_s_and_serves_all_who_search_it(house):
    searched(*house, "data-reference", k=2, tag="kept")
    (path,) = house[1].folder.glob("index/flat/0*.faiss")
    before = path.stat().st_mtime_ns
    for direction, given in (("data-reference", {"on_change": "recompute"}), ("reference-reference", {})):
        again = indexed(*house, direction, k=3, tag="kept", **given)
        imatch.steps.build_index(again, imatch.steps.open_embeddings(again)[1])
    assert path.stat().st_mtime_ns == before


def test_a_finished_step_searches_as_it_was_tuned(house):
    step, query, gallery, _ = searched(*house, "data-reference", tag="tuned", index="ivf_flat")
    built = imatch.steps.build_index(step, gallery)
    built.tune([searcher.Point(7, 1.0, 0.1)], 1.0)  # by other queries
    built = imatch.steps.build_index(step, gallery)
    assert built.effort == 7
    assert imatch.steps.tune_index(step, built, query)["effort"]["value"] == built.effort != 7


def test_an_index_follows_the_photographs(few_photographs, tmp_path):
    folder = tmp_path / "photographs"
    shutil.copytree(few_photographs, folder)
    data = embedded(folder, tmp_path / "exports")
    searched(data, None, "data-data", tag="moving", k=3)
    (folder / "b.png").unlink()
    data = embedded(folder, tmp_path / "exports", on_change="recompute")
    step, query, _, ranking = searched(data, None, "data-data", tag="moving", k=3, on_change="recompute")
    assert len(query) == 3
    vectors = np.asarray(query.vectors)
    cosine = vectors @ vectors.T - 2 * np.eye(3)
    assert ranking.rows[:, :2].tolist() == np.argsort(-cosine, axis=1)[:, :2].tolist()
    assert step.metrics["index"]["vectors"] == 3


def test_bad_requests_are_refused_before_anything_is_written(house, monkeypatch):
    monkeypatch.delenv("REDIS_URL", raising=False)
    for given, said in (
        ({"index": "ivf"}, "did you mean"),
        ({"index": "ivf_pq", "index_options": {"part": 4}}, "unknown option"),
        ({"recall": 1.5}, "recall must be less than or equal to 1"),
        ({"memory_gb": -1.0}, "memory_gb must be greater than or equal to 0"),
    ):
        with pytest.raises(ImatchError, match=said):
            indexed(*house, "data-reference", tag="never", **given)
    for to, said in (("reddis", "did you mean 'redis'"), ("redis", "set REDIS_URL")):
        with pytest.raises(ImatchError, match=said):
            imatch.SendOptions(to)
    data, _ = house
    assert not list(data.folder.parents[3].rglob("*_never"))


def test_what_does_not_fit_is_refused(house):
    step = indexed(*house, "data-reference", tag="small", memory_gb=1e-6)
    with pytest.raises(ImatchError, match=r"takes .* more than 0\.00 MB"):
        judged(step)
