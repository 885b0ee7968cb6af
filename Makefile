# make demo | test | lint | bench: each first makes .venv and installs what it needs, once, and again when pyproject.toml
# changes. Needs python3 (3.11 or newer) with its venv module, and make.

PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
# What is installed, as stamp files. The dev install contains the plain one; the demo waits only for the plain one.
PLAIN   := $(VENV)/.installed-plain
DEV     := $(VENV)/.installed-dev
PEERS   := $(VENV)/.installed-peers
LOWEST  := .venv-lowest

# One installation at a time, even under make -j.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-lowest lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

demo: $(PLAIN) ## train, prune, retrain and reload a digits CNN (result in runs/demo)
	@$(BIN)/python scripts/demo.py --folder runs/demo

test: $(DEV) ## run the tests, without the slow ones
	@echo "==> tests"
	@$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: $(DEV) ## run the slow tests
	@echo "==> slow tests"
	@$(BIN)/python -m pytest -m slow

test-lowest: $(LOWEST)/.installed ## run the tests with the oldest dependencies that pyproject.toml allows
	@echo "==> tests with the lowest versions"
	@$(LOWEST)/bin/python -m pytest -n $(WORKERS) -m "not slow"

lint: $(DEV) ## check style, format and types
	@echo "==> ruff check"
	@$(BIN)/ruff check .
	@echo "==> ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "==> mypy"
	@$(BIN)/mypy

format: $(DEV) ## rewrite the files in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(PEERS) ## run every file of benchmarks/
	@set -e; for file in benchmarks/bench_*.py; do echo "==> $$file"; $(BIN)/python "$$file"; done

clean: ## remove the environments and caches (not runs/)
	@rm -rf $(VENV) $(LOWEST) .mypy_cache .pytest_cache .ruff_cache build dist

# pip is what venv writes last: an environment that was interrupted half-way is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "prunus needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); set one with: make PYTHON=python3.12"; exit 2; }
	@echo "==> creating $(VENV) with $$($(PYTHON) -V)"
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "python3 has no venv module; on Debian: apt install python3-venv"; exit 2; }

# $(BIN)/pip is order-only: it must exist, its age says nothing about what is installed.
$(PLAIN): pyproject.toml | $(BIN)/pip
	@echo "==> installing prunus into $(VENV) (the first time this downloads PyTorch: a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/pip
	@echo "==> installing prunus with its development tools into $(VENV) (the first time this downloads PyTorch: a few minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $(PLAIN) $@

$(PEERS): pyproject.toml | $(BIN)/pip
	@echo "==> installing prunus with the peers of its benchmarks into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,peers]"
	@touch $(PLAIN) $(DEV) $@

# The core dependencies with == for >=; the tools are the newest.
$(LOWEST)/.installed: pyproject.toml
	@echo "==> installing the lowest versions into $(LOWEST) (this downloads a PyTorch of its own: a few minutes)"
	@$(PYTHON) -m venv --clear $(LOWEST)
	@$(LOWEST)/bin/python -c 'import tomllib; \
	  print(*(d.replace(">=", "==") for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]), sep="\n")' \
	  > $(LOWEST)/lowest.txt
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(LOWEST)/lowest.txt -e ".[dev]"
	@touch $@
