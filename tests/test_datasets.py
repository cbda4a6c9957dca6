"""imatch.data.datasets: which photographs belong to a data set, and which of them image groups choose."""

import unicodedata
from pathlib import Path

import pytest

from imatch.core import config
from imatch.core.types import ImatchError
from imatch.data import datasets


def read(**fields):
    return datasets.read("d", {"root": "s", **fields}, Path("/photographs"), "key.json: d")


def survey(captures, **templates):
    return read(captures=captures, **templates)


# --- templates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capture", "templates", "folder", "files"),
    [  # files: name -> frame, None for one that is not of the capture
        ("80m", {}, "A1_80m", {"A1_80m_7.jpg": 7, "A1_80m_007.jpg": 7, "A1_80m_.jpg": None, "A2_80m_7.jpg": None}),
        (
            {"label": "80m"},
            {},
            "A1_80m",
            {"A1_80m_0.jpg": 0, "A1_80m_-1.jpg": None, "A1_80m_7.JPG": 7, "a1_80m_7.jpg": None},
        ),
        (80, {}, "A1_80", {"A1_80_12.jpg": 12}),
        ({"altitude": 80}, {}, "A1_80", {"A1_80_12.jpg": 12}),
        ({"altitude": 80.0}, {}, "A1_80", {"A1_80_12.jpg": 12}),
        ({"altitude": 12.5}, {}, "A1_12.5", {"A1_12.5_12.jpg": 12, "A1_12x5_12.jpg": None}),
        ({"altitude": "80m"}, {}, "A1_80m", {"A1_80m_12.jpg": 12}),
        ("80m", {"filename_template": "DJI_{frame:04d}.JPG"}, "A1_80m", {"DJI_0007.JPG": 7, "DJI_7.JPG": 7}),
        ("80m", {"filename_template": "DJI_{index:04}.JPG"}, "A1_80m", {"DJI_12345.JPG": 12345, "DJI_x.JPG": None}),
        ("80m", {"filename_template": "DJI_{frame:0>4}.jpg"}, "A1_80m", {"DJI_0007.JPG": 7, "dji_0007.jpg": None}),
        ("80m", {"filename_template": "./{frame:0=4d}.jpg"}, "A1_80m", {"0007.jpg": 7}),
        ("80m", {"filename_template": "rgb//{frame}"}, "A1_80m", {"rgb/7": 7}),
        ("80m", {"filename_template": "{idx}.png"}, "A1_80m", {"0012.png": 12, "a12.png": None}),
        ("80m", {"filename_template": "{label}{frame:03d}.jpg"}, "A1_80m", {"80m007.jpg": 7, "80m.jpg": None}),
        ("80m", {"filename_template": "{frame}_{idx:03d}.jpg"}, "A1_80m", {"7_007.jpg": 7, "7_008.jpg": None}),
        ("80m", {"filename_template": "a{{b}}.{frame}"}, "A1_80m", {"a{b}.1": 1, "axb}.1": None}),
        ("80m", {"filename_template": "rgb/{frame}.jpg"}, "A1_80m", {"rgb/3.jpg": 3, "3.jpg": None}),
        ("80m", {"filename_template": "map.jpg"}, "A1_80m", {"map.jpg": "none"}),
        ("80m", {"folder_template": "{dataset_key}/{capture_id:>4}"}, "d/  A1", {"A1_80m_1.jpg": 1}),
        ("8 m/n", {"folder_template": "{label_token}"}, "8_m_n", {"A1_8 m/n_1.jpg": 1}),
        ("8 m", {"filename_template": "{label_token}-{frame}.jpg"}, "A1_8 m", {"8_m-1.jpg": 1, "8 m-1.jpg": None}),
        ("", None, "", {}),
        ({"label": "80m", "folder": "my flight/"}, {}, "my flight", {"A1_80m_1.jpg": 1}),
        ({"label": "80m", "folder": ""}, {}, ".", {"A1_80m_1.jpg": 1}),
        ({"folder": "f", "filename_template": "{frame}.jpg"}, {}, "f", {"1.jpg": 1}),
        ({"label": "l", "folder_template": "x{label}"}, {"folder_template": "y"}, "xl", {"A1_l_1.jpg": 1}),
        ({"label": "l", "filename_template": "x{frame}"}, {"filename_template": "y"}, "A1_l", {"x1": 1, "y": None}),
    ],
    ids=str,
)
def test_templates(capture, templates, folder, files):
    if templates is None:
        with pytest.raises(ImatchError, match="should have at least 1"):
            survey({"A1": capture})
        return
    made = survey({"A1": capture}, **templates)
    assert made.captures["A1"].folder == folder
    for name, frame in files.items():
        id = name if folder == "." else f"{folder}/{name}"
        if frame is None:
            with pytest.raises(ImatchError, match="none of the 1 photographs"):
                made.select([id])
        else:
            known = {"capture": "A1", "label": made.captures["A1"].label, "frame": None if frame == "none" else frame}
            assert made.select([id]) == {id: known}


@pytest.mark.parametrize(
    ("label", "token"),
    [
        ("80m", "80m"),
        ("80 m", "80_m"),
        ("a/b\\c", "a_b_c"),
        ("1.5+2-x_y", "1.5+2-x_y"),
        ("..", "__"),
        (".", "_"),
        ("높이", "높이"),
    ],
)
def test_label_token(label, token):
    assert config.label_token(label) == token


# --- which photographs ------------------------------------------------------------------------------------


IDS = [
    *(f"A1_80m/A1_80m_{frame:03d}.jpg" for frame in (1, 2, 3, 5, 8)),
    *(f"A2_120m/A2_120m_{frame}.jpg" for frame in (1, 2)),
    *(f"A3_120m/A3_120m_{frame}.jpg" for frame in (2, 12)),
    "A1_80m/notes.jpg",
    "other/A1_80m_1.jpg",
]
CAPTURES = {"A1": "80m", "A2": "120m", "A3": "120m", "A4": "nothing there"}


def chosen(image_groups, ids=IDS, captures=CAPTURES):
    found = survey(captures).select(ids, image_groups)
    assert list(found) == sorted(found)
    return [f"{meta['capture']}:{meta['frame']}" for meta in found.values()]


def test_without_groups_all_that_is_called_as_the_registry_says():
    assert chosen([]) == ["A1:1", "A1:2", "A1:3", "A1:5", "A1:8", "A2:1", "A2:2", "A3:12", "A3:2"]
    assert survey(CAPTURES).select(reversed(IDS)) == survey(CAPTURES).select(IDS)
    assert survey(CAPTURES).select(["A1_80m/A1_80m_001.jpg"]) == {
        "A1_80m/A1_80m_001.jpg": {"capture": "A1", "label": "80m", "frame": 1}
    }
    assert survey(CAPTURES).select([]) == {}


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        ({"folder": "A1"}, "A1:1 A1:2 A1:3 A1:5 A1:8"),
        ({"folder": "A1_80m"}, "A1:1 A1:2 A1:3 A1:5 A1:8"),
        ({"folder": "80m"}, "A1:1 A1:2 A1:3 A1:5 A1:8"),
        ({"folder": "A1_80m/"}, "A1:1 A1:2 A1:3 A1:5 A1:8"),
        ({"folder": ["A1", "A2"], "indices": [1, 2]}, "A1:1 A1:2 A2:1 A2:2"),
        ({"folder": "A1", "indices": [2, 5]}, "A1:2 A1:3 A1:5"),
        ({"folder": "A1", "indices": {"from": 2, "to": 5}}, "A1:2 A1:3 A1:5"),
        ({"folder": "A1", "indices": {"from": 0, "to": 10**15}}, "A1:1 A1:2 A1:3 A1:5 A1:8"),
        ({"folder": "A1", "indices": [5]}, "A1:5"),
        ({"folder": "A1", "indices": [5, 5]}, "A1:5"),
        ({"folder": "A1", "indices": [8, 1, 3]}, "A1:1 A1:3 A1:8"),
        ({"folder": "A1", "indices": [1, 1, 3]}, "A1:1 A1:3"),
        ({"folder": ["A1", "A2"], "indices": [[2, 5], [1]]}, "A1:2 A1:3 A1:5 A2:1"),
        ({"folder": ["A1", "A2"], "indices": [[1, 2, 8], {"from": 2, "to": 9}]}, "A1:1 A1:2 A1:8 A2:2"),
        ({"folder": "A1", "indices": [[2, 3]]}, "A1:2 A1:3"),
        ({"indices": [2]}, "A1:2 A2:2 A3:2"),
        ({"folder": None, "indices": None, "rotation": [0, 90]}, "A1:1 A1:2 A1:3 A1:5 A1:8 A2:1 A2:2 A3:12 A3:2"),
    ],
    ids=str,
)
def test_image_groups(group, wanted):
    assert chosen([group]) == wanted.split()


def test_groups_are_united():
    assert chosen([{"folder": "A1", "indices": [1, 3]}, {"folder": "80m", "indices": [3, 5]}, {"folder": "A2"}]) == [
        *("A1:1", "A1:2", "A1:3", "A1:5", "A2:1", "A2:2")
    ]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"folder": "A1_80"}, "unknown folder of data set d 'A1_80': did you mean 'A1_80m'"),
        ({"folder": "120m"}, "label '120m' means any of A2, A3"),
        ({"folder": "A4"}, r"no photographs in A4 of data set d: none in .*nothing there is called"),
        (
            {"folder": "A1", "indices": [1, 4, 6, 8]},
            "no photographs of frames 4, 6 in A1 of data set d: it has frames 1",
        ),
        ({"folder": "A1", "indices": [4]}, "no photographs of frames 4 in A1"),
        ({"folder": ["A1", "A2"], "indices": [1, 2, 3]}, "no photographs of frames 3 in A2"),
        ({"folder": "A1", "indices": list(range(20, 40))}, "frames 20, .*, 29 and 10 more in A1"),
        ({"folder": "A1", "indices": [6, 7]}, "no photographs of frames 6 to 7 in A1 .*: it has frames 1 to 8"),
        ({"indices": [1]}, "no photographs of frames 1 in A3"),
        ({"indices": [5, 8]}, "no photographs of frames 5 to 8 in A2"),
    ],
    ids=str,
)
def test_what_was_asked_for_and_is_not_there_is_an_error(group, message):
    with pytest.raises(ImatchError, match=message):
        chosen([group])


@pytest.mark.parametrize(
    ("image_groups", "message"),
    [
        ({"folder": "A1"}, "image_groups must be a valid list"),
        (({"folder": "A1"},), "image_groups must be a valid list"),
        (["A1"], r"image_groups\[0\] must be a valid dictionary"),
        ([{"folder": "A1"}, {"indicse": [1]}], r"image_groups\[1\]\.indicse: unknown field.*did you mean 'indices'"),
        ([{"folder": 3}], r"\[0\]\.folder\[0\] must be a valid string, got 3"),
        ([{"folder": ["A1", 3]}], r"\[0\]\.folder\[1\] must be a valid string, got 3"),
        ([{"folder": []}], r"\[0\]\.folder: .* should have at least 1"),
        ([{"indices": 7}], r"\[0\]\.indices must be a valid list, got 7"),
        ([{"indices": "1-7"}], r"\[0\]\.indices must be a valid list"),
        ([{"indices": []}], r"\[0\]\.indices: .* should have at least 1"),
        ([{"indices": [1.0, 2]}], "must be a valid integer, got 1.0"),
        ([{"indices": ["1"]}], "must be a valid integer, got '1'"),
        ([{"indices": [True]}], "must be a valid integer, got True"),
        ([{"indices": [-1, 4]}], r"indices\[0\] must be greater than or equal to 0, got -1"),
        ([{"indices": [5, 2]}], r"ends at 2 before it begins at 5: write \[2, 5\]"),
        ([{"indices": {"from": 5, "to": 2}}], "ends at 2 before it begins at 5"),
        ([{"indices": {"from": 5}}], r"indices\.to is missing"),
        ([{"indices": {"form": 5, "to": 9}}], r"indices\.form: unknown field 'form': did you mean 'from'"),
        ([{"folder": ["A1", "A2"], "indices": [[1]]}], "has 1 lists for 2 folders"),
        ([{"indices": [[1]]}], "has 1 lists for no folder"),
        ([{"folder": ["A1", "A2"], "indices": [[1], 2]}], r"indices\[1\] must be a valid list, got 2"),
        ([{"folder": "A1", "indices": [[5, 2]]}], r"indices\[0\]: the range ends at 2"),
        ([{"folder": "A1", "indices": [[]]}], r"indices\[0\]: .* should have at least 1"),
    ],
    ids=str,
)
def test_wrong_groups_are_refused(image_groups, message):
    with pytest.raises(ImatchError, match=message):
        chosen(image_groups)


def test_a_capture_id_wins_over_a_folder_and_a_folder_over_a_label():
    captures = {"x": "l", "a": {"label": "b", "folder": "x"}, "b": {"label": "c", "folder": "f"}}
    captures["c"] = {"label": "f", "folder": "g"}
    made = survey(captures)
    assert [made.captures_named(name) for name in ("x", "b", "f", "c", "x_l")] == [["x"], ["b"], ["b"], ["c"], ["x"]]


def test_two_captures_may_share_a_folder():
    made = survey({"A1": {"label": "l", "folder": "f"}, "A2": {"label": "m", "folder": "f"}})
    ids = ["f/A1_l_1.jpg", "f/A2_m_1.jpg", "f/A2_m_2.jpg"]
    assert list(made.select(ids, [{"folder": "f", "indices": [1]}])) == ids[:2]
    assert list(made.select(ids, [{"folder": "A2"}])) == ids[1:]


def test_photographs_that_could_be_two_things_are_refused():
    same = {"label": "l", "folder": "f", "filename_template": "{frame}.jpg"}
    with pytest.raises(ImatchError, match=r"f/1\.jpg belongs to captures A1 and A2"):
        survey({"A1": same, "A2": same}).select(["f/1.jpg"])
    with pytest.raises(ImatchError, match=r"f/01\.jpg and f/1\.jpg are both frame 1 of A1: keep one"):
        survey({"A1": same}).select(["f/1.jpg", "f/01.jpg"])


def test_nothing_that_is_called_as_the_registry_says():
    with pytest.raises(ImatchError, match=r"none of the 1 photographs .*'x.jpg'.* A1_80m/\{capture_id\}_\{label\}"):
        survey({"A1": "80m"}).select(["x.jpg"])


PLAIN = ["a.png", "flight 1/d_07.png", "flight 1/x.png", "flight 1/sub/e2_12.png", "g/h_7.jpg"]


@pytest.mark.parametrize(
    ("glob", "wanted"),
    [
        ("", PLAIN),
        ("*", ["a.png"]),
        ("*/*", [PLAIN[1], PLAIN[2], PLAIN[4]]),
        ("./*/*.jpg", [PLAIN[4]]),
        ("**/*.png", PLAIN[:4]),
        ("flight 1/**", PLAIN[1:4]),
        ("**", PLAIN),
        ("flight 1/**/e*", [PLAIN[3]]),
        ("[ag]*/?_7.*", [PLAIN[4]]),
    ],
)
def test_globs(glob, wanted):
    made = read(glob=glob)
    assert list(made.select(PLAIN)) == sorted(wanted)


def test_a_glob_that_matches_nothing():
    made = read(glob="*.tif")
    with pytest.raises(ImatchError, match=r"none of the 5 photographs .* is called as the registry says: \*.tif"):
        made.select(PLAIN)


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        ({"folder": ""}, [PLAIN[0]]),
        ({"folder": "."}, [PLAIN[0]]),
        ({"folder": "flight 1"}, [PLAIN[1], PLAIN[2]]),
        ({"folder": "flight 1/sub/"}, [PLAIN[3]]),
        ({"folder": ["flight 1", "g"], "indices": [7]}, [PLAIN[1], PLAIN[4]]),
        ({"folder": ["flight 1", "flight 1/sub"], "indices": [[1, 9], [12]]}, [PLAIN[1], PLAIN[3]]),
    ],
    ids=str,
)
def test_groups_of_a_plain_folder(group, wanted):
    assert list(read().select(PLAIN, [group])) == wanted


def test_what_is_known_of_photographs_in_a_plain_folder():
    found = read().select(PLAIN)
    assert [meta["frame"] for meta in found.values()] == [None, 7, 12, None, 7]
    assert {(meta["capture"], meta["label"]) for meta in found.values()} == {(None, None)}
    for group, message in [
        ({"folder": "fligth 1"}, "unknown folder of data set d 'fligth 1': did you mean 'flight 1'"),
        (
            {"folder": ".", "indices": [1]},
            "no photographs of frames 1 in . of data set d: its files have no frame number",
        ),
        ({"folder": "g", "indices": [8]}, "it has frames 7 to 7"),
    ]:
        with pytest.raises(ImatchError, match=message):
            read().select(PLAIN, [group])


# --- what is lost is told ---------------------------------------------------------------------------------


def told(capsys, captures, ids, *groups):
    datasets._once_a_process.cache_clear()
    for _ in range(2):
        survey(captures).select(ids, list(groups))
    return capsys.readouterr().out


def test_photographs_that_are_called_otherwise_and_captures_without_any_are_told_once(capsys):
    lost = (
        "1 photograph below /photographs/s left out, called otherwise than the registry says, such as A1_80m/notes.jpg"
    )
    empty = "captures without photographs: A4"
    assert told(capsys, CAPTURES, IDS) == f"data set d: {lost}; {empty}\n"
    assert told(capsys, CAPTURES, IDS, {"folder": "A1", "indices": [1, 3]}) == f"data set d: {lost}\n"
    assert told(capsys, CAPTURES, IDS, {"folder": "A2"}) == ""
    assert told(capsys, {"A1": "80m", "A2": "120m"}, [id for id in IDS if "notes" not in id]) == ""
    many = [*IDS, "A2_120m/x/A2_120m_9.jpg"]
    assert told(capsys, CAPTURES, many).startswith("data set d: 2 photographs below")


# --- names from a Mac -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["NFC", "NFD"])
@pytest.mark.parametrize("said", ["NFC", "NFD"])
def test_letters_in_parts_are_the_same_letters(file, said):
    def turned(form, *texts):
        return [unicodedata.normalize(form, text) for text in texts]

    [id] = turned(file, "비행_높이/비행_높이_7.jpg")
    made = survey(dict([turned(said, "비행", "높이")]))
    assert [meta["frame"] for meta in made.select([id]).values()] == [7]
    for form in ("NFC", "NFD"):
        for name in turned(form, "비행", "비행_높이", "높이"):
            assert list(made.select([id], [{"folder": name}])) == [id]
        assert list(read().select([id], [{"folder": turned(form, "비행_높이")[0]}])) == [id]
    assert list(read(glob=turned(said, "비행*/*")[0]).select([id])) == [id]


def test_frames_that_a_range_does_not_find_are_told(capsys):
    """A list of frames is refused when one is absent; a range may have gaps, but says so."""
    ids = [f"gaps/x_{frame}.jpg" for frame in (1, 2, 9)]
    chosen = datasets.Dataset("d", Path("/d")).select(ids, [{"folder": "gaps", "indices": [1, 12]}])
    assert sorted(chosen) == sorted(ids)
    assert "gaps of data set d: 9 of frames 1 to 12 are not there; it has frames 1 to 9" in capsys.readouterr().out
