"""Bad and leaving nodes: quarantine for one that keeps losing workers, none for one that was announced to go."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from tests.faults.harness import Run, assert_same_bits

pytestmark = pytest.mark.ray


@pytest.mark.thorough
def test_flapping_node_is_quarantined_and_the_run_goes_on_elsewhere(
    start: Callable[..., Run], cluster: LocalCluster
) -> None:
    limit = 3
    run = start(
        steps=100_000,
        workers={"min": 1, "max": 5},
        control={"backoff_base_s": 0.05, "backoff_limit_s": 0.1, "quarantine_failures": limit},
    )
    status = run.await_status(lambda s: s["world_size"] == 5, "five workers at work")
    nodes = [member["node_id"] for member in status["members"].values()]
    bad = max(nodes, key=nodes.count)  # the other two nodes have room for four: a replacement comes here

    def kill_on_bad_node() -> bool:
        for member in run.status()["members"].values():
            if member["node_id"] == bad and member["state"] in ("ready", "active"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member["pid"], signal.SIGKILL)
                time.sleep(0.3)
        return run.count(EventKind.NODE_QUARANTINED) > 0

    wait_for(kill_on_bad_node, timeout_s=90, what="the quarantine", poll_s=0.2)
    status = run.await_status(
        lambda s: s["world_size"] == 4 and all(m["node_id"] != bad for m in s["members"].values()),
        "four workers on other nodes",
    )
    run.command("stop", reason="enough")
    assert run.result().verdict == "stopped"
    lost = [event for event in run.events() if event.kind is EventKind.MEMBER_LOST and event.fields["node_id"] == bad]
    assert len(lost) >= limit


def test_announced_drain_of_a_node_recomputes_nothing(start: Callable[..., Run], cluster: LocalCluster) -> None:
    run = start(steps=60, workers={"min": 2, "max": 2}, held_at=20)
    status = run.await_status(lambda s: s["world_size"] == 2 and s["step"] >= 20, "two workers at work")
    leaving = sorted(status["members"].values(), key=lambda member: member["pid"])[0]["node_id"]
    run.command("drain", node_id=leaving)
    run.await_status(lambda s: any(member["leaving"] for member in s["members"].values()), "a worker that leaves")
    result = run.result()
    assert_same_bits(run, result)
    assert run.count(EventKind.MEMBER_LEFT) >= 1
    assert run.count(EventKind.MEMBER_LOST) == 0
    broken = [
        event for event in run.events() if event.kind is EventKind.REFORMED and event.fields["cause"] == "failure"
    ]
    assert not broken


def test_dead_node_is_told_with_its_workers(start: Callable[..., Run], cluster: LocalCluster) -> None:
    run = start(steps=100_000, workers={"min": 1, "max": 2})
    status = run.await_status(lambda s: s["world_size"] == 2 and s["step"] >= 5, "two workers at work")
    member_id, member = min(status["members"].items())
    node = next(node for node in cluster.nodes if node.node_id == member["node_id"])
    there = sorted(m for m, found in status["members"].items() if found["node_id"] == node.node_id)
    node.kill()
    cluster.nodes.remove(node)
    wait_for(lambda: run.count(EventKind.NODE_LOST), timeout_s=60, what="the news of the node", poll_s=0.2)
    run.command("stop", reason="enough")
    assert run.result().verdict == "stopped"
    (event,) = [event for event in run.events() if event.kind is EventKind.NODE_LOST]
    assert event.fields == {"node_id": node.node_id, "members": there}
    assert member_id in event.message
