"""Every panel has data: a run that loses a worker and takes in another, and a real Prometheus that scrapes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.runtime.cluster import wait_for
from tests.cluster.prometheus import SCRAPE_S, Prometheus, has_data, scraping
from tests.faults.harness import Run

pytestmark = [pytest.mark.ray, pytest.mark.prometheus]

DASHBOARD = Path(__file__).parents[2] / "cluster/grafana/elastic-lm.json"
# Panels that cannot have data here, and why.
EMPTY = {
    "MFU": "a CPU has no peak that the figure could be a share of",
    "Figures": "nobody asks the model anything alone",
    "Step of the weights": "the same",
}


def filled_in(expression: str, run: Run) -> str:
    """As Grafana sends it: the window is four scrapes."""
    return expression.replace("$__rate_interval", f"{4 * SCRAPE_S}s").replace("$run", run.config.name)


def without_data(board: dict[str, Any], run: Run, server: Prometheus) -> list[str]:
    """Queries of panels that have none, each by panel and legend."""
    empty = []
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            ask = server.now if target["instant"] else server.since_start
            if not has_data(ask(filled_in(target["expr"], run))):
                empty.append(f"{panel['title']}: {target['legendFormat']}")
    return empty


def causes(mark: str, board: dict[str, Any], run: Run, server: Prometheus) -> set[str]:
    """That a mark of the dashboard has told."""
    (expression,) = (found["expr"] for found in board["annotations"]["list"] if found["name"] == mark)
    return {series.labels["cause"] for series in server.since_start(filled_in(expression, run))}


def test_every_panel_has_data_after_a_kill_and_a_join(start: Callable[..., Run], tmp_path: Path) -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    run = start(steps=100_000, evaluation={"every": 100})
    status = run.await_status(lambda status: status.get("metrics_address"), "an endpoint")
    with scraping(tuple(status["metrics_address"]), tmp_path) as server:
        run.await_status(lambda status: status["world_size"] == 3 and status["step"] >= 20, "three workers at work")
        # A counter that has moved before the first scrape of it has not moved for Prometheus.
        wait_for(lambda: has_data(server.now("elastic_lm_loss_nats")), timeout_s=60, what="scrapes", poll_s=0.2)
        killed = run.kill_a_worker()
        run.await_status(
            lambda status: status["world_size"] == 3 and killed not in status["members"], "another worker in its place"
        )
        wait_for(lambda: run.count(EventKind.CHECKPOINT_SAVED), timeout_s=60, what="a checkpoint", poll_s=0.2)

        def all_told() -> bool:
            """And a reason for being empty is wrong as soon as there are data."""
            return (
                causes("Rescales", board, run, server) >= {"failure", "join"}
                and causes("Workers lost", board, run, server) == {"crash"}
                and {told.partition(":")[0] for told in without_data(board, run, server)} == EMPTY.keys()
            )

        try:
            wait_for(all_told, timeout_s=60, what="data in every panel", poll_s=1)
        except TimeoutError as error:
            marked = {mark: causes(mark, board, run, server) for mark in ("Rescales", "Workers lost")}
            raise AssertionError(f"no data: {without_data(board, run, server)}; marked: {marked}") from error
        assert "lease" not in causes("Rescales", board, run, server)  # renewed many times meanwhile
        # Of a run that Prometheus does not know there is nothing.
        unknown = [t["expr"].replace("$run", "nobody") for p in board["panels"] for t in p.get("targets", [])]
        assert not any(has_data(server.now(told.replace("$__rate_interval", "4s"))) for told in unknown)
    run.command("stop", reason="enough")
    assert run.result().verdict == "stopped"
