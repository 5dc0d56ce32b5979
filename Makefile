# `make train` and `make test` work on a fresh machine: the environment is made when it is missing or out of date.
.DEFAULT_GOAL := help
.PHONY: help setup check test test-ci test-all plan data train sweep resume export eval verify doctor \
	wandb-sync eval-harness bench bench-checkpoints bench-scaling bench-gpu clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
# Package index for torch, e.g. an index of CPU wheels for a machine without a GPU. Empty: the index that pip is set to.
TORCH_INDEX ?=
# Hydra overrides, e.g. make train ARGS="train.steps=50 parallel.zero=1".
ARGS ?=
# The recipe of `make train`, unless ARGS chooses one, e.g. make train ARGS="experiment=8b".
RECIPE = $(if $(filter experiment=% ~experiment,$(ARGS)),,experiment=quickstart)
# Run directory for resume, export, eval, verify and wandb-sync, and folder that export writes, e.g.
# make export RUN=runs/quickstart/20261123-101500-a1b2 OUT=my-model.
RUN ?=
OUT ?=
# Tasks of the harness, which evaluates the folder OUT, e.g. make eval-harness OUT=my-model TASKS=hellaswag,arc_easy.
TASKS ?= python_source
# Folders or files of tests for `make test`, `make test-ci` and `make test-all`, e.g. make test TESTS=tests/unit.
TESTS ?= tests

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY) ## make .venv with the tested versions

# torch is installed first, with its exact version. From a version range pip may choose a build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; use make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar off $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

check: $(READY) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(READY) ## run the fast tests, about half an hour on two cores (TESTS=tests/unit for a part)
	$(BIN)/python -m pytest -m "not ci and not slow" $(TESTS)

test-ci: $(READY) ## run the tests that CI adds to the fast ones: killed ranks, two hosts, Slurm, a fresh clone
	$(BIN)/python -m pytest -m "ci and not slow" $(TESTS)

test-all: $(READY) ## run all tests, with the whole parity matrix
	$(BIN)/python -m pytest $(TESTS)

plan: $(READY) ## print the layout of a run (ARGS="experiment=8b")
	$(BIN)/stack plan $(ARGS)

data: $(READY) ## tokenize the corpus
	$(BIN)/stack data $(ARGS)

train: $(READY) ## train the quickstart, or another recipe (ARGS="experiment=8b train.steps=50")
	$(BIN)/stack train $(RECIPE) $(ARGS)

sweep: $(READY) ## train one run for each of several values (ARGS="optim.lr=1e-3,3e-3 run.seed=1,2")
	$(BIN)/stack train -m $(ARGS)

resume: $(READY) ## continue a run (RUN=runs/NAME/ID ARGS="train.steps=200")
	$(BIN)/stack resume $(RUN) $(ARGS)

export: $(READY) ## write a run's newest checkpoint as a Hugging Face folder (RUN=... OUT=...)
	$(BIN)/stack export $(RUN) $(OUT) $(ARGS)

eval: $(READY) ## held-out loss of a run or an exported folder (RUN=...)
	$(BIN)/stack eval $(RUN) $(ARGS)

verify: $(READY) ## read every checkpoint of a run in full (RUN=...)
	$(BIN)/stack verify $(RUN)

doctor: $(READY) ## check hosts and links, and a layout's numbers (ARGS="--parity parallel.pipeline=4")
	$(BIN)/stack doctor $(ARGS)

wandb-sync: $(READY) ## upload all of a run to Weights & Biases, once (RUN=...)
	$(BIN)/stack wandb-sync $(RUN) $(ARGS)

eval-harness: $(READY) ## EleutherAI's harness on an exported folder (OUT=... TASKS=...)
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[eval]'
	$(BIN)/lm_eval run --model hf --model_args pretrained=$(OUT) --include_path benchmarks/eval_harness --tasks $(TASKS) $(ARGS)

# The Hugging Face Trainer needs accelerate, which is in the extra `bench`.
bench: $(READY) ## measure against DeepSpeed, Trainer, FSDP2 and torch's pipelining
	$(BIN)/pip install --quiet --progress-bar off -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-checkpoints: $(READY) ## measure saving, loading and exporting against DeepSpeed's checkpoints
	$(BIN)/python -m benchmarks.checkpoints $(ARGS)

bench-scaling: $(READY) ## measure how a step grows with sequence, microbatches, stages, layers, ranks
	$(BIN)/python -m benchmarks.scaling $(ARGS)

bench-gpu: $(READY) ## measure everything that needs one NVIDIA GPU (ARGS="--part a,b,c")
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean: ## remove the environment and caches; runs/ and data/ stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
