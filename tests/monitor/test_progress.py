"""What people read while a run trains: one line per interval, news at once, nothing twice."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.goodput import Goodput
from elastic_lm.monitor.progress import NEWS, NEWSWORTHY_CAUSES, Progress
from tests.monitor.story import at, committed, lost, ready, reformed, started


def lines(events: Iterable[Event], *, total_steps: int = 1_000, interval_s: float = 5.0) -> list[str]:
    goodput = Goodput(4)
    progress = Progress(total_steps, interval_s, goodput)
    told = []
    for event in events:
        goodput.observe(event)
        told += progress.lines(event)
    return told


def steps(told: list[str]) -> list[int]:
    return [int(line.partition("  step ")[2].partition("/")[0]) for line in told if "  step " in line]


def test_line_says_clock_step_loss_speed_workers_and_goodput() -> None:
    start = [started(3_720, "w0"), ready(3_721, "w0")]
    events = [*start, *(committed(3_722 + step, step, world_size=1, tokens=4_000) for step in range(2))]
    # Two of the three held seconds trained.
    assert lines(events, interval_s=0.5)[-1] == (
        "1:02:03  step 2/1,000 · loss 2.5000 · 4,000 tokens/s · 1.00 s per step · 1 worker · goodput 67%"
    )


def test_first_line_leaves_out_what_is_not_known_yet() -> None:
    assert lines([committed(4, 0)])[0] == "0:00:04  step 1/1,000 · loss 2.5000 · 1.00 s per step · 2 workers"


def test_at_most_one_line_comes_per_interval() -> None:
    assert steps(lines(committed(float(number), number) for number in range(20))) == [1, 6, 11, 16]


def test_last_step_is_told_at_once() -> None:
    told = lines((committed(0.1 * number, number) for number in range(20)), total_steps=20)
    assert steps(told) == [1, 20]


def test_interval_counts_from_the_line_before_and_not_from_a_grid() -> None:
    times = [0.0, 4.9, 7.0, 11.9, 12.0]
    assert steps(lines(committed(time, number) for number, time in enumerate(times))) == [1, 3, 5]


@pytest.mark.parametrize("kind", sorted(NEWS))
def test_news_is_told_at_once_in_its_own_words(kind: EventKind) -> None:
    event = at(61, kind, member_id="w0", cause="process died", node_id="n0")
    assert lines([event]) == [f"0:01:01  {event.message}"]


def test_news_comes_between_lines_of_progress_and_delays_none() -> None:
    told = lines([committed(0, 0), lost(1, "w1"), lost(2, "w2"), committed(5, 1)])
    assert [line.split()[0] for line in told] == ["0:00:00", "0:00:01", "0:00:02", "0:00:05"]


@pytest.mark.parametrize("cause", sorted(NEWSWORTHY_CAUSES))
def test_interruption_is_told_when_training_goes_on(cause: str) -> None:
    assert lines([reformed(3, cause, lost_s=0.8)]) == ["0:00:03  reformed happened."]


@pytest.mark.parametrize("cause", ["checkpoint", "lease"])
def test_interruption_of_every_day_is_not_told(cause: str) -> None:
    assert lines([reformed(3, cause, lost_s=0.01)]) == []


@pytest.mark.parametrize("kind", [EventKind.LEASE_GRANTED, EventKind.MEMBER_REQUESTED, EventKind.MEMBER_STARTED])
def test_what_only_the_log_needs_is_not_told(kind: EventKind) -> None:
    assert lines([at(3, kind, member_id="w0", members=["w0"])]) == []
