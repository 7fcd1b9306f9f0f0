# The commands of this repository; `make help` lists them.
#
# They make .venv and install everything into it. The machine needs Python >= 3.10 (another one than
# python3: `make PYTHON=python3.12 ...`), a C++20 compiler, git and make; cmake and ninja come from pip.

PYTHON ?= python3
BIN := .venv/bin
STAMPS := .venv/stamps
WERROR ?= OFF
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check

# Folders too, whose times say that a file has come or gone.
CORE_FILES := $(shell find csrc third_party)
CXX_FILES = find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu'

.DEFAULT_GOAL := help
.PHONY: help .venv build cuda gpu-report gpu-sanitize compare demo docs test emulate lint lint-format lint-python lint-warnings format asan clean

help:  ## this list
	@sed -n 's/^\([-.a-z]*\):.*  ## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "make %-12s %s\n", $$1, $$2}'

# --- .venv and what is in it ---------------------------------------------------------------------
# A stamp is a file that is newer than what it was made from, so that nothing is done twice.

.venv: $(STAMPS)/venv  ## the virtual environment, with the build tools

$(STAMPS)/venv: requirements-build.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: '$(PYTHON)' is missing or older than Python 3.10. Name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) -r requirements-build.txt
	@mkdir -p $(STAMPS) && touch $@

# Editable: a change to Python code counts at once, one to C++ code with the next make.
# WERROR=ON makes compiler warnings errors.
# Isolation would hand CMake another toolchain path each time and so compile everything anew; what is
# used instead are the tools in .venv. `pip install .` and `make asan` build in isolation.
$(STAMPS)/build: $(STAMPS)/venv pyproject.toml CMakeLists.txt $(wildcard cmake/*.cmake) $(CORE_FILES)
	@echo "Building tinyvllm into .venv; from nothing this takes one to two minutes."
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation --config-settings=cmake.define.TINYVLLM_WERROR=$(WERROR) -e '.[test]'
	@$(BIN)/python -c 'from tinyvllm import _core; print("Built tinyvllm", _core.__version__ + \
	  ": the CPU engine, with kernels for", ", ".join(_core.supported_isas()) + "; CUDA:", _core.cuda_build())'
	@touch $@

$(STAMPS)/dev: $(STAMPS)/venv requirements-dev.txt
	$(BIN)/python $(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

# llama.cpp from source, with all instructions of this machine; else it is not what it can be.
$(STAMPS)/bench: $(STAMPS)/venv requirements-bench.txt
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(BIN)/python $(PIP_INSTALL) --no-binary llama-cpp-python -r requirements-bench.txt
	@touch $@

$(STAMPS)/oracle: $(STAMPS)/venv requirements-oracle.txt
	$(BIN)/python $(PIP_INSTALL) -r requirements-oracle.txt
	@touch $@

build: $(STAMPS)/build  ## build and install into .venv, editable

# NVIDIA's packages are installed where there is no CUDA toolkit. What CMake is told stays told: later
# builds in .venv have CUDA, too.
$(STAMPS)/cuda: $(STAMPS)/venv requirements-cuda.txt
	@if $(BIN)/cmake -P cmake/find_cuda.cmake; then extras=test; else extras=test,cuda; \
	  echo "NVIDIA's compiler and cuBLAS come from pip."; \
	  $(BIN)/python $(PIP_INSTALL) -r requirements-cuda.txt || exit; fi; \
	echo "Building tinyvllm with CUDA into .venv."; \
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation --config-settings=cmake.define.TINYVLLM_WERROR=$(WERROR) \
	  --config-settings=cmake.define.TINYVLLM_CUDA=ON -e ".[$$extras]"
	@touch $@

cuda: $(STAMPS)/cuda  ## the same with the CUDA backend, by the toolkit that is there or NVIDIA's pip packages
	@$(MAKE) --no-print-directory build

# --- Use -----------------------------------------------------------------------------------------

demo: build  ## two stories by the bundled model
	$(BIN)/tinyvllm generate --raw --prompt "Once upon a time"
	$(BIN)/tinyvllm generate --prompt "Tell me a story about a brave fox"

compare: build $(STAMPS)/bench  ## this engine beside others: benchmarks/results/compare.*; ARGS="--rounds 5"
	$(BIN)/python benchmarks/compare.py $(ARGS)

docs: build  ## docs/cli.md, from the commands' own help
	$(BIN)/python docs/make_cli.py

# --- Tests and checks ----------------------------------------------------------------------------
# ARGS goes to pytest: make test ARGS="-k rope".

# The oracle comes after the build: what it shares with the engine is then there and stays as it is.
# PyTorch's threads only get in each other's way on models this small: with one it takes half the time.
test: build  ## the tests; TINYVLLM_REQUIRE_ORACLE=1 installs Transformers to compare with
ifeq ($(TINYVLLM_REQUIRE_ORACLE),1)
	@$(MAKE) --no-print-directory $(STAMPS)/oracle
endif
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

lint: lint-format lint-python lint-warnings  ## clang-format, ruff, mypy, compiler warnings as errors

lint-format: $(STAMPS)/dev
	$(CXX_FILES) | xargs $(BIN)/clang-format --dry-run -Werror

lint-python: build $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint-warnings: $(STAMPS)/venv
	$(BIN)/cmake -S . -B build/lint -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
	  -DTINYVLLM_WERROR=ON -DTINYVLLM_CUDA=EMULATE -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/lint

format: $(STAMPS)/dev  ## clang-format and ruff, written in place
	$(CXX_FILES) | xargs $(BIN)/clang-format -i
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The CUDA code compiled for the CPU, in an environment of its own beside .venv: the ops and the
# engine on "cuda" (csrc/cuda/emulator), nothing that `make test` runs on the CPU. With
# $(EMULATE)/venv/bin/tinyvllm the whole engine can be tried; it is slow.
# The kernels of the CPU are the portable ones, which are soon compiled.
EMULATE := build/emulate
EMULATE_TESTS = tests/ops tests/test_build.py tests/test_emulator.py tests/test_golden.py \
  $(wildcard tests/test_*cuda*.py)

$(EMULATE)/venv/made: requirements-build.txt
	$(PYTHON) -m venv $(EMULATE)/venv
	$(EMULATE)/venv/bin/python $(PIP_INSTALL) -r requirements-build.txt
	@touch $@

emulate: $(EMULATE)/venv/made  ## the tests of the CUDA code on an emulated GPU
	$(EMULATE)/venv/bin/python $(PIP_INSTALL) --no-build-isolation --config-settings=build-dir=$(EMULATE)/cmake \
	  --config-settings=cmake.define.TINYVLLM_CUDA=EMULATE --config-settings=cmake.define.TINYVLLM_WERROR=$(WERROR) \
	  --config-settings=cmake.define.TINYVLLM_PORTABLE_KERNELS=ON \
	  '.[test]'
	OMP_NUM_THREADS=1 $(EMULATE)/venv/bin/python -m pytest -k 'cuda or build or emulator' $(EMULATE_TESTS) $(ARGS)

# On a machine with a GPU. The tests that name no device run on the CPU, as everywhere.
GPU_TESTS := tests/ops $(addprefix tests/test_, cuda.py cuda_engine.py golden.py tune_gemm_cuda.py)

# Figures beside other engines: make gpu-report BENCH_ARGS="--peers-python PYTHON".
gpu-report: cuda  ## on a machine with a GPU: its build, all tests there, and the figures of benchmarks/gpu.py
	$(BIN)/python -m pytest -k cuda $(GPU_TESTS) $(ARGS)
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k 'not cuda' $(ARGS)
	$(BIN)/python benchmarks/gpu.py $(BENCH_ARGS)

# Of compute-sanitizer's findings counts what kernels do; that an allocation fails is what some tests
# are for, and that the driver is loaded is its own doing. initcheck took
# what cuBLASLt had written for unwritten (H200; the engine's results were right): it has the ops only.
SANITIZE_TOOLS := memcheck racecheck initcheck

gpu-sanitize: cuda  ## on a machine with a GPU: its tests under NVIDIA's compute-sanitizer; slow
	for tool in $(SANITIZE_TOOLS); do \
	  tests="$(GPU_TESTS)"; if [ $$tool = initcheck ]; then tests=tests/ops; fi; \
	  compute-sanitizer --tool $$tool --report-api-errors no --error-exitcode 99 --print-limit 20 \
	    $(BIN)/python -m pytest -k 'cuda and not import_loads and not within_their_reserve' $$tests $(ARGS) || exit; \
	done

# Not editable and in isolation, as a user installs it, into an environment of its own. Python is not
# built with the sanitizers, so their library has to be loaded first, and that of C++ for its
# exceptions. ASan's reports go to files, because a test may expect that a process fails: any report
# fails the run. UBSan's go to stderr, which pytest therefore leaves alone. Leaks are not looked for:
# Python itself keeps what it allocates at the end. SIGBUS is left to the core's own handler and what
# its tests put before it. A process that forks while it has threads may hang in ASan's allocator,
# which is no fault of ours: those tests are left out, and those in which many sizes repeat what
# fewer tests beside them do. The CUDA code is there, too, emulated, and tested beside the rest.
ASAN := build/asan
ASAN_LIBRARIES = $(shell for name in asan ubsan stdc++; do $${CXX:-c++} -print-file-name=lib$$name.so; done)
ASAN_REPORTS = log_path=$(CURDIR)/$(ASAN)/report:exitcode=99:print_stacktrace=1
ASAN_TESTS = tests/ops $(addprefix tests/test_, block_pool.py checkpoint.py engine.py golden.py \
  model_config.py prefix_cache.py safetensors.py sampler.py scheduler.py thread_pool.py)
ASAN_K = not (after_fork or forked_child or cuda or across_tiles_and_splits or it_is_the_two_ops \
  or too_many_tensors or one_hundred_megabytes)

# The emulator runs many thousand fibers, and a stack of ASan's own for each would take most of the time.
# Of the engine here is a graph beside single launches, and two steps in flight.
ASAN_EMULATED = tests/ops tests/test_cuda.py tests/test_emulator.py \
  $(addprefix tests/test_cuda_engine.py::, \
  test_a_graph_and_the_same_kernels_without_one_give_the_same_bits \
  test_a_sampled_token_goes_on_in_the_next_step_without_the_host)
# All of them: make asan ASAN_EMULATED_K='cuda or emulator'.
ASAN_EMULATED_K = (cuda or emulator) and not (test_matmul.py or every_shape or any_chunking)
ASAN_ENV = LD_PRELOAD="$(ASAN_LIBRARIES)" PYTHONMALLOC=malloc UBSAN_OPTIONS=$(ASAN_REPORTS) \
  ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0:$(ASAN_REPORTS)
ASAN_PYTEST = $(ASAN)/venv/bin/python -m pytest --capture=sys

asan: $(STAMPS)/venv  ## the tests of the core under AddressSanitizer and UBSan (GCC)
	$(PYTHON) -m venv $(ASAN)/venv
	$(ASAN)/venv/bin/python $(PIP_INSTALL) --config-settings=build-dir=$(ASAN)/cmake \
	  --config-settings=cmake.build-type=Debug --config-settings=cmake.define.TINYVLLM_SANITIZE=ON \
	  --config-settings=cmake.define.TINYVLLM_CUDA=EMULATE '.[test]'
	rm -f $(ASAN)/report.*
	$(ASAN_ENV):detect_stack_use_after_return=0 $(ASAN_PYTEST) -k '$(ASAN_EMULATED_K)' $(ASAN_EMULATED) $(ARGS) \
	  >$(ASAN)/emulated.log 2>&1 & emulated=$$!; \
	$(ASAN_ENV):detect_stack_use_after_return=1 $(ASAN_PYTEST) -k '$(ASAN_K)' $(ASAN_TESTS) $(ARGS); \
	status=$$?; \
	wait $$emulated || status=$$?; \
	cat $(ASAN)/emulated.log; \
	if ls $(ASAN)/report.* >/dev/null 2>&1; then cat $(ASAN)/report.*; exit 1; fi; \
	exit $$status

clean:  ## remove .venv and everything built
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
