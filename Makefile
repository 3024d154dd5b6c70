# Every target sets up what it needs and shows progress. `make help` lists them.
SHELL := /bin/bash
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
BENCHES := router datapath operator planner registry simulator

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-cluster record-demo test test-unit test-ray test-e2e test-controlplane lint format generate lock clean
.PHONY: test-chart test-engine test-native test-tools native generate-install
.PHONY: compile-beside-lint lint-and-engine test-chart-beside-ray
.PHONY: bench bench-venv bench-router bench-datapath bench-operator bench-planner soak-router

help: ## This list.
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

venv: ## The development environment in .venv.
	@scripts/bootstrap.sh dev

demo: venv ## Serve a real small model in two quantization variants on this machine and ask both.
	@$(PY) scripts/demo.py

demo-cluster: venv ## The demo through kubectl: a real control plane, the operator, local Ray, the real engine.
	@$(PY) scripts/demo_cluster.py

record-demo: venv ## Record demo-cluster anew: docs/demo-cluster.cast and .svg (needs npm).
	@$(PY) scripts/record_demo.py

test: venv compile-beside-lint test-unit test-chart-beside-ray test-native test-e2e test-controlplane ## Everything, as CI runs it.

# The compiler has one core for minutes; so have the others.
compile-beside-lint: venv
	$(MAKE) --no-print-directory --jobs=2 native lint-and-engine

lint-and-engine:
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory test-engine

# Both wait more than they work, and neither measures time.
test-chart-beside-ray: venv test-tools
	$(MAKE) --no-print-directory --jobs=2 test-chart test-ray

test-unit: venv ## Pure logic, protocol and processes without Ray, engines or Kubernetes (two minutes).
	MODELFLEET_ROUTER_NATIVE=0 $(PYTEST) tests/unit -m "not engine" --numprocesses auto --dist loadfile

native: venv ## Compile the router's data path, as the image has it (needs a C compiler).
	$(PY) -m modelfleet_serving.router_native

test-native: native ## The router as machine code: the same tests again.
	MODELFLEET_ROUTER_NATIVE=1 $(PYTEST) tests/unit/router tests/unit/router_policies --numprocesses auto --dist loadfile

test-engine: venv ## Our command lines and tables against the installed vLLM.
	$(PY) -m modelfleet_serving.environments install vllm
	$(PYTEST) tests/unit -m engine

lint: venv ## ruff, mypy, import-linter, generated files.
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) scripts/generate.py --check

format: venv ## Format and apply safe fixes.
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

lock: venv ## Resolve requirements/*.txt anew from pyproject.toml.
	@scripts/lock.sh

generate: venv ## Write the generated files: CRDs, the chart's schema, table and rules.
	@$(PY) scripts/generate.py

generate-install: generate ## Render manifests/install from the chart.
	@$(PY) -m tests.chart.rendered

bench-venv:
	@scripts/bootstrap.sh bench

bench: $(addprefix bench-,$(BENCHES)) ## All benchmarks; figures in build/bench/NAME.json.

bench-router: bench-venv ## The router against vllm-router, sglang-router, HAProxy, LiteLLM (ARGS="--quick --rows ...").
	-$(PY) -m modelfleet_serving.router_native
	$(PY) -m tests.benchmarks.router $(ARGS)

bench-datapath: bench-venv ## What the router's own code costs for a request, without sockets.
	-$(PY) -m modelfleet_serving.router_native
	$(PY) -m tests.benchmarks.datapath $(ARGS)

bench-operator: venv ## The operator with 1,000 ModelDeployments on a real API server (ARGS="--deployments 100").
	$(PY) -m tests.benchmarks.operator $(ARGS)

bench-planner: venv ## 1,000 variants planned over 50 kinds of accelerators.
	$(PY) -m tests.benchmarks.planner $(ARGS)

DURATION ?= 600
soak-router: bench-venv ## The router under load and faults: every request accounted for (DURATION=600 seconds).
	$(PY) -m tests.benchmarks.router.soak --duration $(DURATION) $(ARGS)

test-ray: venv ## Replicas and registry on a real local Ray.
	$(PYTEST) tests/ray

test-tools: venv ## Build kube-apiserver, etcd, helm and the other tools of the test bed (the first time: minutes).
	@$(PY) -m tests.controlplane.bed build

test-controlplane: venv test-tools ## The operator against real control planes, two at a time.
	$(PYTEST) tests/controlplane --numprocesses 2 --dist loadfile

test-chart: venv test-tools ## The chart with the real Helm, the manifests and the images' files, on the same control plane.
	$(PYTEST) tests/chart

test-e2e: venv ## The whole path: simulated engines, then real vLLM.
	$(PYTEST) tests/e2e

bench-registry: venv ## Heartbeats, long polls and changes at 300 and 3,000 replicas.
	ulimit -n 16384 && $(PY) -m tests.benchmarks.registry $(ARGS)

bench-simulator: venv ## 2,000 streams in one simulated engine.
	ulimit -n 16384 && $(PY) -m tests.benchmarks.simulator $(ARGS)
