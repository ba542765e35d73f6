"""A Ray head as `ray start` makes it: processes of its own, a dashboard and a job server.

Where a fork server runs (the fixture `forks`), it and its nodes have their workers forked.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from elastic_lm.runtime.cluster import HEALTH_CHECKS, wait_for
from tests.forking.cluster import with_workers
from tests.forking.launcher import ADDRESS

START_S = 120
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
ROOT = Path(__file__).parents[2]


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [found.getsockname()[1] for found in sockets]


@dataclass(frozen=True)
class Head:
    """`address` of the job server, `gcs` of the cluster. `environment`: of all that belongs to it. `folder`: its logs too."""

    address: str
    gcs: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    folder: Path

    def processes(self) -> list[psutil.Process]:
        """That its nodes have on this machine."""
        return with_workers(psutil.Process(self.process.pid).children(recursive=True))


@contextlib.contextmanager
def running_head(
    num_cpus: int, token: str | None = None, *, gcs: int | None = None, flags: Sequence[str] = (), **more: str
) -> Iterator[Head]:
    """A head whose nodes find the `elastic-lm` of this source tree on their PATH.

    `token`: who has none is refused. `gcs`: its port, any unless given. `flags` and `more` (environment): of its `ray start`.
    """
    found, dashboard, client = free_ports(3)
    gcs = gcs or found
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled" if token is None else "token",
        **({} if token is None else {"RAY_AUTH_TOKEN": token}),
        **more,
    }
    environment.pop("RAY_ADDRESS", None)
    options = {
        "port": gcs,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
    }
    with tempfile.TemporaryDirectory(prefix="head-") as folder:
        always = ["--head", f"--temp-dir={folder}", f"--system-config={json.dumps(HEALTH_CHECKS)}"]
        with _started([*always, *_flags(options), *flags], num_cpus, environment) as process:
            head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment, process, Path(folder))
            wait_for(
                lambda: process.poll() is not None or _answers(head),
                timeout_s=START_S,
                what="the job server answers",
                poll_s=0.2,
            )
            assert process.poll() is None, "the head ended as it began"
            yield head


@contextlib.contextmanager
def running_node(head: Head, num_cpus: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """One more node, as `ray start --block` makes it, once it is up: two that start at once take each other's ports."""
    before = nodes(head)
    with _started([f"--address={head.gcs}"], num_cpus, {**head.environment, **environment}) as process:
        wait_for(lambda: nodes(head) - before, timeout_s=START_S, what="the node is up", poll_s=0.2)
        yield process


@contextlib.contextmanager
def autoscaled_head(max_nodes: int, idle_s: float) -> Iterator[Head]:
    """A head that starts nodes of one CPU when something waits for them, and ends those that are idle for so long.

    Ray's own stand-in for a cloud: the nodes are processes of this machine, the autoscaler is the real one.
    """
    (gcs,) = free_ports(1)
    types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": max_nodes},
    }
    config = {
        "cluster_name": "fake",
        "max_workers": max_nodes,
        "idle_timeout_minutes": idle_s / 60,
        # By its module: what Ray knows under the name fake_multinode lacks a file in the package that is installed.
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": f"127.0.0.1:{gcs}",
        },
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{what}_commands": [] for what in ("initialization", "setup", "head_setup", "worker_setup")},
    }
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        with running_head(0, gcs=gcs, flags=[f"--autoscaling-config={file.name}"], **environment) as head:
            yield head


def nodes(head: Head) -> set[str]:
    """Ids of nodes that live, the head's too, as its dashboard has them: one that was killed stays for seconds."""
    with urllib.request.urlopen(f"{head.address}/nodes?view=summary", timeout=10) as answer:
        found = [node["raylet"] for node in json.load(answer)["data"]["summary"]]
    return {raylet["nodeId"] for raylet in found if raylet.get("state") == "ALIVE"}


@contextlib.contextmanager
def _started(flags: list[str], num_cpus: int, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    options = {
        "dashboard-agent-listen-port": free_ports(1)[0],  # Ray finds the others itself
        "num-cpus": num_cpus,
        "node-ip-address": "127.0.0.1",
        "object-store-memory": 200_000_000,
    }
    start = ["tests.forking.start"] if ADDRESS in environment else ["ray.scripts.scripts", "start"]
    command = [sys.executable, "-m", *start, "--block", *flags, *_flags(options)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        _end(process)


def _flags(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def _answers(head: Head) -> bool:
    """It does, and knows of its own node."""
    try:
        return bool(nodes(head))
    except HTTPError as error:
        return error.code == 401  # it wants a token
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """All that it started, too; at once, without the notice that it would give to whoever trains there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everybody:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(everybody, timeout=15)
    process.wait(10)
