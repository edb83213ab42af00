PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
# sam2 would otherwise look for a CUDA compiler; albumentations would ask the network for a newer version.
export SAM2_BUILD_CUDA := 0
export NO_ALBUMENTATIONS_UPDATE := 1

.DEFAULT_GOAL := help
.PHONY: help setup format check test test-faults demo bench clean

help: ## list these goals
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv with everything, at the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vessel needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip
	$(BIN)/pip install -c constraints.txt torch torchvision setuptools wheel hatchling editables
	$(BIN)/pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

format: setup ## put the code into its form and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

check: setup ## lint, form, types, the direction of imports and the pins of constraints.txt
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest tests/test_layers.py tests/test_lock.py

test: setup ## all tests and the ten slowest; make test only=tests/test_sweep.py for some
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations=10 $(only)

test-faults: setup ## kill training fifty times at random moments and see it go on, about 20 minutes
	$(BIN)/python -m tests.faults

demo: setup ## prepare, train, evaluate, export and predict on synthetic pullbacks
	$(BIN)/python -m vessel.demo

bench: setup ## what is left out of the public code's work, in seconds and bytes
	$(BIN)/python -m bench

clean: ## remove caches, builds and everything in outputs/
	rm -rf outputs/* build dist .pytest_cache .ruff_cache .mypy_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
