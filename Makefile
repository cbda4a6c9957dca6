# make help lists the targets
PYTHON ?= python3
# cpu or gpu; what was installed last stays
FAISS ?= $(if $(wildcard .venv/ready-gpu),gpu,cpu)
BIN := .venv/bin
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test redis-server chromium buildah debootstrap podman lint lab image-check wheel-check bench drills lock vocabulary clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */:/' | awk -F: '{printf "make %-12s %s\n", $$1, $$2}'

READY := .venv/ready-$(FAISS)

setup: $(READY)  ## make .venv with the pinned dependencies (FAISS=gpu for faiss-gpu)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "imatch needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "pip>=25.1" setuptools
	$(BIN)/python -m pip uninstall --quiet --yes faiss-cpu faiss-gpu
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[notebooks,dinov3,learned,$(FAISS),demo,heif,redis,dask,openvino]" --group dev
	rm -f .venv/ready-* && touch $@

demo: $(READY)  ## the whole chain on 18 real photographs, a table and pictures
	$(BIN)/imatch demo

test: $(READY) redis-server chromium  ## every test
	$(BIN)/python -m pytest -n auto --dist loadfile

# Debian's, for the tests, which start their own: no service stays on (the variables are for SysV and for systemd)
APT := $(if $(filter-out 0,$(shell id -u)),sudo -n) env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 SYSTEMD_OFFLINE=1 apt-get -qq

# what podman wants beside it to run containers in a network of their own
podman: WITH := runc catatonit iptables containernetworking-plugins golang-github-containernetworking-plugin-dnsname

redis-server chromium buildah debootstrap podman:
	@command -v $@ > /dev/null || \
	{ $(APT) update; $(APT) install --yes --no-install-recommends $@ $(WITH); } > /dev/null 2>&1 || \
	echo "no $@, and apt-get cannot install it here: the tests that need it will be skipped"

lint: $(READY)  ## format and check
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(BIN)/mypy

lab: $(READY)  ## JupyterLab on the notebooks
	$(BIN)/imatch lab notebooks $(if $(filter 0,$(shell id -u)),--allow-root)

image-check: $(READY) buildah debootstrap podman  ## build the container's image without Docker, and use it (minutes; FAISS=cpu for that one)
	tests/image_check.sh

wheel-check: $(READY)  ## build the wheel, and match two photographs in an empty environment that has it alone
	tests/wheel_check.sh

bench: $(READY) redis-server  ## speed, as ratios measured in one run
	$(BIN)/python tests/benchmarks/bench_embed.py
	$(BIN)/python tests/benchmarks/bench_dinov3.py
	$(BIN)/python tests/benchmarks/bench_dinov3.py --memory
	$(BIN)/python tests/benchmarks/bench_engines.py
	$(BIN)/python tests/benchmarks/bench_fast.py
	$(BIN)/python tests/benchmarks/bench_gpu.py
	$(BIN)/python tests/benchmarks/bench_redis.py
	$(BIN)/python tests/benchmarks/bench_search.py
	$(BIN)/python tests/benchmarks/bench_search.py --memory
	$(BIN)/python tests/benchmarks/bench_match.py
	$(BIN)/python tests/benchmarks/bench_match.py --memory
	$(BIN)/python tests/benchmarks/bench_learned.py
	$(BIN)/python tests/benchmarks/bench_pairs.py --every 4
	$(BIN)/python tests/benchmarks/bench_real.py --every 4

# all of them run, whatever one finds
drills: $(READY) redis-server  ## damage, kill, fill and mistype by seed, and count what is silently wrong (minutes)
	wrong=0; for one in photographs parameters damaged kills disks redis_kills; do \
	$(BIN)/python -m tests.drills.$$one || wrong=1; done; exit $$wrong

vocabulary: $(READY)  ## learn the visual words of sift and xfeat again (minutes)
	$(BIN)/python -m tools.vocabulary sift imatch/features/sift_vocabulary.npy
	$(BIN)/python -m tools.vocabulary xfeat imatch/features/xfeat_vocabulary.npy

# with FAISS=gpu, for faiss-gpu brings CUDA packages that must be pinned, too
lock: $(READY)  ## write constraints.txt from what is installed
	$(BIN)/python -m pip freeze --exclude-editable --exclude pip | grep -v '^faiss' > constraints.txt

clean:  ## remove the environment and the caches (never exports or data)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
