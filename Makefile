# `make` lists the targets. The work of `make install` is done by requirements/install.sh.

MAKEFLAGS += --no-builtin-rules --no-print-directory
SHELL := /bin/sh
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The Python that .venv is made with: empty means the first of python3.11, python3.12, python3.13 and python3 that fits.
PYTHON ?=
# A further package index that torch is looked for in. Empty: the one whose torch runs with the driver of this machine's
# NVIDIA card. https://download.pytorch.org/whl/cpu has a build of torch without CUDA, which saves some gigabytes on a
# machine without a GPU.
TORCH_INDEX ?=
# More packages for .venv: "stores" for Parquet and the clients of vector stores, "cluster" for Ray, or both. Later installs
# keep them.
EXTRAS ?=
# Arguments for the command behind run, test, bench and lock: make test ARGS="-x tests/test_vectors.py"
ARGS ?=

# The environment that serves, and the environment of the tests. The second sees the packages of the first, and adds none to it.
VENV := .venv
BIN := $(VENV)/bin
DEV := build/dev
DEV_BIN := $(DEV)/bin
# Half of the time of the tests is spent waiting: there are twice as many workers as cores, and one more. A worker takes 2 GB.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 4 ? 2 * cores + 1 : 8)))
INSTALL := PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" EXTRAS="$(EXTRAS)" requirements/install.sh
INSTALLED_EXTRAS := $(shell cat $(VENV)/.extras 2>/dev/null)
# A change of any of these makes the next `make install` do its work; without one it ends at once.
INSTALLED_FROM := Makefile pyproject.toml requirements/install.sh \
  $(patsubst %,requirements/%.lock,torch run build $(INSTALLED_EXTRAS))

##@ Use
.PHONY: help install run smoke

help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\nVariables\n'
	@printf '  %-15s %s\n' \
	  PYTHON 'Python 3.11, 3.12 or 3.13 for .venv' \
	  TORCH_INDEX 'index with another build of torch, for example, without a GPU,' \
	  '' 'make install TORCH_INDEX=https://download.pytorch.org/whl/cpu' \
	  '' '(to change one of these two later: make clean first)' \
	  EXTRAS 'more packages for .venv: stores (vector stores, Parquet), cluster (Ray), or both:' \
	  '' 'make install EXTRAS="cluster stores"' \
	  ARGS 'more arguments for run, test, bench, lock: make test ARGS="-x -k vectors"' \
	  'GATEWAY_*' 'settings of the gateway: make run GATEWAY_PORT=8080'

install: $(VENV)/.installed-run ## Install the gateway and its dependencies into .venv
	@if [ -n "$(TORCH_INDEX)" ] && [ "$$(cat $(VENV)/.torch-index 2>/dev/null)" != "$(TORCH_INDEX)" ]; then \
	  echo "TORCH_INDEX is ignored: $(VENV) has its torch already; run \`make clean\` first to change it" >&2; fi

run: install ## Install if need be, then serve
	@exec $(BIN)/gateway serve $(ARGS)

smoke: install ## Check in a minute that the installation works: start, embed, compare, stop
	@$(BIN)/python tests/smoke.py $(ARGS)

##@ Develop
.PHONY: install-dev install-clients test test-cluster test-plan check check-style check-types check-tests check-docs format docs site package bench loadtest soak versions image-proof lock clean

install-dev: $(DEV)/.installed ## Install the packages of tests and checks into build/dev

install-clients: install-dev build/clients/.installed ## Install clients that the tests run, into build/clients

# Which tests stay on one worker, and that the longest come first, is in tests/conftest.py.
# Bytecode is written even if the environment forbids it; otherwise each of the many processes compiles everything again.
test: test-plan install-clients ## Run the tests (ARGS="-m 'not slow'": without those that take a minute)
	PYTHONDONTWRITEBYTECODE= $(DEV_BIN)/pytest --numprocesses=$(WORKERS) --dist=loadscope --no-loadscope-reorder \
	  $(patsubst %,--ignore=%,$(ON_RAY)) $(ARGS)

# They start a cluster of three nodes, which takes all of two cores: not at the same time as other tests.
ON_RAY := tests/cluster/test_on_ray.py tests/cluster/test_contract_on_ray.py
test-cluster: install-dev ## Run the tests on a simulated Ray cluster, for two minutes
	PYTHONDONTWRITEBYTECODE= $(DEV_BIN)/pytest $(ON_RAY) $(ARGS)

test-plan:
	@[ -e build/clients/.installed ] || echo "First, tools and clients are installed into build/ (2 GB, a minute or two)," \
	  "nothing into $(VENV)."
	@echo "All tests take about 20 minutes on two cores. One minute tells whether the installation works: make smoke"

# With --jobs=2 the parts of `check` run at the same time.
check: check-style check-types check-tests check-docs ## Check format, lint, types, imports, words, budgets, generated docs and the locks
	@$(INSTALL) verify

check-style: install-dev
	$(DEV_BIN)/ruff format --check .
	$(DEV_BIN)/ruff check .
	$(DEV_BIN)/python docs/check_prose.py
	$(DEV_BIN)/python docs/measure.py

check-types: install-dev
	$(DEV_BIN)/mypy

check-tests: install-dev
	$(DEV_BIN)/pytest -q tests/test_imports.py tests/test_names_in_prose.py

check-docs: install-dev
	$(DEV_BIN)/python docs/generate.py --check

format: install-dev ## Format the code, and fix what the linter can fix
	$(DEV_BIN)/ruff format .
	$(DEV_BIN)/ruff check --fix .

docs: install-dev ## Write the generated parts of the documentation, the dashboards and Datadog's monitors
	$(DEV_BIN)/python docs/generate.py
	$(DEV_BIN)/python -m deploy.watch

site: build/site-env/.installed ## Build the documentation as a site with search, in build/site
	build/site-env/bin/python docs/site.py

package: install-dev build/lock/.installed ## Build sdist and wheel into dist, install the wheel apart, serve with it
	rm -rf dist
	build/lock/bin/uv build --quiet --build-constraint requirements/build.lock --out-dir dist .
	PACKAGE_DIST=dist $(DEV_BIN)/pytest -q tests/test_package.py

loadtest: install-dev ## Load a new gateway with locust, or another: HOST=URL MODELS=a,b PROFILE=knee
	$(DEV_BIN)/python -m loadtest.run $(if $(HOST),--host $(HOST)) $(if $(MODELS),--models $(MODELS)) \
	  $(if $(PROFILE),--load-profile $(PROFILE)) $(ARGS)

soak: install-dev ## Ten minutes of load and batches while one thing after another fails (ARGS="--cluster --seconds 3600 --update")
	$(DEV_BIN)/python -m loadtest.soak $(ARGS)

bench: install ## Measure the start, then compare with Infinity's server (ARGS=--quick)
	$(BIN)/python -m bench.startup
	$(BIN)/python -m bench.compare $(ARGS)

versions: install-dev ## How old the pinned images and actions are, and until when they are supported
	$(DEV_BIN)/python deploy/versions.py $(ARGS)

image-proof: ## Build the image without a registry, run it, measure it (root; deploy/image/prove.py)
	python3 deploy/image/prove.py --torch-index="$(TORCH_INDEX)" $(ARGS)

lock: build/lock/.installed ## Pin what pyproject.toml asks for (ARGS=--upgrade: newest versions)
	build/lock/bin/python requirements/lock.py $(ARGS)

clean: ## Remove .venv, caches and build results
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A virtual environment contains its own path. If the folder was copied or moved, its commands would
# still run the old folder's code, so it is made again.
ifneq ($(shell cat $(VENV)/.made-in 2>/dev/null),$(CURDIR))
$(VENV)/.installed-run: FORCE
endif
# An environment that lacks a part of EXTRAS gets it.
ifneq ($(filter-out $(INSTALLED_EXTRAS),$(EXTRAS)),)
$(VENV)/.installed-run: FORCE
endif
.PHONY: FORCE

$(VENV)/.installed-run: $(INSTALLED_FROM)
	@$(INSTALL) run

$(DEV)/.installed: requirements/dev.lock $(VENV)/.installed-run build/lock/.installed
	@$(INSTALL) dev

build/lock/.installed: requirements/install.sh
	@$(INSTALL) lock-tools

build/site-env/.installed: requirements/site.lock build/lock/.installed
	@$(INSTALL) site

build/clients/.installed: requirements/clients-apart.lock requirements/infinity-client.lock \
  requirements/datadog.lock tests/clients/node/package-lock.json build/lock/.installed
	@$(INSTALL) clients
