"""Photographs through a backbone: read, put together in batches of one shape, passed on, and what becomes of each.

The verbs in memory and the steps share it: `imatch.embed` and 01_embed give the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np

from imatch.core import compute
from imatch.core.rows import About, PhotoRow
from imatch.core.types import ImatchError, PassingError, PhotographError, Tokens
from imatch.data.images import Decoded
from imatch.features.base import Backbone, pass_bytes, placed_tokens

HELD = 2**28
"""Bytes of decoded photographs that may wait for others of their shape."""
Batch = list[tuple[str, Decoded]]
"""The ids and photographs of one shape."""
Told = list[Tokens | PassingError]
"""The tokens of a batch, and why there are none of one for which there was no memory."""


def passed(
    backbone: Backbone, photographs: Iterable[tuple[str, Decoded]], size: int, room: int
) -> Generator[tuple[Batch, Told, float, float], None, None]:
    """Pass photographs through a backbone in batches of one shape; the next is put together meanwhile.

    Args:
        size: of a batch, at most.
        room: bytes on the backbone's device; one photograph is passed in any case.

    Returns:
        Batches, each with its tokens, and when its pass began and ended (`time.perf_counter`).
    """

    def timed(one: tuple[Batch, np.ndarray]) -> tuple[Batch, Told, float, float]:
        batch, pixels = one
        began = time.perf_counter()
        tokens = _told(backbone, pixels)
        return batch, tokens, began, time.perf_counter()

    def most(shape: tuple[int, ...]) -> int:
        return max(1, min(size, room // pass_bytes(shape[:2], backbone)))

    return compute.ahead(timed, _batches(photographs, most), 1, 2)


def _told(backbone: Backbone, pixels: np.ndarray) -> Told:
    """The tokens of a batch; where memory runs out all the same, it is halved."""
    try:
        return [*backbone(pixels)]
    except Exception as error:
        if not compute.out_of_memory(error):
            raise
    n, h, w = pixels.shape[:3]  # here, for the error holds what was in memory
    if n == 1:
        return [PassingError(f"{backbone.device} had no memory left for its {w} x {h} pixels")]
    return [*_told(backbone, pixels[: n // 2]), *_told(backbone, pixels[n // 2 :])]


def _batches(
    photographs: Iterable[tuple[str, Decoded]], most: Callable[[tuple[int, ...]], int]
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Full batches as they come, all when many bytes wait, the rest at last."""
    shapes: dict[tuple[int, ...], Batch] = {}
    for id, photograph in photographs:
        batch = shapes.setdefault(photograph.pixels.shape, [])
        batch.append((id, photograph))
        full = len(batch) == most(photograph.pixels.shape)
        if full or sum(one.pixels.nbytes for held in shapes.values() for _, one in held) > HELD:
            for ready in filter(None, [batch] if full else shapes.values()):
                yield _stacked(ready.copy())
                ready.clear()
    yield from map(_stacked, filter(None, shapes.values()))


def _stacked(batch: Batch) -> tuple[Batch, np.ndarray]:
    return batch, np.stack([photograph.pixels for _, photograph in batch])


class Made:
    """What becomes of some photographs: their rows in order, and their tokens by id; `empty` are those in which the
    backbone found nothing, `passing` those of `PassingError`, with its words.

    Args:
        stride: of a grid, every so many rows and columns are kept.
        stop: whether a photograph that cannot be used ends it; else its row says why it was skipped.
    """

    def __init__(self, stride: int = 1, stop: bool = False) -> None:
        self.stride, self.stop = stride, stop
        self.rows: dict[str, PhotoRow] = {}
        self.tokens: dict[str, Tokens] = {}
        self.empty: dict[str, Tokens] = {}
        self.passing: dict[str, str] = {}

    def photographs(
        self, decoded: Iterable[tuple[str, About, Decoded | PhotographError]]
    ) -> Iterator[tuple[str, Decoded]]:
        """Take photographs with what is known of them; those that were decoded are passed on."""
        for id, about, photograph in decoded:
            if isinstance(photograph, PhotographError):
                self._skip({"id": id, "sha256": None}, photograph)
                continue
            found = {name: getattr(photograph, name) for name in ("size", "sha256", "position", "look")}
            said = {name: words for name in ("doubt", "note") if (words := getattr(photograph, name))}
            self.rows[id] = {"id": id, **found, **about, **said}
            yield id, photograph

    def take(self, batch: Batch, tokens: Told) -> None:
        """Put a batch's tokens to its photographs.

        Raises:
            ImatchError: numbers that are not finite.
        """
        for (id, photograph), one in zip(batch, tokens, strict=True):
            if isinstance(one, PassingError):
                self._skip(self.rows[id], one)
            elif not np.isfinite(one.vector).all():
                raise ImatchError(
                    f"{id}: the backbone's numbers are not finite: its weights are broken, download them again"
                )
            elif one.vector.any():
                self.tokens[id] = placed_tokens(one, photograph, self.stride)
            else:
                h, w = photograph.size
                self.empty[id] = one
                note = f": {photograph.note}" if photograph.note else ""
                why = f"nothing to describe: no texture was found in its {w} x {h} pixels{note}"
                self._skip(self.rows[id], PhotographError(why))

    def _skip(self, row: PhotoRow, reason: PhotographError) -> None:
        if self.stop:
            raise PhotographError(f"{row['id']}: {reason} (on_error is stop; what was finished stays)")
        if isinstance(reason, PassingError):
            self.passing[row["id"]] = str(reason)
        self.rows[row["id"]] = {**row, "skipped": str(reason)}
