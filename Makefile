# Every target installs what it needs into .venv and works as the first command on a fresh clone.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow check format bench methods presets docs tables clean

demo: $(VENV)/.fewshot
	$(RUN) scripts/fewshot.py --output runs/demo --overwrite

test: $(VENV)/.dev
	$(RUN) -m pytest -n auto

test-slow: $(VENV)/.dev
	$(RUN) -m pytest -m slow

check: $(VENV)/.dev
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(VENV)/.dev
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: $(VENV)/.dev
	$(RUN) benchmarks/step.py --methods all --json benchmarks/results/step.jsonl --minutes 30
	$(RUN) benchmarks/dynamics.py --json benchmarks/results/dynamics.jsonl
	$(RUN) benchmarks/memory.py --json benchmarks/results/memory.jsonl

methods: $(VENV)/.dev
	$(RUN) benchmarks/methods.py
	$(RUN) scripts/tables.py

presets: $(VENV)/.dev
	$(RUN) benchmarks/methods.py --presets
	$(RUN) benchmarks/planted.py
	$(RUN) scripts/tables.py

tables: $(VENV)/.dev
	$(RUN) scripts/tables.py

docs: $(VENV)/.docs
	$(RUN) -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site runs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	@echo "Installing visionlora[$*] into $(VENV); torch is large, so the first time takes minutes."
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@
