"""A `LocalCluster` whose workers are forked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil

from elastic_lm.runtime.cluster import LocalCluster, LogicalNode
from tests.forking import launcher
from tests.forking.launcher import ADDRESS


def worker_of(launcher: psutil.Process) -> int | None:
    """Process id of the worker that a process stands for; None when it stands for none."""
    try:
        return int(Path(os.environ[ADDRESS]).with_name(str(launcher.pid)).read_text())
    except FileNotFoundError:
        return None


def with_workers(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """These, and the workers that some of them stand for."""
    found = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if (pid := worker_of(process)) is not None:
                found.append(psutil.Process(pid))
    return found


@contextlib.contextmanager
def fork_server(folder: Path) -> Iterator[None]:
    """For clusters that are made in the block."""
    address = folder / "server"
    command = [sys.executable, "-m", "tests.forking.server", str(address)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        os.environ[ADDRESS] = str(address)
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            server.stdin.close()


class ForkingNode(LogicalNode):
    """Its workers belong to the launchers that its raylet started."""

    def processes(self) -> list[psutil.Process]:
        return with_workers(super().processes())


class ForkingCluster(LocalCluster):
    """Its nodes start workers through `launcher.py`."""

    node_type = ForkingNode
    node_arguments = MappingProxyType({"setup_worker_path": launcher.__file__})
