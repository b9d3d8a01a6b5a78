# `make help` lists what there is. Everything needs only Python 3.11 or newer and make.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
PY := $(VENV)/bin/python
SANDBOX_ENABLED ?= true
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test check bench messages screenshots lock clean

help: ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-11s %s\n", $$1, $$2 }'

$(PY):
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or newer, with venv, is needed (set PYTHON=/path/to/python)."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps hold a lock file's content as installed: an unchanged one installs nothing.
$(VENV)/.runtime: requirements.txt | $(PY)
	$(PY) -m pip install --quiet --require-hashes --only-binary :all: -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt | $(PY)
	$(PY) -m pip install --quiet --require-hashes -r requirements-dev.txt
	@touch $@ $(VENV)/.runtime

run: $(VENV)/.runtime ## install what is needed, prepare var/, and serve until Ctrl-C
	@SANDBOX_ENABLED=$(SANDBOX_ENABLED) $(PY) manage.py setup
	@SANDBOX_ENABLED=$(SANDBOX_ENABLED) exec $(PY) manage.py serve

test: $(VENV)/.dev ## install what tests need, and run all of them
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev ## format, lint, types, imports, migrations, tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy .
	$(VENV)/bin/lint-imports
	$(PY) manage.py makemigrations --check --dry-run
	$(MAKE) test

bench: $(VENV)/.dev ## measure the gateway beside nginx (Debian packages nginx-light and wrk)
	$(PY) -m bench

messages: $(VENV)/.dev ## bring the translations up to date with the texts, and compile them
	DJANGO_SETTINGS_MODULE=proxysite.settings $(PY) -m proxysite.tests.messages
	$(PY) manage.py messages

screenshots: $(VENV)/.dev ## take the pictures in docs/images anew (Debian packages chromium, fonts-noto-cjk and pngquant)
	PYTHONPATH=. $(PY) docs/screenshots.py

lock: $(VENV)/.dev ## compile requirements*.in into locked, hashed files
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header requirements.in -o requirements.txt
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header -c requirements.txt requirements-otel.in -o requirements-otel.txt
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header requirements-dev.in -o requirements-dev.txt

clean: ## remove the virtual environment and caches; var/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
