# `make demo` runs the embedded federation, `make test` passes the tests; both set up what they need in .venv.
PYTHON ?= python3
WORKERS ?= 2
RERUNS ?= 1
VENV := .venv
BIN := $(VENV)/bin
SOURCES := common server client tests

.PHONY: demo test check format bench faults clean
.DELETE_ON_ERROR:

demo: $(VENV)/.run
	$(BIN)/seedbed simulate embedded --out runs/demo --resume

# Two files of tests at a time with a thread each: most of a federation is waiting. WORKERS=0 runs them in one process.
# Hundreds of them start real processes and wait for them, on a machine that may have other work: what fails is tried once more,
# and is named at the end even if it passes then. RERUNS=0 is strict.
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--reruns $(RERUNS) -r aR

check: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy .typecheck/seedbed/common .typecheck/seedbed/server .typecheck/seedbed/client
	$(BIN)/python -m pytest -q tests/test_layers.py tests/deploy/test_commands.py tests/deploy/test_containers.py \
		tests/deploy/test_kubernetes.py tests/deploy/test_services.py tests/deploy/test_settings.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.dev
	mkdir -p .bench
	$(BIN)/python tests/bench/bench_merge.py --large --json .bench/merge.json
	$(BIN)/python tests/bench/bench_files.py --json .bench/files.json
	$(BIN)/python tests/bench/bench_routing.py --json .bench/routing.json
	$(BIN)/python tests/bench/bench_scoring.py --json .bench/scoring.json
	$(BIN)/python tests/bench/bench_registry.py --json .bench/registry.json

faults: $(VENV)/.dev
	mkdir -p .bench
	$(BIN)/python tests/faults/table.py --resume .bench/faults.json

# torch comes first and alone: the other packages' looser ranges must not choose another build.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .bench
