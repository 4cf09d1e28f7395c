# `make demo` and `make test` do all their set-up: a virtual environment in .venv with the tested versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TESTED := -c constraints.txt

.PHONY: demo test test-all mutants bench-quick gpu-check lint format docs clean

demo: $(VENV)/installed-model
	mkdir -p demo
	$(BIN)/memflow generate examples/stories/bo-and-the-balloon.txt -o demo/bo-and-the-balloon.mp4 --seconds-per-prompt 1.5 --report

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Small faults put into the code one at a time, and whether a test sees them: hours. See tests/tools/mutants.py.
mutants: $(VENV)/installed-test
	$(BIN)/python tests/tools/mutants.py

# Everything about the kernels that only a GPU can show, with the machine's own torch and triton, or one step of it:
# make gpu-check STEP=correct. See benchmarks/gpu_check.py.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(STEP)

bench-quick: $(VENV)/installed-model
	$(BIN)/python -m benchmarks run --suite quick -o bench/quick.json
	$(BIN)/python -m benchmarks report bench/quick.json

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

docs: $(VENV)/installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo bench build site *.egg-info

# torch first and pinned: any other request for it would fetch another build.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/installed-model: $(VENV)/torch pyproject.toml
	$(PIP) install $(TESTED) -e '.[model]'
	touch $@

$(VENV)/installed-test: $(VENV)/installed-model
	$(PIP) install $(TESTED) -e '.[model,serve,ray,test,docs]'
	touch $@
