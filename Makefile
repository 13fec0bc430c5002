# make setup: a virtual environment with the package and its tools, at the versions of constraints.txt
# make wheel: dist/*.whl with the compiled kernels of this platform
# make demo: pictures, sounds, speech · make test · make lint · make bench
# make fuzz SECONDS=600: odd configs, requests, checkpoint folders and HTTP, so long each
# make deaths: a hundred stages' processes killed, in every phase; SEED=4 repeats one hundred
# make test-newest, make test-oldest: the suite in an environment of the newest, the oldest versions allowed
# make test-plain: the tests of what is computed, as where no kernels are compiled
# make pins: constraints.txt from the newest versions, when the suite has passed with them
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SECONDS ?= 60
NEWEST := .venv-newest
OLDEST := .venv-oldest
# Much that is pinned does not run on Python 3.10, where what does run has stopped moving: it takes the last of each.
PINS = $$($(BIN)/python -c 'import sys; print("--constraint constraints.txt" if sys.version_info >= (3, 11) else "")')

# The files of tests are shared out among processes, one more than cores, since most tests keep one core busy at most and some
# wait. Whole files, so that their fixtures are made once, and in order: by numbers of tests, long files of few tests would run
# last, beside nothing.
PROCESSES ?= $$($(PYTHON) -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')
SHARED = --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: setup wheel demo test test-plain fuzz deaths test-newest test-oldest pins lint bench

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt vllm_omni/layers/native/structures.py $(wildcard csrc/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(PINS) --editable . --group dev
	touch $@

wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

demo: setup
	$(BIN)/python examples/demo.py
	$(BIN)/python examples/tiny_talker.py "3 7 red" -o out/demo/speech.wav

test: setup
	$(BIN)/python -m pytest $(SHARED) --min-coverage 85

test-plain: setup
	$(BIN)/python -m pytest $(SHARED) --plain tests/layers tests/engine tests/models tests/worker tests/assets

fuzz: setup
	cd tests && PYTHONPATH=..:. ../$(BIN)/python -m fuzz --seconds $(SECONDS)

deaths: setup
	cd tests && PYTHONPATH=..:. ../$(BIN)/python -m fuzz deaths --seconds 7200 --most 100 $(if $(SEED),--seed $(SEED))

test-newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable . --group dev
	$(NEWEST)/bin/python -m pytest $(SHARED)

test-oldest:
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . --group dev
	$(OLDEST)/bin/python -m pytest $(SHARED)

pins: test-newest
	$(NEWEST)/bin/python -m tools.pins

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/run.py all --write
