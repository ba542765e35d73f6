"""Runs of the rivals, as a user would launch them: begun with some workers, given one more, watched, ended.

A job that is left has no process any more, whatever state the rival was in.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import psutil
from process_tree import signal_tree
from timeline import Done, Timeline

RIVALS = common.HERE / "rivals"
TORCHRUN = ["-m", "torch.distributed.run"]
POLL_S = 0.2
MAX_WORKERS = 2


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Job:
    """One process that trains on its own: no more workers, and nobody who takes over."""

    saves = False  # goes on from checkpoints
    max_workers = 1

    def __init__(self, num_workers: int = 1, threads: int = 1) -> None:
        self._num_workers, self._threads = num_workers, threads
        self._stack = contextlib.ExitStack()
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Job:
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            self._steps = self.folder / "steps"
            self._steps.mkdir()
            self._log = stack.enter_context((self.folder / "log").open("wb"))
            stack.callback(self._end)
            self.begin(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def begin(self, stack: contextlib.ExitStack) -> None:
        for number in range(self._num_workers):
            self.start_worker(number)

    def start_worker(self, number: int) -> float:
        """Let there be one more.    Returns: since when there has been room for it."""
        return self.launch([sys.executable, *self.script("ddp.py")])

    def script(self, name: str, *more: str) -> list[str]:
        vocab_size = str(common.CORPUS_VOCAB_SIZE)
        return [str(RIVALS / name), "--steps", str(self._steps), "--vocab-size", vocab_size, *more]

    def launch(self, command: Sequence[str], **environment: str) -> float:
        """Begin a process.    Returns: when."""
        path = os.pathsep.join(filter(None, (str(common.HERE.parent), os.environ.get("PYTHONPATH"))))
        always = {"OMP_NUM_THREADS": str(self._threads), "TMPDIR": str(self.folder), "PYTHONPATH": path}
        everything = {**os.environ, **always, **environment}
        began = time.monotonic()
        self._processes.append(subprocess.Popen(command, env=everything, stdout=self._log, stderr=self._log))
        return began

    # -- what it does ------------------------------------------------------------------------------------------------

    def told(self) -> list[dict[str, Any]]:
        """Whole lines of all processes."""
        files = [path.read_text().splitlines(keepends=True) for path in self._steps.glob("*.jsonl")]
        return [json.loads(line) for lines in files for line in lines if line.endswith("\n")]

    def timeline(self) -> Timeline:
        return Timeline(
            Done(line["step"], line["began"], line["ended"], line["world_size"])
            for line in self.told()
            if line.get("applied", True)
        )

    def discarded(self, after: float, until: float) -> int:
        """Steps that ended in that time and were not applied."""
        return sum(not line.get("applied", True) and after < line["ended"] <= until for line in self.told())

    def workers(self) -> list[int]:
        """Process ids of those who did the newest step."""
        told = self.told()
        newest = max(line["step"] for line in told)
        return sorted({line["pid"] for line in told if line["step"] == newest})

    def alive(self) -> bool:
        return any(process.poll() is None for process in self._processes)

    def wait(self, condition: Callable[[Timeline], Any], limit_s: float) -> str:
        """Until it holds.    Returns: nothing, or why it does not."""
        deadline = time.monotonic() + limit_s
        while not condition(self.timeline()):
            if not self.alive():
                return "ended"
            if time.monotonic() > deadline:
                return f"not within {limit_s:.0f} s"
            time.sleep(POLL_S)
        return ""

    def tail(self, lines: int = 150) -> str:
        """The end of what its processes said."""
        self._log.flush()
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-lines:])

    def _end(self) -> None:
        for process in self._processes:
            signal_tree(process.pid, signal.SIGKILL)
            process.wait()
        for process in psutil.process_iter(["cmdline"]):  # a worker whose launcher died before it
            if str(self._steps) in (process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


class TorchrunJob(Job):
    """DDP under torchrun, an agent per worker as on a node of its own, with elastic restarts from a checkpoint."""

    saves = True
    max_workers = MAX_WORKERS

    def begin(self, stack: contextlib.ExitStack) -> None:
        self._endpoint = f"127.0.0.1:{free_port()}"
        super().begin(stack)

    def start_worker(self, number: int) -> float:
        elastic = ["--nnodes", f"1:{MAX_WORKERS}", "--nproc-per-node", "1", "--max-restarts", "100"]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-id", "rival", "--rdzv-endpoint", self._endpoint]
        script = self.script("ddp.py", "--checkpoint", str(self.folder / "state.pt"))
        return self.launch([sys.executable, *TORCHRUN, *elastic, *meeting, *script])


class RayTrainJob(Job):
    """Ray Train's elastic trainer on a local cluster whose nodes have room for a worker each."""

    saves = True
    max_workers = MAX_WORKERS

    def begin(self, stack: contextlib.ExitStack) -> None:
        from elastic_lm.runtime.cluster import LocalCluster

        self._cluster = LocalCluster(self._num_workers)
        stack.callback(self._cluster.shutdown)
        stack.callback(self._end)  # before the cluster, which it would wait for
        script = self.script("ray_train.py", "--storage", str(self.folder / "storage"))
        self.launch([sys.executable, *script], RAY_ADDRESS=self._cluster.address, TMPDIR=tempfile.gettempdir())

    def start_worker(self, number: int) -> float:
        self._cluster.add_node()
        return time.monotonic()


class TorchftJob(Job):
    """torchft: a lighthouse, and replica groups of one worker."""

    max_workers = MAX_WORKERS

    def __init__(self, num_workers: int, python: Path, heartbeat_timeout_ms: int | None = None) -> None:
        super().__init__(num_workers)
        self._python, self._heartbeat_timeout_ms = python, heartbeat_timeout_ms

    def begin(self, stack: contextlib.ExitStack) -> None:
        port = free_port()
        self._lighthouse = f"http://127.0.0.1:{port}"
        # What its README gives; the heartbeat's timeout is 5 s unless told.
        options = ["--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", "10000"]
        if self._heartbeat_timeout_ms is not None:
            options += ["--heartbeat_timeout_ms", str(self._heartbeat_timeout_ms)]
        self.launch([str(self._python.parent / "torchft_lighthouse"), "--bind", f"[::]:{port}", *options])
        self._lighthouse_process = self._processes.pop()
        stack.callback(self._lighthouse_process.wait)
        stack.callback(self._lighthouse_process.kill)
        super().begin(stack)

    def start_worker(self, number: int) -> float:
        environment = {"TORCHFT_LIGHTHOUSE": self._lighthouse, "REPLICA_GROUP_ID": str(number)}
        script = self.script("torchft_groups.py")
        return self.launch(
            [str(self._python), *TORCHRUN, "--standalone", "--nproc-per-node", "1", *script], **environment
        )
