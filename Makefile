# make train   set up .venv, fetch MovieLens-100K, train Kunlun; results in runs/movielens
# make test    set up .venv, run the tests that need no GPU
# make test-gpu, make lint, make clean (what can be made again; never runs/)

SHELL := /bin/bash
VENV := .venv
READY := $(VENV)/.ready
PYTHON := $(VENV)/bin/python
# Lazily: the first interpreter that is new enough.
FIND_PYTHON = for p in python3.12 python3 python3.13 python3.14; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && { command -v $$p; break; }; done
JAX_VERSION = $(shell sed -n 's/^jax==//p' requirements.txt)

.PHONY: help train test test-gpu lint clean
help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

train: $(READY)
	@$(PYTHON) experiments/train.py movielens --resume

test: $(READY)
	@$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Side by side: a test takes its time on the host, tracing and compiling.
test-gpu: $(READY)
	@XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -n 12 -m gpu

lint: $(READY)
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check . && $(PYTHON) -m pyright

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(READY): requirements.txt pyproject.toml
	@python=$$($(FIND_PYTHON)); \
	[ -n "$$python" ] || { echo "error: Python 3.12 or newer with venv is needed; install it or name its folder in PATH"; exit 1; }; \
	cuda=$$(command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU && echo "jax[cuda13]==$(JAX_VERSION)"); \
	echo "setting up $(VENV) with $$python $${cuda:+and CUDA 13}"; \
	$$python -m venv --clear $(VENV) && \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt $$cuda && \
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --editable . \
	|| { echo "error: installing the packages failed (see above); is the network reachable?"; exit 1; }
	@touch $@

.DEFAULT:
	@echo "error: there is no target '$@'; try: make train, make test, make test-gpu, make lint, make clean"; exit 2
