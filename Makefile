# Everything starts here; `make` alone shows what there is. Needs Python 3.11, a C++ compiler and cmake.
#   PYTHON=...   the interpreter that .venv is made with (default: python3.11, then python3)
#   ARGS=...     further arguments for the command that a target runs, e.g. make test ARGS="-k ledger"

.DEFAULT_GOAL := help
.PHONY: help setup model demo demo-local check test test-arm64 test-model test-api test-services bench bench-docs clean

PY := .venv/bin/python
FWDLLAMA := .venv/bin/fwdllama
MODEL := smollm2-135m

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.ready ## Make .venv and compile llama.cpp into it (about 4 minutes on 2 cores, once per machine)

# The script stamps its own success, and does again only what is out of date.
.venv/.ready: pyproject.toml .ci/setup
	@.ci/setup

model: setup ## Fetch and verify the small model (93 MB)
	@$(FWDLLAMA) model fetch $(MODEL)

demo: model ## Let an aggregator and two devices fine-tune the small model, before and after (3 minutes on 2 cores)
	@$(FWDLLAMA) demo $(ARGS)

demo-local: model ## Fine-tune the small model alone on the same questions (4 minutes on 2 cores)
	@$(FWDLLAMA) demo-local $(ARGS)

check: setup ## Lint, check types and the architecture
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

test: setup ## Run the fast tests
	@$(PY) -m pytest -m "not model and not api and not service and not browser and not postgresql" $(ARGS)

# What a phone computes: all that is pure, and the engine on tiny models. Emulation is about 15 times slower, so not the whole suite.
ARM64 := tests/portability tests/federation tests/llama/test_adapter.py tests/llama/test_seam.py tests/llama/test_oracle.py \
	tests/cli/test_cli_train.py::test_train_writes_an_adapter_a_run_and_says_what_next \
	tests/server/test_aggregate.py tests/server/test_signatures.py tests/gguf_tools/test_gguf_adapter.py \
	$(patsubst %,tests/test_%.py,batches checkpoint direction estimator ledger loss oracle pacing sampler space step trainer)
# Android 15 has pages of 16 KiB; what maps files and counts pages is run with those too.
PAGES := tests/gguf_tools/test_gguf_model.py tests/gguf_tools/test_gguf_split.py tests/llama/test_model.py tests/llama/test_seam.py

test-arm64: setup ## Test what a phone computes on emulated AArch64 (4 minutes; apt install qemu-user-static g++-aarch64-linux-gnu)
	@.ci/arm64
	@rm -rf .venv/arm64/exchange
	@$(PY) -m tests.portability.exchange .venv/arm64/exchange
	@.venv/arm64/bin/python -m tests.portability.exchange .venv/arm64/exchange
	@$(PY) -m tests.portability.exchange .venv/arm64/exchange
	@.venv/arm64/bin/python -m pytest -m "not model and not api and not service" $(ARM64) $(ARGS)
	@QEMU_PAGESIZE=16384 .venv/arm64/bin/python -m pytest -m "not model" -k "not under_a_second" $(PAGES) $(ARGS)

test-api: setup ## Test the aggregator's HTTP interface against its own description (a minute)
	@$(PY) -m pytest -m api $(ARGS)

test-model: model ## Run the tests that need the small model (or the one in FWDLLAMA_MODEL)
	@FWDLLAMA_MODEL="$${FWDLLAMA_MODEL:-$$($(PY) -c 'from fwdllama.models import resolve; print(resolve("$(MODEL)"))')}" \
		$(PY) -m pytest -m model $(ARGS)

test-services: setup ## Test servers and devices as processes, the dashboard in Chromium, workers on PostgreSQL (apt install chromium postgresql)
	@$(PY) -m pytest -m "service or browser or postgresql" $(ARGS)

.venv/.bench: .venv/.ready
	@echo "Installing torch for the back-propagation baseline"
	@$(PY) -m pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu -e '.[bench]'
	@touch $@

bench: model .venv/.bench ## Measure every figure of the README, as JSON
	@$(FWDLLAMA) model fetch $(MODEL) --variant fp16
	@$(FWDLLAMA) bench $(ARGS)

bench-docs: setup ## Write docs/benchmarks.md from the results in bench.json
	@$(FWDLLAMA) bench-docs $(ARGS)

clean: ## Remove .venv and everything built here (compiled llama.cpp and models stay in the user's cache)
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
