# `make demo` and `make test` do all their own set-up. Override what you like: make test TORCH=torch TORCH_INDEX=https://...
PYTHON ?= python3
# The one place that names torch. 2.13.0 is what stemcache is tested with; on a GPU machine, `make TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-clients clients-here check format equivalence soak bench train clean fuzz kernel-gate kernels-gpu soak-tiers peers peers-install

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## / \t/' | expand -t 16

# Rebuilt when pyproject.toml changes. torch comes first and alone, so that nothing else chooses its build.
$(READY): pyproject.toml Makefile
	@test -x $(BIN)/python || { echo "==> creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing $(TORCH)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@echo "==> installing stemcache and its tools"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(READY)  ## serve the demo model and ask it 40 questions over HTTP
	@$(BIN)/stemcache demo

# Two at a time, a thread each: most of them wait for a process of their own now and then.
WORKERS ?= 2
test: $(READY)  ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(READY)  ## lint, formatting, types, import directions
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(READY)  ## put the code into its form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

equivalence: $(READY)  ## compare with transformers' generate, 200 workloads of each family (about 20 minutes)
	@$(BIN)/python benchmarks/equivalence.py --workloads 200

# In an environment of their own, as litellm and others hold openai, click and more back. uv, as pip searches their many
# requirements for minutes.
test-clients:  ## real clients against a real server (installs them beside the rest)
	@$(MAKE) --no-print-directory VENV=$(VENV)-clients clients-here

clients-here: $(READY)
	@echo "==> installing the clients"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -e ".[dev,clients]"
	@$(BIN)/python -m pytest tests/clients

FUZZ_SECONDS ?= 300
fuzz: $(READY)  ## throw bytes at what reads stored frames, guided by coverage, for FUZZ_SECONDS (installs atheris)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[fuzz]"
	@$(BIN)/python tests/fuzz/fuzz_frames.py -max_total_time=$(FUZZ_SECONDS)

soak: $(READY)  ## 1,000 requests, a third of which go away midway, against a real server
	@$(BIN)/python benchmarks/soak.py

soak-tiers: $(READY)  ## ten minutes of questions while the Redis server behind them is killed, hung and corrupted
	@$(BIN)/python benchmarks/soak_tiers.py

bench: $(READY)  ## run all benchmarks; results go to benchmarks/results/
	@for name in attention tree ttft decode answers codecs tiers policies queue_order retrieval growth; do $(BIN)/python benchmarks/$$name.py || exit 1; done

peers-install: $(READY)  ## install the servers that we are compared with (llama.cpp, vLLM) into .peers/
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[peers]"
	@cd benchmarks && $(abspath $(BIN))/python -m peers.install

peers: $(READY)  ## compare with those that are installed (an hour on two cores)
	@cd benchmarks && $(abspath $(BIN))/python -m peers

kernel-gate: $(READY)  ## compile every GPU kernel configuration for sm_80, sm_90 and sm_100 (no GPU needed)
	@$(BIN)/python -m stemcache.kernels.triton_compile

kernels-gpu: $(READY)  ## on a GPU: the kernels' tests, then their benchmark (nine minutes)
	@$(BIN)/python -m pytest -q tests/kernels
	@$(BIN)/python benchmarks/kernels.py

train: $(READY)  ## train the demo model anew (two hours on two cores)
	@$(BIN)/python scripts/train_demo_model.py --out engine/demo/stemcache-demo --minutes 120

clean:  ## remove the virtual environment and all caches
	@rm -rf $(VENV) $(VENV)-clients build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
