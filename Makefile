# make demo: the main job on synthetic hospitals.  make test: lint, types and the quick tests.
# make test-all: also real processes, Ray and, where ONCOFED_DATA names them, real data.  make bench: benchmarks.
VENV := .venv
PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := $(VENV)/bin
export FLWR_TELEMETRY_ENABLED = 0
export FLWR_DISABLE_UPDATE_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: demo test test-all rehearse lint bench clean

# torch first: with it in place nothing else pulls another build of it
$(BIN)/oncofed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(BIN)/oncofed

demo: $(BIN)/oncofed
	$(BIN)/oncofed demo --out demo

lint: $(BIN)/oncofed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/oncofed
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p oncofed.common -p oncofed.client -p oncofed.server -p oncofed.deploy

test: lint
	$(BIN)/pytest -n logical --dist loadfile -m "not slow"

test-all: test
	$(BIN)/pytest -n 2 --dist loadfile -m "slow and not rehearsal"

# a whole consortium from nothing, machines apart, the guides of coordinator and hospital: about half an hour
rehearse: $(BIN)/oncofed
	$(BIN)/pytest -m rehearsal

bench: $(BIN)/oncofed
	$(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf $(VENV) demo out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build
