"""A feed: everything in order, and nothing that a tracker does reaches whoever feeds it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

import pytest

from elastic_lm.events.types import Event, EventKind
from elastic_lm.tracking.feed import Feed, fill
from tests.monitor.story import at, committed, lost
from tests.monitor.test_history import begun, finished
from tests.tracking.sinks import Hanging, Keeping, Raising

WAIT_S = 20.0


def steps(start: int, stop: int) -> list[Event]:
    return [committed(float(step), step) for step in range(start, stop)]


def nothing() -> Iterable[Event]:
    return ()


def end(feed: Feed) -> None:
    feed.end()
    feed.join(WAIT_S)


@pytest.fixture
def hanging() -> Iterator[type[Hanging]]:
    """Makes sinks that hang, and lets go of them in the end."""
    made: list[Hanging] = []

    class Noted(Hanging):
        def __init__(self, where: str) -> None:
            super().__init__(where)
            made.append(self)

    yield Noted
    for sink in made:
        sink.over.set()


def test_tracker_gets_the_past_then_what_is_offered_each_once_and_in_order() -> None:
    sink = Keeping()
    feed = Feed(sink, lambda: [begun(), *steps(0, 3)])
    feed.offer(steps(3, 5))
    feed.offer([lost(6, "w1"), *steps(5, 6), finished(7, "done")])
    end(feed)
    assert feed.problem is None
    assert [event.step for event in sink.events] == [0, 1, 2, 3, 4, 5, None]
    assert sink.events[-1].kind is EventKind.RUN_FINISHED  # of the others it gets none
    assert sink.calls[:2] == ["open", "caught up with 3"] and sink.calls[-1] == "close"


def test_what_is_offered_after_the_end_is_not_taken() -> None:
    sink = Keeping()
    feed = Feed(sink, nothing)
    end(feed)
    feed.offer(steps(0, 1))
    assert sink.events == [] and feed.problem is None


@pytest.mark.parametrize("where", ["open", "write", "caught_up", "flush", "close"])
@pytest.mark.parametrize("error", [ValueError("a bug"), SystemExit(3), OSError(28, "No space left")], ids=repr)
def test_tracker_that_raises_is_given_up_with_one_sentence(where: str, error: BaseException) -> None:
    sink = Raising(where, error)
    feed = Feed(sink, nothing, advice=" Do this.")
    feed.offer(steps(0, 2))
    end(feed)
    reason = f"{type(error).__name__}: {error}"
    assert feed.problem == f"Raising gets nothing more: {reason}. Training goes on. Do this."
    assert sink.calls[-1] == "close"  # files and locks are let go
    feed.offer(steps(2, 4))
    assert len(sink.events) <= 2


def test_past_that_cannot_be_read_is_told() -> None:
    def past() -> Iterator[Event]:
        yield from steps(0, 1)
        raise OSError("storage is gone")

    feed = Feed(Keeping(), past)
    end(feed)
    assert feed.problem is not None and "OSError: storage is gone" in feed.problem


def test_tracker_that_hangs_is_given_up_once_too_much_waits(hanging: type[Hanging]) -> None:
    sink = hanging("write")
    feed = Feed(sink, nothing, max_waiting=10)
    feed.offer(steps(0, 1))
    assert sink.reached.wait(WAIT_S)
    for step in range(1, 100):  # none of these comes back late, or the test would end by its time limit
        feed.offer(steps(step, step + 1))
    assert feed.problem == "Hanging gets nothing more: it is too slow: 10 events wait for it. Training goes on."
    sink.over.set()  # late, it comes back
    feed.join(WAIT_S)
    assert sink.calls[-1] == "close" and [event.step for event in sink.events] == [0]


@pytest.mark.parametrize("where", ["open", "write", "close"])
def test_tracker_that_hangs_at_the_end_is_left_behind_in_time(where: str, hanging: type[Hanging]) -> None:
    sink = hanging(where)
    feed = Feed(sink, nothing)
    feed.offer(steps(0, 1))
    feed.end()
    assert sink.reached.wait(WAIT_S)
    feed.join(0.05)
    assert feed.problem == "Hanging gets nothing more: it did not end in time. Training goes on."


def test_slow_tracker_that_keeps_up_is_left_alone() -> None:
    """As many as may wait, wait."""
    gate = threading.Event()

    class Slow(Keeping):
        def open(self) -> None:
            gate.wait(WAIT_S)
            super().open()

    sink = Slow()
    feed = Feed(sink, nothing, max_waiting=10)
    feed.offer(steps(0, 10))
    gate.set()
    end(feed)
    assert feed.problem is None and len(sink.events) == 10


def test_catching_up_rests_but_not_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_lm.tracking.feed.WORK_S", 0.0)
    sink = Keeping()
    feed = Feed(sink, lambda: steps(0, 500))
    end(feed)
    assert len(sink.events) == 500 and feed.problem is None


def test_key_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2hunter2")
    feed = Feed(Raising("open", ValueError("bad key hunter2hunter2 given\nsecond line")), nothing)
    end(feed)
    assert feed.problem is not None
    assert "hunter2" not in feed.problem and "bad key *** given second line" in feed.problem


def test_stored_log_is_filled_in_as_a_live_one_is() -> None:
    events = [begun(), *steps(0, 4), at(5, EventKind.NOTE), finished(6, "done")]
    live, stored = Keeping(), Keeping()
    feed = Feed(live, lambda: events[:3])
    feed.offer(events[3:])
    end(feed)
    fill(stored, events)
    assert stored.events == live.events
