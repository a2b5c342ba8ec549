# The Sparsity Trap. `make` lists what can be done.

PRESET ?= laptop
SOURCE ?=
COHORT ?=
# slurm sends every step to a cluster; its settings are in workflow/profiles/slurm/config.yaml.
PROFILE ?=
PYTHON ?= python3.11
# Cell-type maps of SOURCE=tissue-map; downloaded to the first place when found in none.
LABELS ?= $(or $(value SPARSITY_TRAP_LABELS),$(firstword $(wildcard data/crc_8um_labels ../shared/data/crc_8um_labels) data/crc_8um_labels))
CORES ?= $(shell nproc 2>/dev/null || echo 2)
# Real tiles that `make tiles` trains on.
TILES ?= $(or $(value SPARSITY_TRAP_TILES),$(firstword $(wildcard data/p5_crc_2um_tiles ../shared/data/p5_crc_2um_tiles) data/p5_crc_2um_tiles))
# Public sections that `make download` fetches, such as PATIENTS="P5"; all three by default.
PATIENTS ?=
# Where `make serve` listens, on this machine only; 0 takes a free port.
PORT ?= 8000
# What `make score` reads and writes; with CELLS=own, or a table of bin and cell, whole cells too.
PRED ?=
SECTION ?=
UNITS ?=
OUT ?=
CELLS ?=
CELL_TYPES ?=
# More options of JupyterLab, such as LAB=--no-browser.
LAB ?=
comma := ,
hash := \#

# What was typed arrives: make would take a $ in it for a variable, the shell would run it as text.
# So values become plain here and reach recipes through the environment, as "$$COHORT".
TYPED := $(foreach name,PRESET SOURCE COHORT PROFILE PYTHON LABELS CORES TILES PATIENTS PORT LAB GPUS PRED SECTION UNITS \
	OUT CELLS CELL_TYPES,$(if $(filter command environment,$(origin $(name))),$(name)))
$(foreach name,$(TYPED),$(eval override $(name) := $$(value $(name))))
export PRESET SOURCE COHORT PROFILE PYTHON TILES PATIENTS LAB PRED SECTION UNITS OUT CELLS CELL_TYPES
digits = $(subst 0,,$(subst 1,,$(subst 2,,$(subst 3,,$(subst 4,,$(subst 5,,$(subst 6,,$(subst 7,,$(subst 8,,$(subst \
	9,,$(1)))))))))))
$(foreach name,$(filter CORES GPUS PORT,$(TYPED)),$(if $(or $(call digits,$($(name))),$(filter-out \
	1,$(words $($(name))))),$(error $(name) must be a whole number, not '$($(name))')))
$(foreach name,PRESET SOURCE,$(if $(filter $(hash)%,$(firstword $($(name)))),$(error $(name) begins \
	with a $(hash), as no name of one does: choose among those that `make help` lists)))
$(if $(findstring :,$(CURDIR)),$(error The path of this checkout holds a colon, at which Python would cut it in \
	two: move the checkout to a folder without))
# The GPUs that CUDA_VISIBLE_DEVICES names, or all of this machine.
# Hidden, with an empty list or -1, there are none.
CARDS = $(if $(filter environment command,$(origin CUDA_VISIBLE_DEVICES)),$(filter-out -%,$(subst \
	$(comma), ,$(value CUDA_VISIBLE_DEVICES))),$(shell command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus | sed -n 's/^GPU \([0-9]*\).*/\1/p'))
# Steps on a GPU at a time: one on each card, as many as cores without a GPU, as many as are free on a cluster.
GPUS ?= $(if $(PROFILE),1000,$(or $(filter-out 0,$(words $(CARDS))),$(CORES)))

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH = $(shell grep '^torch==' requirements.lock.txt)
LAB_STAMP := $(VENV)/.installed-lab
CHECK_STAMP := .venv-check/.installed

absolute = $(if $(patsubst /%,,$(firstword $(1))),$(CURDIR)/)$(1)
export SPARSITY_TRAP_LABELS := $(call absolute,$(LABELS))
export SPARSITY_TRAP_TILES := $(call absolute,$(TILES))
export PYTHONPATH := $(CURDIR):$(CURDIR)/workflow
# Text is UTF-8 in every locale.
export PYTHONUTF8 := 1
# For an account whose home may not be written to.
ifneq ($(shell mkdir -p "$${XDG_CACHE_HOME:-$$HOME/.cache}" 2>/dev/null && test -w "$${XDG_CACHE_HOME:-$$HOME/.cache}" && echo yes),yes)
export HF_HOME ?= $(HOME)/.cache/huggingface
export XDG_CACHE_HOME := $(CURDIR)/.snakemake/cache
endif
# Steps go to a cluster with PROFILE, and only then. The others change Python, its figures or where
# pip installs, in every program.
unexport SNAKEMAKE_PROFILE PYTHONHOME PYTHONSTARTUP PYTHONOPTIMIZE PYTHONWARNINGS MPLBACKEND MATPLOTLIBRC \
	PIP_USER PIP_TARGET PIP_PREFIX

# Snakemake's own lock outlives a killed run; alone.py's ends with it.
SNAKEMAKE = $(BIN)/python workflow/alone.py .snakemake/running $(BIN)/snakemake --nolock $(OPTIONS)
# The default scheduler solves an integer program in temporary files, for a choice of few steps.
OPTIONS = --snakefile workflow/Snakefile --cores $(CORES) --resources gpu=$(GPUS) --scheduler greedy \
	--workflow-profile $(if $(PROFILE),"workflow/profiles/$$PROFILE",none) \
	--config "preset=$$PRESET" "source=$$SOURCE" "cohort=$${COHORT:+$(if $(filter $(hash)%,$(firstword $(COHORT))),./)$$COHORT}" \
	--rerun-triggers mtime params input --rerun-incomplete

.DEFAULT_GOAL := help
.PHONY: help env book pdf archive results plan edit lab notebooks serve watch doctor download score tiles bench bench-train stability metadata checkers test linkcheck lint clean

help:  ## list the targets
	@echo "The Sparsity Trap: make TARGET [PRESET=smoke|laptop|study|paper] [SOURCE=simulated|tissue-map|spaceranger] [COHORT=file] [PROFILE=slurm]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## create the environment from the lock, in .venv

# Without an NVIDIA driver, torch's own index offers a build without CUDA, several GB smaller; where
# that index cannot be reached, pip takes what the configured indexes have, which needs CUDA's
# libraries beside it. Compiled here, once: where Python may not write bytecode (in many containers,
# on clusters), every step would compile all that it imports, half of its time to start.
$(STAMP): requirements.lock.txt pyproject.toml
	@command -v "$$PYTHON" >/dev/null || { echo "error: $$PYTHON not found: install Python 3.11, or say make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "[1/3] creating $(VENV)"
	@"$$PYTHON" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(shell grep '^uv==' requirements.lock.txt)
	@echo "[2/3] installing torch"
	@$(BIN)/python -m pip install --disable-pip-version-check --retries 1 --no-warn-script-location $(TORCH) \
		$(if $(shell command -v nvidia-smi),,--no-deps --extra-index-url https://download.pytorch.org/whl/cpu)
	@$(BIN)/python -m pip list --format=freeze --disable-pip-version-check | grep '^torch==.*+cpu' > /dev/null || \
		$(BIN)/python -m pip install --disable-pip-version-check --retries 1 --no-warn-script-location $(TORCH)
	@echo "[3/3] installing the locked packages"
	@grep -v '^torch==' requirements.lock.txt > $(VENV)/requirements.txt
	@$(BIN)/uv pip install --python $(BIN)/python --no-deps --compile-bytecode -r $(VENV)/requirements.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

book: $(STAMP)  ## run the preset and build the book: _build/html/index.html
	@$(SNAKEMAKE) --logger sparsity-trap -- book
	@echo "the book: $$PWD/_build/html/index.html"

pdf: book  ## print the book, with Chromium: _build/pdf/the-sparsity-trap.pdf
	@$(BIN)/python workflow/print_book.py

archive: book  ## pack book, source, numbers, tables and provenance: an RO-Crate in _build/archive
	@$(BIN)/python workflow/archive.py "preset=$$PRESET" "source=$$SOURCE" "cohort=$$COHORT"

results: $(STAMP)  ## run the preset without building the book
	@$(SNAKEMAKE) --logger sparsity-trap -- results

plan: $(STAMP)  ## list the steps that `make book` would run
	@$(BIN)/snakemake $(OPTIONS) --dry-run --quiet host reason -- book

# The settings let a click on a script open a notebook, and name the kernel as the scripts do.
edit: lab  ## open JupyterLab, where the scripts open as notebooks; saving writes plain scripts
	@set -f; JUPYTER_CONFIG_PATH="$$PWD/workflow/jupyter" JUPYTER_PATH="$$PWD/workflow/jupyter" \
		$(BIN)/jupyter-lab --ServerApp.root_dir="$$PWD" --LabApp.default_url=/lab/tree/notebooks $$LAB

lab: $(LAB_STAMP)  ## add JupyterLab to the environment, as locked in requirements-lab.lock.txt

# Not part of the environment: the book is built without it.
$(LAB_STAMP): requirements-lab.lock.txt $(STAMP)
	@echo "installing JupyterLab"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode -r requirements-lab.lock.txt
	@touch $@

notebooks: $(STAMP)  ## write copies of the scripts as .ipynb to _build/notebooks
	@mkdir -p _build/notebooks
	@$(BIN)/jupytext --quiet --to ../_build/notebooks//ipynb notebooks/*.py
	@echo "the notebooks: $$PWD/_build/notebooks"

serve: $(STAMP)  ## serve the built book on this machine: http://127.0.0.1:8000/, or at PORT
	@test -f _build/html/index.html || { echo "error: there is no book in _build/html yet: run make book"; exit 1; }
	@$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html

# A change during a build is seen after it: make, asked to stop, lets its command end first.
watch: $(STAMP)  ## build the book, and again whenever a chapter, a notebook, a preset or the module changes
	@$(BIN)/watchfiles --verbosity warning --sigint-timeout 86400 --sigkill-timeout 86400 \
		--ignore-paths book/executed,book/.executed \
		"$(MAKE) --no-print-directory book" book notebooks presets published sparsity_trap _config.yml _toc.yml

doctor: $(STAMP)  ## check environment, sections, weights and disk; say how to mend what is wrong
	@$(BIN)/python workflow/doctor.py --preset="$$PRESET" $${SOURCE:+--source="$$SOURCE"} $${COHORT:+--cohort="$$COHORT"}

download: $(STAMP)  ## fetch the public sections P1, P2 and P5, or PATIENTS; with TILES=1 the real tiles
	@set -f; $(BIN)/python workflow/download.py $(if $(filter 1,$(TILES)),--tiles data/p5_crc_2um_tiles,-- $$PATIENTS)

# Several files in PRED have spaces between them; where one has a space in its name, call the command.
score: $(STAMP)  ## score predictions: PRED=file(s) SECTION=outs or store [UNITS=counts] [CELLS=own] [OUT=folder]
	@test -n "$$PRED" && test -n "$$SECTION" || { echo "error: say what to score: make score PRED=predictions.h5ad SECTION=outs UNITS=counts"; exit 1; }
	@set -f; if test -e "$$PRED"; then set -- "$$PRED"; else set -- $$PRED; fi; \
		$(BIN)/python -m sparsity_trap.score --section="$$SECTION" $${UNITS:+--units="$$UNITS"} $${OUT:+--out="$$OUT"} \
		$${CELLS:+--cells="$$CELLS"} $${CELL_TYPES:+--cell-types="$$CELL_TYPES"} -- "$$@"

tiles: $(STAMP)  ## train on the real tiles in TILES, on the CPU; writes results/real_tiles
	@OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=4000000000 \
		MALLOC_MMAP_THRESHOLD_=4000000000 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
		$(BIN)/python workflow/tiles.py --cores $(CORES) -- "$$TILES"

bench: $(STAMP)  ## measure reading against scanpy, scoring against scikit-image and plain loops; writes results/bench
	@$(BIN)/python -m benchmarks.ingest
	@$(BIN)/python -m benchmarks.metrics
	@$(BIN)/python -m benchmarks.score

bench-train: $(STAMP)  ## measure a training step against its floor; writes results/bench/training.json, or training_gpu.json
	@$(BIN)/python -m benchmarks.training

stability: $(STAMP)  ## repeat the runs of PRESET with other seeds and threads; writes results/bench/stability.json
	@$(BIN)/python workflow/stability.py --cores $(CORES) -- "$$PRESET"

metadata: $(STAMP)  ## write codemeta.json, .zenodo.json and paper.md from CITATION.cff
	@$(BIN)/python workflow/citation.py

# An environment of their own: the validator needs an older rich than import-linter does.
checkers: $(CHECK_STAMP)  ## install what checks archives and PDFs in the tests, in .venv-check

$(CHECK_STAMP): requirements-check.lock.txt $(STAMP)
	@echo "installing the validator of RO-Crates and a reader of PDFs"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-check
	@$(BIN)/uv pip install --quiet --python .venv-check/bin/python --no-deps -r requirements-check.lock.txt
	@touch $@

test: $(STAMP)  ## run the tests, the smoke book among them
	@# One process more than cores: some tests wait for others' processes.
	@$(BIN)/python -m pytest -n $$(( $(CORES) + 1 )) --durations=15

linkcheck: $(STAMP)  ## check the links of the built book; needs a network
	@$(BIN)/jupyter-book build . --builder linkcheck -q

lint: $(STAMP)  ## check style, types and which folder imports which
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

# Results of the presets there are, and of their other sources and cohorts; what else lies in results
# is somebody's own.
clean:  ## remove results, the built book and the environment
	for file in presets/*.yaml; do name=$${file##*/}; rm -rf "results/$${name%.yaml}" "results/$${name%.yaml}"-*; done
	rm -rf results/tiles _build book/executed book/.executed.* .snakemake $(VENV) .venv-check $(wildcard */__pycache__ */*/__pycache__) \
		.pytest_cache .hypothesis .ruff_cache .mypy_cache *.egg-info
