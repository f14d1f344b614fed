# gap_ds: `make help` lists the targets. Needs python >= 3.10 with venv, make, g++ and the Python headers; no GPU.

PYTHON      ?= python3
VENV        ?= .venv
PIP_ARGS    ?=
PYTEST_ARGS ?=
JOBS        ?= 2
# BENCH_ARGS=--quick runs the benchmarks at their size for tests. BENCH_PYTHON: see bench-gpu.
BENCH_ARGS   ?=
BENCH_PYTHON ?=

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
.PHONY: help env demo docs test test-full test-rest test-slow test-gpu test-times mutants lint format bench bench-gpu bench-guard bench-guard-baseline \
    clean distclean

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
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
	@# Tests plan timm's models. Its torchvision fits one build of torch alone, and transformers would use timm: apart, without either.
	$(PIP) -q --no-deps --upgrade --target $(VENV)/timm timm
	@echo "== DeepSpeed's shared-memory extension: compiled once, about a minute (skipped where there is a GPU)"
	@if $(RUN) -c 'import torch, sys; sys.exit(torch.cuda.is_available())'; then \
	    $(RUN) -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' > $(VENV)/extension.log 2>&1 || { \
	        tail -n 30 $(VENV)/extension.log; \
	        echo "DeepSpeed's extension does not compile: see $(VENV)/extension.log" >&2; exit 1; }; fi
	@touch $@

demo: env  ## train a small Transformer dense and sparse, print both BLEU scores (about 5 minutes on 2 CPU cores)
	$(RUN) examples/translation/demo.py

# A file stays with one process. In the order of the folders: the long files, of examples and sharded runs, come first.
SPREAD := -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: lint  ## what a change must pass, below 10 minutes on 2 free cores: lint, types, floors, tests; a part by PYTEST_ARGS
	$(RUN) -m pytest $(or $(PYTEST_ARGS),$(SPREAD))

test-full: test test-rest  ## all tests but those of many minutes and of a GPU

test-rest: env  ## what test-full has beyond test
	$(RUN) -m pytest -m "full and not slow and not gpu" $(or $(PYTEST_ARGS),$(SPREAD))

test-slow: env  ## soak, kill and benchmark runs, of many minutes
	$(RUN) -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

mutants: env  ## put faults into a copy of the package, one at a time, and say which the tests find; FAULTS: some alone
	$(RUN) tests/mutants.py $(FAULTS)

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

# Cheap ones first. Each writes aside and is moved whole, so a figure that is not made anew stays as it was.
BENCHES := device masks startup attention peers profile_paths throughput compact boundary cuts looks memory kept_state gathering hook overhead generate

bench: env  ## all benchmarks of a CPU but inference, into benchmarks/results (about an hour on 2 free cores)
	@started=$$(date +%s); $(MAKE) --no-print-directory -k -j1 -o env $(BENCHES:%=bench-%); status=$$?; \
	    $(RUN) benchmarks/tables.py || status=1; \
	    echo "== all benchmarks: $$(( ($$(date +%s) - started + 59) / 60 )) minutes"; exit $$status

$(BENCHES:%=bench-%): bench-%: env
	@echo "== $*"; rm -rf build/bench/$*; mkdir -p build/bench/$*
	@OMP_NUM_THREADS=1 $(RUN) benchmarks/$*.py $(BENCH_ARGS) --out build/bench/$*
	@mv build/bench/$*/* benchmarks/results/

# With an environment of your own: make bench-gpu BENCH_PYTHON=python3. Nothing is installed then, and nothing asked of a network.
bench-gpu: $(if $(BENCH_PYTHON),,env)  ## all benchmarks of a GPU, in less than 8 minutes; BENCH_PYTHON: a python that has torch
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(or $(BENCH_PYTHON),$(RUN)) benchmarks/gpu.py

# The baseline is written by its own target alone: a slower run that became the next one's baseline would be forgiven.
GUARD   := .benchmarks/guard
ALLOWED ?= 25%
GUARDED = OMP_NUM_THREADS=1 $(RUN) -m pytest -q benchmarks/guard.py -p no:xdist -p no:cacheprovider --timeout 1200 \
    --benchmark-storage=file://$(GUARD) --benchmark-timer=time.process_time --benchmark-columns=min,median,rounds

bench-guard-baseline: env  ## time the hot paths, for bench-guard to compare with
	rm -rf $(GUARD)
	$(GUARDED) --benchmark-save=baseline || { rm -rf $(GUARD); exit 1; }

bench-guard: env  ## time the hot paths; fails above limits, or ALLOWED=25% above the baseline
	@ls $(GUARD)/*/*_baseline.json >/dev/null 2>&1 || { \
	    echo "$(GUARD): no baseline to compare with. Make one of the code before the change: make bench-guard-baseline" >&2; exit 1; }
	$(GUARDED) --benchmark-compare --benchmark-compare-fail=min:$(ALLOWED)

test-times: env  ## run the tests of `make test` and write how long each part took, into benchmarks/results
	$(RUN) benchmarks/suite.py --jobs $(JOBS)

clean:  ## remove caches and build products (the environment and runs/ stay)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find gap_ds tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove the environment too
	rm -rf $(VENV)
