# `make demo` and `make test` do all their own set-up. Override what you like: make test TORCH=torch TORCH_INDEX=https://...
PYTHON ?= python3
# The one place that names torch. 2.13.0 is what stemcache is tested with; on a GPU machine, `make TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-sweeps explore test-clients clients-here check format equivalence soak soak-requests bench train clean fuzz kernel-gate kernels-gpu engine-gpu soak-tiers docs test-page test-stack stack-local peers peers-install

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
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not sweep"

test-sweeps: $(READY)  ## the longer ones: all model families, Triton kernels under the interpreter, the demo, tiers
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m sweep

explore: $(READY)  ## the property tests with other examples than `make test` has, and others each time
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m hypothesis --hypothesis-profile=explore tests

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
	@$(BIN)/python -m uv pip install --quiet --python $(BIN)/python -e ".[dev,clients,langchain,llamaindex,haystack]"
	@$(BIN)/python -m pytest tests/clients

test-page: $(READY)  ## the live page in a real Chromium (installs playwright, and Debian's Chromium if there is none)
	@echo "==> installing playwright"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,page]"
	@test -n "$$STEMCACHE_CHROMIUM" || command -v chromium >/dev/null || command -v google-chrome >/dev/null || apt-get install -y -qq --no-install-recommends chromium || \
	    { echo "the page's tests need Chromium: install it, or set STEMCACHE_CHROMIUM to a browser's path" >&2; exit 1; }
	@$(BIN)/python -m pytest tests/page

test-stack: $(READY)  ## the compose stack: linted, and run as plain processes (installs redis-server and prometheus if missing)
	@echo "==> installing hadolint and check-jsonschema"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,stack]"
	@command -v redis-server >/dev/null || command -v valkey-server >/dev/null || apt-get install -y -qq --no-install-recommends redis-server
	@command -v promtool >/dev/null || apt-get install -y -qq --no-install-recommends prometheus || \
	    echo "no promtool here: what needs it is skipped" >&2
	@$(BIN)/python -m pytest tests/stack tests/stack/running

stack-local: $(READY)  ## run what docker-compose.yml runs, without containers: endpoint, Redis or Valkey, Prometheus
	@$(BIN)/python scripts/stack_local.py

FUZZ_SECONDS ?= 300
fuzz: $(READY)  ## throw bytes at what reads stored frames, guided by coverage, for FUZZ_SECONDS (installs atheris)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[fuzz]"
	@$(BIN)/python tests/fuzz/fuzz_frames.py -max_total_time=$(FUZZ_SECONDS)

soak: soak-requests soak-tiers  ## both of the two that follow

soak-requests: $(READY)  ## 1,000 requests, a third of which go away midway, against a real server
	@$(BIN)/python benchmarks/soak.py

soak-tiers: $(READY)  ## ten minutes of questions while the Redis server behind them is killed, hung and corrupted
	@$(BIN)/python benchmarks/soak_tiers.py

bench: $(READY)  ## run all benchmarks; results go to benchmarks/results/
	@for name in attention tree ttft decode answers codecs tiers policies queue_order retrieval blend growth; do $(BIN)/python benchmarks/$$name.py || exit 1; done
	@for kind in demo long search; do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/rag_timing.py $$kind || exit 1; done
	@$(BIN)/python benchmarks/rag_hits.py && $(BIN)/python benchmarks/rag_chart.py

peers-install: $(READY)  ## install the servers that we are compared with (llama.cpp, vLLM) into .peers/
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[peers]"
	@cd benchmarks && $(abspath $(BIN))/python -m peers.install

peers: $(READY)  ## compare with those that are installed (an hour on two cores); PEERS="--resume" and the like
	@cd benchmarks && $(abspath $(BIN))/python -m peers $(PEERS)

kernel-gate: $(READY)  ## compile every GPU kernel configuration for sm_80, sm_90 and sm_100 (no GPU needed)
	@$(BIN)/python -m stemcache.kernels.triton_compile

kernels-gpu: $(READY)  ## on a GPU: the kernels' tests, then their benchmark (nine minutes)
	@$(BIN)/python -m pytest -q tests/kernels
	@$(BIN)/python benchmarks/kernels.py

engine-gpu: $(READY)  ## on a GPU: the engine over the kernels, its tests, then its benchmark (ten minutes)
	@$(BIN)/python -m pytest -q tests/engine/test_decode_graphs.py tests/prefixtree/test_layout_and_pool.py
	@$(BIN)/python benchmarks/engine_gpu.py

train: $(READY)  ## train the demo model anew (two hours on two cores)
	@$(BIN)/python scripts/train_demo_model.py --out engine/demo/stemcache-demo --minutes 120

docs: $(READY)  ## write the reference of all modules to build/reference/ (installs pdoc)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@$(BIN)/pdoc --output-directory build/reference --docformat google stemcache.prefixtree stemcache.kernels stemcache.engine stemcache.ragcache stemcache.api

clean:  ## remove the virtual environment and all caches
	@rm -rf $(VENV) $(VENV)-clients build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
