# Sets itself up on a machine that has Python 3.11, pip and make: every target below first makes .venv from requirements.lock.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-fast lint format lock image clean

help:
	@echo "make demo       the main job on a real video: train, evaluate, export, report (about 5 minutes)"
	@echo "make test       all tests"
	@echo "make test-fast  the tests that take seconds"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make format     ruff's formatter and its safe fixes"
	@echo "make image      the images of cluster.yaml, dora-ray:VERSION-cpu and -cuda (docker, or ENGINE=podman; TORCH_INDEX=PyTorch's index of CPU wheels)"
	@echo "make lock       write requirements.lock from what .venv holds"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dora-ray needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-input -r requirements.lock
	$(BIN)/python -m pip install --no-input --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m dora_ray.demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not ray"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(STAMP)
	$(BIN)/python scripts/lock.py > requirements.lock.new
	mv requirements.lock.new requirements.lock

ENGINE ?= docker
TORCH_INDEX ?=
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

image:
	$(ENGINE) build --build-arg TORCH_INDEX=$(TORCH_INDEX) --target cpu --tag dora-ray:$(VERSION)-cpu .
	$(ENGINE) build --target cuda --tag dora-ray:$(VERSION)-cuda .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
