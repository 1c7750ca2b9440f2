# Every target does its own set-up: .venv with the pinned set, Detectron2 and this package.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup train compare bench test soak lint format clean

setup: $(READY)  ## .venv alone

train: $(READY)  ## distil a small student on the Shapes data and print the table
	$(BIN)/python tools/train_shapes.py

compare: $(READY)  ## train the student with every method and print the table; ARGS="--help" for more
	$(BIN)/python benchmarks/compare.py $(ARGS)

test: lint  ## lint, types, the order of the folders, and all tests except the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

soak: $(READY)  ## the tests of faults and long runs that take minutes each
	$(BIN)/python -m pytest -m soak

bench: $(READY)  ## time and memory of the loss and of a training step, and how they grow
	$(BIN)/pip --disable-pip-version-check install -q -r requirements-bench.txt
	$(BIN)/python benchmarks/bench.py --loss --step --growth --losses $(or $(LOSSES),ssim l1 pkd)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	$(BIN)/codespell

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(READY): requirements.txt pyproject.toml tools/build_detectron2.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip --disable-pip-version-check install -q -r requirements.txt
	$(BIN)/python tools/build_detectron2.py --out build/wheels --install
	$(BIN)/pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv build
