# make setup | demo | lint | test | clean
#
# Each one first makes .venv from a bare Python, once; after that it starts at once (scripts/setup_cpu).
# PYTHON=...  the interpreter to build on      VENV=...  where to build instead of .venv
# ARGS="..."  handed on:  make demo ARGS="--help"   make test ARGS="-k layout"   make test ARGS="-n 0 --pdb"

VENV ?= .venv
BIN := $(VENV)/bin
export PYTHON VENV

.PHONY: setup demo lint test clean

setup:
	@scripts/setup_cpu

demo: setup
	@$(BIN)/mm-sglang demo $(ARGS)

lint: setup
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet --output-format concise
	@$(BIN)/mypy

# Two workers, and one thread in each process they start (tests/conftest.py).
test: lint
	@$(BIN)/python -m pytest -n 2 $(ARGS)

# An environment that scripts/setup_cpu did not make is not ours to remove.
clean:
	@if [ -e $(VENV)/.setup ]; then rm -rf $(VENV); fi
	rm -rf build dist *.egg-info demo_out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +
