# make setup: a virtual environment with the package and its tools · make demo: pictures, sounds, speech · make test · make lint · make bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint bench

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

demo: setup
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/tiny_speech.py "can you read out: 3 7 red?" -o out/demo/speech.wav

test: setup
	$(BIN)/python -m pytest --cov=vllm_omni --cov-fail-under=85

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/run.py all
