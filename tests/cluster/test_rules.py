"""The files for Prometheus: up to date, taken by its own checker, and no alert without a test, a severity and a runbook."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_lm.config import MetricsConfig
from elastic_lm.monitor import scraping
from elastic_lm.monitor.alerts import ALERTS, RECORDINGS, Alert
from elastic_lm.monitor.metrics import PREFIX, by_name
from elastic_lm.monitor.rules import resolve, rules, runbook
from tests.monitor.story import HISTORY, TASK_RESULTS

ROOT = Path(__file__).parents[2]
FILES = {
    "cluster/prometheus/rules.yaml": "elastic_lm.monitor.rules rules",
    "cluster/kuberay/prometheusrule.yaml": "elastic_lm.monitor.rules prometheus_rule",
    "docs/runbooks.md": "elastic_lm.monitor.rules runbook",
    "cluster/prometheus/prometheus.yaml": "elastic_lm.monitor.scraping prometheus",
    "cluster/kuberay/podmonitor.yaml": "elastic_lm.monitor.scraping podmonitor",
    "cluster/prometheus/rules_test.yaml": "tests.cluster.scenarios",
}
each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)


def load(path: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / path).read_text(encoding="utf-8")))


def promtool(*arguments: str | Path, text: str | None = None) -> str:
    """What it says of files that it takes.    Fails when it takes one not."""
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
def test_file_is_what_its_module_prints(path: str) -> None:
    command = [sys.executable, "-m", *FILES[path].split()]
    printed = subprocess.run(command, capture_output=True, check=True, text=True, timeout=50, cwd=ROOT).stdout
    assert (ROOT / path).read_text(encoding="utf-8") == printed, f"{path} is out of date: make docs cluster"


def test_make_writes_every_file() -> None:
    lines = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path, command in FILES.items():
        assert f"\t$(BIN)/python -m {command} > {path}\n" in lines


# -- alerts ----------------------------------------------------------------------------------------------------------


def checks_of(alert: Alert) -> list[bool]:
    """Whether it is expected, of every time that the unit tests look at it."""
    (document,) = load("cluster/prometheus/rules_test.yaml")
    checks = [check for test in document["tests"] for check in test["alert_rule_test"]]
    return [bool(check["exp_alerts"]) for check in checks if check["alertname"] == alert.name]


@each_alert
def test_alert_is_tested_both_firing_and_silent(alert: Alert) -> None:
    assert set(checks_of(alert)) == {True, False}


@each_alert
def test_alert_has_a_severity_a_summary_and_a_section_of_the_runbook(alert: Alert) -> None:
    (rule,) = (rule for rule in rules()["groups"][0]["rules"] if rule.get("alert") == alert.name)
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert "{{ $labels.run }}" in rule["annotations"]["summary"]
    path, anchor = rule["annotations"]["runbook"].split("#")
    sections = re.findall(r"^## (\w+)\n\n(.+?)(?=^## |\Z)", (ROOT / path).read_text(), flags=re.DOTALL | re.MULTILINE)
    (text,) = (text for title, text in sections if title.lower() == anchor)
    assert len(re.findall(r"^- ", text, flags=re.MULTILINE)) == len(alert.remedies) > 0


@each_alert
def test_alert_is_of_the_run_that_it_names(alert: Alert) -> None:
    assert re.search(r"group_left \(run\) elastic_lm_run_info|by \(job, instance, run", resolve(alert.expression))


def test_names_are_unique_and_those_of_the_recordings_are_no_metrics() -> None:
    names = [alert.name for alert in ALERTS] + [recording.name for recording in RECORDINGS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"ElasticLm([A-Z][a-z]+)+", alert.name) for alert in ALERTS)
    assert all(re.fullmatch(r"elastic_lm:[a-z_]+:[a-z]+\d+[mh]", recording.name) for recording in RECORDINGS)


@pytest.mark.parametrize(
    ("what", "alerts"),
    [
        ("no step for minutes", ("ElasticLmNoStep",)),
        ("target absent", ("ElasticLmTargetAbsent",)),
        ("non-finite loss", ("ElasticLmLossNotFinite",)),
        ("loss spike", ("ElasticLmLossSpike",)),
        ("a run that went back", ("ElasticLmRewound",)),
        ("throughput drop", ("ElasticLmThroughputDrop",)),
        ("world size below target", ("ElasticLmWorldBelowMinimum", "ElasticLmWorldBelowWanted")),
        ("rescale storm", ("ElasticLmRescaleStorm",)),
        ("checkpoint stale or failing", ("ElasticLmCheckpointStale", "ElasticLmCheckpointFailing")),
        ("data stall", ("ElasticLmDataStall",)),
        ("low goodput", ("ElasticLmGoodputLow",)),
        ("other bits", ("ElasticLmStepMismatch",)),
        ("a run that gave up", ("ElasticLmRunFailed",)),
    ],
)
def test_what_is_to_be_told_has_an_alert(what: str, alerts: tuple[str, ...]) -> None:
    assert set(alerts) <= {alert.name for alert in ALERTS}, what


@pytest.mark.parametrize("expression", ["$no_such_metric > 0", "elastic_lm:no_such_rule:avg5m > 0"])
def test_name_that_nobody_exports_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="no_such"):
        resolve(expression)


def test_names_in_expressions_are_made_full() -> None:
    assert resolve("rate($steps_total[5m]) + elastic_lm:data_wait:rate10m") == (
        "rate(elastic_lm_steps_total[5m]) + elastic_lm:data_wait:rate10m"
    )


def test_expressions_name_metrics_by_the_catalogue_alone() -> None:
    for expression in [alert.expression for alert in ALERTS] + [recording.expression for recording in RECORDINGS]:
        assert PREFIX not in expression, "write $name, so that it is checked"


def test_runbook_shows_what_prometheus_evaluates() -> None:
    for rule in rules()["groups"][0]["rules"]:
        assert rule["expr"] in runbook() or "record" in rule


# -- where to scrape -------------------------------------------------------------------------------------------------


def test_port_is_the_one_that_a_run_listens_on_by_itself() -> None:
    assert MetricsConfig().port == scraping.PORT


def test_pod_monitors_find_the_ports_by_name_and_name_the_jobs_as_the_scrape_config_does() -> None:
    pods = [pod["spec"]["podMetricsEndpoints"] for pod in load("cluster/kuberay/podmonitor.yaml")]
    (config,) = load("cluster/prometheus/prometheus.yaml")
    assert [endpoint["port"] for (endpoint,) in pods] == ["elastic-lm", "metrics"]
    jobs = [endpoint["relabelings"][0]["replacement"] for (endpoint,) in pods]
    assert jobs == [job["job_name"] for job in config["scrape_configs"]]


def test_rules_of_the_operator_are_those_of_the_file() -> None:
    (file,), (resource,) = load("cluster/prometheus/rules.yaml"), load("cluster/kuberay/prometheusrule.yaml")
    assert (resource["kind"], resource["spec"]) == ("PrometheusRule", file)


# -- promtool --------------------------------------------------------------------------------------------------------


@pytest.mark.prometheus
def test_promtool_takes_the_rules() -> None:
    assert f"{len(ALERTS) + len(RECORDINGS)} rules found" in promtool("check", "rules", "cluster/prometheus/rules.yaml")


@pytest.mark.prometheus
def test_promtool_takes_the_scrape_config() -> None:
    assert "SUCCESS" in promtool("check", "config", "cluster/prometheus/prometheus.yaml")


@pytest.mark.prometheus
def test_every_alert_does_what_its_unit_tests_say() -> None:
    assert "SUCCESS" in promtool("test", "rules", "cluster/prometheus/rules_test.yaml")


@pytest.mark.prometheus
def test_promtool_finds_no_fault_with_what_a_run_exports() -> None:
    from elastic_lm.monitor.exporter import Exporter

    exporter = Exporter("a-run", 4)
    for event in HISTORY:
        exporter.observe(event)
    exporter.figures.tell_tasks(TASK_RESULTS)
    assert all(f"# HELP {PREFIX}{name} " in exporter.text() for name in by_name())
    assert promtool("check", "metrics", text=exporter.text()) == ""
