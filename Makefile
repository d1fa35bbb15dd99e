# What a person or a CI machine types. `make` lists it.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# How many processes of each service, where not one: make run WORKERS="feed-updater=4 email-notifier=2"
export WORKERS

# What `make bench` measures.
BENCH := fanout events messages gateway

# Runs the rest of a recipe's line with the addresses of the local servers.
with_env := set -a && . .local/env && set +a &&

# Runs the rest of a recipe's line with the servers. They stay for the next run; a CI machine is left as it was.
on_servers := if [ -n "$$CI" ] && ! deploy/local/servers status >/dev/null; then trap 'deploy/local/servers down' EXIT; fi; \
	set -e; run() { echo "$$*"; "$$@"; }; deploy/local/servers up;

# Builds diesel's own tool once, in about two minutes. Its default features would want the libraries of three databases.
install_diesel := cargo install diesel_cli --version 2.3.14 --locked --quiet --no-default-features --features postgres \
	--root .local/tools --target-dir target/tools

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: run ## Install what is missing, start everything, drive it over HTTP, and check what comes out
	@deploy/local/demo
	@echo
	@echo "The fleet is still running:  make status    to stop it:  make stop"

.PHONY: run
run: build ## Start the fleet, or scale it with WORKERS="feed-updater=4"; it stays up
	@deploy/local/install build run
	@deploy/local/fleet up

.PHONY: stop
stop: ## Stop the fleet and its servers; data and logs stay in .local
	@deploy/local/fleet down
	@deploy/local/servers down

.PHONY: status
status: ## Show what runs, and whether it is ready
	@deploy/local/servers status; deploy/local/fleet status; true

.PHONY: servers
servers: ## Start PostgreSQL and RabbitMQ alone; .local/env says where they are
	@deploy/local/install run
	@deploy/local/servers up
	@deploy/local/servers status

.PHONY: env
env: ## Write random passwords to .env, for docker compose; those that are there stay
	@deploy/docker/env

.PHONY: build
build: ## Build the binaries (release)
	@deploy/local/install build
	cargo build --release --workspace --bins --locked

.PHONY: test
test: ## Run every test, against the real servers, binaries side by side
	@deploy/local/install build run test
	@$(on_servers) $(with_env) \
	run cargo build --workspace --bins --locked; \
	run cargo xtask test --workspace --locked

.PHONY: lint
lint: ## Check formatting, lints, dependencies, the schema and the scripts
	@deploy/local/install build lint run
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo xtask dependencies
	@if command -v cargo-audit >/dev/null; then echo cargo audit; cargo audit; fi
	shellcheck -x $$(grep -rlE '^#!.*[ /](ba)?sh$$' .ci deploy)
	$(install_diesel)
	@$(on_servers) run cargo test --workspace --test schema --locked -- --ignored

.PHONY: fmt
fmt: ## Format the code
	cargo fmt --all

# With processes, a database and a vhost of its own: a fleet that runs beside it would only be in the way of the figures.
.PHONY: bench
bench: build ## Measure everything, or one thing (BENCH=events ARGS="--runs 1"); tables and JSON under target/bench
	@deploy/local/install run
	@deploy/local/fleet down
	@deploy/local/servers up
	@$(with_env) for benchmark in $(BENCH); do target/release/bench $$benchmark $(ARGS) || exit; done

.PHONY: clean-local
clean-local: stop ## Stop everything and remove its data, logs and settings
	@deploy/local/servers remove
