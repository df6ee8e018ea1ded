# Everything happens in .venv; PYTHON picks the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# One thread for each of the tests' processes: several that share cores wait for each other.
test: export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint bench

demo: $(READY)
	$(BIN)/echelon compare --out demo

test: $(READY) lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks embedded
	$(BIN)/mypy

bench: $(READY)
	for b in benchmarks/*.py; do $(BIN)/python $$b || exit 1; done

# torch first, at its pinned version: without the pin, pip would take a build with CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[embedded,retrieval,servers,qdrant,ray,test]"
	touch $@
