"""Runs that are killed, repeated or asked for something else, on real files through the notebooks' own calls."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

import imatch
from imatch.cli import doctor
from imatch.core import files
from imatch.core.step import Step, open_step
from imatch.core.types import ImatchError, ImatchWarning, PhotographError, StepError
from imatch.data.store import PLACED, Stored
from tests import grouped
from tests.grouped import by
from tests.test_steps import indexed, judged, without_times

PHOTOGRAPHS, SHARD = 16, 2
KEYPOINTS, ANGLES, K = 120, (0, 30), 5


# --- photographs, and the four notebooks' calls -----------------------------------------------------------


def picture(seed: int, size: tuple[int, int] = (160, 200)) -> Image.Image:
    """A photograph's stand-in: blobs of random colours, full of keypoints, the same on every run."""
    random = np.random.default_rng(seed)
    h, w = size
    image = Image.new("RGB", (w, h), tuple(random.integers(0, 255, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(90):
        x, y, a, b = random.uniform((0, 0, 3, 3), (w, h, 22, 22)).tolist()
        draw.ellipse((x - a, y - b, x + a, y + b), tuple(random.integers(0, 255, 3).tolist()))
    return image


def write_photographs(folder: Path, n: int = PHOTOGRAPHS) -> Path:
    """n photographs in two folders, of three formats and two shapes."""
    for i in range(n):
        path = folder / ("flight 1" if i < n // 2 else "flight 2") / f"{i:02d}{('.jpg', '.png', '.ppm')[i % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (200, 160) if i % 4 == 1 else (160, 200)).save(path)
    return folder


@dataclass(frozen=True)
class House:
    """A folder with `photographs` and one `exports`, and how its notebooks are run."""

    root: Path
    name: str = "exports"
    workers: int = 0
    batch_size: int = 8
    on_change: str = "refuse"
    on_error: str = "skip"
    max_skipped: float = 0.05
    keypoints: int = KEYPOINTS
    angles: Sequence[float] = ANGLES
    k: int = K

    @property
    def photographs(self) -> Path:
        return self.root / "photographs"

    @property
    def exports(self) -> Path:
        return self.root / self.name

    def start_embed(self) -> Step:
        return grouped.start_embed(
            str(self.photographs),
            exports=str(self.exports),
            run="run",
            weight="sift",
            backbone_options={"max_keypoints": self.keypoints},
            resize=imatch.Resize("scale", scale=1.0),
            shard_size=SHARD,
            tag="",
            on_change=self.on_change,
        )

    def embed(self) -> Step:
        return self._tokens(self.start_embed())

    def start_views(self) -> Step:
        embedded = self.exports / "run" / "01_embed" / "photographs" / "sift" / "scale1_raw"
        return imatch.steps.start_references(
            str(embedded),
            kind="legacy",
            angles=self.angles,
            crops=[0.75],
            resize_to_original=False,
            file_type="jpg",
            quality=90,
            tag="",
            on_change=self.on_change,
        )

    def views(self) -> Step:
        step = self.start_views()
        imatch.steps.make_references(step, resources=by(workers=self.workers))
        return step

    def references(self) -> Step:
        return self._tokens(imatch.steps.start_reference_tokens(self.views()))

    def index(self) -> Step:
        data, references = (open_step(self.folder(step)) for step in ("01_embed", "02_references"))
        step = indexed(data, references, "reference-data", k=self.k, on_change=self.on_change)
        step.finish(judged(step)[-1])
        return step

    def start_match(self) -> Step:
        return grouped.start_match(
            str(self.folder("03_index")),
            candidates=1,
            matcher="mutual",
            matcher_options={"min_similarity": 0.8, "max_matches": 200},
            model="homography",
            threshold=0.0,
            confidence=0.999,
            iterations=500,
            min_inliers=8,
            min_share=0.0,
            outputs=["json", "npy", "png"],
            tag="",
            on_change=self.on_change,
        )

    def match(self) -> Step:
        step = self.start_match()
        step.finish(
            imatch.steps.match_metrics(step, imatch.steps.match_pairs(step, resources=by(workers=self.workers)))
        )
        return step

    def chain(self) -> None:
        for notebook in (self.embed, self.references, self.index, self.match):
            notebook()

    def folder(self, step: str) -> Path:
        """Where a step lies: "views" or a notebook's name."""
        inside = {
            "01_embed": "01_embed/photographs/sift/scale1_raw",
            "views": "02_references/photographs/legacy/views",
            "02_references": "02_references/photographs/legacy/sift/scale1_raw",
            "03_index": "03_index/photographs/sift/scale1_raw/reference-data_legacy",
            "04_match": "04_match/photographs/sift/scale1_raw/reference-data_legacy",
        }
        return self.exports / "run" / inside[step]

    def but(self, **changes: Any) -> House:
        return House(**{**self.__dict__, **changes})

    def _tokens(self, step: Step) -> Step:
        embeddings = imatch.steps.embed(
            step,
            resources=by(workers=self.workers, batch_size=self.batch_size),
            on_error=self.on_error,
            max_skipped=1.0 if step.name == "02_references" else self.max_skipped,
        )
        imatch.steps.finish_embed(step, embeddings)
        return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> House:
    """The whole chain, never interrupted. Nobody writes here."""
    house = House(tmp_path_factory.mktemp("whole"))
    write_photographs(house.photographs)
    house.chain()
    return house


@pytest.fixture
def house(whole, tmp_path) -> House:
    """A copy of the whole chain and its photographs, times of change included."""
    shutil.copytree(whole.root, tmp_path, dirs_exist_ok=True)
    return House(tmp_path)


@pytest.fixture
def empty(whole, tmp_path) -> House:
    """A copy of the photographs alone."""
    shutil.copytree(whole.photographs, tmp_path / "photographs")
    return House(tmp_path)


# --- what is on disk --------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, Any]:
    """Every file below a folder: its bytes, without what may differ (duration, what a killed run
    did, digests of these; times of change of what was read)."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name.startswith("index/"):
            continue  # of those who searched this folder's vectors
        if path.name == "step.json":
            record = files.read_json(path, signed=True)
            found[name] = {**record, "seconds": None, "work": None, "files": sorted(record["files"])}
        elif path.name == "seen.jsonl":
            found[name] = [{**row, "stat": row["stat"][:1]} for row in files.read_rows(path)]
        elif path.is_file():
            found[name] = without_times(path)
    return found


def assert_same(folder: Path, expected: Path) -> None:
    """Both folders hold the same files with the same bytes, and nothing that a kill left."""
    here, there = content(folder), content(expected)
    assert sorted(here) == sorted(there)
    assert [name for name in here if here[name] != there[name]] == []


def state(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of change of every file below."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


_watched: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is not None and event == "open":
        _watched.append(str(arguments[0]))


@contextmanager
def opened(below: Path) -> Iterator[set[str]]:
    """The files below a folder that this process opens in the block, as Python's own audit reports them."""
    global _watched  # (an audit hook cannot be taken away again, only put to sleep)
    if not hasattr(opened, "hooked"):
        sys.addaudithook(_watch)
        opened.hooked = True
    names: set[str] = set()
    _watched = []
    try:
        yield names
    finally:
        found, _watched = _watched, None
        names.update(Path(name).relative_to(below).as_posix() for name in found if name.startswith(f"{below}{os.sep}"))


# --- kill -9 at an exact place ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """The moment before the n-th audit event of a kind on a file whose name ends so: as late as can be.

    "os.rename" is a file about to get its final name, "os.remove" one about to go.
    """

    event: str
    ending: str
    n: int = 1

    def arm(self) -> None:
        counter = itertools.count(1)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event != self.event:
                return
            path = arguments[1] if event == "os.rename" else arguments[0]
            if os.fsdecode(path).endswith(self.ending) and next(counter) == self.n:
                os.killpg(0, signal.SIGKILL)

        sys.addaudithook(hook)


def _nursery() -> None:
    """Serve in a process of its own: for a line of jobs, fork a group of processes for each, which kills itself with
    all its workers; answer with the exit codes."""
    import IPython.core.interactiveshell  # noqa: F401
    import torch.utils.data  # noqa: F401  (once for all jobs, like IPython and the steps below)

    for room in ("imatch.features.sift", "imatch.steps.match"):
        importlib.import_module(room)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: workers whose parent was killed are reaped here
    for jobs in sys.stdin:
        codes = []
        for job in json.loads(jobs):
            if (pid := os.fork()) == 0:
                os.setpgrp()
                Kill(*job["kill"]).arm()
                getattr(House(**{**job["house"], "root": Path(job["house"]["root"])}), job["verb"])()
                os._exit(0)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            while True:  # the last worker is gone before anybody looks at its files
                try:
                    os.wait()
                except ChildProcessError:
                    break
        print(json.dumps(codes), file=answers, flush=True)


@pytest.fixture(scope="module")
def run_killed() -> Iterator[Callable[..., None]]:
    """Run verbs in other processes and let each be killed; all must have been."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_resume; test_resume._nursery()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as nursery:

        def run(*jobs: tuple[House, str, Kill]) -> None:
            described = [
                {"house": {**house.__dict__, "root": str(house.root)}, "verb": verb, "kill": [*kill.__dict__.values()]}
                for house, verb, kill in jobs
            ]
            print(json.dumps(described), file=nursery.stdin, flush=True)
            assert json.loads(nursery.stdout.readline()) == [-signal.SIGKILL] * len(jobs)

        yield run
        nursery.stdin.close()


def test_killed_embedding(run_killed, whole, empty, capsys):
    """Killed with five of eight shards on disk, 01_embed computes the other three and opens no other photograph."""
    run_killed((empty.but(workers=2), "embed", Kill("os.rename", ".jsonl", 6)))
    folder = empty.folder("01_embed")
    there = sorted(path.stem for path in (folder / "local").glob("*.jsonl"))
    assert there == [f"{shard:05d}" for shard in range(5)]
    assert not (folder / "images.jsonl").exists()
    assert not (folder / "metrics.json").exists()
    before = {path: was for path, was in state(folder / "local").items() if path.name[:5] in there}

    with opened(empty.photographs) as read:
        empty.embed()
    ids = Stored(folder).ids
    assert read == {*ids[5 * SHARD :]}
    assert f"5 of {PHOTOGRAPHS // SHARD} shards are there, 3 to compute" in capsys.readouterr().out
    after = state(folder / "local")
    arrays = [path for path in before if path.name.endswith(".npy") and ".global." not in path.name]
    assert len(arrays) == 3 * len(there)  # descriptors, their scales, positions
    assert all(after[path] == before[path] for path in arrays)
    assert_same(folder, whole.folder("01_embed"))


def test_killed_views(run_killed, whole, empty):
    """Killed with the rows of some photographs on disk, the first half of 02_references makes the other views."""
    empty.embed()
    run_killed((empty.but(workers=2), "views", Kill("os.rename", ".jsonl", 5)))
    folder = empty.folder("views")
    there = sorted((folder / "rows").glob("*.jsonl"))
    assert 4 <= len(there) <= 8 < PHOTOGRAPHS  # two workers; the first to come to its fifth photograph ended both
    assert list((folder / "rows").glob(".*.tmp"))  # which is no row
    sources = {row["source"] for path in there for row in files.read_rows(path)}
    made = [folder / row["id"] for path in there for row in files.read_rows(path)]
    before = state(folder)

    with opened(empty.photographs) as read:
        step = empty.views()
    assert read == {*Stored(empty.folder("01_embed")).ids} - sources
    after = state(folder)
    assert all(after[path] == before[path] for path in made)
    assert len(made) == len(there) * len(ANGLES)
    assert step.finished
    assert_same(folder, whole.folder("views"))


def test_killed_reference_tokens(run_killed, whole, empty):
    """Killed while it embeds the views, 02_references goes on there and leaves the views alone."""
    empty.embed()
    empty.views()
    run_killed((empty.but(workers=2), "references", Kill("os.rename", ".jsonl", 9)))
    folder, views = empty.folder("02_references"), empty.folder("views")
    there = {path.stem for path in (folder / "local").glob("*.jsonl")}
    assert len(there) == 8 < PHOTOGRAPHS * len(ANGLES) // SHARD
    before = {path: was for path, was in state(folder / "local").items() if path.name[:5] in there}
    made = state(views)

    empty.references()
    after = state(folder / "local")
    kept = [path for path in before if path.name in {f"{shard}{end}" for shard in there for end in (".npy", ".xy.npy")}]
    assert len(kept) == 2 * len(there)
    assert all(after[path] == before[path] for path in kept)
    assert state(views) == made
    assert_same(folder, whole.folder("02_references"))


EMBED_KILLS = [
    Kill("os.rename", "/step.json"),
    Kill("os.rename", "/step.json", 2),  # where it runs is known
    Kill("os.rename", "/00003.npy"),
    Kill("os.rename", "/00003.global.npy"),
    Kill("os.rename", "/00003.xy.npy"),
    Kill("os.rename", "/00003.jsonl"),
    Kill("os.rename", "/00003.work.json"),
    Kill("os.rename", "/seen.jsonl"),
    Kill("os.rename", "/global.npy"),
    Kill("os.rename", "/skipped.jsonl"),
    Kill("os.rename", "/images.jsonl"),
    Kill("os.remove", "/00002.jsonl"),  # merged, and its parts half removed
    Kill("os.remove", "/00002.global.npy"),
    Kill("os.rename", "/step.json", 3),  # what was done
    Kill("os.rename", "/step.json", 4),  # finishing: the fingerprint
    Kill("os.rename", "/metrics.json"),
]


def test_killed_anywhere_in_embedding(run_killed, tmp_path):
    """Wherever 01_embed is killed, merging and finishing included, the same call again ends with the same bytes."""
    write_photographs(tmp_path / "photographs", 8)
    expected = House(tmp_path, "never")
    expected.embed()
    houses = [House(tmp_path, f"killed{i}") for i in range(len(EMBED_KILLS))]
    run_killed(*((house, "embed", kill) for house, kill in zip(houses, EMBED_KILLS, strict=True)))
    for house, kill in zip(houses, EMBED_KILLS, strict=True):
        folder = house.folder("01_embed")
        merged = kill in EMBED_KILLS[11:]
        assert (folder / "images.jsonl").exists() == merged, kill
        assert not (folder / "metrics.json").exists()
        before = state(folder / "local")
        house.embed()
        if merged:
            after = state(folder / "local")
            assert {path: before[path] for path in after} == after, kill
        assert_same(folder, expected.folder("01_embed"))


REFERENCE_KILLS = [
    Kill("os.rename", "_rot030_crop75.jpg", 4),
    Kill("os.rename", "_mask.png", 4),
    Kill("os.rename", "/00000003.jsonl"),
    Kill("os.rename", "/references.jsonl"),
    Kill("os.rename", "/metrics.json"),
    Kill("os.remove", "00000002.jsonl"),  # finished, and its parts half removed
]


def test_killed_anywhere_in_views(run_killed, tmp_path):
    """Wherever the first half of 02_references is killed, it ends with the same files and no other."""
    write_photographs(tmp_path / "photographs", 8)
    expected = House(tmp_path, "never")
    expected.embed()
    houses = [House(tmp_path, f"killed{i}") for i in range(len(REFERENCE_KILLS))]
    for house in houses:
        shutil.copytree(expected.exports, house.exports)
    expected.views()
    run_killed(*((house, "views", kill) for house, kill in zip(houses, REFERENCE_KILLS, strict=True)))
    for house, kill in zip(houses, REFERENCE_KILLS, strict=True):
        folder = house.folder("views")
        assert (folder / "metrics.json").exists() == (kill.event == "os.remove"), kill
        house.views()
        assert_same(folder, expected.folder("views"))


def test_killed_index_and_matching(run_killed, whole, house):
    """03_index and 04_match, too, end with the same bytes; matched queries are not matched again."""
    for step in ("03_index", "04_match"):
        shutil.rmtree(house.folder(step))
    run_killed((house, "index", Kill("os.rename", "/ranking.npz")))
    assert not list(house.index().folder.glob(".*"))
    assert_same(house.folder("03_index"), whole.folder("03_index"))

    run_killed((house.but(workers=2), "match", Kill("os.rename", "/00000.jsonl", 6)))
    pairs = house.folder("04_match") / "pairs"
    done = [path.parent for path in pairs.rglob("00000.jsonl")]
    assert 5 <= len(done) <= 10 < PHOTOGRAPHS * len(ANGLES)
    before = state(*done)
    house.match()
    assert {path: was for path, was in state(*done).items() if path.suffix != ".tmp"} == before
    assert_same(house.folder("04_match"), whole.folder("04_match"))


def test_killed_while_changed_photographs_are_recomputed(run_killed, tmp_path):
    """Killed anywhere between taking a finished step apart and finishing it again, it ends as a fresh run."""
    write_photographs(tmp_path / "photographs", 8)
    kills = [
        Kill("os.remove", "/metrics.json"),
        Kill("os.rename", "/00000.global.npy"),
        Kill("os.rename", "/00002.jsonl"),
        Kill("os.remove", "/images.jsonl"),
        Kill("os.remove", "/00003.jsonl"),
        Kill("os.remove", "/00003.npy"),
        Kill("os.rename", "/00003.npy"),
        Kill("os.rename", "/global.npy"),
        Kill("os.rename", "/images.jsonl"),
        Kill("os.rename", "/metrics.json"),
    ]
    houses = [House(tmp_path, f"killed{i}", on_change="recompute") for i in range(len(kills))]
    old = House(tmp_path, "old")
    old.embed()
    for house in houses:
        shutil.copytree(old.exports, house.exports)
    picture(99).save(tmp_path / "photographs/flight 2/07.png")
    fresh = House(tmp_path, "fresh")
    fresh.embed()
    run_killed(*((house, "embed", kill) for house, kill in zip(houses, kills, strict=True)))
    for house in houses:
        assert (house.folder("01_embed") / "metrics.json").exists() == (house is houses[0])
        house.embed()
        assert_same(house.folder("01_embed"), fresh.folder("01_embed"))


@pytest.mark.parametrize("verb", ["embed", "views"])
def test_killed_while_another_configuration_is_removed(verb, run_killed, tmp_path):
    """Killed before any of the old results' files is removed, neither the old nor the new parameters find a remnant."""
    write_photographs(tmp_path / "photographs", 4)
    old = House(tmp_path, "old")
    old.embed()
    shutil.copytree(old.exports, tmp_path / "new")
    new = old.but(name="new", on_change="recompute", **{"keypoints": 60} if verb == "embed" else {"angles": (30,)})
    getattr(old, verb)()
    getattr(new, verb)()
    step = old.folder("01_embed" if verb == "embed" else "views")
    kills = [Kill("os.remove", "", n + 1) for n in range(len(state(step)))]
    houses = [new.but(name=f"killed{n}") for n in range(len(kills))]
    for house in houses:
        shutil.copytree(old.exports, house.exports)
    run_killed(*((house, verb, kill) for house, kill in zip(houses, kills, strict=True)))
    for house in houses:
        shutil.copytree(house.exports, tmp_path / f"{house.name} back")
        getattr(house, verb)()
        assert_same(house.exports, new.exports)
        back = old.but(name=f"{house.name} back", on_change="recompute")
        getattr(back, verb)()
        assert_same(back.exports, old.exports)


def test_torn_line_of_seen(run_killed, whole, empty):
    """A line that a kill left half written costs one look at that photograph and no more, after a second kill, too."""
    torn = {"newline": 1, "half a line": 30, "nothing": 0}
    houses = [empty.but(name=name) for name in torn]
    run_killed(*((house, "embed", Kill("os.rename", "/00005.jsonl")) for house in houses))
    for house in houses:
        path = house.folder("01_embed") / "seen.jsonl"
        with path.open("rb+") as file:
            file.truncate(path.stat().st_size - torn[house.name])
    run_killed(*((house, "embed", Kill("os.rename", "/00007.jsonl")) for house in houses))
    for house in houses:
        path = house.folder("01_embed") / "seen.jsonl"
        known = {row["id"] for row in map(_json, path.read_bytes().split(b"\n")) if row}
        with opened(house.photographs) as read:
            house.embed()
        assert len(known) == 7 * SHARD - (house.name == "half a line")
        assert read == {*Stored(house.folder("01_embed")).ids} - known
        assert_same(house.folder("01_embed"), whole.folder("01_embed"))


def _json(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None


# --- the same again ---------------------------------------------------------------------------------------


def test_again_reuses_everything(house):
    """The same four notebooks again change no file, and open neither a photograph nor a reference."""
    before = state(house.exports)
    for notebook in ("views", "04_match"):
        open_step(house.folder(notebook)).damage()  # a copy is read once
    with opened(house.root) as read:
        house.chain()
    assert state(house.exports) == before
    assert [name for name in read if Path(name).suffix in (".jpg", ".png", ".ppm")] == []
    with opened(house.photographs) as read:  # the watch does see what is opened
        house.but(name="other").embed()
    assert len(read) == PHOTOGRAPHS


# --- damage on disk ---------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Another byte in the middle, at the time that was."""
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


HARM = {"empty": lambda path: path.write_bytes(b""), "gone": Path.unlink, "other bytes": flip}


@pytest.mark.parametrize("notebook", ["01_embed", "views", "02_references", "03_index", "04_match"])
def test_damage_is_found_before_a_step_is_built_on(notebook, house, capsys):
    folder = house.folder(notebook)
    assert doctor.steps(folder) == 0
    assert "all as written" in capsys.readouterr().out
    names = [*open_step(folder).sealed]
    for i, name in enumerate(names[:: max(1, len(names) // 25)]):
        data = (folder / name).read_bytes()
        what = [*HARM][i % len(HARM) if data else 1]
        HARM[what](folder / name)
        if name.split("/")[0] not in ("pairs", "queries"):  # which nothing is built on
            with pytest.raises(StepError, match="run its notebook again"):
                open_step(folder)
        if name != "metrics.json" or what != "gone":  # which is what an unfinished step looks like
            assert doctor.steps(folder) == 1
            assert f"{name}: " in capsys.readouterr().out
        (folder / name).write_bytes(data)
    assert doctor.steps(folder) == 0


@pytest.mark.parametrize(
    ("notebook", "name"),
    [
        ("01_embed", "local/00001.npy"),
        ("views", "references.jsonl"),
        ("03_index", "step.json"),
    ],
)
def test_what_is_damaged_is_refused_and_made_again(notebook, name, house, whole):
    flip(house.folder(notebook) / name)
    before = state(house.exports)
    with pytest.raises(StepError, match=rf"is damaged:\n.*{name}.*\n.*set on_change to recompute"):
        house.chain()
    assert state(house.exports) == before
    house.but(on_change="recompute").chain()
    assert_same(house.folder(notebook), whole.folder(notebook))


def test_damaged_metrics_are_written_again(house, whole):
    for notebook in ("01_embed", "03_index"):
        (house.folder(notebook) / "metrics.json").write_bytes(b"")
    house.chain()
    assert_same(house.exports, whole.exports)


def test_a_damaged_index_is_refused(house):
    path = house.folder("01_embed") / "index" / "flat" / "00000.faiss"
    flip(path)
    with pytest.raises(StepError, match=rf"00000.faiss is not a whole FAISS index .*: delete {path.parent} and run"):
        house.but(k=K + 1, on_change="recompute").index()


def test_rows_that_are_missing_keep_a_step_from_finishing(house, whole):
    folder = house.folder("04_match")
    (folder / "metrics.json").unlink()
    block = sorted(folder.glob("pairs/*/00000.jsonl"))[3]
    block.write_bytes(b"")
    with pytest.raises(StepError, match=rf"{block} has 0 rows of \d that were planned: delete it and run the same"):
        house.match()
    block.unlink()
    house.match()
    assert_same(folder, whole.folder("04_match"))


def test_moved_as_a_whole_reuses(house, tmp_path_factory):
    """Exports and photographs moved together are reused, down to the last downstream step."""
    moved = House(tmp_path_factory.mktemp("moved") / "here")
    shutil.move(house.root, moved.root)
    before = state(moved.exports)
    moved.chain()
    assert state(moved.exports) == before


@pytest.mark.parametrize(("workers", "batch_size"), [(2, 3), (0, 1)])
def test_workers_and_batches_change_no_byte(workers, batch_size, whole, empty):
    house = empty.but(workers=workers, batch_size=batch_size)
    house.chain()
    assert_same(house.exports, whole.exports)


# --- another parameter ------------------------------------------------------------------------------------


def test_changed_option_of_the_backbone(house):
    """It is refused with what differs and nothing is touched; recomputed, everything that depends on it refuses,
    and the views, which do not, are reused."""
    before = state(house.exports)
    changed = house.but(keypoints=100)
    with pytest.raises(StepError, match=rf"max_keypoints: {KEYPOINTS} -> 100\n.*Nothing was touched") as refused:
        changed.embed()
    assert "set on_change to recompute" in str(refused.value)
    assert state(house.exports) == before

    anew = changed.but(on_change="recompute")
    anew.embed()
    fresh = changed.but(name="fresh")
    fresh.embed()
    assert_same(anew.folder("01_embed"), fresh.folder("01_embed"))

    changed.views()
    with pytest.raises(StepError, match=r"(?s)02_references.*upstream\.embed"):
        changed.references()
    with pytest.raises(StepError, match="run 02_references again"):
        changed.index()
    downstream = state(*(house.folder(step) for step in ("views", "02_references", "03_index", "04_match")))
    assert {path: before[path] for path in downstream} == downstream

    views = state(house.folder("views"))
    anew.references()
    assert state(house.folder("views")) == views
    with pytest.raises(StepError, match=r"(?s)03_index.*upstream\.gallery.*upstream\.query"):
        changed.index()
    anew.index()
    with pytest.raises(StepError, match=r"(?s)04_match.*upstream\.index"):
        changed.match()
    anew.match()
    fresh.chain()
    assert_same(anew.exports, fresh.exports)


def test_changed_k(house):
    """What lies above 03_index is reused, 03_index itself and 04_match refuse, each by what differs."""
    before = state(house.exports)
    changed = house.but(k=3)
    changed.embed()
    changed.references()
    with pytest.raises(StepError, match=rf"k: {K} -> 3"):
        changed.index()
    assert state(house.exports) == before

    changed.but(on_change="recompute").index()
    with pytest.raises(StepError, match=r"(?s)04_match.*upstream\.index"):
        changed.match()
    after = state(*(house.folder(step) for step in ("01_embed", "views", "02_references", "04_match")))
    assert {path: before[path] for path in after} == after
    fresh = changed.but(name="fresh")
    for step in ("01_embed", "02_references"):
        shutil.copytree(house.exports / "run" / step, fresh.exports / "run" / step)
    fresh.index()
    fresh.match()
    assert_same(house.folder("03_index"), fresh.folder("03_index"))
    house.but(on_change="recompute", k=3).match()
    assert_same(house.folder("04_match"), fresh.folder("04_match"))


# --- other photographs ------------------------------------------------------------------------------------


def change(root: Path, id: str) -> None:
    was = (root / id).stat()
    picture(77).save(root / id)
    os.utime(root / id, ns=(was.st_atime_ns, was.st_mtime_ns + 1))


def change_pixels_only(root: Path, id: str) -> None:
    """Other bytes of the same number, and the time of change one nanosecond later."""
    was = (root / id).stat()
    data = bytearray((root / id).read_bytes())
    data[-9000:-4500] = data[-4500:]
    (root / id).write_bytes(data)
    os.utime(root / id, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    assert (root / id).stat().st_size == was.st_size


def add(root: Path, id: str) -> None:
    picture(78).save(root / id)


def remove(root: Path, id: str) -> None:
    (root / id).unlink()


@pytest.mark.parametrize(
    ("what", "id", "said", "kept"),
    [
        (change, "flight 2/12.jpg", "changed", {*range(8)} - {6}),
        (change_pixels_only, "flight 1/05.ppm", "changed", {*range(8)} - {2}),
        (add, "flight 2/zz.png", "new", {*range(8)}),
        (add, "flight 1/zz.png", "new", {*range(8)}),
        (remove, "flight 2/15.jpg", "gone", {*range(7)}),
        (remove, "flight 1/06.jpg", "gone", {*range(8)} - {3}),
    ],
    ids=["changed", "changed, same size", "added", "added in the middle", "removed", "removed in the middle"],
)
def test_other_photographs(what, id, said, kept, house):
    """The run names the photograph and touches nothing; recomputing renews its shard, or gives it one."""
    what(house.photographs, id)
    folder = house.folder("01_embed")
    before = state(house.exports)
    for _ in range(2):
        with pytest.raises(StepError, match=rf"(?s)photographs in .* are not those.*\n  {said}: {id}\n.*Nothing was"):
            house.embed()
    assert state(house.exports) == before

    with opened(house.photographs) as read:
        house.but(on_change="recompute").embed()
    assert read == {row["id"] for row in Stored(folder).rows if row["shard"] not in kept}
    after = state(folder / "local")
    same = {int(path.name[:5]) for path in after if before.get(path) == after[path]}
    assert same == kept
    fresh = house.but(name="fresh")
    fresh.embed()
    assert_alike(Stored(folder), Stored(fresh.folder("01_embed")))


def assert_alike(a: Stored, b: Stored) -> None:
    """They hold the same, wherever it lies."""
    placed = {*PLACED} - {"vector"}
    rows = [[{key: row[key] for key in row if key not in placed} for row in one.rows] for one in (a, b)]
    assert rows[0] == rows[1]
    assert a.vectors.tobytes() == b.vectors.tobytes()
    for i in range(len(a)):
        one, other = a.tokens(i), b.tokens(i)
        assert one.descriptors.tobytes() == other.descriptors.tobytes()
        assert one.xy.tobytes() == other.xy.tobytes()


def test_touched_photographs_are_reused(house):
    """Another time of change and the same bytes: hashed once, and everything is reused."""
    for path in house.photographs.rglob("*.png"):
        os.utime(path)
    before = state(house.exports)
    house.chain()
    after = state(house.exports)
    assert [path.name for path in after if after[path] != before[path]] == ["seen.jsonl"]
    with opened(house.photographs) as read:
        house.embed()
    assert not read


def test_references_refuse_a_photograph_changed_since_it_was_embedded(whole, empty):
    """02_references does not mix old vectors with new views; with the photograph put back it goes on."""
    empty.embed()
    path = empty.photographs / "flight 2/12.jpg"
    data, was = path.read_bytes(), path.stat()
    change(empty.photographs, "flight 2/12.jpg")
    with pytest.raises(ImatchError, match=r"flight 2/12.jpg has changed since it was embedded\nrun 01_embed again"):
        empty.views()
    assert not (empty.folder("views") / "metrics.json").exists()
    made = state(empty.folder("views") / "references_photographs")

    path.write_bytes(data)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    empty.views()
    after = state(empty.folder("views"))
    assert {made_path: after[made_path] for made_path in made} == made
    assert_same(empty.folder("views"), whole.folder("views"))


def test_a_changed_photograph_reaches_every_step(house):
    """Once 01_embed was computed again, the views, their tokens, the index and the matches refuse and follow."""
    change(house.photographs, "flight 1/00.jpg")
    anew = house.but(on_change="recompute")
    anew.embed()
    with pytest.raises(StepError, match=r"02_references(?s:.*)upstream\.photographs"):
        house.views()
    anew.views()
    with pytest.raises(StepError, match=r"upstream\.embed(?s:.*)upstream\.views"):
        house.references()
    anew.references()
    with pytest.raises(StepError, match=r"03_index"):
        house.index()
    anew.index()
    with pytest.raises(StepError, match=r"04_match"):
        house.match()
    anew.but(workers=2).match()
    fresh = house.but(name="fresh")
    fresh.chain()
    assert_same(house.exports, fresh.exports)


def test_a_changed_view_is_refused(house):
    """A reference that somebody edited is no longer what its matrix says."""
    row = files.read_rows(house.folder("views") / "references.jsonl")[0]
    change(house.folder("views"), row["id"])
    before = state(house.exports)
    with pytest.raises(StepError, match=f"changed: {row['id']}"):
        house.references()
    assert state(house.exports) == before


def test_photographs_removed_after_a_kill(run_killed, tmp_path):
    """A shard that a killed run had begun, and that no photograph belongs to any more, leaves nothing."""
    write_photographs(tmp_path / "photographs", 8)
    house = House(tmp_path)
    run_killed((house, "embed", Kill("os.rename", "/00003.jsonl")))
    assert (house.folder("01_embed") / "local" / "00003.npy").exists()
    for id in ("flight 2/06.jpg", "flight 2/07.png"):
        remove(house.photographs, id)
    house.embed()
    fresh = house.but(name="fresh")
    fresh.embed()
    assert_same(house.folder("01_embed"), fresh.folder("01_embed"))


# --- photographs that cannot be used ----------------------------------------------------------------------


@pytest.fixture
def some_bad(tmp_path) -> House:
    """Eight photographs: one cut short, one without texture, one that is empty."""
    root = write_photographs(tmp_path / "photographs", 8)
    path = root / "flight 1/00.jpg"
    path.write_bytes(path.read_bytes()[:2000])
    Image.new("RGB", (200, 160), "grey").save(root / "flight 1/03.jpg")
    (root / "flight 2/05.ppm").write_bytes(b"")
    return House(tmp_path, max_skipped=0.5)


def test_skipped_photographs_resume(run_killed, some_bad):
    """Skipped photographs are remembered like the others: the same bytes after a kill, nothing read again."""
    whole = some_bad.but(name="whole")
    with pytest.warns(ImatchWarning, match="3 of 8 photographs were skipped"):
        whole.embed()
    run_killed((some_bad, "embed", Kill("os.rename", "/00002.jsonl")))
    with pytest.warns(ImatchWarning, match="3 of 8"):
        some_bad.embed()
    assert_same(some_bad.folder("01_embed"), whole.folder("01_embed"))
    before = state(some_bad.exports)
    with opened(some_bad.photographs) as read, pytest.warns(ImatchWarning, match="3 of 8"):
        some_bad.embed()
    assert not read
    assert state(some_bad.exports) == before


def test_too_many_bad_photographs_are_too_many_again(some_bad):
    """What a run that stopped by itself had finished counts when it is started again."""
    strict = some_bad.but(max_skipped=0.25)
    for _ in range(3):
        with pytest.raises(ImatchError, match="3 of 8 photographs cannot be used, more than max_skipped = 25%"):
            strict.embed()
    with pytest.raises(PhotographError, match="on_error is stop"):
        some_bad.but(on_error="stop").embed()
    with pytest.warns(ImatchWarning, match="3 of 8"):
        some_bad.embed()


def test_a_repaired_photograph_is_taken_in(some_bad):
    """Mended, it is a changed photograph: named, and with on_change="recompute" no longer skipped."""
    with pytest.warns(ImatchWarning, match="3 of 8"):
        some_bad.embed()
    picture(5).save(some_bad.photographs / "flight 2/05.ppm")
    with pytest.raises(StepError, match=r"changed: flight 2/05.ppm"):
        some_bad.embed()
    with pytest.warns(ImatchWarning, match="2 of 8"):
        some_bad.but(on_change="recompute").embed()
    fresh = some_bad.but(name="fresh")
    with pytest.warns(ImatchWarning, match="2 of 8"):
        fresh.embed()
    assert_same(some_bad.folder("01_embed"), fresh.folder("01_embed"))
