"""A run is forked while it trains and deletes its old checkpoints; workers of both die, and both come to the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.experiment.fork import Request, fork
from elastic_lm.run_address import RunAddress
from tests.faults.harness import Run
from tests.faults.oracle import undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

STEPS = 60
EVERY = {"every_steps": 5, "keep": 1}


def test_fork_of_a_run_that_trains_comes_to_its_bits(start: Callable[..., Run]) -> None:
    parent = start(steps=STEPS, checkpoint=EVERY, workers={"min": 1, "max": 2})
    parent.await_status(lambda _: parent.count(EventKind.CHECKPOINT_SAVED) >= 1, "a checkpoint")
    name = f"{parent.config.name}-fork"
    made = fork(Request(RunAddress.at(parent.config.run_url), name))
    begins_at = made.lineage.parent.step
    child = start(steps=STEPS, checkpoint=EVERY, workers={"min": 1, "max": 2}, name=name)
    child.await_step(begins_at + 3)
    child.kill_a_worker()
    digest, steps = undisturbed(parent.config)
    assert parent.result().digest["state"] == child.result().digest["state"] == digest
    assert child.steps() == steps[begins_at:]
    assert parent.count(EventKind.STEP_MISMATCH) == child.count(EventKind.STEP_MISMATCH) == 0
