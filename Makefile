# lmclock: every target makes what it needs in .venv; nothing is installed outside it.
#
# The install is editable: a changed Python file counts at once, a changed native/*.cc is rebuilt by the
# next make (incrementally, in build/). Stamps are files in .venv, so that `rm -r .venv` starts afresh.

PYTHON ?= python3
MODEL  ?= smollm2
# Arguments for what the target runs: make test ARGS="-k listing -x"
ARGS   ?=
# For the tests the CPU is enough, while a plain `torch` brings gigabytes of CUDA libraries where the
# package index offers nothing else. This version is also published as a CPU build, 2.13.0+cpu, which
# pip prefers wherever one of its configured indexes or find-links folders has it.
TORCH  ?= torch==2.13.0

# The tests that drive the native machine, for the sanitizers.
SANITIZED_TESTS ?= tests/test_kernels.py $(wildcard tests/test_native*.py)

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: help build demo test lint docs asan tsan fuzz neon bench clean FORCE
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: $(VENV)/.installed  ## lmclock and its extension, installed into .venv

demo: build  ## pull a model, generate text, print where the time went
	$(BIN)/lmclock pull $(MODEL)
	$(BIN)/lmclock run $(MODEL) --temp 0 -n 48 -p "The capital of France is"
	$(BIN)/lmclock stat $(MODEL) -n 64 -p "The capital of France is"

test: lint  ## linter, type checker, every test
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.test build  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: build  ## regenerate native/isa.h and the generated pages of docs/
	$(BIN)/python -m tools.generate

asan: build/asan/.installed  ## native tests under the address and undefined-behaviour sanitizers
	LD_PRELOAD="$(call runtime,asan) $(call runtime,stdc++)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  build/asan/bin/python -m pytest --capture=sys --timeout=1800 $(SANITIZED_TESTS) $(ARGS)

# NumPy's own threads would be races: the locks of its OpenBLAS are not instrumented.
tsan: build/tsan/.installed  ## native tests under the thread sanitizer
	LD_PRELOAD="$(call runtime,tsan) $(call runtime,stdc++)" TSAN_OPTIONS=halt_on_error=1 \
	  OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 \
	  setarch -R build/tsan/bin/python -m pytest --capture=sys --timeout=1800 $(SANITIZED_TESTS) $(ARGS)

fuzz: $(VENV)/.fuzz build  ## coverage-guided fuzzing of the file readers
	$(BIN)/python -m tools.fuzz_files $(ARGS)

# Static programs, so that the emulator needs no ARM libraries. The second processor lacks what path
# neon_i8mm asks for: it must be left out there, not crash.
NEON_TOOLS := aarch64-linux-gnu-g++ qemu-aarch64
neon: $(VENV)/.test build  ## kernels and opcodes compiled for ARM, run in emulation
	@for tool in $(NEON_TOOLS); do command -v $$tool > /dev/null || { \
	  echo "make neon needs $$tool: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(BIN)/python -m pytest -q -p tests.recorder --record=build/neon/machine.rec \
	  tests/test_native_machine.py
	$(BIN)/cmake -S . -B build/neon -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	  -DLMCLOCK_DRIVERS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/neon
	qemu-aarch64 -cpu max build/neon/kernels
	qemu-aarch64 -cpu max build/neon/replay build/neon/machine.rec
	qemu-aarch64 -cpu neoverse-n1 build/neon/replay build/neon/machine.rec

# make bench SCRIPTS=peers ARGS="--rounds 3 --dry"
SCRIPTS ?= limit peers embed prefill scale batch depth start quality avx2 overhead summary
bench: $(VENV)/.bench build/avx2/.installed build  ## measure everything into docs/measurements.md
	set -e; for script in $(SCRIPTS); do $(BIN)/python -m bench.$$script $(ARGS); done

clean:  ## remove what was built, .venv included; downloaded models stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# cmake and ninja come from pip as well: build isolation would fetch them for every rebuild, and give the
# compiler new include paths each time, which rebuilds everything.
$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or \
	  sys.exit(f"lmclock needs Python 3.11 or newer, {sys.executable} is {sys.version}: set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install cmake ninja $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
	touch $@

# The editable install holds a map of the package's files: a renamed one needs a new map.
build/files: FORCE
	@mkdir -p build
	@find lmclock native -name '*.py' -o -name '*.cc' -o -name '*.h' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

$(VENV)/.installed: $(VENV)/.base build/files CMakeLists.txt $(wildcard native/*)
	$(PIP) install --no-build-isolation --config-settings=cmake.define.LMCLOCK_EMULATE_AMX=ON -e .
	touch $@

# The extras of pyproject.toml, for the target of the same name.
$(VENV)/.test $(VENV)/.bench $(VENV)/.fuzz: $(VENV)/.%: pyproject.toml | $(VENV)/.installed
	$(PIP) install --no-build-isolation "$(TORCH)" -e ".[$*]"
	touch $@

# Peers of which a benchmark says that they were skipped where they cannot be installed.
OPTIONAL := bench-ctranslate2 bench-onnx
$(VENV)/.bench: $(VENV)/.optional
$(VENV)/.optional: pyproject.toml | $(VENV)/.installed
	-for extra in $(OPTIONAL); do $(PIP) install --no-build-isolation -e ".[$$extra]" || true; done
	touch $@

# A second llama.cpp without AVX-512, beside the first; a benchmark says so where it cannot be built.
build/avx2/.installed: | $(VENV)/.bench
	-$(BIN)/python -m bench.avx2 --build-only
	mkdir -p $(@D) && touch $@

# llama-cpp-python is compiled here; see the header for what its compiler may get wrong.
$(VENV)/.bench: private export CXXFLAGS := -include $(CURDIR)/bench/tile_config.h

# A sanitized extension lives in a venv of its own that sees the packages of .venv: python itself is not
# instrumented, so the sanitizer's runtime is loaded before it.
runtime = $(shell $(CXX) -print-file-name=lib$(1).so)
options_asan := LMCLOCK_SANITIZE=address,undefined LMCLOCK_EMULATE_AMX=ON
options_tsan := LMCLOCK_SANITIZE=thread LMCLOCK_SCALAR_ONLY=ON

build/%/.installed: $(VENV)/.test build/files CMakeLists.txt $(wildcard native/*)
	$(BIN)/python -m venv --without-pip build/$*
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(build/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(PIP) --python build/$*/bin/python install --no-deps --no-build-isolation \
	  --config-settings=build-dir=build/$*/objects \
	  --config-settings=cmake.build-type=RelWithDebInfo \
	  $(addprefix --config-settings=cmake.define.,$(options_$*)) -e .
	touch $@
