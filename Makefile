# `make` creates the two environments; `make help` lists the rest.

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$python; break; fi; done)
BIN := .venv/bin

.DEFAULT_GOAL := setup
.PHONY: setup demo test unit services check lock clean help python

python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; install it (Debian, Ubuntu:" \
		"apt install python3.11 python3.11-venv) or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }

setup: python
	@$(PYTHON) requirements/install.py

demo: setup
	@$(BIN)/celloop demo

test: setup unit services

unit: setup  # two processes side by side, a thread each: more threads than cores slow each other down
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not services"

services: setup
	$(BIN)/python -m pytest -q -rs -m services

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

lock: setup
	$(BIN)/python requirements/lock.py

clean:
	rm -rf .venv .venv-labelstudio build celloop.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find loop backend flows tests benchmarks requirements -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@echo "make         create .venv and .venv-labelstudio, once, and again when a lock file changes"
	@echo "make demo    the whole loop on the sample images, then Label Studio in the browser"
	@echo "make test    all tests; 'make unit' and 'make services' for one half"
	@echo "make check   ruff, mypy, import-linter"
	@echo "make lock    newest versions into requirements/*.lock"
	@echo "make clean   remove environments and caches; a workspace (.celloop) is kept"
