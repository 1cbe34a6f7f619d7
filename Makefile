# The front door. `make help` lists what there is; each target sets up what it needs.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.ONESHELL:

CLANG ?= clang
PREFIX ?= /usr/local

# Where the machine's Node.js is missing or older than 20.19, this one from npm, below .node/.
NODE_VERSION := 20.20.2
NPM_VERSION := 11.19.1
export PATH := $(CURDIR)/.node/bin:$(PATH)

# Debian packages: what building needs, what running needs, what tests, demo and bench need besides.
BUILD_PACKAGES := clang libbpf-dev libbpf1 gcc g++ make python3 libc6-dev
TEST_PACKAGES := bpftool etcd-server etcd-client iproute2 iputils-ping ethtool tcpdump tshark iperf3 \
	nginx-light curl openssl iptables nftables procps util-linux clang-format \
	docker.io containernetworking-plugins supervisor busybox-static tini systemd prometheus zsh
KERNEL_PACKAGES := qemu-system-x86 kmod busybox-static

BPF_SOURCES := $(wildcard bpf/*.h bpf/*.bpf.c)
TS_SOURCES := $(shell find loader src -name '*.ts' 2>/dev/null)

.PHONY: help deps build gen lint test fault doctor-test kernel-test soak demo demo-end bench bench-scale bench-scrape bench-programs bench-charts bench-fleet docs install clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

deps: node_modules/.installed .deps-$(shell id -u) ## Debian and npm packages

.deps-$(shell id -u): Makefile
	@missing=""
	for package in $(BUILD_PACKAGES) $(TEST_PACKAGES); do
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"
	done
	if [ -n "$$missing" ]; then
	  echo "installing Debian packages:$$missing"
	  # The services among them are for the tests to start, each in a place of its own.
	  if [ ! -e /usr/sbin/policy-rc.d ]; then
	    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
	    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
	    chmod 755 /usr/sbin/policy-rc.d
	  fi
	  apt-get update -qq
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing
	fi
	if ! node -e 'const [a, b] = process.versions.node.split("."); process.exit(a > 20 || (a == 20 && b >= 19) ? 0 : 1)' \
	    2>/dev/null; then
	  echo "installing Node.js $(NODE_VERSION) below .node/"
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates npm libnode-dev
	  package=node-linux-$$(uname -m | sed 's/x86_64/x64/; s/aarch64/arm64/')
	  # With npm of its own: Debian's builds native packages for Debian's Node.js alone.
	  npm install --prefix .node --no-save --no-audit --no-fund --loglevel=error \
	    $$package@$(NODE_VERSION) npm@$(NPM_VERSION)
	  mkdir -p .node/bin
	  ln -sf ../node_modules/$$package/bin/node ../node_modules/.bin/npm ../node_modules/.bin/npx .node/bin/
	fi
	touch $@

node_modules/.installed: package.json package-lock.json .deps-$(shell id -u)
	@echo "installing npm packages"
	# Native packages are built with Debian's headers of Node-API, which are the same for all versions.
	if [ -e /usr/include/node/node_api.h ]; then export npm_config_nodedir=/usr; fi
	npm ci --no-audit --no-fund --loglevel=error
	touch $@

build: dist/.built dist/bundle/twilld.cjs.cache dist/bpf/twill.bpf.o ## the control plane and the programs, into dist/

dist/.built: node_modules/.installed tsconfig.json tsconfig.build.json $(TS_SOURCES)
	@npx --no-install tsc -p tsconfig.build.json
	touch $@

dist/bundle/twilld.cjs.cache: dist/.built bundle.js bin/start.js
	@node bundle.js

dist/bpf/twill.bpf.o: dist/.built $(BPF_SOURCES)
	@mkdir -p dist/bpf
	CLANG=$(CLANG) node --input-type=module -e '
	  import { compile } from "./dist/loader/compile.js";
	  import { copyFileSync } from "node:fs";
	  const { path } = compile({ source: "bpf/twill.bpf.c", includeDirs: ["bpf"], clang: process.env.CLANG,
	    cacheDir: "dist/cache" });
	  copyFileSync(path, "$@");'

gen: dist/bpf/twill.bpf.o ## src/abi/twill.gen.ts from the programs' BTF
	@mkdir -p src/abi
	node dist/loader/generate.js dist/bpf/twill.bpf.o src/abi/twill.gen.ts

lint: node_modules/.installed ## formatter, linter, types, floors
	@npx --no-install biome check .
	npx --no-install tsc --noEmit -p tsconfig.json
	npx --no-install tsc --noEmit -p tsconfig.core.json
	clang-format --dry-run --Werror bpf/*.h bpf/*.c

test: deps build lint ## everything; root; leaves nothing behind
	@test/run

fault: deps build ## every fault of the table in test/README.md, which it writes; root; some 15 minutes
	@test/fault/run

doctor-test: deps build ## `twill doctor` on hosts broken in one way after another; root; some 4 minutes
	@test/doctor/run

kernel-test: deps build ## packet tests on Debian's own kernel, in QEMU; root; some 20 minutes
	@for package in $(KERNEL_PACKAGES); do
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' ||
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$package
	done
	test/kernel/run

soak: deps build ## ten minutes of churn must leave nothing behind; SOAK_MINUTES=2 is shorter
	@test/fault/run test/fault/soak.ts

demo: deps build ## two hosts, one etcd, pods; KEEP=1 leaves it running
	@test/demo $(if $(KEEP),--keep)

demo-end: ## ends a demo left running
	@test/demo --end

bench: deps build ## Twill beside kernel flannel; QUICK=1 is shorter, ONLY=forwarding or ONLY=masquerade a part
	@bench/run $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

bench-scale: deps build ## start, events, memory and idle time with up to 50,000 peers; root
	@node_modules/.bin/tsc -p tsconfig.lab.json
	node dist/bench/scale.js

bench-scrape: deps build ## what a scrape of /metrics costs with 10,000 peers; root
	@bench/scrape

bench-programs: deps build ## nanoseconds and instructions of the programs for one packet; root
	@bench/programs

bench-fleet: deps build ## what NODES=1000 nodes cost etcd, for docs/scale.md, which PAGE=1 writes; root; 3 minutes
	@bench/fleet --nodes $(or $(NODES),1000) $(if $(PAGE),--page)

bench-charts: deps build ## docs/bench.md and its charts, from the JSON of a benchmark; FILE=dist/bench/result.json
	@node_modules/.bin/tsc -p tsconfig.lab.json
	node dist/bench/charts.js $(or $(FILE),dist/bench/result.json)

docs: deps build ## the output in docs/, from a live lab; root
	@docs/run

install: build ## under PREFIX (/usr/local)
	@install -d $(DESTDIR)$(PREFIX)/lib/twill $(DESTDIR)$(PREFIX)/bin
	cp -r bin dist deploy vendor package.json package-lock.json $(DESTDIR)$(PREFIX)/lib/twill/
	cp -r node_modules $(DESTDIR)$(PREFIX)/lib/twill/
	ln -sf ../lib/twill/bin/twilld ../lib/twill/bin/twill $(DESTDIR)$(PREFIX)/bin/
	share=$(DESTDIR)$(PREFIX)/share
	install -d $$share/bash-completion/completions $$share/zsh/site-functions
	bin/twill completion bash >$$share/bash-completion/completions/twill
	bin/twill completion zsh >$$share/zsh/site-functions/_twill

clean: ## what was built
	@rm -rf dist .deps-* .node node_modules
