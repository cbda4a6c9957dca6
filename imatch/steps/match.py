"""04_match: each query against its best candidates, or the pairs of a list, 1:1."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import poselib

from imatch.core import compute, config, files, learned, settings
from imatch.core.compute import ComputeOptions, PartDoneError
from imatch.core.files import flat_name
from imatch.core.rows import MatchFigures, Measured, Options, PairRow, ReferenceRow
from imatch.core.step import Step, check_planned, open_step, side_folders, sides, start_step, tagged
from imatch.core.types import ImatchError, Pair, StepError
from imatch.data import store
from imatch.data.pairs import Look, Looked, Matched, pair_path
from imatch.data.rotations import poses
from imatch.data.store import open_poses
from imatch.evaluation import metrics
from imatch.export.outputs import Sink
from imatch.features.base import INVARIANT, create_backbone, matcher_for, named
from imatch.matching import geometry
from imatch.matching.align import Alignment, GeometryOptions, MatchingOptions, Tried, aligner, first_verified, refused
from imatch.matching.matchers import MATCHERS
from imatch.steps import groups
from imatch.steps.candidates import Candidate, Plan, Source, open_source, plan_pairs
from imatch.steps.chain import open_embeddings, open_finished
from imatch.steps.embedding import embed_by, embed_poses, step_by, worth_trying

if TYPE_CHECKING:
    from ipywidgets import HTML

    from imatch.viz.explorer import Explorer

BLOCK = 64
"""Candidates of a query that one worker matches at a time: what a kill loses at most."""
MANY, SAMPLE = 1000, 8
"""From how many pairs on it is looked whether they fit, and how many are matched to see."""
ROW = 4096
"""Bytes of memory that the row of a pair takes, in Python."""


def start_match(
    index_step: str = "",
    *,
    candidates: int = 3,
    pairs: str = "",
    embed_step: str = "",
    gallery_step: str = "",
    matching: MatchingOptions = MatchingOptions(),
    geometry: GeometryOptions = GeometryOptions(),
    outputs: Sequence[str] = ("json", "npy", "png"),
    tag: str = "",
    on_change: str = "refuse",
) -> Step:
    """Start 04_match: each query of a 03_index against its best candidates, 1:1, or the pairs of a list.

    Args:
        index_step, candidates: folder of a finished 03_index, and how many of each query's hits are matched.
        pairs: "" is what 03_index found. A list: "all" (each pair once), "ordered" (a with b and b with a), "one:ID"
            (one photograph against all others), or the path of a CSV with columns query and candidate
            (`candidates.read_pairs`).
        embed_step: of a list, folder of the finished 01_embed that its queries come from.
        gallery_step: folder of another 01_embed, made with the same backbone at the same size, or of the 02_references
            made from `embed_step`, that its candidates come from ("all" and "ordered" are then every query against
            every candidate); "" is `embed_step` itself.
        matching, geometry: how descriptors find each other, and what they must agree on.
        outputs: names of `match.OUTPUTS`.
        tag, on_change: as in `start_embed`.

    Raises:
        StepError: a side kept no local descriptors, or no positions of them.
        ImatchError: an unknown name or photograph; see also `step.start_step`.
    """
    planned = plan_pairs(index_step, candidates, pairs, embed_step, gallery_step)
    for side in (planned.query, planned.gallery):
        store.check_keeps(side.folder, side.parameters, "04_match")
    own = planned.query.parameters["weight"]
    weights, lacking = _weights(matching.weight, planned)
    matcher, matcher_options = matcher_for(weights[0], matching.matcher), _on_cpu(matching.options)
    if lacking:
        print(lacking)
    groups.check({"outputs": list(outputs)})
    parameters = {
        **planned.parameters,
        "estimators": f"PoseLib {poselib.__version__}",  # pairs of an older geometry are not mixed with these
        "refine": matching.refine,
        "geometry": dataclasses.asdict(geometry),
        "outputs": sorted(outputs),
    }
    fixed = weights[0] not in INVARIANT and not planned.query.parameters.get("imported")
    tries = poses(matching.rotations or (4 if fixed else 1), matching.zooms)
    looks = [Look(weights[0], matcher, matcher_options, worth_trying(planned.query, tries, weights[0]))]
    looks += [Look(weight, matcher_for(weight), {}, poses(4)) for weight in weights[1:]]
    parameters["looks"] = [look.record for look in looks]
    aligner({**parameters, "matcher": matcher, "matcher_options": matcher_options}, None)  # refuses bad values now
    links, upstream = dict(planned.links), dict(planned.upstream)
    for weight in {*weights} - {own}:
        data_key = planned.query.linked("data_key") if "data_key" in planned.query.links else settings.DATA_KEY
        parameters[f"{weight}_digest"] = create_backbone(weight, data_key=str(data_key)).digest
        for name, side in (("query", planned.query), ("gallery", planned.gallery)):
            links[f"{name}_{weight}"] = there = step_by(side, weight)
            if there.parent != side.folder.parent:
                upstream[f"{name}_{weight}"] = str(open_step(there).fingerprint)
    by = f"_{matching.weight}" if matching.weight not in ("", own) else ""
    about = {**planned.about, "question": f"{planned.about['question']}{by}{tagged(tag)}"}
    return start_step(planned.run, "04_match", about, parameters, upstream, links, on_change)


def check_matching(weight: str, data_key: str, matching: MatchingOptions) -> None:
    """Refuse what pairs cannot be matched by. Arguments as of `start_embed` and `start_match`.

    >>> check_matching("sift", settings.DATA_KEY, MatchingOptions(matcher="mutual", options={"k": 2}))
    """
    by = weight.rpartition("/")[2] if matching.weight in ("", "auto") else matching.weight
    if by == matching.weight:
        named(by, {}, "", data_key)
    config.create(MATCHERS, "matcher", matcher_for(by, matching.matcher), _on_cpu(matching.options), make=False)


def _on_cpu(options: Options) -> Options:
    """The options of a matcher without its device, which has to be the CPU."""
    if (device := options.get("device", "cpu")) != "cpu":
        raise ImatchError(
            f"matching.options.device is {device}, but lists of pairs are matched on the CPU: leave it out"
        )
    return {name: value for name, value in options.items() if name != "device"}


def _weights(weight: str, planned: Plan) -> tuple[list[str], str]:
    """The backbones that pairs are matched by, and what "auto" lacks ("" if nothing)."""
    own = planned.query.parameters["weight"]
    weights = {"": [own], "auto": [own, *({"xfeat"} - {own})]}.get(weight, [weight])
    imported = [side.folder for side in (planned.query, planned.gallery) if side.parameters.get("imported")]
    lacking = f"{imported[0]} was imported without its photographs" if imported else learned.lacking()
    if weights == [own] or not (lacking and (imported or "xfeat" in weights)):
        return weights, ""
    if weight != "auto":
        raise StepError(f"matching.weight is {weight}, but {lacking}")
    return [own], f"{own} only; {lacking}"


def match_pairs(step: Step, resources: ComputeOptions = ComputeOptions()) -> list[PairRow]:
    """Match every query with its candidates, those that are missing.

    Of a 03_index, a reference is also matched with its own source when that is not among the candidates (retrieved:
    false; no part of re-ranking), so that the error of the geometry is known apart from the retrieval.

    Args:
        step: of `start_match`.
        resources: who does the work; `workers` are processes that match, and threads that decode where queries are
            embedded in other poses, or both sides by another weight.

    Returns:
        One row a pair, by query and rank (by global vectors); `reranked` is its place after re-ranking, from 0.
        pairs/<query>/<rank>.json, .npy and .png hold each in full. A query in which the backbone found nothing has one
        row without a candidate. Where nobody knows whether a pair is right, as of a list, `right` is None.

    Raises:
        ImatchError: there are so many pairs that they cannot fit onto the disk or into memory.
        PartDoneError: see `compute.do`.
    """
    with files.alone(step.folder, resources.shard):
        if not step.finished:
            _match_missing(step, resources)
    return files.read_rows(step.folder / "pairs.jsonl")


def _match_missing(step: Step, resources: ComputeOptions) -> None:
    job = _Match(step)
    _check_memory(job.source)
    _embed_looks(step, job.source, resources)
    blocks = list(_blocks(job.source))
    files.check_apart(step.folder, job.source.query.ids)
    _check_fits(job, [block for block in blocks if not job.is_done(block)])
    work, cores = compute.Each(job, job.is_done, resources.workers, "match"), ["cpu"] * settings.cores()
    for _ in compute.do(resources.machines, work, blocks, cores):
        pass
    files.write_rows(step.folder / "pairs.jsonl", _ranked(job, blocks))
    for name, sink in zip(step.parameters["outputs"], job.sinks, strict=True):
        rows = (row for row in files.read_rows(step.folder / "pairs.jsonl") if row["candidate"] is not None)
        sink.gather(step.folder / name, ((pair_path(step.folder, row), row) for row in rows))


def match_metrics(step: Step, pairs: Sequence[PairRow]) -> MatchFigures:
    """The figures of 04_match (`metrics.match_metrics`); counted apart: photographs that could not be decoded."""
    source = open_source(step)
    return {
        "pairs": sum(row["candidate"] is not None for row in pairs),
        "pairs_verified": sum(row["verified"] for row in pairs),
        "queries_skipped": source.skipped,
        **metrics.match_metrics(pairs, source.unit),
    }


def _looks(step: Step) -> list[Look]:
    return [Look.of(record) for record in step.parameters["looks"]]


def _open_looks(step: Step) -> list[Looked]:
    found = []
    for look in _looks(step):
        query, gallery = open_embeddings(step, look.weight)
        settings = {**step.parameters, "matcher": look.matcher, "matcher_options": look.matcher_options}
        found.append(Looked(look, settings, open_poses(query, look.poses), gallery))
    return found


def _embed_looks(step: Step, source: Source, resources: ComputeOptions) -> None:
    """Embed what is missing of the tokens of each look, in each pose."""
    late: PartDoneError | None = None
    for look in _looks(step):
        folders = side_folders(step, look.weight)
        for side, folder in zip((source.query, source.gallery), folders, strict=True):
            if folder != side.folder:
                try:
                    embed_by(side, folder, look.weight, resources, on_change=step.on_change)
                except PartDoneError as part:  # this part of the others can be done all the same
                    late = part
        if not late:
            embed_poses(open_finished(folders[0]), look.poses, resources, on_change=step.on_change)
    if late:
        raise late


def labels_path(step: Step) -> Path:
    """Where the labels of a 04_match are, or will be: <exports>/<run>/labels/<dataset>.csv, of references with their
    kind, such as <dataset>_isometric.csv."""
    kinds = sorted({side.about["kind"] for side in sides(step) if "kind" in side.about})
    return step.run / "labels" / f"{files.short_name('_'.join([step.about['dataset'], *kinds]))}.csv"


def open_match(step: Step) -> Matched:
    """Open a 04_match: its pairs, the tokens that they were matched by, and where people's labels of them lie."""
    looked = {one.look.weight: one for one in _open_looks(step)}
    pages = Path(step.run, "pages", *step.about.values())
    return Matched(step.folder, *open_embeddings(step), looked, labels_path(step), pages)


def browse(step: Step | Mapping[str, Step]) -> Explorer | HTML:
    """Explore the matches of a finished 04_match, or of several by name.

    Returns:
        The widget; of no step, a line that says so. It needs no model but to match photographs that are uploaded.
    """
    from ipywidgets import HTML

    from imatch.viz.explorer import Explorer

    steps = {step.folder.name: step} if isinstance(step, Step) else step
    if not steps:
        return HTML("Nothing was matched 1:1, so there is nothing to explore: run 04_match.")
    return Explorer(list(steps), lambda name: open_match(steps[name]))


class _Block(NamedTuple):
    """Candidates `first` up to `end` of a query: what is matched, and gone on with, as one."""

    query: int
    first: int
    end: int


def _blocks(source: Source) -> Iterator[_Block]:
    for q in range(len(source.query)):
        n = source.count(q)
        yield from (_Block(q, first, min(first + BLOCK, n)) for first in range(0, n, BLOCK))


def _ranked(job: _Match, blocks: Sequence[_Block]) -> Iterator[PairRow]:
    for _, of_query in itertools.groupby(blocks, lambda block: block.query):
        rows = [{**row, "reranked": None} for block in of_query for row in job.rows(block)]
        for place, row in enumerate(metrics.rerank(rows)):
            row["reranked"] = place
        yield from rows
    yield from job.source.unmatched


def _check_memory(source: Source) -> None:
    """Refuse more pairs than rows fit into memory, before anything is computed."""
    pairs = sum(source.count(q) for q in range(len(source.query)))
    wanted, free = ROW * pairs / 2**30, compute.free_memory() / 2**30
    if wanted > free:
        raise ImatchError(
            f"{pairs} pairs take about {wanted:.1f} GB of memory, and {free:.1f} GB are free: give a CSV of fewer pairs"
        )


def _check_fits(job: _Match, todo: Sequence[_Block]) -> None:
    """Say how many pairs there are; of many, match some to see what they take, and refuse what cannot fit."""
    pairs, folder = sum(block.end - block.first for block in todo), job.step.folder
    print("\n".join([*job.source.said, f"{pairs} pairs to match"]))
    if pairs < MANY:
        return
    taken: Counter[str] = Counter()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as elsewhere:
        for i in np.linspace(0, len(todo) - 1, SAMPLE).astype(int):
            candidates = job.candidates(todo[i])
            pair = job.pair(todo[i].query, candidates[len(candidates) // 2])
            job.write(Path(elsewhere) / str(i), pair)
            taken["rows"] += 2 * len(files.line(pair.row))  # in the query's folder and in pairs.jsonl
        for path in Path(elsewhere).iterdir():
            taken[path.suffix[1:]] += path.stat().st_size
    hours = (time.perf_counter() - start) / SAMPLE * pairs / 3600
    gb = {name: size / SAMPLE * pairs / 2**30 for name, size in sorted(taken.items())}
    wanted, free = sum(gb.values()), shutil.disk_usage(folder).free / 2**30
    by_output, memory = ", ".join(f"{name} {size:.1f}" for name, size in gb.items()), ROW * pairs / 2**30
    print(f"about {wanted:.1f} GB ({by_output}), {memory:.1f} GB of memory, {hours:.1f} h on one core")
    if wanted > free:
        raise ImatchError(
            f"{pairs} pairs take about {wanted:.1f} GB of disk, and {free:.1f} GB are free for {folder}: "
            "give a CSV of fewer pairs, fewer outputs, such as npy alone, or another disk for exports"
        )


@dataclass(frozen=True)
class _Match:
    """Matches a query with a block of its candidates; every process opens the stores for itself."""

    step: Step

    def __reduce__(self) -> tuple[type[_Match], tuple[Step]]:
        return _Match, (self.step,)

    @cached_property
    def source(self) -> Source:
        return open_source(self.step)

    @cached_property
    def looked(self) -> list[Looked]:
        return _open_looks(self.step)

    @cached_property
    def sinks(self) -> list[Sink]:
        return [create_output(name) for name in self.step.parameters["outputs"]]

    def done(self, block: _Block) -> Path:
        """The file that is there when a block is matched."""
        query = self.source.query.ids[block.query]
        return self.step.folder / "pairs" / flat_name(query) / f"{block.first:05d}.jsonl"

    def is_done(self, block: _Block) -> bool:
        return self.done(block).is_file()

    def rows(self, block: _Block) -> list[PairRow]:
        path = self.done(block)
        rows = files.read_rows(path, "delete it and run the same again")
        check_planned(path, len(rows), block.end - block.first)
        return rows

    def candidates(self, block: _Block) -> list[Candidate]:
        return self.source.candidates(block.query)[block.first : block.end]

    def __call__(self, block: _Block) -> dict[str, int]:
        rows = []
        for candidate in self.candidates(block):
            pair = self.pair(block.query, candidate)
            self.write(pair_path(self.step.folder, pair.row), pair)
            rows.append(pair.row)
        files.write_rows(self.done(block), rows)
        return {"pairs": len(rows)}

    def write(self, path: Path, pair: Pair) -> None:
        for sink in self.sinks:
            sink(path, pair)

    def pair(self, q: int, candidate: Candidate) -> Pair:
        query, gallery = self.source.query, self.source.gallery
        meta_a, meta_b = query.rows[q], gallery.rows[candidate.row]
        sizes = tuple(meta_a["size"]), tuple(meta_b["size"])
        paths = query.root / meta_a["id"], gallery.root / meta_b["id"]
        start = time.perf_counter()
        looks = ((looked, *looked(meta_a["id"], meta_b["id"])) for looked in self.looked)
        tried = first_verified(Tried.by(*look, sizes, paths) for look in looks)
        ms = 1000 * (time.perf_counter() - start)
        found, looked, kept = tried.found, tried.looked, [len(tried.a.xy), len(tried.b.xy)]
        most = looked.posed.upright.parameters["backbone"].get("max_keypoints")
        if most in kept and not (found.geometry.verified or found.geometry.kind):
            more = f"{most} keypoints were kept, the most: try backbone_options max_keypoints {2 * most}"
            found = refused(found, f"{found.geometry.reason}; {more}")
        view_a, view_b = query.views.get(meta_a["id"]), gallery.views.get(meta_b["id"])
        same = query.shows[q] == gallery.shows[candidate.row]
        truth = _truth(view_a, view_b) if same and (view_a or view_b) else None
        row = {
            "query": meta_a["id"],
            "candidate": meta_b["id"],
            "rank": candidate.rank,
            "retrieved": candidate.rank is not None,
            "score": round(candidate.score, 6),
            "right": candidate.right,
            "accepted": candidate.accepted,
            **self.source.about(q),
            "descriptors": kept,
            **dataclasses.asdict(found.pose),
            "weight": looked.look.weight,
            "look": self.looked.index(looked),
            "refined": found.compared,
            "threshold": tried.align.estimator.threshold,
            **_judged(found, sizes[0], truth),
        }
        return replace(tried, found=found).pair(row, round(ms, 3))


def _judged(found: Alignment, size: tuple[int, int], truth: np.ndarray | None) -> Measured:
    """What was found, and how far it is from the true matrix where that is known."""
    explained, wanted = found.geometry, None if truth is None else geometry.rotation_scale(truth, size)
    turned, scaled = (None, None)
    if explained.matrix is not None and explained.verified:
        turned, scaled = geometry.rotation_scale(explained.matrix, size)
    row = {
        "matches": len(found.matches),
        "inliers": int(explained.inliers.sum()),
        **explained.record(),
        "rotation": turned,
        "scale": scaled,
        "has_truth": truth is not None,
        **dict.fromkeys(["true_matrix", "corner_error", "accuracy", "rotation_error", "scale_error"]),
    }
    if truth is not None:
        row["true_matrix"] = truth.tolist()
        row["accuracy"] = geometry.matching_accuracy(found.xy_a, found.xy_b, truth, metrics.ACCURACY)
        if explained.matrix is not None:
            error = geometry.corner_error(explained.matrix, truth, size)
            row["corner_error"] = error if math.isfinite(error) else None
    if wanted and turned is not None and scaled:
        row["rotation_error"] = geometry.turned_apart(turned, wanted[0])
        row["scale_error"] = max(scaled / wanted[1], wanted[1] / scaled) - 1
    return row


def _truth(a: ReferenceRow | None, b: ReferenceRow | None) -> np.ndarray:
    """(3, 3) A -> B of two views of one photograph; None stands for the photograph itself."""
    into_a = np.eye(3) if a is None else np.array(a["matrix"])
    into_b = np.eye(3) if b is None else np.array(b["matrix"])
    return np.asarray(into_b @ np.linalg.inv(into_a))


OUTPUTS = {
    "colmap": "imatch.export.colmap:Colmap",
    "csv": "imatch.export.outputs:Csv",
    "json": "imatch.export.outputs:Json",
    "npy": "imatch.export.outputs:Npy",
    "png": "imatch.viz.pictures:Png",
}


def create_output(sink: str) -> Sink:
    """Make a sink.

    Raises:
        ImatchError: unknown sink, with the nearest known one.
    """
    made: Sink = config.create(OUTPUTS, "output", sink)
    return made
