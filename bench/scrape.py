"""What a scrape costs: milliseconds and bytes of one, of a run with few workers and with many, between its events.

The exporter is fed what a run of that size tells: every worker joins, and for every step one dies and another one comes. The
clock covers connection, text and answer, as seen by a client on the same machine.
"""

from __future__ import annotations

import argparse
import http.client
import time
from collections.abc import Iterator, Sequence

import common

from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.exporter import Exporter

STEP_S = 1.0


def at(elapsed_s: float, kind: EventKind, step: int | None = None, **fields: object) -> Event:
    return Event(kind, "", step, "1.1", fields, 1e9 + elapsed_s, elapsed_s, attempt=1)


def a_run(num_workers: int, num_steps: int) -> Iterator[Event]:
    """Events of a run that loses a worker and gets another one in every step."""
    config = {
        "training": {"steps": num_steps},
        "workers": {"min": 1, "max": num_workers},
        "checkpoint": {"every_steps": 10},
    }
    yield at(0, EventKind.RUN_STARTED, config=config, flops_per_token=6 * 10**7)
    names = [f"w{number}" for number in range(num_workers + num_steps)]
    for name in names[:num_workers]:
        yield at(0, EventKind.MEMBER_STARTED, member_id=name, node_id="n0", pid=1)
        yield at(1, EventKind.MEMBER_READY, member_id=name, node_id="n0", startup_s=1.0, environment={})
    for step in range(num_steps):
        now_s = 2 + step * STEP_S
        record = {
            "loss": 3.0, "num_targets": 2**20, "learning_rate": 3e-4, "grad_norm": 0.75, "world_size": num_workers,
            "step_s": 0.9 * STEP_S, "data_wait_s": 0.01, "compute_s": 0.8, "reduce_wait_s": 0.05, "optimizer_s": 0.04,
        }  # fmt: skip
        yield at(now_s, EventKind.STEP_COMMITTED, step, **record)
        yield at(now_s, EventKind.MEMBER_LOST, member_id=names[step], cause="process died", node_id="n0")
        yield at(now_s, EventKind.MEMBER_STARTED, member_id=names[num_workers + step], node_id="n0", pid=1)
        yield at(now_s, EventKind.REFORMED, cause="failure", lost_s=0.1, world_size=num_workers)
        members = names[step + 1 : step + 1 + num_workers]
        yield at(now_s, EventKind.LEASE_GRANTED, step, members=members, world_size=num_workers)
        yield at(now_s, EventKind.CHECKPOINT_SAVED, step, seconds=1.0)


def scrape(address: tuple[str, int]) -> tuple[float, str]:
    """(milliseconds, text)."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return 1_000 * (time.perf_counter() - began), text


def row(num_workers: int, num_steps: int, num_scrapes: int) -> Sequence[str]:
    exporter = Exporter("a-run", num_workers)
    exporter.open("127.0.0.1", 0)
    assert exporter.address is not None, exporter.sentence
    events = list(a_run(num_workers, num_steps))
    times: list[float] = []
    for number, event in enumerate(events):
        exporter.observe(event)
        if number % max(1, len(events) // num_scrapes) == 0:
            times.append(scrape(exporter.address)[0])
    text = scrape(exporter.address)[1]
    exporter.close()
    num_series = sum(not line.startswith("#") for line in text.splitlines())
    percentile = f"{common.percentile(times, 0.99):.2f}"
    return f"{num_workers:,}", str(num_series), f"{len(text) / 1e3:.1f}", common.spread(times), percentile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[3, 100, 1_000])
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--scrapes", type=int, default=500)
    arguments = parser.parse_args()
    rows = [row(num_workers, arguments.steps, arguments.scrapes) for num_workers in arguments.workers]
    print(f"{common.machine()}; {arguments.steps:,} steps, {arguments.scrapes} scrapes\n")
    print("\n".join(common.table(("workers", "series", "KB", "ms (least - most)", "p99 ms"), rows)))


if __name__ == "__main__":
    main()
