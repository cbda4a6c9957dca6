"""01_embed: photographs, or references, to stored tokens."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from imatch.api.embed import seen_by
from imatch.core import compute, config, files, settings
from imatch.core.compute import ComputeOptions, Local, PartDoneError, Place, Processes
from imatch.core.files import refuse_or_say
from imatch.core.rows import About, Json, Options, Parameters, PhotoRow, SeenRow, ShardRow
from imatch.core.step import Step, open_step, start_step, tagged
from imatch.core.types import ImatchError, ImatchWarning, PhotographError, StepError, Tokens
from imatch.data import images, registry, store
from imatch.data.images import Decoded, Resize
from imatch.data.rotations import UPRIGHT, Pose
from imatch.data.shards import Shards
from imatch.data.store import Posed, StorageOptions, Stored, open_poses, pose_folder, view_rows
from imatch.features import base
from imatch.features.base import Backbone, decoded_for, stride_of
from imatch.features.pipeline import Made, batches

ON_ERROR = ("skip", "stop")
GROUP = 4
"""Cores of a CPU that work together on one forward pass, where several processes share it."""
SEEN = "seen.jsonl"
"""What is remembered of the photographs' files (`_Seen`)."""
_Timed = tuple[Decoded | PhotographError, float]
"""A decoded photograph, and the seconds that took."""


def start_embed(
    dataset: str,
    *,
    data_key: str = settings.DATA_KEY,
    image_groups: Sequence[Mapping[str, Json]] = (),
    run: str,
    weight: str = "sift",
    backbone_options: Options | None = None,
    resize: Resize = Resize(),
    storage: StorageOptions = StorageOptions(),
    tag: str = "",
    on_change: str = "refuse",
) -> Step:
    """Start 01_embed on a data set, in EXPORT_ROOT.

    Args:
        dataset: a key of the registry's data sets, or a folder of photographs.
        data_key: the registry's file.
        image_groups: which of the photographs (see `datasets.Dataset.select`); none is all.
        run: name of this piece of work: results go to its folder.
        weight: "sift", "dsift", "xfeat" or a key of the registry's weights, if need be with its set: "dinov3/vits16".
        backbone_options: fields of that backbone.
        resize: how large the backbone sees the photographs; without a limit of its own it gets the backbone's.
        storage: what is stored of their tokens.
        tag: appended to the folder's name, to keep two configurations apart.
        on_change: "refuse" or "recompute" what was made from something else.

    Raises:
        ImatchError: no such folder, weight, option or weight file; see also `step.start_step`.
    """
    if not run:
        raise ImatchError("run is empty: name this piece of work as run")
    stride_of(storage.variant)
    weight_set, _, weight = weight.rpartition("/")
    photographs = registry.dataset(dataset, data_key)
    backbone = base.create_backbone(weight, backbone_options or {}, weight_set=weight_set, data_key=data_key)
    resize.check(backbone.patch)
    parameters = {
        "dataset": photographs.key if photographs.registered else "",
        "image_groups": list(image_groups),
        "shard_size": storage.shard_size,
        **_seen_by(weight, backbone, resize, storage),
    }
    name = f"{parameters['cfg']}_{store.variant_of(parameters)}{tagged(tag)}"
    about = {"dataset": photographs.key, "weight": weight, "configuration": name}
    links = {"photographs": photographs.root}
    if photographs.registered:
        links["data_key"] = settings.from_workspace(data_key)
    return start_step(settings.root("EXPORT_ROOT") / run, "01_embed", about, parameters, {}, links, on_change)


def _seen_by(weight: str, backbone: Backbone, resize: Resize, storage: StorageOptions = StorageOptions()) -> Parameters:
    """How photographs go through a backbone, and what is kept: the parameters that are not about the data set."""
    return {
        **seen_by(weight, backbone, resize),
        "cfg": config.folder_name(storage.cfg, "cfg") if storage.cfg else str(resize),
        "variant": storage.variant,
        **store.keep_parameter(storage.keep, weight),
    }


def chosen(step: Step) -> dict[str, About]:
    """The ids of a step's photographs, with what the registry knows of each (capture, label, frame)."""
    if views := view_rows(step):
        return {row["id"]: {key: row[key] for key in ("source", "source_sha256")} for row in views}
    root = step.linked("photographs")
    if "data_key" in step.links:
        dataset = registry.load(step.linked("data_key")).dataset(step.parameters["dataset"])
    else:
        dataset = registry.dataset(str(root))
    ids = images.list_photographs(root, leave_out=step.run.parent)
    chosen = dataset.select(ids, step.parameters["image_groups"])
    if not chosen:
        raise ImatchError(f"no photographs in {root}: none of its files ends in {', '.join(sorted(images.SUFFIXES))}")
    return {id: {key: value for key, value in about.items() if value is not None} for id, about in chosen.items()}


def embed(
    step: Step,
    resources: ComputeOptions = ComputeOptions(),
    *,
    on_error: str = "skip",
    max_skipped: float = 0.05,
) -> Stored:
    """Compute the tokens of a step's photographs, those that are missing.

    Headers are checked first; photographs are decoded by threads, go through the backbone in batches of one shape, and
    a shard is written while the next is computed. What cannot be decoded goes to skipped.jsonl.

    Args:
        step: from `start_embed` or `start_reference_tokens`.
        resources: who does the work and where; the bytes are the same. Each of several devices gets a process of its
            own. On a CPU, devices "auto" with engine "processes" or "dask" is one process for every four cores, and at
            least two.
        on_error: "skip" leaves bad photographs out and says so; "stop" ends at the first.
        max_skipped: the share of bad photographs past which the run stops by itself (one alone never stops it).

    Raises:
        PhotographError: the first bad photograph, with on_error="stop".
        StepError: photographs changed since the last run and the step may not recompute.
        ImatchError: no photographs, none that could be used, or too many bad ones. What was finished stays.
        PartDoneError: see `compute.do`.
    """
    if on_error not in ON_ERROR:
        raise ImatchError(f"on_error {on_error!r} is not known: use {' or '.join(ON_ERROR)}")
    engine = resources.machines
    compute.check_parts(engine.shard, step.on_change)
    task = _Task(step)
    first, of = compute.numbered("" if task.shards.merged else engine.shard)
    mine = range(first, sys.maxsize, of)  # numbers of shards: a part computes no others, nor looks at their photographs
    seen, bad = _Seen(task.folder / SEEN, task.root), _Bad(len(task.about), on_error, max_skipped)
    _take_stock(task, mine, seen, bad)
    if not task.shards.merged:
        used = devices_of(task.parameters, resources.devices, several=not isinstance(engine, Local))
        work = _Work(step, task.root, resources.workers, resources.batch_size, on_error)
        one_each = Processes(engine.shard) if isinstance(engine, Local) and len(used) > 1 else engine
        jobs = list(task.jobs(mine, seen))
        if not all(map(work.done, jobs)):
            step.runs_on(",".join(used))
        ran_on = set()
        try:
            with closing(compute.do(one_each, work, jobs, task.what, used, work.done)) as rows:
                for row in rows:
                    ran_on.add(row["device"])
                    for id, reason in row["skipped"].items():
                        bad.add(id, reason)
        finally:
            if not ran_on <= set(used):  # a cluster's devices are its own
                step.runs_on(",".join(sorted(ran_on)))
        seen.learn()
    if not engine.shard:  # a part knows of its own photographs only
        seen.save()
    if not task.shards.merged:
        task.merge(bad)
    embeddings = Stored(task.folder)
    bad.warn(embeddings)
    return embeddings


@dataclass(frozen=True)
class _Task:
    """A step of embeddings, what is asked of it read once: which photographs become which shards."""

    step: Step

    @property
    def folder(self) -> Path:
        return self.step.folder

    @property
    def what(self) -> str:
        """What is embedded, for the bar: "embed" or "references"."""
        return self.step.name[3:]

    @property
    def parameters(self) -> Parameters:
        return self.step.parameters

    @cached_property
    def shards(self) -> Shards:
        return Shards(self.folder)

    @cached_property
    def root(self) -> Path:
        """The folder of the photographs."""
        return self.step.linked("photographs")

    @cached_property
    def about(self) -> dict[str, About]:
        """The ids of the photographs, with what the registry knows of each."""
        return chosen(self.step)

    @cached_property
    def plan(self) -> dict[int, list[str]]:
        """The ids of each shard: those on disk of which no photograph has gone stay; the other photographs, such as new
        ones, are put into more shards, so that they cost their own embedding alone."""
        done = {n: [row["id"] for row in rows] for n, rows in self.shards.rows().items()}
        kept = {n: ids for n, ids in done.items() if self.about.keys() >= {*ids}}
        rest = sorted(self.about.keys() - {id for ids in kept.values() for id in ids})
        size = self.parameters["shard_size"]
        numbers = (n for n in itertools.count() if n not in kept)
        kept |= {next(numbers): rest[first : first + size] for first in range(0, len(rest), size)}
        return dict(sorted(kept.items()))

    def jobs(self, mine: range, seen: _Seen) -> Iterator[_Shard]:
        """A job for each shard; those that are not mine are empty."""
        for n in range(max(self.plan) + 1):
            known = self.plan.get(n, ()) if n in mine else ()
            yield _Shard(n, [seen[id] for id in known], [self.about[id] for id in known])

    def merge(self, bad: _Bad) -> None:
        """Gather the shards, of whose photographs at least one could be used."""
        if not any("skipped" not in row for rows in self.shards.rows().values() for row in rows):
            raise ImatchError(
                f"none of the {bad.total} photographs in {self.root} could be used, the first: {bad.first}"
            )
        self.step.did(self.shards.merge())


def finish_embed(step: Step, embeddings: Stored) -> dict[str, int | float | str]:
    """Finish a step of embeddings: its figures, and the content hashes that make its fingerprint."""
    contents = [[row["id"], row["sha256"]] for row in [*embeddings.rows, *embeddings.skipped]]
    local = sum(path.stat().st_size for path in (step.folder / "local").glob("*.npy"))
    metrics = {
        "photographs": len(embeddings),
        "skipped": len(embeddings.skipped),
        "global_dimension": embeddings.vectors.shape[1],
        "descriptors": sum(row["n"] for row in embeddings.rows),
        "local_megabytes": round(local / 2**20, 3),
        "photographs_digest": files.digest([[id, row["sha256"]] for id, row in embeddings.decodable.items()]),
    }
    return step.finish(metrics, contents)


def _take_stock(task: _Task, mine: range, seen: _Seen, bad: _Bad) -> None:
    """Look at the headers of my shards' photographs, count the bad ones, and drop or make by thinning what can be."""
    looked_at = [id for n, part in task.plan.items() if n in mine for id in part]
    seen.check_headers(looked_at)
    for id in looked_at:
        if problem := seen[id]["problem"]:
            bad.add(id, problem)
    todo = _missing_shards(task, mine, seen)
    for row in (row for rows in task.shards.rows(mine).values() for row in rows if "skipped" in row):
        bad.add(row["id"], row["skipped"])  # what an earlier run found in the shards that stay counts, too
    if todo:
        _thin(task, todo, seen, bad)


def _thin(task: _Task, todo: Sequence[int], seen: _Seen, bad: _Bad) -> None:
    """Write the shards of a variant sub{s}, or of what keeps less, that the finished raw one beside it, which keeps
    all, holds without another forward pass."""
    parameters = task.parameters
    all_of_it = {key: value for key, value in {**parameters, "variant": "raw"}.items() if key != "keep"}
    stride, name = stride_of(parameters["variant"]), f"{parameters['cfg']}_{store.variant_of(parameters)}"
    beside = task.folder.with_name(task.folder.name.replace(name, f"{parameters['cfg']}_raw", 1))
    if "pose" in parameters or parameters == all_of_it or not (beside / "metrics.json").is_file():
        return
    whole = open_step(beside)
    if whole.parameters != all_of_it:
        return
    raw, shards = Stored(beside), Shards(beside).rows()
    task.step.runs_on(whole.device)  # a thinned photograph costs what its raw one did, and where it did
    for shard in compute.progress(todo, "thin"):
        rows = shards.get(shard, [])
        if [row["id"] for row in rows] != task.plan[shard] or any(seen.digest(r["id"]) != r["sha256"] for r in rows):
            continue
        for row in rows:
            if "skipped" in row:
                bad.add(row["id"], row["skipped"])
        tokens = [raw.tokens(raw.row_of[row["id"]]) for row in rows if "skipped" not in row]
        tokens = tokens if stride == 1 else [one.thinned(stride) for one in tokens]
        about = [{key: row[key] for key in row if key not in store.PLACED} for row in rows]
        share = len(rows) / whole.work["photographs"]
        row = {"shard": shard, "work": {name: n * share for name, n in whole.work.items()}}
        _write_shard(task.step, row, about, tokens, [seen[id] for id in task.plan[shard]])


def devices_of(parameters: Parameters, devices: str, several: bool = False) -> list[str]:
    """The devices by name; for "auto" every GPU, if the backbone of such parameters runs on GPUs, else the CPU: once,
    or as often as `several` processes share it well.

    Raises:
        ImatchError: one that is not there.
    """
    weight, options = parameters["weight"], parameters["backbone"]
    used = [base.create_backbone(weight, options, device=name.strip()).device for name in devices.split(",")]
    if devices != "auto":
        return used
    if used == ["cpu"]:
        return used * max(min(2, settings.cores()), settings.cores() // GROUP) if several else used
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class _Shard:
    """A job: the photographs of one shard.

    Attributes:
        number: of the shard.
        seen: what is known of each photograph's file (`_Seen`).
        about: what the registry knows of each.
    """

    number: int
    seen: Sequence[SeenRow]
    about: Sequence[About]

    @property
    def readable(self) -> list[str]:
        """The ids of those whose headers are good."""
        return [row["id"] for row in self.seen if not row["problem"]]


@dataclass(frozen=True)
class _Work:
    """Embeds shards, one after the other: photographs are decoded ahead, the next batch is put together while one goes
    through the backbone, and a shard is written while the next is computed. See `compute.Work`."""

    step: Step
    root: Path
    workers: int
    batch_size: int
    on_error: str
    _backbones: dict[str, Backbone] = field(default_factory=dict)

    def __call__(self, jobs: Iterable[_Shard], place: Place) -> Iterator[ShardRow]:
        backbone, workers = self._backbone(place.device), place.workers(self.workers)
        shards, coming = itertools.tee(jobs)
        ids = (id for shard in coming for id in shard.readable)
        decoded = compute.ahead(self._decode(backbone), ids, workers, self.batch_size + 2 * workers)
        if not place.quiet:
            decoded = compute.progress(decoded, self.step.name[3:], sum(len(shard.readable) for shard in jobs), delay=0)
        pending: Future[ShardRow] | None = None
        begun = time.perf_counter()
        backbone.load()
        start, begun = time.perf_counter() - begun, time.perf_counter()
        with ThreadPoolExecutor(1) as network, ThreadPoolExecutor(1) as writer:
            try:
                for shard in shards:
                    made = self._making(shard)
                    coming_on = batches(made.photographs(made.read(decoded)), self.batch_size)
                    for batch, tokens, *times in compute.overlapped(backbone, coming_on, network):
                        made.took_forward(*times)
                        made.take(batch, tokens)
                        del batch, tokens  # not to be held while the next one is put together
                    made.took.update(seconds=time.perf_counter() - begun, start=start)
                    start, begun = 0.0, time.perf_counter()
                    if pending:
                        yield pending.result()
                    pending = writer.submit(self._write, made, backbone.device)
                if pending:
                    yield pending.result()
            finally:
                network.shutdown(cancel_futures=True)  # not a batch more when something ends this one
        next(decoded, None)  # lets the bar know that this was the last

    def done(self, shard: _Shard) -> bool:
        """Whether a shard is on disk."""
        return Shards(self.step.folder).has(shard.number)

    def _backbone(self, device: str) -> Backbone:
        """The step's backbone, loaded once."""
        if device not in self._backbones:
            self._backbones[device] = base.backbone_of(self.step.parameters, device)
        return self._backbones[device]

    def _making(self, shard: _Shard) -> _Making:
        return _Making(shard, stride_of(self.step.parameters["variant"]), self.on_error == "stop")

    def _write(self, made: _Making, device: str) -> ShardRow:
        """Write a shard; returns the row that the engine gets."""
        for known in made.shard.seen:
            if (row := made.rows[known["id"]])["sha256"] is None:
                row["sha256"] = _digest(self.root, known)
        rows = list(made.rows.values())
        skipped = {row["id"]: row["skipped"] for row in rows if "skipped" in row}
        row = {"shard": made.shard.number, "skipped": skipped, "work": made.took, "device": device}
        tokens = [made.tokens[id] for id in made.rows if id in made.tokens]
        return _write_shard(self.step, row, rows, tokens, made.shard.seen)

    def _decode(self, backbone: Backbone) -> _Decode:
        pose = Pose(**self.step.parameters.get("pose", {}))
        resize = Resize(**self.step.parameters["resize"]).zoomed(pose.zoom)
        # a part of a photograph is seen at the scale of all of it
        parts = {row["id"]: resize.like(row["source_size"]) for row in (view_rows(self.step) if resize.limit else ())}
        return _Decode(self.root, backbone, pose.turn, resize, parts)


@dataclass(frozen=True)
class _Decode:
    """Reads a photograph as a backbone sees it, by its id; a broken one is given back as its error."""

    root: Path
    backbone: Backbone
    turn: float
    resize: Resize
    parts: Mapping[str, Resize]

    def __call__(self, id: str) -> _Timed:
        started, resize = time.perf_counter(), self.parts.get(id, self.resize)
        return decoded_for(self.root / id, resize, self.backbone, self.turn), time.perf_counter() - started


class _Making(Made):
    """What becomes of one shard, and the seconds that it took. Batches never reach over a shard, so it comes out the
    same on every run."""

    def __init__(self, shard: _Shard, stride: int, stop: bool) -> None:
        super().__init__(stride, stop)
        self.shard = shard
        self.took = {"photographs": len(shard.readable), **dict.fromkeys(("decode", "wait", "forward"), 0.0)}
        self._ended = time.perf_counter()

    def read(self, decoded: Iterator[_Timed]) -> Iterator[tuple[str, About, Decoded | PhotographError]]:
        """Give the shard's photographs from those that were decoded, and those whose header was bad."""
        for known, about in zip(self.shard.seen, self.shard.about, strict=True):
            problem = known["problem"]
            photograph, seconds = (PhotographError(problem), 0.0) if problem else next(decoded)
            self.took["decode"] += seconds
            if isinstance(photograph, Decoded):
                known["sha256"] = photograph.sha256
            yield known["id"], about, photograph

    def took_forward(self, began: float, ended: float) -> None:
        """Count the seconds of a forward pass, and those in which there was none."""
        self.took["wait"] += began - self._ended
        self.took["forward"] += ended - began
        self._ended = ended


def _write_shard(
    step: Step, row: ShardRow, rows: Sequence[PhotoRow], tokens: Sequence[Tokens], seen: Sequence[SeenRow]
) -> ShardRow:
    """Write a shard, remember its photographs even if the run is killed now, and put down what the shard took."""
    started, folder = time.perf_counter(), step.folder
    store.write_kept_shard(folder, row["shard"], rows, tokens, store.keep_of(step.parameters))
    lines = b"".join(files.line(known) for known in seen)
    with files.writing(folder / SEEN), (folder / SEEN).open("ab", buffering=0) as file:
        file.write(b"\n" + lines)  # a first end of line, for one that a kill left torn; at once, for others write, too
    row["work"]["write"] = time.perf_counter() - started
    Shards(folder).write_work(row["shard"], row["work"])
    return row


def _missing_shards(task: _Task, mine: range, seen: _Seen) -> list[int]:
    """Those of my shards to compute; such as were made from other bytes are refused or, with on_change="recompute",
    dropped."""
    shards, step, done = task.shards, task.step, task.shards.rows(mine)
    recorded = [row for rows in done.values() for row in rows]
    now = {*task.about}
    changed = {row["id"] for row in recorded if row["id"] in seen and seen.digest(row["id"]) != row["sha256"]}
    # an unfinished run asked for its bad photographs to be mended or removed: that is no difference to refuse
    before = {row["id"] for row in recorded if shards.merged or "skipped" not in row}
    differences = [f"changed: {id}" for id in sorted(changed & before)] + [f"gone: {id}" for id in sorted(before - now)]
    if shards.merged:
        differences += [f"new: {id}" for id in sorted(now - before)]
    if differences:
        told = f"the photographs in {task.root} are not those it was made from"
        refuse_or_say(step.name, step.on_change, told, differences)

    def valid(shard: int) -> bool:
        ids = [row["id"] for row in done.get(shard, [])]
        return ids == task.plan[shard] and not changed.intersection(ids)

    planned = [shard for shard in task.plan if shard in mine]
    todo = [shard for shard in planned if not valid(shard)]
    there = {n for n in {*done, *shards.begun()} if n in mine}
    stale = [n for n in there if n not in task.plan or (n in done and n in todo)]
    if shards.merged:
        if not todo and not stale:
            shards.clean()  # what a kill between merging and cleaning left
            return []
        step.unfinish()
        shards.split()
    for shard in stale:
        shards.remove(shard)
    if done and todo:
        print(f"{step.name}: {len(planned) - len(todo)} of {len(planned)} shards are there, {len(todo)} to compute")
    return todo


class _Seen:
    """What is known of the photographs' files without reading them again: bytes, time of change, header, hash."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root = path, root
        self._known: dict[str, SeenRow] = {row["id"]: row for row in self._remembered()}

    def __getitem__(self, id: str) -> SeenRow:
        return self._known[id]

    def __contains__(self, id: str) -> bool:
        return id in self._known

    def check_headers(self, ids: Sequence[str]) -> None:
        """Look at the files: the headers of those that are new or changed are read."""
        workers = 2 * settings.cores()
        looked = compute.ahead(self._look, ids, workers, 16 * workers)
        self._known = dict(zip(ids, compute.progress(looked, "headers", len(ids)), strict=True))

    def digest(self, id: str) -> str | None:
        """See `_digest`."""
        return _digest(self.root, self._known[id])

    def learn(self) -> None:
        """Take over the hashes that were remembered when shards were written, here or by other processes."""
        for row in self._remembered():
            known = self._known.get(row["id"])
            if known and row["sha256"] and row["stat"] == known["stat"]:
                known["sha256"] = row["sha256"]

    def _remembered(self) -> list[SeenRow]:
        with self.path.open("rb") if self.path.is_file() else io.BytesIO() as lines:
            return [row for row in map(_whole, lines) if row]

    def save(self) -> None:
        """Write what is known, one row a photograph, unless the file says just that."""
        rows = [self._known[id] for id in sorted(self._known)]
        if not self.path.is_file() or self.path.read_bytes() != b"".join(map(files.line, rows)):
            files.write_rows(self.path, rows)

    def _look(self, id: str) -> SeenRow:
        known, stat = self._known.get(id), self._stat(id)
        if known and stat and known["stat"] == stat:
            return known
        problem, lasting = self._problem(id)
        return {"id": id, "stat": stat if lasting else None, "problem": problem, "sha256": None}

    def _stat(self, id: str) -> list[int] | None:
        try:
            stat = (self.root / id).stat()
        except OSError:
            return None
        return [stat.st_size, stat.st_mtime_ns]

    def _problem(self, id: str) -> tuple[str | None, bool]:
        """What is wrong with a header, and whether it stays wrong while size and time of change stay (a missing
        permission need not)."""
        try:
            images.check_header(self.root / id)
        except PhotographError as error:
            return str(error), os.access(self.root / id, os.R_OK, effective_ids=os.access in os.supports_effective_ids)
        return None, True


def _digest(root: Path, known: SeenRow) -> str | None:
    """The SHA-256 of a file, read only if it is not remembered; None if it cannot be read."""
    if known["sha256"] is None:
        try:
            known["sha256"] = images.file_digest(root / known["id"])
        except PhotographError:
            return None
    return str(known["sha256"])


def _whole(line: bytes) -> SeenRow | None:
    try:
        row = json.loads(line.decode(errors="surrogateescape"))
        return {key: row[key] for key in ("id", "stat", "problem", "sha256")}  # keys of its own would double a row
    except (ValueError, TypeError, KeyError):  # empty, or torn by a kill: that photograph is only read once more
        return None


class _Bad:
    """Counts the photographs that cannot be used, and stops the run when that was asked or when they are many."""

    def __init__(self, total: int, on_error: str, max_skipped: float) -> None:
        self.total, self.on_error, self.max_skipped = total, on_error, max_skipped
        self.ids: dict[str, str] = {}

    @property
    def first(self) -> str:
        return next((f"{id}: {reason}" for id, reason in self.ids.items()), "")

    def add(self, id: str, reason: str) -> None:
        self.ids[id] = reason
        if self.on_error == "stop":
            raise PhotographError(f"{id}: {reason} (on_error is stop; what was finished stays)")
        if len(self.ids) > max(1, self.max_skipped * self.total):
            listed = "\n".join(f"  {id}: {reason}" for id, reason in list(self.ids.items())[:10])
            raise ImatchError(
                f"{len(self.ids)} of {self.total} photographs cannot be used, more than max_skipped = "
                f"{self.max_skipped:.0%}; the first:\n{listed}\nWhat was finished stays. Mend or remove them, "
                "or set max_skipped higher, such as to 0.5"
            )

    def warn(self, embeddings: Stored) -> None:
        if rows := embeddings.skipped:
            listed = "\n".join(f"  {row['id']}: {row['skipped']}" for row in rows[:10])
            file = embeddings.folder / "skipped.jsonl"
            more = "" if len(rows) <= 10 else f"\n  ... and {len(rows) - 10} more in {file}"
            message = f"{len(rows)} of {self.total} photographs were skipped:\n{listed}{more}"
            warnings.warn(message, ImatchWarning, stacklevel=3)


def worth_trying(step: Step, poses: Sequence[Pose], weight: str = "") -> list[Pose]:
    """The poses that are worth trying with a step's backbone, or another: the upright one alone, which is said, if it
    turns and zooms with its photographs.

    Raises:
        StepError: the step was imported, without its photographs.
    """
    weight = weight or step.parameters["weight"]
    if len(poses) > 1 and step.parameters.get("imported"):
        raise StepError(f"{step.folder} was imported, and its photographs are not known to be there: run 01_embed")
    if len(poses) > 1 and weight in base.INVARIANT:
        print(f"{weight} turns and zooms with its photographs: only the upright ones are used")
        return [UPRIGHT]
    return list(poses)


def embed_poses(
    upright: Stored,
    poses: Sequence[Pose],
    resources: ComputeOptions = ComputeOptions(),
    *,
    on_change: str = "refuse",
) -> Posed:
    """Embed the photographs of a finished step of embeddings in other poses, those that are missing.

    Each pose becomes a step of its own in a folder beside it, such as `scale1_raw_rot090`, and is reused.

    Args:
        upright: those of a 01_embed or 02_references.
        poses: of `rotations.poses`.
        resources: as of `embed`.
        on_change: as in `start_embed`.

    Raises:
        StepError: photographs were changed since the upright ones were embedded; or the step was imported.
        ImatchError: a zoom that gives sides which are no multiple of the patch.
    """
    source = open_step(upright.folder)
    unfinished: PartDoneError | None = None
    for pose in (pose for pose in poses if pose != UPRIGHT):
        _check_zoom(source, pose)
        parameters = {**source.parameters, "pose": asdict(pose)}
        step = _start_beside(source, pose_folder(source.folder, pose), parameters, on_change)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImatchWarning)  # what was skipped was told when it was upright
            try:
                embeddings = embed(step, resources, max_skipped=1.0)
            except PartDoneError as part:  # this part of the other poses can be done all the same
                unfinished = part
                continue
        _check_whole(upright, embeddings)
        finish_embed(step, embeddings)
    if unfinished:
        raise unfinished
    return open_poses(upright, poses)


def step_by(source: Step, weight: str) -> Path:
    """Say where the photographs of a finished step of embeddings are by another backbone: in a finished step of the run
    that has just these photographs, or else beside the step, where `embed_by` puts them."""
    beside = source.folder.with_name(f"{source.folder.name}_{weight}")
    if not (beside / "metrics.json").is_file():
        about = {**source.about, "weight": weight}
        for path in sorted(Path(source.run, source.name, *about.values()).parent.glob("*/metrics.json")):
            other = open_step(path.parent)
            of_all = not {"pose", "imported"} & other.parameters.keys() and other.parameters["variant"] == "raw"
            digests = {step.metrics["photographs_digest"] for step in (source, other)}
            same = other.linked("photographs") == source.linked("photographs") and len(digests) == 1
            if of_all and same and store.keep_of(other.parameters) in store.KEEPS_PLACED:
                return other.folder
    return beside


def embed_by(
    upright: Stored,
    folder: Path,
    weight: str,
    resources: ComputeOptions = ComputeOptions(),
    *,
    on_change: str = "refuse",
) -> None:
    """Embed the photographs of a finished step by another backbone, too, as that sees them by default, if they are not
    there.

    Args:
        upright: those of a 01_embed or 02_references.
        folder: of `step_by`.
        weight: the other backbone.
        resources: as of `embed`.
        on_change: as in `start_embed`.

    Raises:
        PartDoneError: see `compute.do`.
    """
    source = open_step(upright.folder)
    if folder != source.folder.with_name(f"{source.folder.name}_{weight}"):
        return  # another 01_embed made it
    data_key = source.linked("data_key") if "data_key" in source.links else settings.DATA_KEY
    backbone = base.create_backbone(weight, data_key=str(data_key))
    parameters = {name: source.parameters[name] for name in ("dataset", "image_groups", "shard_size")}
    parameters |= _seen_by(weight, backbone, Resize())
    step = _start_beside(source, folder, parameters, on_change)
    if not step.finished:
        finish_embed(step, embed(step, resources, max_skipped=1.0))


def _check_zoom(source: Step, pose: Pose) -> None:
    """Raise ImatchError, before anything is written, when a zoom gives sides that are no multiple of the patch."""
    if pose.zoom == 1 or (pose_folder(source.folder, pose) / "metrics.json").is_file():
        return
    backbone = base.create_backbone(source.parameters["weight"], source.parameters["backbone"])
    try:
        Resize(**source.parameters["resize"]).zoomed(pose.zoom).check(backbone.patch)
    except ImatchError as error:
        raise ImatchError(f"zoom {pose.zoom:g}: {error}") from None


def _check_whole(upright: Stored, embeddings: Stored) -> None:
    """Raise StepError when a photograph could be decoded for 01_embed, but not any more."""
    seen = embeddings.decodable
    gone = [id for id in upright.ids if id not in seen]
    if gone:
        raise StepError(
            f"{len(gone)} photographs of {upright.folder} cannot be read any more, such as {files.printable(gone[0])}: "
            f"bring them back, delete {embeddings.folder} and run again"
        )


def _start_beside(source: Step, folder: Path, parameters: Parameters, on_change: str) -> Step:
    about = {**source.about, "configuration": folder.name}
    links = {name: source.linked(name) for name in source.links}
    upstream = {"upright": str(source.fingerprint)}
    return start_step(source.run, source.name, about, parameters, upstream, links, on_change)
