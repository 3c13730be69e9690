# Two commands are enough: `make run` and `make test`. Both set themselves up from requirements.lock.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.SUFFIXES:

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The newest Python from 3.11 on that is called by one of these names.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$p -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
ARGS   ?=
# Tests mostly wait for processes of their own: three at a time even on two cores, whole files each.
# PROCESSES=0 for a debugger.
PROCESSES ?= 3

.PHONY: help setup run test bench chaos awaits docs check format lint types contracts lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install into .venv from requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it or name it: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

run: $(STAMP) ## the main job; with nothing configured, the demo on the embedded stack (ARGS="--for 20")
	@STARTED_BY=$$PPID exec $(BIN)/python -m examples.main $(ARGS)

test: $(STAMP) ## the tests (ARGS="-k lanes" chooses)
	@exec $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(STAMP) ## the benchmarks (ARGS="drain --json FILE" and others: ARGS=--help)
	@exec $(BIN)/python -m benchmarks $(ARGS)

chaos: $(STAMP) ## proven delivery while everything dies at random (ARGS="--seed 7 --seconds 120")
	@exec $(BIN)/python -m tests.chaos $(ARGS)

awaits: $(STAMP) ## both processes killed at every await (ARGS="--seed 5 --deed stop flush", ARGS="--only lease.py")
	@$(BIN)/python -m tests.awaits --process listener $(ARGS)
	@exec $(BIN)/python -m tests.awaits --process worker $(ARGS)

docs: $(STAMP) ## the documentation as a site, in build/site
	$(BIN)/python -m sphinx -W --keep-going -q -c docs/site -d build/doctrees . build/site

check: $(STAMP) ## format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy pytest_tailrace.py tests/typing/accepted.py tests/typing/refused_rows.py
	$(BIN)/pyright --warnings
	$(BIN)/lint-imports

format: $(STAMP) ## write the code as `make check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(STAMP) ## write the lock files anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --extra models --extra otel --extra standin --extra dev --extra docs pyproject.toml --output-file requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --constraint requirements.lock pyproject.toml deploy/build.in --output-file deploy/requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
		--no-annotate --constraint requirements.lock --extra otel pyproject.toml deploy/build.in --output-file deploy/requirements-otel.lock

clean: ## remove what set-up and tests made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
