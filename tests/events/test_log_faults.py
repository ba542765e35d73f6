"""The event log on an S3 that misbehaves: every event once, in order, and it is never taken for somebody else's."""

from __future__ import annotations

import logging

import pytest

from elastic_lm.events import log
from elastic_lm.events.types import Event, EventKind
from elastic_lm.storage import Storage
from tests.faults import proxy as p
from tests.faults.proxy import FaultyProxy

pytestmark = [pytest.mark.s3, pytest.mark.slow]

NUM_EVENTS = 60
PERSISTENT_S = 60.0


def event(number: int) -> Event:
    return Event(EventKind.NOTE, f"note {number}", step=number)


def written_in_segments(folder: Storage) -> list[Event]:
    """Written, each few in a segment of their own."""
    written = log.EventLog(folder)
    events = [event(number) for number in range(NUM_EVENTS)]
    for one in events:
        written.append(one)
        if (one.step or 0) % 4 == 3:
            assert written.flush(PERSISTENT_S)
    assert written.close(PERSISTENT_S)
    return events


@pytest.mark.parametrize("seed", range(2))
def test_events_come_through_a_storm_once_and_in_order(
    seed: int, proxy: FaultyProxy, s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Storage.open(f"{s3_url}/events")
    assert folder.list() == []
    proxy.calm(seed)
    storm = [p.status(503), p.reset, p.answer_lost, p.delayed(0.05)]
    rules = [proxy.inject(fault, on="/events", probability=0.2) for fault in storm]
    with caplog.at_level(logging.ERROR):
        events = written_in_segments(folder)
    assert sum(len(rule.hits) for rule in rules) > 3
    problems: list[str] = []
    assert list(log.read(folder, on_problem=problems.append)) == events
    assert problems == []
    assert not [r for r in caplog.records if "somebody else" in r.message]


def test_segment_whose_answer_was_lost_is_ones_own(proxy: FaultyProxy, s3_url: str) -> None:
    """Found with the proxy: the log took it for another writer's, and wrote nothing more."""
    folder = Storage.open(f"{s3_url}/events")
    lost = proxy.inject(p.answer_lost, on="^PUT ", times=3)
    events = written_in_segments(folder)
    assert len(lost.hits) == 3
    assert list(log.read(folder)) == events
