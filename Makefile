# make demo    transformers and River side by side         make bench   decode speed of River and other programs
# make test    lint, type check and the quick tests        make clean   remove what make built here
# make check   lint, type check and a short core of the tests: what to run while you work, three minutes
# make generate    writes all generated pages: options, commands, measured numbers; `make check` says if one is stale
# make test-tools    the tests of benchmarks, examples and tools; make test-all    these and the slow ones too: an hour or
#              two on two cores (CONTRIBUTING.md)
# make test-arm    the C++ kernels of ARM's instruction sets on emulated cores: installs a cross compiler and an emulator
#              (apt-get, with sudo) where they are missing
# make test-sanitizers    the C++ code under GCC's sanitizers (addresses, undefined behavior, threads), and edited files
# make lint    ruff, clang-format, types, prose, links     make wheel   the source archive and the wheel, in dist/
# make docs    the documentation as a site, in build/site
# make gpu     on a machine with a GPU: tuning, kernels, the tests that need one, decode speed. Steps of ten minutes at
#              most, each also alone (gpu-tune gpu-kernels gpu-tests-kernels gpu-tests-graphs gpu-decode-1b gpu-decode-8b;
#              `make -k gpu` goes on where one fails); results in gpu/. REHEARSE=1 runs them, small, without a GPU.
# make compat  a short core of the tests with the oldest and newest versions of Python, torch and transformers, each in a
#              fresh environment (5 GB of disk while it runs; "not available here" where a Python is missing)
# make soak    random cases for an hour: calls against the plain model, threads, clients of a server
# make families    every causal language model of transformers, tiny, against the plain model: writes docs/models.md.
#              An hour or more; a stopped run goes on where it was. ARGS="--only llama mpt" tries these again.
#
# Variables: PYTHON (3.10 or newer; makes the virtual environment), VENV (its folder), RIVER_COMPILE_HOME (the folder
# of converted models and generated kernels), ARGS (arguments of the demo, the benchmark or the steps on a GPU, as in
# `make demo ARGS=--report`). pip takes its settings from its own configuration and from PIP_* variables.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
LAYERS ?=

# Stamps live in the environment, so that they vanish with it.
IN_VENV := $(VENV)/bin/python
CREATED := $(VENV)/.created
FOR_DEMO := $(VENV)/.installed-demo
FOR_TEST := $(VENV)/.installed-test
LINT_LOG := $(VENV)/.lint.log

# Each worker takes one half of the tests in their order, so that what a file's tests share is made once; the one that is
# done first takes over from the end of the other one's.
SIDE_BY_SIDE := -n 2 --dist worksteal --durations=25

# Material prints an advertisement at each build unless this is set.
SITE := NO_MKDOCS_2_WARNING=1 $(IN_VENV) -m mkdocs build --strict

.PHONY: help demo check generate test test-tools test-arm test-sanitizers test-all lint docs wheel bench families compat soak clean \
  gpu gpu-tune gpu-kernels gpu-tests-kernels gpu-tests-graphs gpu-decode-1b gpu-decode-8b
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

demo: $(FOR_DEMO)
	$(IN_VENV) -m examples.demo $(ARGS)

# Lint runs beside the tests, and what it says comes after them; either one fails the target.
test: $(FOR_TEST)
	$(IN_VENV) -m tools.demo_models smollm2
	@$(MAKE_COMMAND) --no-print-directory lint > $(LINT_LOG) 2>&1 & lint=$$!; \
	$(IN_VENV) -m pytest $(SIDE_BY_SIDE) $(LAYERS); tests=$$?; \
	wait $$lint; lint=$$?; cat $(LINT_LOG); \
	if [ $$lint -ne 0 ]; then echo "make lint FAILED, see above" >&2; fi; \
	exit $$((tests ? tests : lint))

check: lint
	$(IN_VENV) -m pytest -n 2 -q -m core

generate: $(FOR_TEST)
	$(IN_VENV) -m tools.options
	$(IN_VENV) -m tools.cli_page
	$(IN_VENV) -m tools.figures
	$(IN_VENV) -m tools.families --page

test-tools: $(FOR_TEST)
	$(IN_VENV) -m pytest $(SIDE_BY_SIDE) tests/benchmarks tests/examples tests/tools $(LAYERS)

ARM_TOOLS := aarch64-linux-gnu-g++ qemu-aarch64
SUDO = $(if $(filter-out 0,$(shell id -u)),sudo)

test-arm: $(FOR_TEST)
	@for tool in $(ARM_TOOLS); do \
	  command -v $$tool >/dev/null || exec $(SUDO) apt-get install --yes g++-aarch64-linux-gnu qemu-user; done
	$(IN_VENV) -m pytest --slow tests/kernels/native/test_phases.py

test-sanitizers: $(FOR_TEST)
	$(IN_VENV) -m pytest --slow -rs tests/kernels/native/test_sanitizers.py

test-all:
	$(MAKE) test LAYERS="--slow --tools"

lint: $(FOR_TEST)
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror kernels/native/sources/*.h kernels/native/sources/*/* \
	  tests/kernels/native/*.h tests/kernels/native/phases/* tests/kernels/native/pool/main.cpp tests/kernels/native/pool/torch/csrc/stable/* tools/rehearsal/card.cpp
	$(IN_VENV) -m tools.typecheck
	$(IN_VENV) -m tools.prose
	$(SITE) --site-dir build/site-of-lint

docs: $(FOR_TEST)
	$(SITE)
	@echo "open build/site/index.html"

wheel: $(CREATED)
	$(IN_VENV) -m pip install --disable-pip-version-check build
	$(IN_VENV) -m build

bench: $(FOR_DEMO)
	$(IN_VENV) -m benchmarks.decode $(ARGS)

families: $(FOR_TEST)
	$(IN_VENV) -m tools.families $(ARGS)

# Ten minutes for a step on a card, and none of its processes is left; steps after the first use the tiles it measured.
GPU_TESTS := pytest -m gpu -rs --timeout 200 -p no:cacheprovider
ON_GPU = RIVER_COMPILE_TUNING=gpu/tuning.json $(if $(REHEARSE),,timeout 600) \
  $(IN_VENV) -m $(if $(REHEARSE),tools.rehearsal )

gpu: gpu-tune gpu-kernels gpu-tests-kernels gpu-tests-graphs gpu-decode-1b gpu-decode-8b

gpu-tune: $(FOR_TEST)
	$(ON_GPU)tools.kernels.tune --model llama-3.1-8b --top 40 --budget 200
	$(ON_GPU)tools.kernels.tune --model llama-3.2-1b --top 40 --budget 100

gpu-kernels: $(FOR_TEST)
	$(ON_GPU)benchmarks.kernels --model llama-3.1-8b --json gpu/kernels-8b.json
	$(ON_GPU)benchmarks.kernels --model llama-3.2-1b --json gpu/kernels-1b.json

# (A head in float64 takes 15 GB of the card in each process.)
gpu-tests-kernels: $(FOR_TEST)
	$(ON_GPU)$(GPU_TESTS) -n 4 tests/kernels

gpu-tests-graphs: $(FOR_TEST)
	$(ON_GPU)$(GPU_TESTS) -n 6 tests/runtime tests/api tests/lowering

gpu-decode-1b gpu-decode-8b: gpu-decode-%: $(FOR_TEST)
	$(ON_GPU)benchmarks.random_llama $(if $(filter 1b,$*),llama-3.2-1b,llama-3.1-8b) gpu/llama-$* --device cuda
	$(ON_GPU)benchmarks.decode --model gpu/llama-$* --device cuda --one-process --kinds chat --contexts 1024 \
	  --rows eager inductor no_draft depth_3 all_4bit exact --json gpu/decode-$*.json

soak: $(FOR_TEST)
	$(IN_VENV) -m tools.soak $(ARGS)

compat:
	$(PYTHON) -m tools.compat $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Converted models and generated kernels stay in $${RIVER_COMPILE_HOME:-~/.cache/river_compile}; remove that folder by hand if you want."

$(FOR_DEMO): $(CREATED) pyproject.toml
	$(IN_VENV) -m pip install --disable-pip-version-check --editable ".[demo]"
	@touch $@

$(FOR_TEST): $(CREATED) pyproject.toml
	$(IN_VENV) -m pip install --disable-pip-version-check --editable ".[test]"
	@touch $@ $(FOR_DEMO)

$(CREATED):
	@$(PYTHON) -V >/dev/null 2>&1 || { echo "PYTHON=$(PYTHON) does not run; name a Python 3.10 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) tools/check_machine.py
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
