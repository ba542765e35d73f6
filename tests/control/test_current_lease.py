"""The lease that is out: who owes a report, and how it comes to its end."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_lm.control import actions as act
from elastic_lm.control.current_lease import CurrentLease, Mode
from elastic_lm.protocol import Generation, Lease, LeaseEnd


def begun(said: list[act.Action], *, is_for_all: bool = True, **fields: Any) -> CurrentLease:
    current = CurrentLease(3, said.append)
    grant(current, is_for_all=is_for_all, **fields)
    said.clear()
    return current


def grant(current: CurrentLease, *, is_for_all: bool = True, stop_step: int = 10, evaluates: bool = False) -> Lease:
    parts = ((0, 1), (2, 3))
    lease = Lease(current.next_generation(), ("w0", "w1"), None, 0, stop_step, parts, evaluates=evaluates)
    current.begin(lease, is_for_all=is_for_all)
    return lease


def finish(current: CurrentLease, end: LeaseEnd = LeaseEnd.COMPLETED) -> str:
    for member_id in ("w0", "w1"):
        current.reported(member_id, end)
    return current.close()


def test_nothing_is_out_before_the_first_grant_and_after_the_last_report() -> None:
    said: list[act.Action] = []
    current = CurrentLease(3, said.append)
    assert not current.is_out and not current.is_over and current.mode is Mode.IDLE and current.world_size == 0
    lease = grant(current)
    assert said == [act.Grant(lease)] and current.generation == lease.generation == Generation(3, 1)
    assert current.trains and current.world_size == 2 and current.includes("w1") and not current.includes("w2")
    current.reported("w0", LeaseEnd.COMPLETED)
    assert list(current.owing) == ["w1"] and not current.is_over
    current.left("w1")
    assert current.is_over
    assert current.close() == "lease"
    assert not current.is_out and current.mode is Mode.IDLE


def test_next_generation_is_higher_than_the_last_one() -> None:
    current = begun([])
    finish(current)
    assert grant(current).generation == Generation(3, 2)


def test_next_lease_waits_for_every_report() -> None:
    current = begun([])
    with pytest.raises(AssertionError):
        grant(current)
    current.reported("w0", LeaseEnd.COMPLETED)
    with pytest.raises(AssertionError):
        current.close()


def test_end_is_asked_for_once_and_the_first_cause_is_told() -> None:
    said: list[act.Action] = []
    current = begun(said)
    current.end_after_step("join")
    current.end_after_step("drain")
    assert said == [act.EndLease(Generation(3, 1), ("w0", "w1"))] and not current.trains
    assert finish(current, LeaseEnd.ENDED_EARLY) == "join"
    grant(current)
    assert finish(current) == "lease"


def test_fence_goes_to_those_who_owe_a_report_once_and_forbids_a_vote() -> None:
    said: list[act.Action] = []
    current = begun(said)
    current.reported("w0", LeaseEnd.BROKEN)
    assert current.fenced_at is None
    current.fence(5.0)
    current.fence(6.0)
    current.end_after_step("join")
    assert said == [act.Fence(("w1",), Generation(3, 1))]
    current.slept(2.0)
    assert current.fenced_at == 7.0


@pytest.mark.parametrize("end", LeaseEnd)
def test_group_is_kept_by_those_who_all_came_back_in_agreement(end: LeaseEnd) -> None:
    current = begun([])
    lease = current.lease
    finish(current, end)
    assert current.settled == (lease if end in (LeaseEnd.COMPLETED, LeaseEnd.ENDED_EARLY) else None)
    grant(current)
    assert current.settled is None


def test_group_of_a_fenced_lease_is_not_kept_whatever_its_members_say() -> None:
    current = begun([])
    current.fence(5.0)
    finish(current, LeaseEnd.COMPLETED)
    assert current.settled is None


@pytest.mark.parametrize(("end", "is_kept"), [(LeaseEnd.COMPLETED, True), (LeaseEnd.FENCED, False)])
def test_evaluation_leaves_its_members_the_group_they_had(end: LeaseEnd, is_kept: bool) -> None:
    current = begun([])
    trained = current.lease
    finish(current)
    grant(current, evaluates=True, stop_step=0)
    assert not current.trains and current.settled == trained
    finish(current, end)
    assert current.settled == (trained if is_kept else None)
