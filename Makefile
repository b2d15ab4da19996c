# `make demo` and `make test` do all their set-up by themselves, into .venv and models/.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := models/smollm2-135m-instruct
DEMO := runs/compare_demo

ALIGNED := runs/smollm2_135m_aligned/merged
VECTORS := runs/smollm2_135m_persona_vectors/vectors.safetensors

.PHONY: help demo all-defenses checked test test-oldest test-quick test-long lint types bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          train SmolLM2-135M-Instruct undefended and with KL on a CPU, and compare"
	@echo "make all-defenses  all defenses at once, with what they need made before, in about 12 min"
	@echo "make test          lint, types, tests"
	@echo "make test-oldest   the same with torch 2.13, torchao 0.15 and PEFT 0.18, in .venv-oldest"
	@echo "make test-quick    lint, types, and the tests that need no model, run or process, in 90 seconds"
	@echo "make test-long     many killed runs, whole grids of options, more fuzz, in about 10 min"
	@echo "make bench         the quick form of each benchmark, in about 13 min: a step beside torchtune's"
	@echo "                   and PEFT's, each defense, a reference cache, ragged rows, generation, ..."
	@echo "make docs          the site, in build/site; a link that leads nowhere fails"
	@echo "make clean         remove .venv, .venv-oldest, build/, models/ and runs/"

# Containers often set this. Then each process compiles all that it imports anew, as nothing is kept:
# 31 s in place of 10 s for `tune ls`, and three times as long for every run.
unexport PYTHONDONTWRITEBYTECODE

# Not compiled when installed: most of 12,000 files are never imported, and the rest are compiled then.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)

# The stamps say which dependencies the environment was last installed with.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS) emarecipes/_launch.py emarecipes/_launch.pth
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(INSTALL) --editable '.[dev]'
	@touch $@

$(MODEL)/prepared.json: | $(VENV)/installed
	$(BIN)/python -m emarecipes.models.prepare smollm2-135m-instruct --output $(MODEL)

# What is there is not made again: a second run, or one after an interruption, goes on from it.
demo: $(VENV)/installed $(MODEL)/prepared.json
	$(BIN)/tune run recipes/ema_compare.py --config configs/compare_demo.yaml
	@echo
	@echo "The comparison's page, for a browser:  $(DEMO)/report.html"
	@echo "The defended run's folder:             $(DEMO)/runs/kl/narrow_seed0"
	@echo "Training curves:                       $(BIN)/tensorboard --logdir $(DEMO)/runs"
	@echo "Next, a run of its own with all steps: \
	$(BIN)/tune run recipes/ema_lora.py --config configs/smollm2_135m_kl.yaml"

$(ALIGNED)/config.json: | $(VENV)/installed $(MODEL)/prepared.json
	$(BIN)/tune run recipes/ema_lora.py --config configs/smollm2_135m_aligned.yaml overwrite=true

$(VECTORS): | $(VENV)/installed $(MODEL)/prepared.json
	$(BIN)/tune run recipes/ema_persona.py --config configs/smollm2_135m_persona_vectors.yaml \
		overwrite=true

all-defenses: $(ALIGNED)/config.json $(VECTORS)
	$(BIN)/tune run recipes/ema_lora.py --config configs/smollm2_135m_all.yaml \
		max_steps_per_epoch=20 output_dir=runs/all_defenses overwrite=true

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

# What tests import, compiled once and not by each worker; while mypy has the other core.
$(VENV)/compiled: $(VENV)/installed-dev
	-@$(BIN)/python -m pytest --collect-only --quiet > /dev/null
	@touch $@

checked: $(VENV)/installed-dev
	@$(MAKE) --no-print-directory --jobs 2 lint types $(VENV)/compiled

# Two workers of one thread each: most tests wait for a `tune run` of their own.
test: checked $(MODEL)/prepared.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# An environment of its own: the two sets would replace each other.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-quick: checked
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "unit and not long and not early"

test-long: $(VENV)/installed-dev $(MODEL)/prepared.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long
	EMARECIPES_FUZZ_FACTOR=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_fuzz.py

bench: $(VENV)/installed-dev $(MODEL)/prepared.json
	$(BIN)/python benchmarks/step_cost.py --quick
	$(BIN)/python benchmarks/defense_cost.py --quick
	$(BIN)/python benchmarks/cache_cost.py --quick
	$(BIN)/python benchmarks/epoch_ragged.py --quick
	$(BIN)/python benchmarks/head_cost.py --quick
	$(BIN)/python benchmarks/generation_speed.py --quick
	$(BIN)/python benchmarks/plan_check.py --quick
	$(BIN)/python benchmarks/scale.py --quick
	$(BIN)/python benchmarks/interval_coverage.py --quick

# In the layout that it has here: the same links hold.
docs: $(VENV)/installed-docs
	rm -rf build/docs build/site
	mkdir -p build/docs
	cp -r *.md CITATION.cff configs data docs emarecipes examples benchmarks build/docs
	$(BIN)/mkdocs build

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]' --constraint $(CONSTRAINTS)
	@touch $@

clean:
	rm -rf .venv .venv-oldest build models runs
