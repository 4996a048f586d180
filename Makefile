# Everything runs in .venv. A step that is done has a stamp; a stamp is written only after its step succeeded, so a run
# that was interrupted goes on where it stopped, and a second run does nothing twice.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
PYTHON ?= python3
BIN := .venv/bin
DONE := .venv/done
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
LLAMA_MODELS := 0.3.0

.PHONY: help demo test lint eval eval-10M bench sanitize setup cria clean

help:
	@echo 'make demo   set up, build Cria, read a part of the Python standard library and ask three questions'
	@echo 'make test   set up and run all checks: lint, types, import order, size caps, tests'
	@echo 'make eval   measure everything the README states, write eval/*.json and fill in the README (hours)'
	@echo 'make eval-10M  the same over ten million tokens (hours, 8 GB of disk)'
	@echo 'make bench  measure speed beside peers and physical limits, write bench/results (hours, on a quiet machine)'
	@echo 'make sanitize  run the tests of the native library with the address and undefined-behaviour sanitizers'
	@echo 'make cria   set up and build the model, in the cache folder (HERD_HOME)'
	@echo 'make clean  remove what the targets above made, .venv included'

setup: $(DONE)/run

cria: setup
	@$(BIN)/python -m herd.checkpoint.cria >/dev/null

demo: cria
	@PATH="$(CURDIR)/$(BIN):$$PATH" tools/demo

# Cria is built wherever its trained weights are.
test: lint $(if $(wildcard herd/models/cria/delta.safetensors),cria)
	$(BIN)/python -m pytest

eval: $(DONE)/dev cria
	$(BIN)/herd eval needle --length 128K,1M --out eval/needle.json
	$(BIN)/herd eval lookup --length 128K,1M --no-base --out eval/lookup.json
	$(BIN)/herd eval lookup --length 128K --trials 100 --out eval/lookup-rag.json
	$(BIN)/herd eval context --length 1M --out eval/context.json
	$(BIN)/herd eval perplexity --out eval/perplexity.json
	$(BIN)/python tools/readme.py

# One context for all three: the first reads it.
eval-10M: $(DONE)/dev cria
	$(BIN)/herd eval context --length 10000000 --out eval/context-10M.json
	$(BIN)/herd eval needle --length 10000000 --out eval/needle-10M.json
	$(BIN)/herd eval lookup --length 10000000 --no-base --out eval/lookup-10M.json
	$(BIN)/python tools/readme.py

# The environments of the peers, models and unfinished runs are in build/bench: some 20 GB.
bench: cria
	@mkdir -p bench/results
	$(BIN)/python -m bench.side_by_side
	$(BIN)/python -m bench.gguf --out bench/results/gguf.json
	$(BIN)/python bench/scan.py --tokens 1000000 --reference > bench/results/scan-1M.json
	$(BIN)/python bench/scan.py --tokens 10000000 > bench/results/scan-10M.json
	$(BIN)/python tools/readme.py

sanitize: $(DONE)/dev
	$(BIN)/python tools/sanitize.py

lint: $(DONE)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/caps.py

clean:
	rm -rf .venv build demo-context

# A folder without the stamp may be half made: keep it only if its pip works.
$(DONE)/venv:
	@echo 'setting up .venv'
	@$(BIN)/python -m pip list >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@mkdir -p $(DONE) && touch $@

$(DONE)/run: pyproject.toml $(wildcard herd/kernels/cpp/*) | $(DONE)/venv
	@echo 'installing Herd and what it needs'
	@$(PIP) install --editable .
	@touch $@

# Meta's reference code is compared with in tests. Its own dependencies are large, and the tests need none of them.
$(DONE)/dev: pyproject.toml | $(DONE)/run
	@echo 'installing what the tests need'
	@$(PIP) install --editable '.[dev]'
	@$(PIP) install --no-deps llama-models==$(LLAMA_MODELS)
	@touch $@
