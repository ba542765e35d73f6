"""A node that Ray is told to drain is noticed once, with its deadline; a dead one is told to who asked after it."""

from __future__ import annotations

import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic_lm.runtime.cluster import LocalCluster, LogicalNode
from elastic_lm.runtime.nodes import POLL_S, NodeWatcher, draining_nodes

pytestmark = pytest.mark.ray

WAIT_S = 90.0
DEADLINE_S = 600


class Busy:
    def locate(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


@pytest.fixture
def leaving(cluster: LocalCluster) -> Iterator[LogicalNode]:
    """A node to drain, with an actor on it (one that is idle goes at once); gone afterwards."""
    node = cluster.add_node()
    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    actor = ray.remote(Busy).options(num_cpus=1, scheduling_strategy=there).remote()
    assert ray.get(actor.locate.remote(), timeout=WAIT_S) == node.node_id
    yield node
    node.kill()
    cluster.nodes.remove(node)


def drain(cluster: LocalCluster, node: LogicalNode) -> None:
    """As an operator or a preemption handler does it."""
    command = [
        Path(sys.executable).with_name("ray"), "drain-node", "--address", cluster.address, "--node-id", node.node_id,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test",
        "--deadline-remaining-seconds", str(DEADLINE_S),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)


def test_drained_node_is_noticed_once_with_its_deadline(cluster: LocalCluster, leaving: LogicalNode) -> None:
    notices: queue.Queue[tuple[str, float]] = queue.Queue()
    watcher = NodeWatcher(lambda node_id, deadline: notices.put((node_id, deadline)), on_lost=lambda _: None)
    try:
        assert draining_nodes() == {}
        before = time.time()
        drain(cluster, leaving)
        node_id, deadline = notices.get(timeout=WAIT_S)
        assert node_id == leaving.node_id
        assert before + DEADLINE_S <= deadline + 1 and deadline <= time.time() + DEADLINE_S
        assert draining_nodes() == {node_id: deadline}
    finally:
        watcher.close()
    assert notices.empty()


def test_watcher_that_comes_later_is_told_too(cluster: LocalCluster, leaving: LogicalNode) -> None:
    drain(cluster, leaving)
    notices: queue.Queue[str] = queue.Queue()
    watcher = NodeWatcher(lambda node_id, deadline: notices.put(node_id), on_lost=lambda _: None)
    try:
        assert notices.get(timeout=WAIT_S) == leaving.node_id
    finally:
        watcher.close()


def test_dead_node_is_told_to_who_asked_after_it_and_a_living_one_is_not(cluster: LocalCluster) -> None:
    node = cluster.add_node()
    told: queue.Queue[str] = queue.Queue()
    watcher = NodeWatcher(on_draining=lambda *_: None, on_lost=told.put)
    try:
        watcher.ask_after(cluster.head.node_id)
        watcher.ask_after(node.node_id)
        with pytest.raises(queue.Empty):  # both live: a few looks find nothing to tell
            told.get(timeout=3 * POLL_S)
        node.kill()
        assert told.get(timeout=WAIT_S) == node.node_id
        with pytest.raises(queue.Empty):  # once
            told.get(timeout=3 * POLL_S)
    finally:
        watcher.close()
        cluster.nodes.remove(node)
