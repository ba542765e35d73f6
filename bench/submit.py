"""Seconds from `elastic-lm submit` to a run's first step, on a cluster of four nodes that is up.

Each round is a job of its own, with a worker on each of the three nodes beside the head.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from reform import make_config, prepare_corpus

from elastic_lm import Run
from elastic_lm.events.types import EventKind
from elastic_lm.runtime.cluster import LocalCluster

NODES = 3
PHASES = ("job begins", "run begins", "first worker is ready", "first step")


def measure(address: str, folder: Path, tokens: str, number: int) -> list[float]:
    """Seconds since the command was given, by phase."""
    config = make_config(folder, tokens, NODES).replace(
        f"name=submitted-{number}",
        "model.preset=tiny",
        "training.steps=20",
        f"workers.min={NODES}",
        "metrics.port=null",
    )
    path = folder / f"{number}.yaml"
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "elastic_lm", "submit", str(path), "--address", address]
    began = time.time()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    submitted = time.time()
    subprocess.run([sys.executable, "-m", "elastic_lm", "logs", "-f", config.name, "--address", address], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    events = list(Run.open(config).events())
    first = {kind: next(event.time_s for event in events if event.kind is kind)
             for kind in (EventKind.RUN_STARTED, EventKind.MEMBER_READY, EventKind.STEP_COMMITTED)}  # fmt: skip
    return [submitted - began, *(told - began for told in first.values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(common.HERE.parent),
        "RAY_AUTH_MODE": "disabled",
    }
    with tempfile.TemporaryDirectory() as name, LocalCluster(NODES, dashboard_port=port):
        tokens = prepare_corpus(Path(name))
        rounds = [measure(f"http://127.0.0.1:{port}", Path(name), tokens, r) for r in range(arguments.rounds)]
    print(f"{common.machine()}; {NODES} nodes of one CPU and a head, {arguments.rounds} rounds\n")
    rows = [
        [phase, common.spread(seconds, 1)] for phase, seconds in zip(PHASES, zip(*rounds, strict=True), strict=True)
    ]
    print("\n".join(common.table(["what", "seconds since the command"], rows)))


if __name__ == "__main__":
    main()
