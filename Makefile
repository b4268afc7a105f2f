# make train   from a clone to pictures: install into .venv, train the digits preset, sample, write a report
# make test    install the development tools too, then run every test
# make test-quick   without the tests that compile, package or are slow: at most 3 minutes on two cores
# make lint    formatting, static checks, types          make fixtures   small real inputs in out/fixtures/
# make wheel   dist/erd_fast-*.whl with the extension in it
# make wheel-check   that wheel's ops and kernels under the oldest and the newest torch: 6 GB to download, 12 GB on disk
# make soak    what takes longer than a test may: runs with kernels and without learn alike, all GPU stages rehearsed, random calls
# make bench   measure on this machine: bench/results/<machine>/*.json, then the tables of the documents
# make gpu     on a machine with a GPU and torch, without .venv and network: the most important measurements within 8
#              minutes, to out/gpu/; PART=tests, ops, attention, step or data measures all cases of one part
PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check
RUN ?= runs/digits

.PHONY: setup dev train test test-quick soak lint fixtures bench gpu gpu-all gpu-install gpu-tests gpu-ops gpu-attention gpu-step gpu-data \
    wheel wheel-check clean
.DELETE_ON_ERROR:

setup: .venv/.core
dev: .venv/.dev

# A stamp is written last, so an interrupted installation is taken up again and a finished one costs nothing. The extension
# is built once, with the torch of .venv: torch comes first, and erd-fast[dev] adds to the package that is installed.
.venv/.core: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@echo "Installing into .venv: about 3 GB to download (PyTorch with CUDA), 6 GB on disk."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "erd-fast needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PIP_INSTALL) --constraint constraints.txt torch setuptools
	@echo "Building the extension (erd-fast info shows what was built)."
	@$(PIP_INSTALL) --constraint constraints.txt --no-build-isolation --editable .
	@touch $@

.venv/.dev: .venv/.core
	@echo "Installing the development tools."
	@$(PIP_INSTALL) --constraint constraints.txt 'erd-fast[dev]'
	@touch $@

train: setup
	$(BIN)/erd-fast train digits --out $(RUN)
	$(BIN)/erd-fast sample $(RUN) --n 100 --steps 18 --cfg-scale 1.5 --out $(RUN)/samples.png
	$(BIN)/erd-fast report $(RUN)

test: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 10

test-quick: dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 10 -m 'not soak and not build and not slow'

soak: dev
	$(BIN)/python -m pytest -m soak -s tests/soak

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy erd_fast tests/support/fixtures.py build_backend.py setup.py
	$(BIN)/mypy kernels

fixtures: dev
	PYTHONPATH=tests $(BIN)/python -m support.fixtures out/fixtures

bench: dev
	$(BIN)/python bench/run.py ops
	$(BIN)/python bench/run.py attention
	$(BIN)/python bench/run.py step
	$(BIN)/python bench/run.py data
	$(BIN)/python bench/tables.py

gpu: $(addprefix gpu-,$(or $(PART),all))

gpu-all:
	$(PYTHON) bench/run.py gpu

gpu-tests:
	$(PYTHON) bench/run.py gpu --only tests

gpu-install:
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
	    { echo "make gpu: $(PYTHON) has no torch that sees a CUDA device"; exit 1; }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .

gpu-ops gpu-attention gpu-step gpu-data: gpu-%: gpu-install
	$(PYTHON) bench/run.py $*

wheel: dev
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

wheel-check:
	$(PYTHON) tests/support/wheel_check.py

clean:
	rm -rf .venv build dist out runs erd_fast.egg-info .mypy_cache .ruff_cache .pytest_cache
