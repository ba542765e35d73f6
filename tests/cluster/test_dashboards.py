"""The dashboard: what Grafana's schema takes, up to date, every metric of the catalogue in it, and one run told from another."""

from __future__ import annotations

import copy
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models import units
from jsonschema import Draft7Validator

from elastic_lm.monitor.metrics import CATALOGUE, PREFIX, by_name
from elastic_lm.monitor.panels import MARKS, ROWS, Panel

ROOT = Path(__file__).parents[2]
FILE = "cluster/grafana/elastic-lm.json"
PROVISIONING = ROOT / "cluster/grafana/provisioning"
COMMAND = "elastic_lm.monitor.dashboards"
PANELS = [panel for row in ROWS for panel in row.panels]
each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return dict(json.loads((ROOT / FILE).read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def schema() -> Draft7Validator:
    text = Path(__file__).with_name("grafana-schema.json").read_text(encoding="utf-8")
    return Draft7Validator(json.loads(text))


def expressions(board: dict[str, Any]) -> Iterator[str]:
    """Of all panels and of the marks."""
    yield from (target["expr"] for panel in board["panels"] for target in panel.get("targets", []))
    yield from (mark["expr"] for mark in board["annotations"]["list"])


def filled_in(expression: str, run: str = "a-run", window: str = "1m") -> str:
    """As Grafana sends it."""
    return expression.replace("$__rate_interval", window).replace("$run", run)


# -- the file --------------------------------------------------------------------------------------------------------


def test_file_is_what_the_module_prints() -> None:
    command = [sys.executable, "-m", COMMAND]
    printed = subprocess.run(command, capture_output=True, check=True, text=True, timeout=50, cwd=ROOT).stdout
    assert (ROOT / FILE).read_text(encoding="utf-8") == printed, f"{FILE} is out of date: make cluster"


def test_make_writes_the_file() -> None:
    assert f"\t$(BIN)/python -m {COMMAND} > {FILE}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_grafanas_schema_takes_it(board: dict[str, Any], schema: Draft7Validator) -> None:
    assert [f"{list(error.path)}: {error.message}" for error in schema.iter_errors(board)] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda board: board.pop("schemaVersion"),
        lambda board: board.update(rows=[]),  # as Grafana had it long ago
        lambda board: board["panels"][1].pop("targets"),
        lambda board: board["panels"][1].update(type="singlestat"),  # no longer a panel
        lambda board: board["panels"][1]["gridPos"].update(w="3"),
        lambda board: board["panels"][1]["options"].update(graphMode="lines"),
        lambda board: board["panels"][1]["fieldConfig"]["defaults"].update(custom={"fillOpacity": 10}),  # of a graph
        lambda board: board["panels"][1]["targets"][0].pop("refId"),
        lambda board: board["templating"]["list"][0].update(type="list"),
        lambda board: board["annotations"]["list"][0].pop("iconColor"),
    ],
)  # fmt: skip
def test_schema_refuses_what_is_wrong(
    board: dict[str, Any], schema: Draft7Validator, damage: Callable[[dict[str, Any]], Any]
) -> None:
    damaged = copy.deepcopy(board)
    damage(damaged)
    assert not schema.is_valid(damaged)


def test_panels_have_ids_of_their_own_and_cover_one_another_nowhere(board: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        taken |= cells


def test_rows_leave_no_gap(board: dict[str, Any]) -> None:
    """Full rows, and the next heading right below."""
    places = [panel["gridPos"] for panel in board["panels"]]
    assert sum(place["w"] * place["h"] for place in places) == 24 * max(place["y"] + place["h"] for place in places)


def test_every_query_has_its_letter_and_asks_the_chosen_prometheus(board: dict[str, Any]) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in board["panels"]:
        letters = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(letters)) == len(letters)
        assert all(target["datasource"] == chosen for target in panel.get("targets", []))
        assert panel["type"] == "row" or panel["datasource"] == chosen
    assert all(mark["datasource"] == chosen for mark in board["annotations"]["list"])


def test_every_variable_that_is_used_is_there(board: dict[str, Any]) -> None:
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    assert used == variables | {"__rate_interval"}


# -- what it shows ---------------------------------------------------------------------------------------------------


def test_every_metric_is_shown(board: dict[str, Any]) -> None:
    shown = set(re.findall(rf"{PREFIX}(\w+)", " ".join(expressions(board))))
    assert shown == {metric.name for metric in CATALOGUE}


def test_every_label_is_one_of_its_metrics(board: dict[str, Any]) -> None:
    for expression in expressions(board):
        for label, name in re.findall(rf"by \((\w+)\) \((?:\w+\()?{PREFIX}(\w+)", expression):
            assert label in by_name()[name].labels
        for name, label in re.findall(rf"{PREFIX}(\w+){{(\w+)!?[=~]", expression):
            assert label in by_name()[name].labels


def test_every_query_is_of_the_chosen_run(board: dict[str, Any]) -> None:
    for expression in expressions(board):
        metrics = [name for name in re.findall(rf"{PREFIX}(\w+)", expression) if name != "run_info"]
        assert expression.count(f'and on (job, instance) {PREFIX}run_info{{run="$run"}}') == len(metrics) > 0


@each_panel
def test_panel_is_explained_and_its_unit_is_known(panel: Panel) -> None:
    known = {unit for name, unit in vars(units).items() if isinstance(unit, str) and not name.startswith("_")}
    assert panel.description.endswith(".") and panel.description[0].isupper()
    assert panel.unit in known or panel.unit.startswith("si:")
    assert list(panel.limits) == sorted(panel.limits)
    assert len({query.legend for query in panel.queries}) == len(panel.queries)


def test_number_is_red_only_where_a_limit_says_so(board: dict[str, Any]) -> None:
    limits = {panel.title: panel.limits for panel in PANELS}
    for panel in board["panels"]:
        if panel["type"] != "row":
            steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
            assert steps[0]["value"] is None
            told = [(step["value"], step["color"]) for step in steps[1:]]
            assert told == list(limits[panel["title"]][1:])


def test_rescales_and_losses_are_marked_with_their_cause(board: dict[str, Any]) -> None:
    marks = {mark["name"]: mark for mark in board["annotations"]["list"]}
    assert marks.keys() == {mark.name for mark in MARKS} == {"Rescales", "Workers lost"}
    assert all(mark["enable"] and mark["textFormat"] == "{{cause}}" for mark in marks.values())
    # A lease's renewal comes every few seconds.
    assert (
        'by (cause) (increase(elastic_lm_rescales_total{cause!~"lease|checkpoint|evaluation"}['
        in marks["Rescales"]["expr"]
    )


# -- as Prometheus takes it ------------------------------------------------------------------------------------------


def promtool(command: str, document: dict[str, Any], folder: Path) -> str:
    """What it says of the document.    Fails when it does not take it."""
    path = folder / "promtool.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    done = subprocess.run(["promtool", *command.split(), path], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.prometheus
def test_promtool_parses_every_expression(board: dict[str, Any], tmp_path: Path) -> None:
    rules = [
        {"record": f"expression:{number}", "expr": filled_in(expression)}
        for number, expression in enumerate(expressions(board))
    ]
    told = promtool("check rules", {"groups": [{"name": "dashboard", "rules": rules}]}, tmp_path)
    assert f"{len(rules)} rules found" in told
    assert len(rules) > 50


HEAD, OTHER = 'job="elastic-lm",instance="head:9464"', 'job="elastic-lm",instance="other:9464"'


@pytest.mark.prometheus
@pytest.mark.parametrize(
    ("run", "minute", "loss"),
    [
        ("first", 2, 3.0),
        ("first", 7, None),  # the next run's endpoint has its port
        ("second", 2, None),
        ("second", 7, 5.0),
        ("moved", 2, 7.0),
        ("moved", 7, 8.0),  # its coordinator is on another node
        ("twice", 7, 9.0),  # scraped by two jobs
    ],
)
def test_runs_on_one_prometheus_are_told_apart(run: str, minute: int, loss: float | None, tmp_path: Path) -> None:
    series = {
        f'run_info{{{HEAD},run="first"}}': "1x4 stale",
        f'run_info{{{HEAD},run="second"}}': "_x5 1x5",
        f"loss_nats{{{HEAD}}}": "3x4 _ 5x5",
        'run_info{job="elastic-lm",instance="old:9464",run="moved"}': "1x4 stale",
        'loss_nats{job="elastic-lm",instance="old:9464"}': "7x4 stale",
        f'run_info{{{OTHER},run="moved"}}': "_x5 1x5",
        f"loss_nats{{{OTHER}}}": "_x5 8x5",
        'run_info{job="a",instance="c:1",run="twice"}': "1x10",
        'run_info{job="b",instance="c:1",run="twice"}': "1x10",
        'loss_nats{job="a",instance="c:1"}': "9x10",
        'loss_nats{job="b",instance="c:1"}': "9x10",
    }
    (panel,) = (panel for panel in PANELS if panel.title == "Loss")
    expected = [] if loss is None else [{"labels": "{}", "value": loss}]
    check = {
        "expr": filled_in(panel.queries[0].expression, run),
        "eval_time": f"{minute}m",
        "exp_samples": expected,
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": PREFIX + name, "values": values} for name, values in series.items()],
        "promql_expr_test": [check],
    }
    promtool("test rules", {"rule_files": [], "tests": [test]}, tmp_path)


@pytest.mark.prometheus
def test_goodput_of_late_is_the_whole_runs_while_nothing_changes_and_falls_when_tokens_do(tmp_path: Path) -> None:
    """600 tokens a minute of two workers, goodput 0.8; then half as many tokens, with the same workers."""
    (panel,) = (panel for panel in PANELS if panel.title == "Goodput")
    series = {
        f'run_info{{{HEAD},run="a-run"}}': "1x20",
        f"tokens_total{{{HEAD}}}": "0+600x10 6300+300x9",
        f"held_worker_seconds_total{{{HEAD}}}": "0+120x20",
        # Of the whole run: useful worker-seconds at an undisturbed rate of 6.25 tokens per worker-second.
        f"goodput_ratio{{{HEAD}}}": "0.8x20",
    }
    late = filled_in(panel.queries[1].expression, window="4m")
    # At 20 minutes 9,000 tokens of 2,400 held seconds: with 0.8 that is 4.6875 tokens per undisturbed worker-second.
    expected = {5: 0.8, 10: 0.8, 20: 300 / 120 / (9000 / 2400 / 0.8)}
    checks = [
        {
            "expr": f"round({late}, 0.0001)",
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": "{}", "value": round(value, 4)}],
        }
        for minute, value in expected.items()
    ]
    test = {
        "interval": "1m",
        "input_series": [{"series": PREFIX + name, "values": values} for name, values in series.items()],
        "promql_expr_test": checks,
    }
    promtool("test rules", {"rule_files": [], "tests": [test]}, tmp_path)


# -- provisioning ----------------------------------------------------------------------------------------------------


def provisioned(path: str) -> dict[str, Any]:
    return dict(yaml.safe_load((PROVISIONING / path).read_text(encoding="utf-8")))


def test_provisioned_source_is_a_prometheus_that_the_dashboard_can_choose(board: dict[str, Any]) -> None:
    (source,) = provisioned("datasources/prometheus.yaml")["datasources"]
    (variable,) = (variable for variable in board["templating"]["list"] if variable["type"] == "datasource")
    assert source["type"] == variable["query"] == "prometheus"
    # Else a window holds fewer than two scrapes, and a rate nothing.
    assert {source["jsonData"]["timeInterval"]} == {mark["step"] for mark in board["annotations"]["list"]}


def test_provisioned_dashboards_are_those_of_a_folder() -> None:
    document = provisioned("dashboards/elastic-lm.yaml")
    (provider,) = document["providers"]
    assert document["apiVersion"] == 1
    assert provider["type"] == "file"
    assert provider["options"]["path"] in (ROOT / "docs/operations.md").read_text(encoding="utf-8")
