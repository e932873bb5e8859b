# `make test` and `make quickstart` do all their own set-up, on a machine that has only Python 3.11 and pip.

PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
LATEST := .venv-latest
LATEST_PYTHON ?= python3.12
LATEST_CORE := megatron-core==0.19.2
CODE := minitron_megatron tests setup.py $(wildcard examples benchmarks)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install check test test-gpu test-latest test-slurm system site quickstart picture align schema soak clean

help:  ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

install: $(STAMP)  ## .venv with the pinned versions; at once where nothing changed

$(STAMP): $(BIN)/python pyproject.toml setup.py constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# Debian's python3 has no ensurepip without python3-venv: then the system's pip furnishes the environment
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "minitron-megatron needs Python 3.11 or later.")'
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv \
		&& $(PYTHON) -m pip --python $@ install --quiet pip; }

check: install  ## lint, format and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

test: check system  ## everything that a change must pass
	$(BIN)/python -m pytest --quiet --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-gpu: install  ## the tests that need a GPU; in NVIDIA's image see docs/versions.md
	$(BIN)/python -m pytest --quiet tests/gpu

test-latest: $(LATEST)/installed  ## every test with a later megatron-core, on Python 3.12 (torch's CUDA build: 6 GB of disk)
	$(LATEST)/bin/python -m pytest --quiet --numprocesses 3 --dist loadfile

# constraints.txt but for LATEST_CORE; with pyenv: PYENV_VERSION=3.12.1 make test-latest
$(LATEST)/installed: pyproject.toml setup.py constraints.txt Makefile
	$(LATEST_PYTHON) -m venv $(LATEST)
	sed 's/^megatron-core==.*/$(LATEST_CORE)/' constraints.txt > $(LATEST)/constraints.txt
	$(LATEST)/bin/python -m pip install --quiet -c $(LATEST)/constraints.txt -e '.[dev]'
	@touch $@

test-slurm: install system  ## the cluster scripts on a Slurm of two nodes here, as root
	$(BIN)/python -m pytest --quiet tests/slurm

# Slurm and Chromium, where they can be installed; the tests that need them skip and say so where they cannot
system:
	@[ -x /usr/sbin/slurmctld -a -x /usr/bin/chromedriver ] || [ "$$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null \
		|| { apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet=2 \
		--no-install-recommends slurm-wlm munge chromium chromium-driver; } \
		|| echo "Slurm or Chromium could not be installed: the tests that need them will skip." >&2

site: install  ## the guide as a site, in runs/site
	$(BIN)/mkdocs build --quiet

quickstart: install runs/corpus  ## prune and distil a small model on this machine
	$(BIN)/minitron run examples/quickstart/recipe.yaml

RUN = runs/quickstart
PICTURE = docs/quickstart.png
picture: install  ## draw the README's picture anew, from the run of `make quickstart`
	$(BIN)/minitron report $(RUN)
	cp $(RUN)/plots/models.png $(PICTURE)

align: install runs/corpus  ## then teach a small model to follow instructions: fine-tuning, and two rounds of RPO
	$(BIN)/python examples/align/tasks.py runs/align-data
	$(BIN)/minitron run examples/align/recipe.yaml

schema: install  ## write recipe/schema.json anew, after a change of the recipe's keys
	$(BIN)/python -c 'import json; from minitron_megatron.recipe import json_schema as keys; print(json.dumps(keys(), indent=2))' \
		> minitron_megatron/recipe/schema.json.new && mv minitron_megatron/recipe/schema.json.new minitron_megatron/recipe/schema.json

soak: install runs/corpus  ## kill a run at random moments; about twenty minutes
	$(BIN)/python benchmarks/soak.py

runs/corpus:
	$(BIN)/python examples/quickstart/corpus.py $@.partial
	mv $@.partial $@

clean:  ## remove what was built, not what was run
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
