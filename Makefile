# gap_ds: `make help` lists the targets. Needs python >= 3.10 with venv, make, g++ and the Python headers; no GPU.

PYTHON      ?= python3
VENV        ?= .venv
PIP_ARGS    ?=
PYTEST_ARGS ?=
JOBS        ?= 2

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

# torch compiles DeepSpeed's shared-memory extension at its first use on a CPU: it calls $(CXX) and `ninja` by name.
# The build lies inside the environment, so that it fits its torch and a lock left by a killed run dies with it.
RUN := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python
PIP := $(RUN) -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints.txt
export CXX
export TORCH_EXTENSIONS_DIR ?= $(abspath $(VENV))/torch_extensions

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo docs test test-slow test-gpu lint format bench bench-gpu bench-guard clean distclean

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=$(PYTHON)  VENV=$(VENV)  PIP_ARGS='$(PIP_ARGS)'  PYTEST_ARGS='$(PYTEST_ARGS)'  JOBS=$(JOBS)"

env: $(STAMP)  ## create the environment in VENV with the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "PYTHON=$(PYTHON): $$($(PYTHON) -V 2>&1 | head -n 1); must be Python 3.10 or later. Set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "PYTHON=$(PYTHON): has no venv module. Install it (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@command -v $(CXX) >/dev/null || { \
	    echo "CXX=$(CXX): not found, and DeepSpeed compiles an extension. Install it (Debian, Ubuntu: apt install g++) or set CXX" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	    command -v nvidia-smi >/dev/null || { \
	    echo "PYTHON=$(PYTHON): Python.h is missing, and DeepSpeed compiles an extension. Install it (Debian, Ubuntu: apt install python3-dev)" >&2; exit 1; }
	@echo "== environment in $(VENV): a few minutes the first time"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@# deepspeed's setup.py imports torch, so torch comes first and deepspeed is built without isolation.
	@# torch is asked for with its pin: left free, pip takes a newer build that brings gigabytes of CUDA libraries.
	$(PIP) -q setuptools wheel ninja hjson packaging numpy
	$(PIP) -q torch
	$(PIP) -q --no-build-isolation --editable '.[all,dev]'
	@echo "== DeepSpeed's shared-memory extension: compiled once, about a minute (skipped where there is a GPU)"
	@if $(RUN) -c 'import torch, sys; sys.exit(torch.cuda.is_available())'; then \
	    $(RUN) -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' > $(VENV)/extension.log 2>&1 || { \
	        tail -n 30 $(VENV)/extension.log; \
	        echo "DeepSpeed's extension does not compile: see $(VENV)/extension.log" >&2; exit 1; }; fi
	@touch $@

demo: env  ## train a small Transformer dense and sparse, print both BLEU scores (about 5 minutes on 2 CPU cores)
	$(RUN) examples/translation/demo.py

test: lint  ## everything a change must pass: lint, types, floors, doctests, tests; a part by PYTEST_ARGS
ifdef PYTEST_ARGS
	$(RUN) -m pytest $(PYTEST_ARGS)
else
	@# Tests of sharded runs start two processes each, and come one after the other.
	$(RUN) -m pytest -n $(JOBS) --dist loadfile --ignore tests/sharding
	$(RUN) -m pytest tests/sharding
endif

test-slow: env  ## the long tests
	$(RUN) -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: env  ## the tests that need a CUDA device
	$(RUN) -m pytest -m gpu $(PYTEST_ARGS)

lint: env  ## ruff, mypy (strict on gap_ds), import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: env  ## let ruff sort imports, fix what it can, and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: env  ## write docs/reference.md from docstrings, settings and options
	$(RUN) docs/build_reference.py

bench: env  ## all benchmarks of a CPU, into benchmarks/results (about an hour on 2 cores)
	OMP_NUM_THREADS=1; export OMP_NUM_THREADS; set -e; \
	for name in masks attention peers scaling startup throughput memory; do $(RUN) benchmarks/$$name.py; done; \
	for ranks in 1 2 4; do $(RUN) benchmarks/boundary.py --ranks $$ranks --name boundary_$${ranks}_ranks; done; \
	rm -f benchmarks/results/overhead.json; \
	for preset in small base; do $(RUN) benchmarks/overhead.py --preset $$preset --tokens 512 --out benchmarks/results/overhead.json; done; \
	for backend in ddp fsdp1 fsdp2 fairscale zero1 zero2 zero3; do \
	    $(RUN) -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/overhead.py \
	        --backend $$backend --tokens 512 --out benchmarks/results/overhead.json; done
	$(RUN) benchmarks/tables.py

bench-gpu: env  ## all benchmarks of a GPU, in less than 8 minutes; needs no network
	$(RUN) benchmarks/gpu.py

bench-guard: env  ## time the hot paths; fails if a median is 20 % above the last run's on this machine
	$(RUN) -m pytest -q benchmarks/guard.py -p no:xdist --benchmark-autosave --benchmark-columns=median,iqr,rounds \
	    $$(test ! -d .benchmarks || echo --benchmark-compare --benchmark-compare-fail=median:20%)

clean:  ## remove caches and build products (the environment and runs/ stay)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find gap_ds tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove the environment too
	rm -rf $(VENV)
