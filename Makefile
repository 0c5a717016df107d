# make help tells what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# A bare environment (CI, cron, a container) may lack what go needs.
ifeq ($(strip $(HOME)),)
export HOME := $(shell h=$$(getent passwd "$$(id -u)" | cut -d: -f6); [ -n "$$h" ] && [ -w "$$h" ] && echo "$$h" || { mkdir -p '$(CURDIR)/bin/home' && echo '$(CURDIR)/bin/home'; })
endif
export PATH := $(if $(PATH),$(PATH),/usr/local/bin:/usr/bin:/bin):/usr/local/go/bin:/usr/sbin:/sbin
export GOFLAGS := $(strip $(GOFLAGS) $(if $(findstring buildvcs,$(GOFLAGS)),,-buildvcs=false))

LINT_VERSION := v2.15.0
export LINT_VERSION
FUZZTIME ?= 60s
ROUNDS ?= 200
RELOADS ?= 10
TASKS ?= 1000000

.PHONY: help build run test lint race fuzz campaign reload faults bench bench-peers bench-pools clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

build: ## bin/remuda
	@scripts/need.sh go
	scripts/build.sh

run: ## build, start the daemon with examples/quickstart, show what runs, follow its logs
	@scripts/run.sh

test: ## everything CI runs: vet, lint, go test -race, a short crash campaign
	@scripts/test.sh

lint: ## golangci-lint, pinned
	@scripts/need.sh go
	@scripts/lint.sh

race: ## go test -race ./...
	@scripts/need.sh go cc node npm python3
	go test -race -p 2 -timeout 15m ./...

fuzz: ## every fuzz target for FUZZTIME (60s)
	@scripts/need.sh go cc
	@FUZZTIME=$(FUZZTIME) scripts/fuzz.sh

campaign: ## the crash campaign: ROUNDS (200) rounds of kill -9
	@scripts/need.sh go node python3
	go run ./test/campaign -rounds $(ROUNDS)

faults: ## TASKS (1,000,000) tasks for pools whose workers are made to fail
	@scripts/need.sh go node python3
	go run ./test/poolfaults -tasks $(TASKS)

reload: ## reload servers under load, RELOADS (10) times each; no request may fail
	@scripts/need.sh go node python3
	go run ./test/reload -reloads $(RELOADS)

bench: ## the packages' own benchmarks
	@scripts/need.sh go
	go test -run '^$$' -bench . -benchmem ./...

bench-peers: ## beside PM2 and supervisord, in one run
	@scripts/need.sh go node npm supervisord
	go run ./bench/peers

bench-pools: ## package pool beside the seed's, tinypool, workerpool and multiprocessing
	@scripts/need.sh go node npm python3
	go run ./bench/pools

clean: ## remove what was built
	rm -rf bin bench/out coverage.out
