# make demo: all set-up, then the main job.  make test: all set-up, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check vectors fuzz bench clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,export]'
	touch $@

demo: $(STAMP)
	$(BIN)/python examples/one_round.py

test: $(STAMP)
	$(BIN)/python -m pytest -n auto

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Made from fixed entropy: a difference to what is checked in is a change of the protocol.
vectors: $(STAMP)
	$(BIN)/python tests/vectors/make_vectors.py

# Coverage-guided, for as long as SECONDS says. Findings are written to .fuzz/.
SECONDS ?= 600
fuzz: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	mkdir -p .fuzz
	$(BIN)/python tests/fuzz_messages.py -max_total_time=$(SECONDS) -artifact_prefix=.fuzz/ .fuzz

bench: $(STAMP)
	$(BIN)/python benchmarks/masking.py

clean:
	rm -rf $(VENV) .fuzz .hypothesis .pytest_cache .mypy_cache .ruff_cache
