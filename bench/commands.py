"""What a person waits for: the help, the import, the status and the report of a run of 100,000 steps.

CPU seconds of the whole process, which other work on the machine does not change; for the browser the wall time of its start,
the page's opening and its end. The run is a log written here: what the commands read is what a run would have left.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common

from elastic_lm.config import RunConfig
from elastic_lm.events.log import EventLog
from elastic_lm.events.types import Event, EventKind
from elastic_lm.storage import Storage

STEP_S = 0.5
STEPS_PER_FAULT = 100
ROOT = Path(__file__).parents[1]


def a_run(config: RunConfig) -> Iterator[Event]:
    """What the log of a long run holds, with a worker lost now and then."""
    fields = {"resume_step": None, "config": config.model_dump(mode="json"), "flops_per_token": 6 * 10**7}
    yield Event(EventKind.RUN_STARTED, "Run starts.", fields=fields, time_s=1e9, attempt=1)
    for step in range(config.training.steps):
        elapsed_s = step * STEP_S
        stamps = {"generation": "0.1", "time_s": 1e9 + elapsed_s, "elapsed_s": elapsed_s, "attempt": 1}
        loss = 2.5 + 8 / (1 + step / 500) + 0.05 * math.sin(step)
        record = {
            "step": step, "loss": loss, "num_targets": config.batch.tokens, "learning_rate": 3e-4, "grad_norm": 0.75,
            "sample_hash": step, "refused": 0, "generation": "0.1", "world_size": 2, "step_s": STEP_S, "data_wait_s": 0.01,
            "compute_s": 0.4, "reduce_wait_s": 0.05, "optimizer_s": 0.04,
        }  # fmt: skip
        yield Event(EventKind.STEP_COMMITTED, f"Step {step}: loss {loss:.4f}.", step, fields=record, **stamps)
        if step % STEPS_PER_FAULT == STEPS_PER_FAULT - 1:
            lost = {"member_id": "w1", "cause": "process died", "node_id": "n1"}
            yield Event(EventKind.MEMBER_LOST, "w1 is lost (process died).", step, fields=lost, **stamps)


def cpu_s(command: list[str]) -> float:
    """User and system time of the command and its children.    Raises: CalledProcessError."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def wall_s(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig.load(
            ROOT / "examples/laptop.yaml", [f"storage={folder}", f"training.steps={arguments.steps}"]
        )
        log = EventLog(Storage.open(config.run_url).child("events"))
        for event in a_run(config):
            log.append(event)
        log.close()
        rows = list(measure(config, Path(folder), arguments.rounds))
    print(f"{common.machine()}; a run of {arguments.steps:,} steps\n")
    print("\n".join(common.table(("what", "median (least - most)"), rows)))


def measure(config: RunConfig, folder: Path, rounds: int) -> Iterator[tuple[str, str]]:
    bare = [sys.executable, "-c", "pass"]
    cli = [sys.executable, "-m", "elastic_lm"]
    page = folder / "report.html"
    for what, command in (
        ("the interpreter alone, CPU s", bare),
        ("`import elastic_lm`, CPU s", [sys.executable, "-c", "import elastic_lm"]),
        ("`--help`, CPU s", [*cli, "--help"]),
        ("`status`, CPU s", [*cli, "status", config.run_url]),
        ("`report`, CPU s", [*cli, "report", config.run_url, "--out", str(page)]),
    ):
        yield what, common.spread([cpu_s(command) for _ in range(rounds)])
    yield "the report, MB", f"{page.stat().st_size / 1e6:.2f}"
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is not None:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        for what, address in (
            ("Chromium with an empty page, s", "about:blank"),
            ("with the report, s", f"file://{page}"),
        ):
            yield what, common.spread([wall_s([browser, *options, address]) for _ in range(rounds)])


if __name__ == "__main__":
    main()
