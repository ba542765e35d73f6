"""The Ray cluster a run joins, or the one it starts and takes down again.

`LocalCluster` puts several logical nodes on one machine: each has its own raylet and its own workers, so that losing a
node is real (SIGKILL to all of its processes) without a second machine. The demo and the tests stand on it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import psutil
import ray

from elastic_lm.errors import ClusterError

NAMESPACE = "elastic_lm"
ON_HEAD = {"node:__internal_head__": 0.001}  # resources that only the head node has

KNOCK_S = 5.0

# A new head looks after its nodes this often. With Ray's defaults a dead node is known after 13 s, with these after 0.8-1.7 s:
# its port refuses at once. A node that is merely busy has 20 s to answer. A run waits for neither (its lifelines are
# faster); placing the replacement does.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 4,
}


def would_be_new() -> bool:
    """Whether `connected` starts a cluster, which counts all that this machine has as free."""
    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def training_here() -> list[int]:
    """Process ids of elastic-lm's workers on this machine, whatever cluster they belong to."""
    return sorted(process.pid for process in psutil.process_iter() if _title(process).startswith("ray::Worker"))


@contextlib.contextmanager
def connected(min_cpus: float = 1.0) -> Iterator[str]:
    """Be connected to a Ray cluster: the one this process has joined already, the one at RAY_ADDRESS, or a new local one.

    Yields: a sentence that says which. Leaves the cluster as it found it: one that was started here is shut down.
    Raises: ClusterError when RAY_ADDRESS names a cluster that cannot be joined.
    """
    if ray.is_initialized():
        yield f"Using the Ray cluster this process has joined ({_describe()})."
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address)
        sentence = f"Joined the Ray cluster at {address} ({_describe()})."
    else:
        _start_local(min_cpus)
        sentence = f"RAY_ADDRESS is not set: started a local Ray cluster ({_describe()})."
    try:
        yield sentence
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    try:
        knock(address)
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"RAY_ADDRESS={address}: cannot join ({error}); start a cluster there with `ray start --head`, "
            "or unset RAY_ADDRESS to train on a local cluster"
        ) from error


def knock(address: str) -> None:
    """Connect and hang up: where nobody listens, Ray would go on trying for minutes.    Raises: OSError or OverflowError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():  # not "auto" and the like
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def _start_local(min_cpus: float) -> None:
    """A cluster of one node, with all CPUs of this machine, and `min_cpus` at least."""
    # Token authentication is Ray's default for a new cluster; it asks for a token file that a first-time user lacks.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(
        "local",  # without it Ray looks for a cluster on this machine and joins somebody else's
        num_cpus=max(os.cpu_count() or 1, math.ceil(min_cpus)),
        namespace=NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _describe() -> str:
    resources = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = f", {resources['GPU']:.0f} GPUs" if resources.get("GPU") else ""
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}, {resources.get('CPU', 0):.0f} CPUs{gpus}"


@dataclass
class LogicalNode:
    """One node of a `LocalCluster`."""

    handle: Any

    @property
    def node_id(self) -> str:
        return str(self.handle.node_id)

    def processes(self) -> list[psutil.Process]:
        """The raylet first, then everything it started."""
        raylets = [info.process.pid for info in self.handle.all_processes.get("raylet", [])]
        found: list[psutil.Process] = []
        for pid in raylets:
            with contextlib.suppress(psutil.NoSuchProcess):
                raylet = psutil.Process(pid)
                found += [raylet, *raylet.children(recursive=True)]
        return found

    def workers(self) -> list[int]:
        """Process ids of the elastic-lm workers on this node."""
        return [p.pid for p in self.processes() if "ray::Worker" in _title(p)]

    def kill(self) -> None:
        """SIGKILL every process of the node at once, as a power cut would."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class LocalCluster:
    """A head without CPUs (it hosts the coordinator) and `num_nodes` nodes of `num_cpus` each, on this machine.

    `dashboard_port`: of a dashboard, which takes jobs; there is none unless given. `node_type` and `node_arguments` (of Ray's
    nodes, beside ours) are for subclasses.
    """

    node_type: type[LogicalNode] = LogicalNode
    node_arguments: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self,
        num_nodes: int,
        *,
        num_cpus: int = 1,
        object_store_bytes: int = 200_000_000,
        dashboard_port: int | None = None,
    ) -> None:
        from ray.cluster_utils import Cluster

        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        self._num_cpus, self._object_store_bytes = num_cpus, object_store_bytes
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": dashboard_port is not None,
                "dashboard_port": dashboard_port,
                "object_store_memory": object_store_bytes,
                "_system_config": dict(HEALTH_CHECKS),  # which Ray adds to
                **self.node_arguments,
            },
        )
        self.address: str = self._cluster.address
        self.head = self.node_type(self._cluster.head_node)
        self.nodes: list[LogicalNode] = [self.add_node() for _ in range(num_nodes)]

    def connect(self) -> None:
        ray.init(address=self.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)

    def add_node(self) -> LogicalNode:
        """Start one more node and wait until it is up (3-4 s)."""
        options = {"num_cpus": self._num_cpus, "object_store_memory": self._object_store_bytes, **self.node_arguments}
        node = self.node_type(self._cluster.add_node(**options))
        if hasattr(self, "nodes"):
            self.nodes.append(node)
        return node

    def shutdown(self) -> None:
        """Disconnect and end every process of the cluster, the frozen ones too."""
        processes = [process for node in self.nodes for process in node.processes()]
        ray.shutdown()
        self._cluster.shutdown()
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=5)

    def __enter__(self) -> LocalCluster:
        self.connect()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()


def wait_for(condition: Any, *, timeout_s: float, what: str, poll_s: float = 0.02) -> Any:
    """Poll until `condition()` is truthy and return its value.    Raises: TimeoutError naming `what` was awaited."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(poll_s)
