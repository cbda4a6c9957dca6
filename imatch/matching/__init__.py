"""Two photographs' Tokens -> one-to-one correspondences. A matcher is one class in one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from imatch import plugins
from imatch.records import Matches, Tokens

MATCHERS = {
    "mutual": "imatch.matching.mutual:Mutual",
    "ratio": "imatch.matching.ratio:Ratio",
    "dual_softmax": "imatch.matching.dual_softmax:DualSoftmax",
}


class Matcher(Protocol):
    """What imatch asks of a matcher. Its options are the fields of its frozen dataclass; those with compare=False say
    where it is worked out."""

    @property
    def device(self) -> str:
        """Where it works: "cpu", "cuda" or "cuda:1"."""

    def __call__(self, a: Tokens, b: Tokens) -> Matches:
        """Correspondences between A's and B's local descriptors, one to one unless asked otherwise.

        Any local descriptors with positions will do, on a grid or not; those of norm 0 are never matched. The roles
        are equal: exchanging A and B exchanges the two sides of the answer, but where pairs are equally strong.

        Returns:
            strongest first, equally strong ones in the order of A; none where a side has no descriptors.

        Raises:
            ImatchError: the two sides' descriptors are not of one kind.
        """


def create(matcher: str, options: Mapping[str, Any] | None = None) -> Matcher:
    """Make a matcher.

    Raises:
        ImatchError: unknown matcher or option, with the nearest known one.
    """
    made: Matcher = plugins.create(MATCHERS, "matcher", matcher, options)
    return made
