"""Damage drawn photographs of every documented format by seed, and ask what is decoded of them.

    .venv/bin/python -m tests.drills.photographs [--n 2400] [--seed 0] [--first 0]

Fine is: the pixels of the whole file, or a refusal of one line. Other pixels without a word are silently wrong, unless
nobody could tell: bmp, ppm, gif, webp and uncompressed tif have no redundancy, and a JPEG that libjpeg-turbo decodes
without a warning (`simplejpeg`, strict) is a JPEG; these are counted apart. Then all of them go through 01_embed.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imatch import Resize, steps
from imatch.core.types import ImatchWarning
from imatch.data import images
from tests.drills import drawn
from tests.drills.tally import Tally, asked, outcome, quiet

SMALL = Resize("long_side", long_side=28)
"""A quarter: JPEGs are then decoded by another way."""
NOTABLE, SHARE = 16, 0.002
"""Levels that a pixel is off by, and the share of such pixels that makes another photograph: a third of a block."""
Chance = np.random.Generator


def flip(chance: Chance, data: bytes, _: bytes) -> bytes:
    return _put(chance, data, 20, chance.integers(1, 9))


def header(chance: Chance, data: bytes, _: bytes) -> bytes:
    return _put(chance, data[:200], 2, chance.integers(1, 4)) + data[200:]


def tail(chance: Chance, data: bytes, _: bytes) -> bytes:
    return data[:-250] + _put(chance, data[-250:], 0, chance.integers(1, 4))  # where tifs keep what pixels mean


def zeros(chance: Chance, data: bytes, _: bytes) -> bytes:
    at, n = chance.integers(20, len(data)), chance.integers(8, 600)
    return data[:at] + bytes(len(data[at : at + n])) + data[at + n :]


def cut(chance: Chance, data: bytes, _: bytes) -> bytes:
    return data[: chance.integers(1, len(data))]


def splice(chance: Chance, data: bytes, other: bytes) -> bytes:
    at = chance.integers(len(data) // 4, 3 * len(data) // 4)
    return data[:at] + other[at:]


def insert(chance: Chance, data: bytes, _: bytes) -> bytes:
    at = chance.integers(20, len(data))
    return data[:at] + chance.bytes(chance.integers(1, 64)) + data[at:]


KINDS: list[Callable[[Chance, bytes, bytes], bytes]] = [flip, flip, header, tail, zeros, cut, splice, insert]


def _put(chance: Chance, data: bytes, first: int, n: int) -> bytes:
    changed = bytearray(data)
    for at in chance.integers(first, len(data), n):
        changed[at] ^= 1 << chance.integers(8) if chance.random() < 0.5 else chance.integers(1, 256)
    return bytes(changed)


def main() -> None:
    """Damage, decode, embed, count."""
    given, tally = asked(__doc__, n=2400, first=0), Tally()
    scenes = [drawn.scene(i) for i in range(3)]
    files = [drawn.whole(scenes[i], scenes[i - 1]) for i in range(3)]
    foreign = drawn.foreign(scenes[0])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "photographs")
        folder.mkdir()
        with quiet():
            expected = [undamaged(folder, tally, files[i], i, scenes[i]) for i in range(3)]
        refused: dict[str, bool] = {}
        for n in range(given.first, given.first + given.n):
            form, kind, suffix, i, data = damaged(np.random.default_rng([given.seed, n]), n, files, foreign)
            path = folder / f"{n:05d} {form} {kind}.{suffix}"
            path.write_bytes(data)
            with quiet():
                refused[path.name] = judge(path, form, kind, expected[i].get(form), tally)
        with quiet():
            embed(folder, refused, tally)
    tally.end(f"{given.n:,} mutated photographs ({tally.counted()})", "silent wrong", "tracebacks")


def damaged(
    chance: Chance, n: int, files: Sequence[Mapping[str, bytes]], foreign: Mapping[str, bytes]
) -> tuple[str, str, str, int, bytes]:
    """The n-th: its format, what was done to it, its suffix, of which scene it is, its bytes."""
    i, form = int(chance.integers(3)), str(chance.choice(list(files[0])))
    suffix = form.split()[0]
    if n % 40 == 0:
        return form, "empty", suffix, i, b""
    if n % 40 == 1:
        return form, "suffix", str(chance.choice(["jpg", "png", "tif", "bmp", "webp"])), i, files[i][form]
    if n % 40 == 2:
        form = str(chance.choice(list(foreign)))
        return form, "foreign", str(chance.choice(["jpg", "png", "tif"])), i, foreign[form]
    made = KINDS[chance.integers(len(KINDS))]
    return form, made.__name__, suffix, i, made(chance, files[i][form], files[i - 1][form])


def undamaged(folder: Path, tally: Tally, files: Mapping[str, bytes], i: int, scene: np.ndarray) -> dict[str, Any]:
    """Format -> what the whole files are decoded to, which is what was drawn."""
    found: dict[str, Any] = {}
    for form, data in files.items():
        path = folder / f"whole {i} {form}.{form.split()[0]}"
        path.write_bytes(data)
        kind, decoded = outcome(lambda path=path: [images.decode(path), images.decode(path, SMALL)])
        grey = "grey" in form or form == "pgm"
        right = scene if not grey else scene[:, :, [1, 1, 1]] if "16" in form else scene @ (0.299, 0.587, 0.114)
        right = np.rot90(right, -1) if "turned" in form else right
        if kind == "done":
            right = np.broadcast_to(right if right.ndim == 3 else right[:, :, None], (*right.shape[:2], 3))
            same = decoded[0].pixels.shape == right.shape
            off = np.abs(decoded[0].pixels.astype(float) - right).mean() if same else 255
            if off > 12:
                tally.fault(
                    "silent wrong", f"whole {form}", f"nothing is damaged, and it is off by {off:.0f} of 255 levels"
                )
            elif drawn.complaint(form, data):
                tally.fault("tracebacks", form, f"the drill's own judge is wrong: {drawn.complaint(form, data)}")
            else:
                found[form] = decoded
        elif kind == "traceback":
            tally.fault("tracebacks", f"whole {form}", str(decoded))
        path.unlink()
    return found


def judge(path: Path, form: str, kind: str, expected: Any, tally: Tally) -> bool:
    """Decode a damaged file, count what came; returns whether it was refused."""
    looked, size = outcome(lambda: images.check_header(path))
    if looked == "traceback":
        tally.fault("tracebacks", f"header of {form}", f"{path.name}: {size}")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        came = [outcome(lambda resize=resize: images.decode(path, resize)) for resize in (None, SMALL)]
    for what, decoded in came:
        if what == "traceback":
            tally.fault("tracebacks", form, f"{path.name}: {decoded}")
        elif what == "refused" and "\n" in str(decoded):
            tally.fault("reasons longer than a line", form, f"{path.name}: {decoded!r}")
    if kind == "foreign" and "done" in (came[0][0], came[1][0]):
        tally.fault("decoded, but of no documented format", form, path.name)
    elif "done" not in (came[0][0], came[1][0]):
        tally.counts["refused"] += 1
    elif expected is None:
        tally.counts["of a format that is not decoded even when whole"] += 1
    else:
        other = [apart(decoded, right) for (what, decoded), right in zip(came, expected, strict=True) if what == "done"]
        wrong, said = next(filter(None, other), ""), any(issubclass(one.category, ImatchWarning) for one in told)
        why = kind if kind in ("cut", "empty", "suffix") else drawn.complaint(form, path.read_bytes())
        if said or not wrong:
            tally.counts["said" if wrong else "harmless"] += 1
        elif why:
            tally.fault("silent wrong", form, f"{path.name}: {wrong}, though {why}")
        else:
            none = "a JPEG of which libjpeg says nothing" if form[:3] in ("jpg", "mpo") else "no redundancy"
            tally.counts[f"not detectable: {none}"] += 1
    return came[0][0] == "refused"


def apart(decoded: images.Decoded, right: images.Decoded) -> str:
    """How the pixels differ from those of the whole file; "" if they do not."""
    if decoded.pixels.shape != right.pixels.shape:
        return f"{decoded.pixels.shape[:2]} pixels for {right.pixels.shape[:2]}"
    off = np.abs(decoded.pixels.astype(int) - right.pixels).max(axis=2) > NOTABLE
    return f"{off.mean():.1%} of the pixels differ" if off.mean() > SHARE else ""


def embed(folder: Path, refused: Mapping[str, bool], tally: Tally) -> None:
    """01_embed on all of them: each is a row, or skipped with a reason of one line."""
    os.environ["EXPORT_ROOT"] = str(folder.parent / "exports")
    step = steps.start_embed(str(folder), run="drill", backbone_options={"max_keypoints": 50})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        came, found = outcome(lambda: steps.embed(step, max_skipped=1.0))
    if came != "done":
        tally.fault("tracebacks", "01_embed of all", str(found))
        return
    skipped = {row["id"]: row["skipped"] for row in found.skipped}
    for name in refused.keys() - {*found.ids} - skipped.keys():
        tally.fault("lost without a word", "01_embed", name)
    for name in {*found.ids} & {name for name, was in refused.items() if was}:
        tally.fault("silent wrong", "01_embed took what decode refuses", name)
    for name, reason in skipped.items():
        if not reason or "\n" in reason or len(reason) > 300:
            tally.fault("reasons longer than a line", "01_embed", f"{name}: {reason!r}")
    tally.counts["rows of 01_embed"], tally.counts["skipped by it"] = len(found.ids), len(skipped)


if __name__ == "__main__":
    main()
