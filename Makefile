# Frostglass in two commands: `make demo` and `make test`. Both make .venv on first use and reuse it afterwards.
# Needs python3 (3.11 or newer), make and a package registry. `make UV=1 ...` installs with uv instead of pip.

PYTHON  ?= python3
VENV    ?= .venv
OUT     ?= frostglass-demo
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PINS := torch==2.13.0 torchvision==0.28.0

export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifndef FROSTGLASS_DATA
ifneq ($(wildcard ../shared/data),)
export FROSTGLASS_DATA := $(abspath ../shared/data)
endif
endif

# A stamp names what was installed: it is stale as soon as the requirements, the place or the interpreter change.
STATE := $(shell { cat pyproject.toml constraints.txt; echo '$(CURDIR)'; $(BIN)/python -V; } 2>&1 | cksum | cut -d' ' -f1)
DEV   := $(VENV)/.installed-dev-$(STATE)
RUN   := $(VENV)/.installed-run-$(STATE)
MINE  := $(VENV)/.made-by-make

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint bench constraints clean

help:  ## what can be asked for
	@echo 'usage: make TARGET'
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' Makefile | while IFS='	' read -r name what; do printf '  %-12s %s\n' "$$name" "$$what"; done

setup: $(DEV)  ## make .venv with everything for development, or bring it up to date

demo: $(if $(wildcard $(DEV)),$(DEV),$(RUN))  ## attack a batch of real photographs and write a report (OUT=frostglass-demo)
	@$(BIN)/frostglass demo --out $(OUT)

test: lint  ## lint, then all tests (PYTEST_ARGS="-m 'not slow'" leaves out the slow ones)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

lint: $(DEV)  ## ruff, mypy and the layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(DEV)  ## measure; writes bench/results/*.json
	@for script in $$(grep -l __main__ bench/*.py); do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

constraints:  ## resolve all requirements afresh and write constraints.txt
	@$(check_python)
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(PYTHON) -m venv "$$fresh" && \
	"$$fresh/bin/pip" install --quiet $(PINS) '.[dev]' && \
	"$$fresh/bin/pip" freeze --exclude frostglass --exclude triton > "$$fresh/frozen" && \
	{ sed -n '/^#/p' constraints.txt; sed -e '/ @ /d' -e 's/+[a-z0-9.]*$$//' "$$fresh/frozen"; } > "$$fresh/new" && \
	cp "$$fresh/new" constraints.txt
	@echo 'constraints.txt is new; run `make test` before you commit it.'

clean:  ## remove .venv, caches, build outputs and the demo's report
	@if [ -e $(MINE) ]; then rm -rf $(VENV); fi
	@rm -rf build dist $(OUT) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

define check_python
command -v $(PYTHON) >/dev/null || { echo 'Frostglass needs Python 3.11 or newer, and there is no $(PYTHON) here.' >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "Frostglass needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1); name another with make PYTHON=python3.12." >&2; exit 1; }; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
  echo 'This Python cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv).' >&2; exit 1; }
endef

# An environment without a stamp is one whose installation did not end: it is made anew. Stamps are removed before an
# installation starts and written when it has ended. An environment that this file did not make is left alone.
define install
@$(check_python)
@if [ -e $(VENV) ] && [ ! -e $(MINE) ]; then \
  echo '$(VENV) was not made by this Makefile; move it away, or use another place with make VENV=.venv-frostglass.' >&2; exit 1; fi
@if [ -z "$$(ls $(VENV)/.installed-* 2>/dev/null)" ] || ! $(BIN)/python -c '' 2>/dev/null || ! grep -qxF '$(CURDIR)' $(MINE); then \
  rm -rf $(VENV) && mkdir -p $(VENV) && echo '$(CURDIR)' > $(MINE) && $(make_venv); fi
@echo 'Installing the pinned packages into $(VENV) (the first time this takes some minutes) ...'
@rm -f $(VENV)/.installed-*
@$(pip_install) -e '.$(1)' || { echo 'The installation failed; see the lines above. The next make starts it afresh.' >&2; exit 1; }
@touch $(VENV)/.installed-$(if $(1),dev,run)-$$({ cat pyproject.toml constraints.txt; echo '$(CURDIR)'; $(BIN)/python -V; } 2>&1 | cksum | cut -d' ' -f1)
endef

ifeq ($(UV),1)
make_venv = uv venv --quiet --seed --allow-existing --python $(PYTHON) $(VENV)
pip_install = uv pip install --quiet --python $(BIN)/python -c constraints.txt --build-constraint constraints.txt
else
make_venv = $(PYTHON) -m venv $(VENV)
pip_install = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install $$([ -t 1 ] || echo -qq) --no-compile
endif

$(DEV):
	$(call install,[dev])

$(RUN):
	$(call install,)
