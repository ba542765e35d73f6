"""A run replayed from its log: every step once, times that go on over attempts, the last verdict."""

from __future__ import annotations

import pytest

from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.history import History
from tests.monitor.story import at, committed, evaluated, lost, ready, reformed, rewound, started

CONFIG = {"batch": {"micro_batches": 8}, "training": {"steps": 10}}


def begun(elapsed_s: float = 0.0, **more: int) -> Event:
    return at(elapsed_s, EventKind.RUN_STARTED, config=CONFIG, resume_step=None, **more)


def granted(elapsed_s: float, world_size: int) -> Event:
    return at(elapsed_s, EventKind.LEASE_GRANTED, world_size=world_size)


def finished(elapsed_s: float, verdict: str, **more: int) -> Event:
    return at(elapsed_s, EventKind.RUN_FINISHED, verdict=verdict, **more)


def test_points_are_the_committed_steps_in_order() -> None:
    history = History.of([begun(), committed(2, 0), committed(3, 1, tokens=100)])
    assert [(p.time_s, p.step, p.tokens) for p in history.points] == [(2, 0, 400), (3, 1, 100)]
    assert history.num_tokens == 500
    assert history.config == CONFIG


def test_step_that_was_trained_again_counts_once_and_as_the_last_time() -> None:
    events = [begun(), committed(1, 0), committed(2, 1), committed(3, 2), committed(9, 1, loss=1.5), committed(10, 2)]
    history = History.of(events)
    assert [(p.step, p.time_s) for p in history.points] == [(0, 1), (1, 9), (2, 10)]
    assert history.points[1].fields["loss"] == 1.5


def test_what_the_run_went_back_from_is_not_its_own() -> None:
    events = [begun(), *(committed(1 + step, step) for step in range(5)), evaluated(3, 2), evaluated(5, 4)]
    history = History.of([*events, rewound(9, 2, num_steps=3)])
    assert [point.step for point in history.points] == [0, 1]
    assert list(history.evaluations) == [2]
    history = History.of([*events, rewound(9, 2, num_steps=3), committed(20, 2, loss=1.5, attempt=2)])
    assert [(point.step, point.fields["loss"]) for point in history.points][-1] == (2, 1.5)
    assert "went back" in history.news[-1].message


def test_rate_is_tokens_by_wall_time_between_steps() -> None:
    history = History.of([begun(), *(committed(2.0 * step, step) for step in range(5))])
    assert history.tokens_per_s() == ([2.0, 4.0, 6.0, 8.0], [200.0] * 4)
    assert history.tokens_per_s(most_parts=2) == ([4.0, 8.0], [200.0] * 2)


def test_rate_of_short_steps_is_taken_over_longer_than_heartbeats_are_apart() -> None:
    told = [committed(round(0.35 * step, 1), step) for step in range(41)]  # by a heartbeat, a little late or early
    times, rates = History.of([begun(), *told]).tokens_per_s()
    assert len(times) == 8
    assert max(rates) / min(rates) < 1.1


def test_rate_counts_the_time_that_nobody_trained() -> None:
    history = History.of([begun(), committed(1, 0), committed(3, 1), committed(11, 2)])
    assert history.tokens_per_s()[1] == [200.0, 50.0]


@pytest.mark.parametrize("events", [[], [begun()], [begun(), committed(1, 0)]])
def test_too_few_steps_have_no_rate(events: list[Event]) -> None:
    assert History.of(events).tokens_per_s() == ([], [])


def test_faults_sizes_and_checkpoints_are_kept_with_their_times() -> None:
    saved = at(6, EventKind.CHECKPOINT_SAVED, step=4, seconds=0.5)
    events = [begun(1), started(1, "w0"), ready(2, "w0", environment={"torch": "2"}), granted(3, 2), lost(4, "w1"),
              reformed(5, "failure", 0.2), granted(5, 1), reformed(6, "checkpoint", 0.1), saved]  # fmt: skip
    history = History.of(events)
    assert history.world_sizes == [(2, 2), (4, 1)]  # seconds since the first event
    assert history.num_lost == 1
    assert [event.fields["cause"] for event in history.interruptions] == ["failure"]
    assert history.checkpoints == [saved]
    assert history.environment == {"torch": "2"}
    assert [event.kind for event in history.news] == [
        EventKind.RUN_STARTED, EventKind.MEMBER_READY, EventKind.MEMBER_LOST, EventKind.REFORMED,
        EventKind.CHECKPOINT_SAVED,
    ]  # fmt: skip


def test_verdict_is_that_of_the_last_attempt() -> None:
    stopped = [begun(), finished(5, "stopped")]
    assert History.of(stopped).verdict == "stopped"
    again = [*stopped, begun(10, attempt=2)]
    assert History.of(again).verdict is None  # it runs
    assert History.of([*again, finished(12, "done", attempt=2)]).verdict == "done"
    assert History.of(again).attempts == 2


def test_mismatch_is_counted() -> None:
    assert History.of([begun(), at(1, EventKind.STEP_MISMATCH, logged={}, told={})]).num_mismatches == 1
