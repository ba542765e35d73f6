"""Has imported what a worker imports, and forks one for each launcher that connects.

`python -m tests.forking.server SOCKET`: listens there, and says "ready". Beside the socket, the file PID holds the process id
of the worker that launcher PID stands for. Ends, and all workers with it, when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path

LONGEST_REQUEST = 1 << 20
# What our actors import, and what Ray does. Not Ray itself: it reads its environment, that of one worker, when it is loaded.
PRELOADED = (
    "torch",
    "pyarrow",
    "fsspec",
    "tokenizers",
    "google.protobuf.internal.builder",
    "google.protobuf.json_format",
    "jsonschema",
    "pydantic",
    "requests",
    "elastic_lm.checkpoint.store",
    "elastic_lm.config",
    "elastic_lm.engine.lease",
    "elastic_lm.engine.probe",
    "elastic_lm.engine.step",
    "elastic_lm.evaluate.tasks",
)


class Server:
    """One thread: a fork takes along no other."""

    def __init__(self, address: Path) -> None:
        self._folder = address.parent
        self._workers: dict[int, tuple[socket.socket, Path]] = {}  # by process id
        self._selector = selectors.DefaultSelector()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen(64)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._signalled, told = socket.socketpair()
        for end in (self._signalled, told):
            end.setblocking(False)
        self._selector.register(self._signalled, selectors.EVENT_READ)
        self._told = told
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(told.fileno())

    def serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._fork()
                elif key.fileobj is self._signalled:
                    self._signalled.recv(4096)
                    self._bury()
                elif key.fileobj is sys.stdin:
                    for pid in self._workers:
                        os.kill(pid, signal.SIGKILL)
                    return
                elif key.data in self._workers:  # a launcher was killed, and its worker is not buried yet
                    self._selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)

    def _fork(self) -> None:
        launcher, _ = self._listener.accept()
        told, streams, _, _ = socket.recv_fds(launcher, LONGEST_REQUEST, 3)
        while not told.endswith(b"\n"):
            more = launcher.recv(LONGEST_REQUEST)
            if not more:
                launcher.close()
                return
            told += more
        wanted = json.loads(told)
        pid = os.fork()
        if pid == 0:
            self._become(wanted, streams)
        for stream in streams:
            os.close(stream)
        note = self._folder / str(wanted["pid"])
        part = note.with_suffix(".part")
        part.write_text(str(pid))
        part.rename(note)  # whoever finds it finds all of it
        self._workers[pid] = launcher, note
        self._selector.register(launcher, selectors.EVENT_READ, pid)

    def _become(self, wanted: dict[str, object], streams: list[int]) -> None:
        """What the launcher would have become. Does not return."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)  # a raylet ends a worker with its group
        for stream, fd in zip(streams, range(3), strict=True):
            os.dup2(stream, fd)
        os.closerange(3, max(int(name) for name in os.listdir("/proc/self/fd")) + 1)
        code = 1
        try:
            os.environ.clear()
            os.environ.update(wanted["environment"])  # type: ignore[call-overload]
            os.chdir(str(wanted["folder"]))
            random.seed()
            arguments = list(wanted["arguments"])  # type: ignore[call-overload]
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
            folders = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
            sys.path[1:1] = [folder for folder in folders if folder not in sys.path]
            runpy.run_path(arguments[0], run_name="__main__")
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:  # noqa: BLE001 - to the worker's own stream; nothing of the server may run in this process
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _bury(self) -> None:
        """Workers that have ended: their launchers end as they did."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                launcher, note = self._workers.pop(pid)
                with contextlib.suppress(KeyError):
                    self._selector.unregister(launcher)
                with contextlib.suppress(OSError):
                    launcher.send(str(os.waitstatus_to_exitcode(status) & 0xFF).encode())
                launcher.close()
                note.unlink()


def main(address: str) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    import numpy as np

    os.register_at_fork(after_in_child=lambda: np.random.seed(None))
    assert "ray" not in sys.modules
    server = Server(Path(address))
    gc.collect()
    gc.freeze()  # pages that all share stay shared
    print("ready", flush=True)
    server.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
