"""The long loops by every engine: the same bytes, whoever is killed on the way. Real processes, a real Dask cluster."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import imatch
from imatch.core import compute, files, settings
from imatch.core.compute import Local, PartDoneError, Place
from imatch.core.step import Step, open_step
from imatch.core.types import ImatchError, ImatchWarning, StepError
from imatch.data.images import Resize, list_photographs
from imatch.retrieval import index as searcher
from imatch.retrieval.index import IndexOptions
from tests import cells, grouped
from tests.command import command
from tests.grouped import by
from tests.jobs import Refusing, Squares, Threads
from tests.test_resume import House, assert_same, content, write_photographs

pytest.importorskip("distributed", reason="Dask is not installed: make setup")
ROOT = Path(__file__).parents[1]


def create_engine(engine: str = "local", **given: str) -> compute.Engine:
    return imatch.ComputeOptions(engine=engine, **given).machines


def squares(folder: Path, jobs: Iterable[int]) -> None:
    assert {path.stem: path.read_text() for path in folder.glob("*.txt")} == {str(n): str(n * n) for n in jobs}


def pids(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.glob("*.pid")}


def all_rows(engine: compute.Engine, work: Squares | Refusing, jobs: range, devices: int = 2) -> list[int]:
    return sorted(row["n"] for row in compute.do(engine, work, jobs, ["cpu"] * devices))


@pytest.mark.parametrize("name", compute.ENGINES)
def test_every_job_gives_its_row(name, tmp_path):
    assert all_rows(create_engine(name), Squares(tmp_path), range(7)) == [*range(7)]
    squares(tmp_path, range(7))
    assert (str(os.getpid()) in pids(tmp_path)) == (name == "local")


@pytest.mark.parametrize(("name", "n"), [("processes", 2), ("dask", 1)])
def test_a_process_uses_its_share_of_the_cores(name, n):
    """Dask gives its workers one thread, for whoever does not know better."""
    rows = [*compute.do(create_engine(name), Threads(), range(2), ["cpu"] * n)]
    assert rows == 2 * [dict.fromkeys(("torch", "faiss", "cv2"), max(1, settings.cores() // n))]


@pytest.mark.parametrize("name", compute.ENGINES)
def test_what_the_work_refuses_is_told(name):
    with pytest.raises(ImatchError, match="job 2 is refused"):
        all_rows(create_engine(name), Refusing(), range(5), devices=1)


@pytest.mark.parametrize("name", ["processes", "dask"])
def test_an_error_of_the_system_is_no_lost_process(name, capsys):
    with pytest.raises(ImatchError, match="PermissionError: no entry") as told:
        all_rows(create_engine(name), Refusing("system"), range(5), devices=1)
    assert "jobs.py" in "".join(told.value.__notes__)
    assert "ended too early" not in (said := capsys.readouterr().out)
    assert "waiting for it" not in said


def test_an_error_that_cannot_be_pickled_is_told():
    with pytest.raises(ImatchError, match="OddError: job 2"):
        all_rows(create_engine("processes"), Refusing("odd"), range(5), devices=1)


def test_a_scheduler_that_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("imatch.core.compute.START", 1)
    with pytest.raises(ImatchError, match=r"no scheduler with workers at tcp://127.0.0.1:9"):
        all_rows(create_engine("dask", scheduler="tcp://127.0.0.1:9"), Squares(tmp_path), range(5))


def test_a_local_cluster_has_a_worker_for_each_device(tmp_path, capsys):
    all_rows(create_engine("dask"), Squares(tmp_path), range(2), devices=1)
    assert "squares: 1 workers" in capsys.readouterr().out


def test_an_engine_that_loses_a_row_is_found_out(tmp_path):
    """A step may not be finished on an engine's word alone."""

    class Losing:
        shard = ""

        def __call__(self, work, jobs, devices):
            return work(jobs[1:], Place(devices[0], quiet=True))

    with pytest.raises(ImatchError, match="squares: only 6 of 7 jobs came back: run the same command again"):
        all_rows(Losing(), Squares(tmp_path), range(7))


def test_shards_are_the_jobs_once(tmp_path):
    for i in (2, 0, 1):
        with pytest.raises(PartDoneError, match=rf"part {i}/3 is done"):
            all_rows(create_engine("local", shard=f"{i}/3"), Squares(tmp_path), range(8))
        assert (tmp_path / f"{i}.txt").is_file()
    squares(tmp_path, range(8))


def test_parts_do_not_recompute():
    with pytest.raises(ImatchError, match="parts cannot make a step anew"):
        compute.check_parts("0/3", "recompute")
    compute.check_parts("", "recompute")


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/2", "1/0"])
def test_a_shard_that_is_none_is_refused(shard):
    with pytest.raises(ImatchError, match="is no i/n: use 0/"):
        create_engine("local", shard=shard)


def test_names_and_options():
    with pytest.raises(ImatchError, match="unknown engine 'dusk': did you mean 'dask'"):
        create_engine("dusk")
    with pytest.raises(ImatchError, match="unknown option of engine local 'scheduler'"):
        create_engine("local", scheduler="tcp://localhost:8786")


def test_without_dask_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImatchError, match=r"pip install 'imatch\[dask\]'"):
        create_engine("dask")


def test_another_process_does_the_jobs_of_a_killed_one(tmp_path, capsys):
    assert all_rows(create_engine("processes"), Squares(tmp_path, dies_at=3), range(6)) == [*range(6)]
    squares(tmp_path, range(6))
    assert "ended too early, a new one does its work" in capsys.readouterr().out


def test_what_a_killed_process_had_written_is_not_done_again(tmp_path, monkeypatch):
    """All eight jobs are one part, which is killed at the seventh."""
    monkeypatch.setattr("imatch.core.compute.PARTS", 1)
    assert all_rows(create_engine("processes"), Squares(tmp_path, dies_at=6), range(8), devices=1) == [6, 7]
    squares(tmp_path, range(8))
    killed, new = ({(tmp_path / f"{n}.pid").read_text() for n in part} for part in (range(6), (6, 7)))
    assert (len(killed), len(new), killed & new) == (1, 1, set())


@pytest.mark.parametrize("name", ["processes", "dask"])
def test_a_job_that_kills_each_time_ends_the_run(name, tmp_path):
    with pytest.raises(ImatchError, match=r"killed.*goes on where it stopped"):
        all_rows(create_engine(name), Squares(tmp_path, dies_at=1, dies_once=False), range(4), devices=1)
    assert (tmp_path / "0.txt").is_file()


# --- a cluster of real processes -------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """A scheduler and workers, each a command of Dask's own, as a user starts them."""

    def __init__(self) -> None:
        self.port = free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        self.workers = [self.worker() for _ in range(2)]

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        started = subprocess.Popen(
            [sys.executable, "-m", "dask", *command],
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.processes.append(started)
        return started

    def worker(self) -> subprocess.Popen[bytes]:
        return self.start("worker", self.address, "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """The process, and with a worker's nanny its worker."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def restart_scheduler(self) -> None:
        """As whoever looks after a cluster does: workers that saw their scheduler go are started anew, too."""
        self.kill(self.scheduler)
        time.sleep(1)
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        for worker in self.workers:
            if worker.poll() is None:
                self.kill(worker)
        self.workers = [self.worker() for _ in range(2)]

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                self.kill(process)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def when(condition: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Do something as soon as a condition holds, beside what is in the block; it must have held."""
    acted, end = threading.Event(), threading.Event()

    def watch() -> None:
        while not end.is_set():
            if condition():
                act()
                acted.set()
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        end.set()
        watcher.join()
    assert acted.is_set()


# --- the real loops --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"), 24)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    from tests import random_weights

    return random_weights.write(tmp_path_factory.mktemp("weights"), ["vits16"])


@pytest.fixture
def start(photographs, weights, monkeypatch, tmp_path) -> Callable[..., Step]:
    """Starts 01_embed with a DINOv3 of random weights, two photographs a shard."""
    monkeypatch.setenv("WEIGHTS_ROOT", str(weights.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def started(name: str, folder: Path = photographs, weight: str = "vits16") -> Step:
        return grouped.start_embed(
            str(folder),
            data_key=str(weights),
            exports=str(tmp_path / name),
            run="run",
            weight=weight,
            backbone_options={"precision": "fp32", "engine_forward": "torch"} if weight == "vits16" else {},
            resize=Resize("long_side", long_side=64),
            shard_size=2,
            tag="",
            on_change="refuse",
        )

    return started


def embedded(step: Step, **given) -> Path:
    imatch.steps.finish_embed(step, imatch.steps.embed(step, by(**given)))
    return step.folder


def stored(folder: Path) -> dict[str, object]:
    """What lies in a step, without where and in what time it was computed."""
    return {name: value for name, value in content(folder).items() if name != "step.json"}


def test_every_engine_writes_the_same_bytes(start):
    """Locally, by two processes, by two workers of Dask, by three parts that know nothing of each other. (By a network,
    processes do in test_variants.py, and Dask does below.)"""
    expected = stored(embedded(start("local", weight="dsift")))
    assert "global.npy" in expected
    for name in ("processes", "dask"):
        step = start(name, weight="dsift")
        assert stored(embedded(step, engine=create_engine(name), devices="cpu,cpu")) == expected
        work = open_step(step.folder).work
        assert work["photographs"] == 24
        assert min(work[part] for part in ("seconds", "decode", "wait", "forward", "write")) > 0
        assert "start" in work
    for shard in ("0/3", "2/3", "1/3"):
        with pytest.raises(PartDoneError, match=f"part {shard} is done"):
            imatch.steps.embed(
                start("parts", weight="dsift"), resources=imatch.ComputeOptions(engine="local", shard=shard)
            )
    step = start("parts", weight="dsift")
    assert stored(embedded(step)) == expected
    assert open_step(step.folder).work["photographs"] == 24


def test_parts_that_do_nothing_more_read_no_photograph_again(start, photographs):
    from tests.test_resume import opened

    for shard in ("0/2", "1/2"):
        with pytest.raises(PartDoneError):
            imatch.steps.embed(start("parts"), resources=imatch.ComputeOptions(engine="local", shard=shard))
    with opened(photographs) as read:
        embedded(start("parts"))
    assert read == set()


def test_a_part_looks_at_its_own_photographs_only(start, photographs):
    from tests.test_resume import opened

    with opened(photographs) as read, pytest.raises(PartDoneError):
        imatch.steps.embed(start("parts"), resources=imatch.ComputeOptions(engine="local", shard="1/3"))
    ids = list_photographs(photographs)
    shards = [ids[first : first + 2] for first in range(0, len(ids), 2)]
    assert read == {id for part in shards[1::3] for id in part}


def test_more_parts_than_shards(start):
    with pytest.raises(PartDoneError, match="12 of 12 jobs are left"):
        imatch.steps.embed(start("parts"), resources=imatch.ComputeOptions(engine="local", shard="15/16"))


def test_a_step_records_the_devices_of_the_workers(start):
    """A cluster's are not those of the machine that asks."""

    @dataclass(frozen=True)
    class Elsewhere(Local):
        def __call__(self, work, jobs, devices):
            return ({**row, "device": "cuda"} for row in super().__call__(work, jobs, devices))

    step = start("elsewhere")
    imatch.steps.embed(step, resources=by(Elsewhere()))
    assert open_step(step.folder, finished=False).device == "cuda"


def test_a_part_of_a_step_that_is_whole_sees_what_changed(start, tmp_path, photographs):
    """There is nothing to share out any more: each part looks at all. Bad photographs of one part are few of all."""
    folder = shutil.copytree(photographs, tmp_path / "copied")
    first, *_, last = sorted(path for path in folder.rglob("*") if path.is_file())
    last.write_bytes(last.read_bytes()[:200])
    step = start("changing", folder)
    for engine in (create_engine("local", shard="11/12"), create_engine("local")):
        with pytest.raises(PartDoneError) if engine.shard else pytest.warns(ImatchWarning, match="1 of 24"):
            imatch.steps.finish_embed(step, imatch.steps.embed(step, resources=by(engine)))
    part = create_engine("local", shard="11/12")
    with pytest.warns(ImatchWarning, match="1 of 24 photographs were skipped"):
        imatch.steps.embed(start("changing", folder), resources=by(part))
    first.write_bytes(first.read_bytes() + b"\0")
    with pytest.raises(StepError, match="changed"):
        imatch.steps.embed(start("changing", folder), resources=by(part))


def test_parts_do_not_make_anew(start):
    step = start("parts")
    step.on_change = "recompute"
    with pytest.raises(ImatchError, match="parts cannot make a step anew"):
        imatch.steps.embed(step, resources=imatch.ComputeOptions(engine="local", shard="0/2"))


def test_a_worker_and_the_scheduler_are_killed(start, cluster, capsys):
    """A worker by SIGKILL in the middle, then the scheduler, which comes back: nothing is lost, nothing double."""
    expected = stored(embedded(start("local")))
    step = start("killed")
    written = lambda n: lambda: len([*(step.folder / "local").glob("*.jsonl")]) >= n  # noqa: E731
    with when(written(2), lambda: cluster.kill(cluster.workers[0])), when(written(5), cluster.restart_scheduler):
        folder = embedded(step, engine=create_engine("dask", scheduler=cluster.address))
    assert stored(folder) == expected
    assert open_step(folder).work["photographs"] == 24
    assert "the scheduler is gone" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["processes", "dask"])
def test_views_and_pairs_by_every_engine(name, tmp_path):
    """The references and the matches of the other notebooks."""
    write_photographs(tmp_path / "photographs", 4)
    houses = [House(tmp_path, exports) for exports in ("local", name)]
    for house, engine in zip(houses, (create_engine("local"), create_engine(name)), strict=True):
        house.embed()
        imatch.steps.make_references(house.start_views(), resources=by(engine, workers=0))
        house.references()
        house.index()
        step = house.start_match()
        step.finish(imatch.steps.match_metrics(step, imatch.steps.match_pairs(step, resources=by(engine, workers=0))))
    for step in ("views", "04_match"):
        assert_same(houses[1].folder(step), houses[0].folder(step))


def test_a_part_of_the_views_says_what_is_wrong(tmp_path):
    write_photographs(tmp_path / "photographs", 4)
    house = House(tmp_path)
    house.embed()
    changed = min((tmp_path / "photographs").rglob("*.*"))
    changed.write_bytes(changed.read_bytes() + b"\0")
    views = house.start_views()
    with pytest.raises(ImatchError, match="has changed since it was embedded") as told:
        imatch.steps.make_references(views, resources=imatch.ComputeOptions(engine="local", shard="0/2", workers=0))
    assert not isinstance(told.value, PartDoneError)
    with pytest.raises(PartDoneError, match="part 1/2 is done, 1 of 4 jobs are left"):
        imatch.steps.make_references(views, resources=imatch.ComputeOptions(engine="local", shard="1/2", workers=0))


@pytest.mark.parametrize("kind", ["flat", "ivf_pq", "hnsw"])
def test_an_index_made_by_shards_answers_like_one_made_whole(kind, tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    files.write_array(tmp_path / "vectors.npy", vectors)
    mapped, gallery = np.load(tmp_path / "vectors.npy", mmap_mode="r"), searcher.digest(vectors)
    asked = IndexOptions(kind, device="cpu")
    answers = {}
    for name, rows in (("whole", 0), ("local", 300), ("processes", 300)):
        engine = create_engine("local" if name == "whole" else name)
        found = searcher.build(tmp_path / name, mapped, gallery, asked, shard_rows=rows, engine=engine)
        effort = max(found.kind.efforts(len(vectors)), default=None)
        answers[name] = found.search(vectors[::50], 10, effort=effort)
    for i in (2, 0, 1):
        part = create_engine(shard=f"{i}/3")
        with pytest.raises(PartDoneError, match=f"index: part {i}/3 is done"):
            searcher.build(tmp_path / "parts", mapped, gallery, asked, shard_rows=300, engine=part)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("0*")}
    searcher.build(tmp_path / "parts", mapped, gallery, asked, shard_rows=300)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("0*")} == made
    shards = sorted((tmp_path / "local").glob("0*.faiss"))
    assert len(shards) == 7
    for path in shards:
        for other in ("processes", "parts"):
            assert path.read_bytes() == (tmp_path / other / path.name).read_bytes()
    assert (answers["processes"].rows == answers["local"].rows).all()
    assert (answers["processes"].scores == answers["local"].scores).all()
    assert (answers["whole"].rows == answers["local"].rows).mean() > (0.99 if kind == "flat" else 0.9)


def test_parts_do_not_mend_an_index(tmp_path):
    vectors = np.eye(40, dtype=np.float32)
    few, part = vectors[:30], create_engine(shard="0/2")
    flat, hnsw = IndexOptions("flat", device="cpu"), IndexOptions("hnsw")
    with pytest.raises(ImatchError, match="parts must choose the same index"):
        searcher.build(tmp_path / "index", vectors, searcher.digest(vectors), engine=part)
    searcher.build(tmp_path / "index", few, searcher.digest(few), flat)
    with pytest.raises(PartDoneError, match="so are all others"):
        searcher.build(tmp_path / "index", few, searcher.digest(few), flat, engine=part)
    with pytest.raises(ImatchError, match="delete it and start the parts again, or run it once without a shard"):
        searcher.build(tmp_path / "index", few, searcher.digest(few), hnsw, engine=part)
    (tmp_path / "index" / "index.json").rename(kept := tmp_path / "index.json")
    with pytest.raises(ImatchError, match="delete it and start the parts again"):
        searcher.build(tmp_path / "index", vectors, searcher.digest(vectors), hnsw, engine=part)
    kept.rename(tmp_path / "index" / "index.json")
    assert len(searcher.build(tmp_path / "index", few, searcher.digest(few), flat).shards) == 1


def test_batch_does_parts(photographs, tmp_path, monkeypatch, capsys):
    """--shard 0/2 and 1/2 embed, the run without a shard goes on from there; then the same with 03_index."""
    from imatch.cli.batch import Recipe, run

    monkeypatch.chdir(ROOT)
    recipe, first = tmp_path / "parts.yaml", tmp_path / "first.yaml"
    recipe.write_text("notebooks: [01_embed, 03_index]\nparameters: {direction: data-data, storage.shard_size: 4}\n")
    first.write_text("notebooks: [01_embed]\nparameters: {storage: {shard_size: 4}}\n")
    given = [str(recipe), "-p", "dataset", str(photographs), "--exports", str(tmp_path / "exports")]
    for shard in ("0/2", "1/2"):
        assert command("run", *given, "--shard", shard) == 0
        assert f"embed: part {shard} is done" in capsys.readouterr().out
    (local,) = (tmp_path / "exports").glob("demo/01_embed/*/sift/scale1_raw/local")
    assert len([*local.glob("*.jsonl")]) == 6
    parts = {path: path.stat().st_mtime_ns for path in local.glob("*.npy")}
    assert command("run", str(first), *given[1:]) == 0
    assert {path: path.stat().st_mtime_ns for path in local.glob("?????.npy")}.items() <= parts.items()
    search = {"embed_step": str(local.parent), "direction": "data-data", "index": {"kind": "flat"}}
    for shard in ("0/2", "1/2"):
        with pytest.raises(PartDoneError, match=f"index: part {shard} is done"):
            cells.execute("03_index", **search, compute={"shard": shard})
    with pytest.warns(ImatchWarning, match="no query has a right answer"):
        cells.execute("03_index", **search)
    assert run(Recipe({"01_embed": {}}, {"compute.shard": "0/2"}, {"run": {}}), ROOT / "notebooks") == ({}, [])
    assert "01_embed has no parts, run it without --shard" in capsys.readouterr().out
    assert command("run", *given, "--shard", "2/2") == 2
    assert "shard '2/2' is no i/n" in capsys.readouterr().err
    assert command("run", *given, "--shard", "0/2", "-p", "on_change", "recompute") == 2
    assert "parts cannot make a step anew" in capsys.readouterr().err
    assert (local.parent / "metrics.json").is_file()


# --- workers of a loop


def mapped(item: tuple[str, int]) -> int:
    what, n = item
    if what == "kill" and n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "refuse" and n == 3:
        raise ImatchError("three is no number: use another")
    return n * n


def all_mapped(items: list[tuple[str, int]], workers: int) -> list[int]:
    return sorted(compute.Each(mapped, lambda _: False, workers, "squares")(items, Place()))


def test_workers_give_back_what_they_do(capsys):
    for workers in (0, 1, 3):
        assert all_mapped([("square", n) for n in range(20)], workers) == [n * n for n in range(20)]
    assert "squares: 100%" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "said"), [("kill", "killed.*use fewer workers"), ("refuse", "three is no number")])
def test_a_worker_that_ends_too_early_and_one_that_refuses_are_said(what, said):
    with pytest.raises(ImatchError, match=said):
        all_mapped([(what, n) for n in range(20)], 2)


def test_workers_end_with_the_process_above_them(tmp_path):
    code = f"""
import os, time
from pathlib import Path
from imatch.core import compute
def sleep(n):
    (Path({str(tmp_path)!r}) / str(os.getpid())).touch()
    time.sleep(60)
list(compute.Each(sleep, bool, 2, "sleep")(range(4), compute.Place()))
"""
    above = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(workers := [int(path.name) for path in tmp_path.iterdir()]) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    above.kill()
    above.wait()
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(workers) == 2
    assert not any(map(alive, workers))


def alive(process: int) -> bool:
    """Whether a process runs; what has ended and was not waited for does not."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
