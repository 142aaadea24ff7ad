# Everything a developer types. `make demo` and `make test` set themselves up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One known torch first: a range would pull the newest build with its CUDA packages. TORCH= leaves the choice to you.
TORCH ?= torch==2.13.0
READY := $(VENV)/.ready

# What the tests of other runtimes need: node 20 or later brings the first, an environment of its own is the second.
RUNTIMES := build/runtimes
NPM := $(RUNTIMES)/node_modules/.ready
OPTIMUM := $(RUNTIMES)/optimum/.ready

.PHONY: setup demo test test-fast test-runtimes npm optimum lint wheel-check benchmarks gpu clean

demo: $(READY)  ## the whole road on a small model made on the spot
	$(BIN)/diablo-export demo --output out/demo --overwrite

# A process for each core, and a file's tests in one of them, for what they share; more threads would only fight.
test: lint  ## everything CI runs on the code
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --durations=25

test-fast: $(READY)  ## without the tests marked slow
	$(BIN)/python -m pytest -m "not slow and not runtimes"

test-runtimes: $(READY) npm optimum  ## exports in node, a browser, optimum, genai and C++: nothing is skipped
	cmake -S kernels -B kernels/build -DCMAKE_BUILD_TYPE=Release
	cmake --build kernels/build --parallel
	DIABLO_RUNTIMES=all $(BIN)/python -m pytest -m runtimes tests/runtimes --durations=15

npm: $(NPM)

optimum: $(OPTIMUM)

$(NPM): tests/runtimes/package.json tests/runtimes/package-lock.json
	mkdir -p $(RUNTIMES)
	cp $^ $(RUNTIMES)
	cd $(RUNTIMES) && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

$(OPTIMUM): tests/runtimes/requirements-optimum.txt
	$(PYTHON) -m venv $(RUNTIMES)/optimum
	$(if $(TORCH),$(RUNTIMES)/optimum/bin/pip install --quiet $(TORCH))
	$(RUNTIMES)/optimum/bin/pip install --quiet --requirement $<
	touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel-check: $(READY)  ## build the wheel, install it into a clean environment, use it there, with kernels and without
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	bash tests/wheel_check.sh

gpu:  ## builds, checks and times the CUDA code: needs a GPU, and the CUDA builds of torch and onnxruntime
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) kernels/gpu/run.py $(GPU)

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/pip install --quiet $(TORCH))
	$(BIN)/pip install --quiet --editable ".[cpu,train,genai,dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist out *.egg-info
