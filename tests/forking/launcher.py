"""Started by a raylet for each worker: has it forked, and lives as long. Imports as little as it can."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys

ADDRESS = "ELASTIC_LM_FORK_SERVER"  # environment variable: path of the server's socket
CONTEXT = "--serialized-runtime-env-context="


def main(arguments: list[str]) -> None:
    options = [argument for argument in arguments if argument.startswith((CONTEXT, "--language="))]
    context = next((option.removeprefix(CONTEXT) for option in options if option.startswith(CONTEXT)), "{}")
    environment, folder = dict(os.environ), os.getcwd()
    for what, value in json.loads(context).items():
        if what == "env_vars" and all(map(is_read_late, value)):
            environment |= {name: os.path.expandvars(text) for name, text in value.items()}
        elif what == "command_prefix" and len(value) == 3 and value[::2] == ["cd", "&&"]:
            (folder,) = shlex.split(value[1])
        elif value and what != "py_executable":
            _start_as_ray_does(arguments)
    worker = [argument for argument in arguments if argument not in options]
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        wanted = {"arguments": worker, "environment": environment, "folder": folder, "pid": os.getpid()}
        socket.send_fds(server, [json.dumps(wanted).encode() + b"\n"], [0, 1, 2])
        status = server.recv(16)  # nothing when the server itself is gone
    os._exit(int(status or b"1"))


def is_read_late(name: str) -> bool:
    """Whether a process that gets this variable after it has begun heeds it; the server sees to PYTHONPATH."""
    return name == "PYTHONPATH" or not name.startswith(("PYTHON", "LD_", "OMP_", "MKL_", "CUDA_"))


def _start_as_ray_does(arguments: list[str]) -> None:
    from ray._private.workers import setup_worker

    os.execv(sys.executable, [sys.executable, setup_worker.__file__, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
