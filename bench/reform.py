"""What a fault costs: seconds from the fault until the survivors train again, and what joins and drains cost the others.

One run of two workers (or of one, which leaves a core to whatever begins) on a local cluster of a node more, through Ray
Train as in production. Faults come at random moments, each when all workers have been at work for some steps. Times are
between the injector's clock and the run's event log; they include detection, fencing, forming and the first work in the
new generation.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from workload import DEFAULT

from elastic_lm import RunConfig, fit
from elastic_lm.events.log import read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.runtime.mailbox import Command, find_mailbox
from elastic_lm.storage import Storage

NAME = "bench-reform"


@dataclass(frozen=True)
class Injection:
    """A fault, a drain or a node that came, and when (unix time)."""

    what: str
    at: float


class Injector:
    """Breaks the run that is under way, one thing at a time."""

    def __init__(self, cluster: LocalCluster, training: Future[Any], seed: int, num_workers: int) -> None:
        self._cluster, self._training, self._num_workers = cluster, training, num_workers
        self._draw = random.Random(seed)
        self.done: list[Injection] = []

    def inject(self, what: str) -> None:
        """Wait until everybody works, then some more, then do it."""
        status = self.steady(3)
        time.sleep(self._draw.uniform(0.0, 1.5))
        member = self._draw.choice([m for m in status["members"].values() if m["state"] == "active"])
        if what == "node":
            node = next(node for node in self._cluster.nodes if node.node_id == member["node_id"])
            self._tell(what)
            node.kill()
            self._cluster.nodes.remove(node)
            # A node that starts takes both cores for a second; the one that replaces a dead node has its own.
            self._await(lambda s: s["world_size"] == self._num_workers - 1)
            time.sleep(1.0)
            self._cluster.add_node()
            self._tell("node added")
        elif what == "drain":
            member_id = next(name for name, m in status["members"].items() if m["pid"] == member["pid"])
            self._tell(what)
            self._command("drain", member_id=member_id)
        elif what in ("coordinator killed", "coordinator frozen"):
            self._tell(what)
            pid = status["coordinator"]["pid"]
            os.kill(pid, signal.SIGKILL if what == "coordinator killed" else signal.SIGSTOP)
            self._await(lambda s: s["coordinator"]["pid"] != pid)
            return
        else:
            self._tell(what)
            os.kill(member["pid"], signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        self._await(lambda s: s["world_size"] < self._num_workers or s["members"].keys() != status["members"].keys())

    def stop(self) -> None:
        self.steady(3)
        self._command("stop", reason="the benchmark is over")

    def _tell(self, what: str) -> None:
        self.done.append(Injection(what, time.time()))
        print(f"{len(self.done)}: {what}", file=sys.stderr, flush=True)

    def _command(self, kind: str, **arguments: Any) -> None:
        find_mailbox(NAME).post.remote(Command(kind, arguments))

    def steady(self, steps: int) -> dict[str, Any]:
        """Everybody has been at work for `steps` steps."""
        begin = self._await(lambda s: s["world_size"] == self._num_workers)["step"]
        return self._await(lambda s: s["world_size"] == self._num_workers and s["step"] >= begin + steps)

    def _await(self, condition: Any) -> dict[str, Any]:
        import ray

        while not self._training.done():
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                status = ray.get(find_mailbox(NAME).status.remote(), timeout=5)
                if status and condition(status):
                    return dict(status)
            time.sleep(0.02)
        raise RuntimeError(f"the run ended: {self._training.result()}")


def prepare_corpus(folder: Path) -> str:
    """Random words, enough for every step; what they say does not matter here."""
    from elastic_lm.data.prepare import PrepareOptions, prepare

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 9))) for _ in range(2000)]
    source = folder / "text.txt"
    source.write_text("\n\n".join(" ".join(draw.choices(words, k=400)) for _ in range(600)))
    url = f"file://{folder}/tokens"
    prepare([str(source)], Storage.open(url), PrepareOptions(vocab_size=common.CORPUS_VOCAB_SIZE))
    return url


def make_config(folder: Path, tokens: str, num_workers: int) -> RunConfig:
    return RunConfig(
        name=NAME,
        storage=f"file://{folder}",
        data={"tokens": tokens},
        model={"preset": DEFAULT.preset},
        batch={
            "micro_batches": DEFAULT.micro_batches,
            "micro_batch_size": DEFAULT.micro_batch_size,
            "sequence_length": DEFAULT.sequence_length,
        },
        training={"steps": 1_000_000},
        workers={"min": 1, "max": num_workers},
        checkpoint={"every_steps": 1_000_000},
        control={"backoff_limit_s": 0.5, "backoff_base_s": 0.1, "quarantine_failures": 1000},
        metrics={"port": 0},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--freezes", type=int, default=6)
    parser.add_argument("--nodes", type=int, default=6)
    parser.add_argument("--drains", type=int, default=6)
    parser.add_argument("--coordinators", type=int, default=6, help="how many are killed, and as many frozen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    num_workers = arguments.workers
    counts = {
        "kill": arguments.kills,
        "freeze": arguments.freezes,
        "node": arguments.nodes,
        "drain": arguments.drains,
        "coordinator killed": arguments.coordinators,
        "coordinator frozen": arguments.coordinators,
    }
    schedule = [what for what, count in counts.items() for _ in range(count)]
    random.Random(arguments.seed).shuffle(schedule)
    with tempfile.TemporaryDirectory() as name, LocalCluster(num_workers + 1) as cluster, ThreadPoolExecutor(1) as pool:
        folder = Path(name)
        config = make_config(folder, prepare_corpus(folder), num_workers)
        training = pool.submit(fit, config, on_line=lambda line: print(f"  {line}", file=sys.stderr))
        injector = Injector(cluster, training, arguments.seed, num_workers)
        for what in schedule:
            injector.inject(what)
        injector.stop()
        training.result()
        events = list(read(Storage.open(config.run_url).child("events")))
    report(injector.done, events, num_workers)


def report(injections: list[Injection], events: list[Event], num_workers: int) -> None:
    steps = [event for event in events if event.kind is EventKind.STEP_COMMITTED]
    numbers = [event.step for event in steps]
    assert numbers == list(range(len(numbers))), "steps were lost or repeated"
    pace = [e.fields["compute_s"] / (DEFAULT.micro_batches / e.fields["world_size"]) for e in steps]
    micro_batch_s = statistics.median(pace)
    print(f"{common.machine()}; {len(steps)} steps, each once and in order; one micro-batch: {micro_batch_s:.2f} s\n")
    rows = []
    for what, told in (("kill", "worker SIGKILL"), ("freeze", "worker SIGSTOP"), ("node", "node SIGKILL")):
        seconds = [_until_reformed(i, events) for i in injections if i.what == what]
        rows.append([told, "until the survivors train again", *_figures(seconds)])
    for what in ("coordinator killed", "coordinator frozen"):
        seconds = [_until_reformed(i, events) for i in injections if i.what == what]
        rows.append([what, "until its successor has them train", *_figures(seconds)])
    rows.append(
        ["coordinator", "standstill", *_figures([e.fields["lost_s"] for e in _reformed("coordinator", events)])]
    )
    added = [_until_reformed(i, events, num_workers) for i in injections if i.what == "node added"]
    rows.append(["node added", "until its worker contributes", *_figures(added)])
    for cause in ("join", "drain"):
        rows.append([cause, "others' stall beyond a normal step", *_figures(list(_stalls(cause, events)))])
    rows.append(["nothing", "beyond a normal step", *_figures(list(_ordinary_lateness(events)))])
    print("\n".join(common.table(["what", "seconds", "n", "p50", "p95", "longest"], rows)))
    if not any(i.what == "kill" for i in injections):
        return
    print("\nWhere the time goes after a worker's SIGKILL, medians in seconds from the kill:")
    for kind in (EventKind.MEMBER_LOST, EventKind.LEASE_GRANTED, EventKind.REFORMED):
        seconds = [_until(kind, i, events) for i in injections if i.what == "kill"]
        print(f"  {kind:15} {statistics.median(seconds):.2f}")


def _until(kind: EventKind, injection: Injection, events: list[Event]) -> float:
    return next(event.time_s - injection.at for event in events if event.kind is kind and event.time_s > injection.at)


def _until_reformed(injection: Injection, events: list[Event], world_size: int | None = None) -> float:
    return next(
        event.time_s - injection.at
        for event in events
        if event.kind is EventKind.REFORMED
        and event.time_s > injection.at
        and world_size in (None, event.fields["world_size"])
    )


def _stalls(cause: str, events: list[Event]) -> Iterator[float]:
    """The gap between two leases, and what the first step after it took longer than usual at that world size."""
    steps = {event.step: event.fields for event in events if event.kind is EventKind.STEP_COMMITTED}
    usual = _usual(events)
    for event in _reformed(cause, events):
        if event.step in steps:
            first = steps[event.step]
            yield event.fields["lost_s"] + max(0.0, first["step_s"] - usual[first["world_size"]])


def _ordinary_lateness(events: list[Event]) -> Iterator[float]:
    """What steps that follow no interruption take longer than usual: the spread that is in every other figure too."""
    first = {event.step for event in events if event.kind is EventKind.REFORMED}
    usual = _usual(events)
    for event in events:
        if event.kind is EventKind.STEP_COMMITTED and event.step not in first:
            yield max(0.0, event.fields["step_s"] - usual[event.fields["world_size"]])


def _reformed(cause: str, events: list[Event]) -> Iterator[Event]:
    return (event for event in events if event.kind is EventKind.REFORMED and event.fields["cause"] == cause)


def _usual(events: list[Event]) -> dict[int, float]:
    """The median step by world size, in seconds."""
    step_s: dict[int, list[float]] = {}
    for event in events:
        if event.kind is EventKind.STEP_COMMITTED:
            step_s.setdefault(event.fields["world_size"], []).append(event.fields["step_s"])
    return {world_size: statistics.median(seconds) for world_size, seconds in step_s.items()}


def _figures(seconds: list[float]) -> list[str]:
    if not seconds:
        return ["0", "-", "-", "-"]
    p50, p95 = statistics.median(seconds), common.percentile(seconds, 0.95)
    return [str(len(seconds)), f"{p50:.2f}", f"{p95:.2f}", f"{max(seconds):.2f}"]


if __name__ == "__main__":
    main()
