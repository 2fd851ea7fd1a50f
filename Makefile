# make demo, make test: each builds .venv in the repository root first, once.
#   make setup TORCH="torch>=2.10"    another torch than the one the tests are run with
#   make setup PYTHON=python3.12      another interpreter

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --no-compile
RUN := HF_HUB_OFFLINE=1 $(BIN)/
# as many processes as cores, one test file to a process; WORKERS=0 for one process
WORKERS ?= auto
PYTEST := $(RUN)python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: setup demo test full lint format fuzz sanitize bench gpu dist clean

setup: $(VENV)/.installed

# torch comes first and alone: the extension is compiled against it, and nothing else may choose its build.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip "setuptools>=77" wheel
	$(INSTALL) "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*)
	$(INSTALL) --no-build-isolation --editable ".[dev]"
	touch $@

demo: setup
	$(RUN)styleattn demo --out out

test: lint
	$(PYTEST) -m "not slow"

full: lint
	$(PYTEST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# 10,000 random option combinations for every property test.
fuzz: setup
	$(RUN)python -m pytest -m hypothesis --hypothesis-profile=fuzz

# the compiled kernels without torch, under ASan and UBSan, and under valgrind
sanitize: setup
	$(RUN)python -m pytest tests/test_cpu_backend.py -k undefined_behaviour

# ARGS: see `make bench ARGS=--help`
bench: setup
	$(RUN)python benchmarks/run.py $(ARGS)

# everything that a GPU is wanted for, in ten minutes; ARGS=--dry-run without one
gpu: setup
	$(RUN)python benchmarks/gpu.py $(ARGS)

dist: setup
	$(BIN)/python -m pip wheel . --no-build-isolation --no-deps --wheel-dir dist

clean:
	rm -rf $(VENV) out build dist *.egg-info styleattn/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
