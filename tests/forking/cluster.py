"""A `LocalCluster` whose workers are forked."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import psutil

from elastic_lm.runtime.cluster import LocalCluster, LogicalNode
from tests.forking import launcher
from tests.forking.launcher import ADDRESS


def _workers_folder() -> Path:
    """Where the server tells whose worker is whose."""
    return Path(os.environ[ADDRESS]).parent


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
        found = super().processes()
        for process in list(found):
            with contextlib.suppress(FileNotFoundError, psutil.NoSuchProcess):
                found.append(psutil.Process(int(_workers_folder().joinpath(str(process.pid)).read_text())))
        return found


class ForkingCluster(LocalCluster):
    """Its nodes start workers through `launcher.py`."""

    node_type = ForkingNode
    node_arguments = MappingProxyType({"setup_worker_path": launcher.__file__})
