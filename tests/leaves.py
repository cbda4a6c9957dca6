"""Procedural photographs, each drawn once in a process: at any size it takes half a second."""

from functools import cache

import numpy as np

from tools import vocabulary


def dead_leaves(seed, side):
    """(side, side, 3) uint8, grey; the caller's own."""
    return _drawn(seed, side).copy()


@cache
def _drawn(seed, side):
    return vocabulary.dead_leaves(np.random.default_rng(seed), side=side)
