# connlab: `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

# sudo resets PATH: look where Go's own installer puts it, too.
GO ?= $(shell command -v go 2>/dev/null || echo /usr/local/go/bin/go)
GOLANGCI_LINT := github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0

# Tests that need root measure: one package at a time on a quiet machine, and
# never from the cache, which knows nothing of the kernel.
# The incidents take longer than go test's ten minutes for a package.
ONE_BY_ONE := -p 1 -count=1 -timeout 20m

INCIDENT ?= backlog
ARGS ?=

.PHONY: help
help: ## List the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: run
run: setup build ## Reproduce an incident (INCIDENT=backlog ARGS=...); root or sudo
	@mkdir -p results/runs && chown --reference=. results/runs
	bin/connlab run $(INCIDENT) --save results/runs $(ARGS)

.PHONY: test
test: setup ## Every test, those that need root included; root or sudo
	@test "$$(id -u)" = 0 || { echo "make test needs root: sudo make test (or: make check, which needs none)"; exit 4; }
	$(GO) vet ./...
	$(GO) test $(ONE_BY_ONE) ./...

.PHONY: check
check: ## What can be tested without root
	$(GO) vet ./...
	$(GO) test ./...

.PHONY: race
race: setup ## Every test with the race detector; root or sudo
	$(GO) test -race $(ONE_BY_ONE) ./...

.PHONY: fuzz
fuzz: ## Fuzz each parser for FUZZTIME (1m, or a number of inputs: 5000x)
	@grep -roE --include='*_test.go' '^func Fuzz[A-Za-z0-9]+' . | while IFS=: read -r file func; do \
	  echo "$$(dirname $$file) $${func#func }"; \
	  $(GO) test -run '^$$' -fuzz "^$${func#func }$$" -fuzztime $(or $(FUZZTIME),1m) -fuzzminimizetime 10x $$(dirname $$file) || exit 1; \
	done

.PHONY: bench
bench: setup ## Ratios: server beside redis-server, lab beside mininet, balancer beside the kernel, load with the tracer on and off; root or sudo
	$(GO) test -run '^$$' -bench 'BesideRedis|VersusMininet|BesideKernel|BesideTrace' -benchtime 1x -timeout 30m -p 1 -v ./server ./netlab ./scenarios
	$(GO) test -run '^$$' -bench . -skip 'BesideRedis|VersusMininet|BesideKernel|BesideTrace' -timeout 30m -p 1 ./...

.PHONY: lint
lint: ## golangci-lint, pinned
	$(GO) run $(GOLANGCI_LINT) run ./...

.PHONY: build
build: ## Build bin/connlab
	@mkdir -p bin && chown --reference=. bin
	CGO_ENABLED=0 $(GO) build -buildvcs=false -o bin/connlab ./cmd/connlab
	@chown --reference=. bin/connlab

.PHONY: setup
setup: ## Install the Debian packages of the real peers, if they are missing (root)
	@GO=$(GO) .ci/setup

.PHONY: clean
clean: ## Remove what was built and recorded
	rm -rf bin results/runs
