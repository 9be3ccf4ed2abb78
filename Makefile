# Sets itself up on a machine that has Python 3.11, pip and make: every target below first makes .venv from requirements.lock.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-long test-fast coverage notebook lint audit format lock image gpu-kit clean

help:
	@echo "make demo       the main job on a real video: train, evaluate, export, report (about 5 minutes)"
	@echo "make test       all tests but those of make test-long, three at a time (AT_ONCE=0: one)"
	@echo "make test-long  those that take long: killed sweeps, ray up, autoscaling, compilations, full-size steps"
	@echo "make test-fast  the tests that take seconds"
	@echo "make coverage   lines that no test reaches, in htmlcov/ (COVERED=\"tests/clips\": by these tests)"
	@echo "make notebook   docs/tutorial.ipynb from docs/tutorial.md"
	@echo "make lint       ruff, mypy, import-linter"
	@echo "make audit      known vulnerabilities of the locked versions"
	@echo "make format     ruff's formatter and its safe fixes"
	@echo "make image      the images of cluster.yaml, dora-ray:VERSION-cpu and -cuda (docker, or ENGINE=podman; TORCH_INDEX=PyTorch's index of CPU wheels)"
	@echo "make gpu-kit    what scripts/gpu_check.py needs on a GPU machine, in .gpu-kit: VIDEOS=... IMAGES=DIR DAVIS=DIR"
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

# Three at a time on two cores: those with Ray wait for its processes now and then. The tests of a file stay together and
# share its fixtures; files run in tests/conftest.py's order.
AT_ONCE ?= 3
test: $(STAMP)
	$(BIN)/python -m pytest -m "not long" -n $(AT_ONCE) --dist loadscope --no-loadscope-reorder

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not ray"

# Counting lines slows tests down, so this is apart from `make test`. COVERED="tests/clips" counts with less.
COVERED ?= -m "not long"
coverage: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(COVERED)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report

notebook: $(STAMP)
	$(BIN)/python scripts/notebook.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# pip-audit has an environment of its own: it is no part of what we run. Without a way out it is not there, and nothing is checked.
audit: $(STAMP)
	test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/python -m pip install --quiet --no-input pip-audit || true; }
	$(BIN)/python scripts/audit.py .audit/bin/pip-audit

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

# A machine with a GPU may have neither a network nor a decoder: clips as one file, and the wheels that it lacks.
GPU_KIT := .gpu-kit
GPU_WHEELS = $(shell grep -E '^(pydantic|pydantic-core|annotated-types|typing-inspection|typing-extensions|timm)==' requirements.lock)
GPU_PYTHON ?= 3.12

gpu-kit: $(STAMP)
	@test -n "$(VIDEOS)" -a -n "$(IMAGES)" -a -n "$(DAVIS)" || { echo 'make gpu-kit VIDEOS="FOLDER or FILES" IMAGES=DIR_WITH_train_AND_test DAVIS=DIR'; exit 2; }
	$(BIN)/python scripts/gpu_kit.py --videos $(VIDEOS) --images "$(IMAGES)" --davis "$(DAVIS)" --out $(GPU_KIT)/clips.npz
	rm -rf $(GPU_KIT)/wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--dest $(GPU_KIT)/wheels $(GPU_WHEELS)
	@du -sh $(GPU_KIT)

clean:
	rm -rf $(VENV) .audit build dist *.egg-info .pytest_cache .coverage .coverage.* htmlcov .mypy_cache .ruff_cache .import_linter_cache
