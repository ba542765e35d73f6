"""A Ray head as `ray start` makes it: processes of its own, a dashboard and a job server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

import psutil

from elastic_lm.runtime.cluster import wait_for

START_S = 120
ROOT = Path(__file__).parents[2]


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [found.getsockname()[1] for found in sockets]


@dataclass(frozen=True)
class Head:
    """`address` of the job server, `gcs` of the cluster."""

    address: str
    gcs: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running_head(num_cpus: int, token: str | None = None) -> Iterator[Head]:
    """A head whose nodes find the `elastic-lm` of this source tree on their PATH. `token`: who has none is refused."""
    gcs, dashboard, client, agent, metrics, runtime_env = free_ports(6)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled" if token is None else "token",
        **({} if token is None else {"RAY_AUTH_TOKEN": token}),
    }
    environment.pop("RAY_ADDRESS", None)
    options = {
        "port": gcs, "dashboard-host": "127.0.0.1", "dashboard-port": dashboard, "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent, "metrics-export-port": metrics, "runtime-env-agent-port": runtime_env,
        "num-cpus": num_cpus, "node-ip-address": "127.0.0.1", "object-store-memory": 200_000_000,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="head-") as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--temp-dir={folder}"]
        command += [f"--{name}={value}" for name, value in options.items()]
        with open(Path(folder, "said"), "wb") as said:
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment, process)
        try:
            wait_for(lambda: _answers(head.address), timeout_s=START_S, what="the job server answers", poll_s=0.2)
            yield head
        finally:
            _end(process)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=5):
            return True
    except HTTPError as error:
        return error.code == 401  # it wants a token
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """All that it started, too."""
    everybody = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(everybody, timeout=15)
    for one in alive:
        with contextlib.suppress(psutil.Error):
            one.kill()
    process.wait(10)
