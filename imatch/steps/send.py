"""03_index's results to consumers: a message a query."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imatch.core import compute, config, files, settings
from imatch.core.files import Row
from imatch.core.step import Step, run_and_dataset
from imatch.core.types import ImatchError, ImatchWarning

if TYPE_CHECKING:
    from imatch.retrieval.redis import Redis

Message = tuple[str, bytes]
"""A query's id, and what is sent of it."""


def send(step: Step, *, to: str = "redis", ttl: int) -> str:
    """Send what the queries of a 03_index step found to Redis (REDIS_URL), and what earlier runs could not send.

    Messages are written to the run's outbox before the first is sent, and leave it when all of their step were
    acknowledged, which then gets its sent.json. Sent twice they are one message and one event.

    Args:
        step: its folder holds results.json.
        to: "redis", or "" for nowhere.
        ttl: seconds that the messages live.

    Returns:
        One sentence: how many messages, where, and how many of them were new; or how many wait.

    Raises:
        ImatchError: there is no REDIS_URL or it is no URL, redis-py is not installed, or another step of the run has
            queries of the same names: the one's messages would take the place of the other's.

    Warns:
        ImatchWarning: Redis could not be reached or refused: the messages wait.
    """
    sink = sink_of(to, ttl)
    if sink is None:
        return "nothing is sent: set send to redis to do so"
    from imatch.retrieval.redis import PREFIX, RedisError

    run, _ = run_and_dataset(step)
    results = files.read_json(step.folder / "results.json")
    _refuse_same_queries(run, step.folder, {row["query"] for row in results["queries"]})
    own = _outbox(run, step.folder)
    lines = [_line(files.relative(step.folder, run))]
    for row in results["queries"]:
        lines += [_line(row["query"]), message(results, row)]
    files.write_bytes(own, b"\n".join(lines))
    sent = new = 0
    try:  # the step's own last: what is left of a step that was deleted must not take its place
        for path in [*sorted({*own.parent.glob("*.jsonl")} - {own}), own]:
            counts = _deliver(sink, run, path)
            sent, new = sent + counts[0], new + counts[1]
    except RedisError as error:
        waiting = sum(len(_read(path)[1]) for path in own.parent.glob("*.jsonl"))
        said = f"{waiting} messages wait in {own.parent}"
        warnings.warn(ImatchWarning(f"{error}. {said}: the next run of 03_index sends them"), stacklevel=2)
        return said
    return f"{sent} messages at {PREFIX}:{run.name}:* on {sink.place}, {new} of them new"


def sink_of(to: str, ttl: int) -> Redis | None:
    """Where `send` will send to; None is nowhere. Connects to nothing.

    Raises:
        ImatchError: an unknown name, a ttl below 1; for "redis" no redis-py, no REDIS_URL, or one that is no URL.

    >>> sink_of("", ttl=60) is None
    True
    """
    if to not in ("", "redis"):
        raise ImatchError(config.unknown("send", to, ["redis"]))
    if not to:
        return None
    try:
        from imatch.retrieval.redis import Redis
    except ModuleNotFoundError as error:
        raise ImatchError(
            "sending to Redis needs redis-py: .venv/bin/pip install -c constraints.txt -e '.[redis]'"
        ) from error
    return Redis(settings.redis_url(), ttl)


def message(results: Mapping[str, Any], row: Row) -> bytes:
    """What is sent of one query, on one line: JSON as retrieval/coarse_localisation.schema.json describes it.

    Args:
        results: what results.json holds.
        row: one of its queries.

    >>> results = {"weight": "vits16", "backend": "faiss-cpu", "dimension": 384, "k": 1, "index_build_ms": 12.3}
    >>> hit, took = {"rank": 0, "path": "a/b.jpg", "score": 0.9}, {"embed": 1, "search": 2, "total": 3}
    >>> json.loads(message(results, {"hits": [hit], "timing_ms": took}))["results"]
    [{'rank': 0, 'path': 'a/b.jpg', 'filename': 'b.jpg', 'score': 0.9}]
    """
    found = [
        {"rank": hit["rank"], "path": hit["path"], "filename": hit["path"].rpartition("/")[2], "score": hit["score"]}
        for hit in row["hits"]
    ]
    return _line(
        {
            "encoder": results["weight"],
            "backend": results["backend"],
            "dim": results["dimension"],
            "metric": "ip",
            "topk": results["k"],
            "timing_ms": {part: row["timing_ms"][part] for part in ("embed", "search", "total")},
            "results": found,
            "index_build_ms": results["index_build_ms"],
        }
    )


def _line(value: object) -> bytes:
    """JSON in UTF-8; bytes of a name that are no text become `\\udcXX`, which is JSON, too."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        errors="backslashreplace"
    )


def _outbox(run: Path, folder: Path) -> Path:
    """The file in which the messages of the step in a folder wait: a line of its path, then two a message, id first."""
    return run / "outbox" / f"{files.digest(files.relative(folder, run))[:12]}.jsonl"


def _read(path: Path) -> tuple[str, list[Message]]:
    first, *lines = path.read_bytes().split(b"\n")
    try:
        queries = [json.loads(line) for line in lines[0::2]]
        return json.loads(first), list(zip(queries, lines[1::2], strict=True))
    except ValueError as error:
        raise ImatchError(f"{path} is no outbox of imatch ({error}): delete it, and send its step again") from error


def _deliver(sink: Redis, run: Path, path: Path) -> tuple[int, int]:
    """Send the messages of a file, remove it and say so in its step's folder: how many, and how many of them new.

    Unless all were acknowledged the file stays whole, for a server that was killed may have lost what it acknowledged.
    """
    folder, messages = _read(path)
    batches = -(-len(messages) // sink.batch)
    counts = list(compute.progress(sink(run.name, messages), "send", batches))
    if (run / folder).is_dir():
        files.write_json(run / folder / "sent.json", {"run": run.name, "messages": len(messages)})
    path.unlink(missing_ok=True)
    return len(messages), sum(new for _, new in counts)


def _refuse_same_queries(run: Path, folder: Path, queries: set[str]) -> None:
    """Raise ImatchError if another step of the run has sent, or waits to send, messages of some of these queries."""
    for path in sorted((run / "03_index").rglob("results.json")):
        mark = path.with_name("sent.json")
        there = mark.is_file() and files.read_json(mark)["run"] == run.name
        if path.parent == folder or not (there or _outbox(run, path.parent).is_file()):
            continue
        if same := queries & {row["query"] for row in files.read_json(path)["queries"]}:
            raise ImatchError(
                f"{len(same)} queries of {folder}, such as {files.printable(min(same, key=os.fsencode))}, were sent by "
                f"{path.parent} already: their messages would take the place of those; search in another run"
            )
