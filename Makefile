# `make demo` and `make test` set up everything they need. `make help` lists the rest.

VENV ?= .venv
# the interpreter to build the environment with; empty: python3, then python3.13, 3.12, 3.11
PYTHON ?=
# a package index to take torch from, such as a CPU-only one; empty: whatever pip is configured with
TORCH_INDEX ?=
# further arguments of pytest or of the demo, for example: make test ARGS="-k session"
ARGS ?=

# idle OpenMP threads sleep instead of spinning on the cores that our own threads use
export OMP_WAIT_POLICY ?= passive

BIN := $(VENV)/bin
SETUP := PYTHON='$(PYTHON)' TORCH_INDEX='$(TORCH_INDEX)' sh tools/setup.sh '$(VENV)'
PINS := constraints.txt pyproject.toml tools/setup.sh

.DEFAULT_GOAL := help
.PHONY: help venv install demo test check lint format floors spelling types laws slow gpu bench docs wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

$(VENV)/.milonga-base: $(PINS)
	@$(SETUP)
	@touch '$@'

$(VENV)/.milonga-dev: $(PINS)
	@$(SETUP) dev
	@touch '$@' '$(VENV)/.milonga-base'

$(VENV)/.milonga-docs: $(PINS)
	@$(SETUP) dev,docs
	@touch '$@' '$(VENV)/.milonga-base' '$(VENV)/.milonga-dev'

# Numba keeps what it compiles beside the sources, so this is quick where nothing changed
$(VENV)/.milonga-kernels: $(wildcard src/milonga/ops/*.py src/milonga/ops/*/*.py)
	@$(BIN)/python -m milonga.cli.main doctor --compile
	@touch '$@'

venv: $(VENV)/.milonga-base  ## the environment with the pinned packages, for users
install: $(VENV)/.milonga-dev $(VENV)/.milonga-kernels  ## the same with all tools of a contributor
$(VENV)/.milonga-kernels: | $(VENV)/.milonga-base

demo: $(VENV)/.milonga-base $(VENV)/.milonga-kernels  ## train, evaluate and stream the demo model (runs/demo)
	@$(BIN)/milonga demo $(ARGS)

test: install check  ## lint, import floors, spelling, types, then the tests, on all cores
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(ARGS)

check: lint floors spelling types

lint: $(VENV)/.milonga-dev  ## ruff: faults and formatting
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

format: $(VENV)/.milonga-dev  ## let ruff mend what it can
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

floors: $(VENV)/.milonga-dev  ## imports go downwards only, without circles
	@$(BIN)/lint-imports

spelling: $(VENV)/.milonga-dev  ## codespell
	@$(BIN)/codespell

types: $(VENV)/.milonga-dev  ## pyrefly
	@$(BIN)/pyrefly check

laws: install  ## the laws that every layer and model obeys
	@$(BIN)/python -m pytest tests/laws $(ARGS)

slow: install  ## the tests that take minutes
	@$(BIN)/python -m pytest -m slow $(ARGS)

gpu: install  ## the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu $(ARGS)

bench: install  ## measure against peers, interleaved in one run
	@$(BIN)/python benchmarks/run.py $(ARGS)

docs: $(VENV)/.milonga-docs  ## the documentation site, into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/.milonga-dev  ## a wheel, into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove caches and builds; keeps runs/ and the environment
	@rm -rf dist site build .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
