# Everything runs in .venv, made from the locked requirements; nothing else has to be installed.

SHELL := /bin/bash
BIN := .venv/bin

# The first interpreter that runs here and is new enough; a pyenv shim may exist and not run.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help setup demo up test test-versions test-faults test-browser screenshot prove bench bench-collector lint format docs lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.made ## Make .venv from the lock; does nothing when it is up to date

.venv/.made: requirements/dev.txt
.venv-bench/.made: requirements/bench.txt
.venv-browser/.made: requirements/browser.txt

%/.made: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none was found."; exit 1; }
	@echo "Making $(@D) with $$($(PYTHON) --version) from $(filter %.txt,$^) ..."
	@umask 022; $(PYTHON) -m venv --clear $(@D) \
		|| { echo "Python cannot make virtual environments here: apt install python3-venv"; exit 1; }
	@umask 022; $(@D)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $(filter %.txt,$^)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## See one heartbeat leave, on embedded Postgres and Valkey; under 20 seconds
	@$(BIN)/python -m demo

up: setup ## The demo, which stays until Ctrl-C
	@$(BIN)/python -m demo --stay

test: setup ## Run the tests, on embedded Postgres and Valkey
	@$(BIN)/pytest --ignore tests/faults --ignore tests/browser

test-versions: setup ## Run what depends on a server's version on Debian's Postgres, Redis and nginx
	@$(BIN)/python -m tests.versions

test-faults: setup ## Kill, freeze, cut off and mislead the real processes, and see nothing lost
	@$(BIN)/pytest --numprocesses 6 --maxprocesses 6 tests/faults

test-browser: .venv-browser/.made ## Look at the collector's page in a real browser
	@command -v chromium > /dev/null || { echo "A browser is needed: apt install chromium"; exit 1; }
	@.venv-browser/bin/pytest --numprocesses 0 tests/browser

screenshot: .venv-browser/.made ## Draw the README's picture of the collector's page
	@.venv-browser/bin/python -m tests.browser.screenshot docs/collector.png

prove: setup ## Break each promise in a copy, and see the tests notice
	@$(BIN)/python -m tests.prove

bench: .venv-bench/.made ## Measure what it costs, beside other ways, and draw it; under 10 minutes
	@.venv-bench/bin/python -m bench

bench-collector: .venv-bench/.made ## Measure the collector: ingest, a fleet, counting, weeks and pages
	@.venv-bench/bin/python -m bench.ingest
	@.venv-bench/bin/python -m bench.collector
	@.venv-bench/bin/python -m bench.recount
	@.venv-bench/bin/python -m bench.weeks
	@.venv-bench/bin/python -m bench.pages

lint: setup ## Check style, types and the arrows between modules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup ## Write what is generated: JSON Schema, field table, Kubernetes manifest, versions
	@$(BIN)/python docs/generate.py
	@$(BIN)/python deploy/generate.py

LOCK := $(BIN)/uv pip compile --quiet --generate-hashes --universal --no-emit-index-url --no-header \
	--python-version 3.11 pyproject.toml

lock: setup ## Lock the newest versions that pyproject.toml allows
	@$(LOCK) --upgrade --output-file requirements.txt
	@$(LOCK) --upgrade --group dev --output-file requirements/dev.txt
	@$(LOCK) --upgrade --group bench --constraint requirements/dev.txt --output-file requirements/bench.txt
	@$(LOCK) --upgrade --group browser --constraint requirements/dev.txt --output-file requirements/browser.txt

clean: ## Remove what the targets made
	@rm -rf .venv .venv-bench .venv-browser .data .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
