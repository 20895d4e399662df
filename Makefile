# Each target sets up all that it needs in .venv; a second call installs nothing unless the lists below changed.

PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
LISTS = pyproject.toml constraints.txt

.PHONY: help demo test lint clean

help:
	@echo "make demo    train a model, evaluate it, draw with it; results in runs/demo"
	@echo "make test    lint, then every test"
	@echo "make lint    style, formatting, direction of the imports"
	@echo "make clean   remove .venv and caches; runs/ stays"
	@echo "another Python: make test PYTHON=python3.12"

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.demo: $(LISTS) | $(BIN)/pip
	$(PIP) -e '.[plot]'
	touch $@

$(VENV)/.test: $(LISTS) | $(BIN)/pip
	$(PIP) -e '.[test]'
	touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Transfusion needs Python 3.11 or newer; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one, e.g.: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
