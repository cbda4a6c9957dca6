"""imatch: photographs to embeddings, references with exact truth, TopK retrieval and 1:1 matches.

The public verbs; each is imported from its package when it is first used, so that `import imatch` is light.

>>> import imatch
>>> imatch.Resize("long_side", long_side=512).target((600, 1000), patch=16)
(304, 512)
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers: what `_VERBS` says
    from imatch.api.match import Match, match, match_folder
    from imatch.core.compute import ComputeOptions
    from imatch.core.step import last_finished
    from imatch.data.images import Resize
    from imatch.data.store import Embeddings, StorageOptions, open_embeddings
    from imatch.export.per_image import export_per_image
    from imatch.matching.align import GeometryOptions, MatchingOptions
    from imatch.retrieval.index import IndexOptions
    from imatch.retrieval.ranking import RankingOptions
    from imatch.retrieval.truth import TruthOptions
    from imatch.steps.embed import embed, finish_embed, start_embed
    from imatch.steps.index import (
        audit_index,
        build_index,
        check_index,
        index_metrics,
        index_stages,
        judge_index,
        search,
        start_index,
        tune_index,
    )
    from imatch.steps.match import browse, match_metrics, match_pairs, open_match, start_match
    from imatch.steps.options import options
    from imatch.steps.preflight import preflight
    from imatch.steps.references import make_references, start_reference_tokens, start_references
    from imatch.steps.report import start_report
    from imatch.steps.send import SendOptions, send

__version__ = "0.1.0"

_VERBS = {
    "imatch.data.images": ("Resize",),
    "imatch.core.compute": ("ComputeOptions",),
    "imatch.core.step": ("last_finished",),
    "imatch.retrieval.index": ("IndexOptions",),
    "imatch.retrieval.ranking": ("RankingOptions",),
    "imatch.retrieval.truth": ("TruthOptions",),
    "imatch.matching.align": ("GeometryOptions", "MatchingOptions"),
    "imatch.data.store": ("Embeddings", "StorageOptions", "open_embeddings"),
    "imatch.steps.embed": ("start_embed", "embed", "finish_embed"),
    "imatch.steps.references": ("start_references", "make_references", "start_reference_tokens"),
    "imatch.steps.index": (
        "start_index",
        "build_index",
        "tune_index",
        "check_index",
        "search",
        "index_stages",
        "judge_index",
        "index_metrics",
        "audit_index",
    ),
    "imatch.steps.send": ("SendOptions", "send"),
    "imatch.steps.options": ("options",),
    "imatch.api.match": ("Match", "match", "match_folder"),
    "imatch.steps.match": ("start_match", "match_pairs", "match_metrics", "open_match", "browse"),
    "imatch.steps.preflight": ("preflight",),
    "imatch.steps.report": ("start_report",),
    "imatch.export.per_image": ("export_per_image",),
}
_COMMANDS = {
    "imatch.batch": "imatch run",
    "imatch.demo": "imatch demo",
    "imatch.doctor": "imatch doctor",
    "imatch.legacy": "imatch import",
    "imatch.registry": "imatch weights",
}
"""What was called by `python -m` before there was a command."""
if sys.argv[:1] == ["-m"]:  # as it is while Python looks for the module that it shall run
    for _old in {*_COMMANDS} & {*sys.orig_argv}:
        print(f"python -m {_old} is `{_COMMANDS[_old]} ...` now: see {_COMMANDS[_old]} --help", file=sys.stderr)
        raise SystemExit(2)
_PLACE = {verb: file for file, verbs in _VERBS.items() for verb in verbs}
__all__ = ["__version__", *sorted(_PLACE)]


if not TYPE_CHECKING:  # to which every name would be known

    def __getattr__(name: str) -> Any:
        if name not in _PLACE:
            raise AttributeError(f"module 'imatch' has no attribute {name!r}")
        return getattr(importlib.import_module(_PLACE[name]), name)


def __dir__() -> list[str]:
    return __all__
