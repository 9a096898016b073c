# Needs only Python 3.11 or newer and make. Everything is installed into .venv.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# One thread for each test worker: otherwise the workers fight over the cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# What the tests of a file share may take minutes to make: one worker runs them all. xdist_group does nothing with pytest 9.
PYTEST := $(TEST_ENV) $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo check lint test test-all bench

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile

setup: $(STAMP)  ## install llmtrain and its tools into .venv

# A python3.11 on the PATH may be a shim that starts nothing: take the first that runs and is new enough.
$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if [ ! -x $(BIN)/python ]; then \
	  for python in $(PYTHON) python3.11 python3 python; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then echo "make setup: no Python 3.11 or newer found; name one: make setup PYTHON=/path/to/python" >&2; exit 1; fi; \
	  "$$found" -m venv $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: setup  ## the whole road on embedded data: pretrain, sft, reward, PPO and DPO
	$(BIN)/llmtrain pipeline

check: lint test  ## everything that must pass before a commit

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup  ## the fast tests
	$(PYTEST) -m "not slow"

test-all: setup  ## all tests
	$(PYTEST)

# alignment.py and style.py train for hours and are called by themselves; contenders.py is what others share
BENCHMARKS = $(filter-out %/alignment.py %/style.py %/contenders.py,$(wildcard benchmarks/*.py))

bench: setup  ## the benchmarks, one after the other, quiet machine assumed
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python $$file; done
