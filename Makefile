# s4book: `make book` and `make test` do everything on a machine with Python 3.11-3.13 and make.
#
#   make book                  execute the notebooks that changed, compile _build/html
#   make book PROFILE=smoke    smoke | quick | camvid
#   make book JOBS=1           notebooks at a time (default: one per core)

PYTHON ?= python3
PROFILE ?= quick
JOBS ?=
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help book test pages slow lint lab clean distclean

help:  ## show this text
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  variables       PROFILE=smoke|quick|camvid  JOBS=n  PYTHON=python3.12"

book: $(READY)  ## run the notebooks that changed and compile the book (PROFILE, JOBS)
	@$(BIN)/python -m s4lib book --profile $(PROFILE) $(if $(JOBS),--jobs $(JOBS))

test: $(READY)  ## run the default test suite
	@$(BIN)/python -m pytest -n 2

pages: $(READY)  ## open the compiled pages in headless Chromium and test them
	@$(BIN)/python -m pytest -m browser -rs

slow: $(READY)  ## run all tests, the long ones and the pages' too
	@$(BIN)/python -m pytest -m "slow or not slow"

lint: $(READY)  ## check style and format, notebooks included
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

clean:  ## remove the compiled book and caches; runs/ and the environment stay
	rm -rf _build .pytest_cache .ruff_cache
	find s4lib tests book -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove the environment as well; runs/ stays
	rm -rf $(VENV) *.egg-info

# One stamp: the environment is made once, and again when its description changes.
$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) not found: install Python 3.11-3.13 or say PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$$($(PYTHON) --version) found, 3.11-3.13 needed: say PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "making $(VENV): about a minute of download and three of unpacking, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[book,test]"
	@touch $@
