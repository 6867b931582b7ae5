# Two commands for everybody, `make demo` and `make test`; `make check` before sending a change.
# Each prepares .venv by itself and, unless pyproject.toml has changed, only once.

# The first interpreter that runs and is new enough; override with `make demo PYTHON=/path/to/python`.
MODERN = -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14 \
	$$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[1-9]*/bin/python 2>/dev/null); do \
	"$$python" $(MODERN) >/dev/null 2>&1 && { echo "$$python"; break; }; done)
VENV ?= .venv
BIN = $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

# Tests reuse compiled programs between runs and between test processes.
CACHE = JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.cache/jax" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
# One process for each core, four at most: XLA itself is threaded.
WORKERS ?= auto
PYTEST = $(CACHE) "$(BIN)/python" -m pytest -q -n $(WORKERS) --maxprocesses 4
# Passed on to pytest, e.g. make test ARGS="-m 'not slow'"
ARGS ?=

# Which notebooks to render, e.g. make notebooks NAMES=01
NAMES ?=

.DEFAULT_GOAL := help
.PHONY: help demo test doctest notebooks check lint types format lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.installed-demo  ## predict, measure and train four initializations of a deep network on handwritten digits
	@"$(BIN)/initjax" demo --out out/demo

test: $(VENV)/.installed-test  ## the whole suite, with the examples of the README and of the docstrings
	$(PYTEST) tests $(ARGS)
	@echo "Once more as a user has it: 64-bit types off; README, docs, docstrings and the tests marked x64_off"
	INITJAX_TEST_X64=0 $(PYTEST) README.md docs initjax tests

notebooks: $(VENV)/.installed-notebooks  ## run the notebooks at full size and write them as .ipynb
	PYTHONPATH="$(CURDIR)" "$(BIN)/python" notebooks/render.py $(NAMES)

check: $(VENV)/.installed-dev lint types test  ## lint, types and the whole suite

lint: $(VENV)/.installed-dev
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

types: $(VENV)/.installed-dev
	"$(BIN)/pyright" --pythonpath "$(BIN)/python"

format: $(VENV)/.installed-dev  ## format the sources and sort their imports
	"$(BIN)/ruff" format .
	"$(BIN)/ruff" check --fix --select I .

lock:  ## write requirements.lock anew (needs uv)
	uv lock --upgrade
	uv export --quiet --no-dev --all-extras --no-extra crosscheck --no-hashes --no-header --no-annotate --no-emit-project \
		--no-emit-index-url --no-emit-find-links --output-file requirements.lock
	@! grep -nE '://|^-|@ |/' requirements.lock || { echo "requirements.lock names a host or a path"; exit 1; }

clean:  ## remove what these commands have made
	rm -rf .venv .venv-new .cache .pytest_cache .ruff_cache .hypothesis out

$(VENV)/bin/python:
	@if [ -n "$(UV)" ]; then \
		"$(UV)" venv --quiet --python "$(or $(PYTHON),3.11)" "$(VENV)"; \
	elif [ -n "$(PYTHON)" ]; then \
		"$(PYTHON)" -m venv "$(VENV)"; \
	else \
		echo "initjax needs Python 3.11 or newer; found $$(python3 --version 2>&1 || echo 'no python3')." >&2; \
		echo "Install one, or name it: make demo PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi

# EXTRAS: what to install beside the core; set for each of the targets below
define install
	@echo "Installing initjax[$(EXTRAS)] into $(VENV) (once)"
	@if [ -n "$(UV)" ]; then "$(UV)" pip install --quiet --python "$(BIN)/python" --editable '.[$(EXTRAS)]'; \
	else "$(BIN)/python" -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'; fi
endef

$(VENV)/.installed-notebooks: private EXTRAS = notebooks
$(VENV)/.installed-demo: private EXTRAS = plots,data
$(VENV)/.installed-test: private EXTRAS = test
$(VENV)/.installed-dev: private EXTRAS = dev

$(VENV)/.installed-demo: pyproject.toml | $(VENV)/bin/python
	$(install)
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(install)
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(install)
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed-demo

$(VENV)/.installed-notebooks: pyproject.toml | $(VENV)/bin/python
	$(install)
	@touch $@
