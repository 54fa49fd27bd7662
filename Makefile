# Every target runs in .venv, which `make setup` creates from the locked requirements. Only Python and
# make must be installed first.

SHELL := /bin/bash
BIN := .venv/bin

# The first Python that runs and is new enough. A pyenv shim may exist and fail to run.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help setup demo up test test-versions test-faults test-browser screenshot prove bench bench-collector lint format docs lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.made ## Create .venv from the lock file, if it is missing or out of date

.venv/.made: requirements/dev.txt
.venv-bench/.made: requirements/bench.txt
.venv-browser/.made: requirements/browser.txt
.venv-debian/.made: requirements/dev.txt
.venv-debian/.made: PYTHON := /usr/bin/python3

%/.made: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is required. None was found."; exit 1; }
	@echo "Creating $(@D) with $$($(PYTHON) --version) from $(filter %.txt,$^) ..."
	@umask 022; $(PYTHON) -m venv --clear $(@D) \
		|| { echo "Python cannot create a virtual environment. Run: apt install python3-venv"; exit 1; }
	@umask 022; $(@D)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r $(filter %.txt,$^)
	@$(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## Send one heartbeat, on embedded Postgres and Valkey; under 20 seconds
	@$(BIN)/python -m demo

up: setup ## Run the demo until Ctrl-C
	@$(BIN)/python -m demo --stay

test: setup ## Run the tests on embedded Postgres and Valkey
	@$(BIN)/pytest --ignore tests/faults --ignore tests/browser

test-versions: .venv-debian/.made ## Run the tests that depend on a version, on Debian's Python and servers
	@.venv-debian/bin/python -m tests.versions

test-faults: setup ## Run the tests that kill, freeze and disconnect the real processes
	@$(BIN)/pytest --numprocesses 6 --maxprocesses 6 --dist loadgroup tests/faults

test-browser: .venv-browser/.made ## Test the collector's page in a real browser
	@command -v chromium > /dev/null || { echo "A browser is required. Run: apt install chromium"; exit 1; }
	@.venv-browser/bin/pytest --numprocesses 0 tests/browser

screenshot: .venv-browser/.made ## Create the README's picture of the collector's page
	@.venv-browser/bin/python -m tests.browser.screenshot docs/collector.png

prove: setup ## Break each promise in a copy of the project, and check that a test fails
	@$(BIN)/python -m tests.prove

bench: .venv-bench/.made ## Measure the cost compared with other designs, and draw charts; under 10 minutes
	@.venv-bench/bin/python -m bench

bench-collector: .venv-bench/.made ## Measure the collector
	@.venv-bench/bin/python -m bench.ingest
	@.venv-bench/bin/python -m bench.collector
	@.venv-bench/bin/python -m bench.recount
	@.venv-bench/bin/python -m bench.weeks
	@.venv-bench/bin/python -m bench.pages

lint: setup ## Check style, types, imports, prose and the CI workflow
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/prose.py
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	@$(BIN)/zizmor --offline --quiet --no-progress .github

format: setup ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup ## Write the generated files: JSON Schema, field table, Kubernetes manifest, versions
	@$(BIN)/python docs/generate.py
	@$(BIN)/python deploy/generate.py

LOCK := $(BIN)/uv pip compile --quiet --generate-hashes --universal --no-emit-index-url --no-header \
	--python-version 3.11 pyproject.toml

lock: setup ## Lock the newest versions that pyproject.toml allows
	@$(LOCK) --upgrade --output-file requirements.txt
	@$(LOCK) --upgrade --group dev --output-file requirements/dev.txt
	@$(LOCK) --upgrade --group bench --constraint requirements/dev.txt --output-file requirements/bench.txt
	@$(LOCK) --upgrade --group browser --constraint requirements/dev.txt --output-file requirements/browser.txt

clean: ## Delete everything that these targets create
	@rm -rf /dev/shm/consentos-telemetry-$$(printf %s "$(CURDIR)" | sha256sum | cut -c 1-16)
	@rm -rf .venv .venv-bench .venv-browser .venv-debian .data .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
