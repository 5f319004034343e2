# Everything a checkout can do. `make` alone lists it.
#
#   PY=python3.11 make install    with this interpreter (else: the newest that works)
#   VENV=.venv311 make test       in another folder
#
# Each target first brings $(VENV) up to date, which costs a few hundredths of a second when it is.

VENV ?= .venv
PY ?=
export VENV PY

BIN := $(VENV)/bin
LOCKS := requirements/core.lock requirements/all.lock requirements/serve.lock requirements/cuda.lock requirements/tpu.lock requirements/beam.lock benchmarks/decoding/peers.lock
# Universal: one lock for Python 3.11 to 3.14, Linux and macOS (array-record has no Windows wheel). Wheels only, no host.
# A local find-links folder or index of this machine's must not decide what others get.
UV ?= $(BIN)/uv
COMPILE = env -u UV_FIND_LINKS -u UV_EXTRA_INDEX_URL -u UV_INDEX $(UV) pip compile --quiet --no-config \
	--universal --python-version 3.11 --only-binary :all: --generate-hashes --no-emit-index-url --no-header

.PHONY: help install install-all install-beam demo test test-beam check check-code check-types check-imports check-packages check-locks lock clean \
	plan-all \
	bench-prepare bench-seeds bench-quality bench-objectives bench-metrics \
	bench-memory bench-peers bench-ablations bench-cold bench-transfer bench-warm bench-text bench-decoding bench-training bench-fuzz bench-exact bench-faults bench-tuning bench-edge bench-clicks bench-tasks bench-replaced bench-remat
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26

install:  ## $(VENV) with what the demo needs; then .venv/bin/m6rec is the command
	@sh requirements/install.sh core

install-all:  ## and everything else: dev tools, extras, compilers for TPU and GPU
	@sh requirements/install.sh all

install-beam:  ## .venv-beam: Apache Beam and what preparing data imports, without jax
	@VENV=.venv-beam sh requirements/install.sh beam

demo: install  ## MovieLens-100K from fetch to report, in demo/; run again to continue
	$(BIN)/m6rec demo

# Eight fake devices are a property of a process, hence two runs.
test: install-all  ## the whole suite
	$(BIN)/python -m pytest -n 2 tests
	$(BIN)/python -m pytest tests/multidevice

test-beam: install-beam  ## prepare on Apache Beam against prepare in one process, byte for byte
	.venv-beam/bin/python -m pytest --noconftest tests/data/test_beam.py  # which needs hypothesis and sets up jax

check: check-code check-types check-imports check-packages check-locks  ## all gates; -k to see every failure

check-code: install-all
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check-types: install-all
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

check-imports: install-all
	$(BIN)/lint-imports

check-packages: install-all
	$(BIN)/deptry .

# A lock names packages and hashes, never where they come from: that is the reader's own index.
check-locks:
	@if grep -nE '[a-z+]+://| @ |^ *-[^-]|^ *--[^h]' $(LOCKS); then \
		echo 'a lock names a place or an option: make lock' >&2; exit 1; fi

# all.lock first: the others take its versions, so that install-all only ever adds to install.
lock:  ## resolve again; ARGS=--upgrade moves to newer releases
	@command -v $(UV) >/dev/null || $(MAKE) --no-print-directory install-all
	$(COMPILE) pyproject.toml --all-extras --group build -o requirements/all.lock $(ARGS)
	$(COMPILE) pyproject.toml --group build -c requirements/all.lock -o requirements/core.lock
	$(COMPILE) --group serving -c requirements/all.lock -o requirements/serve.lock
	$(COMPILE) pyproject.toml --extra kernels --group build --group cuda -c requirements/all.lock -o requirements/cuda.lock
	$(COMPILE) pyproject.toml --group build --group tpu -c requirements/all.lock -o requirements/tpu.lock
	$(COMPILE) --group beam --group build -o requirements/beam.lock $(ARGS)
	$(COMPILE) benchmarks/decoding/peers.in -o benchmarks/decoding/peers.lock
	@$(MAKE) --no-print-directory check-locks

plan-all: install-all  ## compile every shipped configuration for the topology its header states; plans in build/plans
	@mkdir -p build/plans
	@for file in configs/*.yaml; do \
		sed -n 's/^# Topology *//p' $$file | while read -r place options; do \
			name=$$(basename $$file .yaml); \
			echo "$$name $$place $$options"; \
			$(BIN)/m6rec plan --config $$name --topology $$place $$options \
				--out build/plans/$$name-$$(echo $$place | tr : -).json </dev/null || touch build/plans/failed; \
		done; \
	done; ! rm build/plans/failed 2>/dev/null

bench-prepare: install  ## events a second of `prepare`
	$(BIN)/python -m benchmarks.prepare

bench-seeds: install  ## the demo's run with three seeds, on the test split
	$(BIN)/python -m benchmarks.seeds

bench-quality: install  ## the default configuration on every data set, 3 seeds; FINAL=1 scores the test split
	$(BIN)/python -m benchmarks.quality

bench-peers: install  ## other people's recommenders on the same data sets; FINAL=1 scores the test split
	$(BIN)/python -m benchmarks.peers

bench-objectives: install  ## causal, masked and seq2seq alone against the mixture, at equal tokens
	$(BIN)/python -m benchmarks.objectives

bench-ablations: install  ## what each choice of the default configuration brings and costs, validation split
	$(BIN)/python -m benchmarks.ablations

bench-replaced: install  ## replaced-token detection, reward and rewritten histories beside the default, validation split
	$(BIN)/python -m benchmarks.replaced

bench-cold: install  ## recall on items held out of training; FINAL=1 scores the test split
	$(BIN)/python -m benchmarks.cold

bench-transfer: install  ## what pretraining on two domains brings to a third with few events, validation split
	$(BIN)/python -m benchmarks.transfer

bench-decoding: install-all  ## constrained beam search against transformers' (torch: some GB), and the constraint alone
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.decoding.table
	$(BIN)/python -m benchmarks.decoding.kernel

bench-training: install-all  ## training tokens a second against transformers and torch (some GB), beside the matrix peak
	$(BIN)/python -m benchmarks.training

bench-remat: install  ## memory and processor time of a train step under each remat policy
	$(BIN)/python -m benchmarks.remat

bench-memory: install  ## what a new event costs the memory at 10^6 items
	$(BIN)/python -m benchmarks.memory

bench-tuning: install  ## the six methods of tuning on a planted task: AUC, trained share, bytes; mixed batches against each alone
	$(BIN)/python -m benchmarks.tuning

bench-edge: install  ## bytes on disk and time on one core of the exported small model beside JAX
	$(BIN)/python -m benchmarks.edge

bench-clicks: install  ## late interaction, early exit and the pruned int8 file on real clicks; FINAL=1 scores the test split and measures time
	$(BIN)/python -m benchmarks.clicks $(if $(FINAL),--final)

bench-warm: install  ## known users, whose prefixes are kept, against strangers, in one run
	$(BIN)/python -m benchmarks.warm

bench-fuzz: install  ## a million random requests: every id real, allowed, unseen, there once; no false certificate
	$(BIN)/python -m benchmarks.fuzz

bench-faults: install  ## kills, damaged checkpoints, SIGTERM, other meshes and processes, each against an undisturbed run; MINUTES=60
	$(BIN)/python -m benchmarks.faults --minutes $(or $(MINUTES),60)

bench-exact: install  ## lists proven best by 10 to 100 beams; RUN=... one run or several
	$(BIN)/python -m benchmarks.exact --run $(RUN)

bench-text: install  ## texts in slots against batches that run to their longest text, in one run
	$(BIN)/python -m benchmarks.text

bench-tasks: install-all  ## tasks by text and options beside plain baselines, DIN among them (torch: some GB); ARGS=--quick
	$(BIN)/python -m benchmarks.tasks $(ARGS)

bench-metrics: install  ## seconds and memory of the measures at 10^6 users and 10^6 items
	$(BIN)/python -m benchmarks.metrics

clean:  ## remove what was made: environments, demo, caches
	rm -rf .venv* demo build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
