# The targets make their own environment in .venv the first time; running them again installs nothing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup hashes demo test test-all check docs bench bench-gpu clean

help:  ## this list
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-10s%s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Another Python (3.11 to 3.13) for .venv: make setup PYTHON=python3.12"

setup: $(INSTALLED)  ## install everything into .venv, with exact versions; HASHED=1: only files with known hashes
	@echo "Now: source $(BIN)/activate"

demo: $(INSTALLED)  ## from text to a chat model, 10 to 60 minutes on two CPU cores; again: says what is there
	$(BIN)/nanochat-pl pipeline experiment=demo

test: $(INSTALLED)  ## the tests that take seconds each, on all cores
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(INSTALLED)  ## the slow tests too
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not network"

check: $(INSTALLED)  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)  ## the site with all pages, settings and the Python API, in build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(INSTALLED)  ## what costs how much time and memory, in some ten minutes on two cores; each ends with a line of JSON
	@set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done

bench-gpu: $(INSTALLED)  ## one GPU in eight minutes: training, attention, decoding; writes bench_gpu.json for `nanochat-pl plan bench=bench_gpu.json`
	$(BIN)/python benchmarks/gpu/bench_gpu.py --json bench_gpu.json

clean:  ## remove .venv and what tools left; runs and caches stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The hashes of all files that a version has on PyPI, so that one list is for every system and Python from 3.11 on. Not of
# torch: its builds for CPU and CUDA are different files of the same version, and indexes that serve one or the other do
# not have the hashes of PyPI.
hashes:  ## write hashes.txt anew, from constraints.txt
	$(PYTHON) -m venv build/hashes
	build/hashes/bin/python -m pip install --quiet --disable-pip-version-check uv
	build/hashes/bin/uv pip compile --quiet --universal --python-version 3.11 --no-deps --generate-hashes \
		--no-emit-package torch --no-annotate --custom-compile-command "make hashes" constraints.txt -o hashes.txt

# Two terminals may ask for it at once: one waits until the other has installed, and finds that done.
ONE_AT_A_TIME = import fcntl, subprocess, sys; lock = open("Makefile"); fcntl.flock(lock, fcntl.LOCK_EX); \
	sys.exit(subprocess.call(sys.argv[1:]))

ifndef LOCKED
$(INSTALLED): pyproject.toml constraints.txt hashes.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else "$(PYTHON) is Python %d.%d, 3.11 to 3.13 is needed: make $(MAKECMDGOALS) PYTHON=python3.12" % v)'
	@$(PYTHON) -c '$(ONE_AT_A_TIME)' $(MAKE) --no-print-directory LOCKED=1 $@
else
$(INSTALLED): pyproject.toml constraints.txt hashes.txt
	@echo "Installing some 200 packages into $(VENV): 3 GB (more with a CUDA build of PyTorch), a few minutes without output."
	$(PYTHON) -m venv $(VENV)
ifdef HASHED
# pip asks for hashes of all or of none: torch, with what it needs of CUDA, comes after the others and by its version
# alone, and this package, which has no hash, is built with the hatchling of the list. At the end: is anything missing?
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r hashes.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
endif
	@touch $@
endif
