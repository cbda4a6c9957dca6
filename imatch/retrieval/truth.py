"""What a right answer is: what shows the same photograph, or was taken near to where the query was."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveFloat, model_validator
from scipy.spatial import cKDTree

from imatch.core import config, files, settings
from imatch.core.rows import Parameters, PhotoRow, Position, PositionFigures
from imatch.core.types import ImatchError, Truth
from imatch.data.embeddings import Embeddings
from imatch.data.exif import NO_FIX, told

TRUTHS = ("photograph", "nearest", "radius")
CLUSTERS = ("photograph", "capture")


@dataclass(frozen=True)
class TruthOptions:
    """What a right answer is, and what of it is asked.

    Attributes:
        kind: "photograph" (it shows the query's own) or by position: "nearest", or all within the "radius".
        labels: a CSV or JSON of positions and headings (`read_labels`); "" takes them from EXIF and XMP.
        radius: metres.
        heading: degrees by which two headings may differ; 180 asks for none.
        exclude_siblings: leave out what was made from the query's own photograph: its other references and, with truth
            by position, the photograph itself.
        cluster: "photograph" or "capture": what intervals resample, for its queries fall or stand together.
        precision: share of believed first hits that shall be right, in (0, 1).

    Raises:
        ImatchError: an unknown name, or a number out of its range.
    """

    kind: str = "photograph"
    labels: str = ""
    radius: PositiveFloat = 60.0
    heading: Annotated[float, Field(gt=0, le=180)] = 180.0
    exclude_siblings: bool = False
    cluster: str = "photograph"
    precision: Annotated[float, Field(gt=0, lt=1)] = 0.95

    def __post_init__(self) -> None:
        config.check(self, "truth")
        if self.labels and not (path := settings.from_workspace(self.labels)).is_file():
            raise ImatchError(f"labels {path} cannot be read (no such file): give the path of a file")
        for what, value, known in (("truth", self.kind, TRUTHS), ("cluster", self.cluster, CLUSTERS)):
            if value not in known:
                raise ImatchError(config.unknown(what, value, known))


Own = tuple[np.ndarray, np.ndarray] | None
"""(Q,) and (N,), integers or text, equal where a row is no answer for a query; None leaves nothing out."""


def same_photograph(query_shows: Sequence[str], gallery_shows: Sequence[str], own: Own = None) -> Truth:
    """A row of the gallery answers a query when both show the same photograph, and it is not left out.

    Args:
        query_shows, gallery_shows: Q and N names of what they show, such as `Embeddings.shows`.

    >>> truth = same_photograph(["a", "b"], ["a", "b", "a"], own=(np.array([0, 1]), np.array([0, 1, 2])))
    >>> truth.first.tolist(), truth.rows.tolist()
    ([0, 1, 1], [2])
    """
    rows: dict[str, list[int]] = defaultdict(list)
    for row, shown in enumerate(gallery_shows):
        rows[shown].append(row)
    shown_by = {shown: np.array(found) for shown, found in rows.items()}
    answers = [shown_by.get(shown, np.zeros(0, int)) for shown in query_shows]
    if own is not None:
        answers = [found[own[1][found] != one] for found, one in zip(answers, own[0], strict=True)]
    return Truth.of(answers)


MOST = 10**8
"""Right answers of all queries together that are kept in memory: 800 MB."""
EARTH = 6_371_000.0
"""Mean radius of the Earth in metres; as a sphere it is right to 0.6 %."""
AXES = {"globe": ("latitude", "longitude"), "plane": ("x", "y")}
NAMES = ("id", "imageref", "image", "filename")
METRES = (10, 20, 50, 100)
"""Within how many metres hits are counted."""
EQUAL = 1e-6
"""Metres up to which two distances are the same."""
STUCK = 4
"""Photographs from which on one place for most of them is none: a receiver that lost its satellites repeats itself."""
NEAR, FAR = 100_000, 1_000_000
"""Metres from their middle, within which most photographs of a set must lie, past which no others can."""


@dataclass(frozen=True)
class Places:
    """Where N photographs were taken, and which way is up in them.

    Attributes:
        system: "globe" (latitude, longitude in degrees) or "plane" (x, y in metres).
        coordinates: (N, 2) float64, NaN where unknown.
        heading: (N,) degrees clockwise from north in which the photograph's top points, NaN where unknown.

    >>> Places("plane", np.array([[3.0, 4], [np.nan, np.nan]]), np.zeros(2)).known.tolist()
    [True, False]
    """

    system: str
    coordinates: np.ndarray
    heading: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """(N,) bool, whether the place is known."""
        return np.isfinite(self.coordinates).all(axis=1)

    @cached_property
    def points(self) -> np.ndarray:
        """(N, 2) metres of the plane, or (N, 3) on the unit sphere; straight distances order as metres do."""
        if self.system == "plane":
            return self.coordinates
        latitude, longitude = np.radians(self.coordinates).T
        x, y = np.cos(longitude), np.sin(longitude)
        return np.stack([np.cos(latitude) * x, np.cos(latitude) * y, np.sin(latitude)], axis=1)

    def metres(self, other: Places, rows: np.ndarray) -> np.ndarray:
        """How far each photograph is from some of another set.

        Args:
            rows: (N, k) int, rows of `other`, -1 for none.

        Returns:
            (N, k) float64 metres, along great circles; NaN where a place is unknown or there is none.

        Raises:
            ImatchError: the systems differ.

        >>> one = Places("plane", np.array([[0.0, 0], [3, 4]]), np.zeros(2))
        >>> one.metres(one, np.array([[1, 0], [1, -1]])).tolist()
        [[5.0, 0.0], [0.0, nan]]
        """
        _same_system(self, other)
        there = np.vstack([other.points, np.full(other.points.shape[1], np.nan)])[rows]  # row -1 is the last
        return _distance(self.system, self.points[:, None], there)


def _distance(system: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    straight = np.linalg.norm(a - b, axis=-1)
    return straight if system == "plane" else 2 * EARTH * np.arcsin(np.minimum(straight / 2, 1))


def _same_system(query: Places, gallery: Places) -> None:
    if query.system != gallery.system:
        one, other = (", ".join(AXES[places.system]) for places in (query, gallery))
        raise ImatchError(
            f"queries are placed by {one} and the gallery by {other}, which have no distance: give labels of one kind"
        )


def read_labels(path: Path) -> dict[str, dict[str, float]]:
    """Where photographs were taken, from a file that says so.

    Args:
        path: a .csv with a line of names: id (or imageref, image, filename), and any of latitude, longitude (degrees),
            altitude, x, y, z (metres), yaw (clockwise from north), pitch, roll (degrees); or a .json, {"images":
            [{"imageref": "flight/a.jpg", "position": {"latitude": 37.5, ...}, "attitude": {"yaw": 90, ...}}]}. Either
            in UTF-8; what is empty, null or absent is unknown.

    Returns:
        The photographs' paths as the file has them, in NFC with forward slashes -> the numbers known of each.

    Raises:
        ImatchError: the file cannot be read, holds no place, or something in it is wrong.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "labels.csv"
    >>> _ = path.write_text("id,latitude,longitude,yaw\\na.jpg,37.5,127,\\n")
    >>> read_labels(path)
    {'a.jpg': {'latitude': 37.5, 'longitude': 127.0}}
    """
    readers = {".csv": _csv_entries, ".json": _json_entries}
    if path.suffix.lower() not in readers:
        raise ImatchError(f"labels {path}: unknown kind of file {path.suffix!r}: give a .csv or a .json")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ImatchError(f"labels {path} cannot be read ({error.strerror}): give the path of a file") from error
    except UnicodeDecodeError as error:
        raise ImatchError(f"labels {path}: not UTF-8 from byte {error.start}: save it as UTF-8") from error
    labels: dict[str, dict[str, float]] = {}
    for where, name, numbers in readers[path.suffix.lower()](text, f"labels {path}"):
        if not (key := _normal(name.strip())):
            raise ImatchError(f"{where}: names no photograph: give its path")
        if labels.setdefault(key, numbers) != numbers:
            raise ImatchError(f"{where}: {key!r} is there twice with different values: keep one of them")
    if not any(axis in numbers for numbers in labels.values() for axis, _ in AXES.values()):
        raise ImatchError(f"labels {path}: holds no place: give latitude and longitude, or x and y")
    return labels


class _Numbers(config.Said, extra="ignore"):
    latitude: Annotated[float, Field(ge=-90, le=90)] | None = None
    longitude: Annotated[float, Field(ge=-180, le=180)] | None = None
    altitude: float | None = None
    x: float | None = None
    y: float | None = None
    z: float | None = None
    yaw: float | None = None
    pitch: float | None = None
    roll: float | None = None

    @model_validator(mode="after")
    def _whole(self) -> _Numbers:
        for axes in AXES.values():
            for one, other in (axes, axes[::-1]):
                if one in self.known and other not in self.known:
                    raise ValueError(f"{one} without {other}: give both, or leave both empty")
        return self

    @property
    def known(self) -> dict[str, float]:
        return self.model_dump(exclude_none=True)


class _Photograph(config.Said, extra="ignore"):
    imageref: str
    position: _Numbers = _Numbers()
    attitude: _Numbers = _Numbers()


class _Photographs(config.Said, extra="ignore"):
    images: list[_Photograph]


NUMBERS = tuple(_Numbers.model_fields)


def _csv_entries(text: str, where: str) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Of each line: where it is, which photograph it names, what it gives."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = _columns(next(reader, []), f"{where}, line 1")
        for cells in reader:
            line, row = f"{where}, line {reader.line_num}", [files.unmarked(cell.strip()) for cell in cells]
            if not any(row):  # spreadsheets leave empty lines at the end
                continue
            if len(row) != len(columns):
                raise ImatchError(f"{line}: {len(row)} cells for {len(columns)} columns: correct the line")
            cell_of = dict(zip(columns, row, strict=True))
            given = {name: _float(cell_of[name]) for name in NUMBERS if cell_of.get(name)}
            name = next(cell_of[name] for name in NAMES if name in cell_of)
            yield line, name, config.checked(_Numbers, given, f"{line}: ").known
    except csv.Error as error:
        raise ImatchError(f"{where}, line {reader.line_num}: no CSV ({error}): correct the quotes") from error


def _columns(cells: Sequence[str], where: str) -> list[str]:
    columns = [cell.strip().lower() for cell in cells]
    if sum(column in NAMES for column in columns) != 1:
        raise ImatchError(
            f"{where}: wants one column of {', '.join(NAMES)}, separated by commas; has {config.names(columns)}"
        )
    for column in columns:
        if column not in (*NAMES, *NUMBERS) and (near := difflib.get_close_matches(column, NUMBERS, 1, 0.8)):
            raise ImatchError(f"{where}: unknown column {column!r}: did you mean {near[0]!r}?")
        if column in NUMBERS and columns.count(column) > 1:
            raise ImatchError(f"{where}: column {column} is there twice: keep one of them")
    return columns


def _float(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _json_entries(text: str, where: str) -> Iterator[tuple[str, str, dict[str, float]]]:
    try:
        whole = config.checked(_Photographs, json.loads(text), f"{where}: ")
    except json.JSONDecodeError as error:
        raise ImatchError(f"{where}, line {error.lineno}: no JSON ({error.msg}): correct it") from error
    for i, said in enumerate(whole.images):
        numbers = said.position.known | said.attitude.known
        yield f"{where}: images[{i}] ({said.imageref})", said.imageref, numbers


def _normal(path: str) -> str:
    """A path with letters in one piece (a Mac has Korean ones in parts) and forward slashes."""
    return unicodedata.normalize("NFC", path).replace("\\", "/")


def places(
    ids: Sequence[str],
    exif: Sequence[Position | None],
    labels: Mapping[str, Mapping[str, float]] | None = None,
    turned: Sequence[float] | None = None,
) -> Places | None:
    """Where photographs were taken, by labels or else by EXIF, never by both.

    Args:
        ids: N POSIX paths relative to the data set; one may come more than once (the sources of references).
        exif: N of what images.jsonl has as position: {"latitude", "longitude", "yaw", ...} in degrees, or None.
        labels: what `read_labels` gives. A label belongs to the photograph of that path, else to the one path that
            ends like it, or that it ends with; those that fit none are ignored, and photographs without one stay
            unknown. Latitude and longitude are used when all photographs with a place have them, else x and y.
        turned: N degrees counter-clockwise by which references were turned; their heading is yaw + angle.

    Returns:
        The N places, or None when not one is known.

    Raises:
        ImatchError: it is ambiguous which label a photograph has; some have only latitude and longitude, others only
            x and y; or a position of `exif` cannot be true.

    >>> places(["flight/a.jpg", "b.jpg"], [None, None], {"a.jpg": {"x": 3.0, "y": 4.0, "yaw": 350.0}}, [30, 0])
    Places(system='plane', coordinates=array([[ 3.,  4.],
           [nan, nan]]), heading=array([20., nan]))
    """
    if labels is None:
        named = zip(exif, (f"position of photograph {id!r}: " for id in ids), strict=True)
        said = [config.checked(_Numbers, row or {}, where).known for row, where in named]
    else:
        named_so = {_normal(name): label for name, label in labels.items()}
        fitting = _fitting({_normal(id) for id in ids}, named_so)
        said = [fitting.get(_normal(id), {}) for id in ids]
    system = _system(ids, said)
    if system is None:
        return None
    coordinates = [[numbers.get(axis, math.nan) for axis in AXES[system]] for numbers in said]
    yaw = np.array([numbers.get("yaw", math.nan) for numbers in said])
    heading = (yaw + (0 if turned is None else np.asarray(turned))) % 360
    return Places(system, np.array(coordinates, np.float64), heading)


def _system(ids: Sequence[str], said: Sequence[Mapping[str, float]]) -> str | None:
    placed = [i for i, numbers in enumerate(said) if any(axis in numbers for axis, _ in AXES.values())]
    if not placed:
        return None
    lacking = {system: [i for i in placed if axes[0] not in said[i]] for system, axes in AXES.items()}
    for system, rows in lacking.items():
        if not rows:
            return system
    raise ImatchError(
        f"photograph {ids[lacking['globe'][0]]!r} has x and y but no latitude and longitude, "
        f"{ids[lacking['plane'][0]]!r} the other way round: give all photographs the same"
    )


def _fitting(ids: set[str], labels: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Which label each photograph has, of those that have one; all paths are normal."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for id in sorted(ids):
        by_name[id.rpartition("/")[2]].append(id)
    found: dict[str, str] = {}
    for label in sorted(labels, key=lambda label: (label not in ids, label)):  # the exact ones first
        alike = [label] if label in ids else by_name[label.rpartition("/")[2]]
        fit = [id for id in alike if f"/{id}".endswith(f"/{label}") or f"/{label}".endswith(f"/{id}")]
        shared = {id: min(len(id), len(label)) for id in fit}
        most = max(shared.values(), default=0)
        longest = [id for id, length in shared.items() if length == most]
        if len(longest) > 1:
            raise ImatchError(
                f"label {label!r} fits {len(longest)} photographs, such as {longest[0]!r} and {longest[1]!r}: "
                "give the path relative to the data set"
            )
        for id in longest:
            if found.setdefault(id, label) not in (id, label):
                raise ImatchError(
                    f"photograph {id!r} fits labels {found[id]!r} and {label!r}: give the path relative to the data set"
                )
    return {id: labels[label] for id, label in found.items()}


def within(
    query: Places, gallery: Places, radius: float, max_heading: float = 180.0, groups: Own = None
) -> list[np.ndarray]:
    """The gallery rows near each query.

    Args:
        query, gallery: Q and N places in one system.
        radius: metres, above 0; what is just as far is near.
        max_heading: degrees from 0 to 180 by which the headings may differ; below 180 both must be known.
        groups: what is left out: by ids a query itself, by ids of sources all that was made from its photograph.

    Returns:
        Q times (n,) int64, sorted rows; none where the place is unknown.

    Raises:
        ImatchError: the systems differ, headings are needed and none is known, or there are too many answers.

    >>> row = Places("plane", np.array([[0.0, 0], [30, 0], [90, 0]]), np.zeros(3))
    >>> [rows.tolist() for rows in within(row, row, radius=60.0)]
    [[0, 1], [0, 1, 2], [1, 2]]
    >>> [rows.tolist() for rows in within(row, row, radius=60.0, groups=(np.arange(3), np.arange(3)))]
    [[1], [0, 2], [1]]
    """
    tree, there, answers = _looked_at(query, gallery, max_heading)
    reach, total = _reach(query.system, radius), 0
    for q in np.flatnonzero(query.known):
        rows = np.sort(there[np.array(tree.query_ball_point(query.points[q], reach), int)])
        answers[q] = rows[_metres(query, gallery, q, rows, max_heading, groups) <= radius]
        total += len(answers[q])
        if total > MOST:
            raise ImatchError(f"radius {radius:g} m gives more than {MOST} right answers: ask for a smaller one")
    return answers


def nearest(query: Places, gallery: Places, max_heading: float = 180.0, groups: Own = None) -> list[np.ndarray]:
    """The gallery row nearest to each query, and all that are as near to a micrometre; else as `within`.

    >>> row = Places("plane", np.array([[0.0, 0], [30, 0], [60, 0]]), np.zeros(3))
    >>> [rows.tolist() for rows in nearest(row, row)]
    [[0], [1], [2]]
    >>> [rows.tolist() for rows in nearest(row, row, groups=(np.arange(3), np.arange(3)))]
    [[1], [0, 2], [1]]
    """
    tree, there, answers = _looked_at(query, gallery, max_heading)
    for q in np.flatnonzero(query.known) if len(there) else ():
        for k in (16, 1024, len(there)):  # more where the first k may not hold the answer
            straight, near = [np.inf], np.arange(len(there))
            if k < len(there):
                straight, near = tree.query(query.points[q], k)
            metres = _metres(query, gallery, q, there[near], max_heading, groups)
            if straight[-1] > _reach(query.system, metres.min() + EQUAL):
                break
        answers[q] = np.sort(there[near[(metres <= metres.min() + EQUAL) & np.isfinite(metres)]])
    return answers


def _looked_at(query: Places, gallery: Places, max_heading: float) -> tuple[cKDTree, np.ndarray, list[np.ndarray]]:
    """A tree of the gallery's known places, their rows, and an empty answer a query."""
    _same_system(query, gallery)
    for side, places in (("queries", query), ("gallery", gallery)):
        if max_heading < 180 and not np.isfinite(places.heading).any():
            raise ImatchError(
                f"truth.heading {max_heading:g} wants headings, and not one of the {side} is known: give yaw in the "
                "labels, photographs with a yaw in their EXIF or XMP (01_embed of an earlier version read none), or "
                "truth.heading 180"
            )
    there = np.flatnonzero(gallery.known)
    return cKDTree(gallery.points[there]), there, [np.empty(0, np.int64)] * len(query.heading)


def _reach(system: str, metres: float) -> float:
    """The straight distance that is these metres, a little more so that rounding loses nothing."""
    if system == "plane":
        return metres * (1 + 1e-9)
    return 2 * math.sin(min(metres / (2 * EARTH), math.pi / 2)) + 1e-12


def _metres(query: Places, gallery: Places, q: int, g: np.ndarray, max_heading: float, groups: Own) -> np.ndarray:
    """From a query to gallery rows; infinite where one is no answer."""
    metres = _distance(query.system, query.points[q], gallery.points[g])
    if max_heading < 180:
        apart = np.abs((query.heading[q] - gallery.heading[g] + 180) % 360 - 180)
        metres = np.where(apart <= max_heading + 1e-9, metres, np.inf)  # more, for rounding
    if groups is None:
        return metres
    return np.where(groups[0][q] == groups[1][g], np.inf, metres)


def position_figures(metres: np.ndarray) -> PositionFigures:
    """How far ranked hits lie from their queries.

    Args:
        metres: (Q, k), hits best first, NaN where a place is unknown, such as `Places.metres`.

    Returns:
        queries (those with a hit of known distance), unknown (the others, which count nowhere below),
        top1_metres_median and top1_metres_mean (of first hits of known distance), least_metres_median (of each query's
        nearest hit), within and within_top_k: {"10": share of queries whose first hit, or any of the k, lies within
        10 metres, "20", "50", "100"}; a hit of unknown distance does not. None where nothing counts.

    >>> found = position_figures(np.array([[40.0, 0.0]]))
    >>> found["top1_metres_median"], found["least_metres_median"], found["within"], found["within_top_k"]["10"]
    (40.0, 0.0, {'10': 0.0, '20': 0.0, '50': 1.0, '100': 1.0}, 1.0)
    """
    counted = metres[~np.isnan(metres).all(axis=1)]
    first, least = counted[:, :1].ravel(), np.fmin.reduce(counted, axis=1, initial=np.inf)
    told = first[~np.isnan(first)]
    return {
        "queries": len(counted),
        "unknown": len(metres) - len(counted),
        "top1_metres_median": float(np.median(told)) if len(told) else None,
        "top1_metres_mean": float(np.mean(told)) if len(told) else None,
        "least_metres_median": float(np.median(least)) if len(least) else None,
        "within": {str(limit): _share(first <= limit) for limit in METRES},
        "within_top_k": {str(limit): _share(least <= limit) for limit in METRES},
    }


def _share(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if len(hits) else None


def left_out(query: Embeddings, gallery: Embeddings, shows: Sequence[str], truth: str, siblings: bool) -> Own:
    """What is no answer for a query: itself, or all that show the same."""
    same = query == gallery
    if siblings and (same or truth != "photograph"):
        codes = np.unique([*shows, *gallery.shows], return_inverse=True)[1]
        return codes[: len(shows)], codes[len(shows) :]
    if not same:
        return None
    return np.where(np.arange(len(shows)) < len(query), np.arange(len(shows)), -1), np.arange(len(gallery))


def count_equal(own: np.ndarray, of: np.ndarray) -> np.ndarray:
    """How many of `of` are equal to each of `own`."""
    ranked = np.sort(of)
    return np.searchsorted(ranked, own, "right") - np.searchsorted(ranked, own, "left")


def truth_of(
    parameters: Parameters,
    query_shows: Sequence[str],
    gallery_shows: Sequence[str],
    here: Places | None,
    there: Places | None,
    own: Own,
    doubted: Sequence[str] = (),
) -> Truth:
    """Say which rows of the gallery answer each query, as a 03_index asked; `doubted` as of `places_of`."""
    asked = parameters["truth"]
    if asked["kind"] == "photograph":
        return same_photograph(query_shows, gallery_shows, own)
    if here is None or there is None:
        side = "gallery" if here else "queries"
        raise ImatchError(
            f"truth.kind is {asked['kind']}, but no photograph of the {side} has a position in its EXIF: "
            f"give them in a CSV or JSON, and set truth.labels to its path{''.join(f'; {one}' for one in doubted)}"
        )
    for side, found in (("query", here), ("gallery", there)):
        headed = np.isfinite(found.heading) | (asked["heading"] == 180)
        for what, known in (("place", found.known), ("heading", headed)):
            if lacking := int((~known).sum()):
                print(f"{lacking} of {len(known)} photographs ({side} side) have no {what} and do not count")
    if asked["kind"] == "radius":
        return Truth.of(within(here, there, asked["radius"], asked["heading"], own))
    return Truth.of(nearest(here, there, asked["heading"], own))


def places_of(
    query: Embeddings, gallery: Embeddings, file: Path | None
) -> tuple[Places | None, Places | None, list[str]]:
    """Where the queries, the missed ones last, and the gallery were taken; references lie where their source does.
    And in words, which positions are doubted; those of headers are unknown then.

    Labels are fitted to both sides at once: a name that fits photographs of two data sets is refused.
    """
    labels = read_labels(file) if file else None
    ids, exif, turned, shows, asked = [], [], [], [], len(query) + len(query.missed)
    apart = query.sources.root != gallery.sources.root
    headers: dict[str, PhotoRow] = {}
    for side, rows in ((query, [*query.rows, *query.missed]), (gallery, gallery.rows)):
        sources, views = side.sources.decodable, side.views
        above = f"{side.sources.root.name}/" if apart else ""
        headers |= {f"{above}{id}": row for id, row in sources.items()}
        for row in rows:
            source = row.get("source", row["id"])
            ids.append(f"{above}{source}")
            shows.append(row.get("source_sha256", row["sha256"]))
            place = sources.get(source, {}).get("position") or {}
            exif.append(place if None not in (place.get("latitude"), place.get("longitude")) else None)
            turned.append(float({**row, **views.get(row["id"], {})}.get("angle") or 0))
    both = places(ids, exif, labels, turned)
    doubted = [] if file else told(headers, "doubt")
    if both is not None:
        both, more = _plausible(both, ids, shows, trusted=file is not None)
        doubted += more
    found = []
    for name, part in (("query", slice(0, asked)), ("gallery", slice(asked, None))):
        known = both is not None and bool(both.known[part].any())
        if labels is not None and not known:
            raise ImatchError(
                f"{file} names none of the photographs ({name} side): its names must be ids or file "
                f"names, such as {ids[part][0]}"
            )
        found.append(Places(both.system, both.coordinates[part], both.heading[part]) if both and known else None)
    return found[0], found[1], doubted


def _plausible(found: Places, ids: Sequence[str], shows: Sequence[str], trusted: bool) -> tuple[Places, list[str]]:
    """Leave out places that cannot be true, and say which; those of labels are only said, but for 0 N 0 E."""
    said: list[str] = []
    first = np.unique(shows, return_index=True)[1]  # of the files of one photograph, and of its references, one
    far = f"lie more than {FAR / 1000:,.0f} km from all others"
    for why, doubt in (("are 0 N 0 E", _nowhere), ("are one and the same", _stuck), (far, _far_off)):
        one = first[found.known[first]]
        if found.system == "plane" or not len(one) or not (wrong := doubt(found, one)).any():
            continue
        keep = trusted and doubt != _nowhere
        names = sorted({files.printable(ids[row]) for row in np.flatnonzero(wrong)})
        so = "but count, for the labels say so" if keep else "and do not count (give true ones in truth.labels)"
        said.append(f"positions of {len(names)} photographs {why}, {so}: {config.names(names)}")
        if not keep:
            found = replace(found, coordinates=np.where(wrong[:, None], np.nan, found.coordinates))
    return found, said


def _nowhere(found: Places, _: np.ndarray) -> np.ndarray:
    return np.abs(found.coordinates).max(axis=1) < NO_FIX


def _stuck(found: Places, one: np.ndarray) -> np.ndarray:
    """The place that more than half of the photographs have to the last digit."""
    places, many = np.unique(found.coordinates[one], axis=0, return_counts=True)
    stuck = many.max() >= max(STUCK, len(one) // 2 + 1)
    return (found.coordinates == places[many.argmax()]).all(axis=1) & stuck


def _far_off(found: Places, one: np.ndarray) -> np.ndarray:
    """The few, at most a quarter or one, in another part of the world than all others, who are near to each other."""
    metres = _distance(found.system, found.points, np.median(found.points[one], axis=0))
    apart = int((metres[one] > NEAR).sum())
    return (metres > FAR) & (len(one) > 2 and apart <= max(1, len(one) // 4))
