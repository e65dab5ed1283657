# Everything that a person or a machine runs here. `make` alone lists it.

PYTHON ?= python3.11
VENV ?= .venv
# Extra arguments of every `pip install` below, such as a mirror.
PIP_ARGS ?=
# Extra arguments of torch's install alone. On Linux the default wheel carries CUDA (gigabytes). For the CPU build:
#   make setup TORCH_PIP_ARGS="--index-url <the CPU index shown on pytorch.org's install page>"
TORCH_PIP_ARGS ?=
# Options of `baton up` for `make up`, such as "--prefill 2 --decode 2 --model /path/to/model".
UP_ARGS ?=
# Extra arguments of pytest, such as "-k handoff -x".
PYTEST_ARGS ?=
CONTAINER ?= docker
SERVICE ?= decode

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
LIBRARIES := protos shared/core shared/wire shared/handoff shared/rpc shared/engine shared/worker shared/client
SERVICES := services/gateway services/tokenizer services/scheduler services/prefill services/decode services/cache
PARTS := $(LIBRARIES) $(SERVICES) shared/cli
STAMP := $(VENV)/.baton-setup
# Tests run with one thread each and may not download; fast folders first.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
FAST_TESTS := $(wildcard tests/meta tests/unit tests/contract tests/deploy tests/model)
SLOW_TESTS := $(wildcard tests/integration tests/e2e tests/browser)

.DEFAULT_GOAL := help
.PHONY: help setup demo up down test test-long test-gpu lint fmt type protos protos-check sync constraints image bench structure size clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | \
	  while IFS="$$(printf '\t')" read -r name text; do printf '  %-14s %s\n' "$$name" "$$text"; done

setup: $(STAMP) ## install everything into .venv (see TORCH_PIP_ARGS above for the CPU build of torch)
	@:

# Debian splits `ensurepip` off; then the base interpreter's pip fills the environment.
$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install --quiet $(PIP_ARGS) pip; }

# Changed kernels are compiled again, too.
KERNELS := shared/engine/hatch_build.py $(wildcard shared/engine/baton/engine/native/*.[ch])

$(STAMP): constraints.txt requirements-dev.txt $(addsuffix /pyproject.toml,$(PARTS)) $(KERNELS) | $(BIN)/python
	@$(BIN)/python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' || { \
	  if [ "$$(uname -s)" = Linux ] && [ -z "$(TORCH_PIP_ARGS)" ]; then \
	    echo 'installing torch; without a GPU the CPU build is far smaller: see TORCH_PIP_ARGS in the Makefile'; fi; \
	  $(PIP) $(TORCH_PIP_ARGS) torch; }
	@echo 'installing the other dependencies'
	@$(PIP) --quiet --requirement requirements-dev.txt
	@$(PIP) --quiet --no-build-isolation $(foreach part,$(LIBRARIES) $(SERVICES),--editable ./$(part)) --editable './shared/cli[local]'
	@touch $@

demo: setup ## start everything, stream one completion, show where its time went, stop everything
	@$(BIN)/baton demo

up: setup ## start the whole system with the demo model and leave it running
	@$(BIN)/baton up --detach $(UP_ARGS)

down: ## stop what `make up` started
	@$(BIN)/baton down

# The slow ones start five processes and more each: two at a time would take each other's cores.
test: setup ## what CI runs: all tests but the long ones; about 9 minutes on 2 cores
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "not long" -n 2 --dist loadfile $(FAST_TESTS) $(PYTEST_ARGS)
	$(if $(SLOW_TESTS),$(TEST_ENV) $(BIN)/python -m pytest -q -m "not long" $(SLOW_TESTS) $(PYTEST_ARGS))

# Wherever they are, one at a time; the last line says what ran.
test-long: setup ## the long tests: storms, many seeds, whole tables
	$(TEST_ENV) $(BIN)/python -m pytest -q -m long --ignore tests/gpu tests $(PYTEST_ARGS)

test-gpu: setup ## tests that need a CUDA device; skipped without one
	$(TEST_ENV) $(BIN)/python -m pytest -q tests/gpu $(PYTEST_ARGS)

lint: setup ## ruff, formatting, mypy strict, import rules, house rules, prose of the documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory type
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/meta

fmt: setup ## format, and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup ## mypy strict over the product
	$(BIN)/mypy $(foreach part,$(filter-out protos,$(PARTS)),$(wildcard $(part)/baton)) protos/gen.py shared/client/make_sync.py

protos: setup ## regenerate the stubs from protos/baton/v1/*.proto
	$(BIN)/python protos/gen.py

sync: setup ## make the blocking SDK from the asyncio one
	$(BIN)/python shared/client/make_sync.py

protos-check: setup ## fail when the committed stubs are stale or a .proto breaks a rule
	$(BIN)/python -m pytest -q tests/meta/test_protos.py

constraints: setup ## pin what is installed now
	@{ sed -n '/^#/p;/^[^#]/q' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | \
	  sed -E 's/^(torch==[0-9.]+)\+.*/\1/'; } > constraints.new && mv constraints.new constraints.txt

image: ## build one service's image: make image SERVICE=decode [CONTAINER=podman]
	$(CONTAINER) build --file deploy/Dockerfile --build-arg SERVICE=$(SERVICE) --tag baton-$(SERVICE) .

bench: setup ## load the running system (`make up`) and print throughput and latency
	@$(BIN)/baton bench

structure: setup ## renew docs/structure.md and the counts in tests/meta/ratchets.txt
	@$(BIN)/python -m tests.meta.ratchets --update

size: setup ## lines of code per part
	@$(BIN)/python -m pytest -q -s tests/meta/test_house_rules.py -k size_table | sed -n '/^part/,/^total/p'

clean: ## remove the environment and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .hypothesis .import_linter_cache build dist shared/engine/baton/engine/native/*.so
	find . \( -name __pycache__ -o -name .ruff_cache \) -type d -prune -exec rm -rf {} +
