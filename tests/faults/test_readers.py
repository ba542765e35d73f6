"""Readers die at awkward moments: nobody goes on asking the dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from tests.faults.harness import Run, assert_same_bits, processes_titled

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.mark.thorough
def test_worker_that_warms_up_while_all_readers_are_replaced_asks_the_new_ones(
    start: Callable[..., Run], cluster: LocalCluster
) -> None:
    """Found at random: the joiner kept the readers it was started with, all dead, and everybody waited for it."""
    run = start(steps=400, workers={"min": 1, "max": 2}, failpoints=["w1:warm_up@*=delay:8"])
    run.await_status(lambda s: "w1" in s["members"] and s["members"]["w1"]["pid"] and s["step"] >= 5, "w1 warming up")
    for pid in processes_titled(cluster, "ray::Reader"):
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: run.count(EventKind.READER_REPLACED) == 2, timeout_s=30, what="both readers replaced", poll_s=0.2)
    assert run.count(EventKind.MEMBER_READY) == 1, "w1 was ready before the readers were replaced"
    run.await_status(lambda s: s["world_size"] == 2, "both at work")
    assert_same_bits(run, run.result(120))
