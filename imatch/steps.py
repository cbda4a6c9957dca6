"""The verbs and their loops: embed, make references, index and search, match.

Each verb works on a started `runs.Step`, does what is missing in its folder and returns what is there in the
end. `start_*` says what the step is (everything that changes the result); the verb's own arguments say how it
is worked through and change no byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from imatch import (
    backbones,
    evaluate,
    geometry,
    images,
    indexes,
    matching,
    plugins,
    references,
    registry,
    runs,
    sinks,
    store,
)
from imatch.backbones import Backbone
from imatch.images import Decoded, Resize
from imatch.indexes import Index
from imatch.records import Hits, ImatchError, ImatchWarning, Pair, PhotographError, StepError, Tokens
from imatch.runs import Step
from imatch.store import Embeddings, Row

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess
    from multiprocessing.queues import Queue

ON_ERROR = ("skip", "stop")
HELD = 2**28
"""Bytes of decoded photographs that may wait for others of their shape."""
DIRECTIONS = ("reference-data", "data-reference", "reference-reference", "data-data")


# --- 01_embed ---------------------------------------------------------------------------------------------


def start_embed(
    dataset: str,
    *,
    data_key: str = "params/data_key.json",
    image_groups: Sequence[Mapping[str, Any]] = (),
    exports: str,
    run: str,
    weight: str,
    weight_set: str = "",
    backbone_options: Mapping[str, Any],
    resize: Resize,
    cfg: str = "",
    variant: str = "raw",
    shard_size: int,
    tag: str,
    on_change: str,
) -> Step:
    """Start 01_embed on a data set.

    Args:
        dataset: a key of the registry's data sets, or a folder of photographs.
        data_key: the registry's file.
        image_groups: which of the photographs (see `datasets.Dataset.select`); none is all.
        exports, run: results go to <exports>/<run>/.
        weight: "sift", "dsift" or a key of the registry's weights.
        weight_set: the set of the registry that this key is looked up in; "" is any.
        backbone_options: fields of that backbone.
        resize: how large the backbone sees the photographs.
        cfg: the name of this size in folders and files; "" takes one from `resize`.
        variant: "raw", or "sub2": every second row and column of the grid ("sub3": every third, ...).
        shard_size: photographs a shard, the unit of resuming.
        tag: appended to the folder's name, to keep two configurations apart.
        on_change: "refuse" or "recompute" what was made from something else.

    Raises:
        ImatchError: no such folder, weight, option or weight file; see also `runs.start`.
    """
    if not run:
        raise ImatchError("run is empty: name this piece of work (-p run NAME)")
    if shard_size < 1:
        raise ImatchError(f"shard_size {shard_size} must be at least 1")
    _stride(variant)
    photographs = registry.dataset(dataset, data_key)
    backbone = backbones.create(weight, backbone_options, weight_set=weight_set, data_key=data_key)
    resize.check(backbone.patch)
    parameters = {
        "dataset": photographs.key if photographs.registered else "",
        "image_groups": list(image_groups),
        "weight": weight,
        "backbone": backbones.identity(backbone),
        "weights_digest": backbone.digest,
        "resize": {"mode": resize.mode, **_side(resize)},
        "cfg": _named("cfg", cfg) or str(resize),
        "variant": variant,
        "shard_size": shard_size,
    }
    name = f"{parameters['cfg']}_{variant}{_tagged(tag)}"
    folder = registry.exports_folder(exports) / run / "01_embed" / photographs.key / weight / name
    links = {"photographs": photographs.root}
    if photographs.registered:
        links["data_key"] = registry.resolve(data_key)
    return runs.start(folder, "01_embed", parameters, {}, links, on_change)


def _side(resize: Resize) -> dict[str, float]:
    return {"scale": resize.scale} if resize.mode == "scale" else {"long_side": resize.long_side}


def _stride(variant: str) -> int:
    """1 for "raw", s for "sub{s}"."""
    if variant == "raw":
        return 1
    if variant.startswith("sub") and variant[3:].isdecimal() and int(variant[3:]) > 1:
        return int(variant[3:])
    raise ImatchError(
        f"variant {variant!r} is not known: use raw, or sub2, sub3, ... for every 2nd, 3rd row and column"
    )


def chosen(step: Step) -> dict[str, Row]:
    """The ids of a step's photographs, with what the registry knows of each (capture, label, frame)."""
    if views := _views(step):
        return {row["id"]: {key: row[key] for key in ("source", "source_sha256")} for row in views}
    root = step.linked("photographs")
    if "data_key" in step.links:
        dataset = registry.load(step.linked("data_key")).dataset(step.parameters["dataset"])
    else:
        dataset = registry.dataset(str(root))
    ids = images.list_photographs(root, leave_out=_place(step)[0].parent)
    chosen = dataset.select(ids, step.parameters["image_groups"])
    if not chosen:
        raise ImatchError(f"no photographs in {root}: none of its files ends in {', '.join(sorted(images.SUFFIXES))}")
    return {id: {key: value for key, value in about.items() if value is not None} for id, about in chosen.items()}


def embed(
    step: Step,
    *,
    devices: str = "auto",
    workers: int = -1,
    batch_size: int = 8,
    on_error: str = "skip",
    max_skipped: float = 0.05,
) -> Embeddings:
    """Compute the tokens of a step's photographs, those that are missing.

    Headers are checked first; photographs are decoded in worker processes, go through the backbone in batches
    of one shape, and a shard is written while the next is computed. What cannot be decoded goes to skipped.jsonl.

    Args:
        step: from `start_embed` or `start_reference_tokens`.
        devices: where a network runs: "auto" (all GPUs, else the CPU), "cpu", or several, such as "cuda:0,cuda:1".
            Each of several gets a process and shards of its own; the bytes are those of one.
        workers: processes that decode; -1 is one a core, 0 none.
        batch_size: photographs a forward pass.
        on_error: "skip" leaves bad photographs out and says so; "stop" ends at the first.
        max_skipped: the share of bad photographs past which the run stops by itself (one alone never stops it).

    Raises:
        PhotographError: the first bad photograph, with on_error="stop".
        StepError: photographs changed since the last run and the step may not recompute.
        ImatchError: no photographs, none that could be used, or too many bad ones. What was finished stays.
    """
    if on_error not in ON_ERROR:
        raise ImatchError(f"on_error {on_error!r} is not known: use {' or '.join(ON_ERROR)}")
    root = step.linked("photographs")
    about = chosen(step)
    ids = sorted(about)
    seen = _Seen(step.folder / "seen.jsonl", root)
    bad = _Bad(len(ids), on_error, max_skipped, step)
    seen.check_headers(ids)
    for id in ids:
        if problem := seen[id]["problem"]:
            bad.add(id, problem)

    size = step.parameters["shard_size"]
    plan = [ids[first : first + size] for first in range(0, len(ids), size)]
    todo = _missing_shards(step, plan, seen)
    for row in (row for rows in store.shard_rows(step.folder).values() for row in rows if "skipped" in row):
        bad.add(row["id"], row["skipped"])  # what an earlier run found in the shards that stay counts, too
    todo = _thin(step, plan, todo, seen, bad)
    work = _Work(step, {shard: plan[shard] for shard in todo}, about, workers, batch_size, on_error, max_skipped)
    if todo:
        used = devices_of(step, devices)
        step.runs_on(",".join(used))
        if len(used) == 1:
            work(used[0], seen, bad)
        else:
            seen.save()
            _on_each(work, used)
            seen = _Seen(seen.path, root)
            seen.check_headers(ids)
            for row in (row for rows in store.shard_rows(step.folder).values() for row in rows if "skipped" in row):
                bad.add(row["id"], row["skipped"])  # each part has counted its own
    seen.save()
    if not store.is_merged(step.folder):
        if not any("skipped" not in row for rows in store.shard_rows(step.folder).values() for row in rows):
            raise ImatchError(f"none of the {len(ids)} photographs in {root} could be used, the first: {bad.first}")
        store.merge(step.folder)
    bad.warn()
    return Embeddings(step.folder)


def finish_embed(step: Step, embeddings: Embeddings) -> dict[str, Any]:
    """Finish a step of embeddings: its figures, and the content hashes that make its fingerprint."""
    skipped = store.read_rows(step.folder / "skipped.jsonl")
    contents = [[row["id"], row["sha256"]] for row in [*embeddings.rows, *skipped]]
    local = sum(path.stat().st_size for path in (step.folder / "local").glob("*.npy"))
    metrics = {
        "photographs": len(embeddings),
        "skipped": len(skipped),
        "global_dimension": embeddings.vectors.shape[1],
        "descriptors": sum(row["n"] for row in embeddings.rows),
        "local_megabytes": round(local / 2**20, 3),
        "photographs_digest": runs.digest([[row["id"], row["sha256"]] for row in _decodable(step.folder)]),
    }
    return step.finish(metrics, contents)


def _decodable(folder: Path) -> list[Row]:
    """The rows of all photographs that could be decoded, whether the backbone found something in them or not."""
    rows = store.read_rows(folder / "images.jsonl") + store.read_rows(folder / "skipped.jsonl")
    return sorted((row for row in rows if "size" in row), key=lambda row: row["id"])


def _decode(path: Path, resize: Resize, patch: int) -> Decoded | PhotographError:
    try:
        return images.decode(path, resize, patch)
    except PhotographError as error:
        return error


def _thin(step: Step, plan: Sequence[Sequence[str]], todo: Sequence[int], seen: _Seen, bad: _Bad) -> list[int]:
    """Write the shards of a variant sub{s} that the finished raw variant beside it holds, without another forward
    pass; returns those that are left to compute."""
    parameters = step.parameters
    stride, name = _stride(parameters["variant"]), f"{parameters['cfg']}_{parameters['variant']}"
    beside = step.folder.with_name(step.folder.name.replace(name, f"{parameters['cfg']}_raw", 1))
    if stride == 1 or not todo or not (beside / "metrics.json").is_file():
        return list(todo)
    if runs.read(beside).parameters != {**parameters, "variant": "raw"}:
        return list(todo)
    raw, shards = Embeddings(beside), store.shard_rows(beside)
    place = {id: row for row, id in enumerate(raw.ids)}
    left = []
    for shard in runs.progress(todo, "thin"):
        rows = shards.get(shard, [])
        if [row["id"] for row in rows] != list(plan[shard]) or any(seen.digest(r["id"]) != r["sha256"] for r in rows):
            left.append(shard)
            continue
        for row in rows:
            if "skipped" in row:
                bad.add(row["id"], row["skipped"])
        tokens = [raw.tokens(place[row["id"]]).thinned(stride) for row in rows if "skipped" not in row]
        about = [{key: row[key] for key in row if key not in store.PLACED} for row in rows]
        _write_shard(step.folder, shard, about, tokens, seen)
    return left


def devices_of(step: Step, devices: str) -> list[str]:
    """The devices by name; for "auto" every GPU, if the backbone runs on GPUs.

    Raises:
        ImatchError: one that is not there.
    """
    weight, options = step.parameters["weight"], step.parameters["backbone"]
    used = [backbones.create(weight, options, device=name.strip()).device for name in devices.split(",")]
    if devices != "auto" or used != ["cuda"]:
        return used
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class _Work:
    """The shards that are missing, and how to work through them."""

    step: Step
    shards: Mapping[int, Sequence[str]]
    about: Mapping[str, Row]
    workers: int
    batch_size: int
    on_error: str
    max_skipped: float

    def __call__(self, device: str, seen: _Seen, bad: _Bad, quiet: bool = False) -> None:
        """Embed and write the shards on one device; a shard is written while the next one is computed."""
        step, parameters = self.step, self.step.parameters
        backbone = backbones.create(parameters["weight"], parameters["backbone"], device=device)
        if backbone.digest != parameters["weights_digest"]:
            raise StepError(
                f"{step.name}: the weights of {parameters['weight']} have changed since 01_embed "
                f"({parameters['weights_digest'][:8]} -> {backbone.digest[:8]}): run 01_embed again"
            )
        resize = Resize(**parameters["resize"])
        readable = [seen.root / id for ids in self.shards.values() for id in ids if not seen[id]["problem"]]
        decode = partial(_decode, resize=resize, patch=backbone.patch)
        decoded = runs.parallel(decode, readable, self.workers, step.name[3:], quiet)
        stride = _stride(parameters["variant"])
        with ThreadPoolExecutor(1) as writer:
            pending: Future[None] | None = None
            for shard, ids in self.shards.items():
                if (above := parent_process()) and not above.is_alive():
                    return  # killed, so nobody waits for this part any more
                rows, tokens = _embed_shard(ids, seen, decoded, backbone, self.batch_size, bad, self.about, stride)
                if pending:
                    pending.result()
                pending = writer.submit(_write_shard, step.folder, shard, rows, tokens, seen)
            if pending:
                pending.result()
        next(decoded, None)  # lets the bar know that this was the last

    def part(self, number: int, of: int) -> _Work:
        """Every `of`-th shard from `number` on."""
        shards = {shard: ids for i, (shard, ids) in enumerate(self.shards.items()) if i % of == number}
        workers = registry.cores() if self.workers < 0 else self.workers
        return replace(self, shards=shards, workers=-(-workers // of))


def _on_each(work: _Work, devices: Sequence[str]) -> None:
    """Work through the shards with one process a device, each with shards of its own. One that fails ends all."""
    context = get_context("spawn")
    failures = context.Queue()
    parts = [work.part(number, len(devices)) for number in range(len(devices))]
    running = [
        context.Process(target=_work_alone, args=(part, device, failures), name=device)
        for part, device in zip(parts, devices, strict=True)
    ]
    try:
        for process in running:
            process.start()
        for _ in runs.progress(_as_they_end(work, running), "shards", len(work.shards), delay=0):
            pass
        if ended := [process for process in running if process.exitcode]:
            try:
                raise failures.get(timeout=5)
            except queue.Empty:
                raise ImatchError(
                    f"the process on {ended[0].name} was killed (exit code {ended[0].exitcode}), mostly for want of "
                    "memory; run the same command again, it goes on where it stopped"
                ) from None
    finally:
        for process in running:
            process.terminate()
            process.join()


def _work_alone(work: _Work, device: str, failures: Queue[ImatchError]) -> None:
    """In a process of its own: one device's part."""
    seen = _Seen(work.step.folder / "seen.jsonl", work.step.linked("photographs"))
    seen.check_headers([id for part in work.shards.values() for id in part])
    try:
        work(device, seen, _Bad(len(work.about), work.on_error, work.max_skipped, work.step), quiet=True)
    except ImatchError as error:  # it is for the user, so it goes to the process that the user sees
        failures.put(error)
        raise SystemExit(1) from None


def _as_they_end(work: _Work, running: Sequence[SpawnProcess]) -> Iterator[int]:
    """The shards as they are written, until all processes have ended or one has failed."""
    left = set(work.shards)
    while True:
        going = [process.exitcode is None for process in running]  # asked first, so that no last shard is missed
        written = {shard for shard in left if (work.step.folder / "local" / f"{shard:05d}.jsonl").is_file()}
        yield from sorted(written)
        left -= written
        if not any(going) or any(process.exitcode for process in running):
            return
        time.sleep(0.2)


def _embed_shard(
    ids: Sequence[str],
    seen: _Seen,
    decoded: Iterator[Decoded | PhotographError],
    backbone: Backbone,
    batch_size: int,
    bad: _Bad,
    about: Mapping[str, Row],
    stride: int,
) -> tuple[list[Row], list[Tokens]]:
    """One shard's rows and tokens. Batches never reach over a shard, so it comes out the same on every run."""
    rows: dict[str, Row] = {}
    tokens: dict[str, Tokens] = {}
    shapes: dict[tuple[int, ...], list[tuple[str, Decoded]]] = {}

    def flush(batch: list[tuple[str, Decoded]]) -> None:
        for (id, photograph), one in zip(batch, backbone(np.stack([d.pixels for _, d in batch])), strict=True):
            if not np.isfinite(one.vector).all():
                raise ImatchError(
                    f"{id}: the backbone's numbers are not finite: its weights are broken, download them anew"
                )
            if not one.vector.any():
                h, w = photograph.size
                skip(id, f"nothing to describe: no texture was found in its {w} x {h} pixels", photograph.sha256)
                rows[id]["size"] = photograph.size
                continue
            one = store.settled(replace(one, xy=photograph.to_original(one.xy)), photograph.size)
            tokens[id] = one if stride == 1 else one.thinned(stride)
        batch.clear()

    def skip(id: str, reason: str, sha256: str | None) -> None:
        bad.add(id, reason)
        rows[id] = {"id": id, "skipped": reason, "sha256": sha256}

    for id in ids:
        if problem := seen[id]["problem"]:
            rows[id] = {"id": id, "skipped": problem, "sha256": seen.digest(id)}
            continue
        photograph = next(decoded)
        if isinstance(photograph, PhotographError):
            skip(id, str(photograph), seen.digest(id))
            continue
        seen[id]["sha256"] = photograph.sha256
        rows[id] = {
            "id": id,
            "size": photograph.size,
            "sha256": photograph.sha256,
            "position": photograph.position,
            **about[id],
        }
        batch = shapes.setdefault(photograph.pixels.shape, [])
        batch.append((id, photograph))
        if len(batch) == batch_size:
            flush(batch)
        elif sum(one.pixels.nbytes for held in shapes.values() for _, one in held) > HELD:
            for held in shapes.values():
                if held:
                    flush(held)
    for batch in shapes.values():
        if batch:
            flush(batch)
    return [rows[id] for id in ids], [tokens[id] for id in ids if id in tokens]


def _write_shard(folder: Path, shard: int, rows: Sequence[Row], tokens: Sequence[Tokens], seen: _Seen) -> None:
    store.write_shard(folder, shard, rows, tokens)
    seen.append(row["id"] for row in rows)


def _missing_shards(step: Step, plan: Sequence[Sequence[str]], seen: _Seen) -> list[int]:
    """The shards to compute; shards made from other bytes are refused or, with on_change="recompute", dropped."""
    done = store.shard_rows(step.folder)
    recorded = [row for rows in done.values() for row in rows]
    now = {id for ids in plan for id in ids}
    changed = {row["id"] for row in recorded if row["id"] in now and seen.digest(row["id"]) != row["sha256"]}
    # an unfinished run asked for its bad photographs to be mended or removed: that is no difference to refuse
    before = {row["id"] for row in recorded if store.is_merged(step.folder) or "skipped" not in row}
    differences = [f"changed: {id}" for id in sorted(changed & before)] + [f"gone: {id}" for id in sorted(before - now)]
    if store.is_merged(step.folder):
        differences += [f"new: {id}" for id in sorted(now - before)]
    if differences:
        runs.refuse_or_say(step, f"the photographs in {seen.root} are not those it was made from", differences)

    def valid(shard: int) -> bool:
        ids = [row["id"] for row in done.get(shard, [])]
        return ids == list(plan[shard]) and not changed.intersection(ids)

    todo = [shard for shard in range(len(plan)) if not valid(shard)]
    begun = {int(path.name.partition(".")[0]) for path in (step.folder / "local").glob("[0-9]*.npy")}
    stale = [shard for shard in {*done, *begun} if shard >= len(plan) or (shard in done and shard in todo)]
    if store.is_merged(step.folder):
        if not todo and not stale:
            store.remove_parts(step.folder)  # what a kill between merging and cleaning left
            return []
        step.unfinish()
        store.split(step.folder)
    for shard in stale:
        store.remove_shard(step.folder, shard)
    if done and todo:
        print(f"{step.name}: {len(plan) - len(todo)} of {len(plan)} shards are there, {len(todo)} to compute")
    return todo


class _Seen:
    """What is known of the photographs' files without reading them again: bytes, time of change, header, hash."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.root = path, root
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        self._known: dict[str, Row] = {row["id"]: row for row in map(_whole, lines) if row}

    def __getitem__(self, id: str) -> Row:
        return self._known[id]

    def check_headers(self, ids: Sequence[str]) -> None:
        """Read the headers of files that are new or changed."""
        stats = {id: self._stat(id) for id in ids}
        known = {id for id, row in self._known.items() if row["stat"] and row["stat"] == stats.get(id)}
        unknown = [id for id in ids if id not in known]
        with ThreadPoolExecutor(2 * registry.cores()) as pool:
            checked = pool.map(self._problem, unknown)
            for id, (problem, lasting) in zip(runs.progress(unknown, "headers"), checked, strict=True):
                stat = stats[id] if lasting else None
                self._known[id] = {"id": id, "stat": stat, "problem": problem, "sha256": None}
        self._known = {id: self._known[id] for id in ids}

    def digest(self, id: str) -> str | None:
        """The SHA-256 of a file, read only if it is not remembered; None if it cannot be read."""
        if self._known[id]["sha256"] is None:
            try:
                self._known[id]["sha256"] = images.file_digest(self.root / id)
            except PhotographError:
                return None
        return str(self._known[id]["sha256"])

    def append(self, ids: Iterator[str]) -> None:
        """Remember these photographs even if the run is killed now."""
        with store.writing(self.path), self.path.open("ab") as file:
            file.write(b"\n")  # ends a line that a kill left torn
            file.writelines(store.line(self._known[id]) for id in ids)

    def save(self) -> None:
        """Write what is known, one row a photograph, unless the file says just that."""
        rows = [self._known[id] for id in sorted(self._known)]
        if not self.path.is_file() or self.path.read_bytes() != b"".join(map(store.line, rows)):
            store.write_rows(self.path, rows)

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


def _whole(line: bytes) -> Row | None:
    try:
        row: Row = json.loads(line.decode(errors="surrogateescape"))
    except ValueError:  # empty, or torn by a kill: that photograph is only read once more
        return None
    return row


class _Bad:
    """Counts the photographs that cannot be used, and stops the run when that was asked or when they are many."""

    def __init__(self, total: int, on_error: str, max_skipped: float, step: Step) -> None:
        self.total, self.on_error, self.max_skipped, self.step = total, on_error, max_skipped, step
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
                "or allow more with -p max_skipped 0.5"
            )

    def warn(self) -> None:
        rows = store.read_rows(self.step.folder / "skipped.jsonl")
        if rows:
            listed = "\n".join(f"  {row['id']}: {row['skipped']}" for row in rows[:10])
            more = (
                "" if len(rows) <= 10 else f"\n  ... and {len(rows) - 10} more in {self.step.folder / 'skipped.jsonl'}"
            )
            message = f"{len(rows)} of {self.total} photographs were skipped:\n{listed}{more}"
            warnings.warn(message, ImatchWarning, stacklevel=3)


# --- 02_references ----------------------------------------------------------------------------------------


def start_references(
    embed_step: str,
    *,
    kind: str,
    angles: Sequence[float],
    crops: Sequence[float],
    quality: int,
    tag: str,
    on_change: str,
) -> Step:
    """Start the first half of 02_references: rotated and cropped views of every photograph of an 01_embed step.

    The views depend on the photographs alone (all that can be decoded), so all backbones share them.

    Args:
        embed_step: folder of a finished 01_embed.
        kind: a name of `references.REFERENCES`.
        angles: degrees counter-clockwise.
        crops: ratios in (0, 1].
        quality: of the JPEG files, 1 to 100.
        tag, on_change: as in `start_embed`.

    Raises:
        ImatchError: an unknown kind or a number out of its range; see also `runs.start`.
    """
    source = runs.read(registry.resolve(embed_step))
    if source.parameters.get("imported"):
        raise StepError(f"{source.folder} was imported, and its photographs are not known to be there: run 01_embed")
    references.create(kind)
    if not angles or not crops:
        raise ImatchError("angles and crops must name at least one value each")
    for value in (*angles, *crops):
        if not plugins.fits(value, float) or not math.isfinite(value):
            raise ImatchError(f"angles {list(angles)} and crops {list(crops)} must be numbers, {value!r} is none")
    views = [references.name("", angle, crop) for angle in {*angles} for crop in {*crops}]
    if len(views) != len({*views}):
        raise ImatchError(f"angles {list(angles)} or crops {list(crops)} lie so close that their names are equal")
    if not all(0 < crop <= 1 for crop in crops):
        raise ImatchError(f"crops {list(crops)} must lie above 0 and up to 1")
    if not 1 <= quality <= 100:
        raise ImatchError(f"quality {quality} must lie between 1 and 100")
    exports, dataset = _place(source)
    folder = exports / "02_references" / dataset / f"{kind}{_tagged(tag)}" / "views"
    parameters = {
        "kind": kind,
        "angles": sorted({float(angle) for angle in angles}),
        "crops": sorted({float(crop) for crop in crops}),
        "quality": quality,
    }
    upstream = {"photographs": source.metrics["photographs_digest"]}
    links = {"photographs": source.linked("photographs"), "embed": source.folder}
    return runs.start(folder, "02_references", parameters, upstream, links, on_change)


def make_references(step: Step, *, workers: int = -1) -> list[Row]:
    """Make the views that are missing and finish the step of views.

    Every view is a JPEG at references_<dataset>/R<folder>/<stem>_rot045_crop50.jpg, with a PNG mask beside it
    when a corner is empty, and a row of references.jsonl.

    Returns:
        The rows, sorted by id: id, source, source_sha256, kind, angle (degrees), crop, size and source_size (h, w),
        matrix (3 x 3, photograph -> view), scale, covered (share of its pixels that show the photograph), mask.

    Raises:
        ImatchError: a photograph changed since it was embedded, or cannot be read any more.
    """
    if not step.finished:
        source = _decodable(step.linked("embed"))
        names = _reference_names([row["id"] for row in source], _place(step)[1])
        make = partial(_make_views, step=step, root=step.linked("photographs"))
        jobs = [(row, names[row["id"]], i) for i, row in enumerate(source)]
        todo = [job for job in jobs if not (step.folder / "rows" / f"{job[2]:08d}.jsonl").is_file()]
        problems = [problem for problem in runs.parallel(make, todo, workers, "references") if problem]
        if problems:
            raise ImatchError("\n".join([*problems[:10], "run 01_embed again, then this"]))
        parts = (step.folder / "rows" / f"{number:08d}.jsonl" for _, _, number in jobs)
        rows = sorted((row for part in parts for row in store.read_rows(part)), key=lambda row: row["id"])
        store.write_rows(step.folder / "references.jsonl", rows)
        step.finish({"references": len(rows), "photographs": len(source)})
    shutil.rmtree(step.folder / "rows", ignore_errors=True)
    return store.read_rows(step.folder / "references.jsonl")


def _make_views(job: tuple[Row, str, int], step: Step, root: Path) -> str | None:
    """All views of one photograph; its rows are written last. Returns what is wrong, None if nothing is."""
    row, name, number = job
    try:
        photograph = images.decode(root / row["id"])
    except PhotographError as error:
        return f"{row['id']}: {error}"
    if photograph.sha256 != row["sha256"]:
        return f"{row['id']} has changed since it was embedded"
    make = references.create(step.parameters["kind"])
    rows = []
    for crop in step.parameters["crops"]:
        for angle in step.parameters["angles"]:
            view = make(photograph.pixels, angle, crop)
            id = f"{references.name(name, angle, crop)}.jpg"
            data = BytesIO()
            Image.fromarray(view.pixels).save(data, "JPEG", quality=step.parameters["quality"], subsampling=0)
            store.write_bytes(step.folder / id, data.getvalue())
            mask = None
            if not view.mask.all():
                mask = f"{references.name(name, angle, crop)}_mask.png"
                data = BytesIO()
                Image.fromarray(view.mask).save(data, "PNG")
                store.write_bytes(step.folder / "masks" / mask, data.getvalue())
            rows.append(
                {
                    "id": id,
                    "source": row["id"],
                    "source_sha256": row["sha256"],
                    "kind": step.parameters["kind"],
                    "angle": angle,
                    "crop": crop,
                    "size": view.mask.shape,
                    "source_size": photograph.size,
                    "matrix": view.matrix.tolist(),
                    "scale": float(math.sqrt(np.linalg.det(view.matrix[:2, :2]))),
                    "covered": float(view.mask.mean()),
                    "mask": mask and f"masks/{mask}",
                }
            )
    store.write_rows(step.folder / "rows" / f"{number:08d}.jsonl", rows)
    return None


def _reference_names(ids: Sequence[str], dataset: str) -> dict[str, str]:
    """Photograph id -> references_<dataset>/R<folder>/<stem>, with the suffix, or a hash of the id, in the stem
    where two would be one."""

    def place(id: str) -> Path:
        folder = Path(id).parent.as_posix()
        return Path(f"references_{dataset}") / f"R{dataset if folder == '.' else folder}"

    plain = {id: (place(id) / Path(id).stem).as_posix() for id in ids}
    longer = {id: (place(id) / Path(id).name.replace(".", "_")).as_posix() for id in ids}
    count: dict[str, int] = {}
    for name in plain.values():
        count[name.lower()] = count.get(name.lower(), 0) + 1
    names = {id: plain[id] if count[plain[id].lower()] == 1 else longer[id] for id in ids}
    taken: dict[str, str] = {}
    for id, name in names.items():
        if taken.setdefault(name.lower(), id) != id:
            names[id] = f"{name}-{hashlib.sha256(os.fsencode(id)).hexdigest()[:8]}"
    return names


def start_reference_tokens(views: Step) -> Step:
    """Start the second half of 02_references: the tokens of the views, by the backbone of the 01_embed step."""
    source = runs.read(views.linked("embed"))
    folder = views.folder.parent / source.folder.parent.name / source.folder.name
    links = {"photographs": views.folder, "views": views.folder, "embed": source.folder}
    upstream = {"views": str(runs.read(views.folder).fingerprint), "embed": str(source.fingerprint)}
    return runs.start(folder, "02_references", source.parameters, upstream, links, views.on_change)


def _views(step: Step) -> list[Row]:
    return store.read_rows(step.linked("views") / "references.jsonl") if "views" in step.links else []


# --- 03_index ---------------------------------------------------------------------------------------------


def start_index(
    embed_step: str,
    references_step: str,
    *,
    direction: str,
    index: str,
    k: int,
    exclude_siblings: bool,
    tag: str,
    on_change: str,
) -> Step:
    """Start 03_index: one set of embeddings searched by another.

    Args:
        embed_step: folder of a finished 01_embed.
        references_step: folder of the finished 02_references made from it, or of another 01_embed in their place, made
            with the same backbone at the same size; "" for the direction "data-data".
        direction: "<query>-<gallery>", one of `DIRECTIONS`.
        index: a name of `indexes.INDEXES`.
        k: neighbours a query.
        exclude_siblings: leave out references made from the query's own photograph ("reference-reference").
        tag, on_change: as in `start_embed`.

    Raises:
        StepError: the references were not made from that 01_embed, or differ in backbone, pooling, family or size.
        ImatchError: an unknown direction or index; see also `runs.start`.
    """
    if direction not in DIRECTIONS:
        raise ImatchError(plugins.unknown("direction", direction, DIRECTIONS))
    if k < 1:
        raise ImatchError(f"k is {k}: ask for at least 1 neighbour")
    indexes.create(index)
    sides = dict(zip(("query", "gallery"), direction.split("-"), strict=True))
    found = {"data": runs.read(registry.resolve(embed_step))}
    kind = ""
    if "reference" in sides.values():
        if not references_step:
            raise ImatchError(
                f"direction {direction} needs references: give references_step, the folder of 02_references"
            )
        found["reference"] = runs.read(registry.resolve(references_step))
        kind = _kind_of_reference(found["reference"], found["data"])
    exports, dataset = _place(found["data"])
    weight, configuration = found["data"].folder.parts[-2:]
    folder = exports / "03_index" / dataset / weight / configuration / f"{direction}{kind}{_tagged(tag)}"
    parameters = {"direction": direction, "index": index, "k": k, "exclude_siblings": exclude_siblings}
    upstream = {side: str(found[name].fingerprint) for side, name in sides.items()}
    links = {side: found[name].folder for side, name in sides.items()}
    return runs.start(folder, "03_index", parameters, upstream, links, on_change)


def _kind_of_reference(reference: Step, data: Step) -> str:
    """The ending that the other side of an index gives to its folder's name, after checking that the two belong
    together: references made from the photographs, or photographs of another 01_embed (queries of a survey, say)."""
    if reference.name == "02_references" and reference.upstream.get("embed") != data.fingerprint:
        raise StepError(f"{reference.folder} was not made from {data.folder} as it is now: run 02_references again")
    compared = ("weight", "backbone", "weights_digest", "resize")
    of_data, of_reference = ({key: step.parameters[key] for key in compared} for step in (data, reference))
    if differences := runs.compare(of_data, of_reference):
        raise StepError(
            f"vectors of {data.folder} and {reference.folder} cannot be compared, they were made differently:\n  "
            + "\n  ".join(differences)
            + "\nEmbed both with the same weight, pooling, precision and size"
        )
    if reference.name == "02_references":
        return f"_{reference.folder.parent.parent.name}"
    _, dataset = _place(reference)
    return f"_{dataset}-{reference.folder.name}"


def query_and_gallery(step: Step) -> tuple[Embeddings, Embeddings]:
    """The embeddings that a 03_index step searches with, and those it searches."""
    return Embeddings(step.linked("query")), Embeddings(step.linked("gallery"))


def build_index(step: Step, gallery: Embeddings) -> Index:
    """Build the index of the gallery's global vectors and save it, or load it if that was done."""
    index, path = indexes.create(step.parameters["index"]), step.folder / "index.faiss"
    if step.finished:
        index.load(path)
    else:
        index.build(gallery.vectors)
        index.save(path)
    return index


def self_check(index: Index, gallery: Embeddings, block: int = 4096) -> int:
    """Let every vector of the gallery search for itself.

    Returns:
        How many found an equal-score twin of theirs first (photographs with the same content).

    Raises:
        StepError: a vector finds something else better than itself: rows and index do not belong together.
    """
    twins = 0
    for first in runs.progress(range(0, len(gallery), block), "self-check"):
        vectors = gallery.vectors[first : first + block]
        hits = index.search(vectors, 1)
        row = np.arange(first, first + len(vectors))
        own = np.einsum("nd,nd->n", vectors, vectors)
        # what came first must score, by the store's own vectors, as high as the vector itself
        first_score = np.einsum("nd,nd->n", vectors, gallery.vectors[hits.rows[:, 0]])
        wrong = (hits.rows[:, 0] != row) & (first_score < own - 1e-5)
        if wrong.any():
            other = gallery.ids[hits.rows[wrong, 0][0]]
            raise StepError(
                f"the index answers {other} for {gallery.ids[row[wrong][0]]}: delete its folder and run again"
            )
        twins += int((hits.rows[:, 0] != row).sum())
    return twins


def search(step: Step, index: Index, query: Embeddings, gallery: Embeddings) -> Hits:
    """Search all queries in one call, without the item itself and, if asked, without its siblings.

    Writes hits.npz (rows, scores), hits.csv (one row a hit) and queries/<id>.json (one file a query).
    """
    if step.finished:
        with np.load(step.folder / "hits.npz") as saved:
            return Hits(saved["rows"], saved["scores"])
    same = query.folder == gallery.folder
    k = step.parameters["k"]
    siblings = same and step.parameters["exclude_siblings"]
    most = max(Counter(gallery.shows).values()) if siblings else int(same)
    hits = index.search(query.vectors, k + most)
    hits = _without_own(hits, query, gallery, siblings, k) if same else hits
    right = evaluate.right_answers(hits.rows, query.shows, gallery.shows)
    with store.atomic(step.folder / "hits.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, rows=hits.rows, scores=hits.scores)
    table = ["query,rank,id,score,right"]
    for q, id in runs.progress(list(enumerate(query.ids)), "write hits"):
        found = [
            {"rank": rank, "id": gallery.ids[row], "score": round(float(score), 6)}
            for rank, (row, score) in enumerate(zip(hits.rows[q], hits.scores[q], strict=True))
            if row >= 0
        ]
        table += [
            ",".join(
                [_csv(id), str(hit["rank"]), _csv(str(hit["id"])), f"{hit['score']:.6f}", str(int(right[q, rank]))]
            )
            for rank, hit in enumerate(found)
        ]
        record = {"query": id, "direction": step.parameters["direction"], "k": k, "hits": found}
        store.write_json(step.folder / "queries" / f"{flat_name(id)}.json", record)
    store.write_bytes(step.folder / "hits.csv", ("\n".join(table) + "\n").encode(errors="surrogateescape"))
    return hits


def _without_own(hits: Hits, query: Embeddings, gallery: Embeddings, siblings: bool, k: int) -> Hits:
    shown = np.append(np.asarray(gallery.shows, object), None)
    own = np.asarray(query.shows, object)[:, None] == shown[hits.rows] if siblings else False
    dropped = own | (hits.rows == np.arange(len(hits.rows))[:, None])
    order = np.argsort(dropped, axis=1, kind="stable")[:, :k]
    gone = np.take_along_axis(dropped, order, 1)
    rows, scores = np.take_along_axis(hits.rows, order, 1), np.take_along_axis(hits.scores, order, 1)
    return Hits(np.where(gone, -1, rows), np.where(gone, -np.inf, scores).astype(np.float32))


def index_metrics(step: Step, query: Embeddings, gallery: Embeddings, hits: Hits, twins: int) -> dict[str, Any]:
    """The figures of 03_index: sizes, twins, Hit@1, Hit@5 and Hit@K. Counted apart: queries that have no answer in
    the gallery, and photographs that could not be embedded and so never became queries."""
    right = evaluate.right_answers(hits.rows, query.shows, gallery.shows)
    able = answerable(step, query, gallery)
    k = step.parameters["k"]
    return {
        "queries": len(query),
        "gallery": len(gallery),
        "dimension": gallery.vectors.shape[1],
        "twins": twins,
        "without_answer": int((~able).sum()),
        "queries_skipped": len(store.read_rows(query.folder / "skipped.jsonl")),
        **{f"hit_at_{n}": evaluate.hit_at_k(right, n, able) for n in sorted({1, min(5, k), k})},
    }


def answerable(step: Step, query: Embeddings, gallery: Embeddings) -> np.ndarray:
    """Which queries of a 03_index step have a right answer in its gallery: (Q,) bool."""
    same = query.folder == gallery.folder
    return evaluate.answerable(query.shows, gallery.shows, same, same and step.parameters["exclude_siblings"])


# --- 04_match ---------------------------------------------------------------------------------------------


def start_match(
    index_step: str,
    *,
    candidates: int,
    matcher: str,
    matcher_options: Mapping[str, Any],
    model: str,
    threshold: float,
    confidence: float,
    iterations: int,
    min_inliers: int,
    min_share: float,
    outputs: Sequence[str],
    tag: str,
    on_change: str,
) -> Step:
    """Start 04_match: each query of a 03_index step against its best candidates, 1:1.

    Args:
        index_step: folder of a finished 03_index.
        candidates: how many of each query's hits are matched.
        matcher: a name of `matching.MATCHERS`.
        matcher_options: fields of that matcher.
        model, threshold, confidence, iterations, min_inliers, min_share: of `geometry.Estimator`. A threshold of 0
            means 3 pixels between keypoints and half a patch on a grid; a share of 0 means 0.1 between keypoints
            and 0.3 on a grid, where neighbours see the same pixels and their agreement counts less.
        outputs: names of `sinks.SINKS`.
        tag, on_change: as in `start_embed`.

    Raises:
        ImatchError: an unknown name, or a number out of its range; see also `runs.start`.
    """
    source = runs.read(registry.resolve(index_step))
    if candidates < 1:
        raise ImatchError(f"candidates is {candidates}: match at least 1")
    matching.create(matcher, matcher_options)
    for output in outputs:
        sinks.create(output)
    chosen = {
        "model": model,
        "threshold": threshold,
        "confidence": confidence,
        "iterations": iterations,
        "min_inliers": min_inliers,
        "min_share": min_share,
    }
    _estimator(chosen, None)  # refuses bad values before anything is written
    within = source.folder.relative_to(source.folder.parents[3])  # <dataset>/<weight>/<configuration>/<direction>
    folder = source.folder.parents[4] / "04_match" / within.parent / f"{within.name}{_tagged(tag)}"
    parameters = {
        "candidates": candidates,
        "matcher": matcher,
        "matcher_options": dict(matcher_options),
        "geometry": chosen,
        "outputs": sorted(outputs),
    }
    return runs.start(
        folder, "04_match", parameters, {"index": str(source.fingerprint)}, {"index": source.folder}, on_change
    )


def match(step: Step, *, workers: int = -1) -> list[Row]:
    """Match every query with its candidates, those that are missing.

    A reference is also matched with its own source when that is not among the candidates (retrieved: false), so
    that the error of the geometry is known apart from the retrieval; such pairs take no part in re-ranking.

    Returns:
        One row a pair, by query and rank (by global vectors); `reranked` is its place after re-ranking, from 0.
        pairs/<query>/<rank>.json, .npy and .png hold each in full.
    """
    if not step.finished:
        job = _Match(step)
        todo = [q for q in range(len(job.query)) if not job.done(q).is_file()]
        for _ in runs.parallel(job, todo, workers, "match"):
            pass
        rows = [row for q in range(len(job.query)) for row in store.read_rows(job.done(q))]
        store.write_rows(step.folder / "pairs.jsonl", rows)
    return store.read_rows(step.folder / "pairs.jsonl")


def finish_match(step: Step, pairs: Sequence[Row]) -> dict[str, Any]:
    """Finish 04_match with its figures (`evaluate.match_metrics`)."""
    skipped = runs.read(step.linked("index")).metrics["queries_skipped"]
    return step.finish({"pairs": len(pairs), "queries_skipped": skipped, **evaluate.match_metrics(pairs)})


class _Match:
    """Matches one query with its candidates; every worker process opens the stores for itself."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self._open()

    def _open(self) -> None:
        index = runs.read(self.step.linked("index"))
        self.query, self.gallery = query_and_gallery(index)
        with np.load(index.folder / "hits.npz") as hits:
            self.rows, self.scores = hits["rows"], hits["scores"]
        self.answerable = answerable(index, self.query, self.gallery)
        self.same = self.query.folder == self.gallery.folder
        self.views = {side: _view_rows(index, side) for side in ("query", "gallery")}
        self.roots = {side: runs.read(index.linked(side)).linked("photographs") for side in ("query", "gallery")}
        parameters = self.step.parameters
        self.matcher = matching.create(parameters["matcher"], parameters["matcher_options"])
        self.sinks = [sinks.create(name) for name in parameters["outputs"]]
        self.row_that_shows = {shown: row for row, shown in reversed(list(enumerate(self.gallery.shows)))}

    def __getstate__(self) -> Step:
        return self.step

    def __setstate__(self, step: Step) -> None:
        self.step = step
        self._open()

    def done(self, q: int) -> Path:
        return self.step.folder / "pairs" / flat_name(self.query.ids[q]) / "pairs.jsonl"

    def __call__(self, q: int) -> None:
        wanted = [
            (int(row), float(score), rank)
            for rank, (row, score) in enumerate(zip(self.rows[q], self.scores[q], strict=True))
            if row >= 0
        ][: self.step.parameters["candidates"]]
        source = self.row_that_shows.get(self.query.shows[q])
        found = {self.gallery.shows[row] for row, _, _ in wanted}
        if source is not None and not self.same and self.query.shows[q] not in found:
            score = float(np.asarray(self.query.vectors[q]) @ np.asarray(self.gallery.vectors[source]))
            wanted.append((source, score, None))  # type: ignore[arg-type]
        pairs = [self._pair(q, row, score, rank) for row, score, rank in wanted]
        for place, row in enumerate(evaluate.rerank([pair.row for pair in pairs])):
            row["reranked"] = place
        for pair in pairs:
            name = "source" if pair.row["rank"] is None else f"{pair.row['rank']:02d}"
            for sink in self.sinks:
                sink(self.done(q).parent / name, pair)
        store.write_rows(self.done(q), (pair.row for pair in pairs))

    def _pair(self, q: int, row: int, score: float, rank: int | None) -> Pair:
        a, b = self.query.tokens(q), self.gallery.tokens(row)
        meta_a, meta_b = self.query.rows[q], self.gallery.rows[row]
        sizes = tuple(meta_a["size"]), tuple(meta_b["size"])
        matches = self.matcher(a, b)
        xy_a, xy_b = a.xy[matches.index_a], b.xy[matches.index_b]
        patch = None if b.grid is None else max(b.spacing)
        estimator = _estimator(self.step.parameters["geometry"], patch)
        found = estimator(xy_a, xy_b, *sizes)
        turned, scaled = (None, None)
        if found.matrix is not None and found.verified:
            turned, scaled = geometry.rotation_scale(found.matrix, sizes[0])
        view_a, view_b = (self.views[side].get(meta["id"]) for side, meta in (("query", meta_a), ("gallery", meta_b)))
        right = self.query.shows[q] == self.gallery.shows[row]
        truth = _truth(view_a, view_b) if right and (view_a or view_b) else None
        view = view_a or meta_a  # figures by angle and crop are about queries
        record = {
            "query": meta_a["id"],
            "candidate": meta_b["id"],
            "rank": rank,
            "reranked": None,
            "retrieved": rank is not None,
            "score": round(score, 6),
            "right": right,
            "answerable": bool(self.answerable[q]),
            "angle": view.get("angle"),
            "crop": view.get("crop"),
            "descriptors": [len(a.descriptors), len(b.descriptors)],
            "matches": len(matches),
            "inliers": int(found.inliers.sum()),
            "verified": found.verified,
            "reason": found.reason,
            "threshold": estimator.threshold,
            "matrix": None if found.matrix is None else found.matrix.tolist(),
            "rotation": turned,
            "scale": scaled,
            "reprojection_error": None if math.isnan(found.error) else found.error,
            "has_truth": truth is not None,
            "true_matrix": None if truth is None else truth.tolist(),
            "corner_error": None,
        }
        if truth is not None and found.matrix is not None:
            error = geometry.corner_error(found.matrix, truth, sizes[0])
            record["corner_error"] = error if math.isfinite(error) else None
        paths = self.roots["query"] / meta_a["id"], self.roots["gallery"] / meta_b["id"]
        return Pair(record, paths, sizes, xy_a, xy_b, matches, found)


def _estimator(chosen: Mapping[str, Any], patch: float | None) -> geometry.Estimator:
    """The geometry's estimator; what was left at 0 is chosen for keypoints (patch None) or for a grid."""
    threshold = chosen["threshold"] or (3.0 if patch is None else max(3.0, patch / 2))
    share = chosen["min_share"] or (0.1 if patch is None else 0.3)
    return geometry.Estimator(**{**chosen, "threshold": threshold, "min_share": share})


def _view_rows(index: Step, side: str) -> dict[str, Row]:
    return {row["id"]: row for row in _views(runs.read(index.linked(side)))}


def _truth(a: Row | None, b: Row | None) -> np.ndarray:
    """(3, 3) A -> B of two views of one photograph; None stands for the photograph itself."""
    into_a = np.eye(3) if a is None else np.array(a["matrix"])
    into_b = np.eye(3) if b is None else np.array(b["matrix"])
    return np.asarray(into_b @ np.linalg.inv(into_a))


# --- shared -----------------------------------------------------------------------------------------------


def flat_name(id: str) -> str:
    """An id as one file name: another for every id, and never too long for a file system.

    >>> flat_name("flight 1/a.jpg"), flat_name("flight 1__a.jpg")
    ('flight 1__a.jpg', 'flight 1__a.jpg~66900298')
    """
    name, data = id.replace("/", "__"), os.fsencode(id)
    if len(data) <= 160 and not any(twice in id for twice in ("__", "_/", "/_")):
        return name
    return f"{os.fsencode(name)[:140].decode(errors='ignore')}~{hashlib.sha256(data).hexdigest()[:8]}"


def _tagged(tag: str) -> str:
    return f"_{_named('tag', tag)}" if tag else ""


def _named(what: str, name: str) -> str:
    if not all(c.isalnum() or c in "-_.+" for c in name):
        raise ImatchError(f"{what} {name!r} becomes part of a folder's name: use letters, digits, '-', '_', '.', '+'")
    return name


def _place(step: Step) -> tuple[Path, str]:
    """<exports>/<run> and the data set's name, from where a step of 01 or 02 lies."""
    for folder in step.folder.parents:
        if folder.parent.name == step.name:
            return folder.parent.parent, folder.name
    raise StepError(f"{step.folder} does not lie under a folder {step.name}: move the exports as a whole")


def _csv(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\n') else text
