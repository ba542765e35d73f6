"""Readers die at awkward moments: nobody goes on asking the dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.runtime.cluster import LocalCluster
from tests.faults.harness import Run, assert_same_bits, processes_titled

pytestmark = pytest.mark.ray


@pytest.mark.thorough
def test_worker_that_warms_up_while_all_readers_are_replaced_asks_the_new_ones(
    start: Callable[..., Run], cluster: LocalCluster, tmp_path: Path
) -> None:
    """Found at random: the joiner kept the readers it was started with, all dead, and everybody waited for it."""
    warm, joined = tmp_path / "warm", tmp_path / "joined"
    run = start(
        steps=400,
        workers={"min": 1, "max": 2},
        failpoints=[f"w1:warm_up@*=wait:{warm}", f"w0:data@200=wait:{joined}"],
    )
    run.await_status(lambda s: "w1" in s["members"] and s["members"]["w1"]["pid"] and s["step"] >= 5, "w1 warming up")
    for pid in processes_titled(cluster, "ray::Reader"):
        os.kill(pid, signal.SIGKILL)
    run.await_logged(EventKind.READER_REPLACED, 2)
    warm.touch()
    run.await_status(lambda s: s["members"]["w1"]["state"] in ("ready", "active"), "w1 ready")
    joined.touch()
    run.await_status(lambda s: s["world_size"] == 2, "both at work")
    assert_same_bits(run, run.result())
