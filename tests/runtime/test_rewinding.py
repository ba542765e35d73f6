"""What is done about a spike: by the policy, and by how often the run has gone back."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.control import events as ev
from elastic_lm.control.actions import REWOUND
from elastic_lm.data.order import batch_of
from elastic_lm.errors import StorageError, SupersededError
from elastic_lm.experiment.rewinds import Rewind, Rewinds
from elastic_lm.experiment.spikes import Spike
from elastic_lm.protocol import Generation, LeaseEnd, LeaseReport
from elastic_lm.result import RunResult
from elastic_lm.runtime import trainer
from elastic_lm.runtime.coordinator import Coordinator, Legacy
from elastic_lm.runtime.reader_pool import ReaderPool
from elastic_lm.runtime.rewinding import Rewinding
from tests.solo import solo_config

if TYPE_CHECKING:
    from elastic_lm.ownership import Ownership
    from elastic_lm.runtime.recorder import Recorder

SPIKE = Spike(100, 102, "loss", "the loss stands out")


def config(tmp_path: Path, **changes: str) -> RunConfig:
    spikes = {"rewind_steps": 10, "skip_batches": 30, "max_rewinds": 1, **changes}
    return solo_config("/tokens", f"file://{tmp_path}", steps=500, spikes=spikes, checkpoint={"every_steps": 20})


def report(end: LeaseEnd, step: int | None) -> LeaseReport:
    return LeaseReport("w0", Generation(1, 1), end, 7, whole=True, error="it is not finite", error_step=step)


@pytest.mark.parametrize(("policy", "to_step"), [("rewind", 90), ("skip", 100)])
def test_run_goes_back_once_however_often_it_is_asked(policy: str, to_step: int, tmp_path: Path) -> None:
    rewinding = Rewinding(config(tmp_path, policy=policy), Rewinds(), 0)
    first = rewinding.judge(SPIKE)
    decided = rewinding.decided
    assert isinstance(first, ev.SpikeFound) and decided is not None
    assert (first.to_step, first.reason) == (to_step, str(decided))
    assert rewinding.judge(Spike(200, 202, "loss", "another one")) == first
    assert rewinding.decided is decided


def test_policy_stop_ends_the_run_with_advice(tmp_path: Path) -> None:
    rewinding = Rewinding(config(tmp_path, policy="stop"), Rewinds(), 0)
    told = rewinding.judge(SPIKE)
    assert isinstance(told, ev.Spoiled) and told.verdict == "spiked"
    assert "--skip 90:120, with a checkpoint of step 90 or earlier" in told.message
    assert told.message.endswith("To train on through it, resume it with --set spikes.accept_until=103")
    assert rewinding.judge(SPIKE) is told
    assert rewinding.decided is None


@pytest.mark.parametrize("policy", ["stop", "skip", "rewind"])
def test_advice_leaves_out_the_whole_spike(policy: str, tmp_path: Path) -> None:
    """A spike may be longer than its steps in a row by steps that were left out, and `stop` has no use for skip_batches."""
    spike = Spike(100, 130, "loss", "the loss stands out")
    chosen = config(tmp_path, policy=policy)
    made = Rewinds((Rewind.of(Spike(50, 52, "loss", "the loss stood out"), chosen, number=1),))
    applied = chosen if policy == "stop" else made.applied(chosen)
    told = Rewinding(applied, Rewinds() if policy == "stop" else made, 0).judge(spike)
    assert isinstance(told, ev.Spoiled)
    found = re.search(r"--skip (\d+):(\d+), with a checkpoint of step (\d+)", told.message)
    assert found is not None
    start, stop, step = map(int, found.groups())
    skip = applied.training.skip
    assert start == batch_of(step, skip) <= batch_of(100, skip)
    assert stop > batch_of(130, skip)


@pytest.mark.parametrize(("every_steps", "begins_at", "can_fork"), [
    ("null", 0, False), ("91", 0, False), ("90", 0, True), ("null", 40, True),
])  # fmt: skip
def test_fork_is_advised_where_there_may_be_a_checkpoint_to_fork(
    every_steps: str, begins_at: int, can_fork: bool, tmp_path: Path
) -> None:
    chosen = config(tmp_path, policy="stop").replace(f"checkpoint.every_steps={every_steps}", "training.skip=[[3, 5]]")
    told = Rewinding(chosen, Rewinds(), begins_at).judge(SPIKE)
    assert isinstance(told, ev.Spoiled)
    assert ("elastic-lm fork" in told.message) == can_fork
    if not can_fork:
        assert (
            "--set name=solo-2 --set 'training.skip=[[3,5],[92,122]]', for no checkpoint is of step 90" in told.message
        )


def test_run_that_has_gone_back_often_enough_ends(tmp_path: Path) -> None:
    chosen = config(tmp_path, policy="rewind")
    made = Rewinds((Rewind.of(SPIKE, chosen, number=1),))
    told = Rewinding(made.applied(chosen), made, 0).judge(Spike(200, 202, "loss", "the loss stands out again"))
    assert isinstance(told, ev.Spoiled)
    assert "The run has gone back 1 time (spikes.max_rewinds)." in told.message


def test_run_goes_back_to_where_it_went_back_to_before(tmp_path: Path) -> None:
    chosen = config(tmp_path, policy="rewind").replace("spikes.max_rewinds=2")
    made = Rewinds((Rewind.of(SPIKE, chosen, number=1),))
    told = Rewinding(made.applied(chosen), made, 0).judge(Spike(95, 97, "loss", "the loss stands out again"))
    assert told == ev.SpikeFound(90, "Back to step 90, leaving out batches 120:150: the loss stands out again")


def test_rewind_that_cannot_be_ends_the_run_with_advice(tmp_path: Path) -> None:
    rewinding = Rewinding(config(tmp_path, policy="rewind"), Rewinds(), 0)
    rewinding.judge(SPIKE)
    assert rewinding.decided is not None
    verdict = rewinding.end(rewinding.decided, "there is none", 110)
    assert (verdict.kind, verdict.step) == ("spiked", 110)
    assert verdict.message == (
        "the loss stands out. The run cannot go back: there is none. To train on through it, resume it with --set "
        "spikes.accept_until=103"
    )
    assert rewinding.decided is None


def test_step_that_came_to_nothing_is_gone_back_from_where_that_is_wanted(tmp_path: Path) -> None:
    wanted = config(tmp_path).replace("training.on_nonfinite=rewind")
    found = Rewinding(wanted, Rewinds(), 0).judge_report(report(LeaseEnd.POISONED, 50))
    assert found is not None and found.to_step == 40
    assert Rewinding(wanted, Rewinds(), 45).judge_report(report(LeaseEnd.POISONED, 50)) == ev.SpikeFound(
        45, "Back to step 45, leaving out batches 45:75: it is not finite"
    )
    for other in (report(LeaseEnd.RAISED, 50), report(LeaseEnd.POISONED, None)):
        assert Rewinding(wanted, Rewinds(), 0).judge_report(other) is None
    assert Rewinding(config(tmp_path), Rewinds(), 0).judge_report(report(LeaseEnd.POISONED, 50)) is None


def test_checkpoint_under_way_counts_if_it_is_of_what_stays(tmp_path: Path) -> None:
    """It may be the only one to go on from."""
    coordinator = Coordinator.__new__(Coordinator)
    coordinator._recorder = cast("Recorder", SimpleNamespace(flush=lambda: True))
    coordinator._owner = cast("Ownership", SimpleNamespace(check=lambda: None))
    coordinator._rewinding = Rewinding(config(tmp_path, policy="rewind"), Rewinds(), 0)
    coordinator._check_before_publishing(95)
    coordinator._rewinding.judge(SPIKE)  # back to 90
    coordinator._check_before_publishing(90)
    for step in (91, None):
        with pytest.raises(StorageError, match="goes back"):
            coordinator._check_before_publishing(step)


class Claimed:
    def __init__(self, before: Claimed | None) -> None:
        self.before = before
        self.is_released = False

    def release(self) -> None:
        self.is_released = True


class Pool:
    """Readers, in name."""

    def __init__(self) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("end", ["done", "superseded", "taken"])
def test_run_that_goes_back_is_claimed_anew_and_leaves_no_reader_at_its_end(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has taken the readers ends them himself."""
    owners: list[Claimed] = []
    pool = Pool()

    def claim(*_: object, succeeds: Claimed | None) -> Claimed:
        owners.append(Claimed(succeeds))
        return owners[-1]

    def attempt(_config: RunConfig, _mailbox: object, owner: Claimed, legacy: Legacy, _number: int) -> RunResult:
        if owner is owners[0]:
            legacy.readers = cast("ReaderPool", pool)
            return RunResult(REWOUND, "", 90)
        assert legacy.is_left
        if end == "superseded":
            raise SupersededError("by another")
        if end == "taken":
            assert legacy.take() is pool
        return RunResult("done", "", 500)

    monkeypatch.setattr(trainer, "claim", claim)
    monkeypatch.setattr(trainer, "_attempt", attempt)
    with pytest.raises(SupersededError) if end == "superseded" else contextlib.nullcontext():
        assert trainer.coordinate(config(tmp_path), None, "token").verdict == "done"
    first, second = owners
    assert (first.before, second.before) == (None, first)
    assert (first.is_released, second.is_released) == (False, end != "superseded")
    assert pool.is_closed == (end != "taken")
