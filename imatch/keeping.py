"""What 01_embed keeps of the local descriptors: all of them, all in half the bytes, a few that stand for all, or none.

Whatever is kept is made from the float16 of the default, so that it can be taken from a finished step beside it, and
is the same whichever way it came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from imatch import plugins, rerank, store
from imatch.records import ImatchError, StepError, Tokens

KEEPS = {
    "float16": "all local descriptors",
    "int8": "all local descriptors, a byte a number",
    "aggregated": "64 aggregated tokens a photograph, which have no positions",
    "global": "no local descriptors",
}
DEFAULT = "float16"
PLACED = ("float16", "int8")
"""Those that keep positions."""
LOCAL = ("float16", "int8", "aggregated")
"""Those that keep local descriptors."""
TOKENS = 64
"""Aggregated tokens a photograph."""


def parameter(keep: str) -> dict[str, str]:
    """What `keep` adds to the parameters of a step: nothing by default, so that steps of before there was `keep` stay
    what they were.

    Raises:
        ImatchError: it is not known; the message has the nearest.

    >>> parameter("int8"), parameter("float16")
    ({'keep': 'int8'}, {})
    """
    if keep not in KEEPS:
        raise ImatchError(plugins.unknown("keep", keep, KEEPS))
    return {} if keep == DEFAULT else {"keep": keep}


def of(parameters: Mapping[str, Any]) -> str:
    """What a step of embeddings with such parameters keeps.

    >>> of({"variant": "raw"})
    'float16'
    """
    return str(parameters.get("keep", DEFAULT))


def variant(parameters: Mapping[str, Any]) -> str:
    """The variant of a step of embeddings and, where it is not the default, what it keeps: a part of folders' names.

    >>> variant({"variant": "raw"}), variant({"variant": "sub2", "keep": "int8"})
    ('raw', 'sub2_int8')
    """
    return "_".join([parameters["variant"], *parameter(of(parameters)).values()])


def check(folder: Path, parameters: Mapping[str, Any], what: str, enough: Sequence[str] = PLACED) -> None:
    """Refuse what needs more than a step of embeddings kept.

    Args:
        folder, parameters: of the step.
        what: who needs it, for the message.
        enough: those of `KEEPS` that will do.

    Raises:
        StepError: it keeps another one.

    >>> check(Path("vits16/res256_raw_global"), {"keep": "global"}, "04_match")
    Traceback (most recent call last):
    imatch.records.StepError: 04_match needs local descriptors with positions, and vits16/res256_raw_global keeps ...
    """
    if (keep := of(parameters)) not in enough:
        places = "" if "aggregated" in enough else " with positions"
        raise StepError(
            f"{what} needs local descriptors{places}, and {folder} keeps {KEEPS[keep]} (keep {keep}): run 01_embed, "
            f"and 02_references, with keep {' or '.join(enough)}"
        )


def kept(tokens: Tokens, keep: str) -> Tokens:
    """The tokens of a photograph as they are to be stored.

    Args:
        tokens: as the backbone gave them.
        keep: one of `KEEPS`.

    Returns:
        "float16": the same. "int8": the same, rounded to float16. "aggregated": at most `TOKENS` directions
        (`rerank.aggregate`), positions NaN. "global": no descriptors.

    >>> tokens = Tokens(np.ones(1, "f4"), np.eye(3, dtype="f4"), np.zeros((3, 2), "f4"))
    >>> [kept(tokens, keep).descriptors.shape for keep in KEEPS]
    [(3, 3), (3, 3), (3, 3), (0, 3)]
    """
    if keep == DEFAULT:
        return tokens
    rounded = tokens.descriptors.astype(np.float16)
    if keep == "int8":
        return replace(tokens, descriptors=rounded)
    if keep == "global":
        return Tokens(tokens.vector, rounded[:0], np.zeros((0, 2), np.float32))
    few = rerank.aggregate(rounded, TOKENS)
    few = few[few.any(axis=1)]
    return Tokens(tokens.vector, few, np.full((len(few), 2), np.nan, np.float32))


def write_shard(folder: Path, shard: int, rows: Sequence[store.Row], tokens: Sequence[Tokens], keep: str) -> None:
    """Write one shard (`store.write_shard`) of what is kept.

    Args:
        folder, shard, rows, tokens: as `store.write_shard` takes them.
        keep: one of `KEEPS`.

    >>> import tempfile
    >>> tokens = Tokens(np.ones(1, "f4"), np.eye(3, dtype="f4"), np.zeros((3, 2), "f4"))
    >>> with tempfile.TemporaryDirectory() as name:
    ...     write_shard(Path(name), 0, [{"id": "a.jpg", "size": (9, 9), "sha256": ""}], [tokens], "int8")
    ...     sorted(path.name for path in (Path(name) / "local").iterdir())
    ['00000.global.npy', '00000.jsonl', '00000.npy', '00000.scale.npy', '00000.xy.npy']
    """
    dtype = np.int8 if keep == "int8" else np.float16
    store.write_shard(folder, shard, rows, [kept(one, keep) for one in tokens], dtype)


def size(keep: str, n: int, d: int) -> int:
    """Bytes of one photograph's n local descriptors of d numbers on disk, without positions (8 n more for keypoints;
    a grid has none).

    >>> [size(keep, 256, 384) for keep in KEEPS]
    [196608, 99328, 49152, 0]
    """
    each = {"float16": 2 * d, "int8": d + 4, "aggregated": 2 * d, "global": 0}
    return each[keep] * (min(n, TOKENS) if keep == "aggregated" else n)
