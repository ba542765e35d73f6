"""Goodput from hand-written histories: every worker-second has one cause or was useful, and each token counts once.

All histories have 4 micro-batches and workers that do 200 tokens a second, so that the figures can be checked by hand.
"""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from elastic_lm.control import actions as act
from elastic_lm.control import events as ev
from elastic_lm.control.controller import Control
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.goodput import Goodput
from tests.monitor.story import at, committed, left, lost, ready, reformed, rewound, started

# Two workers start (2 s each), wait for the lease (1 s each), and train five steps of 400 tokens in 1 s.
START = [
    started(0, "w0"),
    started(0, "w1"),
    ready(2, "w0"),
    ready(2, "w1"),
    reformed(3, "start", lost_s=3),
    *(committed(4 + step, step) for step in range(5)),
]


def fed(events: Iterable[Event], num_micro_batches: int = 4) -> Goodput:
    goodput = Goodput(num_micro_batches)
    for event in events:
        goodput.observe(event)
    return goodput


def test_nothing_is_known_before_the_first_step() -> None:
    goodput = fed(START[:5])
    assert goodput.ratio() is None
    assert goodput.tokens_per_s() is None
    assert goodput.lost_worker_s() == {"warm_up": 4.0, "start": 2.0}
    assert fed([]).lost_worker_s() == {}
    assert fed([]).held_worker_s == 0


def test_undisturbed_steps_are_all_useful() -> None:
    goodput = fed(START)
    assert goodput.held_worker_s == 2 * 8
    assert goodput.lost_worker_s() == {"warm_up": 4.0, "start": 2.0}  # 16 held = 10 useful + 6
    assert goodput.ratio() == 10 / 16


def test_workers_that_stand_still_after_a_failure_are_lost_to_it() -> None:
    # w1 dies at 8.5, unseen since 8: 2 x 0.5 worker-seconds until then, 0.5 of w0 until it trains again.
    goodput = fed([*START, lost(8.5, "w1"), reformed(9, "failure", lost_s=1), committed(11, 5, world_size=1, step_s=2)])
    assert goodput.lost_worker_s() == {"warm_up": 4.0, "start": 2.0, "failure": 1.5}
    assert goodput.held_worker_s == 16 + 2 * 0.5 + 0.5 + 2
    assert goodput.ratio() == 12 / 19.5
    assert goodput.members_held == 1


def test_interruption_that_began_between_two_events_is_counted_from_its_beginning() -> None:
    goodput = fed([*START, lost(8.5, "w1"), reformed(9, "failure", lost_s=0.75)])  # since 8.25
    assert goodput.lost_worker_s()["failure"] == pytest.approx(2 * 0.25 + 0.5)


def test_interruption_that_began_before_every_event_is_counted_from_the_first() -> None:
    goodput = fed([started(1, "w0"), ready(2, "w0"), reformed(5, "start", lost_s=5)])
    assert goodput.lost_worker_s() == {"warm_up": 1.0, "start": 3.0}


def test_worker_that_warms_up_while_others_stand_still_has_one_cause() -> None:
    goodput = fed([*START, started(8, "w2"), ready(9, "w2"), reformed(10, "wait", lost_s=2)])
    # 8 to 10: w0 and w1 stand for 2 s each, w2 warms up for 1 s and stands for 1 s.
    lost_s = goodput.lost_worker_s()
    assert lost_s == {"warm_up": 5.0, "start": 2.0, "wait": 5.0}
    assert sum(lost_s.values()) + 10 == goodput.held_worker_s


def test_joiner_costs_its_warm_up_and_what_nobody_accounts_for_is_unnamed() -> None:
    goodput = fed(
        [
            *START,
            started(8, "w2"),  # while the others train
            committed(9, 5),
            ready(9.5, "w2"),
            committed(10, 6),  # w2 stands ready for 0.5 s: no event says why
            reformed(10.25, "join", lost_s=0.25),
            committed(11.25, 7, world_size=3, step_s=1.0, tokens=600),
        ],
        num_micro_batches=6,
    )
    assert goodput.lost_worker_s() == {"warm_up": 5.5, "start": 2.0, "join": 0.75, "unnamed": 0.5}
    assert goodput.ratio() == 17 / (17 + 5.5 + 2 + 0.75 + 0.5)


def test_waiting_for_data_is_no_part_of_the_undisturbed_rate() -> None:
    goodput = fed([*START, committed(9.5, 5, step_s=1.5, data_wait_s=0.5)])
    assert goodput.lost_worker_s() == {"warm_up": 4.0, "start": 2.0, "data": 1.0}
    assert goodput.ratio() == 12 / 19


@pytest.mark.parametrize(
    ("world_size", "step_s", "uneven_s"),
    [
        (1, 2.0, 0),  # four micro-batches one after the other
        (2, 1.0, 0),
        (3, 1.0, 1.0),  # two rounds with six slots, of which two are empty for 0.5 s
        (4, 0.5, 0),
        (5, 0.5, 0.5),  # one slot is empty
    ],
)
def test_slots_without_a_micro_batch_are_uneven(world_size: int, step_s: float, uneven_s: float) -> None:
    members = [f"w{number}" for number in range(world_size)]
    steps = [committed((number + 1) * step_s, number, world_size=world_size, step_s=step_s) for number in range(3)]
    goodput = fed([event for name in members for event in (started(0, name), ready(0, name))] + steps)
    assert goodput.lost_worker_s() == pytest.approx({"uneven": 3 * uneven_s} if uneven_s else {})
    assert goodput.ratio() == pytest.approx(6 / (3 * world_size * step_s))


def test_undisturbed_rate_is_the_median_so_one_slow_step_shows_as_unnamed() -> None:
    goodput = fed([*START, committed(12, 5, step_s=4)])
    assert goodput.lost_worker_s()["unnamed"] == 2 * 3
    assert goodput.ratio() == 12 / 24


@pytest.mark.parametrize("end", [lost(9, "w1"), left(9, "w1"), at(9, EventKind.MEMBER_REFUSED, member_id="w1")])
def test_worker_is_held_until_it_ends(end: Event) -> None:
    goodput = fed([*START, end, committed(11, 5, world_size=1, step_s=2)])
    assert goodput.members_held == 1
    assert goodput.held_worker_s == 2 * 9 + 2


@pytest.mark.parametrize("end", [lost(5, "w2"), left(5, "w2"), at(5, EventKind.MEMBER_REFUSED, member_id="w2")])
def test_worker_that_ends_while_it_warms_up_is_lost_to_warm_up(end: Event) -> None:
    goodput = fed([*START[:6], started(4, "w2"), end])
    assert goodput.lost_worker_s()["warm_up"] == 4 + 1


def test_end_of_a_worker_that_never_started_changes_nothing() -> None:
    assert fed([*START, lost(8, "w7")]).members_held == 2


def test_step_that_is_trained_again_counts_once() -> None:
    goodput = fed([*START, committed(9, 3), committed(10, 4), committed(11, 5)])
    assert goodput.ratio() == 12 / 22
    assert goodput.lost_worker_s()["unnamed"] == 4.0  # two steps of two workers came to nothing


def test_steps_that_are_given_up_are_lost_to_it() -> None:
    goodput = fed([*START, rewound(8, 2)])  # three steps of two workers, a second each
    assert goodput.lost_worker_s() == {"warm_up": 4.0, "start": 2.0, "rewind": 6.0}
    assert goodput.ratio() == 4 / 16
    goodput.observe(committed(9, 2))  # another one in its place
    assert goodput.ratio() == 6 / 18


def test_new_attempt_begins_its_clock_and_its_members_anew_and_keeps_what_was_done() -> None:
    goodput = fed(
        [
            *START,
            started(1, "w0", attempt=1),
            ready(2, "w0", attempt=1),
            reformed(3, "start", lost_s=3, attempt=1),
            committed(5, 4, world_size=1, step_s=2, attempt=1),  # again, after the restart
            committed(7, 5, world_size=1, step_s=2, attempt=1),
        ]
    )
    assert goodput.members_held == 1
    assert goodput.held_worker_s == 16 + 6
    assert goodput.ratio() == 12 / 22
    assert goodput.lost_worker_s() == {"warm_up": 5.0, "start": 3.0, "unnamed": 2.0}


def test_event_that_is_told_late_takes_no_time_back() -> None:
    goodput = fed([*START, committed(7.5, 5)])
    assert goodput.held_worker_s == 16


def test_goodput_is_at_most_1() -> None:
    assert fed([started(0, "w0"), ready(0, "w0"), committed(1, 0, world_size=1, step_s=2)]).ratio() == 1.0


def test_replayed_log_gives_the_same_figures() -> None:
    events = [*START, lost(8.5, "w1"), reformed(9, "failure", lost_s=1), committed(11, 5, world_size=1, step_s=2)]
    live, replayed = fed(events), fed(Event.from_json(event.to_json()) for event in events)
    assert replayed.lost_worker_s() == live.lost_worker_s()
    assert (replayed.ratio(), replayed.tokens_per_s()) == (live.ratio(), live.tokens_per_s())


# -- tokens per second -----------------------------------------------------------------------------------------------


def test_tokens_per_second_counts_from_the_first_step_of_the_window() -> None:
    assert fed([committed(10, 0, tokens=1_000)]).tokens_per_s() is None
    assert fed([committed(10, 0, tokens=1_000), committed(12, 1, tokens=300)]).tokens_per_s() == 150


def test_tokens_are_those_that_are_read_though_only_some_are_predicted() -> None:
    batch = {"micro_batches": 4, "micro_batch_size": 2, "sequence_length": 50}
    begun = Event(EventKind.RUN_STARTED, "", fields={"config": {"batch": batch}})
    assert fed([begun, *START, committed(9, 5, tokens=60)]).tokens_per_s() == 400


def test_tokens_per_second_looks_back_half_a_minute() -> None:
    steps = [committed(10.0 * number, number, tokens=100 * (number + 1)) for number in range(5)]
    assert fed(steps).tokens_per_s() == (300 + 400 + 500) / 30  # from the second 10 to the second 40


def test_tokens_per_second_of_steps_longer_than_the_window_takes_the_last_two() -> None:
    steps = [committed(100.0 * number, number, tokens=500) for number in range(3)]
    assert fed(steps).tokens_per_s() == 5


def test_tokens_per_second_of_steps_that_are_told_together_is_what_they_took() -> None:
    """A coordinator that takes a run over hears in a moment of what was trained since its predecessor."""
    told = [committed(0.1, step, attempt=1) for step in range(5, 9)]
    assert fed([*START, *told]).tokens_per_s() == 400
    assert fed([*START, *told, committed(1.1, 9, attempt=1)]).tokens_per_s() == 400


def test_tokens_per_second_does_not_look_back_past_a_restart() -> None:
    steps = [committed(1, 0), committed(2, 1), committed(1, 2, attempt=1)]
    assert fed(steps).tokens_per_s() is None
    assert fed([*steps, committed(3, 3, attempt=1)]).tokens_per_s() == 200


# -- with control ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [ev.Resized(1, 1), ev.NodeDraining("n1", 0.0)], ids=lambda end: type(end).__name__)
def test_worker_that_control_sends_away_while_it_starts_is_no_longer_held(end: ev.Input) -> None:
    control = Control(ControlSpec(min_workers=1, max_workers=2, num_micro_batches=4, total_steps=9), owner_epoch=1)
    goodput = Goodput(4)
    for now, news in enumerate([ev.Tick(), ev.MemberStarted("w0", "n0", 1), ev.MemberStarted("w1", "n1", 2), end]):
        for action in control.handle(news, float(now)):
            if isinstance(action, act.Emit):
                goodput.observe(action.event)
    assert goodput.members_held == 1
