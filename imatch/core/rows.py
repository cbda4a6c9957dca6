"""The keys of what is written as JSON, for type checkers and editors: rows, figures and parameters of steps.

Pairs of numbers are tuples before they are written, and lists as they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""What a file of JSON can hold."""
Options = Mapping[str, Json]
"""Fields of a plug-in, by name."""
ReportRow = dict[str, Json]
"""A configuration in the table of 05_report (`steps.report.tabulate` says what each key is)."""


class Position(TypedDict):
    """Where a photograph was taken, and how the camera was held: degrees and metres (`exif.position`)."""

    latitude: float
    longitude: float
    altitude: float | None
    yaw: NotRequired[float]
    pitch: NotRequired[float]
    relative_altitude: NotRequired[float]


class About(TypedDict, total=False):
    """What a registry knows of a photograph; of a reference, what it was made from."""

    capture: str | None
    label: str | None
    frame: int | None
    source: str
    source_sha256: str


class PhotoRow(About):
    """Of images.jsonl (`Embeddings.rows` says what each is), and of skipped.jsonl: those have `skipped`, and a
    size, position, look and note where they could be decoded, and memory where that is what was wanting: a run that has
    more takes them; sha256 is None of a file that cannot be read. Imported ones have a name and a global_norm, and of
    references an angle and a crop."""

    id: str
    sha256: str
    size: NotRequired[tuple[int, int]]
    position: NotRequired[Position | None]
    doubt: NotRequired[str]
    look: NotRequired[str | None]
    note: NotRequired[str]
    skipped: NotRequired[str]
    memory: NotRequired[bool]
    grid: NotRequired[tuple[int, int] | None]
    xy: NotRequired[bool]
    shard: NotRequired[int]
    first: NotRequired[int]
    n: NotRequired[int]
    vector: NotRequired[str]
    name: NotRequired[str]
    global_norm: NotRequired[float]
    angle: NotRequired[float | None]
    crop: NotRequired[float | None]


class SeenRow(TypedDict):
    """Of seen.jsonl: what is known of a photograph's file; `stat` is its bytes and its time of change, None of one that
    is to be looked at again; `size` is the (h, w) of its header."""

    id: str
    stat: list[int] | None
    problem: str | None
    size: tuple[int, int] | None
    sha256: str | None


class ShardRow(TypedDict):
    """What an engine gets of a shard that was embedded: id -> why it was skipped, and where it was. Of one with
    photographs that could not be had just now, `passing`, nothing was written."""

    skipped: dict[str, str]
    passing: dict[str, str]
    device: str


class ReferenceRow(TypedDict):
    """Of references.jsonl (`steps.references.make_references` says what each is)."""

    id: str
    source: str
    source_sha256: str
    kind: str
    angle: float
    crop: float
    size: tuple[int, int]
    source_size: tuple[int, int]
    matrix: list[list[float]]
    scale: float
    covered: float
    mask: str | None


class QueryRow(TypedDict):
    """Of queries.jsonl (`steps.index.judge_index` says what each is)."""

    query: str
    cluster: str
    angle: float | None
    crop: float | None
    answers: int
    photograph: str
    embedded: bool
    right_ranks: list[int]
    score: float | None
    score_without: float | None
    metres: float | None
    least_metres: float | None
    accepted: NotRequired[bool]


class HitRow(TypedDict):
    """One hit of a query in results.json."""

    rank: int
    id: str
    path: str
    score: float
    right: bool
    accepted: bool
    metres: NotRequired[float]
    turn: NotRequired[float]


class AnswerRow(TypedDict):
    """A query in results.json, and in its own file."""

    query: str
    weight: str
    variant: str
    direction: str
    k: int
    accepted: bool
    hits: list[HitRow]
    timing_ms: dict[str, float]


class GeometryRecord(TypedDict):
    """What `types.Geometry.record` gives; steps of before there were kinds have less."""

    verified: bool
    reason: str
    kind: NotRequired[str]
    matrix: NotRequired[list[list[float]] | None]
    fundamental: NotRequired[list[list[float]] | None]
    pose: NotRequired[dict[str, list[list[float]] | list[float]] | None]
    reprojection_error: float | None


class QueryAbout(TypedDict):
    """Of the query of a pair; answerable, if it has a right answer that could be found."""

    answerable: bool
    cluster: str
    angle: float | None
    crop: float | None


class Measured(GeometryRecord):
    """The geometry of a pair, and how far that is from the true matrix, if known."""

    matches: int
    inliers: int
    rotation: float | None
    scale: float | None
    has_truth: bool
    true_matrix: list[list[float]] | None
    corner_error: float | None
    accuracy: list[float] | None
    rotation_error: float | None
    scale_error: float | None


class PairRow(QueryAbout, Measured):
    """Of pairs.jsonl. A query that found nothing has one row without candidate, weight, threshold, pose and look."""

    query: str
    candidate: str | None
    rank: int | None
    retrieved: bool
    score: float | None
    right: bool | None
    accepted: bool | None
    descriptors: list[int]
    turn: NotRequired[float]
    zoom: NotRequired[float]
    weight: str | None
    look: NotRequired[int]
    refined: bool
    threshold: float | None
    reranked: NotRequired[int | None]


class IntervalRecord(TypedDict):
    """What `intervals.Interval.record` gives."""

    value: float | None
    low: float | None
    high: float | None
    clusters: int
    why: str


class ThresholdRecord(TypedDict):
    """What `calibration.Threshold.record` gives."""

    value: float | None
    wanted: float
    precision: float | None
    coverage: float | None
    held_out_precision: float | None
    held_out_coverage: float | None
    why: str


class ViewFigures(IntervalRecord):
    """Hit@1 of a 03_index at one crop and angle."""

    crop: float
    angle: float
    unit: str


class RetrievalFigures(TypedDict):
    """Of a ranking; beside these hit_at_K, recall_at_K and precision_at_K for some K, map_at_k and mrr_at_k for its k
    (`metrics.retrieval_metrics`)."""

    k: int
    queries: int
    without_answer: int
    missed: int
    intervals: dict[str, IntervalRecord]
    by_view: list[ViewFigures]


class StageRow(TypedDict):
    """Of stages.json (`tables.stage_table` says what each is)."""

    stage: str
    hit_at_1: IntervalRecord
    map: IntervalRecord
    ms: float
    difference: IntervalRecord | None


class IndexFigures(TypedDict):
    """Of an index (`steps.index.tune_index` says what each is)."""

    kind: str
    asked: str
    options: Options
    reason: str
    vectors: int
    dimension: int
    bytes_a_vector: float
    estimated_bytes_a_vector: float
    shards: int
    backend: str
    effort: dict[str, str | int] | None
    wanted_recall: float
    recall: float
    k: int
    sample: int
    build_ms: float
    search_ms: float
    exact_ms: float
    curve: list[dict[str, float | None]]


class MatchRow(TypedDict):
    """A pair of `api.match`; keys as of `PairRow`."""

    query: str
    candidate: str
    verified: bool
    inliers: int
    matches: int
    rotation: float | None
    scale: float | None
    kind: str
    weight: str
    refined: bool
    reason: str


class PositionFigures(TypedDict):
    """How far hits lie from their queries (`truth.position_figures`)."""

    queries: int
    unknown: int
    top1_metres_median: float | None
    top1_metres_mean: float | None
    least_metres_median: float | None
    within: dict[str, float | None]
    within_top_k: dict[str, float | None]


class SearchFigures(RetrievalFigures):
    """Of a 03_index (`steps.index.index_metrics` says what each is); alarms by the notebook."""

    gallery: int
    dimension: int
    index: IndexFigures
    twins: int
    not_found: int
    queries_skipped: int
    chance: float | None
    threshold: ThresholdRecord
    stages: list[StageRow]
    positions: PositionFigures | None
    alarms: NotRequired[list[str]]


class PairFigures(TypedDict):
    """Of matched pairs, or a part of them by crop and angle (`metrics.match_metrics` says what each is)."""

    crop: NotRequired[float]
    angle: NotRequired[float]
    queries: int
    hit_at_1: float | None
    reranked_hit_at_1: float | None
    verified: float | None
    verified_right: float | None
    wrong_verified: float | None
    corner_error_median: float | None
    true_pairs: int
    true_corner_error_median: float | None
    true_within_8px: float | None
    corner_auc: dict[str, float | None]
    matching_accuracy: dict[str, float | None]
    inlier_ratio: float | None
    rotation_error_median: float | None
    scale_error_median: float | None
    intervals: dict[str, IntervalRecord]


class MatchFigures(PairFigures):
    """Of all pairs of a 04_match; from `pairs` on by `steps.match.match_metrics`, and labels by the notebook."""

    by_crop: list[PairFigures]
    by_view: list[PairFigures]
    pairs: NotRequired[int]
    pairs_verified: NotRequired[int]
    queries_skipped: NotRequired[int]
    labels: NotRequired[dict[str, float | None] | None]


class LookRecord(TypedDict):
    """How a 04_match looks at its pairs (`pairs.Look`)."""

    weight: str
    matcher: str
    matcher_options: Options
    poses: list[dict[str, float]]


class Parameters(TypedDict, total=False):
    """Of a step: the arguments of its `start_...`, and what they mean here."""

    dataset: str
    image_groups: list[Mapping[str, Json]]
    shard_size: int
    weight: str
    backbone: dict[str, Any]
    weights_digest: str
    resize: dict[str, Any]
    pixels: str
    cfg: str
    variant: str
    keep: str
    pose: dict[str, float]
    imported: bool
    files: str
    measured: str
    kind: str
    angles: list[float]
    crops: list[float]
    resize_to_original: bool
    file_type: str
    quality: int
    direction: str
    k: int
    index: dict[str, Any]
    ranking: dict[str, Any]
    truth: dict[str, Any]
    pairs: str
    one: str
    candidates: int
    estimators: str
    looks: list[LookRecord]
    matcher: str
    matcher_options: Options
    refine: str
    geometry: dict[str, Any]
    outputs: list[str]
