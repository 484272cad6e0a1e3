# `make demo` runs the main job, `make test` checks everything, `make slow` what is left out there, `make zoo` tries the
# architectures of other packages and `make extras` trainers, loggers and peft (each in an environment of its own), `make docs`
# builds the documentation into build/site; each creates the environment if it is missing. `make each-extra` installs every
# extra alone on top of the core, in environments in build/extras, and tries it (`EXTRA="wandb peft"`: only these).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs
ZOO := .venv-zoo/bin
ZOO_STAMP := .venv-zoo/.installed
EXTRAS := .venv-extras/bin
EXTRAS_STAMP := .venv-extras/.installed

.PHONY: demo test slow zoo extras each-extra docs setup clean

demo: $(STAMP)
	$(BIN)/espalier run digits --out runs/demo

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

slow: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[ray]" distributed
	$(BIN)/pytest -n 2 -m slow

zoo: $(ZOO_STAMP)
	$(ZOO)/python benchmarks/zoo.py

extras: $(EXTRAS_STAMP)
	$(EXTRAS)/pytest tests/test_trainers.py tests/test_pretrained.py tests/test_pages.py

each-extra:
	$(PYTHON) tools/check_extras.py $(EXTRA)

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

setup: $(STAMP)

clean:
	rm -rf .venv .venv-zoo .venv-extras runs dist build .data .pytest_cache .mypy_cache .ruff_cache .hypothesis

# the constraints name torch's version, so that one call installs the build that was tested and nothing replaces it
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes the first time)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

$(ZOO_STAMP): benchmarks/zoo_requirements.txt constraints.txt
	test -x $(ZOO)/python || $(PYTHON) -m venv .venv-zoo
	@echo "installing into .venv-zoo (a few minutes the first time)"
	$(ZOO)/pip install --quiet -c constraints.txt -e .
	$(ZOO)/pip install --quiet --no-deps -r benchmarks/zoo_requirements.txt
	touch $@

$(EXTRAS_STAMP): pyproject.toml constraints.txt
	test -x $(EXTRAS)/python || $(PYTHON) -m venv .venv-extras
	@echo "installing into .venv-extras (some minutes the first time)"
	$(EXTRAS)/pip install --quiet -c constraints.txt -e ".[dev,lightning,peft,tensorboard,mlflow,wandb]"
	touch $@
