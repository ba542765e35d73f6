"""Forked workers are like those that a raylet starts: they end with what it started, and it with them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from zipfile import ZipFile

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


@pytest.mark.parametrize(("name", "forked"), [("OF_ITS_OWN", True), ("PYTHONHASHSEED", False)])
def test_worker_has_an_environment_of_its_own(cluster: LocalCluster, name: str, forked: bool) -> None:
    """One that a process heeds as it begins only is not forked, but started as Ray does."""
    actor = ray.remote(Somebody).options(runtime_env={"env_vars": {name: "17"}}).remote()
    pid, parent, _ = ray.get(actor.family.remote(), timeout=WAIT_S)
    assert ray.get(actor.variable.remote(name), timeout=WAIT_S) == "17"
    assert ("tests.forking.server" in psutil.Process(parent).cmdline()) == forked
    ray.kill(actor)
    ends(pid)


def test_forked_worker_finds_its_folder_and_modules(cluster: LocalCluster, tmp_path: Path) -> None:
    """As a job's are, which takes them along."""
    with ZipFile(tmp_path / "taken-along.zip", "w") as packed:
        packed.writestr("taken-along/only_here.py", "WHERE = __file__\n")

    @ray.remote(runtime_env={"working_dir": f"file://{tmp_path}/taken-along.zip"})
    def look() -> tuple[str, str, int]:
        import only_here

        return os.getcwd(), only_here.WHERE, os.getppid()

    folder, module, parent = ray.get(look.remote(), timeout=WAIT_S)
    assert Path(module) == Path(folder) / "only_here.py"
    assert "tests.forking.server" in psutil.Process(parent).cmdline()


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
