"""What any number of photographs takes, on paper: hours, disk and memory, without photographs or weights.

.venv/bin/python -m tools.scaling 10000 1000000 --weight vits16 --side 256 --tflops 400
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import psutil
from PIL import Image

from imatch.core import compute
from imatch.core.settings import DATA_KEY
from imatch.core.types import ImatchError
from imatch.data import registry
from imatch.data.images import Resize
from imatch.data.store import KEEPS, kept_bytes
from imatch.features.dinov3 import computes_in_bf16
from imatch.features.weights import patch_side
from imatch.retrieval import kinds
from imatch.retrieval.index import choose
from imatch.steps import checks
from imatch.steps.checks import SHARE, figure

HELD = 1500
"""Bytes of a photograph's row in memory."""
FORMULA = (
    "hours = photographs x GFLOP / (share x GFLOP/s x workers x 3600); share of the matrix products: "
    + ", ".join(f"{share} in {precision}" for precision, share in SHARE.items())
)


@dataclass(frozen=True)
class Machine:
    """What a plan asks of a machine.

    Attributes:
        name: what it is called, and whether its rate was measured.
        precision: "fp32" or "bf16".
        rate: matrix products in FLOP/s.
    """

    name: str
    precision: str
    rate: float


def plan(
    hub_entry: str, photographs: Sequence[int], side: int, machines: Sequence[Machine], decoded: float, memory: int
) -> str:
    """A table of what so many photographs take: hours by machine and number of workers, disk by what is kept, memory by
    kind of index; and the formula.

    Args:
        hub_entry: such as "dinov3_vits16".
        photographs: how many, each a column.
        side: of the squares that the backbone sees, in pixels.
        machines: that hours are told for.
        decoded: seconds that one core takes to decode one (`decoding`).
        memory: bytes that an index may take (`index.choose`).

    Raises:
        ImatchError: a number below 1, or a side that is no multiple of the patch.

    >>> told = plan("dinov3_vits16", [10**6], 256, [Machine("a GPU", "bf16", 4e14)], 0.05, 2**36)
    >>> " ".join(told.splitlines()[2].split())
    'hours, a GPU, 1 worker 0.017'
    """
    if min(photographs) < 1 or side < 1 or any(not machine.rate > 0 for machine in machines):
        raise ImatchError("numbers of photographs, the side and rates must be above 0")
    Resize("stretch", side).check(patch_side(hub_entry))
    one = checks.cost(hub_entry, (side, side))
    tokens, d = one.tokens, one.dimension
    rows: list[tuple[str, list[str]]] = []

    def add(label: str, of: Callable[[int], float | str]) -> None:
        values = [of(n) for n in photographs]
        rows.append((label, [value if isinstance(value, str) else figure(value) for value in values]))

    for machine in machines:
        for workers in checks.WORKERS:
            given = {"flop": one.flop, "rate": machine.rate, "precision": machine.precision, "workers": workers}
            of = f"{workers} worker{'s' * (workers > 1)}"
            add(f"hours, {machine.name}, {of}", partial(checks.hours, **given))
    add(f"core hours of decoding, {1000 * decoded:.0f} ms a photograph", lambda n: n * decoded / 3600)
    for keep in KEEPS:
        each = kept_bytes(keep, tokens, d) + 4 * d + checks.LISTED
        add(f"GB on disk, keep {keep}, {each / 1000:.1f} kB a photograph", lambda n, each=each: n * each / 2**30)
    add(f"GB of memory, list of photographs, {HELD / 1000:.1f} kB each", lambda n: n * HELD / 2**30)
    for kind in (kind for kind in kinds.INDEXES if kind != "factory"):  # which has no layout of its own
        made = kinds.create_kind(kind)
        add(f"GB of memory, index {kind}", lambda n, made=made: made.memory(n, d) / 2**30)
    add(f"index that auto takes of {memory / 2**30:.0f} GB", lambda n: _kind(n, d, memory))
    wide = max(len(label) for label, _ in rows)
    lines = [
        f"{hub_entry} at {side} x {side} px: {one.flop / 1e9:.1f} GFLOP a photograph, {tokens} tokens of {d} numbers",
        f"{'photographs':{wide}} {''.join(f'{n:>13,}' for n in photographs)}",
        *(f"{label:{wide}} {''.join(f'{value:>13}' for value in values)}" for label, values in rows),
        FORMULA,
    ]
    return "\n".join(lines)


def _kind(n: int, d: int, memory: int) -> str:
    try:
        return choose(n, d, memory)[0]
    except ImatchError:  # said in the table in place of a kind
        return "none fits"


def decoding(side: int) -> float:
    """Seconds that one core takes to decode a drawn JPEG of 12 megapixels for a square of `side` pixels.

    >>> 0 < decoding(256) < 10
    True
    """
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (188, 250, 3), np.uint8)).resize((4000, 3000))
    grain = random.normal(0, 6, (3000, 4000, 1)).astype(np.float32)
    drawn = Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        path, resize = Path(folder) / "drawn.jpg", Resize("stretch", side)
        drawn.save(path, quality=92)
        return min(checks.decoding([path], resize, 1) for _ in range(3))


@click.command()
@click.argument("photographs", type=int, nargs=-1, required=True)
@click.option("--weight", default="vits16", show_default=True, help="A key of the registry.")
@click.option("--data-key", default=DATA_KEY, show_default=True, help="The registry.")
@click.option("--side", default=512, show_default=True, help="Pixels of square photographs.")
@click.option("--tflops", type=float, help="Also for a machine with this rate of bf16 matrix products.")
@click.option("--memory-gb", default=0.0, help="For the index; 0 is half of what is free here.")
def main(
    photographs: tuple[int, ...], weight: str, data_key: str, side: int, tflops: float | None, memory_gb: float
) -> None:
    """Plan for so many PHOTOGRAPHS, with what this machine measures."""
    device = compute.resolved("auto")
    precision = "bf16" if computes_in_bf16(device) else "fp32"
    here = checks.rate(device, precision)
    machines = [Machine(f"{device} in {precision} at {here / 1e9:.0f} GFLOP/s, measured here", precision, here)]
    if tflops is not None:
        machines.append(Machine(f"bf16 at {tflops:g} TFLOP/s, computed", "bf16", tflops * 1e12))
    memory = round(memory_gb * 2**30) or psutil.virtual_memory().available // 2
    try:
        hub_entry = registry.load(data_key).weight(weight).hub_entry
        print(plan(hub_entry, photographs, side, machines, decoding(side), memory))
    except ImatchError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
