# make demo: all set-up, then the main job.  make test: all set-up, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo round test check vectors bundle mosquitto fuzz bench clean

# What the demo needs is what runs in the field: no PyTorch.
$(DEMO_STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	touch $@

$(STAMP): $(DEMO_STAMP)
	$(PIP) -e '.[dev,export]'
	touch $@

# DATA=fashion-mnist for the larger one.
DATA ?= digits
demo: $(DEMO_STAMP)
	$(BIN)/python -m examples.demo --data $(DATA)

# One round in one process, with what each party sees.
round: $(DEMO_STAMP)
	$(BIN)/python examples/one_round.py

test: $(STAMP) mosquitto
	$(BIN)/python -m pytest -n auto --dist worksteal

# The tests run on two brokers; without this one they say which tests were left out.
mosquitto:
	@command -v mosquitto >/dev/null || test -x /usr/sbin/mosquitto || \
	{ apt-get install -y -q mosquitto || { apt-get update -q && apt-get install -y -q mosquitto; } || \
	  sudo -n apt-get install -y -q mosquitto || echo "mosquitto cannot be installed here"; } >/dev/null 2>&1; true

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Made from fixed entropy: a difference to what is checked in is a change of the protocol.
vectors: $(STAMP)
	$(BIN)/python tests/vectors/make_vectors.py

# The demo's bundles, from examples/models. They are checked in, so that the demo runs without PyTorch.
bundle: $(STAMP)
	$(BIN)/python -m examples.demo.make_bundle

# Coverage-guided, for as long as SECONDS says. Findings are written to .fuzz/.
SECONDS ?= 600
fuzz: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	mkdir -p .fuzz
	$(BIN)/python tests/fuzz_messages.py -max_total_time=$(SECONDS) -artifact_prefix=.fuzz/ .fuzz

bench: $(STAMP)
	for name in masking privacy train_step coordinator device_footprint round; do $(BIN)/python benchmarks/$$name.py; done

clean:
	rm -rf $(VENV) .fuzz .hypothesis .pytest_cache .mypy_cache .ruff_cache
