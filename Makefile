# Everything happens in .venv. ARGS passes arguments on: make test ARGS='-m "not slow"'.
# The tests run in three processes, whole files at a time; JOBS=0 runs them in one.
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 3

# Nothing is compiled when it is installed, so what is imported has to be kept.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test lint type format docs bench ci constraints clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

install: $(VENV)/.installed-base  ## Create .venv and install the package
	@:

demo: $(VENV)/.installed-base  ## Install, then run the demonstration study
	@$(BIN)/comp demo $(ARGS)

test: $(VENV)/.installed-test  ## Install with the test extra, then run the whole test suite
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed-dev  ## Check style (ruff)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

type: $(VENV)/.installed-dev  ## Check types (mypy --strict)
	@$(BIN)/mypy

format: $(VENV)/.installed-dev  ## Rewrite the sources in house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.installed-test  ## Check every link, command and example of the documentation
	@$(BIN)/python -m pytest tests/test_docs.py $(ARGS)

bench: $(VENV)/.installed-base  ## Run the benchmarks; tables go to benchmarks/results
	@set -e; for script in benchmarks/measure_*.py; do $(BIN)/python "$$script" $(ARGS); done

ci: lint type test  ## What CI runs

constraints: $(VENV)/.installed-dev  ## Write the installed releases into constraints.txt
	@tools/constraints.sh

clean:  ## Remove caches and build products (.venv and runs stay)
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: pyproject.toml constraints.txt tools/install.sh
	@tools/install.sh $*
