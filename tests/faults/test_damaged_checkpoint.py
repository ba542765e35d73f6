"""The newest checkpoint is damaged: what is wrong with it is told, and the run goes on from the one before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_lm.checkpoint import registry
from elastic_lm.events.types import EventKind
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.storage import Storage
from tests.faults.harness import Fault, Injector, Run, assert_same_bits

pytestmark = pytest.mark.ray

STEPS = 100
EVERY = {"every_steps": 10, "keep": 3}


def stopped(start: Callable[..., Run]) -> tuple[Run, int, int]:
    """A run that has stopped, and the steps of its newest two checkpoints."""
    run = start(steps=STEPS, checkpoint=EVERY, held_at=25)
    run.await_logged(EventKind.CHECKPOINT_SAVED, 1)
    run.await_step(25)
    run.stop("enough")  # with one more
    run.result()
    *_, before, newest = (found.step for found in registry.found(Storage.open(run.config.run_url)))
    return run, before, newest


def damage(run: Run, step: int) -> str:
    """Turns a bit of a part over.    Returns: the part's name."""
    folder = Path(run.config.run_url.removeprefix("file://")) / "checkpoints" / f"step-{step:08d}"
    part = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    return part.name


def assert_went_back(run: Run, before: int, part: str) -> None:
    notes = "\n".join(event.message for event in run.events() if event.kind is EventKind.NOTE)
    assert f"part {part} is damaged" in notes
    assert f"The newest state that can be restored is the checkpoint of step {before}." in notes
    leases = [event.step for event in run.events() if event.kind is EventKind.LEASE_GRANTED]
    assert before in leases
    assert run.count(EventKind.STEP_MISMATCH) == 0


def test_resumed_run_passes_it_over(start: Callable[..., Run]) -> None:
    run, before, newest = stopped(start)
    part = damage(run, newest)
    again = start(steps=STEPS, name=run.config.name, checkpoint=EVERY)
    assert_same_bits(again, again.result())
    assert_went_back(again, before, part)


def test_run_that_loses_every_worker_goes_back_further(start: Callable[..., Run], cluster: LocalCluster) -> None:
    run, before, newest = stopped(start)
    again = start(steps=STEPS, name=run.config.name, checkpoint={"every_steps": 1000})
    again.await_step(newest + 3)
    part = damage(run, newest)
    Injector(cluster, again).inject([Fault("kill_all", at_step=newest + 3)])
    assert_same_bits(again, again.result())
    assert_went_back(again, before, part)
