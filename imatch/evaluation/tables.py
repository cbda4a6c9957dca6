"""Figures as text: what the notebooks print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imatch.core.rows import IntervalRecord, MatchFigures, PositionFigures, SearchFigures, StageRow, ThresholdRecord
from imatch.evaluation import intervals


def retrieval_table(metrics: SearchFigures) -> str:
    """The figures of `steps.index.index_metrics` as lines for people."""
    k = metrics["k"]
    queries = f"{metrics['queries']} queries in a gallery of {metrics['gallery']}"
    apart = f"{metrics['without_answer']} of them have no right answer there and are not counted below"
    lost = f"{metrics['missed']} of them could not be embedded and count as wrong"
    told = [*([apart] if metrics["without_answer"] else []), *([lost] if metrics["missed"] else [])]
    lines = ["; ".join([queries, *told])]
    names = {"hit_at_1": "Hit@1", "map": f"mAP@{k}", "mrr": f"MRR@{k}"}
    lines += [f"{name:<12} {intervals.Interval(**metrics['intervals'][key])}" for key, name in names.items()]
    depths = [int(name[7:]) for name in metrics if name.startswith("hit_at_")]
    for name in ("Hit", "Recall", "Precision"):
        shown = [f"{_cell(metrics[f'{name.lower()}_at_{depth}'])} @{depth}" for depth in depths]
        lines.append(f"{name + '@K':<12} " + "   ".join(shown))
    lines.append(f"{'by chance':<12} {_cell(metrics['chance'])}")
    lines += _believed(metrics["threshold"])
    if metrics["positions"]:
        lines += _metres(metrics["positions"])
    return "\n".join(lines)


def stage_table(stages: Sequence[StageRow]) -> str:
    """What each option of a search adds, as lines for people.

    Args:
        stages: first the plain search, then one row for each option on top of all before: stage (its name), hit_at_1
            and map (records of `intervals.Interval`), ms (milliseconds a query), difference (the record of Hit@1 minus
            that of the row before, over the same queries; None in the first).

    >>> few = {"low": None, "high": None, "clusters": 3, "why": "3 photographs are too few, 8 are the least"}
    >>> plain = {"stage": "plain", "hit_at_1": {"value": 0.5} | few, "map": {"value": 0.4} | few, "ms": 0.2}
    >>> print(stage_table([plain | {"difference": None}]))
    stage  Hit@1  mAP   ms a query  difference to the row above
    plain  0.50   0.40  0.20
    No interval: 3 photographs are too few, 8 are the least.
    """
    table = [("stage", "Hit@1", "mAP", "ms a query", "difference to the row above")]
    for row in stages:
        changed = row["difference"]
        told = f"{_span(changed, '+')}  {difference_said(changed)}" if changed else ""
        table.append((row["stage"], _span(row["hit_at_1"]), _span(row["map"]), f"{row['ms']:.2f}", told))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    every = [of for row in stages for of in (row["hit_at_1"], row["map"], row["difference"]) if of]
    return "\n".join([*lines, *(f"No interval: {why}." for why in sorted({of["why"] for of in every} - {""}))])


def difference_said(difference: IntervalRecord) -> str:
    """What the record of a paired difference allows to say: only what its 95 % interval holds on one side of 0.

    >>> [difference_said({"value": 0.1, "low": low, "high": 0.2}) for low in (0.02, -0.02)]
    ['better', 'no difference that can be told']
    """
    if difference["low"] is not None and difference["low"] > 0:
        return "better"
    if difference["high"] is not None and difference["high"] < 0:
        return "worse"
    return "no difference that can be told"


def _span(record: IntervalRecord, sign: str = "") -> str:
    """Differences, which bear their sign, may be small and are given more digits."""
    if record["value"] is None:
        return "-"
    value, low, high = (
        "" if end is None else f"{end:+z.3f}" if sign else f"{end:z.2f}"
        for end in (record["value"], record["low"], record["high"])
    )
    return f"{value} [{low}, {high}]" if low else value


def _believed(threshold: ThresholdRecord) -> list[str]:
    if threshold["value"] is None:
        return [f"no match     none is believed: {threshold['why']}"]
    said = (
        f"no match     a first hit is believed from cosine {threshold['value']:.3f} on, for a precision of "
        f"{threshold['wanted']:g}: {_cell(threshold['coverage'])} of the queries that have an answer"
    )
    held = threshold["held_out_precision"]
    if held is None:
        return [said, f"             {threshold['why']}"]
    short = ", BELOW what was asked for: do not rely on it" if held < threshold["wanted"] else ""
    apart = f"precision {_cell(held)}{short}; coverage {_cell(threshold['held_out_coverage'])}"
    return [said, f"             on photographs that it was not calibrated on: {apart}"]


def _metres(figures: PositionFigures) -> list[str]:
    within = "   ".join(f"{_cell(share)} within {metres} m" for metres, share in figures["within"].items())
    lost = figures["unknown"]
    unknown = f" ({lost} queries without a position are not counted)" if lost else ""
    return [
        f"{'metres':<12} first hit {_cell(figures['top1_metres_median'])} (median), nearest of all hits "
        f"{_cell(figures['least_metres_median'])}{unknown}",
        f"{'':<12} first hit: {within}",
    ]


def summary_table(finished: Mapping[str, MatchFigures]) -> str:
    """Metrics of 04_match as a table for a terminal: Hit@1 by crop and angle with its interval, then pixels.

    Args:
        finished: name of a configuration -> its metrics, and under "labels" what `label_metrics` says, if it does.
    """
    shown = {name: metrics for name, metrics in finished.items() if metrics["by_view"]}
    angles = sorted({view["angle"] for metrics in shown.values() for view in metrics["by_view"]})
    wide = max([len(name) for name in finished] + [8])
    heads = [f"{angle:>5g}" for angle in angles] + [" mean [95 % interval]"]
    lines = [f"{'Hit@1':<{wide}}  crop " + " ".join(heads)] if shown else []
    for name, metrics in shown.items():
        for part in reversed(metrics["by_crop"]):
            views = [view for view in metrics["by_view"] if view["crop"] == part["crop"]]
            hits = {view["angle"]: view["hit_at_1"] for view in views}
            cells = [_cell(hits.get(angle), 5) for angle in angles]
            mean = intervals.Interval(**part["intervals"]["hit_at_1"])
            lines.append(f"{name:<{wide}}  {part['crop']:<4g} {' '.join(cells)}  {mean}")
    for name, metrics in finished.items():
        of = metrics["intervals"]
        hit, again = (intervals.Interval(**of[key]) for key in ("hit_at_1", "reranked_hit_at_1"))
        if hit.value is None and "pairs_verified" in metrics and metrics["pairs"]:
            said = f"{metrics['pairs_verified']} of {metrics['pairs']} pairs verified"
            lines += ["", f"{name}: {said}; no query has a right answer that is known, so there is no Hit@1"]
        else:
            said = f"{metrics['queries']} queries, Hit@1 {hit}, re-ranked by 1:1 matching {again}"
            lines += ["", f"{name}: {said}", *_reranked(metrics)]
        error = metrics["corner_error_median"]
        if error is not None:
            lines.append(f"  median corner error of verified right matches: {error:.2f} px")
        if metrics["true_pairs"]:
            lines.append(
                f"  of all {metrics['true_pairs']} pairs of a reference and its source: median corner error "
                f"{_cell(metrics['true_corner_error_median'])} px, within 8 px {_cell(metrics['true_within_8px'])}"
            )
        if told := metrics.get("labels"):
            lines.append(
                f"  labelled by hand: {told['labelled']} pairs, {told['accepted']} accepted; of the verified ones "
                f"{_cell(told['precision'])} are accepted, of the accepted ones {_cell(told['recall'])} are verified"
            )
        if skipped := metrics.get("queries_skipped"):
            lines.append(f"  not counted above: {skipped} queries that could not be decoded")
    return "\n".join(lines)


def _reranked(metrics: MatchFigures) -> list[str]:
    """What re-ranking changes, and what verification is worth."""
    lines = []
    changed = metrics["intervals"].get("reranking")  # absent from steps of before it was measured
    if changed and changed["value"] is not None:
        lines.append(f"  re-ranking changes Hit@1 by {_span(changed, '+')}: {difference_said(changed)}")
    said = {"of the queries": "verified", "of those are right": "verified_right"}
    said |= {"have a wrong candidate that verifies": "wrong_verified"}
    shares = [f"{_cell(metrics[key])} {words}" for words, key in said.items() if metrics[key] is not None]
    return [*lines, f"  verified: {', '.join(shares)}"] if shares else lines


def _cell(value: float | None, width: int = 0) -> str:
    return f"{'-' if value is None else f'{value:.2f}':>{width}}"
