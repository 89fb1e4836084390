# What a newcomer runs: `make demo`, `make test`. What CI runs: `make lint test`. Each does its own set-up.

# Left alone by cargo where the environment says otherwise.
export CARGO_TERM_PROGRESS_WHEN ?= never
CARGO ?= cargo
# Another file for the demo: make demo FILE=/path/to/model.bin
FILE ?=

.PHONY: help build demo test soak test-list lint look fleet bench bench-full bench-build clean

help:
	@echo "make demo    push a large file, map and mount it (FILE=... for one of yours); restore a Redis, where CRIU runs"
	@echo "make test    all tests"
	@echo "make soak    random operations against a model of memory, for ten minutes (SECONDS_OF_SOAK=...)"
	@echo "make lint    formatting, clippy, and the words of comments"
	@echo "make bench   real programs restored over a network, into docs/BENCHMARKS.md; make bench-full: all figures there"
	@echo "make fleet   three servers, killed while 64 clients restore, over a bucket of three Garage nodes"
	@echo "make look    a report of a trace, looked at in Chromium; pictures in target/look"
	@echo "make build   target/debug/postcopy and target/debug/postcopyd"

build:
	@tests/setup build
	$(CARGO) build --workspace --bins --examples

demo: build
	@tests/setup demo
	@tests/demo "$(FILE)"

# The binaries first: the end-to-end tests start them, and cargo does not build them for another package.
# Documentation tests before the others, whose summary comes last.
test: build
	@tests/setup test
	$(CARGO) test --workspace --doc
	@tests/run-all
	@tests/planted

# Random operations against the model, for so many seconds.
SECONDS_OF_SOAK ?= 600
soak: build
	POSTCOPY_SOAK_SECONDS=$(SECONDS_OF_SOAK) $(CARGO) test --workspace --test e2e -- --nocapture model::

# After adding or removing tests.
test-list:
	@tests/run-all --list > tests/tests.txt

lint:
	@tests/setup build
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- --deny warnings
	@tests/words

# Reports of real traces, in a browser without a network.
look: build
	@tests/setup look
	@tests/look

# A real object store is built first; that takes a quarter of an hour, once.
fleet: build
	@tests/setup fleet
	target/debug/postcopy-fleet

# Two programs over one network: the table and the plots, in docs.
bench: bench-build
	target/release/postcopy-bench --docs docs programs

# All of it; takes hours.
bench-full: bench-build
	target/release/postcopy-bench --docs docs
	taskset -c 0 target/release/postcopy-bench --docs docs fill pace replay machines
	target/release/postcopy-bench --docs docs programs-full mapped chunks restores threads

bench-build:
	@tests/setup bench
	$(CARGO) build --release --workspace --bins

clean:
	$(CARGO) clean
	rm -rf .venv .venv-bench
