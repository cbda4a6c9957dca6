"""03_index's results to consumers: a message a query."""

from __future__ import annotations

import json
import os
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from imatch.core import compute, config, files, settings
from imatch.core.rows import AnswerRow, Json
from imatch.core.step import Step
from imatch.core.types import ImatchError, ImatchWarning

if TYPE_CHECKING:
    from imatch.retrieval.redis import Redis


@dataclass(frozen=True)
class SendOptions:
    """Where to messages go.

    Attributes:
        to: "" is nowhere; "redis": a message a query to REDIS_URL.
        ttl_hours: how long the messages live.

    Raises:
        ImatchError: an unknown name, a ttl that is none; for "redis" no redis-py, no REDIS_URL, or one that is no URL:
            now, not after hours.
    """

    to: str = ""
    ttl_hours: PositiveFloat = 168.0

    def __post_init__(self) -> None:
        config.check(self, "send")
        _sink(self.to, self.ttl)

    @property
    def ttl(self) -> int:
        """Seconds."""
        return round(3600 * self.ttl_hours)


def send(step: Step, *, to: str = "redis", ttl: int) -> str:
    """Send what the queries of a 03_index step found to Redis (REDIS_URL).

    The step's sent.json says whether all messages were acknowledged. Sent again they are the same messages, each with
    one more event.

    Args:
        step: its folder holds results.json.
        to: "redis", or "" for nowhere.
        ttl: seconds that the messages live.

    Returns:
        One sentence: how many messages, and where; or how many wait.

    Raises:
        ImatchError: as `SendOptions`; or another step of the run has sent queries of the same names: the one's messages
            would take the place of the other's.

    Warns:
        ImatchWarning: Redis could not be reached or refused: the messages wait to be sent again.
    """
    sink = _sink(to, ttl)
    if sink is None:
        return "nothing is sent: set send to redis to do so"
    from imatch.retrieval.redis import PREFIX, RedisError

    run = step.run
    results = files.read_json(step.folder / "results.json")
    _refuse_same_queries(run, step.folder, {row["query"] for row in results["queries"]})
    messages = [(row["query"], message(results, row)) for row in results["queries"]]
    mark = {"run": run.name, "messages": len(messages), "acknowledged": False}
    files.write_json(step.folder / "sent.json", mark)  # before the first, for a part of them may arrive
    try:
        for _ in compute.progress(sink(run.name, messages), "send", -(-len(messages) // sink.batch)):
            pass
    except RedisError as error:
        command = f"imatch send {shlex.quote(str(step.folder))} --ttl-hours {ttl / 3600:g}"
        waiting = f"{len(messages)} messages wait"
        remedy = f"`{command}` sends them, and so does the next run of 03_index"
        warnings.warn(ImatchWarning(f"{error}. {waiting}: {remedy}"), stacklevel=2)
        return waiting
    files.write_json(step.folder / "sent.json", {**mark, "acknowledged": True})
    return f"{len(messages)} messages at {PREFIX}:{run.name}:* on {sink.place}"


def _sink(to: str, ttl: int) -> Redis | None:
    """Where `send` will send to; None is nowhere. Connects to nothing."""
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


def message(results: Mapping[str, Json], row: AnswerRow) -> bytes:
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
    said = {
        "encoder": results["weight"],
        "backend": results["backend"],
        "dim": results["dimension"],
        "metric": "ip",
        "topk": results["k"],
        "timing_ms": {part: row["timing_ms"][part] for part in ("embed", "search", "total")},
        "results": found,
        "index_build_ms": results["index_build_ms"],
    }
    text = json.dumps(said, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")  # bytes of a name that are no text become \udcXX, JSON's own escape


def _refuse_same_queries(run: Path, folder: Path, queries: set[str]) -> None:
    """Refuse if another step of the run has begun to send messages of some of these queries."""
    for path in sorted((run / "03_index").rglob("results.json")):
        mark = path.with_name("sent.json")
        if path.parent == folder or not (mark.is_file() and files.read_json(mark)["run"] == run.name):
            continue
        if same := queries & {row["query"] for row in files.read_json(path)["queries"]}:
            raise ImatchError(
                f"{len(same)} queries of {folder}, such as {files.printable(min(same, key=os.fsencode))}, were sent by "
                f"{path.parent} already, or wait there: their messages would take the place of those; search in "
                "another run"
            )
