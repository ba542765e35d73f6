"""Why nobody trains: one cause and one span of time for each standstill."""

from __future__ import annotations

import pytest

from elastic_lm.control.interruption import LEASE, PLANNED, ROUTINE, TAKEOVER, Standstill
from elastic_lm.events.types import EventKind
from elastic_lm.protocol import Generation, Lease
from tests.control.told import Told

FIRST, SECOND, THIRD = (Generation(0, number) for number in (1, 2, 3))


def lease(generation: Generation, world_size: int = 2) -> Lease:
    members = tuple(f"w{number}" for number in range(world_size))
    return Lease(generation, members, None, 0, 10, tuple((number,) for number in range(world_size)))


def test_work_in_a_later_generation_ends_it() -> None:
    told = Told()
    standstill = Standstill(told)
    standstill.begin("failure", "w1 died", FIRST, 10.0)
    standstill.end(lease(FIRST), 4, 10.1)  # a beat that was under way
    assert standstill.lasts and not told
    standstill.end(lease(SECOND, 1), 4, 10.5)
    assert not standstill.lasts
    (event,) = told
    assert event.kind is EventKind.REFORMED and event.step == 4
    assert event.message == "Training again after 0.50 s with 1 worker (failure: w1 died)."
    assert event.fields == {"cause": "failure", "lost_s": 0.5, "world_size": 1}
    standstill.end(lease(SECOND, 1), 5, 11.0)
    assert len(told) == 1


@pytest.mark.parametrize("planned", PLANNED)
def test_failure_outranks_a_plan_and_the_time_counts_from_the_first(planned: str) -> None:
    told = Told()
    standstill = Standstill(told)
    standstill.begin(planned, "", FIRST, 10.0)
    standstill.begin("failure", "w1 died", SECOND, 11.0)
    standstill.begin("hang", "w2 silent", SECOND, 11.5)
    standstill.end(lease(SECOND), 4, 12.0)
    assert standstill.lasts
    standstill.end(lease(THIRD), 4, 12.0)
    assert told[0].fields == {"cause": "failure", "lost_s": 2.0, "world_size": 2}


@pytest.mark.parametrize(
    ("began", "told_cause"),
    [*((routine, "join") for routine in ROUTINE), ("drain", "drain"), ("failure", "failure"), (TAKEOVER, TAKEOVER)],
)
def test_a_change_of_the_set_is_the_cause_where_routine_alone_would_be(began: str, told_cause: str) -> None:
    told = Told()
    standstill = Standstill(told)
    standstill.attribute_to("join")
    assert not standstill.lasts
    standstill.begin(began, "", FIRST, 10.0)
    standstill.attribute_to("join")
    standstill.end(lease(SECOND), 0, 11.0)
    assert told[0].fields["cause"] == told_cause


@pytest.mark.parametrize(
    ("began", "told_cause"), [(LEASE, "evaluation"), ("checkpoint", "checkpoint"), ("join", "join")]
)
def test_routine_is_the_cause_where_a_lease_ended_and_nothing_else_happened(began: str, told_cause: str) -> None:
    told = Told()
    standstill = Standstill(told)
    standstill.begin(began, "", FIRST, 10.0)
    standstill.attribute_to("evaluation")
    standstill.end(lease(SECOND), 0, 11.0)
    assert told[0].fields["cause"] == told_cause


def test_wait_for_workers_is_told_once_and_includes_what_led_to_it() -> None:
    told = Told()
    standstill = Standstill(told)
    standstill.begin("failure", "w0 died", FIRST, 10.0)
    standstill.wait(1, 2, FIRST, 11.0)
    standstill.wait(1, 2, FIRST, 12.0)
    standstill.end(lease(SECOND), 4, 13.0)
    assert [event.message for event in told] == [
        "Waiting for 2 workers; 1 ready.", "Training again after 3.00 s with 2 workers (wait: waited for 2 workers).",
    ]  # fmt: skip


def test_first_wait_is_the_start() -> None:
    told = Told()
    standstill = Standstill(told)
    standstill.wait(0, 1, Generation(0, 0), 10.0)
    standstill.end(lease(FIRST, 1), 0, 12.0)
    assert told[1].message == "Training after 2.00 s with 1 worker (start: waited for 1 worker)."
