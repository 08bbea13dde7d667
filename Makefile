# Every job of the project by name; `make help` lists them. `make demo` and `make test` set a fresh machine up by themselves,
# and a second run does nothing again that is done.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

# NO_VENV=1: use PYTHON and its packages as they are and install nothing (machines without a network).
NO_VENV ?=
VENV := $(CURDIR)/.venv
# IN_TREE: the package as it lies in the tree, with the library of preset dev.
IN_TREE := KVPACK_LIBRARY_DIR=$(CURDIR)/build/dev PYTHONPATH=$(CURDIR)/python
ifeq ($(NO_VENV),)
RUN_PYTHON := $(VENV)/bin/python
KVPACK := $(VENV)/bin/kvpack
export PATH := $(VENV)/bin:$(PATH)
else
PYTHON ?= python3
RUN_PYTHON := $(PYTHON)
KVPACK := $(IN_TREE) $(PYTHON) -m kvpack
endif

# AUTO, ON or OFF: whether libkvpack_cuda is built (cmake/kvpack_cuda.cmake).
KVPACK_CUDA ?= AUTO
# GPUs that builds on this machine are for; wheels are for all.
KVPACK_CUDA_ARCHITECTURES ?= $(shell tools/gpu_architectures.sh)

DEMO_POLICIES ?= int8 int4 int4+1%+sink int3 int3+1%+sink int2+1%+sink kivi-4+sink kivi-2+sink mustafar-50 mustafar-50-q4 \
  mustafar-70 klt-3.4+sink klt-2.4+sink klt-2+sink klt-2-joint+sink klt-1.5-joint+sink
# Half of the text is measured; from the other half and from other text come the samples that klt is calibrated on.
DEMO_FLAGS ?= --seqlen 2048 --limit 4
DEMO_CALIBRATION ?= --nsamples 4 --seqlen 1024
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

CXX_FILES = $(shell find include src tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Always, so that a folder configured by hand gets the preset's settings; speaks up when it fails.
define configure
	@mkdir -p build
	@cmake --preset $(1) $(2) >build/configure-$(1).log 2>&1 || { cat build/configure-$(1).log; exit 1; }
endef

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## system packages where missing, .venv with pinned Python packages
ifeq ($(NO_VENV),)
	@tools/setup_environment.sh
endif

.PHONY: build
build: setup ## build preset dev: libkvpack and the C++ tests in build/dev
	$(call configure,dev,-DKVPACK_CUDA=$(KVPACK_CUDA) '-DKVPACK_CUDA_ARCHITECTURES=$(KVPACK_CUDA_ARCHITECTURES)')
	@cmake --build --preset dev

.PHONY: test
test: build ## C++ tests, find_package from an installed copy, Python tests
	@ctest --preset dev --parallel $$(nproc)
	@$(IN_TREE) $(RUN_PYTHON) -m pytest $(PYTEST_FLAGS)

.PHONY: test-asan
test-asan: setup ## C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call configure,asan)
	@cmake --build --preset asan
	@ctest --preset asan --parallel $$(nproc)

# The installed package is as new as the newest file that goes into it.
PACKAGE_SOURCES := CMakeLists.txt pyproject.toml $(shell find cmake include src python -type f -not -path '*/__pycache__/*')
$(VENV)/kvpack.stamp: $(PACKAGE_SOURCES)
	@echo "installing kvpack into .venv"
	@$(RUN_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --config-settings=build-dir=build/package --config-settings=cmake.define.KVPACK_CUDA=$(KVPACK_CUDA) \
	  '--config-settings=cmake.define.KVPACK_CUDA_ARCHITECTURES=$(KVPACK_CUDA_ARCHITECTURES)' .
	@touch $@

.PHONY: install
ifeq ($(NO_VENV),)
install: setup ## kvpack and its command line into .venv
	@$(MAKE) --quiet $(VENV)/kvpack.stamp
else
install: build
endif

.PHONY: demo
demo: install ## what several ways of compressing a real model's KV cache cost; MODEL=... takes another model
	@mkdir -p out
	@model=$${MODEL:-$$($(RUN_PYTHON) tools/find_smollm2.py)} && \
	  $(KVPACK) calibrate "$$model" --method klt --blocks all --datasets pydoc,stdlib $(DEMO_CALIBRATION) --resume \
	    -o out/demo.klt && \
	  $(KVPACK) eval "$$model" $(foreach policy,$(DEMO_POLICIES),--policy '$(policy)') --datasets pydoc --skip 50% $(DEMO_FLAGS) \
	    --calibration out/demo.klt \
	    --report out/demo.html --json out/demo.json

GENERATE_FLAGS ?=

.PHONY: generate
generate: install ## write text with SmolLM2's cache in tiles, and compare with simulation; GENERATE_FLAGS="--tokens 24"
ifeq ($(NO_VENV),)
	@$(RUN_PYTHON) examples/generate_with_tiles.py $(GENERATE_FLAGS)
else
	@$(IN_TREE) $(RUN_PYTHON) examples/generate_with_tiles.py $(GENERATE_FLAGS)
endif

.PHONY: bench
bench: build ## the CPU benches, against torch in the same run; BENCH_FLAGS=--quick for a short look
	@for bench in $(filter-out %_cuda.py,$(wildcard benches/bench_*.py)); do \
	  $(IN_TREE) $(RUN_PYTHON) $$bench $(BENCH_FLAGS); \
	done

.PHONY: lint
lint: setup ## formatter and linter, changing nothing
	@clang-format --dry-run -Werror $(CXX_FILES)
	@$(RUN_PYTHON) -m ruff format --quiet --check
	@$(RUN_PYTHON) -m ruff check --quiet
	@echo "formatter and linter: clean"

.PHONY: format
format: setup ## format C++ and Python in place
	@clang-format -i $(CXX_FILES)
	@$(RUN_PYTHON) -m ruff check --quiet --fix --exit-zero --select I
	@$(RUN_PYTHON) -m ruff format --quiet

.PHONY: check-documents
check-documents: install ## local links, example commands and examples of every document
	@$(RUN_PYTHON) tools/check_links.py

.PHONY: gpu-check
gpu-check: setup ## build, test, sanitize and bench on a machine with a GPU (docs/gpu.md); results in benches/results
	@PYTHON=$(RUN_PYTHON) tools/gpu_check.sh

.PHONY: clean
clean: ## remove build and out; .venv stays
	@rm -rf build out
