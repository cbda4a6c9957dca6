"""Distances, labels, right answers and figures by metres: by hand, by brute force and on a real flight."""

import json
import math
import unicodedata

import numpy as np
import pytest

import imatch
from imatch.core.types import ImatchError
from imatch.data import images
from imatch.retrieval import truth
from imatch.retrieval.truth import Places

DEGREE = 111_194.92664  # metres: pi * 6,371,000 / 180


def globe(*rows, heading=None):
    return Places("globe", np.array(rows, float), np.full(len(rows), np.nan) if heading is None else np.array(heading))


def plane(*rows, heading=None):
    return Places("plane", np.array(rows, float), np.full(len(rows), np.nan) if heading is None else np.array(heading))


def angles(a, b):
    """All distances by the angle between 3D unit vectors, atan2(|a x b|, a . b): no chord in it."""

    def vectors(degrees):
        latitude, longitude = np.radians(degrees).T
        return np.column_stack(
            [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
        )

    a, b = vectors(a)[:, None], vectors(b)[None]
    return 6_371_000 * np.arctan2(np.linalg.norm(np.cross(a, b), axis=-1), (a * b).sum(-1))


def listed(answers):
    assert all(rows.dtype == np.int64 for rows in answers)
    return [rows.tolist() for rows in answers]


# --- distances --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "metres"),
    [
        ((10, 20), (11, 20), DEGREE),
        ((0, 20), (0, 21), DEGREE),
        ((60, 0), (60, 0.001), DEGREE / 1000 / 2),  # the cosine of 60 degrees is a half
        ((0, 0), (90, 77), 10_007_543.398),  # a quarter of a meridian
        ((0, 179.9995), (0, -179.9995), DEGREE / 1000),  # across the dateline
        ((0, 180), (0, -180), 0),
        ((90, 0), (90, 123), 0),  # the pole is one place
        ((-90, -5), (-89.999, 100), DEGREE / 1000),
        ((89.9995, 10), (89.9995, -170), DEGREE / 1000),  # over the pole
        ((-89.9995, 10), (-89.9995, -170), DEGREE / 1000),
        ((0, 0), (0, 180), 20_015_086.796),  # the antipode
        ((37.5, 127), (-37.5, -53), 20_015_086.796),
    ],
    ids=str,
)
def test_metres_on_the_globe_by_hand(a, b, metres):
    for one, other in ((a, b), (b, a)):
        assert globe(one).metres(globe(other), np.zeros((1, 1), int)) == pytest.approx(metres, rel=1e-7, abs=1e-6)


def test_metres_of_hits():
    query, gallery = plane((0, 0), (np.nan, np.nan)), plane((3, 4), (np.nan, 1), (0, 2))
    found = query.metres(gallery, np.array([[2, 0, 1, -1], [0, 1, 2, -1]]))
    np.testing.assert_array_equal(found, [[2, 5, np.nan, np.nan], [np.nan] * 4])
    on_globe = globe((0, 179.9995)).metres(globe((1, 1), (0, -179.9995)), np.array([[1, -1]]))
    assert on_globe[0, 0] == pytest.approx(DEGREE / 1000)
    assert np.isnan(on_globe[0, 1])


# --- labels -----------------------------------------------------------------------------------------------


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def label_json(folder, *entries):
    return write(folder, "labels.json", json.dumps({"images": list(entries)}))


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_labels_of_a_csv(tmp_path, start, end):
    lines = [
        "ImageRef, Longitude,LATITUDE,date,yaw,altitude",
        '"flight, 1/a.jpg",127.5,37.25,2024-05-01,-90,80.5',
        r"C:\survey\b.jpg,-127,-37,,,",
        "c.jpg,, ,,10, ",
        ",,,,,",
        "",
    ]
    assert truth.read_labels(write(tmp_path, "labels.CSV", start + end.join(lines))) == {
        "flight, 1/a.jpg": {"latitude": 37.25, "longitude": 127.5, "altitude": 80.5, "yaw": -90},
        "C:/survey/b.jpg": {"latitude": -37, "longitude": -127},
        "c.jpg": {"yaw": 10},
    }


@pytest.mark.parametrize("column", ["id", "imageref", "Image", "FILENAME"])
def test_a_csv_names_photographs_by_any_of_four_columns(tmp_path, column):
    path = write(tmp_path, "labels.csv", f"x,y,{column}\n1,2,a.jpg\n1,2,a.jpg\n")
    assert truth.read_labels(path) == {"a.jpg": {"x": 1, "y": 2}}


@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "mark"])
def test_labels_of_a_json(tmp_path, start):
    entries = [
        {
            "imageref": "flight\\a.jpg",
            "position": {"latitude": 37.25, "longitude": 127.5, "altitude": None, "x": 1, "y": 2, "z": 3},
            "attitude": {"yaw": 90, "pitch": -89.5, "roll": 0},
            "camera": "M3E",
        },
        {"imageref": "b.jpg", "position": {"x": 5, "y": -6.5}, "attitude": None},
        {"imageref": "c.jpg", "position": None},
        {"imageref": "d.jpg"},
    ]
    path = write(tmp_path, "labels.json", start + json.dumps({"version": 1, "images": entries}))
    position = {"latitude": 37.25, "longitude": 127.5, "x": 1, "y": 2, "z": 3}
    assert truth.read_labels(path) == {
        "flight/a.jpg": position | {"yaw": 90, "pitch": -89.5, "roll": 0},
        "b.jpg": {"x": 5, "y": -6.5},
        "c.jpg": {},
        "d.jpg": {},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,x,y\na.jpg,1,2\n", "line 1: wants one column of id, imageref, image, filename.*has name, x, y"),
        ("id;x;y\na.jpg;1;2\n", "line 1: .*separated by commas; has id;x;y"),
        ("id,image,x,y\na,b,1,2\n", "line 1: wants one column of"),
        ("id,x,y,X\na,1,2,3\n", "line 1: column x is there twice: keep one"),
        ("id,yaw\na.jpg,5\n", "holds no place: give latitude and longitude, or x and y"),
        ("", "line 1: wants one column of"),
        ("id,x,y\na.jpg,1,2\nb.jpg,1,north\n", "line 3: y must be a valid number, got 'north'"),
        ("id,x,y\na.jpg,1,nan\n", "line 2: y must be a finite number, got nan"),
        ("id,x,y\na.jpg,inf,1\n", "line 2: x must be a finite number, got inf"),
        ("id,latitude,longitude\na.jpg,90.5,0\n", "line 2: latitude must be less than or equal to 90, got 90.5"),
        (
            "id,latitude,longitude\na.jpg,0,-180.5\n",
            "line 2: longitude must be greater than or equal to -180, got -180.5",
        ),
        ("id,latitude,longitude\na.jpg,5,\n", "line 2: latitude without longitude: give both"),
        ("id,latitude,x,y\na.jpg,,,2\n", "line 2: y without x: give both"),
        ("id,x,y\na.jpg,1\n", "line 2: 2 cells for 3 columns: correct the line"),
        ("id,x,y\na.jpg,1,2,3\n", "line 2: 4 cells for 3 columns"),
        ("id,x,y\n,1,2\n", "line 2: names no photograph: give its path"),
        ('id,x,y\n"a.jpg,1,2\n', "line 2: no CSV .*: correct the quotes"),
        ("id,x,y\na.jpg,1,2\nb.jpg,1,2\na.jpg,1,3\n", "line 4: 'a.jpg' is there twice with different values: keep one"),
        ("id,x,y\nf\\a.jpg,1,2\nf/a.jpg,1,3\n", "line 3: 'f/a.jpg' is there twice with different values"),
        ("id,x,y\n사진.jpg,1,2\n".encode("cp949"), "not UTF-8 from byte 7: save it as UTF-8"),
    ],
    ids=str,
)
def test_a_csv_that_is_wrong(tmp_path, content, message):
    with pytest.raises(ImatchError, match=rf"labels .*labels.csv.*{message}"):
        truth.read_labels(write(tmp_path, "labels.csv", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [}', "line 1: no JSON"),
        ("[]", "must be a valid dictionary"),
        ("{}", "images is missing"),
        ('{"images": ["a.jpg"]}', r"images\[0\] must be a valid dictionary"),
        ('{"images": [{"position": {}}]}', r"images\[0\].imageref is missing"),
        ('{"images": [{"imageref": " "}]}', r"images\[0\] .*names no photograph"),
        ('{"images": [{"imageref": "a", "position": [1, 2]}]}', r"images\[0\].position must be a valid dictionary"),
        ('{"images": [{"imageref": "a", "attitude": 90}]}', r"images\[0\].attitude must be a valid dictionary"),
        (
            '{"images": [{"imageref": "a", "position": {"x": "1", "y": 2}}]}',
            r"images\[0\].position.x must be a valid number, got '1'",
        ),
        ('{"images": [{"imageref": "a", "position": {"x": true, "y": 2}}]}', "x must be a valid number, got True"),
        ('{"images": [{"imageref": "a", "position": {"x": NaN, "y": 2}}]}', "x must be a finite number, got nan"),
        ('{"images": [{"imageref": "a", "position": {"longitude": 2}}]}', "longitude without latitude"),
        (
            '{"images": [{"imageref": "a", "position": {"latitude": 91, "longitude": 2}}]}',
            "latitude must be less than or equal to 90, got 91",
        ),
        ('{"images": [{"imageref": "a"}]}', "holds no place"),
        (
            '{"images": [{"imageref": "a", "attitude": {"yaw": 1}}, {"imageref": "a", "attitude": {"yaw": 2}}]}',
            r"images\[1\] \(a\): 'a' is there twice with different values",
        ),
    ],
    ids=str,
)
def test_a_json_that_is_wrong(tmp_path, content, message):
    with pytest.raises(ImatchError, match=rf"labels .*labels.json.*{message}"):
        truth.read_labels(write(tmp_path, "labels.json", content))


def test_label_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ImatchError, match=r"none.csv cannot be read \(No such file.*give the path of a file"):
        truth.read_labels(tmp_path / "none.csv")
    with pytest.raises(ImatchError, match=r"unknown kind of file '.xlsx': give a .csv or a .json"):
        truth.read_labels(write(tmp_path, "labels.xlsx", "id,x,y\na,1,2\n"))


# --- photographs to places --------------------------------------------------------------------------------


def labelled(ids, **labels):
    """Which x each photograph has, with labels of y 0."""
    numbers = {name: {"x": float(x), "y": 0.0} for name, x in labels.items()}
    found = truth.places(ids, [None] * len(ids), numbers)
    return None if found is None else [None if math.isnan(x) else x for x in found.coordinates[:, 0].tolist()]


@pytest.mark.parametrize(
    ("ids", "labels", "expected"),
    [
        (["a.jpg", "f/b.jpg"], {"a.jpg": 1, "f/b.jpg": 2}, [1, 2]),
        (["f/a.jpg", "f/b.jpg"], {"b.jpg": 1, "other.jpg": 2}, [None, 1]),  # bare names; no label; no photograph
        (["f/a.jpg", "a.jpg"], {"C:\\survey\\f\\a.jpg": 1}, [1, None]),  # the longer ending is the nearer
        (["f/a.jpg", "a.jpg"], {"C:\\survey\\f\\a.jpg": 1, "C:\\survey\\a.jpg": 2}, [1, 2]),
        (["f/a.jpg"], {"/home/me/f/a.jpg": 1}, [1]),
        (["f/a.jpg"], {"./f/a.jpg": 1}, [1]),
        (["f/a.jpg"], {"g/a.jpg": 1, "f/a.jpg": 2}, [2]),
        (["f/a.jpg"], {"f/a.jpg": 2, "a.jpg": 1}, [2]),  # the exact one is the one
        (["a.jpg"], {"f/a.jpg": 1, "a.jpg": 2, "g/a.jpg": 3}, [2]),
        (["f/a.jpg"], {"ga.jpg": 1, "xf/b.jpg": 1}, None),  # an ending is whole names
        (["xf/a.jpg"], {"f/a.jpg": 1}, None),
        (["f/a.jpg", "b.jpg", "f/a.jpg"], {"a.jpg": 1}, [1, None, 1]),  # two references of one source
        (["f/a.jpg"], {}, None),
    ],
    ids=str,
)
def test_which_label_a_photograph_has(ids, labels, expected):
    assert labelled(ids, **labels) == expected


@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
@pytest.mark.parametrize("said", ["NFC", "NFD"])
def test_korean_names_in_either_form(tmp_path, on_disk, said):
    name = unicodedata.normalize(said, "항공/사진 1.jpg")
    labels = truth.read_labels(label_json(tmp_path, {"imageref": name, "position": {"x": 1, "y": 2}}))
    for photograph in ("항공/사진 1.jpg", "부산/항공/사진 1.jpg"):
        found = truth.places([unicodedata.normalize(on_disk, photograph)], [None], labels)
        assert found.coordinates.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        (["f/a.jpg", "g/a.jpg"], {"a.jpg": 1}, "label 'a.jpg' fits 2 photographs, such as 'f/a.jpg' and 'g/a.jpg'"),
        (["f/a.jpg", "g/a.jpg"], {"f/a.jpg": 1, "a.jpg": 2}, "label 'a.jpg' fits 2 photographs.*"),
        (["a.jpg"], {"f/a.jpg": 1, "g/a.jpg": 2}, "photograph 'a.jpg' fits labels 'f/a.jpg' and 'g/a.jpg'"),
        (["d/f/a.jpg"], {"f/a.jpg": 1, "a.jpg": 2}, "photograph 'd/f/a.jpg' fits labels 'a.jpg' and 'f/a.jpg'"),
    ],
    ids=str,
)
def test_ambiguous_labels_are_refused(ids, labels, message):
    with pytest.raises(ImatchError, match=f"{message}: give the path relative to the data set"):
        labelled(ids, **labels)


def test_exif_places_and_labels_replace_them_as_a_whole():
    exif = [{"latitude": 37.5, "longitude": 127, "altitude": None}, None]
    found = truth.places(["a.jpg", "b.jpg"], exif)
    assert found.system == "globe"
    np.testing.assert_array_equal(found.coordinates, [[37.5, 127], [np.nan, np.nan]])
    assert np.isnan(found.heading).all()
    assert found.coordinates.dtype == found.heading.dtype == np.float64
    assert found.known.tolist() == [True, False]
    replaced = truth.places(["a.jpg", "b.jpg"], exif, {"b.jpg": {"latitude": 1.0, "longitude": 2.0}})
    assert replaced.known.tolist() == [False, True]
    assert truth.places(["a.jpg", "b.jpg"], exif, {"c.jpg": {"x": 1.0, "y": 2.0}}) is None
    assert truth.places(["a.jpg"], [None]) is None
    assert truth.places([], []) is None
    assert truth.places(["a.jpg"], [None], {"a.jpg": {"yaw": 5.0}}) is None


@pytest.mark.parametrize(
    ("position", "message"),
    [
        ({"latitude": 95, "longitude": 0}, "latitude must be less than or equal to 90, got 95"),
        ({"latitude": 5, "longitude": "east"}, "longitude must be a valid number, got 'east'"),
        ({"latitude": 5, "longitude": 6, "yaw": "north"}, "yaw must be a valid number"),
    ],
    ids=str,
)
def test_a_photographs_position_that_cannot_be_true_is_refused(position, message):
    """An imported tree has them from its metas, as they are."""
    with pytest.raises(ImatchError, match=f"position of photograph 'a.jpg': {message}"):
        truth.places(["a.jpg"], [position])


def test_an_imported_position_may_have_empty_numbers():
    found = truth.places(["a.jpg"] * 2, [{"latitude": 5, "longitude": 6, "yaw": yaw} for yaw in (None, 370)])
    np.testing.assert_array_equal(found.heading, [np.nan, 10])


def test_which_system_labels_are_in():
    on_globe, on_plane = {"latitude": 1.0, "longitude": 2.0}, {"x": 3.0, "y": 4.0}

    def system(*labels):
        ids = [f"{i}.jpg" for i in range(len(labels))]
        return truth.places(ids, [None] * len(ids), dict(zip(ids, labels, strict=True))).system

    assert system(on_globe | on_plane, on_globe | on_plane) == "globe"
    assert system(on_globe, on_globe | on_plane) == "globe"
    assert system(on_plane, on_globe | on_plane) == "plane"
    assert system(on_plane, {"yaw": 1.0}) == "plane"  # a photograph without a place decides nothing
    with pytest.raises(
        ImatchError, match=r"'1.jpg' has x and y but no latitude and longitude, '0.jpg' the other way round: give all"
    ):
        system(on_globe, on_plane, on_globe | on_plane)


def test_heading_of_turned_references():
    labels = {"a.jpg": {"x": 0.0, "y": 0.0, "yaw": 350.0}, "b.jpg": {"x": 0.0, "y": 0.0}}
    found = truth.places(["a.jpg"] * 4 + ["b.jpg"], [None] * 5, labels, turned=[0, 30, 300, -20, 30])
    np.testing.assert_allclose(found.heading, [350, 20, 290, 330, np.nan])
    west = truth.places(["a.jpg"], [None], {"a.jpg": {"x": 0.0, "y": 0.0, "yaw": -90.0}})
    assert west.heading.tolist() == [270]


# --- right answers ----------------------------------------------------------------------------------------


def scattered(where, n, seed):
    """Random places within some 100 m of each other, a tenth of them unknown, with headings, some unknown."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(-1e-3, 1e-3, (2, n))
    longitude = rng.uniform(-180, 180, n)
    system, coordinates = {
        "dateline": ("globe", np.column_stack([10 + x, np.where(y < 0, 180 + y, y - 180)])),
        "north pole": ("globe", np.column_stack([90 - np.abs(x), longitude])),
        "south pole": ("globe", np.column_stack([np.abs(x) - 90, longitude])),
        "survey": ("globe", np.column_stack([46.8 + x, -92 + y])),
        "plane": ("plane", 111_195 * np.column_stack([x, y]) + [350_000, 4_100_000]),
    }[where]
    coordinates[rng.random(n) < 0.1] = np.nan
    heading = np.where(rng.random(n) < 0.1, np.nan, rng.uniform(0, 360, n))
    return Places(system, coordinates, heading)


def all_metres(query, gallery):
    if query.system == "globe":
        return angles(query.coordinates, gallery.coordinates)
    return np.linalg.norm(query.coordinates[:, None] - gallery.coordinates, axis=-1)


def all_allowed(query, gallery, max_heading, groups):
    allowed = np.ones((len(query.heading), len(gallery.heading)), bool)
    if max_heading < 180:
        a, b = np.radians(query.heading)[:, None], np.radians(gallery.heading)
        allowed &= np.cos(a - b) >= math.cos(math.radians(max_heading))
    if groups is not None:
        allowed &= groups[0][:, None] != groups[1]
    return allowed


SITES = ["dateline", "north pole", "south pole", "survey", "plane"]
ASKED = [(180.0, False), (45.0, False), (180.0, True), (20.0, True)]


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize(("max_heading", "grouped"), ASKED)
def test_within_is_what_brute_force_finds(where, max_heading, grouped):
    query, gallery = scattered(where, 300, 0), scattered(where, 400, 1)
    groups = (np.arange(300) % 7, np.arange(400) % 7) if grouped else None
    metres = all_metres(query, gallery)
    right = (metres <= 40) & all_allowed(query, gallery, max_heading, groups)
    expected = [np.flatnonzero(row).tolist() for row in right]
    assert listed(truth.within(query, gallery, 40.0, max_heading, groups)) == expected
    assert sum(map(len, expected)) > 300  # otherwise nothing is tested
    assert all(not rows for rows, known in zip(expected, query.known, strict=True) if not known)


@pytest.mark.parametrize("where", SITES)
@pytest.mark.parametrize(("max_heading", "grouped"), ASKED)
def test_nearest_is_what_brute_force_finds(where, max_heading, grouped):
    query, gallery = scattered(where, 300, 0), scattered(where, 400, 1)
    groups = (np.arange(300) % 2, np.arange(400) // 390) if grouped else None  # for odd ones few are allowed
    metres = np.where(all_allowed(query, gallery, max_heading, groups), all_metres(query, gallery), np.inf)
    metres[np.isnan(metres)] = np.inf
    expected = [[int(row.argmin())] if np.isfinite(row).any() else [] for row in metres]
    assert listed(truth.nearest(query, gallery, max_heading, groups)) == expected
    assert sum(map(len, expected)) > 100


@pytest.mark.parametrize("many", [3, 100, 500])
def test_nearest_gives_all_that_are_equally_near(many):
    """References of one photograph lie at one place; with more of them than one look takes, too."""
    sites = np.array([[46.8, -92], [46.8003, -92], [46.801, -92]])
    source = np.tile([2, 0, 1], many)
    gallery = Places("globe", sites[source], np.full(3 * many, np.nan))
    found = truth.nearest(globe(*sites), gallery)
    assert listed(found) == [np.flatnonzero(source == site).tolist() for site in range(3)]
    others = truth.nearest(globe(*sites), gallery, groups=(np.arange(3), source))
    assert listed(others) == [np.flatnonzero(source == site).tolist() for site in (1, 0, 1)]


def test_equal_is_to_a_micrometre():
    assert listed(truth.nearest(plane((0, 0)), plane((3, 4), (0, 5 + 5e-7), (5 + 5e-6, 0), (-5, 0)))) == [[0, 1, 3]]


def test_what_is_just_as_far_is_near():
    query, gallery = plane((0, 0)), plane((3, 4), (0, 5.0000001), (-5, 0), (6, 8))
    assert listed(truth.within(query, gallery, 5.0)) == [[0, 2]]
    frames = globe((0, 179.9995), (0, -179.9995))
    apart = float(frames.metres(frames, np.array([[1], [0]]))[0, 0])
    assert listed(truth.within(frames, frames, apart)) == [[0, 1], [0, 1]]
    assert listed(truth.within(frames, frames, math.nextafter(apart, 0))) == [[0], [1]]


def test_within_reaches_as_far_as_there_is():
    query, gallery = globe((0, 0)), globe((0, 180), (89, 0), (0, 1))
    assert listed(truth.within(query, gallery, 20_000_000.0)) == [[1, 2]]
    assert listed(truth.within(query, gallery, 20_015_087.0)) == [[0, 1, 2]]
    assert listed(truth.within(query, gallery, 1e9)) == [[0, 1, 2]]


@pytest.mark.parametrize("answer", [lambda q, g, h: truth.within(q, g, 10.0, h), truth.nearest])
def test_headings_over_north(answer):
    query = plane((0, 0), (0, 0), (0, 0), heading=[350, 10, np.nan])
    gallery = plane(*[(0, 0)] * 6, heading=[10, 350, 10.1, 180, np.nan, 0])
    assert listed(answer(query, gallery, 20.0)) == [[0, 1, 5], [0, 1, 2, 5], []]
    assert listed(answer(query, gallery, 0.0)) == [[1], [0], []]
    assert listed(answer(query, gallery, 180.0)) == [list(range(6))] * 3
    seam = plane((0, 0), (0, 0), heading=[359.95, 0.05])  # 0.1 apart but for rounding
    assert listed(answer(seam, seam, 0.1)) == [[0, 1], [0, 1]]


def test_nothing_known_has_no_answer():
    known, unknown, empty = plane((0, 0)), plane((np.nan, np.nan)), Places("plane", np.zeros((0, 2)), np.zeros(0))
    for answer in (lambda q, g: truth.within(q, g, 10.0), truth.nearest):
        assert listed(answer(known, unknown)) == [[]]
        assert listed(answer(unknown, known)) == [[]]
        assert listed(answer(known, empty)) == [[]]
        assert listed(answer(empty, known)) == []
    assert listed(truth.nearest(known, known, groups=(np.array(["a"]), np.array(["a"])))) == [[]]


def test_too_many_right_answers_are_refused(monkeypatch):
    monkeypatch.setattr(truth, "MOST", 8)
    with pytest.raises(ImatchError, match="radius 60 m gives more than 8 right answers: ask for a smaller one"):
        truth.within(plane(*[(0, 0)] * 3), plane(*[(0, 0)] * 3), 60.0)


def test_questions_without_an_answer_are_refused():
    one, other = plane((0, 0), heading=[5.0]), globe((0, 0))
    with pytest.raises(ImatchError, match="queries are placed by x, y and the gallery by latitude, longitude"):
        one.metres(other, np.zeros((1, 1), int))
    for answer in (lambda q, g, *rest: truth.within(q, g, 10.0, *rest), truth.nearest):
        with pytest.raises(ImatchError, match=r"placed by latitude, longitude and the gallery by x, y.*one kind"):
            answer(other, one)
        with pytest.raises(ImatchError, match="not one of the gallery is known: give yaw in the labels"):
            answer(one, plane((0, 0)), 45.0)
        with pytest.raises(ImatchError, match="not one of the queries is known: give yaw in the labels"):
            answer(plane((0, 0)), one, 45.0)


# --- figures ----------------------------------------------------------------------------------------------


def test_figures_by_hand():
    """A gallery with a frame of the query's own place and two frames 40 m from it."""
    query = globe((46.8, -92), (46.8, -92), (np.nan, np.nan))
    north = 46.8 + 40 / DEGREE
    gallery = globe((north, -92), (46.8, -92), (46.8 - 40 / DEGREE, -92), (np.nan, np.nan))
    metres = query.metres(gallery, np.array([[0, 1, 2], [3, 2, -1], [0, 1, 2]]))
    found = truth.position_figures(metres)
    assert found == {
        "queries": 2,
        "unknown": 1,
        "top1_metres_median": pytest.approx(40, abs=1e-6),  # the other first hit's place is unknown
        "top1_metres_mean": pytest.approx(40, abs=1e-6),
        "least_metres_median": pytest.approx(20, abs=1e-6),  # of 0 and 40
        "within": {"10": 0.0, "20": 0.0, "50": 0.5, "100": 0.5},
        "within_top_k": {"10": 0.5, "20": 0.5, "50": 1.0, "100": 1.0},
    }
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_figures_of_first_hits():
    found = truth.position_figures(np.array([[10.0, 5], [20, 90], [120, 100], [0, 0]]))
    assert (found["top1_metres_median"], found["top1_metres_mean"], found["least_metres_median"]) == (15, 37.5, 12.5)
    assert found["within"] == {"10": 0.5, "20": 0.75, "50": 0.75, "100": 0.75}
    assert found["within_top_k"] == {"10": 0.5, "20": 0.75, "50": 0.75, "100": 1.0}


@pytest.mark.parametrize("shape", [(0, 5), (3, 5), (3, 0)])
def test_figures_of_nothing_are_none(shape):
    found = truth.position_figures(np.full(shape, np.nan))
    nothing = dict.fromkeys(["10", "20", "50", "100"])
    medians = dict.fromkeys(["top1_metres_median", "top1_metres_mean", "least_metres_median"])
    counts = {"queries": 0, "unknown": shape[0]}
    assert found == counts | medians | {"within": nothing, "within_top_k": nothing}


# --- a real flight ----------------------------------------------------------------------------------------


def test_a_real_flight(brighton_beach, tmp_path):
    """The 18 frames by EXIF, and the same as a label file, against angles between 3D vectors."""
    files = sorted(brighton_beach.glob("*.jpg"))
    exif = [images.decode(path).position for path in files]
    ids = [path.name for path in files]
    flight = truth.places(ids, exif)
    assert (flight.system, len(ids), flight.known.all()) == ("globe", 18, True)
    metres = angles(flight.coordinates, flight.coordinates)
    everyone = np.tile(np.arange(18), (18, 1))
    np.testing.assert_allclose(flight.metres(flight, everyone), metres, atol=1e-5)

    itself = (np.arange(18), np.arange(18))
    others = np.where(np.eye(18, dtype=bool), np.inf, metres)
    near = [np.flatnonzero(row <= 60).tolist() for row in others]
    assert listed(truth.within(flight, flight, 60.0, groups=itself)) == near
    assert max(map(len, near)) > 1  # several right answers
    assert listed(truth.nearest(flight, flight, groups=itself)) == [[int(row.argmin())] for row in others]

    ranked = np.argsort(others, axis=1)[:, :5]
    found = truth.position_figures(flight.metres(flight, ranked))
    assert found["top1_metres_median"] == pytest.approx(np.median(others.min(axis=1)), abs=1e-4)
    assert found["within"]["50"] == np.mean(others.min(axis=1) <= 50)

    lines = [f"D:\\survey\\{id},{one['latitude']!r},{one['longitude']!r}" for id, one in zip(ids, exif, strict=True)]
    labels = truth.read_labels(write(tmp_path, "labels.csv", "\n".join(["filename,latitude,longitude", *lines])))
    np.testing.assert_array_equal(truth.places(ids, [None] * 18, labels).coordinates, flight.coordinates)


def test_a_real_flight_is_searched_by_place(brighton_beach, tmp_path):
    """Through 03_index: all other frames within 60 m are right, as the EXIF and angles between 3D vectors have it."""
    from tests.test_steps import embedded, indexed, judged

    data = embedded(brighton_beach, tmp_path, resize=imatch.Resize("scale", scale=0.25))
    query, _, ranking, rows, metrics = judged(indexed(data, None, "data-data", truth="radius", radius=60.0))
    exif = [images.decode(brighton_beach / id).position for id in query.ids]
    place = np.array([[one["latitude"], one["longitude"]] for one in exif])
    metres = angles(place, place)
    near = (metres <= 60) & ~np.eye(18, dtype=bool)
    assert ranking.answers.tolist() == near.sum(axis=1).tolist()
    assert ranking.answers.min() > 1
    np.testing.assert_array_equal(ranking.right, np.take_along_axis(near, ranking.rows, 1))
    np.testing.assert_allclose(ranking.metres, np.take_along_axis(metres, ranking.rows, 1), atol=1e-5)
    first = np.take_along_axis(metres, ranking.rows[:, :1], 1)[:, 0]
    assert metrics["positions"]["top1_metres_median"] == pytest.approx(np.median(first), abs=1e-4)
    assert metrics["positions"]["within"]["20"] == np.mean(first <= 20)
    assert [row["metres"] for row in rows] == pytest.approx(first, abs=1e-4)
    assert metrics["chance"] == pytest.approx(near.sum() / (18 * 17))
