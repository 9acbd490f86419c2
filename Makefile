# Every command that a person or CI runs; `make` alone lists them.

PYTHON ?= python3
ACCELERATOR ?= auto
CONFIG ?= experiments/shakespeare.py
WORKDIR ?= runs/shakespeare
ARGS ?=

ifneq ($(filter $(ACCELERATOR),auto cpu cuda tpu),$(ACCELERATOR))
$(error ACCELERATOR is "$(ACCELERATOR)"; it must be auto, cpu, cuda or tpu)
endif
# XLA on CPU takes its buffers afresh for every step; huge pages save a fault for each 4 KiB of them.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
# The .venv may have a GPU's jax from before.
ifeq ($(ACCELERATOR),cpu)
export JAX_PLATFORMS := cpu
endif

JAX_BUILD := $(shell launch/accelerator.sh '$(ACCELERATOR)')
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --prefer-binary --disable-pip-version-check
INSTALLED := $(VENV)/installed-$(JAX_BUILD)
CHECK_PYTHON := import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else \
  "$(PYTHON) is Python %d.%d; gptjax needs 3.11, 3.12 or 3.13: set PYTHON=python3.12" % sys.version_info[:2])

.PHONY: help setup data pretrain test test-slow test-hf lint fmt ci smoke bench prove-resume golden clean

# One .venv: its installs, and tests that measure time, must not run side by side.
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s%s\n", $$1, $$2}' Makefile
	@echo 'Variables: CONFIG WORKDIR ARGS (pretrain), ACCELERATOR=cpu|cuda|tpu (found by itself), PYTHON'

$(BIN)/pip:
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): setup.cfg pyproject.toml | $(BIN)/pip
	@echo 'Installing gptjax and jax for $(JAX_BUILD) into $(VENV): a minute or two, this once'
	@$(PIP) -e '.$(patsubst %,[%],$(filter-out cpu,$(JAX_BUILD)))'
	@touch $@

$(VENV)/installed-test $(VENV)/installed-test-hf $(VENV)/installed-test-serve: $(VENV)/installed-%: $(INSTALLED)
	@echo 'Installing what the tests need (extra $*) into $(VENV), this once'
	@$(PIP) -e '.[$*]'
	@touch $@

setup: $(INSTALLED)  ## make .venv and install gptjax into it
	@echo "gptjax is installed in $(VENV), with jax for $(JAX_BUILD)"

data: $(INSTALLED)  ## fetch Shakespeare's works, hash-checked, into data/shakespeare
	$(BIN)/python -m gptjax.data.shakespeare data/shakespeare

pretrain: $(INSTALLED) $(if $(filter experiments/shakespeare.py%,$(CONFIG))$(findstring tiny,$(CONFIG)),data)  ## train a GPT; the same command again resumes
	$(BIN)/gptjax pretrain --config '$(CONFIG)' --workdir '$(WORKDIR)' $(ARGS)

test: $(VENV)/installed-test  ## the fast tests, on CPU, without PyTorch
	$(BIN)/pytest

test-slow: $(VENV)/installed-test $(VENV)/installed-test-serve  ## tests of minutes: kills, several processes, whole runs
	$(BIN)/pytest -m slow

test-hf: $(VENV)/installed-test $(VENV)/installed-test-hf  ## parity with transformers; installs PyTorch
	$(BIN)/pytest -m hf

lint: $(VENV)/installed-test  ## ruff, and the rule of who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -q tests/test_imports.py

fmt: $(VENV)/installed-test  ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

smoke: SMOKE := experiments/shakespeare.py:tiny
smoke: OWN := --config $(SMOKE) --config.data.files='["runs/smoke/own.txt"]'
smoke: data  ## the README's commands on a tiny model, in seconds
	rm -rf runs/smoke
	$(MAKE) pretrain CONFIG=$(SMOKE) WORKDIR=runs/smoke/first
	$(BIN)/gptjax pretrain --config $(SMOKE) --workdir runs/smoke/first 2>&1 | grep 'nothing to do'
	seq 9999 > runs/smoke/own.txt
	$(BIN)/gptjax pretrain $(OWN) --workdir runs/smoke/own
	$(BIN)/gptjax data show $(OWN) --step 12 --row 3 | grep 'runs/smoke/own.txt bytes'

ci: lint test test-slow test-hf smoke  ## all that .ci/run runs

bench: $(VENV)/installed-test  ## measurements beside the peers'; PyTorch twins run where it is installed
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.time_to_loss
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.editor

prove-resume: $(INSTALLED)  ## show that killed runs and other device layouts give the same losses
	$(BIN)/python -m benchmarks.prove_resume

golden: $(VENV)/installed-test  ## rewrite the golden numbers of the tests and print what changed
	$(BIN)/python -m tests.golden

clean:  ## remove .venv, caches and builds; data/ and runs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
