"""Two photographs' Tokens -> one-to-one correspondences. A matcher is one class and one line in the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from threadpoolctl import ThreadpoolController

from imatch.core import config
from imatch.core.rows import Json, Options
from imatch.core.types import ImatchError, Matches, Tokens

MATCHERS = {
    "mutual": "imatch.matching.matchers:Mutual",
    "ratio": "imatch.matching.matchers:Ratio",
    "dual_softmax": "imatch.matching.matchers:DualSoftmax",
    "lighterglue": "imatch.matching.lighterglue:LighterGlue",
}
Sizes = tuple[tuple[int, int], tuple[int, int]]
"""(h, w) of A and of B."""


class Matcher:
    """What imatch asks of a matcher: a frozen dataclass of options; those with compare=False say where it works.

    Attributes:
        share: what share of its correspondences must agree; 0 for what is usual (`align.aligner`).
        caution: of `two_view.Estimator`, where its correspondences agree by themselves.
        coarse: reprojection error of an inlier as a share of a photograph's longer side, if that is more than 3 pixels.
        quick: what chooses the pose beforehand, by its number of correspondences, for a matcher that is slow.
    """

    share: ClassVar[float] = 0.0
    caution: ClassVar[float] = 1.0
    coarse: ClassVar[float] = 0.0
    quick: ClassVar[Matcher | None] = None

    def __post_init__(self) -> None:
        config.check(self)

    def __call__(self, a: Tokens, b: Tokens, sizes: Sizes | None = None) -> Matches:
        """Correspondences between A's and B's local descriptors, one to one unless asked otherwise.

        Those of norm 0 are never matched. Exchanging A and B exchanges the sides, but where pairs are equally strong.

        Args:
            a, b: their tokens, xy in pixels of the photographs as the backbone saw them.
            sizes: of those photographs; for matchers that look at positions, too.

        Returns:
            strongest first, equally strong ones in the order of A; none where a side has no descriptors.

        Raises:
            ImatchError: the two sides' descriptors are not of one kind.
        """
        raise NotImplementedError


def create_matcher(matcher: str, options: Options | None = None) -> Matcher:
    """Make a matcher.

    Raises:
        ImatchError: unknown matcher or option, with the nearest known one.
    """
    made: Matcher = config.create(MATCHERS, "matcher", matcher, options)
    return made


TILE, ROWS = 2**20, 256
"""Cosines in memory at once, which stay in the processor's cache; rows that are copied to look along columns."""
SAME = 0.95
"""Cosine from which on two descriptors show the same: where a rival comes near to that, too, what they show repeats."""
_BLAS, _BLAS_LOCK = ThreadpoolController().select(user_api="blas"), Lock()


class _Side(NamedTuple):
    """Descriptors that can be compared: rows in the tokens, rising, directions of norm 1, positions."""

    rows: np.ndarray
    directions: np.ndarray
    xy: np.ndarray


class _Nearest(NamedTuple):
    """The k best partners of each of n rows, best first, ties by the smaller index: (n, k) each."""

    score: np.ndarray
    index: np.ndarray


def _sides(a: Tokens, b: Tokens, min_norm: float = 0.0) -> tuple[_Side, _Side]:
    if a.descriptors.shape[1] != b.descriptors.shape[1]:
        raise ImatchError(
            f"descriptors of {a.descriptors.shape[1]} and {b.descriptors.shape[1]} numbers cannot be compared: "
            "embed both sides with the same backbone"
        )
    return _side(a, min_norm), _side(b, min_norm)


def _side(tokens: Tokens, min_norm: float) -> _Side:
    directions = tokens.descriptors.astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("ij,ij->i", directions, directions))
    rows = np.flatnonzero((norms > 0) & (norms >= min_norm * norms.max(initial=0)))
    if len(rows) < len(norms):
        directions, norms = directions[rows], norms[rows]
    return _Side(rows, directions / norms[:, None], tokens.xy[rows])


def _products(a: _Side, b: _Side) -> Iterator[np.ndarray]:
    """Cosines of some rows of A at a time, in the memory of those before; of none when A is empty.

    On one thread: OpenBLAS rounds otherwise by another number, in which engines differ.
    """
    n = max(1, min(len(a.rows), TILE // max(1, len(b.rows))))
    tile = np.empty((n, len(b.rows)), np.float32)
    for first in range(0, max(1, len(a.rows)), n):
        rows = a.directions[first : first + n]
        with _BLAS_LOCK, _BLAS.limit(limits=1):
            np.matmul(rows, b.directions.T, out=tile[: len(rows)])
        yield tile[: len(rows)]


def _largest(scores: np.ndarray, k: int) -> _Nearest:
    """The k largest of each row of (n, m) scores; of equal ones the first. With k > 1 they are overwritten."""
    n, k = len(scores), min(k, scores.shape[1])
    found, rows = _Nearest(np.empty((n, k), np.float32), np.empty((n, k), np.int64)), np.arange(n)
    for place in range(k):
        index = found.index[:, place] = scores.argmax(1)
        found.score[:, place] = scores[rows, index]
        if place + 1 < k:
            scores[rows, index] = -np.inf
    return found


def _nearest(tiles: Iterable[np.ndarray], k: int) -> tuple[_Nearest, _Nearest]:
    """The k largest scores of each row and each column of tiles below each other; these are overwritten."""
    of_rows: list[_Nearest] = []
    of_columns, first = _Nearest(np.empty((0, 0), np.float32), np.empty((0, 0), np.int64)), 0
    for part in (tile[n : n + ROWS] for tile in tiles for n in range(0, max(1, len(tile)), ROWS)):
        below = _largest(part.T.copy(), k)  # rows read faster
        below.index[:] += first
        if first:  # those of earlier tiles stand first, so that the smaller index wins
            score, index = (np.concatenate(pair, axis=1) for pair in zip(of_columns, below, strict=True))
            best = _largest(score, k)
            below = _Nearest(best.score, np.take_along_axis(index, best.index, axis=1))
        of_columns, first = below, first + len(part)
        of_rows.append(_largest(part, k))
    return _Nearest(*map(np.concatenate, zip(*of_rows, strict=True))), of_columns


def _mutual(of_a: _Nearest, of_b: _Nearest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of rows in which each is among the other's nearest, by rows of A, and scores: (m,) each."""
    i = np.arange(len(of_a.index))[:, None]
    chosen = (of_b.index[of_a.index] == i[..., None]).any(axis=2)
    return np.nonzero(chosen)[0], of_a.index[chosen], of_a.score[chosen]


def _strongest(a: _Side, b: _Side, i: np.ndarray, j: np.ndarray, max_matches: int, one_to_one: bool = False) -> Matches:
    """Pairs of rows, strongest first; `one_to_one` keeps of those that share a descriptor the strongest."""
    similarity = _cosines(a.directions, b.directions, i, j)
    order = np.lexsort((j, i, -similarity))
    if one_to_one:
        order = order[_free(i[order], j[order])]
    order = order[: max_matches or None]
    return Matches(a.rows[i[order]], b.rows[j[order]], similarity[order])


def _cosines(a: np.ndarray, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Of pairs of rows, in float64: equal pairs are equally strong anywhere, for estimators draw by their order."""
    found = np.empty(len(i), np.float32)
    for part in (slice(first, first + ROWS) for first in range(0, len(i), ROWS)):
        x, y = a[i[part]], b[j[part]]
        xy, xx, yy = (np.einsum("ij,ij->i", *two, dtype=np.float64) for two in ((x, y), (x, x), (y, y)))
        found[part] = xy / np.sqrt(xx * yy)
    return found


def _free(i: np.ndarray, j: np.ndarray) -> list[int]:
    """Places of the pairs, strongest first, neither of whose two is in a pair before that was kept."""
    kept, of_a, of_b = [], set[int](), set[int]()
    for place, (row, other) in enumerate(zip(i.tolist(), j.tolist(), strict=True)):
        if row not in of_a and other not in of_b:
            kept.append(place)
            of_a.add(row)
            of_b.add(other)
    return kept


@dataclass(frozen=True)
class Mutual(Matcher):
    """Pairs in which each side is among the other's nearest neighbours by cosine.

    Attributes:
        k: among how many nearest neighbours. 1 is strict; with more, repeated things get a second chance, and
            `one_to_one` chooses.
        min_similarity: cosine below which a pair is dropped.
        min_relative: the share of the strongest pair's cosine, 0 to 1, below which a pair is dropped; 0 drops none.
        min_norm: the share of its photograph's largest norm, 0 to 1, below which a descriptor is left out. The norms
            of DINOv3's tokens differ, SIFT's are 1.
        one_to_one: whether a descriptor takes part in one pair only, the strongest whose other side is free.
        max_matches: how many of the strongest pairs are kept; 0 keeps all.

    Raises:
        ImatchError: a number out of its range.

    >>> import numpy as np
    >>> eye = np.eye(3, dtype=np.float32)
    >>> a, b = (Tokens(eye[0], d, np.zeros((3, 2), np.float32)) for d in (eye, eye[::-1]))
    >>> matches = Mutual(min_similarity=0.5)(a, b)
    >>> matches.index_a.tolist(), matches.index_b.tolist()
    ([0, 1, 2], [2, 1, 0])
    """

    k: PositiveInt = 1
    min_similarity: Annotated[float, Field(ge=-1, le=1)] = 0.8
    min_relative: config.Share = 0.0
    min_norm: config.Share = 0.0
    one_to_one: bool = True
    max_matches: NonNegativeInt = 2000

    def __call__(self, a: Tokens, b: Tokens, sizes: Sizes | None = None) -> Matches:  # noqa: ARG002
        """See `Matcher`."""
        of_a, of_b = _sides(a, b, self.min_norm)
        i, j, similarity = _mutual(*_nearest(_products(of_a, of_b), self.k))
        kept = similarity >= self.min_similarity
        if self.min_relative:
            kept &= similarity >= self.min_relative * similarity.max(initial=0)
        return _strongest(of_a, of_b, i[kept], j[kept], self.max_matches, self.one_to_one and self.k > 1)


@dataclass(frozen=True)
class Ratio(Matcher):
    """Mutual nearest neighbours that are clearly nearer than anything elsewhere, seen from either photograph.

    A pair is kept when its angle is below `max_ratio` times the angle to its rival, the second most similar descriptor
    of the same photograph. Beside the best descriptor of a grid lies one that shows nearly the same, so there the rival
    is looked for outside a circle around the best, of `apart` times the `spacing` of that photograph's positions. An
    unrelated descriptor, at 90 degrees, is always among the rivals.

    Source: Lowe, IJCV 2004, section 7.1; angles in place of distances as in his published program.

    Attributes:
        max_ratio: of the two angles, above 0 and at most 1; smaller is stricter. Asked of both photographs, 0.85 keeps
            about as many as Lowe's 0.8 asked of one.
        apart: on grids, in spacings, at least 0; 1.5 excludes the eight neighbours of a cell.
        max_matches: how many of the strongest pairs are kept; 0 keeps all.

    Raises:
        ImatchError: a number out of its range.

    >>> xy = np.array([[0.0, 0], [9, 0], [18, 0]], np.float32)
    >>> a = Tokens(np.ones(1), np.eye(3), xy, grid=(1, 3))
    >>> b = Tokens(np.ones(1), np.array([[9, 1, 0], [0, 9, 1.0], [0, 9, 1.1]]), xy, grid=(1, 3))
    >>> [Ratio(apart=apart)(a, b).index_a.tolist() for apart in (0.0, 1.5)]
    [[0], [0, 1]]
    """

    share: ClassVar[float] = 0.01
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 0.85
    apart: NonNegativeFloat = 1.5
    max_matches: NonNegativeInt = 2000

    def __call__(self, a: Tokens, b: Tokens, sizes: Sizes | None = None) -> Matches:  # noqa: ARG002
        """See `Matcher`."""
        of_a, of_b = _sides(a, b)
        if a.grid is None and b.grid is None:
            (in_b, rival_in_b), (in_a, rival_in_a) = map(_first_two, _nearest(_products(of_a, of_b), 2))
        else:
            there, back = _products(of_a, of_b), _products(of_b, of_a)
            if len(of_a.rows) * len(of_b.rows) <= TILE:  # one product serves both directions
                whole = next(there)
                there, back = iter([whole]), iter([whole.T.copy()])
            in_b, rival_in_b = _with_rivals(there, of_b, self.apart * spacing(b.xy))
            in_a, rival_in_a = _with_rivals(back, of_a, self.apart * spacing(a.xy))
        i, j, similarity = _mutual(in_b, in_a)
        kept = _angle(similarity) < self.max_ratio * _angle(np.maximum(rival_in_b[i], rival_in_a[j]))
        matches = _strongest(of_a, of_b, i[kept], j[kept], self.max_matches)
        return dataclasses.replace(matches, repeated=int((~kept & (similarity >= SAME)).sum()))


def _first_two(found: _Nearest) -> tuple[_Nearest, np.ndarray]:
    """The best of each, and the cosine of the second best, at least 0."""
    rival = found.score[:, 1] if found.score.shape[1] > 1 else np.zeros(len(found.score), np.float32)
    return _Nearest(found.score[:, :1], found.index[:, :1]), rival.clip(0)


def spacing(xy: np.ndarray) -> float:
    """The median distance in pixels from a position to its nearest other one; 0 where there are less than two.

    Args:
        xy: (n, 2) float; those that occur more than once, as of keypoints of several directions, count once.

    >>> spacing(np.array([[0.0, 0], [0, 0], [3, 0], [3, 4], [7, 4]]))
    3.5
    """
    from scipy.spatial import KDTree  # a third of a second, and no other matcher needs it

    places = np.unique(xy, axis=0)
    return float(np.median(KDTree(places).query(places, k=2)[0][:, 1])) if len(places) > 1 else 0.0


def _with_rivals(tiles: Iterable[np.ndarray], b: _Side, radius: float) -> tuple[_Nearest, np.ndarray]:
    """The most similar of B for each of A, and the best cosine outside the circle around it, or 0."""
    from scipy.spatial import KDTree  # a third of a second, and no other matcher needs it

    found, rivals, places = [], [], KDTree(b.xy)
    for tile in tiles:
        best = _largest(tile, 1)
        around = KDTree(b.xy[best.index.ravel()]).sparse_distance_matrix(places, radius, output_type="ndarray")
        tile[around["i"], around["j"]] = 0.0
        found.append(best)
        rivals.append(_largest(tile, 1).score.ravel())
    return _Nearest(*map(np.concatenate, zip(*found, strict=True))), np.concatenate(rivals)


def _angle(cosine: np.ndarray) -> np.ndarray:
    """Radians, float64."""
    return np.arccos(cosine.astype(np.float64).clip(-1, 1))


@dataclass(frozen=True)
class DualSoftmax(Matcher):
    """Pairs that are each other's most probable partner: a descriptor that resembles many has none that is likely.

    The probability of a pair is the softmax of its cosine over all of B times that over all of A.

    Source: Sun et al., "LoFTR", CVPR 2021, equation 3.

    Attributes:
        temperature: what cosines are divided by before the softmax, from 0.001 on; smaller is sharper. LoFTR's 0.1 is
            for features of its own, which are not of norm 1; among 1,000 SIFT 0.02 finds what the ratio test does.
        min_probability: 0 to 1; a pair below it is dropped. 0.2 is LoFTR's.
        max_matches: how many of the strongest (by cosine) are kept; 0 keeps all.

    Raises:
        ImatchError: a number out of its range.

    >>> tokens = Tokens(np.ones(1), np.eye(3)[[0, 1, 2, 2]], np.zeros((4, 2), np.float32))
    >>> DualSoftmax(min_probability=0.5)(tokens, tokens).index_a.tolist()
    [0, 1]
    """

    temperature: Annotated[float, Field(ge=0.001)] = 0.02
    min_probability: config.Share = 0.2
    max_matches: NonNegativeInt = 2000

    def __call__(self, a: Tokens, b: Tokens, sizes: Sizes | None = None) -> Matches:  # noqa: ARG002
        """See `Matcher`."""
        of_a, of_b = _sides(a, b)
        i, j, score = _mutual(*_nearest(_log_probabilities(of_a, of_b, self.temperature), 1))
        kept = np.exp(score) >= self.min_probability
        return _strongest(of_a, of_b, i[kept], j[kept], self.max_matches)


def _log_probabilities(a: _Side, b: _Side, temperature: float) -> Iterator[np.ndarray]:
    """Tiles: the sums over rows and columns in a first pass, the probabilities in a second one."""
    if not (len(a.rows) and len(b.rows)):
        yield from _products(a, b)  # the empty tile, of which there is no sum
        return
    of_rows, of_columns = [], np.full(len(b.rows), -np.inf, np.float32)
    for tile in _products(a, b):
        tile /= temperature
        of_rows.append(_log_sum_exp(tile, 1))
        of_columns = np.logaddexp(of_columns, _log_sum_exp(tile, 0))
    for tile, of_these in zip(_products(a, b), of_rows, strict=True):
        tile *= 2 / temperature
        tile -= of_these[:, None]
        tile -= of_columns
        yield tile


def _log_sum_exp(x: np.ndarray, axis: int) -> np.ndarray:
    top = x.max(axis=axis, keepdims=True)
    return np.asarray(np.log(np.exp(x - top).sum(axis=axis)) + top.squeeze(axis))


def options_of(matcher: Matcher) -> dict[str, Json]:
    """The options of a matcher that its answers depend on."""
    fields = dataclasses.fields(matcher)  # type: ignore[arg-type]
    return {field.name: getattr(matcher, field.name) for field in fields if field.compare}
