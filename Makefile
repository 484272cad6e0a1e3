# `make demo` runs the main job, `make test` checks everything; each creates the environment if it is missing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test setup clean

demo: $(STAMP)
	$(BIN)/espalier run digits --out runs/demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

setup: $(STAMP)

clean:
	rm -rf .venv runs dist .data .pytest_cache .mypy_cache .ruff_cache .hypothesis

# the constraints name torch's version, so that one call installs the build that was tested and nothing replaces it
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
