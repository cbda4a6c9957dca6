"""What figures show, looked at by their pixels."""

import numpy as np
from PIL import Image

from imatch.core import files
from imatch.data import images
from imatch.data.pairs import pair_path
from imatch.viz import figures, pictures


def test_pairs_keep_their_colours(tmp_path):
    """Pictures of pairs have a palette on disk; its numbers are no colours."""
    row = {"query": "a.jpg", "candidate": "b.jpg", "rank": 0, "reranked": 0, "retrieved": True, "verified": False}
    drawn = np.zeros((40, 60, 3), np.uint8)
    drawn[:, :20], drawn[:, 20:40] = (230, 20, 20), (20, 20, 230)
    files.write_bytes(pair_path(tmp_path, row).with_suffix(".png"), pictures.encode(drawn))
    figure = figures.pair_sheet(tmp_path, [row])
    shown = np.asarray(figure.axes[0].images[0].get_array())
    assert np.abs(shown.astype(int) - drawn).max() < 12


def test_a_photograph_that_is_gone_is_grey_and_of_the_right_aspect(tmp_path):
    grey = images.thumbnail(tmp_path / "gone.jpg", (90, 160), 80)
    assert grey.shape == (45, 80, 3)
    assert len(np.unique(grey)) == 1
    Image.new("RGB", (160, 90), "red").save(tmp_path / "there.png")
    assert images.thumbnail(tmp_path / "there.png", (90, 160), 80)[0, 0].tolist() == [255, 0, 0]


def test_a_sentence_is_printed_and_takes_an_earlier_picture_away(tmp_path, capsys):
    path = tmp_path / "metres.png"
    path.write_bytes(b"of an earlier run")
    assert figures.show("No metres.", path) is None
    assert capsys.readouterr().out == "No metres.\n"
    assert not path.exists()


def test_without_a_saved_picture_there_is_no_sheet_of_pairs(tmp_path):
    row = {"query": "a.jpg", "candidate": "b.jpg", "rank": 0, "reranked": 0, "retrieved": True, "verified": False}
    assert figures.pair_sheet(tmp_path, [row]).startswith("No pictures of pairs")
    assert figures.pair_sheet(tmp_path, []).startswith("No pictures of pairs")
