# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOM := objectives
TOOLS := .venv-tools
PYTHONS := 3.11 3.12 3.13
# worksteal: workers take whole files, so that what a file trains is trained once. Bytecode is kept: every worker and
# every command that a test starts would compile the project again.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist worksteal

# pip would compile every module of every package, one after the other: half of its time. Those in use are compiled by use.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
USE := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python train.py --help > /dev/null

.PHONY: help install install-locked install-dev demo test test-fast test-matrix faults guards
.PHONY: studies gpu-check lab-models reliability zoo lint format flash lock licences audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## make .venv with requirements.txt
install-dev: $(VENV)/.installed-dev ## make .venv with requirements-dev.txt, at the lock's versions

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	$(PIP) -r requirements.txt
	@$(USE)
	@touch $@

# The build of torch may be another one, for CPUs: its version is held, its hash is not.
$(VENV)/.installed-dev: requirements-dev.txt requirements.txt requirements.lock | $(BIN)/python
	@sed -nE 's/^([a-z].*) \\$$/\1/p' requirements.lock > $(VENV)/constraints.txt
	$(PIP) -r requirements-dev.txt -c $(VENV)/constraints.txt
	@$(USE)
	@touch $@ $(VENV)/.installed

# The one package without a wheel, antlr4, is built: by the lock's setuptools, not by any that has no hash.
install-locked: | $(BIN)/python ## make .venv with requirements.lock: exact versions, each file checked by its hash
	$(PIP) --require-hashes --no-deps -r <(sed -n '/^setuptools==/,/# via/p' requirements.lock)
	$(PIP) --require-hashes --no-build-isolation -r requirements.lock
	@$(USE)
	@touch $(VENV)/.installed

demo: install ## train on the lab with three betas, evaluate, show the table, the plot and the report
	OMP_NUM_THREADS=1 $(BIN)/python train.py -m +experiment=demo  # a model this small gains nothing from more threads
test: install-dev ## run the tests
	$(PYTEST)

test-fast: install-dev ## run the tests of one room: make test-fast ROOM=data
	$(PYTEST) tests/$(ROOM)

test-random: install-dev ## run the property tests with random inputs (those of `make test` are the same each time)
	$(PYTEST) --hypothesis-profile=random $(shell grep -rl hypothesis tests --include='test_*.py')

test-matrix: $(TOOLS)/.installed ## run a short suite under each Python, with the oldest and newest torch and transformers
	$(TOOLS)/bin/python -m tests.support.matrix $(ONLY)

faults: install-dev ## run every test of a fault, also those that `make test` leaves out
	$(PYTEST) -m "slow or not slow" tests/faults

lab-models: install ## train the lab's models by their recipes and compare with those that ship (an hour on one core)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/lab_models.py $(ONLY)

reliability: install-dev ## the same, and write docs/reliability.md of what was seen
	$(PYTEST) -m "slow or not slow" --reliability tests/faults

zoo: install-dev ## every family of models through all that is done with one; writes docs/models.md
	$(BIN)/python -m tests.support.zoo
	$(PYTEST) -m "slow or not slow" tests/zoo

guards: install-dev ## take out, one after the other, the lines that keep the promises, and see their tests fail
	$(BIN)/python -m tests.faults.guards

define LOCK_HEADER
# What `make install` brings, at the newest versions that requirements.txt allows, with the hash of every file of each.
# Written by `make lock`, which looks whether all have one for Linux on x86_64 under Python $(PYTHONS); installed by
# `make install-locked`. torch is the build that the public index has: on Linux the one for CUDA, with the packages
# nvidia-*, cuda-* and triton. A build for CPUs comes from elsewhere and is not in this lock.
endef
export LOCK_HEADER
UV := $(TOOLS)/bin/uv pip
WHEELS := --python-platform x86_64-manylinux_2_28 --only-binary :all: --no-binary antlr4-python3-runtime

$(TOOLS)/.installed: requirements-tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check -r requirements-tools.txt
	@touch $@

lock: $(TOOLS)/.installed ## write requirements.lock anew, at the newest versions that requirements.txt allows
	{ echo "$$LOCK_HEADER"; $(UV) compile --quiet --no-config --no-header --no-emit-index-url --generate-hashes \
	  --universal --python-version $(firstword $(PYTHONS)) requirements.txt; } > $(TOOLS)/requirements.lock
	for python in $(PYTHONS); do $(UV) install --quiet --no-config --dry-run --require-hashes --target $(TOOLS)/nowhere \
	  --python-version $$python $(WHEELS) -r $(TOOLS)/requirements.lock || exit; done
	mv $(TOOLS)/requirements.lock requirements.lock

licences: $(TOOLS)/.installed ## write docs/licences.md: the licence of each package in requirements.lock
	$(TOOLS)/bin/python -m tests.support.licences

audit: $(TOOLS)/.installed ## known vulnerabilities of what is locked; status 3 where they cannot be looked up
	@$(TOOLS)/bin/python -m tests.support.audit

STUDIES := all
MINUTES := 40
studies: install ## run what is left of the studies for 40 minutes, and compare with what is committed: make studies STUDIES=strength MINUTES=90
	$(BIN)/python -m studies $(STUDIES) --minutes $(MINUTES)

gpu-check: install-dev ## on a CUDA machine: is everything right, and how fast is it; under 8 minutes
	$(BIN)/python benchmarks/gpu_check.py

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
