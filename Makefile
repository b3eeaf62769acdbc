# Needs python3 (3.11 or newer, with venv) and make; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# Models and tests come with the project: nothing here waits for a network that may not be there.
export HF_HUB_OFFLINE = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help install demo demo-text app compare claims test test-app lint docs-check clean

help: ## List these targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv ## Create .venv and install raftdiff into it, with the pinned versions of constraints.txt.

.PHONY: .venv
.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "raftdiff needs Python 3.11 or newer, and $(PYTHON) is older: make PYTHON=python3.11"; exit 1; }
	@echo "Installing raftdiff into .venv (PyTorch with its CUDA libraries is about 5 GB: some minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv ## Align the embedded model from start to finish, on any laptop.
	@$(BIN)/raftdiff demo

demo-text: .venv ## Align the embedded language model at translation, on any laptop.
	@$(BIN)/raftdiff demo text

app: .venv ## Open the web app on the embedded model and the runs in runs/.
	@$(BIN)/raftdiff app

compare: .venv ## Compare the algorithms on the embedded model at an equal budget (about half an hour).
	@$(BIN)/raftdiff compare examples/compare.yaml

claims: .venv ## Check the papers' claims on the embedded model (under an hour on 2 cores; can be broken off and begun again).
	@$(BIN)/python -m benchmarks.claims

test: .venv ## Run the tests.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-app: .venv ## Test the web app in a real browser; installs playwright, and chromium on Debian.
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null \
		|| { apt-get update && apt-get install -y chromium; } >/dev/null 2>&1 \
		|| { echo "make test-app needs chromium, which apt-get could not install here (it takes root on Debian):" \
			"install it, then run this again"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	@touch $(INSTALLED)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m app tests/test_app_*.py

lint: .venv ## Check style and types.
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

docs-check: .venv ## Check the documentation's links, code blocks, commands and settings.
	@$(BIN)/python docs/check_docs.py

clean: ## Remove caches and build products; .venv and runs/ stay.
	@rm -rf build dist raftdiff.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -path ./.venv -prune -o -path ./runs -prune -o -type d -name __pycache__ -exec rm -rf {} +
