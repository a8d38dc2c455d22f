# Everything runs in .venv, which make creates and keeps up to date with pyproject.toml and constraints.txt.
# PYTHON is the interpreter that creates it: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test check bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

env: $(INSTALLED)  ## only create the environment

demo: $(INSTALLED)  ## the whole story on this machine
	@$(BIN)/robustdice demo

test: $(INSTALLED)  ## the tests, without the slow ones, on two cores
	@$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

check: $(INSTALLED)  ## what has to pass before a change goes in: style, types, all tests
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/python -m pytest

bench: $(INSTALLED)  ## the benchmarks (benchmarks/METHODOLOGY.md says how they measure)
	@$(BIN)/python benchmarks/run.py

# PyTorch's build for Linux on PyPI brings 3 GB of CUDA along, which nothing here needs: PyTorch's own index has one for
# the CPU alone, and is taken where it can be reached (TORCH_INDEX= leaves it out; another may have other builds).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# The stamp is written last, so an interrupted installation starts again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is %d.%d: make PYTHON=..." % sys.version_info[:2])'
	@echo "Installing RobustDiCE and its tested dependencies into .venv (a few minutes, once) ..."
	@$(PYTHON) -m venv .venv
	@index="$(TORCH_INDEX)"; \
	if [ -n "$$PIP_EXTRA_INDEX_URL" ]; then index=; elif [ -n "$$index" ] && ! $(BIN)/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=5)' "$$index/torch/" 2>/dev/null; then index=; fi; \
	$(BIN)/python -m pip install -q --disable-pip-version-check $${index:+--extra-index-url "$$index"} -c constraints.txt -e ".[workshop,dev]"
	@touch $@
