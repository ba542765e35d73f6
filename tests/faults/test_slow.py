"""Fail-slow: a worker that lives but crawls is named, gets fewer micro-batches, and nothing of it shows in the bits."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from elastic_lm.events.types import EventKind
from tests.faults.harness import MICRO_BATCHES, Run, assert_same_bits

pytestmark = pytest.mark.ray

STOPPED_S, RUNNING_S = 0.06, 0.02  # a quarter of the time at work; far from any silence that could be taken for death


@contextlib.contextmanager
def slowed(pid: int) -> Iterator[None]:
    """The process runs for a quarter of the time."""
    over = threading.Event()

    def cycle() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            over.wait(RUNNING_S)

    thread = threading.Thread(target=cycle, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.thorough
def test_slow_worker_is_named_and_does_less(start: Callable[..., Run]) -> None:
    run = start(steps=400, workers={"min": 2, "max": 2}, control={"rebalance_every_s": 1.0, "rebalance_gain": 0.1})
    status = run.await_status(lambda s: s["world_size"] == 2 and s["step"] >= 10, "two workers at work")
    name, member = sorted(status["members"].items())[0]

    def shares_of_slow() -> list[int]:
        leases = [event.fields for event in run.events() if event.kind is EventKind.LEASE_GRANTED]
        return [lease["shares"][lease["members"].index(name)] for lease in leases if name in lease["members"]]

    with slowed(member["pid"]):
        run.await_status(lambda _: min(shares_of_slow(), default=MICRO_BATCHES) < MICRO_BATCHES // 2, "a smaller share")
    assert_same_bits(run, run.result())
    # Others may be named too: this machine's neighbours slow any of them down now and then.
    assert name in {event.fields["member_id"] for event in run.events() if event.kind is EventKind.STRAGGLER}
    assert run.count(EventKind.MEMBER_LOST) == 0
