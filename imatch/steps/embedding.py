"""01_embed: photographs, or references, to stored tokens."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from imatch.api.embed import seen_by
from imatch.core import compute, config, files, settings
from imatch.core.compute import ComputeOptions, Engine, Local, PartDoneError, Place, Processes
from imatch.core.files import refuse_or_say
from imatch.core.rows import About, Json, Options, Parameters, PhotoRow, SeenRow, ShardRow
from imatch.core.step import Step, check_planned, open_step, run_folder, start_step, tagged
from imatch.core.types import ImatchError, ImatchWarning, PassingError, PhotographError, StepError, Tokens
from imatch.data import exif, images, registry, store
from imatch.data.images import Decoded, Resize
from imatch.data.rotations import UPRIGHT, Pose
from imatch.data.shards import Shards
from imatch.data.store import Posed, StorageOptions, Stored, open_poses, pose_folder, view_rows
from imatch.features import base
from imatch.features.base import Backbone, decoded_for, stride_of
from imatch.features.pipeline import Made, passed
from imatch.steps import groups

ON_ERROR = ("skip", "stop")
GROUP = 4
"""Cores of a CPU that work together on one forward pass, where several processes share it."""
SEEN = "seen.jsonl"
"""What is remembered of the photographs' files (`_Seen`)."""
LOST = 16
"""So many photographs in a row cannot be read only where their drive is gone."""
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
    check_asked(run, weight, backbone_options or {}, data_key, storage)
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
    return start_step(run_folder(run), "01_embed", about, parameters, {}, links, on_change)


def check_asked(run: str, weight: str, backbone_options: Options, data_key: str, storage: StorageOptions) -> None:
    """Refuse what a 01_embed cannot be asked. Arguments as of `start_embed`; no weight file is looked at.

    >>> check_asked("demo", "sift", {"max_keypoints": 500}, settings.DATA_KEY, StorageOptions())
    """
    run_folder(run)
    stride_of(storage.variant)
    if storage.cfg:
        config.folder_name(storage.cfg, "cfg")
    weight_set, _, key = weight.rpartition("/")
    name, given = base.named(key, backbone_options, weight_set, data_key)
    if name in base.NAMED or backbone_options:  # torch, which a network's options wait for, takes a second
        config.create(base.BACKBONES, "weight", name, given, make=False)


def _seen_by(weight: str, backbone: Backbone, resize: Resize, storage: StorageOptions = StorageOptions()) -> Parameters:
    """How photographs go through a backbone, and what is kept: the parameters that are not about the data set."""
    return {
        **seen_by(weight, backbone, resize),
        "cfg": storage.cfg or str(resize),
        "variant": storage.variant,
        **store.keep_parameter(storage.keep, weight),
    }


def chosen(step: Step) -> tuple[dict[str, About], str]:
    """The ids of a step's photographs, with what the registry knows of each (capture, label, frame); and in words what
    of their folder is left out."""
    if views := view_rows(step):
        return {row["id"]: {key: row[key] for key in ("source", "source_sha256")} for row in views}, ""
    root = step.linked("photographs")
    if "data_key" in step.links:
        dataset = registry.load(step.linked("data_key")).dataset(step.parameters["dataset"])
    else:
        dataset = registry.dataset(str(root))
    ids = images.list_photographs(root, leave_out=step.run.parent)
    chosen = dataset.select(ids, step.parameters["image_groups"])
    if not chosen:
        ends = ", ".join(sorted(images.SUFFIXES))
        raise ImatchError(f"no photographs in {root}: none of its files ends in {ends}{ids.left_out}")
    if others := len(ids) - len(chosen):
        ids.left_out = f"; not chosen by image_groups or the registry: {others}{ids.left_out}"
    known = {id: {key: value for key, value in about.items() if value is not None} for id, about in chosen.items()}
    return known, ids.left_out


def embed(
    step: Step,
    resources: ComputeOptions = ComputeOptions(),
    *,
    on_error: str = "skip",
    max_skipped: float = 0.05,
) -> Stored:
    """Compute the tokens of a step's photographs, those that are missing.

    Headers are checked first. What cannot be decoded goes to skipped.jsonl, and so does what needs more memory than is
    free, until a run has more. What could not be read just now (a drive that does not answer, memory that ran out) is
    left to the next run; all others are done.

    Args:
        step: from `start_embed` or `start_reference_tokens`.
        resources: who does the work and where; the bytes are the same. Each of several devices gets a process. On a
            CPU, devices "auto" with several processes is one for every four cores, and at least two.
        on_error: "skip" leaves bad photographs out and says so; "stop" ends at the first.
        max_skipped: the share of bad photographs past which the run stops by itself (one alone never stops it).

    Raises:
        PhotographError: the first bad photograph, with on_error="stop".
        StepError: photographs changed since the last run and the step may not recompute.
        ImatchError: no photographs, none that could be used, too many bad ones, or some that could not be read just
            now. What was finished stays.
        PartDoneError: see `compute.do`.
    """
    groups.check({"on_error": on_error, "max_skipped": max_skipped})
    engine = resources.machines
    compute.check_parts(engine.shard, step.on_change)
    with files.alone(step.folder, engine.shard):
        task = _Task(step, engine.shard, on_error, max_skipped)
        try:
            task.take_stock(resources)
            if not task.shards.merged:
                task.compute(engine, resources)
                task.read_back()
            task.seen.save()
            if not task.shards.merged:
                task.merge()
        except OSError as error:
            if not compute.passing(error):
                raise
            again = "run the same command again; what was finished stays"
            raise ImatchError(f"{step.name} could not go on ({error}): {again}") from error
        embeddings = Stored(step.folder)
    listed = len(embeddings) + len(embeddings.skipped)
    check_planned(step.folder / "images.jsonl", listed, len(task.about), "set on_change to recompute and run it again")
    task.bad.warn(embeddings)
    for doubt in exif.told(embeddings.decodable, "doubt") if "pose" not in step.parameters else ():
        print(doubt)
    return embeddings


class _Task:
    """A step of embeddings: which photographs become which shards.

    Attributes:
        about: the ids of the photographs, with what the registry knows of each.
        mine: numbers of shards: a part computes no others, nor looks at their photographs.
        plan: the ids of each shard. Those of which no photograph has gone stay; other photographs make more shards.
        heavy: the ids of photographs that are too large for this machine's memory, and why.
        at_once: how many of the largest other fit into it.
    """

    def __init__(self, step: Step, part: str, on_error: str, max_skipped: float) -> None:
        self.step, self.shards, self.root = step, Shards(step.folder), step.linked("photographs")
        self.about, _ = chosen(step)
        first, of = compute.numbered("" if self.shards.merged else part)
        self.mine = range(first, sys.maxsize, of)
        self.plan = self._planned()
        self.seen, self.bad = _Seen(step.folder / SEEN, self.root), _Bad(len(self.about), on_error, max_skipped)
        self.heavy: dict[str, str] = {}
        self.at_once = sys.maxsize

    def _planned(self) -> dict[int, list[str]]:
        done = {n: [row["id"] for row in rows] for n, rows in self.shards.rows().items()}
        kept = {n: ids for n, ids in done.items() if self.about.keys() >= {*ids}}
        rest = sorted(self.about.keys() - {id for ids in kept.values() for id in ids})
        size = self.step.parameters["shard_size"]
        numbers = (n for n in itertools.count() if n not in kept)
        kept |= {next(numbers): rest[first : first + size] for first in range(0, len(rest), size)}
        return dict(sorted(kept.items()))

    def take_stock(self, resources: ComputeOptions) -> None:
        """Look at the headers of my shards' photographs, drop or make by thinning what can be, and name the heavy."""
        planned = [n for n in self.plan if n in self.mine]
        looked_at = [id for n in planned for id in self.plan[n]]
        self.seen.check_headers(looked_at)
        for id in looked_at:
            if problem := self.seen.rows[id]["problem"]:
                self.bad.add(id, problem)
        done = self.shards.rows(self.mine)
        changed = self._changed([row for rows in done.values() for row in rows])
        stay = {n for n in planned if self._holds(done, n) and not changed.intersection(self.plan[n])}
        lacked = {row["id"]: n for n in stay for row in done[n] if "memory" in row}
        self._weigh([*lacked, *(id for n in planned if n not in stay for id in self.plan[n])], resources)
        stay -= {n for id, n in lacked.items() if id not in self.heavy}
        todo = [n for n in planned if n not in stay]
        stale = done.keys() | (self.shards.begun() - self.plan.keys())
        self._drop([n for n in stale if n in self.mine and n not in stay], todo)
        if stay and todo:
            print(f"{self.step.name}: {len(stay)} of {len(planned)} shards are there, {len(todo)} to compute")
        if todo:
            self._thin(todo)
        self.read_back()  # what an earlier run found in the shards that stay counts, too
        left = {id for n in todo if not self.shards.has(n) for id in self.plan[n]}
        for id in filter(left.__contains__, self.heavy):
            print(f"{self.step.name}: {files.printable(id)} is left out: {self.heavy[id]}")
            self.bad.add(id, self.heavy[id])

    def _weigh(self, ids: Sequence[str], resources: ComputeOptions) -> None:
        """Find out which photographs are heavy; a cluster's machines have their own memory."""
        sizes = {id: size for id in ids if (size := self.seen.rows[id]["size"])}
        if not sizes or resources.scheduler:
            return
        weight, options = self.step.parameters["weight"], self.step.parameters["backbone"]
        device = devices_of(self.step.parameters, resources.devices)[0]
        backbone, resize_of = base.create_backbone(weight, options, device=device), _resizes(self.step)
        free = base.free_for(backbone)
        free[device] -= backbone.held
        asked = {id: (size, resize_of(id), backbone) for id, size in sizes.items()}
        self.heavy = {id: why for id, one in asked.items() if (why := base.lacking(*one, free))}
        needed = (base.needed(*one)["cpu"] for id, one in asked.items() if id not in self.heavy)
        self.at_once = max(1, free["cpu"] // max(needed, default=1))

    def _holds(self, shards: Mapping[int, Sequence[PhotoRow]], n: int) -> bool:
        return [row["id"] for row in shards.get(n, ())] == self.plan[n]

    def _changed(self, recorded: Sequence[PhotoRow]) -> set[str]:
        """The photographs that are not what they were; these, and new and lost ones, are refused or said."""
        changed = {row["id"] for row in recorded if row["id"] in self.seen.rows and self._differs(row)}
        # an unfinished run asked for its bad photographs to be mended or removed: that is no difference to refuse
        before = {row["id"] for row in recorded if self.shards.merged or "skipped" not in row}
        new = self.about.keys() - before if self.shards.merged else set[str]()
        found = {"changed": changed & before, "gone": before - self.about.keys(), "new": new}
        if differences := [f"{what}: {id}" for what, ids in found.items() for id in sorted(ids)]:
            told = f"the photographs in {self.root} are not those it was made from"
            refuse_or_say(self.step.name, self.step.on_change, told, differences)
        return changed

    def _differs(self, row: PhotoRow) -> bool:
        return _digest(self.root, self.seen.rows[row["id"]]) != row["sha256"]

    def _drop(self, stale: Sequence[int], todo: Sequence[int]) -> None:
        if self.shards.merged:
            if not todo and not stale:
                self.shards.clean()  # what a kill between merging and cleaning left
                return
            self.step.unfinish()
            self.shards.split()
        for n in stale:
            self.shards.remove(n)

    def read_back(self) -> None:
        """Take over hashes and count bad photographs from my shards, whoever computed them."""
        for row in (row for rows in self.shards.rows(self.mine).values() for row in rows):
            self.seen.rows[row["id"]]["sha256"] = row["sha256"]
            if "skipped" in row:
                self.bad.add(row["id"], row["skipped"])

    def compute(self, engine: Engine, resources: ComputeOptions) -> None:
        """Let the engine make those of my shards that are not there."""
        several = not isinstance(engine, Local)
        used = devices_of(self.step.parameters, resources.devices, several)
        if len(used) > 1 and not several:
            engine = Processes(engine.shard)
        if {*used} == {"cpu"}:
            used = used[: self.at_once]
        work = _Work(self.step, self.root, resources.workers, resources.batch_size, self.at_once, self.bad.on_error)
        jobs = [self._job(n) for n in range(max(self.plan) + 1)]
        if not all(map(work.done, jobs)):
            self.step.runs_on(",".join(used))
        ran_on, passing = set[str](), dict[str, str]()
        try:
            with closing(compute.do(engine, work, jobs, used)) as rows:
                for row in rows:
                    passing |= row["passing"]
                    for id, reason in row["skipped"].items():
                        self.bad.add(id, reason)
                    if row["device"] not in ran_on:
                        ran_on.add(row["device"])
                        if not ran_on <= {*used}:  # a cluster's devices are its own
                            self.step.runs_on(",".join(sorted(ran_on)))
        except PartDoneError:
            if not passing:
                raise
        if passing:
            raise ImatchError(
                f"{len(passing)} of {len(self.about)} photographs could not be read just now:\n{_listed(passing)}\n"
                "The others are done. Run the same command again, it computes what is missing; one that stays so is "
                f"to be copied again, or taken out of {self.root}"
            )

    def _job(self, n: int) -> _Shard:
        """The job of a shard; those that are not mine are empty."""
        known = self.plan.get(n, ()) if n in self.mine else ()
        seen = [self.seen.rows[id] for id in known]
        problems = {row["id"]: why for row in seen if (why := row["problem"] or self.heavy.get(row["id"]))}
        return _Shard(n, seen, [self.about[id] for id in known], problems)

    def merge(self) -> None:
        """Gather the shards, of whose photographs at least one could be used."""
        if len(self.bad.ids) == len(self.about):
            id, reason = next(iter(self.bad.ids.items()))
            raise ImatchError(
                f"none of the {len(self.about)} photographs in {self.root} could be used, the first: {id}: {reason}"
            )
        self.step.did(self.shards.merge())

    def _thin(self, todo: Sequence[int]) -> None:
        """Write the shards of a variant sub{s}, or of what keeps less, that the finished raw one beside it holds."""
        parameters, folder = self.step.parameters, self.step.folder
        all_of_it = {**parameters, "variant": "raw"}
        all_of_it.pop("keep", None)
        stride, name = stride_of(parameters["variant"]), f"{parameters['cfg']}_{store.variant_of(parameters)}"
        beside = folder.with_name(folder.name.replace(name, f"{parameters['cfg']}_raw", 1))
        if "pose" in parameters or parameters == all_of_it or not (beside / "metrics.json").is_file():
            return
        whole = open_step(beside)
        if whole.parameters != all_of_it:
            return
        raw, shards = Stored(beside), Shards(beside).rows()
        self.step.runs_on(whole.device)  # a thinned photograph costs what its raw one did, and where it did
        for n in compute.progress(todo, "thin"):
            rows = shards.get(n, [])
            if not self._holds(shards, n) or any("memory" in row or self._differs(row) for row in rows):
                continue
            tokens = [raw.tokens(raw.row_of[row["id"]]) for row in rows if "skipped" not in row]
            tokens = tokens if stride == 1 else [one.thinned(stride) for one in tokens]
            about = [{key: row[key] for key in row if key not in store.PLACED} for row in rows]
            share = len(rows) / whole.work["photographs"]
            work = {name: amount * share for name, amount in whole.work.items()}
            _write_shard(self.step, self._job(n), work, about, tokens)


def finish_embed(step: Step, embeddings: Stored) -> dict[str, int | float | str]:
    """Finish a step of embeddings: its figures, and the content hashes that make its fingerprint."""
    rows = [*embeddings.rows, *embeddings.skipped]
    contents = [[row["id"], row["sha256"], *(["memory"] if "memory" in row else [])] for row in rows]
    decoded = [[id, row["sha256"]] for id, row in embeddings.decodable.items()]
    local = sum(path.stat().st_size for path in (step.folder / "local").glob("*.npy"))
    metrics = {
        "photographs": len(embeddings),
        "skipped": len(embeddings.skipped),
        "global_dimension": embeddings.vectors.shape[1],
        "descriptors": sum(row["n"] for row in embeddings.rows),
        "local_megabytes": round(local / 2**20, 3),
        "photographs_digest": files.digest(decoded),
    }
    return step.finish(metrics, contents)


def devices_of(parameters: Parameters, devices: str, several: bool = False) -> list[str]:
    """The devices by name; "auto" is every GPU, if the backbone of such parameters runs on GPUs, else the CPU: once, or
    as often as `several` processes share it well.

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


class _Shard(NamedTuple):
    """A job: a shard's photographs, with what is known of each file (`_Seen`), what the registry knows, and, of those
    that are not to be read, why."""

    number: int
    seen: Sequence[SeenRow]
    about: Sequence[About]
    problems: Mapping[str, str]

    @property
    def readable(self) -> list[str]:
        """The ids of the others."""
        return [row["id"] for row in self.seen if row["id"] not in self.problems]


@dataclass(frozen=True)
class _Work:
    """Embeds shards: photographs are decoded ahead, and a shard is written while the next is computed."""

    step: Step
    root: Path
    workers: int
    batch_size: int
    at_once: int
    on_error: str
    _backbones: dict[str, Backbone] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """What is embedded: "embed" or "references"."""
        return self.step.name[3:]

    def done(self, shard: _Shard) -> bool:
        return Shards(self.step.folder).has(shard.number)

    def __call__(self, jobs: Sequence[_Shard], place: Place) -> Iterator[ShardRow]:
        backbone, ids = self._backbone(place.device), [id for shard in jobs for id in shard.readable]
        decoded = self._decoded(ids, backbone, place)
        if not place.quiet:
            decoded = compute.progress(decoded, self.what, len(ids), delay=0)
        pending: Future[ShardRow] | None = None
        with ThreadPoolExecutor(1) as writer:
            for write in self._embedded(jobs, backbone, decoded, place):
                if pending:
                    yield pending.result()
                pending = writer.submit(write)
                del write  # its tokens are not to be held while the next shard is computed
            if pending:
                yield pending.result()
        next(decoded, None)  # lets the bar know that this was the last

    def _backbone(self, device: str) -> Backbone:
        if device not in self._backbones:
            self._backbones[device] = base.backbone_of(self.step.parameters, device)
        return self._backbones[device]

    def _decoded(self, ids: Sequence[str], backbone: Backbone, place: Place) -> Iterator[_Timed]:
        """Photographs as the backbone sees them; one that is broken, or cannot be read twice, is given as its error."""
        workers = min(place.workers(self.workers), max(1, self.at_once // place.share))
        turn, resize_of = Pose(**self.step.parameters.get("pose", {})).turn, _resizes(self.step)

        def read(id: str) -> _Timed:
            started = time.perf_counter()
            photograph = decoded_for(self.root / id, resize_of(id), backbone, turn)
            if isinstance(photograph, PhotographError) and not (self.root / id).exists():
                photograph = PassingError(str(photograph))  # for its header has been read
            return photograph, time.perf_counter() - started

        drive = _Drive(self.root)
        for id, one in zip(ids, compute.ahead(read, ids, workers, self.batch_size + 2 * workers), strict=True):
            again = read(id) if isinstance(one[0], PassingError) else one
            drive.gave(id, again[0])
            yield again

    def _embedded(
        self, jobs: Sequence[_Shard], backbone: Backbone, decoded: Iterator[_Timed], place: Place
    ) -> Iterator[Callable[[], ShardRow]]:
        """Yield what writes each shard. Batches never reach over one, so it comes out the same on every run."""
        began = time.perf_counter()
        backbone.load()
        start, began = time.perf_counter() - began, time.perf_counter()
        room = base.free_for(backbone)[backbone.device] // (place.share if backbone.device == "cpu" else 1)
        for shard in jobs:
            made = Made(stride_of(self.step.parameters["variant"]), self.on_error == "stop")
            took = {"photographs": len(shard.readable), **dict.fromkeys(("decode", "wait", "forward"), 0.0)}
            free = began  # since when there was no forward pass
            coming = made.photographs(_read(shard, decoded, took))
            with closing(passed(backbone, coming, self.batch_size, room)) as batches:
                for batch, tokens, first, last in batches:
                    made.take(batch, tokens)
                    took["wait"] += first - free
                    took["forward"] += last - first
                    free = last
                    del batch, tokens  # not to be held while the next one is put together
            took |= {"seconds": time.perf_counter() - began, "start": start}
            start, began = 0.0, time.perf_counter()
            yield partial(self._write, shard, made, took, backbone.device)

    def _write(self, shard: _Shard, made: Made, took: dict[str, float], device: str) -> ShardRow:
        """Write a shard, unless some of it is left to the next run; returns the row that the engine gets."""
        if made.passing:
            return {"skipped": {}, "passing": made.passing, "device": device}
        for known in shard.seen:
            row = made.rows[known["id"]]
            if known["id"] in shard.problems and not known["problem"]:
                row["memory"] = True
            row["sha256"] = known["sha256"] = row["sha256"] or _digest(self.root, known)
        rows = list(made.rows.values())
        tokens = [made.tokens[id] for id in made.rows if id in made.tokens]
        _write_shard(self.step, shard, took, rows, tokens)
        skipped = {row["id"]: row["skipped"] for row in rows if "skipped" in row}
        return {"skipped": skipped, "passing": {}, "device": device}


def _read(
    shard: _Shard, decoded: Iterator[_Timed], took: dict[str, float]
) -> Iterator[tuple[str, About, Decoded | PhotographError]]:
    """The shard's photographs from those that were decoded, and those that were not read."""
    for known, about in zip(shard.seen, shard.about, strict=True):
        problem = shard.problems.get(known["id"])
        photograph, seconds = (PhotographError(problem), 0.0) if problem else next(decoded)
        took["decode"] += seconds
        yield known["id"], about, photograph


def _write_shard(
    step: Step, shard: _Shard, work: dict[str, float], rows: Sequence[PhotoRow], tokens: Sequence[Tokens]
) -> None:
    """Write a shard, what is known of its photographs, and what it took."""
    started, folder = time.perf_counter(), step.folder
    store.write_kept_shard(folder, shard.number, rows, tokens, store.keep_of(step.parameters))
    lines = b"".join(files.line(known) for known in shard.seen)
    with files.writing(folder / SEEN), (folder / SEEN).open("ab", buffering=0) as file:
        file.write(b"\n" + lines)  # a first end of line, for one that a kill left torn; at once, for others write, too
    Shards(folder).write_work(shard.number, {**work, "write": time.perf_counter() - started})


def _resizes(step: Step) -> Callable[[str], Resize]:
    """How large each photograph of a step is seen; a part of one is seen at the scale of all of it."""
    resize = Resize(**step.parameters["resize"]).zoomed(Pose(**step.parameters.get("pose", {})).zoom)
    parts = {row["id"]: resize.like(row["source_size"]) for row in (view_rows(step) if resize.limit else ())}
    return lambda id: parts.get(id, resize)


class _Drive:
    """Where photographs are."""

    def __init__(self, root: Path) -> None:
        self.root, self.failed = root, 0

    def gave(self, id: str, found: Decoded | PhotographError | None) -> None:
        """Count those in a row that could not be read; raise when they are `LOST`."""
        self.failed = self.failed + 1 if isinstance(found, PassingError) else 0
        if self.failed >= LOST:
            raise ImatchError(
                f"{self.root} gives no photographs any more ({LOST} in a row, such as {files.printable(id)}: {found}): "
                "bring it back, or if too many files are open, allow more (ulimit -n), and run the same command again; "
                "what was finished stays"
            )


class _Seen:
    """What is known of the photographs' files without reading them: bytes, time of change, header, hash."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root, self.drive = path, root, _Drive(root)
        with path.open("rb") if path.is_file() else io.BytesIO() as lines:
            self.rows = {row["id"]: row for row in map(_whole, lines) if row}

    def check_headers(self, ids: Sequence[str]) -> None:
        """Look at the files: the headers of those that are new or changed are read."""
        workers = 2 * settings.cores()
        looked = compute.ahead(self._look, ids, workers, 16 * workers)
        self.rows = dict(zip(ids, compute.progress(looked, "headers", len(ids)), strict=True))

    def save(self) -> None:
        """Write what is known, one row a photograph, unless the file says just that."""
        rows = [self.rows[id] for id in sorted(self.rows)]
        if not self.path.is_file() or self.path.read_bytes() != b"".join(map(files.line, rows)):
            files.write_rows(self.path, rows)

    def _look(self, id: str) -> SeenRow:
        path, known, stat, size = self.root / id, self.rows.get(id), None, None
        problem: PhotographError | None = None
        with suppress(OSError):  # the header says why
            found = path.stat()
            stat = [found.st_size, found.st_mtime_ns]
        if known and stat and known["stat"] == stat:
            return known
        try:
            size = images.check_header(path)
        except PhotographError as error:
            problem = error if os.path.lexists(path) else PassingError(str(error))  # it was there when it was listed
            if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
                stat = None  # a permission comes without another time of change
        self.drive.gave(id, problem)
        if isinstance(problem, PassingError):  # reading it will tell
            return {"id": id, "stat": None, "problem": None, "size": None, "sha256": None}
        return {"id": id, "stat": stat, "problem": str(problem) if problem else None, "size": size, "sha256": None}


def _digest(root: Path, known: SeenRow) -> str | None:
    """The SHA-256 of a file, read only if it is not remembered; None if it cannot be read."""
    if known["sha256"] is None:
        try:
            known["sha256"] = images.file_digest(root / known["id"])
        except PassingError as error:
            raise PassingError(f"{known['id']}: {error}; run the same command again") from error
        except PhotographError:
            return None
    return str(known["sha256"])


def _whole(line: bytes) -> SeenRow | None:
    try:
        row = {"size": None, **json.loads(line.decode(errors="surrogateescape"))}
        return {key: row[key] for key in SeenRow.__annotations__}  # keys of its own would double a row
    except (ValueError, TypeError, KeyError):  # empty, or torn by a kill: that photograph is only read once more
        return None


def _listed(reasons: Mapping[str, str]) -> str:
    return "\n".join(f"  {id}: {reason}" for id, reason in itertools.islice(reasons.items(), 10))


class _Bad:
    """The photographs that cannot be used; stops the run when that was asked or when they are many."""

    def __init__(self, total: int, on_error: str, max_skipped: float) -> None:
        self.total, self.on_error, self.max_skipped = total, on_error, max_skipped
        self.ids: dict[str, str] = {}

    def add(self, id: str, reason: str) -> None:
        self.ids[id] = reason
        if self.on_error == "stop":
            raise PhotographError(f"{id}: {reason} (on_error is stop; what was finished stays)")
        if len(self.ids) > max(1, self.max_skipped * self.total):
            raise ImatchError(
                f"{len(self.ids)} of {self.total} photographs cannot be used, more than max_skipped = "
                f"{self.max_skipped:.0%}; the first:\n{_listed(self.ids)}\nWhat was finished stays. Mend or remove "
                "them, or set max_skipped higher, such as to 0.5"
            )

    def warn(self, embeddings: Stored) -> None:
        if rows := embeddings.skipped:
            listed = _listed({row["id"]: row["skipped"] for row in rows})
            file = embeddings.folder / "skipped.jsonl"
            more = "" if len(rows) <= 10 else f"\n  ... and {len(rows) - 10} more in {file}"
            message = f"{len(rows)} of {self.total} photographs were skipped:\n{listed}{more}"
            warnings.warn(message, ImatchWarning, stacklevel=3)
        for note in exif.told({row["id"]: row for row in embeddings.rows}, "note"):
            warnings.warn(note, ImatchWarning, stacklevel=3)


def worth_trying(step: Step, poses: Sequence[Pose], weight: str = "") -> list[Pose]:
    """The poses that are worth trying with a step's backbone, or with `weight`: one that turns and zooms with its
    photographs needs the upright one alone.

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
    """Say where the photographs of a finished step are, by another backbone: in a finished step of the run that has
    just these, or else beside the step, where `embed_by` puts them."""
    beside = source.folder.with_name(files.short_name(f"{source.folder.name}_{weight}"))
    if not (beside / "metrics.json").is_file():
        about = {**source.about, "weight": weight}
        alike = Path(source.run, source.name, *about.values()).parent
        for path in sorted(alike.glob("*/metrics.json")):
            other = open_step(path.parent)
            upright = not {"pose", "imported"} & other.parameters.keys()
            whole = upright and other.parameters["variant"] == "raw"
            digests = {step.metrics["photographs_digest"] for step in (source, other)}
            same = other.linked("photographs") == source.linked("photographs") and len(digests) == 1
            if whole and same and store.keep_of(other.parameters) in store.KEEPS_PLACED:
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
    """Embed the photographs of a finished step by another backbone, as that sees them by default.

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
    if folder != source.folder.with_name(files.short_name(f"{source.folder.name}_{weight}")):
        return  # another 01_embed made it
    data_key = source.linked("data_key") if "data_key" in source.links else settings.DATA_KEY
    backbone = base.create_backbone(weight, data_key=str(data_key))
    parameters = {name: source.parameters[name] for name in ("dataset", "image_groups", "shard_size")}
    parameters |= _seen_by(weight, backbone, Resize())
    step = _start_beside(source, folder, parameters, on_change)
    if not step.finished:
        finish_embed(step, embed(step, resources, max_skipped=1.0))


def _check_zoom(source: Step, pose: Pose) -> None:
    if pose.zoom == 1 or (pose_folder(source.folder, pose) / "metrics.json").is_file():
        return
    backbone = base.create_backbone(source.parameters["weight"], source.parameters["backbone"])
    try:
        Resize(**source.parameters["resize"]).zoomed(pose.zoom).check(backbone.patch)
    except ImatchError as error:
        raise ImatchError(f"zoom {pose.zoom:g}: {error}") from None


def _check_whole(upright: Stored, embeddings: Stored) -> None:
    seen = embeddings.decodable
    gone = [id for id in upright.ids if id not in seen]
    if gone:
        why = {row["id"]: row["skipped"] for row in embeddings.skipped}.get(gone[0], "it is gone")
        raise StepError(
            f"{len(gone)} photographs of {upright.folder} cannot be read any more, such as {files.printable(gone[0])} "
            f"({why}): bring them back, delete {embeddings.folder} and run again"
        )


def _start_beside(source: Step, folder: Path, parameters: Parameters, on_change: str) -> Step:
    about = {**source.about, "configuration": folder.name}
    links = {name: source.linked(name) for name in source.links}
    upstream = {"upright": str(source.fingerprint)}
    return start_step(source.run, source.name, about, parameters, upstream, links, on_change)
