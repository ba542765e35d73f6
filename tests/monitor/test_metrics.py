"""The catalogue: names that keep the rules, everything that a run is to tell, and a document that is up to date."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.monitor.figures import COUNTED
from elastic_lm.monitor.metrics import (
    CATALOGUE,
    CAUSES,
    LOSSES,
    PHASES,
    PREFIX,
    STEP_STATISTICS,
    VERDICTS,
    WORKER_STATISTICS,
    Metric,
    by_name,
    markdown,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
LABEL_VALUES = (*CAUSES, *LOSSES, *PHASES, *VERDICTS, *STEP_STATISTICS, *WORKER_STATISTICS)
BASE_UNITS = {"", "s", "nats", "steps", "tokens", "tokens/s", "workers", "nodes", "readers", "nats/byte"}
LABELS = {
    "run",
    "version",
    "verdict",
    "cause",
    "phase",
    "statistic",
    "task",
    "figure",
}  # of the last two MOST_TASKS have values
each_metric = pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)


def test_document_is_what_the_catalogue_says() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(), "docs/metrics.md is out of date: make docs"


def test_module_prints_the_document() -> None:
    command = [sys.executable, "-m", "elastic_lm.monitor.metrics"]
    assert subprocess.run(command, capture_output=True, check=True, text=True, timeout=50).stdout == markdown()


def test_document_names_every_metric_and_every_label_value() -> None:
    for word in (*(f"`{PREFIX}{name}`" for name in by_name()), *LABEL_VALUES):
        assert word in markdown()


def test_names_are_unique() -> None:
    assert len(by_name()) == len(CATALOGUE)


@each_metric
def test_name_is_one_that_prometheus_takes(metric: Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z_]*[a-z]", metric.name)
    assert "__" not in metric.name
    assert not metric.name.startswith(PREFIX)


@each_metric
def test_counters_and_only_counters_end_with_total(metric: Metric) -> None:
    assert metric.name.endswith("_total") == (metric.kind == "counter")


@each_metric
def test_units_are_base_units_and_the_name_says_them(metric: Metric) -> None:
    assert metric.unit in BASE_UNITS
    assert not re.search(r"_(ms|us|ns|milliseconds|minutes|hours|kb|mb|mib|percent)(_|$)", metric.name)
    name = metric.name.removesuffix("_total")
    if metric.unit == "s":
        assert name.endswith("_seconds")
    if metric.unit == "nats":
        assert name.endswith("_nats")
    if metric.unit == "tokens/s":
        assert name.endswith("_per_second")
    if name.endswith("_ratio"):
        assert metric.unit == "" and "0 to 1" in metric.help


@each_metric
def test_labels_have_few_values(metric: Metric) -> None:
    assert len(metric.labels) <= 2
    assert set(metric.labels) <= LABELS  # never a step, a path, a sample or a member
    assert all(re.fullmatch(r"[a-z_0-9]+", value) for value in LABEL_VALUES)


@each_metric
def test_help_is_a_sentence_in_one_line(metric: Metric) -> None:
    assert metric.help.endswith(".") and metric.help[0].isupper()
    assert "\n" not in metric.help and "|" not in metric.help  # the document is a table


@pytest.mark.parametrize(
    ("what", "name", "kind", "labels"),
    [
        ("loss", "loss_nats", "gauge", ()),
        ("tokens so far", "tokens_total", "counter", ()),
        ("throughput", "tokens_per_second", "gauge", ()),
        ("step", "step", "gauge", ()),
        ("world size", "world_size", "gauge", ()),
        ("generation", "generation", "gauge", ()),
        ("rescales by cause", "rescales_total", "counter", ("cause",)),
        ("time lost by cause", "lost_seconds_total", "counter", ("cause",)),
        ("goodput", "goodput_ratio", "gauge", ()),
        ("waiting for data", "data_wait_seconds_total", "counter", ()),
        ("step time", "step_seconds", "gauge", ()),
        ("step time of late", "recent_step_seconds", "gauge", ("statistic",)),
        ("workers compared", "worker_micro_batch_seconds", "gauge", ("statistic",)),
        ("least workers", "workers_min", "gauge", ()),
        ("most workers", "workers_max", "gauge", ()),
        ("length of the run", "steps_planned", "gauge", ()),
        ("verdict", "run_ended", "gauge", ("run", "verdict")),
    ],
)
def test_what_a_run_is_to_tell_is_there(what: str, name: str, kind: str, labels: tuple[str, ...]) -> None:
    metric = by_name()[name]
    assert (metric.kind, metric.labels) == (kind, labels), what


def test_events_that_are_counted_have_counters_without_labels() -> None:
    for kind, name in COUNTED.items():
        assert isinstance(kind, EventKind)
        assert (by_name()[name].kind, by_name()[name].labels) == ("counter", ())
