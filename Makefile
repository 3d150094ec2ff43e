# Two commands on a fresh machine: make demo, make test. Both need nothing but Python 3.10 or newer and make.
# Without a GPU, make TORCH_INDEX=https://download.pytorch.org/whl/cpu spares Linux 3 GB of CUDA.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
OLDEST := .venv-oldest
OLDEST_PIP := $(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check
# make serve VAE=/path/to/checkpoint.safetensors OPTIONS="--host 0.0.0.0"
VAE ?= assets/demo_vae
OPTIONS ?=

.PHONY: demo test test-oldest test-cluster lint coverage serve bench package clean

demo: $(VENV)/ready
	$(RUN) -m remote_vae demo --out demo

serve: $(VENV)/ready
	$(RUN) -m remote_vae serve --vae "$(VAE)" $(OPTIONS)

test: $(VENV)/ready lint
	$(RUN) -m pytest

# The tests with the oldest of everything that UIs ship and pyproject.toml promises: make test-oldest PYTHON=python3.10
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest

# A real cluster on this machine: Ray Serve, whose replicas are killed and updated under load.
test-cluster: $(VENV)/cluster-ready
	RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 $(RUN) -m pytest tests/cluster --numprocesses=0

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

coverage: $(VENV)/ready
	$(PIP) coverage==7.17.5
	$(RUN) -m coverage run -m pytest --numprocesses=0
	$(RUN) -m coverage report --skip-covered

bench: $(VENV)/ready
	$(RUN) -m bench.client_overhead
	$(RUN) -m bench.hook_overhead
	$(RUN) -m bench.failures
	$(RUN) -m bench.tiled --quick

# Wheel and sdist as an index wants them.
package: $(VENV)/ready
	$(PIP) build==1.6.1 twine==7.0.0
	rm -rf dist
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*

# torch first and by itself: the other packages must take the one that is there.
$(VENV)/ready: requirements-dev.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'Remote VAE needs Python 3.10 or newer: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) )$(TORCH)
	$(PIP) -r requirements-dev.txt
	touch $@

# As above, in the versions of which this Python is one.
$(OLDEST)/ready: requirements-oldest.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info[:2] == (3, 10) else 'the oldest packages want Python 3.10: make test-oldest PYTHON=python3.10')"
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST_PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX) )torch==2.1.2
	$(OLDEST_PIP) -r requirements-oldest.txt
	touch $@

$(VENV)/cluster-ready: $(VENV)/ready requirements-cluster.txt
	$(PIP) -r requirements-cluster.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) demo bench/out build dist
