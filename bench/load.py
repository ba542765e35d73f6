"""What control costs, and whether a loaded machine makes it evict somebody who lives.

One run of two workers, through Ray Train as in production. First undisturbed: CPU seconds of the coordinator (with its
metrics and event log), the mailbox and the readers, by those of the workers. Then with three busy processes per core at the
priority of everybody else: members lost must be 0.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import psutil
from reform import NAME, Injector, make_config, prepare_corpus

from elastic_lm import fit
from elastic_lm.events.log import read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.storage import Storage

WORKERS = 2
BUSY_PER_CORE = 3
# Titles of Ray's processes, by what they are to us.
KINDS = {
    "ray::Worker": "workers",
    "ray::Mailbox": "mailbox",
    "ray::Reader": "readers",
    "ray::RayTrainWorker": "coordinator, metrics, events",
    "ray::_RayTrainWorker": "coordinator, metrics, events",
    "ray::TrainController": "Ray Train's controller",
}


def cpu_seconds(cluster: LocalCluster) -> Counter[str]:
    """User and system time so far, by kind of process."""
    found: Counter[str] = Counter()
    for node in [cluster.head, *cluster.nodes]:
        for process in node.processes():
            try:
                title = " ".join(process.cmdline())
                times = process.cpu_times()
            except psutil.Error:
                continue
            kind = next((kind for start, kind in KINDS.items() if title.startswith(start)), "the rest of Ray")
            found[kind] += times.user + times.system  # type: ignore[assignment]
    return found


def spin() -> None:
    while True:
        pass


def busy(seconds: float) -> None:
    """Keep every core busy three times over."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=spin, daemon=True) for _ in range(BUSY_PER_CORE * (psutil.cpu_count() or 1))]
    for process in processes:
        process.start()
    time.sleep(seconds)
    for process in processes:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quiet", type=float, default=60, help="seconds without load, for the cost of control")
    parser.add_argument("--load", type=float, default=300, help="seconds under three-fold load")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, LocalCluster(WORKERS + 1) as cluster, ThreadPoolExecutor(1) as pool:
        folder = Path(name)
        config = make_config(folder, prepare_corpus(folder), WORKERS)
        training = pool.submit(fit, config, on_line=lambda line: print(f"  {line}", file=sys.stderr))
        injector = Injector(cluster, training, 0, WORKERS)
        injector.steady(3)
        before = cpu_seconds(cluster)
        time.sleep(arguments.quiet)
        cost = cpu_seconds(cluster) - before
        loaded_at = time.time()
        busy(arguments.load)
        loaded_until = time.time()
        injector.stop()
        training.result()
        events = list(read(Storage.open(config.run_url).child("events")))
    report(cost, [event for event in events if loaded_at <= event.time_s <= loaded_until], loaded_until - loaded_at)


def report(cost: Counter[str], events: list[Event], load_s: float) -> None:
    print(f"{common.machine()}; run {NAME}, {WORKERS} workers\n")
    rows = [[kind, f"{seconds:.2f}", f"{seconds / cost['workers']:.2%}"] for kind, seconds in cost.most_common()]
    print("\n".join(common.table(["processes", "CPU seconds", "by the workers'"], rows)))
    kinds = Counter(event.kind for event in events)
    steps = kinds[EventKind.STEP_COMMITTED]
    print(f"\nUnder three-fold load for {load_s:.0f} s: {steps} steps, {kinds[EventKind.MEMBER_LOST]} members lost.")


if __name__ == "__main__":
    main()
