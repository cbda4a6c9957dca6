"""The verbs that start a step, with the fields of option groups by their names alone, for tests of something else."""

import os
from types import SimpleNamespace
from unittest.mock import patch

import imatch
from imatch.steps import groups

CALLED = {
    ("index", "kind"): "index",
    ("index", "options"): "index_options",
    ("truth", "kind"): "truth",
    ("matching", "weight"): "match_weight",
    ("matching", "options"): "matcher_options",
}


def start_embed(photographs, exports="", **given):
    with patch.dict(os.environ, {"EXPORT_ROOT": str(exports)} if exports else {}):
        return imatch.steps.start_embed(str(photographs), **grouped(given, "storage"))


def start_index(data, references="", **given):
    return imatch.steps.start_index(data, references, **grouped(given, "index", "ranking", "truth"))


def start_match(index="", **given):
    return imatch.steps.start_match(index, **grouped(given, "matching", "geometry"))


def start_report(steps, exports="", **given):
    with patch.dict(os.environ, {"EXPORT_ROOT": str(exports)} if exports else {}):
        return imatch.steps.start_report(steps, **given)


def grouped(given, *wanted):
    """What was given, with the fields of some groups in a group each.

    >>> grouped({"k": 5, "whiten": 64}, "ranking")["ranking"].whiten
    64
    """
    rest = dict(given)
    for group in wanted:
        names = {CALLED.get((group, field), field): field for field in groups.fields(group)}
        rest[group] = groups.create(group, {names[name]: rest.pop(name) for name in [*rest] if name in names})
    return rest


def by(engine=None, **given):
    """Who does the work: the fields of the group compute; and, in place of one that they name, an engine."""
    made = imatch.ComputeOptions(**given)
    return made if engine is None else SimpleNamespace(**{**vars(made), "machines": engine})
