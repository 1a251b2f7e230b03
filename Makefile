# Each target sets up what it needs in .venv; a change of pyproject.toml sets it up again.
PYTHON ?= python3
PYTHON312 ?= $(firstword $(foreach python,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python),\
	$(shell $(python) -c 'import sys; print(sys.executable)' 2>/dev/null)))
# Huge pages for the C library's memory: a training step on CPU allocates its arrays anew, and page faults cost it time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart test lint types smoke312
.NOTPARALLEL:

quickstart: .venv/.train  ## train a small model through all stages, evaluate it, search with it; goes on where it was stopped
	.venv/bin/python -m train.quickstart --workdir runs/quickstart

test: .venv/.test  ## everything but the tests marked slow or hub
	.venv/bin/python -m pytest -n auto

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.test
	.venv/bin/pyright --pythonpath .venv/bin/python

smoke312: .venv312/.smoke  ## the other end of the supported range: jax 0.11 on Python 3.12, without torch
	.venv312/bin/python -m pytest tests/test_packing.py tests/test_lora.py tests/test_smoke.py

.venv/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jina-jax needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e '.[$*]'
	@touch $@

.venv312/.smoke: pyproject.toml
	@test -n "$(PYTHON312)" || { echo "no Python 3.12 found: make smoke312 PYTHON312=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON312) -m venv .venv312
	.venv312/bin/python -m pip install -e '.[cli]' 'jax==0.11.*' pytest hypothesis beartype
	@touch $@
