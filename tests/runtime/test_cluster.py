"""Joining a cluster or starting one: said in a sentence, undone at the end, and quick to say when it cannot be."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import ray

from elastic_lm.errors import ClusterError
from elastic_lm.runtime.cluster import LocalCluster, connected, wait_for

CONNECT = """
import ray
from elastic_lm.runtime.cluster import connected
with connected(7.5) as sentence:
    print(sentence, ray.cluster_resources()["CPU"])
print(ray.is_initialized())
"""


def connect(address: str | None) -> subprocess.CompletedProcess[str]:
    """Connect in a process of its own, as a driver does."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    if address is not None:
        environment["RAY_ADDRESS"] = address
    return subprocess.run([sys.executable, "-c", CONNECT], env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.ray
def test_without_an_address_a_local_cluster_is_started_even_beside_another(cluster: LocalCluster) -> None:
    cpus = max(os.cpu_count() or 1, 8)  # the caller needs 7.5
    done = connect(None)
    assert done.stdout.splitlines() == [
        f"RAY_ADDRESS is not set: started a local Ray cluster (1 node, {cpus} CPUs). {cpus}.0",
        "False",
    ], done.stderr


@pytest.mark.ray
def test_driver_joins_the_cluster_at_its_address_and_leaves_it_running(cluster: LocalCluster) -> None:
    done = connect(cluster.address)
    sentence, left = done.stdout.splitlines()
    assert sentence.startswith(f"Joined the Ray cluster at {cluster.address} (4 nodes, 6 CPUs).")
    assert left == "False"
    assert len([node for node in ray.nodes() if node["Alive"]]) == 4


@pytest.mark.ray
def test_process_that_has_joined_already_stays_in_its_cluster(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # nobody's: it is not asked
    with connected() as sentence:
        assert sentence == "Using the Ray cluster this process has joined (4 nodes, 6 CPUs)."
    assert ray.is_initialized()


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:{free}", "ray://127.0.0.1:{free}", "no-such-host.invalid:6379", "127.0.0.1:99999", "127.0.0.1:x", "?"],
)
def test_address_where_nobody_listens_is_refused_with_a_remedy(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: pytest.fail("left a cluster that was not joined"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    address = address.format(free=free)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterError) as caught, connected():
        pass
    message = str(caught.value)
    assert message.startswith(f"RAY_ADDRESS={address}: cannot join (")
    assert "start a cluster there with `ray start --head`, or unset RAY_ADDRESS" in message


@pytest.mark.ray
def test_lost_node_is_all_of_its_processes_and_another_can_be_added(cluster: LocalCluster) -> None:
    node = cluster.add_node()
    assert node in cluster.nodes
    processes = node.processes()
    assert len(processes) > 1 and "raylet" in processes[0].cmdline()[0]
    node.kill()
    cluster.nodes.remove(node)
    gone, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive
    wait_for(lambda: node.node_id not in living_nodes(), timeout_s=30, what="the cluster knows")


def living_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def test_wait_returns_the_value_that_it_waited_for() -> None:
    come = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait_for, lambda: come.is_set() and "value", timeout_s=10, what="it")
        come.set()
        assert waiting.result(10) == "value"


def test_wait_in_vain_names_what_was_awaited() -> None:
    with pytest.raises(TimeoutError, match="the moon: not within 0 s"):
        wait_for(lambda: None, timeout_s=0, what="the moon")
