"""What xfeat and lighterglue cost on one thread of the CPU, beside sift and its matcher in the same run.

    .venv/bin/python tests/benchmarks/bench_learned.py

CPU milliseconds, the median of some turns and the least: a photograph of 800 pixels, and a pair of 1,000 keypoints.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).parents[2]))

from imatch.cli import demo
from imatch.data import images
from imatch.features.base import create_backbone, embed_decoded, matcher_for
from imatch.matching.matchers import create_matcher

SIDE, KEYPOINTS, TURNS = 800, 1000, 25


def main() -> None:
    """Print a line a backbone."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary, threadpool_limits(1):
        demo.write(Path(temporary))
        path = Path(temporary) / "motorcycle_left.png"
        work: dict[str, Callable[[], object]] = {}
        for weight in ("sift", "xfeat"):
            backbone = create_backbone(weight, {"max_keypoints": KEYPOINTS}, device="cpu")
            resize = images.Resize("long_side", long_side=SIDE)
            decoded = images.decode(path, resize, backbone.patch, backbone.resampling)
            tokens = embed_decoded(decoded, backbone)
            moved = images.decode(decoded.pixels[:, SIDE // 8 :], None, backbone.patch)
            other = embed_decoded(images.decode(moved.pixels, images.Resize(), backbone.patch), backbone)
            matcher = create_matcher(matcher_for(weight))
            sizes = (decoded.size, moved.size)
            work[f"{weight}: {len(tokens.xy)} keypoints of a photograph"] = partial(embed_decoded, decoded, backbone)
            work[f"{matcher_for(weight)}: a pair"] = partial(matcher, tokens, other, sizes)
        took: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(TURNS):
            for name, one in work.items():
                started = time.process_time()
                one()
                took[name].append(1000 * (time.process_time() - started))
    for name, ms in took.items():
        print(f"{name:<40} {np.median(ms):7.1f} ms, least {min(ms):5.1f}")
    print(f"{Path(sys.executable).name} {' '.join(sys.argv)}")


if __name__ == "__main__":
    main()
