"""A real Prometheus scrapes a run: every series arrives, every rule can be evaluated, and the end of the run is seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.monitor.alerts import ALERTS, RECORDINGS
from elastic_lm.monitor.exporter import Exporter
from elastic_lm.monitor.metrics import PREFIX, by_name
from elastic_lm.monitor.rules import resolve
from elastic_lm.runtime.cluster import wait_for
from tests.cluster.prometheus import Prometheus, scraping
from tests.faults.harness import Run
from tests.monitor.story import HISTORY, TASK_RESULTS, at, committed

pytestmark = pytest.mark.prometheus
ABSENT = next(resolve(alert.expression) for alert in ALERTS if alert.name == "ElasticLmTargetAbsent")


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    """Of a run that has eight steps behind it."""
    exporter = Exporter("a-run", 4)
    for event in HISTORY:
        exporter.observe(event)
    exporter.figures.tell_tasks(TASK_RESULTS)
    exporter.open("127.0.0.1", 0)
    yield exporter
    exporter.close()


def target_of(exporter: Exporter) -> tuple[str, int]:
    assert exporter.address is not None
    return exporter.address


def assert_every_rule_works(prometheus: Prometheus) -> None:
    found = prometheus.rules()
    assert {rule["name"] for rule in found} == {rule.name for rule in (*ALERTS, *RECORDINGS)}
    assert {rule["name"]: rule.get("lastError") for rule in found if rule["health"] != "ok"} == {}


def firing(prometheus: Prometheus) -> set[str]:
    return {dict(labels)["alertname"] for labels in prometheus.query('ALERTS{alertstate="firing"}')}


def test_every_series_arrives_and_every_rule_has_a_value(exporter: Exporter, tmp_path: Path) -> None:
    with scraping(target_of(exporter), tmp_path) as prometheus:
        assert prometheus.await_value("elastic_lm_steps_total == 8") == 8
        for step in range(8, 12):
            exporter.observe(committed(14 + step, step, world_size=1, step_s=2.0))
        assert prometheus.await_value("elastic_lm_steps_total == 12") == 12
        names = set(prometheus.get("label/__name__/values"))
        assert {PREFIX + name for name in by_name()} <= names
        for recording in RECORDINGS:
            prometheus.await_value(f"{recording.name} >= 0")  # at first a ratio of nothing to nothing, which is none
        assert_every_rule_works(prometheus)
        assert firing(prometheus) == set()


def test_alert_fires_with_the_name_of_the_run(exporter: Exporter, tmp_path: Path) -> None:
    with scraping(target_of(exporter), tmp_path) as prometheus:
        prometheus.await_value("elastic_lm_step_mismatches_total == 0")
        exporter.observe(at(20, EventKind.STEP_MISMATCH, step=3, logged={}, told={}))
        prometheus.await_value('ALERTS{alertname="ElasticLmStepMismatch",alertstate="firing",run="a-run"}')
        told = {"ElasticLmStepMismatch"}
        wait_for(lambda: firing(prometheus) == told, timeout_s=60, what="that alert alone", poll_s=0.2)


def test_end_of_a_run_is_seen_before_its_endpoint_is_gone(exporter: Exporter, tmp_path: Path) -> None:
    """An answer that Prometheus does not wait for would be seen by nobody: it has three seconds, on a busy machine."""
    with scraping(target_of(exporter), tmp_path, scrape_s=3) as prometheus:
        prometheus.await_value("count_over_time(elastic_lm_steps_total[1m]) >= 3")
        exporter.observe(at(20, EventKind.RUN_FINISHED, step=8, verdict="done", reason="trained 8 steps"))
        exporter.close()
        prometheus.await_value('up{job="elastic-lm"} == 0')
        assert prometheus.value('last_over_time(elastic_lm_run_ended{verdict="done"}[5m])') == 1
        assert prometheus.query(ABSENT) == {}


def test_target_that_goes_without_a_verdict_is_absent(exporter: Exporter, tmp_path: Path) -> None:
    with scraping(target_of(exporter), tmp_path) as prometheus:
        prometheus.await_value("count_over_time(elastic_lm_steps_total[1m]) >= 3")
        exporter.close()
        prometheus.await_value('up{job="elastic-lm"} == 0')
        (labels,) = prometheus.query(ABSENT)
        assert dict(labels)["run"] == "a-run"


@pytest.mark.ray
def test_run_on_a_cluster_is_scraped_to_its_end(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(steps=1_000_000)
    address = run.await_status(lambda status: status.get("metrics_address"), "an endpoint")["metrics_address"]
    with scraping(tuple(address), tmp_path, scrape_s=3) as prometheus:
        run.await_step(20)
        prometheus.await_value("elastic_lm_steps_total > 20")
        for recording in RECORDINGS:
            prometheus.await_value(f"{recording.name} >= 0")  # at first a ratio of nothing to nothing, which is none
        prometheus.await_value("elastic_lm_steps_planned == 1000000")
        prometheus.await_value("count_over_time(elastic_lm_steps_total[1m]) >= 3")  # it comes regularly
        run.command("stop", reason="it was scraped")
        assert run.result().verdict == "stopped"
        prometheus.await_value('up{job="elastic-lm"} == 0')
        assert prometheus.value('last_over_time(elastic_lm_run_ended{verdict="stopped"}[5m])') == 1
        assert prometheus.value("last_over_time(elastic_lm_steps_total[5m])") == len(run.committed())
        assert prometheus.query(ABSENT) == {}
        assert_every_rule_works(prometheus)
        assert firing(prometheus) == set()
