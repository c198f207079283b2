# One virtual environment, .venv; every target installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# as the command line sets it: torch's threads sleep while they wait (see cli/main.py)
export GOMP_SPINCOUNT ?= 10000

.PHONY: help install demo demo-short demo-assistant test test-slow test-gpu test-llamacpp chaos chaos-short check bench bench-full docs clean

help:            ## show this list
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: $(STAMP)  ## make .venv and install dougong with everything the tests need

# torch first and alone: any other order may choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}. Try: make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: install    ## train a first model in about five minutes and show what it can do
	$(BIN)/dougong demo

demo-short: install  ## the same in about one minute
	$(BIN)/dougong demo --minutes 0.5

demo-assistant: install  ## a small assistant in stages: pretrain, learn to answer, practise, compress (about 12 minutes)
	$(BIN)/dougong train assistant

# a file's tests stay together, as they share what their fixtures trained
test: install    ## the fast tests
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-slow: install  ## the slow ones
	$(BIN)/python -m pytest -m 'slow and not chaos'

chaos: install   ## kill, damage, fill up, cut off: 100 kills and more, and how each must end (ten minutes or more)
	$(BIN)/python -m pytest tests/chaos -m chaos --kills 100

chaos-short: install  ## the same with ten kills and without what is slow (about two minutes)
	$(BIN)/python -m pytest tests/chaos -m 'chaos and not slow' --kills 10

test-gpu: install  ## those that need a CUDA device
	$(BIN)/python -m pytest -m gpu

# built from source (six minutes or more on two cores); of what it ships, the library alone
test-llamacpp: install  ## those that read our GGUF files with llama.cpp itself, which is built first
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF" $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt llama-cpp-python
	$(BIN)/python -m pytest -m llamacpp

check: install   ## ruff, types, the floors between rooms, fast tests with array shapes checked everywhere
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	SHAPES_EVERYWHERE=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

bench: install   ## every benchmark in its quick form
	for script in time_to_loss throughput generation data parallel; do $(BIN)/python benchmarks/$$script.py --quick || exit 1; done

bench-full: install  ## every benchmark in full (some hours on two cores)
	for script in time_to_loss throughput generation decoding data parallel checkpoint plan serving_engine serving serving_beside adaptation lora preferences grpo distillation gpu; do $(BIN)/python benchmarks/$$script.py --json benchmarks/results/$$script.json || exit 1; done

docs: install    ## check that the documentation's commands and links hold
	$(BIN)/python -m pytest tests/docs

clean:           ## remove the environment and caches (never runs/)
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist src/*.egg-info
