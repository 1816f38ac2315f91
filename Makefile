# Works on a machine with Python 3.11 to 3.13 and nothing else: every target installs what it needs into .venv.
# Paths are relative, so that the checkout may live in any folder, under any name.

PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint types format bench docs clean

help:  ## print this text
	@echo "dsc: a compiler for DeepSeek-V3-style mixture-of-experts models"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.12  JOBS=2 (test processes)  ARGS='-k name' (passed on to pytest)"

demo: $(VENV)/.installed-core  ## compile the 671B model, run and diff a tiny one
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh examples/demo.sh

test: $(VENV)/.installed-test  ## run the test suite
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(JOBS) $(ARGS)

lint: $(VENV)/.installed-dev  ## check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@$(MAKE) --no-print-directory types

# mypy names a module after its path, so it has to see the root folder under the name of the package.
types: $(VENV)/.installed-dev  ## check types alone
	@mkdir -p .mypy_cache/path && ln -sfn ../.. .mypy_cache/path/dsc
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev  ## rewrite the sources in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.installed-test  ## run every benchmark
	@set -e; for file in benchmarks/*.py benchmarks/gpu/all.py; do echo "== $$file"; $(VENV)/bin/python "$$file"; done

docs: $(VENV)/.installed-core  ## regenerate docs/ops.md
	@mkdir -p build
	$(VENV)/bin/dsc ops --markdown > build/ops.md
	mv build/ops.md docs/ops.md

clean:  ## delete what the other targets wrote, except .venv
	rm -rf demo out build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# One stamp per set of dependencies; pip runs again only when pyproject.toml has changed.
$(VENV)/.installed-core: pyproject.toml $(VENV)/.created
	@echo "Installing dsc into $(VENV) (torch is large: this can take minutes) ..."
	@$(VENV)/bin/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.created
	@echo "Installing dsc[$*] into $(VENV) (torch is large: this can take minutes) ..."
	@$(VENV)/bin/python -m pip install --quiet -e ".[$*]"
	@touch $@

$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { \
	  echo "dsc needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' was not found; name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "dsc needs Python 3.11, 3.12 or 3.13, but '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2> /dev/null || { \
	  echo "'$(PYTHON)' lacks the venv module; install it (Debian and Ubuntu: apt install python3-venv) or name another Python: make PYTHON=..." >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@
