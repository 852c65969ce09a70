# make demo    a picture from the embedded model:  make demo PROMPT="a red star on white"
# make serve   the server: a page, ComfyUI's, AUTOMATIC1111's and OpenAI's APIs
# make comfyui adds ComfyUI's own page to the server, at /comfy
# make test    the tests
# make check   ruff, mypy, import contracts
# make bench   benchmarks, JSON into runs/bench
# Each sets up .venv by itself the first time; afterwards that costs nothing.

PYTHON ?= python3
PROMPT ?= a large red star on a blue background
VENV := .venv
BIN := $(VENV)/bin
# The one command that builds the environment; stamps make a second run instant.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo serve comfyui test check bench clean

demo: $(VENV)/.core
	@$(BIN)/octavo generate "$(PROMPT)"

serve: $(VENV)/.core
	@$(BIN)/octavo serve

comfyui: $(VENV)/.comfyui

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.all --out runs/bench

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up .venv (a few minutes the first time) ..."
	@$(INSTALL) torch==2.13.0
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	@$(INSTALL) -e ".[dev]"
	@touch $@

$(VENV)/.comfyui: $(VENV)/.core
	@$(INSTALL) -e ".[comfyui]"
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	@$(INSTALL) -e ".[dev,bench]"
	@touch $@
