# Every target first makes its own virtual environment from the lock, so no command has to come before it.
# Settings go on the command line (make train MAX_STEPS=3), in the environment, or in .env; the line wins.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
export VENV ?= .venv
# Some boxes set it for every program, and with it no other Python starts.
unexport PYTHONHOME
# As typed: make would expand a dollar sign in the question.
override Q := $(value Q)
export Q
# The program refuses this too: what is typed here shows in process lists and in the shell's history.
$(foreach name,HF_TOKEN WANDB_API_KEY,$(if $(filter command,$(origin $(name))),$(error \
    $(name): a secret does not belong on the command line; set it in the environment or in .env, or $(name)_FILE to a file with it)))
PYTHON_RUN := "$$VENV/bin/python"
# `reproduce` takes settings from the record and its command line alone, so what is typed here has to arrive there.
TYPED = $(foreach name,$(filter-out RUN VENV PYTHON HF_% CUDA_%,$(.VARIABLES)),$(if $(filter command,$(firstword $(origin $(name)))),$(name)="$$$(name)"))
# Waiting threads sleep: on two cores that others use too, spinning ones make training 4 times slower (alone 15% faster).
smoke test: export OMP_WAIT_POLICY ?= passive
SCRIPTS = .ci/run $(wildcard scripts/*.sh docker/*.sh benchmarks/*.sh)
PYTHON_FILES = entrypoint.py finetune $(wildcard scripts/*.py docker/*.py)

.PHONY: help train push-hub check selftest data smoke ask eval reproduce verify lock-inputs test test-gpu bench lint env-example lock image image-reproducible publish-image test-image clean clean-all main dev

help: ## this list
	@printf 'usage: make TARGET [NAME=value ...]      for example: make train MAX_STEPS=60\n\n'
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r target what; do \
	    printf '  %-18s %s\n' "$$target" "$$what"; done
	@printf '\nAll settings, with their defaults: env.example. Environment: VENV=%s\n' "$$VENV"

train: main ## fine-tune, verify, record; publish where PUSH_TO_HUB=1 (the default verb)
	@$(PYTHON_RUN) entrypoint.py train

push-hub: main ## publish what an earlier run left in OUTPUT_DIR; needs no GPU
	@$(PYTHON_RUN) entrypoint.py push

check: main ## look at settings, GPU, driver, memory and disk; downloads nothing
	@$(PYTHON_RUN) entrypoint.py check

selftest: main ## compute on this GPU with all that a run uses, and compare; downloads nothing, under a minute
	@$(PYTHON_RUN) entrypoint.py selftest

data: main ## look at the rows before training: lengths, what is cut, near-duplicates, rows as they are trained; needs no GPU
	@$(PYTHON_RUN) entrypoint.py data

smoke: main ## train a small real model on the CPU, in under 3 minutes, without a Hub
	@$(PYTHON_RUN) scripts/smoke.py

ask: main ## answer with the trained model in OUTPUT_DIR: make ask Q="What does a raised troponin mean?"
	@$(PYTHON_RUN) entrypoint.py ask "$$Q"

eval: main ## measure base, adapter and merged weights in OUTPUT_DIR on rows that were not trained; trains nothing
	@$(PYTHON_RUN) entrypoint.py eval

reproduce: main ## train again as the record says, in a folder of its own, and compare the bytes: make reproduce RUN=outputs/run.json
	@$(PYTHON_RUN) entrypoint.py reproduce "$${RUN:-}" $(TYPED)

verify: main ## check every file against run.json, and the merged weights against base + adapter; needs no GPU
	@$(PYTHON_RUN) entrypoint.py verify

lock-inputs: main ## write the commits that MODEL_REVISION and DATASET_REVISION name now into .env
	@$(PYTHON_RUN) entrypoint.py lock-inputs

test: dev ## unit and end-to-end tests (ARGS goes to pytest: make test ARGS="-k merge")
	@$(PYTHON_RUN) -m pytest tests/unit tests/e2e --numprocesses auto --dist loadfile $(ARGS)

test-gpu: dev ## the tests that need a CUDA GPU, within 10 minutes; where there is none, this fails
	@$(PYTHON_RUN) -m pytest tests/gpu $(ARGS)

bench: main ## time every engine and two baselines on a GPU, side by side
	@$(PYTHON_RUN) scripts/bench.py $(ARGS)

lint: dev ## ruff, layers of imports, mypy, shellcheck, hadolint
	@$(PYTHON_RUN) -m ruff check .
	@$(PYTHON_RUN) -m ruff format --check .
	@"$$VENV/bin/lint-imports" --no-cache --no-logo
	@$(PYTHON_RUN) -m mypy $(PYTHON_FILES)
	@"$$VENV/bin/shellcheck" $(SCRIPTS)
	@$(if $(wildcard docker/Dockerfile),"$$VENV/bin/hadolint" docker/Dockerfile)

env-example: main ## write env.example, README's tables, run.schema.json and the drawing in docs/architecture.md
	@$(PYTHON_RUN) scripts/env_example.py

lock: ## resolve the dependencies again (UPGRADE=1: newest versions)
	@scripts/lock.sh

image: ## build the container image (CUDA=12.8: for drivers older than 580; PIP_INDEX_URL=…, BASE=…: mirrors nearby)
	@scripts/image.sh

image-reproducible: ## build the image twice and compare; differing files are printed
	@scripts/image_reproducible.sh

publish-image: dev ## build both images, test them, push them with SBOM and provenance: make publish-image REGISTRY=host/path
	@$(PYTHON_RUN) scripts/publish_image.py

test-image: dev ## build the image and run it in real containers
	@scripts/docker_engine.sh run $(PYTHON_RUN) -m pytest tests/image $(ARGS)

clean: ## remove caches, and what make smoke left; no other outputs
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis outputs/smoke
	@find . -path ./.git -prune -o -path './.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

clean-all: clean ## the same, and the virtual environment
	@rm -rf .venv .venv.uv .venv.cache .venv.lock

main dev:
	@scripts/bootstrap.sh $@
