"""A run is forked while it trains and deletes its old checkpoints; workers of both die, and both come to the same bits. One with
another layer begins with its parent's loss, and comes to the bits of the same fork that nothing disturbs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from elastic_lm.checkpoint.layout import MANIFEST, folder_of
from elastic_lm.errors import CheckpointError
from elastic_lm.events.types import EventKind
from elastic_lm.experiment.fork import Forked, Request, fork
from elastic_lm.run_address import RunAddress
from elastic_lm.storage import Storage
from tests.faults.harness import HostedRun, Run
from tests.faults.oracle import undisturbed
from tests.solo import Solo

pytestmark = pytest.mark.ray

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


def test_fork_whose_first_state_is_lost_goes_on_with_the_one_in_memory(start: Callable[..., Run]) -> None:
    parent = start(steps=20, checkpoint={"every_steps": 10}, workers={"min": 1, "max": 1})
    parent.result()
    name, overrides = f"{parent.config.name}-fork", [f"training.steps={STEPS}", f"schedule.total_steps={STEPS}"]
    made = fork(Request(RunAddress.at(parent.config.run_url), name, step=20, overrides=overrides))
    child = start(steps=STEPS, checkpoint={}, workers={"min": 2, "max": 2}, name=name, kind=HostedRun)
    assert isinstance(child, HostedRun)
    child.await_step(23)
    Storage.open(made.url).delete(f"{folder_of(20)}/{MANIFEST}")
    pid = child.coordinator_pid()
    os.kill(pid, signal.SIGKILL)
    child.await_successor(pid)
    child.await_logged(EventKind.MEMBER_RETURNED, 2)
    status = child.await_step(30)
    assert "verdict" not in status
    os.kill(next(m["pid"] for m in status["members"].values() if m["pid"]), signal.SIGKILL)
    assert child.result().verdict == "done"
    assert child.count(EventKind.MEMBER_RETURNED) == 2


def test_fork_whose_state_is_lost_everywhere_ends_and_says_so(start: Callable[..., Run]) -> None:
    parent = start(steps=20, checkpoint={"every_steps": 10}, workers={"min": 1, "max": 1})
    parent.result()
    name, overrides = f"{parent.config.name}-fork", ["training.steps=1000", "schedule.total_steps=20"]
    made = fork(Request(RunAddress.at(parent.config.run_url), name, step=20, overrides=overrides))
    schedule = {"warmup_steps": 5, "total_steps": 20}
    child = start(steps=1000, schedule=schedule, checkpoint={}, workers={"min": 1, "max": 1}, name=name, kind=HostedRun)
    child.await_step(23)
    Storage.open(made.url).delete(f"{folder_of(20)}/{MANIFEST}")
    child.kill_a_worker()
    result = child.result()
    assert result.verdict == "failed"
    assert "the state it was forked with is damaged or not there" in result.message
    again = start(steps=1000, schedule=schedule, checkpoint={}, workers={"min": 1, "max": 1}, name=name)
    with pytest.raises(CheckpointError, match="the state it was forked with is damaged or not there"):
        again.result()


def test_fork_with_another_layer_begins_with_its_parents_loss(start: Callable[..., Run]) -> None:
    kept, deeper = {"every_steps": 5, "keep": 3}, {"preset": "tiny", "num_layers": 3}
    parent = start(steps=15, checkpoint=kept, workers={"min": 1, "max": 1})
    assert parent.result().verdict == "done"

    def forked(name: str) -> Forked:
        address = RunAddress.at(parent.config.run_url)
        return fork(Request(address, f"{parent.config.name}-{name}", 5, None, ["model.num_layers=3"]))

    made, undisturbed_one = forked("deeper"), forked("undisturbed")
    child = start(steps=15, checkpoint=kept, workers={"min": 1, "max": 2}, name=made.config.name, model=deeper)
    child.await_step(7)
    child.kill_a_worker()
    digest = child.result().digest
    assert child.steps()[0][:2] == parent.steps()[5][:2]  # step and loss, to the bit: what the layer adds is zero
    assert child.steps()[1][1] != parent.steps()[6][1]
    assert digest == Solo(undisturbed_one.config).train().digest
