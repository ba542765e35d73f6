# Two commands on a fresh machine (Python 3.11+, make): `make demo` and `make test`. Everything lands in .venv.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
# One torch thread: several processes share the cores, and threads are part of what the bits depend on.
export OMP_NUM_THREADS ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: env demo test test-all test-fast soak lint format hooks bench docs cluster clean clean-env

env: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "elastic-lm needs Python 3.11 or newer, and none was found: apt-get install python3 python3-venv," >&2; \
		echo "or name one: make $(or $(MAKECMDGOALS),env) PYTHON=/path/to/python3" >&2; exit 1; fi
	@if [ ! -x $(BIN)/python ] && ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; fi
	@command -v cc >/dev/null || echo "note: no C compiler found, so the exact reduction uses its slower torch" \
		"kernel (the same bits). For the faster one: apt-get install gcc libc6-dev" >&2
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: env
	$(BIN)/python examples/demo.py

# What needs no Ray runs on all cores at once; what does has one cluster, and the cores are its nodes.
test: env
	$(BIN)/python -m pytest -m "not ray" -n auto --dist worksteal
	$(BIN)/python -m pytest -m "ray and not thorough"

# The same, and every other fault on a cluster: another quarter of an hour.
test-all: test
	$(BIN)/python -m pytest -m "ray and thorough"

# Neither Ray nor anything that takes long.
test-fast: env
	$(BIN)/python -m pytest -m "not ray and not slow" -n auto --dist worksteal

# Random faults at random roles, run after run, for SOAK_SECONDS from SOAK_SEED on; a failure names its seed.
soak: export SOAK_SECONDS ?= 3600
soak: export SOAK_SEED ?= 0
soak: env
	$(BIN)/python -m pytest -m soak -s

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint cluster/image/Dockerfile

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Format, lint and types on every commit, the fast suite on every push.
hooks: env
	$(BIN)/pre-commit install

# bench/against.py needs rivals' packages of its own: bench/README.md.
BENCHES := step memory checkpoint commands scrape load reader reform
bench: env
	for file in $(BENCHES:%=bench/%.py); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# The documents that are generated; a test fails when they are out of date.
docs: env
	$(BIN)/python -m elastic_lm.monitor.metrics > docs/metrics.md
	$(BIN)/python -m elastic_lm.cli_reference > docs/commands.md
	$(BIN)/python -m elastic_lm.monitor.table > docs/steps.md
	$(BIN)/python -m elastic_lm.events.catalogue > docs/events.md
	$(BIN)/python -m elastic_lm.monitor.rules runbook > docs/runbooks.md

# What Prometheus, Grafana and Kubernetes read. The same holds for it.
KUBERAY := deploy cluster/kuberay/run.yaml --s3-secret elastic-lm-s3 --spot-label karpenter.sh/capacity-type=spot
cluster: env
	$(BIN)/python -m elastic_lm.monitor.rules rules > cluster/prometheus/rules.yaml
	$(BIN)/python -m elastic_lm.monitor.rules prometheus_rule > cluster/kuberay/prometheusrule.yaml
	$(BIN)/python -m elastic_lm.monitor.scraping prometheus > cluster/prometheus/prometheus.yaml
	$(BIN)/python -m elastic_lm.monitor.scraping podmonitor > cluster/kuberay/podmonitor.yaml
	$(BIN)/python -m tests.cluster.scenarios > cluster/prometheus/rules_test.yaml
	$(BIN)/python -m elastic_lm.monitor.dashboards > cluster/grafana/elastic-lm.json
	$(BIN)/elastic-lm $(KUBERAY) > cluster/kuberay/base/rayjob.yaml
	$(BIN)/elastic-lm $(KUBERAY) --kind raycluster > cluster/kuberay/long-lived/raycluster.yaml

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

clean-env: clean
	rm -rf .venv
