# Needs only make and python3 (3.11 or later, with venv). `make setup` runs once; everything else depends on it.
.DEFAULT_GOAL := help
.PHONY: help setup demo test nightly sanitize check format bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := $(wildcard optgptq/native/source/*)
DEMO := demo-output
DEMO_MODEL := $(DEMO)/story-llama-w4

help:
	@echo "make setup    create $(VENV) and install optgptq into it"
	@echo "make demo     quantize the bundled model, verify it, compare it, let it write"
	@echo "make test     all tests but the nightly ones"
	@echo "make nightly  tests that take many minutes"
	@echo "make sanitize tests of the native library under the sanitizers for memory, arithmetic and threads"
	@echo "make check    lint, format, types, import order"
	@echo "make format   rewrite the sources in the one format"
	@echo "make bench    the measurements behind the figures in the docs"
	@echo "make clean    remove everything that make made"

setup: $(STAMP)

# torch comes first and alone: it is by far the largest, and pip's own configuration decides which build it finds.
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "optgptq needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,check]'
	@touch $@

demo: $(STAMP)
	@mkdir -p $(DEMO)
	@rm -f $(DEMO)/*.json
	$(BIN)/optgptq quantize bundled:story-llama -r gptq-w4 -o $(DEMO_MODEL) --overwrite --json \
		--set calibration.source=bundled:story-calibration --set calibration.window_size=512 \
		> $(DEMO)/quantize.json
	$(BIN)/optgptq verify $(DEMO_MODEL) --json > $(DEMO)/verify.json
	$(BIN)/optgptq inspect bundled:story-llama --json > $(DEMO)/inspect-dense.json
	$(BIN)/optgptq inspect $(DEMO_MODEL) --json > $(DEMO)/inspect.json
	$(BIN)/optgptq eval $(DEMO_MODEL) --baseline bundled:story-llama --text bundled:story-evaluation \
		--max-tokens 20000 --window-size 512 --json > $(DEMO)/eval.json
	$(BIN)/optgptq generate $(DEMO_MODEL) "Once upon a time" --max-tokens 120 --temperature 0.7 --seed 1 --json \
		> $(DEMO)/generate.json
	@$(BIN)/python benchmarks/demo.py $(DEMO) $(DEMO_MODEL)

test: $(STAMP)
	$(BIN)/python -m pytest

nightly: $(STAMP)
	$(BIN)/python -m pytest -m nightly --timeout=7200

sanitize: $(STAMP)
	$(BIN)/python tests/sanitize.py

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

clean:
	rm -f optgptq/native/_core*.so
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find optgptq cli configs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
