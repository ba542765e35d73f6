"""Forked workers are like those that a raylet starts: they end with what it started, and it with them."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
import ray

from elastic_lm.runtime.cluster import LocalCluster, wait_for
from tests.forking.cluster import worker_of

pytestmark = pytest.mark.ray
WAIT_S = 60.0


class Somebody:
    def family(self) -> tuple[int, int, int]:
        """Process id, that of the parent, and the process group."""
        return os.getpid(), os.getppid(), os.getpgid(0)

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)


def launcher_of(cluster: LocalCluster, pid: int) -> psutil.Process:
    """A child of its node's raylet."""
    everybody = [process for node in [*cluster.nodes, cluster.head] for process in node.processes()]
    assert pid in [process.pid for process in everybody]
    (launcher,) = (process for process in everybody if worker_of(process) == pid)
    return launcher


def ends(*pids: int) -> None:
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids), timeout_s=WAIT_S, what="their end")


def test_worker_is_forked_and_dies_with_its_launcher(cluster: LocalCluster) -> None:
    actor = ray.remote(Somebody).remote()
    pid, parent, group = ray.get(actor.family.remote(), timeout=WAIT_S)
    assert "tests.forking.server" in psutil.Process(parent).cmdline()
    assert group == pid
    launcher = launcher_of(cluster, pid)
    launcher.send_signal(signal.SIGKILL)
    ends(pid, launcher.pid)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_launcher_ends_with_its_worker(cluster: LocalCluster, how: signal.Signals) -> None:
    actor = ray.remote(Somebody).remote()
    pid, _, _ = ray.get(actor.family.remote(), timeout=WAIT_S)
    launcher = launcher_of(cluster, pid)
    os.kill(pid, how)
    ends(pid, launcher.pid)


def test_worker_with_an_environment_of_its_own_starts_as_ray_does(cluster: LocalCluster) -> None:
    actor = ray.remote(Somebody).options(runtime_env={"env_vars": {"OF_ITS_OWN": "yes"}}).remote()
    pid, parent, _ = ray.get(actor.family.remote(), timeout=WAIT_S)
    assert ray.get(actor.variable.remote("OF_ITS_OWN"), timeout=WAIT_S) == "yes"
    assert "tests.forking.server" not in psutil.Process(parent).cmdline()
    ray.kill(actor)
    ends(pid)


def test_workers_draw_different_random_numbers(cluster: LocalCluster) -> None:
    @ray.remote
    class Drawing:
        def draw(self) -> tuple[float, float]:
            import random

            import numpy as np

            return random.random(), float(np.random.random())

    actors = [Drawing.remote() for _ in range(2)]
    (first, second) = ray.get([actor.draw.remote() for actor in actors], timeout=WAIT_S)
    assert first[0] != second[0] and first[1] != second[1]
    for actor in actors:
        ray.kill(actor)
