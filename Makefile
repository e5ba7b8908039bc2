# SPDX-License-Identifier: Apache-2.0
#
# The common commands. Each prepares the machine first (packages, .venv, build), doing only what is
# missing; see packaging/setup.sh. Everything else: .venv/bin/python tests/dev.py --help
SHELL := /bin/bash
.DEFAULT_GOAL := build
PYTHON := .venv/bin/python

.PHONY: run panels test proof build quick lint bench uml-kernel clean setup

setup:
	@packaging/setup.sh

build: setup
	@$(PYTHON) tests/dev.py build

run: build
	@$(PYTHON) tests/demo/run.py

panels: build
	@$(PYTHON) tests/demo/run.py --panels build/panels

test: build
	@$(PYTHON) tests/dev.py test

proof: build
	@$(PYTHON) tests/dev.py proof

quick: build
	@$(PYTHON) tests/dev.py quick

lint: build
	@$(PYTHON) tests/dev.py lint
	@$(PYTHON) tests/dev.py types
	@$(PYTHON) tests/dev.py purity

# Whatever follows in BENCH goes on: make bench BENCH="--quick --compare saved.json"
bench: build
	@$(PYTHON) tests/dev.py bench $(BENCH)

uml-kernel: setup
	@tests/uml/build_kernel.sh

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find cython -name '*.so' -delete
	find cython daemon fvdengine tests -name __pycache__ -type d -prune -exec rm -rf {} +
