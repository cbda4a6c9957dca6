"""05_report: any number of finished runs in one table, and on one page that opens without a kernel."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imatch.core import config, files
from imatch.core.rows import Json, PairRow, QueryRow, ReportRow
from imatch.core.step import Step, open_step, run_folder, start_step, step_folder
from imatch.core.types import ImatchError, StepError
from imatch.data import store
from imatch.evaluation import intervals, verdicts
from imatch.evaluation.calibration import Threshold
from imatch.steps.chain import steps_below
from imatch.steps.match import labels_path

COLUMNS = {
    "weight": ("weight", ""),
    "size": ("size", ""),
    "pooling": ("pooling", ""),
    "variant": ("variant", ""),
    "queries": ("queries", ""),
    "hit_at_1": ("Hit@1", "how often the first hit is right; a query that a backbone could not embed counts as missed"),
    "low": ("from", "and to: 95 % interval, by resampling whole photographs (or captures)"),
    "high": ("to", ""),
    "place": ("place", "as good: its paired interval to the best holds 0; not told apart: there is no interval"),
    "apart": (
        "against the best",
        "Hit@1 minus that of the best, paired on the same queries; of the best, minus that of the next",
    ),
    "apart_low": ("from", ""),
    "apart_high": ("to", ""),
    "recall": ("Recall@K", "share of all right answers among the first K hits"),
    "map": ("mAP", ""),
    "reranked_hit_at_1": ("re-ranked Hit@1", "after 1:1 matching, verified candidates first"),
    "pixels": ("median px", "corner error of references against their own photograph, failures included"),
    "auc_5": ("AUC@5 px", "area under the curve of corner errors up to 5 px"),
    "rotation": ("rotation off by", "median error of the estimated rotation in degrees"),
    "metres": ("median m", "metres from the query to its first hit"),
    "coverage": ("believed", "share of answerable queries whose first hit passes the threshold of 'no match'"),
    "held_out_precision": ("right of them", "precision on photographs that the threshold was not calibrated on"),
    "ms": ("ms", "milliseconds a photograph from file to stored tokens, on the device named above"),
    "megabytes": ("MB", "megabytes a photograph on disk"),
    "labelled": ("labelled", "pairs that people accepted or rejected in the explorer"),
    "label_precision": (
        "accepted of verified",
        "share of labelled pairs that geometry verifies which people accept",
    ),
    "label_recall": ("verified of accepted", "share of pairs that people accept which geometry verifies"),
    "alarms": ("alarms", ""),
}
"""Columns of the table, what they are called and, where that does not say it, what they mean."""
STEPS = ("01_embed", "02_references", "queries", "03_index", "04_match")
"""Where the numbers of a row come from, as `chain` names it."""
COSTS = ("ms", "megabytes", "rotation", "pixels", "metres")
"""Columns of any magnitude, shown to three digits."""
COMPARED = ("values", "clusters", "parts", "queried", "unit")
"""What rows hold to be compared by, and no file needs."""
PICTURES = {
    "time.png": (
        "Hit@1 against milliseconds a photograph, in brackets both; bars are 95 % intervals. Nobody is better and "
        "cheaper than those that are filled and joined.",
        ("01_embed", "03_index"),
    ),
    "disk.png": ("Hit@1 against megabytes a photograph, likewise.", ("01_embed", "03_index")),
    "angles.png": ("Hit@1 by the rotation and the crop of the reference; bars are 95 % intervals.", ("03_index",)),
    "trust.png": (
        "Left: how much is found among the first K hits; shaded are 95 % intervals. Middle and right: each query is "
        "asked as it is and once more with its answers left out of the gallery, when nothing that it finds is right. "
        "First hits are believed from some score on: a lower one believes more right hits and more wrong ones.",
        ("03_index",),
    ),
    "metres.png": (
        "Share of queries whose hit was taken within so many metres; hits of unknown position are within none.",
        ("03_index",),
    ),
    "errors.png": (
        "Errors of the estimated geometry where the true matrix is known. Above: share of pairs below an error; a "
        "curve ends below 1 by the share of pairs without a geometry (rotation and scale: without a verified one); "
        "shaded are 95 % intervals. Below: medians by the rotation of the reference; a line breaks where more than "
        "half failed.",
        ("04_match",),
    ),
}
"""The pictures of the page in its order: how to read each, and which steps it is drawn from."""


def start_report(steps: Sequence[str], *, run: str, tag: str = "", on_change: str = "recompute") -> Step:
    """Start 05_report on finished runs, in EXPORT_ROOT.

    Args:
        steps: folders of finished 04_match (or 03_index) steps, or folders that hold some, such as exports/demo.
        run: the report goes to its folder.
        tag: the name of this report; "" is "all".
        on_change: as in `start_embed`.

    Raises:
        ImatchError: there is no finished step; see also `step.start_step`.
    """
    home, about = run_folder(run), {"tag": config.folder_name(tag, "tag") if tag else "all"}
    found: dict[str, Step] = {}
    for given in steps:
        folder = step_folder(given)
        inside = _finished(folder)
        if not inside:
            raise ImatchError(f"no finished 04_match or 03_index in {folder}: run them first, or correct the path")
        for step in inside:
            name = files.relative(step.folder, step.run.parent)
            if found.setdefault(name, step).folder != step.folder:
                raise ImatchError(f"{step.folder} and {found[name].folder} would have one name: give them another run")
    if not found:
        raise ImatchError("steps is empty: give folders of finished runs, such as exports/demo")
    links = {name: found[name].folder for name in sorted(found)}
    upstream = {name: str(found[name].fingerprint) for name in links}
    measured = {name: [_measured(step) for step in chain(found[name]).values()] for name in links}
    return start_step(home, "05_report", about, {"measured": files.digest(measured)}, upstream, links, on_change)


def _measured(step: Step) -> list[Json]:
    """What a report shows of a step and its fingerprint does not hold."""
    return [step.work, step.device, step.metrics, _said(step)]


def _said(step: Step) -> dict[str, float | None] | None:
    """What people's labels say of a 04_match."""
    if step.name != "04_match":
        return None
    pairs = files.read_rows(step.folder / "pairs.jsonl")
    return verdicts.label_metrics(pairs, verdicts.read(labels_path(step)))


def _finished(folder: Path) -> list[Step]:
    """The finished 04_match steps in a folder, and the 03_index steps that none of them goes on from."""
    marked = (path for path in steps_below(folder) if (path / "metrics.json").is_file())
    read = [open_step(path, finished=False) for path in marked]
    read = [step for step in read if step.name in ("03_index", "04_match") and _whole(step)]
    matched = [step for step in read if step.name == "04_match"]
    below = {step.linked("index") for step in matched}
    return matched + [step for step in read if step.name == "03_index" and step.folder not in below]


def _whole(step: Step) -> bool:
    """Whether all that a step was made from is there still; says so if not."""
    try:
        chain(open_step(step.folder))
    except StepError as error:
        print(f"left out: {step.folder}, for {error}")
        return False
    return True


def chain(step: Step) -> dict[str, Step]:
    """The steps that a 04_match or 03_index was made from, and itself, by name of the notebook: 01_embed, ... .

    "01_embed" is that of the photographs that were searched, "queries" the step of embeddings that searched them.

    Raises:
        StepError: one is not there, or a 04_match went on from none: it matched a list of pairs.
    """
    if step.name == "04_match" and "index" not in step.links:
        raise StepError("it matched a list of pairs, so nothing was retrieved")
    index = open_step(step.linked("index")) if step.name == "04_match" else step
    query, gallery = (open_step(index.linked(side)) for side in ("query", "gallery"))
    embed = next((side for side in (gallery, query) if side.name == "01_embed"), None)
    embed = embed or open_step(gallery.linked("embed"))
    named = {"01_embed": embed, "03_index": index, "queries": query}
    named |= {side.name: side for side in (gallery, query) if side.name == "02_references"}
    return {**named, step.name: step}


def tabulate(step: Step) -> list[ReportRow]:
    """One row a configuration: what it found, how exactly, and what it costs.

    Configurations answer the same question when they have the same photographs, references, direction and truth; in
    each question every one is compared with the best by Hit@1 on the same queries (`intervals.paired_difference`). A
    query for which a configuration has no vector, or whose answer it could not embed, is missed. The best of many is a
    little lucky: read the intervals.

    Returns:
        Rows by question, best first: `name` (of the step in `step.links`), `label` (a short one), `question`, the keys
        of `COLUMNS`, `k`, `device`, `fingerprints` of all steps behind it, `why` where an interval is missing.
    """
    rows = [_row(name, chain(open_step(step.linked(name)))) for name in step.links]
    for row, label in zip(rows, _labels(rows), strict=True):
        row["label"] = label
    asked: dict[tuple[str, str], list[ReportRow]] = {}
    for row in rows:
        asked.setdefault((row["question"], row["asks"]), []).append(row)
    questions = [question for question, _ in asked]
    for (question, asks), group in asked.items():
        for row in group:
            row["question"] = question if questions.count(question) == 1 else f"{question} ({asks[:8]})"
        _count(group)
        group.sort(key=lambda row: (-(row["hit_at_1"] or 0), row["ms"] or 0, row["name"]))
        _compare(group)
    return [row for question in sorted(asked) for row in asked[question]]


def _row(name: str, steps: Mapping[str, Step]) -> ReportRow:
    embed, index = steps["01_embed"], steps["03_index"]
    found, parameters, asked = index.metrics, embed.parameters, index.parameters
    matched = steps["04_match"].metrics if "04_match" in steps else {}
    said = (_said(steps["04_match"]) if "04_match" in steps else None) or {}
    vectors = embed.metrics["global_dimension"] * 4 / 2**20
    work, k = embed.work, asked["k"]
    last = steps.get("04_match", index)
    dataset, (direction, _, kind) = last.about["dataset"], last.about["question"].partition("_")
    about = {
        "weight": last.about["weight"],
        "size": parameters["cfg"],
        "pooling": parameters["backbone"].get("pooling", "vlad"),
        "variant": store.variant_of(parameters),
    }
    truth = asked["truth"]["kind"] + (f" of {asked['truth']['radius']:g} m" if asked["truth"]["radius"] else "")
    return {
        "name": name,
        "question": f"{dataset}, {direction}{kind and f' ({kind})'}: right answers by {truth}",
        "asks": _asks(steps),
        "parts": {**about, "kind": kind, "direction": direction, "dataset": dataset, "run": last.run.name},
        **about,
        "recall": found[f"recall_at_{k}"],
        "k": k,
        "map": found[f"map_at_{k}"],
        "reranked_hit_at_1": matched.get("reranked_hit_at_1"),
        "pixels": matched.get("true_corner_error_median"),
        "auc_5": matched["corner_auc"]["5"] if matched else None,
        "rotation": matched.get("rotation_error_median"),
        "metres": found["positions"] and found["positions"]["top1_metres_median"],
        "coverage": found["threshold"]["coverage"],
        "held_out_precision": found["threshold"]["held_out_precision"],
        "ms": 1000 * work["seconds"] / work["photographs"] if work else None,
        "megabytes": embed.metrics["local_megabytes"] / embed.metrics["photographs"] + vectors,
        "device": embed.device,
        "labelled": said.get("labelled"),
        "label_precision": said.get("precision"),
        "label_recall": said.get("recall"),
        "alarms": len(found["alarms"]) if "alarms" in found else None,  # None: nobody has asked
        "said": found.get("alarms", []),
        "fingerprints": {of: str(steps[of].fingerprint) for of in sorted(steps)},
        "unit": f"{asked['truth']['cluster']}s",
        "queried": {row["query"]: row for row in files.read_rows(index.folder / "queries.jsonl")},
    }


def _asks(steps: Mapping[str, Step]) -> str:
    index = steps["03_index"]
    sides = []
    for side in ("query", "gallery"):
        step = open_step(index.linked(side))
        photographs = open_step(step.linked("embed")) if "embed" in step.links else step
        views = open_step(step.linked("views")).fingerprint if "views" in step.links else None
        sides.append([photographs.metrics["photographs_digest"], views, step.name])
    asked = {name: value for name, value in index.parameters["truth"].items() if name != "precision"}
    return files.digest([sides, asked, index.upstream.get("labels")])


def _count(rows: Sequence[ReportRow]) -> None:
    """Fill in Hit@1, over all queries that some configuration of the question can answer."""
    clusters = {id: one["cluster"] for row in rows for id, one in row["queried"].items() if one["answers"]}
    for row in rows:
        right = {id for id, one in row["queried"].items() if 0 in one["right_ranks"]}
        row["values"] = {id: float(id in right) for id in clusters}
        hit = intervals.interval([*row["values"].values()], [*clusters.values()], unit=row["unit"])
        row |= {"clusters": clusters, "queries": len(clusters), "hit_at_1": hit.value}
        row |= {"low": hit.low, "high": hit.high, "why": hit.why}


def _compare(rows: Sequence[ReportRow]) -> None:
    """Fill in place and distance to the best of one question; rows are best first."""
    best = rows[0]
    for row in rows:
        row |= {"place": "best", "apart": None, "apart_low": None, "apart_high": None}
        other = row if row is not best else rows[1] if len(rows) > 1 else None
        if best["hit_at_1"] is None:
            row["place"] = "nothing to count"
        elif other is not None:
            apart = intervals.paired_difference(best["values"], other["values"], best["clusters"], unit=row["unit"])
            sign = 1 if row is best else -1
            low, high = (None, None) if apart.low is None else sorted((sign * apart.low, sign * apart.high))
            row |= {"apart": sign * apart.value + 0.0, "apart_low": low, "apart_high": high}
            if row is not best:
                row["place"] = "not told apart" if low is None else "as good" if low <= 0 <= high else "worse"


@dataclass(frozen=True)
class Found:
    """What the configurations of a report found, by their short names.

    Attributes:
        metrics: of 03_index.
        thresholds: from which score on it believes a first hit.
        queries: rows of its queries.jsonl.
        pairs: rows of pairs.jsonl whose true matrix is known, of configurations that 04_match went on with.
        k: the least of their numbers of hits.
    """

    metrics: dict[str, dict[str, Any]]
    thresholds: dict[str, Threshold]
    queries: dict[str, list[QueryRow]]
    pairs: dict[str, list[PairRow]]
    k: int


def gather(step: Step, rows: Sequence[ReportRow]) -> Found:
    """What the figures of a report are drawn from.

    Args:
        step: a started 05_report.
        rows: of `tabulate`.
    """
    found = {row["label"]: open_step(step.linked(row["name"])) for row in rows}
    index = {name: chain(one)["03_index"].metrics for name, one in found.items()}
    pairs = {name: one.folder / "pairs.jsonl" for name, one in found.items() if one.name == "04_match"}
    return Found(
        index,
        {name: Threshold(**figures["threshold"]) for name, figures in index.items()},
        {row["label"]: [*row["queried"].values()] for row in rows},
        {name: [row for row in files.read_rows(path) if row["has_truth"]] for name, path in pairs.items()},
        min(row["k"] for row in rows),
    )


def matched(step: Step, rows: Sequence[ReportRow]) -> dict[str, Step]:
    """The 04_match steps of a report by the short names of their configurations, for `match.browse`.

    Args:
        step: a started 05_report.
        rows: of `tabulate`.
    """
    read = {row["label"]: open_step(step.linked(row["name"])) for row in rows}
    return {name: one for name, one in read.items() if one.name == "04_match"}


def _labels(rows: Sequence[ReportRow]) -> list[str]:
    """Names as short as they can be: of weight, size, pooling, variant, ... what is not the same in all rows."""
    parts = ("weight", "size", "pooling", "variant", "kind", "direction", "dataset", "run")
    differ = [part for part in parts if len({row["parts"][part] for row in rows}) > 1]
    labels = [" ".join(row["parts"][part] for part in differ or parts[:1]) for row in rows]
    return labels if len({*labels}) == len(labels) else [row["name"] for row in rows]


def write(step: Step, rows: Sequence[ReportRow]) -> Path:
    """Write table.csv, table.json and report.html, which holds all pictures in itself.

    Args:
        step: a started 05_report.
        rows: of `tabulate`. Those of `PICTURES` that could be drawn lie in the step's folder.

    Returns:
        The path of report.html.
    """
    page = step.folder / "report.html"
    if step.finished:
        return page
    shown = [{key: value for key, value in row.items() if key not in COMPARED} for row in rows]
    files.write_json(step.folder / "table.json", shown)
    prints = [{f"{of} fingerprint": value for of, value in row["fingerprints"].items()} for row in rows]
    columns = ["question", *COLUMNS, "k", "device", "name", *sorted({name for of in prints for name in of})]
    table = ({**row, **of} for row, of in zip(rows, prints, strict=True))
    files.write_bytes(step.folder / "table.csv", files.csv_bytes(columns, table))
    files.write_bytes(page, html(rows, step.folder).encode(errors="surrogateescape"))
    return page


def html(rows: Sequence[ReportRow], folder: Path | None = None) -> str:
    """The page or, without a folder, the tables alone, as a notebook shows them.

    Args:
        rows: of `tabulate`.
        folder: where those of `PICTURES` lie that could be drawn.
    """
    from imatch.viz.html import render

    table = {"columns": COLUMNS, "rows": rows, "cell": _cell}
    if folder is None:
        return render("table", table)
    shown = []
    for name, (caption, steps) in PICTURES.items():
        if (folder / name).is_file():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            shown.append((name, caption, data, [_prints(row, steps) for row in rows]))
    title = "What was found, and how far to trust it"
    return render("report", {**table, "title": title, "pictures": shown, "steps": STEPS})


def _prints(row: ReportRow, steps: Sequence[str]) -> str:
    return ", ".join(f"{of} {row['fingerprints'][of][:12]}" for of in steps if of in row["fingerprints"])


def _cell(key: str, value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:+.2f}" if key.startswith("apart") else f"{value:.3g}" if key in COSTS else f"{value:.2f}"
    return str(value)


def metrics(rows: Sequence[ReportRow]) -> dict[str, Json]:
    """The figures of 05_report: how many configurations, and the best of each question with its interval."""
    best = [row for row in rows if row["place"] == "best"]
    keys = ("question", "name", "hit_at_1", "low", "high", "apart", "apart_low", "apart_high")
    return {"configurations": len(rows), "best": [{key: row[key] for key in keys} for row in best]}
