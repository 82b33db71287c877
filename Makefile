# make setup   a Python environment in .venv with everything that tests and examples need
# make demo    the main job on text that every machine has, in under three minutes
# make test    style, types and all tests
# make clean   forget the environment and the demo's runs
#
# PYTHON       the interpreter to start from, 3.11 or newer
# PIP_OPTIONS  options for pip, for another build of PyTorch or another package index:
#                  make setup PIP_OPTIONS="--index-url https://index.example/simple"
#              The versions pinned in constraints.txt hold for every build.

PYTHON ?= python3
PIP_OPTIONS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_OPTIONS)

.PHONY: setup demo test clean

# The stamps make a second call quick; what they depend on makes it right.
$(VENV)/.python: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "stretto needs Python 3.11 or newer, and $(PYTHON) is older or missing;" \
	    "name another, for example: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

# PyTorch goes first and by its exact version: a range would let pip take another build, which brings
# gigabytes for accelerators that may not be there.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "installing PyTorch into $(VENV) (once)"
	@$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	@echo "installing stretto into $(VENV) (once)"
	@$(INSTALL) -e ".[all]"
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing what the tests need into $(VENV) (once)"
	@$(INSTALL) -e ".[dev]"
	@touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.run
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

clean:
	rm -rf $(VENV) runs
