# make quickstart   train a real adapter on two Ray workers
# make test         lint, types, and the whole test suite
# make coverage     the test suite, and which lines it reaches within its own processes; takes longer

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One thread for each process: the models of the tests are too small for more, and workers share the cores.
# Two files at a time: much of the time of the tests is spent waiting for processes to start and to end. A test takes
# seven minutes at most on two slow cores; one that hangs fails, with the stacks of its threads, and the others go on.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout 900

.PHONY: quickstart test coverage setup clean

quickstart: setup
	$(BIN)/hyperlora train quickstart

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

coverage: setup
	$(PYTEST) --cov --cov-report=term

setup: $(VENV)/.ready

# torch comes first and alone: pip then takes the build that lies nearest, and nothing after it asks for another.
$(VENV)/.ready: pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; $(PYTHON) is older: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint requirements.txt torch
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
