"""In memory, and from folder to folder: the same numbers, and what does not fit is refused in words."""

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import imatch
from imatch.api import match
from imatch.core import compute
from imatch.core.types import ImatchError, PhotographError, StepError
from imatch.data import images, rotations
from imatch.data.shards import Shards
from imatch.data.store import Stored
from tests.test_steps import embedded, referenced

RESIZE = imatch.Resize("scale", scale=0.5)


@pytest.fixture(scope="module", params=["sift", "dsift"])
def both(request, few_photographs, tmp_path_factory):
    """Photographs and references of them, in memory and on disk."""
    exports = tmp_path_factory.mktemp("doors")
    data = embedded(few_photographs, exports, weight=request.param, resize=RESIZE)
    _, references = referenced(data)
    here = imatch.embed(few_photographs, request.param, resize=RESIZE)
    return here, Stored(data.folder), Stored(references.folder)


def test_both_doors_give_the_same_tokens(both):
    here, stored, _ = both
    assert (here.ids, here.shows, len(here)) == (stored.ids, stored.shows, len(stored))
    np.testing.assert_array_equal(here.vectors, stored.vectors)
    assert here.digest == stored.digest
    for row in range(len(here)):
        a, b = here.tokens(row), stored.tokens(row)
        assert a.grid == b.grid
        np.testing.assert_allclose(a.xy, b.xy, atol=1e-3)
        np.testing.assert_allclose(a.descriptors, b.descriptors, atol=5e-3)  # stored in fewer bits
        assert here.photograph(row) == stored.photograph(row)
        for key in ("id", "sha256", "position", "look", "n", "vector"):
            assert here.rows[row][key] == stored.rows[row][key]
        assert here.rows[row]["size"] == tuple(stored.rows[row]["size"])


def test_references_have_the_matrices_of_02_references(both):
    here, _, references = both
    made = imatch.references(here, [0, 90], [1.0])
    wanted = {(row["source"], row["angle"], row["crop"]): row for row in references.views.values()}
    assert {(row["source"], row["angle"], row["crop"]) for row in made.views.values()} == wanted.keys()
    for row in made.views.values():
        same = wanted[row["source"], row["angle"], row["crop"]]
        assert row["matrix"] == same["matrix"]
        assert (row["scale"], row["covered"], row["source_sha256"]) == (
            same["scale"],
            same["covered"],
            same["source_sha256"],
        )


def test_a_search_finds_what_exact_comparison_finds(both):
    here, stored, references = both
    hits = imatch.search(references, here, k=3)
    np.testing.assert_array_equal(hits.rows[:, 0], (references.vectors @ here.vectors.T).argmax(axis=1))
    for kind in ("flat", "hnsw"):
        built = imatch.index(stored, kind, device="cpu")
        np.testing.assert_array_equal(imatch.search(references, stored, 3, index=built).rows, hits.rows)
        assert built.stored() == 0
    assert built.tune(built.curve(references.vectors, 1), 0.9).recall >= 0.9


def test_a_query_says_what_it_shows(few_photographs):
    gallery = imatch.embed(few_photographs)
    rotated = np.rot90(images.decode(few_photographs / "b.png").pixels)
    blank = np.zeros((60, 60, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    answers = imatch.query([rotated, blank, noise], gallery, k=2)
    first, other = answers
    assert (first.match.names, round(first.match.rotation)) == (("00000", "b.png"), -90)
    assert not other
    assert other.match is None
    assert len(other.candidates) == len(other.scores) == len(other.matches) == 2
    told = str(answers).splitlines()
    assert told[0] == str(first.match)
    assert told[1].startswith("00002: no match among 2; the closest: ")
    assert told[2].startswith("left out: 00001: nothing to describe")


def test_a_stored_gallery_is_asked_like_one_in_memory(few_photographs, tmp_path):
    stored = Stored(embedded(few_photographs, tmp_path).folder)
    answers = imatch.query([few_photographs / "a.png"], stored)
    assert answers[0].match.names == (str(few_photographs / "a.png"), "a.png")
    Image.new("RGB", (50, 40)).save(tmp_path / "blank.png")
    given = [few_photographs / "a.png", tmp_path / "blank.png"]
    lines = imatch.query(given, stored).save(tmp_path / "answers.csv").read_text().splitlines()
    assert lines[0].startswith("query,candidate,verified,inliers")
    assert lines[1].startswith(f"{given[0]},a.png,True,")
    assert lines[2].startswith(f"{given[1]},,False,,,,,,,,nothing to describe")
    assert len(lines) == 3
    with pytest.raises(ImatchError, match=r"answers\.txt ends in '\.txt'"):
        answers.save(tmp_path / "answers.txt")
    few = Stored(embedded(few_photographs, tmp_path, keep="global", tag="few").folder)
    with pytest.raises(ImatchError, match="nothing can be matched 1:1: no local descriptors were kept"):
        imatch.query([few_photographs / "a.png"], few)


def test_bad_photographs_are_left_out_and_named(few_photographs, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no photograph")
    Image.new("RGB", (50, 40)).save(tmp_path / "blank.png")
    given = [few_photographs / "a.png", tmp_path / "broken.jpg", tmp_path / "blank.png", tmp_path / "gone.jpg"]
    found = imatch.embed(given)
    assert found.ids == [str(given[0])]
    assert [row["id"] for row in found.skipped] == [str(path) for path in given[1:]]
    assert "no texture was found in its 50 x 40 pixels" in found.skipped[1]["skipped"]
    with pytest.raises(ImatchError, match=r"none of 2 photographs could be used, the first: .*broken\.jpg: "):
        imatch.embed(given[1:3])


def test_what_does_not_fit_is_refused(few_photographs, tmp_path, monkeypatch):
    a, b = few_photographs / "a.png", few_photographs / "b.png"
    for given, said in (
        ([], "no photographs were given"),
        (tmp_path, "no photographs were given, or the folder holds none"),
        (tmp_path / "gone", "no folder .*gone: give a folder, or a list of photographs"),
        ([a, a], r"a\.png was given twice"),
        ([np.zeros((3, 3))], r"photograph 0 is an array \(3, 3\) of float64: give \(h, w, 3\) uint8 RGB"),
        ([a, 7], "photograph 1 is a int: give a path, an array or a Pillow image"),
        (Image.new("RGB", (9, 9)), "photographs is a Image: give a folder, or a list of photographs"),
    ):
        with pytest.raises(ImatchError, match=said):
            imatch.embed(given)
    with pytest.raises(ImatchError, match="long_side 100 is not a multiple of patch 16"):
        imatch.embed([a], "dsift", resize=imatch.Resize("long_side", long_side=100))
    sift, dsift = imatch.embed([a, b]), imatch.embed([a, b], "dsift")
    with pytest.raises(StepError, match="vectors of the queries and the gallery cannot be compared"):
        imatch.search(sift, dsift)
    with pytest.raises(ImatchError, match="the index is of another gallery: index this one"):
        imatch.search(sift, imatch.embed([b, a]), index=imatch.index(sift))
    with pytest.raises(ImatchError, match="k is 0: ask for at least 1 neighbour"):
        imatch.search(sift, sift, 0)
    with pytest.raises(ImatchError, match=r"crops\[0\] must be less than or equal to 1, got 2"):
        imatch.references(sift, crops=[2])
    with pytest.raises(ImatchError, match="batch_size is 0: give at least 1"):
        imatch.embed([a], batch_size=0)
    views = imatch.references(sift, [0], [0.5])
    with pytest.raises(ImatchError, match="these are references already: give the photographs"):
        imatch.references(views)
    monkeypatch.setattr(compute, "free_memory", lambda device="": 2**40 if device else 0)
    with pytest.raises(ImatchError, match=r"2 photographs take about .* GB of memory here: use imatch\.steps"):
        imatch.embed([a, b])


def test_a_pillow_image_that_cannot_be_decoded_is_named(few_photographs, tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes((few_photographs / "a.png").read_bytes()[:500])
    with Image.open(path) as image, pytest.raises(PhotographError, match="photograph 0: "):
        imatch.embed([image])


def test_what_changed_since_it_was_embedded_is_refused(few_photographs, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes((few_photographs / "a.png").read_bytes())
    gallery = imatch.embed([path])
    path.write_bytes((few_photographs / "b.png").read_bytes())
    with pytest.raises(ImatchError, match=r"a\.png has changed since it was embedded: embed again"):
        imatch.references(gallery)
    path.unlink()
    with pytest.raises(PhotographError, match=r"a\.png: No such file"):
        imatch.references(gallery)
    other = replace(gallery, parameters={**gallery.parameters, "weights_digest": "another"})
    for ask in (imatch.references, lambda one: imatch.query([few_photographs / "a.png"], one)):
        with pytest.raises(StepError, match="the weights of sift have changed since 01_embed"):
            ask(other)


def test_a_query_is_rotated_once_for_all_candidates(few_photographs, monkeypatch):
    gallery = imatch.embed(few_photographs, "dsift")
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    rotated = []
    monkeypatch.setattr(match, "turned", lambda *given: rotated.append(given[1]) or rotations.turned(*given))
    (answer,) = imatch.query([noise], gallery, k=3).answers
    assert len(answer.matches) == 3
    assert rotated == [90, 180, 270]


def test_what_the_first_backbone_finds_empty_is_asked_of_the_next(tmp_path, demo_photographs):
    """In a folder as of two photographs: sift finds nothing in two faint ones that overlap, xfeat verifies them."""
    grey = np.asarray(Image.open(demo_photographs / "camera.png").convert("RGB").resize((384, 384)), float)
    faint = (128 + 0.05 * (grey - 128)).round().astype(np.uint8)
    for name, part in (("a.png", faint[:352, :352]), ("b.png", faint[32:, 32:])):
        Image.fromarray(part).save(tmp_path / name)
    assert not imatch.match_folder(tmp_path, "sift").verified
    found = imatch.match_folder(tmp_path)
    assert (found.names, found.skipped) == (["a.png", "b.png"], {})
    assert [(row["verified"], row["weight"]) for row in found.pairs] == [(True, "xfeat")]


def test_a_new_photograph_costs_its_own_embedding_alone(few_photographs, tmp_path, capsys):
    folder = tmp_path / "growing"
    folder.mkdir()
    for i, name in enumerate(["a.png", "b.png", "c.jpg", "a.png", "b.png"]):
        (folder / f"{i}{name}").write_bytes((few_photographs / name).read_bytes())
    before = embedded(folder, tmp_path, shard_size=2)
    (folder / "0new.png").write_bytes(another(few_photographs))
    with pytest.raises(StepError, match=r"new: 0new\.png"):
        embedded(folder, tmp_path, shard_size=2)
    capsys.readouterr()
    grown = Stored(embedded(folder, tmp_path, shard_size=2, on_change="recompute").folder)
    assert "3 of 4 shards are there, 1 to compute" in capsys.readouterr().out
    fresh = Stored(embedded(folder, tmp_path / "fresh", shard_size=2).folder)
    assert grown.folder == before.folder
    assert grown.ids == fresh.ids == sorted(path.name for path in folder.iterdir())
    assert [row["shard"] for row in grown.rows] == [0, 3, 0, 1, 1, 2]
    np.testing.assert_array_equal(grown.vectors, fresh.vectors)
    grown.check_rows()
    for row in range(len(grown)):
        np.testing.assert_array_equal(grown.tokens(row).descriptors, fresh.tokens(row).descriptors)
        np.testing.assert_array_equal(grown.tokens(row).xy, fresh.tokens(row).xy)
    (folder / "0a.png").unlink()
    capsys.readouterr()
    smaller = Stored(embedded(folder, tmp_path, shard_size=2, on_change="recompute").folder)
    assert "3 of 4 shards are there, 1 to compute" in capsys.readouterr().out
    assert smaller.ids == grown.ids[1:]
    np.testing.assert_array_equal(smaller.vectors, grown.vectors[1:])
    assert Shards(smaller.folder).rows().keys() == {0, 1, 2, 3}


def another(folder):
    """A photograph that is not among them."""
    data = BytesIO()
    Image.open(folder / "a.png").transpose(Image.Transpose.ROTATE_90).save(data, "PNG")
    return data.getvalue()
