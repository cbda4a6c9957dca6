"""What an engine costs: 01_embed by one worker of Dask, and by one process, beside this process, in one run.

    .venv/bin/python tests/benchmarks/bench_engines.py

ViT-S/16 (random weights) at 256 px, 200 JPEGs of 1024 x 682. The scheduler and its worker run before the clock starts,
as in a cluster; that a process has to be started, and the model loaded, is in every figure.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from imatch.core import settings
from imatch.core.compute import ComputeOptions
from tests.benchmarks import bench_dinov3

PHOTOGRAPHS, TURNS = 200, 3


def main() -> None:
    """The best of some turns, sides in turn."""
    from distributed import LocalCluster

    with bench_dinov3.at_hand(PHOTOGRAPHS) as (folder, photographs, data_key):
        with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
            sides = {
                "local": {},
                "dask, one worker": {"engine": "dask", "scheduler": cluster.scheduler_address},
                "processes, one": {"engine": "processes"},
            }
            best = dict.fromkeys(sides, float("inf"))
            for turn in range(TURNS):
                for name, given in sides.items():
                    started = time.perf_counter()
                    to = folder / f"{turn} {name}"
                    resources = ComputeOptions(devices="cpu", **given)
                    bench_dinov3.embed(photographs, data_key, to, "auto", resources=resources)
                    best[name] = min(best[name], time.perf_counter() - started)
        for name, took in best.items():
            print(f"{name:<18}{1000 * took / PHOTOGRAPHS:7.1f} ms a photograph{best['local'] / took:7.2f} of local")
        print(f"{settings.cores()} cores, {Path(sys.executable).name} {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
