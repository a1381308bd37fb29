# temper. `make run` and `make test` are all that is needed; both may be interrupted and repeated at any point.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: run test quick portable kills registry check format docs pictures install lock base pyreft clean help

help: ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

run: install ## from a clone to a registered, promoted model
	@$(BIN)/temper run

test: check ## all checks and all tests
	@$(BIN)/python -m pytest

quick: install ## the tests that take seconds, for one's own loop
	@$(BIN)/python -m pytest tests/contract tests/tasks/core tests/tasks/text tests/tasks/readers tests/tasks/ingest tests/tasks/gate \
		tests/tasks/html tests/tasks/orchestration tests/flows/comparison tests/flows/run/test_edit_params.py

portable: install ## the tests as on a CPU with AVX2 only
	@ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/python -m pytest

kills: install ## kill -9 at random moments: 30 times each kind of training, 50 a merge, 20 an evaluation: the same, to the bit
	@TEMPER_KILLS=30 $(BIN)/python -m pytest -n0 -s tests/tasks/train/test_kills.py
	@TEMPER_KILLS=50 $(BIN)/python -m pytest -n0 -s tests/flows/files/test_killed_merging.py
	@TEMPER_KILLS=20 $(BIN)/python -m pytest -n0 -s tests/tasks/evaluate/test_kills.py

registry: install ## moves of 4 writers at once, kills while registering and promoting, rollbacks: nothing lost (about an hour)
	@for what in ledger register promote rollback; do $(BIN)/python -m bench.registry $$what || exit 1; done

check: install ## format, lint, types, import layers, consistent packages
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m pip check

format: install ## put the code into its form
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

docs: install ## write docs/params.md, docs/cli.md and params.schema.json from the code
	@$(BIN)/python infra/make_docs.py
	@$(BIN)/temper params --schema

pictures: install ## take the README's pictures of what this workspace has run (needs Chromium)
	@$(BIN)/python infra/make_pictures.py

install: $(INSTALLED) ## the pinned environment in .venv

# The stamp is written last: an environment whose making was interrupted is made anew from the start.
$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "temper needs Python 3.11 or newer; say which with: make PYTHON=python3.12")'
	@echo "installing into $(VENV) (a few minutes, once)"
	@rm -f $@
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		--editable .
	@touch $@

lock: install ## write requirements.lock from pyproject.toml; what is pinned in it stays as it is
	@cp requirements.lock requirements.lock.new
	@$(BIN)/pip-compile --quiet --extra dev --strip-extras --no-header --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --allow-unsafe --output-file requirements.lock.new pyproject.toml
	@sed -E 's/^(torch==[0-9.]+)\+[a-z0-9]+/\1/' requirements.lock.new > requirements.lock
	@rm requirements.lock.new

pyreft: ## the environment of the anchor of bench.reft
	@infra/make_pyreft

base: install ## pretrain the base model of the quickstart anew (about an hour)
	@infra/make_base

clean: ## remove what was installed; data, models and the registry stay
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
