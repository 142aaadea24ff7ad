# Everything a developer types. `make demo` and `make test` set themselves up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One known torch first: a range would pull the newest build with its CUDA packages. TORCH= leaves the choice to you.
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready

.PHONY: setup demo test test-fast lint wheel-check benchmarks clean

demo: $(READY)  ## the whole road on a small model made on the spot
	$(BIN)/diablo-export demo --output out/demo --overwrite

test: lint  ## everything CI runs on the code
	$(BIN)/python -m pytest --durations=15

test-fast: $(READY)  ## without the tests marked slow
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel-check: $(READY)  ## build the wheel, install it into a clean environment, use it there, with kernels and without
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	bash tests/wheel_check.sh

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/pip install --quiet $(TORCH))
	$(BIN)/pip install --quiet --editable ".[cpu,train,genai,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist out *.egg-info
