# make demo   set up, train on real handwritten digits, plot predictions, compare speed
# make test   set up, run all tests, one process per core; PYTEST_ARGS="-n 0" runs them in one process
# make test-quick   set up, run the tests that are neither slow nor distributed
# Both need Python >= 3.10, a C++ compiler and make; everything else is installed into .venv.
# make lint   set up, check Python with ruff and mypy, C++ and CUDA with clang-format
# make gpu-report   build, check and measure the kernels on a GPU, with a Python that has torch and the
#                   packages of pyproject.toml's [dev]; nothing is downloaded. OUT_DIR=, PYTHON=, FULL=1

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# The sources of the kernels: a change of any of them compiles the kernels again.
SOURCES := $(wildcard csrc/*.cpp csrc/*/*) setup.py pyproject.toml

.PHONY: demo test test-quick lint test-abi bench gpu-report clean

$(VENV)/ready: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: $(PYTHON) is older than Python 3.10; name another one: make PYTHON=..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV): downloads several gigabytes for torch, only once."
	@$(BIN)/pip install --quiet --upgrade pip
	@$(BIN)/pip install "torch>=2.11" torchvision "setuptools>=77" "pybind11>=2.13" ninja packaging wheel
	@echo "Compiling the kernels."
	@$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	@$(BIN)/python -m t2t_kernels.info
	@touch $@

demo: $(VENV)/ready
	rm -rf $(DEMO)
	$(BIN)/t2tvit train --config digits --fused-kernels --output $(DEMO)
	$(BIN)/t2tvit predict --run $(DEMO) --plot $(DEMO)/predictions.png
	$(BIN)/t2tvit bench --run $(DEMO)

# A file of tests stays in one process, since its tests share what they build.
PYTEST := $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder -p no:benchmark

test: $(VENV)/ready
	$(PYTEST) $(PYTEST_ARGS)

test-quick: $(VENV)/ready
	$(PYTEST) -m "not slow and not distributed and not gpu" $(PYTEST_ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/*/*)

# pip install . as users run it: built in isolation with the newest torch, then tested with the oldest
# supported torch and Triton. Of the slow tests in Triton's interpreter, only those that depend on the
# versions run. The interpreter of Triton 3.6 fails with NumPy 2.4 at loops with run-time bounds.
OLDEST := torch==2.11.0 triton==3.6.0 "numpy<2.4"
ABI := build/abi
test-abi:
	rm -rf $(ABI)
	$(PYTHON) -m venv $(ABI)/venv
	$(ABI)/venv/bin/pip install --quiet $(OLDEST) "pytest>=8"
	T2T_WITH_CUDA=0 $(ABI)/venv/bin/pip install --verbose . > $(ABI)/build.log 2>&1 || { tail -40 $(ABI)/build.log; exit 1; }
	$(ABI)/venv/bin/python -m t2t_kernels.info
	cp -r tests csrc docs $(ABI)
	cd $(ABI) && venv/bin/python -m pytest -p no:cacheprovider tests/kernels tests/models/test_golden.py \
		-k "not on-host and (not interpreted or compile or opcheck or narrow)"

bench: $(VENV)/ready
	$(BIN)/python -m pytest bench/

OUT_DIR ?= runs/gpu-report
gpu-report:
	$(PYTHON) -m bench.gpu_report --output $(OUT_DIR) $(if $(FULL),--full)

clean:
	rm -rf $(VENV) build *.egg-info t2t_kernels/*.so
