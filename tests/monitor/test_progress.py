"""What people read while a run trains: news at once and in its own words, the figures at intervals, nothing twice."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.monitor.progress import NEWSWORTHY_CAUSES, TONES, Lines, News, Snapshot, clock, news_of
from tests.monitor.story import at, lost, reformed

SNAPSHOT = Snapshot(2, 1_000, "training", 1, 1, 1, loss=2.5, tokens_per_s=4_000, step_s=1.0, goodput=2 / 3,
                    elapsed_s=3_723, eta_s=998)  # fmt: skip


def at_step(step: int, elapsed_s: float, **changes: Any) -> Snapshot:
    return dataclasses.replace(SNAPSHOT, step=step, elapsed_s=elapsed_s, **changes)


def told(*seen: Snapshot | News, interval_s: float = 5.0) -> list[str]:
    lines: list[str] = []
    view = Lines(lines.append, interval_s)
    for one in seen:
        view.news(one) if isinstance(one, News) else view.snapshot(one)
    return lines


def steps(lines: list[str]) -> list[int]:
    return [int(line.partition("  step ")[2].partition("/")[0]) for line in lines if "  step " in line]


# -- lines -----------------------------------------------------------------------------------------------------------


def test_line_says_clock_step_loss_speed_workers_goodput_and_what_is_left() -> None:
    assert told(SNAPSHOT) == [
        "1:02:03  step 2/1,000 · loss 2.5000 · 4,000 tokens/s · 1 of 1 worker · goodput 67% · 1.00 s per step · 0:16:38 left"
    ]


def test_line_leaves_out_what_is_not_known() -> None:
    assert told(Snapshot(1, 10, "training", 2, 1, 4, loss=2.5, elapsed_s=4)) == [
        "0:00:04  step 1/10 · loss 2.5000 · 2 workers (1..4)"
    ]


def test_mfu_is_told_where_it_is_known() -> None:
    assert "· MFU 41% ·" in told(dataclasses.replace(SNAPSHOT, mfu=0.412))[0]


def test_nothing_is_told_before_the_first_step() -> None:
    assert told(at_step(0, 0), at_step(0, 100)) == []


def test_nothing_is_told_of_the_steps_before_a_resume() -> None:
    waiting = at_step(20, 0, world_size=0, state="waiting for workers")
    assert steps(told(waiting, at_step(20, 3), at_step(21, 4), interval_s=1.0)) == [20, 21]
    assert told(waiting, waiting) == []


def test_at_most_one_line_comes_per_interval() -> None:
    assert steps(told(*(at_step(step, step) for step in range(1, 21)))) == [1, 6, 11, 16]


def test_last_step_is_told_at_once_and_once() -> None:
    seen = [at_step(step, 0.1 * step, total_steps=20) for step in range(1, 21)]
    lines = told(*seen, seen[-1])
    assert steps(lines) == [1, 20]
    assert "left" not in lines[-1]


def test_workers_that_are_gone_at_the_end_are_not_counted() -> None:
    end = at_step(20, 9, total_steps=20, world_size=0, state="finishing")
    assert told(end) == ["0:00:09  step 20/20 · loss 2.5000 · 4,000 tokens/s · goodput 67% · 1.00 s per step"]


def test_interval_counts_from_the_line_before_and_not_from_a_grid() -> None:
    times = [0.0, 4.9, 7.0, 11.9, 12.0]
    assert steps(told(*(at_step(number, time) for number, time in enumerate(times, start=1)))) == [1, 3, 5]


def test_news_comes_between_and_delays_no_line() -> None:
    lines = told(at_step(1, 0), News("w1 is lost"), at_step(2, 4), News("on again"), at_step(3, 5))
    assert [line[:10] for line in lines] == ["0:00:00  s", "w1 is lost", "on again", "0:00:05  s"]


# -- news ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(TONES))
def test_news_is_an_events_own_words(kind: EventKind) -> None:
    event = at(61, kind, member_id="w0", cause="process died", node_id="n0")
    assert news_of(event) == News(f"0:01:01  {event.message}", TONES[kind])


def test_a_loss_is_bad_and_going_on_is_good() -> None:
    assert [news_of(e).tone for e in (lost(1, "w1"), reformed(2, "failure", 0.2))] == ["bad", "good"]  # type: ignore[union-attr]


@pytest.mark.parametrize("cause", sorted(NEWSWORTHY_CAUSES))
def test_interruption_is_told_when_training_goes_on(cause: str) -> None:
    assert news_of(reformed(3, cause, lost_s=0.8)) == News("0:00:03  reformed happened.", "good")


@pytest.mark.parametrize("cause", ["checkpoint", "lease"])
def test_interruption_of_every_day_is_not_told(cause: str) -> None:
    assert news_of(reformed(3, cause, lost_s=0.01)) is None


@pytest.mark.parametrize("kind", [EventKind.LEASE_GRANTED, EventKind.MEMBER_STARTED, EventKind.STEP_COMMITTED])
def test_what_only_the_log_needs_is_not_told(kind: EventKind) -> None:
    assert news_of(at(3, kind, member_id="w0", members=["w0"])) is None


# -- snapshots -------------------------------------------------------------------------------------------------------


def status(mode: str, *states: str, minimum: int = 2) -> dict[str, Any]:
    members = {f"w{number}": {"state": state} for number, state in enumerate(states)}
    world_size = sum(state == "active" for state in states)
    return {"mode": mode, "world_size": world_size, "min_workers": minimum, "max_workers": 4, "members": members}


@pytest.mark.parametrize(
    ("mode", "states", "state"),
    [
        ("idle", ["pending", "starting"], "waiting for workers"),
        ("idle", ["ready", "starting"], "waiting for workers"),
        ("idle", ["ready", "ready"], "forming"),
        ("fencing", ["active", "active"], "forming"),
        ("ending", ["active", "active", "ready"], "training"),  # they train to the step's end
        ("leased", ["active"], "training"),  # survivors go on below the minimum
    ],
)
def test_state_is_what_the_workers_do(mode: str, states: list[str], state: str) -> None:
    assert Snapshot.of(status(mode, *states), {}, step=0, total_steps=9, elapsed_s=0).state == state


def test_run_that_has_its_last_step_or_a_verdict_is_finishing() -> None:
    at_the_end = status("idle", "active")
    assert Snapshot.of(at_the_end, {}, step=9, total_steps=9, elapsed_s=0).state == "finishing"
    assert (
        Snapshot.of({**at_the_end, "verdict": "stopped"}, {}, step=3, total_steps=9, elapsed_s=0).state == "finishing"
    )


def test_snapshot_takes_its_figures_from_the_catalogues_names() -> None:
    figures = {
        "loss_nats": 2.5, "tokens_per_second": 100.0, "mfu_ratio": 0.4, "step_seconds": 0.5, "goodput_ratio": 0.9,
        "remaining_seconds": 60.0, "world_size": 7,
    }  # fmt: skip
    found = Snapshot.of(status("leased", "active", "starting", "pending"), figures, step=3, total_steps=9, elapsed_s=1)
    assert found == Snapshot(3, 9, "training", 1, 2, 4, 2, loss=2.5, tokens_per_s=100.0, mfu=0.4, step_s=0.5,
                             goodput=0.9, elapsed_s=1, eta_s=60.0)  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (3_723, "1:02:03"), (90_061, "1d 1:01:01")]
)
def test_clock_counts_days_when_there_are_any(seconds: float, text: str) -> None:
    assert clock(seconds) == text
