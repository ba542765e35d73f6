"""A coordinator's hold on its members: what control hears of those that it finds, and in which order."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from elastic_lm.control import events as ev
from elastic_lm.control.actions import Grant
from elastic_lm.control.controller import Control
from elastic_lm.control.spec import ControlSpec
from elastic_lm.data.order import Order
from elastic_lm.protocol import ReadyReport, ReturnReport
from elastic_lm.runtime.members import Members
from elastic_lm.runtime.roster import Found, Roster
from elastic_lm.runtime.worker import Summons, WorkerBoot

ORDER = Order(4, 8, 0, 1, seed=7, micro_batches=2, micro_batch_size=2, sequence_length=8)


class Answer:
    """A call that was answered before anybody asked."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def remote(self, *arguments: Any) -> Answer:
        return self

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self._value)
        return future


class Lost(Answer):
    """A call that failed before anybody asked."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.num_calls = 0

    def remote(self, *arguments: Any) -> Lost:
        self.num_calls += 1
        return self

    def future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(self._error)
        return future


class QuickWorker:
    """A worker that comes back at once, with the state before `next_step`, or without one."""

    def __init__(self, member_id: str, next_step: int | None) -> None:
        ready = ReadyReport(member_id, "a node", 4_000, probe="same")
        self.adopt = Answer(None)
        self.come_back = Answer(ReturnReport(ready, next_step or 0, whole=next_step is not None))


def found(member_id: str, next_step: int | None) -> Found:
    return Found(member_id, QuickWorker(member_id, next_step), ("a node", 4_000), fits=True)


def adopt(*everybody: Found) -> list[ev.Input]:
    """What control is told."""
    told: list[ev.Input] = []
    adopting(told).adopt(everybody, 0)
    return told


def adopting(told: list[ev.Input]) -> Members:
    boot = WorkerBoot("", Summons(2, ORDER, ("127.0.0.1", 1), "", (), None), 60.0, *[None] * 7)  # type: ignore[arg-type]
    return Members(boot, Roster("run", "abc"), {}, told.append, retire_timeout_s=5.0)


def test_everybody_is_told_to_be_found_before_anybody_comes_back() -> None:
    told = adopt(found("w0", None), found("w1", 101), found("w2", 100))
    assert [type(event) for event in told] == [ev.MemberFound] * 3 + [ev.MemberReturned] * 3


def test_who_cannot_be_reached_is_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection broke: nobody knows whether the call arrived. It is no death, and no reason to wait for ever."""
    monkeypatch.setattr("elastic_lm.runtime.members.ASK_AGAIN_S", 0.0)
    worker = found("w0", 7)
    answer, worker.handle.come_back = worker.handle.come_back, Lost(ActorUnavailableError("cut", None))
    told: list[ev.Input] = []
    members = adopting(told)
    members.adopt([worker], 0)
    members.tend()
    assert [type(event) for event in told] == [ev.MemberFound]
    worker.handle.come_back = answer
    members.tend()
    assert [type(event) for event in told] == [ev.MemberFound, ev.MemberReturned]
    members.tend()
    assert len(told) == 2


def test_call_that_was_lost_is_made_again_and_both_at_once_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who did not hear `adopt` beats for the earlier coordinator, whatever it answered."""
    monkeypatch.setattr("elastic_lm.runtime.members.ASK_AGAIN_S", 0.0)
    worker = found("w0", 7)
    cut = ActorUnavailableError("cut", None)
    worker.handle.adopt, worker.handle.come_back = Lost(cut), Lost(cut)
    members = adopting([])
    members.adopt([worker], 0)
    for _ in range(3):
        members.tend()
    assert worker.handle.adopt.num_calls == worker.handle.come_back.num_calls == 4


def test_who_has_died_is_not() -> None:
    worker = found("w0", 7)
    worker.handle.come_back = Lost(ActorDiedError())
    told: list[ev.Input] = []
    members = adopting(told)
    members.adopt([worker], 0)
    members.tend()
    assert told[1:] == [ev.MemberFailed("w0", "process died", proof=True)]


def test_answer_of_one_without_a_state_restores_no_checkpoint_while_another_has_one() -> None:
    control = Control(ControlSpec(1, 3, num_micro_batches=4, total_steps=200), resume_step=50, owner_epoch=2)
    granted = [
        action.lease
        for event in adopt(found("w0", None), found("w1", 101))
        for action in control.handle(event, 1_000.0)
        if isinstance(action, Grant)
    ]
    assert [(lease.start_step, lease.restore, lease.members) for lease in granted] == [(101, None, ("w0", "w1"))]


def test_whoever_hands_on_ends_those_for_certain_that_he_has_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is frozen hears nothing, and its successor's coordinator finds none by its name."""
    reaped: list[tuple[str, int]] = []
    monkeypatch.setattr("elastic_lm.runtime.members.reap", lambda *place: reaped.append(place))
    monkeypatch.setattr("elastic_lm.runtime.members.ray.kill", lambda handle, no_restart: None)
    members = adopting([])
    members.adopt([found("w0", 7), found("w1", 7)], 0)
    members.kill("w0")
    members.hand_on()
    assert reaped == [("a node", 4_000)]
    assert "w1" in members
