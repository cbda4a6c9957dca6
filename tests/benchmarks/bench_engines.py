"""What an engine costs: 01_embed by one worker of Dask, and by one process, beside this process, in one run.

    .venv/bin/python tests/benchmarks/bench_engines.py

ViT-S/16 (random weights) at 256 px, 200 JPEGs of 1024 x 682. The scheduler and its worker run before the clock starts,
as in a cluster; that a process has to be started, and the model loaded, is in every figure.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import imatch
from imatch import engines, images, registry, runs
from tests import random_weights
from tests.benchmarks.bench_dinov3 import write_photographs

PHOTOGRAPHS, SIDE, TURNS = 200, 256, 3


def main() -> None:
    """The best of some turns, sides in turn."""
    from distributed import LocalCluster

    registry.share_cores()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["WEIGHTS_ROOT"], os.environ["XDG_CACHE_HOME"] = str(folder / "weights"), str(folder / "cache")
        data_key = random_weights.write(folder / "weights", ["vits16"])
        photographs = write_photographs(folder / "photographs", PHOTOGRAPHS)
        with LocalCluster(1, threads_per_worker=1, dashboard_address=":0") as cluster:
            sides = {
                "local": engines.create("local"),
                "dask, one worker": engines.create("dask", scheduler=cluster.scheduler_address),
                "processes, one": engines.create("processes"),
            }
            best = dict.fromkeys(sides, float("inf"))
            for turn in range(TURNS):
                for name, engine in sides.items():
                    best[name] = min(best[name], seconds(photographs, data_key, folder / f"{turn} {name}", engine))
        for name, took in best.items():
            print(f"{name:<18}{1000 * took / PHOTOGRAPHS:7.1f} ms a photograph{best['local'] / took:7.2f} of local")
        print(f"{registry.cores()} cores, {Path(sys.executable).name} {' '.join(sys.argv)}")


def seconds(photographs: Path, data_key: Path, exports: Path, engine: engines.Engine) -> float:
    """The notebook's calls, from start to finish."""
    with redirect_stdout(StringIO()):
        step = imatch.start_embed(
            str(photographs),
            data_key=str(data_key),
            exports=str(exports),
            run="bench",
            weight="vits16",
            backbone_options={},
            resize=images.Resize("stretch", long_side=SIDE),
            shard_size=64,
            tag="",
            on_change="refuse",
        )
        started = time.perf_counter()
        imatch.finish_embed(step, imatch.embed(step, engine=engine, devices="cpu"))
        took = time.perf_counter() - started
    assert runs.read(step.folder).work["photographs"] == PHOTOGRAPHS
    return took


if __name__ == "__main__":
    main()
