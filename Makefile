# `make` lists what can be made. Everything runs in .venv, which is made here, and made up to date when pyproject.toml changes.

SHELL := /bin/sh
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# Compiled files save seconds of each process of the tests, wherever a container's image has Python write none.
unexport PYTHONDONTWRITEBYTECODE

.NOTPARALLEL:
.PHONY: help demo test unit integration lint docs bench soak fuzz clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

demo: .venv/.demo ## run an example script in a sandbox; any engine will do
	@sh tests/engines.sh demo
	@if [ -f .engines/env ]; then . ./.engines/env; fi; \
	$(PY) sandbox_runner.py --mount tests/data:/data tests/examples/weather.py

test: lint ## everything: ruff, mypy, unit tests, on other Pythons too, integration tests
	$(PY) -m pytest -n 4 --maxschedchunk 1 -m "not engine" --other-pythons
	@$(MAKE) --no-print-directory integration

unit: .venv/.dev ## the quick tests, which need no container engine
	$(PY) -m pytest -n 4 -m "not engine and not slow"

integration: .venv/.dev ## tests on real Docker and real Podman, side by side
	@sh tests/engines.sh test
	. ./.engines/env && $(PY) -m pytest -n 3 --maxschedchunk 1 -m engine --engine docker --engine podman

lint: .venv/.dev ## ruff and mypy
	$(PY) -m ruff check
	$(PY) -m mypy

docs: .venv/.dev ## the README's tables of settings, written anew from the code
	$(PY) -m tests.tools.readme

bench: .venv/.dev ## what a call costs, beside the engine's own commands; figures in build/, BESIDE=FOLDER for a checkout
	@sh tests/engines.sh test
	@mkdir -p build
	@set -e; . ./.engines/env; for engine in docker podman; do \
	    $(PY) -m tests.tools.bench $$engine --json build/bench-$$engine.json $(if $(BESIDE),--beside $(BESIDE)); \
	done

fuzz: .venv/.dev ## look for input that breaks the frame parsers, for SECONDS (300)
	$(PIP) install -q --group fuzz
	$(PY) -m tests.tools.fuzz_frames $(or $(SECONDS),300)

soak: .venv/.dev ## half an hour of calls while things are killed; ENGINE=podman MINUTES=5 for another one
	@sh tests/engines.sh test
	. ./.engines/env && $(PY) -m tests.tools.soak $(or $(ENGINE),docker) $(MINUTES)

clean: ## remove the virtual environment, caches and build results
	rm -rf .venv .engines build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.demo: .venv/.pip pyproject.toml
	$(PIP) install -q -e .
	@touch $@

.venv/.dev: .venv/.pip pyproject.toml
	$(PIP) install -q -e . --group dev
	@touch $@ .venv/.demo

# Candidates are asked for their version rather than trusted by name: a name on PATH may be a shim that runs nothing.
# Debian keeps the part of the standard library that puts pip into a new environment in a package of its own.
# pip: dependency groups came with 25.1, newer than what most Pythons bring.
.venv/.pip:
	@set -e; \
	for python in python3 python3.13 python3.12 python3.11; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo 'venv: no Python 3.11 or later found: install one (Debian, Ubuntu: apt-get install python3-venv)' >&2; exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip' 2>/dev/null; then \
	    package=$$($$python -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	    if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	        echo "venv: $$python cannot make virtual environments: install $$package (Debian, Ubuntu: apt-get install $$package)" >&2; exit 1; \
	    fi; \
	    echo "venv: installing $$package" >&2; \
	    apt-get -qq update </dev/null || true; \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 install -y --no-install-recommends --no-remove $$package </dev/null >/dev/null; \
	fi; \
	$$python -m venv .venv
	$(PIP) install -q --upgrade 'pip>=25.1'
	@touch $@
