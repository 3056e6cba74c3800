# `make demo` and `make test` are all a newcomer needs. Everything goes into .venv; nothing else is touched.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build:  ## developers: build the C++ modules in place (needs cmake, ninja and pybind11 on PATH)
	cmake -S . -B build/dev -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$$(python -c 'import sys; print(sys.executable)') \
	  -Dpybind11_DIR=$$(python -m pybind11 --cmakedir) > /dev/null
	cmake --build build/dev

.PHONY: help build
