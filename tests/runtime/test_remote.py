"""Commands from outside reach a run that trains, and say what is wrong when they cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic_lm.errors import ClusterError, ConfigError
from elastic_lm.events.types import EventKind
from elastic_lm.runtime import remote
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from tests.faults.harness import Run

pytestmark = pytest.mark.ray


def test_run_is_scaled_drained_and_stopped_from_outside(start: Callable[..., Run], cluster: LocalCluster) -> None:
    run = start(steps=1_000_000, workers={"min": 1, "max": 1})
    run.await_step(3)
    name = run.config.name
    assert remote.command(name, "scale", {"min_workers": 1, "max_workers": 2}) == ""
    members = run.await_status(lambda status: status["world_size"] == 2, "two workers")["members"]
    node_id = members["w0"]["node_id"]
    with pytest.raises(ConfigError, match="0 nodes with workers of this run have an id that begins with 'nowhere'"):
        remote.command(name, "drain", {}, node="nowhere")
    assert remote.command(name, "drain", {}, node=node_id[:10]) == node_id
    wait_for(lambda: run.count(EventKind.MEMBER_LEFT), timeout_s=30, what="the node's workers left")
    assert run.count(EventKind.MEMBER_LOST) == 0
    remote.command(name, "stop", {"reason": "asked by a person"})
    result = run.result()
    assert result.verdict == "stopped"
    assert "asked by a person" in result.message


def test_run_that_is_not_trained_here_is_named(cluster: LocalCluster) -> None:
    with pytest.raises(ClusterError, match="run nobody is not being trained on this cluster"):
        remote.command("nobody", "stop", {"reason": "test"})
