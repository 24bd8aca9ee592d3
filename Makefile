# Needs Python >= 3.10 and git. Everything is installed into .venv; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

# Nothing goes over the network. One thread for each of the processes that share the tests, a file each; what a file
# has computed once stays with it.
OFFLINE := WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(OFFLINE) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

CODE := lightning_compress callbacks tests tools $(wildcard examples benchmarks)
EVIDENCE := $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)))

.PHONY: help install quickstart test unit evidence lint format pages docs clean

help:
	@echo "make install     create .venv and install the package with what development needs"
	@echo "make quickstart  run examples/quickstart.py"
	@echo "make unit        the fast tests"
	@echo "make test        all tests"
	@echo "make lint        ruff and mypy"
	@echo "make docs        build the documentation into site/"
	@echo "make format      repair what ruff can repair"
	@echo "make pages       write the generated pages of the documentation again"
	@echo "make evidence    the long measurements under benchmarks/ (hours)"

install: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python >= 3.10 is needed, not ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev,audit,examples,onnx,openvino,int8,wandb]"
	# Only peers in tests. torchattacks asks for an old `requests` that it never imports: without its requirements.
	$(BIN)/python -m pip install --quiet --no-deps torchattacks==3.5.1 pyautoattack
	touch $@

quickstart: $(READY)
	$(OFFLINE) $(BIN)/python examples/quickstart.py

unit: $(READY)
	$(PYTEST) tests/unit

test: $(READY)
	$(PYTEST) --durations=10 $(wildcard tests/unit tests/integration tests/distributed)

evidence: $(READY)
	@set -e; for script in $(EVIDENCE); do echo "== $$script"; $(BIN)/python $$script; done

lint: $(READY)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

pages: $(READY)
	$(BIN)/python tools/make_pages.py

docs: $(READY)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
