# make demo      the main job on the demo model: export, search, compare
# make test      all tests; OPTIONS="-k name" goes to pytest
# make quick     the tests that take less than half a second each
# make docs      the documentation site, in build/site; warnings are errors, and links have to lead somewhere
# make check     lint, types, C, documents and tests, as before a release
# make sanitize  the kernels' tests with the kernels under AddressSanitizer and UBSan (Linux, gcc, AVX512-VNNI)
# make test-node     the npm package in Node.js and headless Chromium: vectors as Python's and torch's (npm, chromium)
#
# make test-as-avx2     all tests as on a processor without AVX-512 (tests/processors/cpuid_mask.c says where it works)
# make test-on PYTHON=python3.12    the tests that need no torch, on another Python
# make test-transformers5    families, sources, adapters and the bench with transformers 5; all with TRANSFORMERS5_TESTS=
# make test-integrations   LangChain, LlamaIndex, Haystack, Chroma and the guide's vector databases, the real packages
# make test-clients     the server against clients of others: openai of PyPI and npm, langchain-openai, curl
# make test-ray         Ray Data and Spark, the real packages on this machine; Spark needs Java
# make native-warnings  compiles the C with every warning an error, and compares its format: gcc, clang, and for
#                       Windows and macOS mingw-w64 and `pip install ziglang`, where they are installed
# make test-as-windows   the kernels under Wine: vectors of demo-bundle to the bit (tests/processors/windows.py)
# make test-as-aarch64   the runtime's tests on 64-bit Arm, by qemu (tests/processors/aarch64.sh; an hour or more)
#
# On Linux, pip's default torch is a CUDA build of several GB. To take the CPU build instead, pass the
# index that PyTorch's installation page names for it:  make demo TORCH_INDEX=URL

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch>=2.9,<2.14
TORCH_INDEX ?=
OPTIONS ?=
PYTEST = -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(OPTIONS)
# For an environment that shares packages with another, which is no plain installation.
NO_INSTALLATION := --ignore=tests/test_packaging.py --ignore=tests/runtime/host/test_onnxruntime.py
STAMP := $(VENV)/.embedge-installed
export HF_HUB_OFFLINE = 1

.PHONY: demo test quick docs check lint types install clean test-on test-transformers5 test-integrations test-node \
  test-clients test-ray native-warnings sanitize test-as-windows test-as-aarch64

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python $(PYTEST)

quick: $(STAMP)
	$(BIN)/python $(PYTEST) -m "not slow"

# Where the system cannot let CPUID fault, an environment with copies of the libraries does.
FAULTING := build/faulting
FAULTS := $(if $(shell grep -m1 cpuid_fault /proc/cpuinfo 2>/dev/null),,$(FAULTING)/.copied)

test-as-%: $(STAMP) build/cpuid_mask.so $(FAULTS)
	CPUID_MASK=$* LD_PRELOAD=$(CURDIR)/build/cpuid_mask.so $(if $(FAULTS),CPUID_FAULTS=1 $(FAULTING),$(VENV))/bin/python \
	  $(PYTEST) $(if $(FAULTS),$(NO_INSTALLATION))

.PHONY: $(FAULTING)/.copied
$(FAULTING)/.copied: $(STAMP)
	$(call environment,$(FAULTING))
	$(BIN)/python tests/processors/faulting_cpuid.py \
	  $$($(FAULTING)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") onnxruntime

test-as-windows: $(STAMP)
	$(BIN)/python -m tests.processors.windows demo-bundle

test-as-aarch64:
	tests/processors/aarch64.sh -n auto --dist loadfile --no-loadscope-reorder $(OPTIONS)

test-on:
	$(PYTHON) -m venv build/on-$(notdir $(PYTHON))
	build/on-$(notdir $(PYTHON))/bin/python -m pip install --quiet ".[light]"
	EMBEDGE_LIGHT_TESTS=1 build/on-$(notdir $(PYTHON))/bin/python $(PYTEST)

# Shares the other packages of $(VENV). Of optimum-onnx, which does not go with it, pip says so; no test runs it.
TRANSFORMERS5 := build/transformers5
TRANSFORMERS5_TESTS := tests/export/families tests/export/source tests/export/adapters tests/bench

test-transformers5: $(TRANSFORMERS5)/.installed
	$(TRANSFORMERS5)/bin/python $(PYTEST) $(NO_INSTALLATION) $(TRANSFORMERS5_TESTS)

# A virtual environment that sees the packages of $(VENV) behind its own.
define environment
	$(BIN)/python -m venv $(1)
	packages=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	  echo "import site; site.addsitedir('$$packages')" > \
	  $$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
endef

$(TRANSFORMERS5)/.installed: $(STAMP)
	$(call environment,$(TRANSFORMERS5))
	$(TRANSFORMERS5)/bin/python -m pip install --quiet "transformers>=5.24,<6" "sentence-transformers>=6.2,<7" \
	  "huggingface-hub>=1.31,<2"
	touch $@

INTEGRATIONS := build/integrations
INTEGRATIONS_TESTS := tests/integrations "tests/test_document_code.py::test_code_runs[docs/guides/frameworks.md]" \
  "tests/test_document_code.py::test_code_runs[docs/guides/vector-databases.md]"

test-integrations: $(INTEGRATIONS)/.installed
	$(INTEGRATIONS)/bin/python $(PYTEST) $(INTEGRATIONS_TESTS)

$(INTEGRATIONS)/.installed: $(STAMP) tests/integrations/requirements.txt
	$(call environment,$(INTEGRATIONS))
	$(INTEGRATIONS)/bin/python -m pip install --quiet --requirement tests/integrations/requirements.txt
	touch $@

# SentencePiece trains a tokenizer with its own table of replacements; transformers would change with it in $(VENV).
JAVASCRIPT := runtime/javascript

test-node: $(STAMP) $(if $(findstring x86_64,$(shell uname -m)),build/cpuid_mask.so)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target build/sentencepiece "sentencepiece>=0.2,<0.3"
	cd $(JAVASCRIPT) && npm ci
	EMBEDGE_KERNELS=onnxruntime PYTHONPATH=examples:build/sentencepiece $(BIN)/python -W ignore \
	  -m tests.javascript.make_cases build/javascript
	cd $(JAVASCRIPT) && npm run format && npm run types && npm test

# Shares the other packages of $(VENV), as above. Needs node, npm and curl.
CLIENTS := build/clients

test-clients: $(CLIENTS)/.installed
	EMBEDGE_CLIENTS=$(CURDIR)/$(CLIENTS) $(CLIENTS)/bin/python -m pytest -q $(OPTIONS) tests/runtime/server/clients

$(CLIENTS)/.installed: $(STAMP)
	$(BIN)/python -m venv $(CLIENTS)
	packages=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	  echo "import site; site.addsitedir('$$packages')" > \
	  $$($(CLIENTS)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	$(CLIENTS)/bin/python -m pip install --quiet "langchain-openai>=1.0,<2" "openai>=2,<4"
	npm install --prefix $(CLIENTS) --no-audit --no-fund --silent "openai@^6"
	touch $@

RAY := build/ray
RAY_WARNINGS := $(foreach kind,DeprecationWarning FutureWarning ResourceWarning UserWarning,-W ignore::$(kind)) \
  -W ignore::pytest.PytestUnraisableExceptionWarning

test-ray: $(RAY)/.installed
	RAY_USAGE_STATS_ENABLED=0 $(RAY)/bin/python -m pytest $(RAY_WARNINGS) $(OPTIONS) tests/integrations/test_ray.py \
	  "tests/test_document_code.py::test_code_runs[docs/guides/many-machines.md]"

$(RAY)/.installed: $(STAMP) tests/integrations/ray-requirements.txt
	$(call environment,$(RAY))
	$(RAY)/bin/python -m pip install --quiet --requirement tests/integrations/ray-requirements.txt
	touch $@

build/cpuid_mask.so: tests/processors/cpuid_mask.c
	mkdir -p build
	$(CC) -O2 -shared -fPIC -o $@ $< -ldl

NATIVE := runtime/kernels/native
NATIVE_FLAGS := -std=gnu11 -ffp-contract=off -fvisibility=hidden -fPIC
COMPILERS = $(foreach compiler,gcc clang x86_64-w64-mingw32-gcc,$(if $(shell command -v $(compiler)),$(compiler)))
ZIG = $(if $(shell $(BIN)/python -c "import ziglang" 2>/dev/null || echo none),,x86_64-macos x86_64-windows-gnu)

ifeq ($(shell uname -s)-$(shell uname -m),Linux-x86_64)
native-warnings: $(STAMP)
	for compiler in $(COMPILERS); do for file in $(NATIVE)/*.c; do \
	  $$compiler $(NATIVE_FLAGS) -O3 -Wall -Wextra -Werror -c -o /dev/null $$file || exit 1; done; done
	for target in $(ZIG); do for file in $(NATIVE)/*.c; do \
	  $(BIN)/python -m ziglang cc -target $$target $(NATIVE_FLAGS) -O3 -Wall -Wextra -Werror -c -o build/zig.o $$file || \
	  exit 1; done; done
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)/*.[ch] tests/processors/[rs]*.c

# Python is not built with them, so they are loaded first, and what it never frees is no leak of the kernels'.
SANITIZED := LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc \
  EMBEDGE_SANITIZED=$(CURDIR)/build/sanitize $(BIN)/python

sanitize: $(STAMP) build/sanitize/_native.so
	$(SANITIZED) -m tests.helpers.sanitized_kernels
	$(SANITIZED) -m pytest -q -p tests.helpers.sanitized_kernels tests/runtime/kernels $(SANITIZE_OPTIONS)

build/sanitize/_native.so: $(wildcard $(NATIVE)/*.[ch])
	mkdir -p $(@D)
	gcc $(NATIVE_FLAGS) -O1 -g -shared -fsanitize=address,undefined -fno-omit-frame-pointer -o $@ $(NATIVE)/*.c
else
native-warnings sanitize:
	@echo "$@: the kernels are for Linux on x86-64, there is nothing to compile here"
endif

check: lint types native-warnings docs test test-transformers5

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m pytest -q tests/test_documents.py -k "links or paths or made or lines"

install: $(STAMP)

$(STAMP): pyproject.toml $(wildcard runtime/kernels/native/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[demo,dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build demo-bundle demo-report runtime/kernels/_native*.so
