"""Two photographs' Tokens -> one-to-one correspondences. A matcher is one class in one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from imatch import plugins
from imatch.records import Matches, Tokens

MATCHERS = {"mutual": "imatch.matching.mutual:Mutual"}


class Matcher(Protocol):
    """What imatch asks of a matcher; its options are the fields of its frozen dataclass."""

    def __call__(self, a: Tokens, b: Tokens) -> Matches:
        """Correspondences between A's and B's local descriptors, strongest first, one to one."""


def create(matcher: str, options: Mapping[str, Any] | None = None) -> Matcher:
    """Make a matcher.

    Raises:
        ImatchError: unknown matcher or option, with the nearest known one.
    """
    made: Matcher = plugins.create(MATCHERS, "matcher", matcher, options)
    return made
