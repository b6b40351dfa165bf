# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOM := objectives
# worksteal: workers take whole files, so that what a file trains is trained once. Bytecode is kept: every worker and
# every command that a test starts would compile the project again.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help install install-dev demo test test-fast faults guards reliability lint format flash clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## make .venv with requirements.txt
install-dev: $(VENV)/.installed-dev ## make .venv with requirements-dev.txt

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(BIN)/python
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.installed

demo: install ## train on the lab with three betas, evaluate, show the table, the plot and the report
	OMP_NUM_THREADS=1 $(BIN)/python train.py -m +experiment=demo  # a model this small gains nothing from more threads
test: install-dev ## run the tests
	$(PYTEST)

test-fast: install-dev ## run the tests of one room: make test-fast ROOM=data
	$(PYTEST) tests/$(ROOM)

faults: install-dev ## run every test of a fault, also those that `make test` leaves out
	$(PYTEST) -m "slow or not slow" tests/faults

guards: install-dev ## take out, one after the other, the lines that keep the promises, and see their tests fail
	$(BIN)/python -m tests.faults.guards

reliability: install-dev ## the same, and write docs/reliability.md of what was seen
	$(PYTEST) -m "slow or not slow" --reliability tests/faults

lint: install-dev ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: install-dev ## format the code and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

flash: install ## build the flash-attn package (CUDA machines only)
	$(BIN)/pip install --no-build-isolation -r requirements-flash.txt

clean: ## delete outputs and caches of the tools, not .venv
	rm -rf outputs .pytest_cache .ruff_cache .hypothesis
