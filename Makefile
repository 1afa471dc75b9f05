# `make` or `make help` lists the targets.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# measure.py is what the benchmarks share, accuracy_*.py are parts of accuracy.py
BENCHES = $(filter-out bench/measure.py bench/summary.py bench/accuracy_%.py,$(sort $(wildcard bench/*.py)))
PEERS := $(VENV)/.peers

# deepspeed's launcher and ninja (which builds DeepSpeed's operators) are found on PATH
export PATH := $(CURDIR)/$(BIN):$(PATH)
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup peers demo test coverage lint typecheck docs bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):[^#]*## */\1|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY) ## create .venv with everything pinned in constraints.txt

# torch goes in first, by its exact pin and alone: the second step then finds it there, and neither
# replaces it nor pulls in another build of it.
$(READY): setup.py constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "error: '$(PYTHON)' not found; set PYTHON to a Python 3.10 or newer, e.g. make setup PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: lmc_dist needs Python 3.10 or newer, and this is Python " + sys.version.split()[0] + " (" + sys.executable + "); try make setup PYTHON=python3.11")'
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --disable-pip-version-check -q --use-pep517 -c constraints.txt -e '.[dev,bench]'
	@touch $@

# Without their dependencies' own pins: one of them would replace torch by another build. What they import is listed.
peers: $(PEERS) ## add the libraries that tests and benchmarks compare with (curvlinops)

$(PEERS): requirements-peers.txt $(READY)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements-peers.txt
	@touch $@

demo: $(READY) ## run the demonstration; writes runs/demo
	$(BIN)/python -m lmc_dist.demo --output runs/demo

test: $(READY) ## run the tests that need no GPU
	$(BIN)/python -m pytest -m "not gpu"

# CI does without: a third more processor time. Ranks that a test kills leave no data.
TESTS := tests
coverage: $(READY) $(PEERS) ## run the tests that are not slow (or TESTS=...) and report which lines they reach
	@mkdir -p runs/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -m "not gpu and not slow" $(TESTS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

lint: $(READY) typecheck ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check

typecheck: $(READY) ## check types (part of lint)
	$(BIN)/mypy lmc_dist

docs: $(READY) ## build the documentation, warnings are errors; writes runs/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir runs/docs

bench: $(READY) $(PEERS) ## run every benchmark; writes runs/bench/NAME.json and summary.json
	@mkdir -p runs/bench
	@set -e; for script in $(BENCHES); do \
		name=$$(basename $$script .py); \
		echo "== $$script"; \
		$(BIN)/python $$script --json runs/bench/$$name.json; \
	done
	$(BIN)/python bench/summary.py runs/bench

clean: ## remove runs/, build outputs and caches (not .venv)
	rm -rf runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +
