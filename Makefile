# `make train` and `make test` are all that a new clone needs: they make .venv and install into it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
BENCH  := .venv-bench
ARGS   ?=

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: Python 3.11, 3.12 or 3.13 is needed (no Hydra runs on 3.14 yet): make PYTHON=python3.13"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.PHONY: train
train: $(STAMP) ## Train (or resume) the main job; settings go in ARGS="optimizer.lr=0.01 ..."
	$(BIN)/python train.py $(ARGS)

.PHONY: test
test: $(STAMP) ## Run all tests
	$(BIN)/python -m pytest $(ARGS)

.PHONY: check
check: $(STAMP) ## Lint, format check, type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: chaos
chaos: $(STAMP) ## Disturb a run at random, a few seconds per kill, and compare (ARGS="--kills 200 --seed 0")
	$(BIN)/python -m tests.chaos $(ARGS)

.PHONY: board
board: $(STAMP) ## Open TensorBoard on outputs/
	$(BIN)/tensorboard --logdir outputs

$(BENCH)/.installed: requirements.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

.PHONY: bench
bench: $(BENCH)/.installed ## Measure what a checkpoint costs, beside peers (ARGS="--quick" for a look)
	$(BENCH)/bin/python -m benchmarks $(ARGS)

.PHONY: figure
figure: $(STAMP) ## Draw the README's picture anew, from two real runs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	$(BIN)/python docs/killed_and_resumed.py

.PHONY: clean
clean: ## Remove the virtual environments and caches; outputs/ stays
	rm -rf $(VENV) $(BENCH) .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
