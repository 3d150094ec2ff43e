# Two commands on a fresh machine: make demo, make test. Both need nothing but Python 3.10 or newer and make.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint bench clean

demo: $(VENV)/ready
	$(RUN) -m remote_vae demo --out demo

test: $(VENV)/ready lint
	$(RUN) -m pytest

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/ready
	$(RUN) -m bench.client_overhead
	$(RUN) -m bench.hook_overhead
	$(RUN) -m bench.failures
	$(RUN) -m bench.tiled --quick

# torch first and by itself: the other packages must take the one that is there.
$(VENV)/ready: requirements-dev.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'Remote VAE needs Python 3.10 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) demo bench/out build dist
