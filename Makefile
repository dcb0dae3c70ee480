# Everything starts here; `make` alone shows what there is. Needs Python 3.11, a C++ compiler and cmake.
#   PYTHON=...   the interpreter that .venv is made with (default: python3.11, then python3)
#   ARGS=...     further arguments for the command that a target runs, e.g. make test ARGS="-k ledger"

.DEFAULT_GOAL := help
.PHONY: help setup model demo demo-local check test test-model test-api test-services bench bench-docs clean

PY := .venv/bin/python
FWDLLAMA := .venv/bin/fwdllama
MODEL := smollm2-135m

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

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
