#!/usr/bin/env bash
# The wheel in an empty environment: the base alone matches two photographs, in less than 500 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

git archive HEAD | (mkdir "$folder/source" && tar -x -C "$folder/source") # what was built here before is not in it
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$folder/source"
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$folder"/imatch-*.whl

"$python" - "$folder" <<'END'
import sys

import cv2
import numpy as np

from tools.vocabulary import dead_leaves

photograph = dead_leaves(np.random.default_rng(0), side=400)
cv2.imwrite(f"{sys.argv[1]}/a.png", photograph)
cv2.imwrite(f"{sys.argv[1]}/b.png", np.rot90(photograph)[50:350, 20:320])
cv2.imwrite(f"{sys.argv[1]}/c.png", dead_leaves(np.random.default_rng(1), side=400))
END

cd "$folder" # not where the source is
imatch="$folder/venv/bin/imatch"
"$imatch" match a.png b.png -o pair.png
test -s pair.png
code=0
said=$("$imatch" match a.png c.png) || code=$?
test "$code" = 1
grep -q "sift only; xfeat is not installed: pip install 'imatch\[learned\]'" <<< "$said"
code=0
said=$("$imatch" match a.png b.png --weight vits16 2>&1) || code=$?
test "$code" = 2
echo "$said"
megabytes=$(du -sm "$folder/venv" | cut -f 1)
echo "$megabytes MB in the environment"
test "$megabytes" -le 500
echo "the wheel holds"
