# Each target makes the environment it needs; the first time that takes minutes, later it takes none.
VENV ?= .venv
PYTHON := $(firstword $(foreach p,python3.12 python3.13 python3 python,$(shell $(p) -c 'import sys; sys.version_info >= (3, 12) and print("$(p)")' 2>/dev/null)))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# For pytest, such as --registry-required: without a package registry, tests that need one fail.
PYTEST_OPTIONS ?=
EXTRAS = dev$(shell nvidia-smi >/dev/null 2>&1 && echo ,cuda13)

# A failing recipe would add make's own lines and exit with 2. Asked whether a target is up to date, make says nothing,
# runs nothing and exits with 1.
ifeq ($(PYTHON)$(filter clean,$(MAKECMDGOALS)),)
$(shell echo "jmoe needs Python 3.12 or later, and found none as python3.12, python3.13, python3 or python: install it" >&2)
MAKEFLAGS += --question
endif

.PHONY: demo example test test-all gpu-test lint docs bench clean

demo: $(READY)
	@$(BIN)/jmoe parity --checkpoint examples/tiny_gpt_oss --layer 0 --adapter examples/tiny_gpt_oss/adapter --text LICENSE

example: $(READY)
	@$(BIN)/python examples/finetune_layer.py
	@$(BIN)/python examples/qwen3_moe_layer.py
	@$(BIN)/python examples/finetune_gpt_oss.py

# One file's tests run in one process, which shares what they compile. `slow` is what test-all runs and test does not.
PYTEST = $(BIN)/pytest -q -n 2 --dist loadfile --durations=20 $(PYTEST_OPTIONS)

test: $(READY)
	@echo "== kernels in Triton's interpreter"
	@TRITON_INTERPRET=1 $(PYTEST) -m "interpret and not slow"
	@echo "== everything else: JAX, PyTorch, formats, every launch compiled for every GPU family"
	@$(PYTEST) -m "not interpret and not slow"

test-all: $(READY)
	@echo "== what make test leaves out: whole runs of commands and examples, new environments, larger sizes"
	@TRITON_INTERPRET=1 $(PYTEST) -m "interpret and slow"
	@$(PYTEST) -m "not interpret and slow"

# On a machine with an NVIDIA GPU, some ten minutes on 16 cores; PHASES="small large alone" are all there are.
PHASES ?=
gpu-test: $(READY)
	@$(BIN)/python -m tests.gpu.record $(PHASES)
	@$(BIN)/python -m jmoe.bench.readme

lint: $(READY)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "== build/site/index.html"

bench: $(READY)
	@$(BIN)/jmoe bench

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info

$(READY): pyproject.toml
	@echo "== making $(VENV) with $(PYTHON): installs JAX, PyTorch and Triton, several minutes the first time"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	@echo "== adding JAX's CUDA plugin without the CUDA libraries, to compile for GPUs that are not here"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  "jax-cuda13-plugin==$$($(BIN)/python -c 'import jax; print(jax.__version__)')"
	@touch $(READY)
