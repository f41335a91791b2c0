# Every target sets up .venv by itself; set-up may be interrupted and repeated.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# installs packages of Debian, for root alone
debian = { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(1) >/dev/null; }

.PHONY: setup run test check bench page docs evidence programs clean

setup: .venv/ready

# the stamp comes last, so a set-up that was cut short is taken up again
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Locally needs Python 3.11 or newer; name one with PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv --clear .venv
	@echo "Installing into .venv; the first time this takes a few minutes"
	@$(PIP) install --constraint constraints.txt --editable ".[cluster,dev,llm,page,postgres,privacy]"
	@touch $@

.venv/ready-bench: .venv/ready
	@$(PIP) install --constraint constraints.txt --editable ".[bench]"
	@touch $@

run: .venv/ready  ## run every paper at quick scale on embedded input and write report/index.html
	@$(BIN)/locally run --all --scale quick --jobs $(JOBS) --output report || test $$? -eq 1

test: check programs  ## lint, type-check, and run the whole suite
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

check: .venv/ready  ## ruff, mypy and the rules of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/ready-bench  ## ratios to the peers; ONLY=halpern for one
	$(BIN)/python -m benchmarks $(ONLY)
	$(BIN)/python -m benchmarks.table

page: .venv/ready  ## serve the page and open it: read, search and run the papers in a browser
	$(BIN)/locally serve --open

docs: .venv/ready  ## build the documentation into site/, without warnings and without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

evidence: .venv/ready programs  ## run at default scale (PAPERS="halpern loop" for some); regenerate README's table, picture
	$(BIN)/locally run $(or $(PAPERS),--all) --scale default --json >> docs/evidence.jsonl || test $$? -eq 1
	$(BIN)/python -m docs.readme

# the browser tests drive Debian's Chromium, those of the store a PostgreSQL server; elsewhere, without root, they are
# skipped and say so
programs:
	@{ command -v chromium || command -v google-chrome; } >/dev/null || $(call debian,chromium fonts-dejavu-core) || \
	  echo "Chromium is missing and cannot be installed here: the browser tests will be skipped"
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || $(call debian,postgresql) || \
	  echo "PostgreSQL is missing and cannot be installed here: its tests will be skipped"

clean:
	rm -rf .venv report
