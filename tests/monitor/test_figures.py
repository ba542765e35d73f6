"""The values of metrics, from hand-written histories: each fact counted once, counters never back, gauges never stale."""

from __future__ import annotations

import itertools
import sys
import threading
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.control import events as ev
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.figures import COUNTED, TASK_METRICS, Figures
from elastic_lm.monitor.metrics import (
    CATALOGUE,
    CAUSES,
    LOSSES,
    PHASES,
    STEP_STATISTICS,
    VERDICTS,
    WORKER_STATISTICS,
    by_name,
)
from tests.control.simulation import Cluster
from tests.monitor.story import (
    TASK_RESULTS,
    at,
    committed,
    evaluated,
    left,
    lost,
    ready,
    reformed,
    rewound,
    started,
    storm,
)

COUNTERS = {metric.name for metric in CATALOGUE if metric.kind == "counter"}
START = [
    started(0, "w0"),
    started(0, "w1"),
    ready(2, "w0"),
    ready(2, "w1"),
    Event(EventKind.LEASE_GRANTED, "", 0, "1.4", {"members": ["w0", "w1"], "world_size": 2}, elapsed_s=3),
    reformed(3, "start", lost_s=3),
]


def told(figures: Figures, events: Iterable[Event]) -> Figures:
    for event in events:
        figures.observe(event)
    return figures


def after(events: Iterable[Event], num_micro_batches: int = 4) -> Figures:
    return told(Figures("a-run", "1.2.3", num_micro_batches), events)


def test_every_counter_is_there_from_the_start_and_0() -> None:
    values = list(after([]).values())
    assert {name for name, _, _ in values if name in COUNTERS} == COUNTERS
    assert {value for name, _, value in values if name in COUNTERS} == {0}
    assert {labels for name, labels, _ in values if name == "rescales_total"} == {(cause,) for cause in CAUSES}


def test_run_is_named() -> None:
    assert after([]).value("run_info", "a-run", "1.2.3") == 1


def test_gauges_are_unknown_before_the_first_step() -> None:
    figures = after(START)
    assert figures.value("loss_nats") is None
    assert figures.value("tokens_per_second") is None
    assert figures.value("goodput_ratio") is None


def test_step_sets_the_gauges_and_adds_to_the_counters() -> None:
    figures = after([*START, committed(4, 0, step_s=2.0, data_wait_s=0.4, tokens=500, loss=3.25, world_size=2)])
    expected = {
        "step": 1,
        "loss_nats": 3.25,
        "gradient_norm": 0.75,
        "learning_rate": 3e-4,
        "step_seconds": 2.0,
        "world_size": 2,
        "steps_total": 1,
        "tokens_total": 500,
        "data_wait_seconds_total": 0.4,
    }
    assert {name: figures.value(name) for name in expected} == expected
    phases = [figures.value("step_phase_seconds_total", phase) for phase in PHASES]
    assert phases == pytest.approx([0.4, 0.8, 0.6, 0.2])


def test_step_that_is_told_or_trained_again_counts_once() -> None:
    steps = [committed(4 + number, number) for number in range(5)]
    figures = after([*START, *steps, steps[-1], committed(1, 3, attempt=1), committed(2, 4, attempt=1)])
    assert figures.value("steps_total") == 5
    assert figures.value("tokens_total") == 5 * 400
    assert figures.value("step") == 5


def test_gauge_of_the_step_follows_a_restart_back_and_counters_do_not() -> None:
    steps = [committed(4 + number, number) for number in range(5)]
    figures = after([*START, *steps, committed(1, 2, attempt=1, loss=9.0)])
    assert (figures.value("step"), figures.value("loss_nats")) == (3, 9.0)
    assert figures.value("steps_total") == 5


def test_lease_sets_generation_and_world_size() -> None:
    figures = after(START)
    assert (figures.value("generation"), figures.value("world_size")) == (4, 2)
    figures = after([at(0, EventKind.LEASE_GRANTED, members=["w0"])])  # as an earlier release wrote it
    assert (figures.value("generation"), figures.value("world_size")) == (1, 1)


def test_rescales_and_lost_time_are_counted_by_cause() -> None:
    figures = after([*START, reformed(9, "failure", lost_s=0.5), reformed(12, "failure", lost_s=0.25)])
    assert figures.value("rescales_total", "failure") == 2
    assert figures.value("lost_seconds_total", "failure") == 0.75
    assert figures.value("rescales_total", "start") == 1
    assert figures.value("rescales_total", "hang") == 0


def test_cause_that_the_catalogue_does_not_know_is_other() -> None:
    figures = after([*START, reformed(9, "a new cause", lost_s=0.5)])
    assert figures.value("rescales_total", "other") == 1
    assert figures.value("rescales_total", "a new cause") is None


@pytest.mark.parametrize(
    ("cause", "label"),
    [
        ("process died", "crash"),
        ("computes other bits", "crash"),
        ("silent for 1.4 s, limit 1.0 s", "hang"),
        ("no progress in compute for 61.0 s, limit 60.0 s", "hang"),
        ("preemption", "preemption"),
    ],
)
def test_lost_member_is_counted_once_under_one_of_few_causes(cause: str, label: str) -> None:
    figures = after([*START, lost(9, "w1", cause)])
    counts = {other: figures.value("members_lost_total", other) for other in ("crash", "hang", "preemption")}
    assert counts == {"crash": 0, "hang": 0, "preemption": 0} | {label: 1}


@pytest.mark.parametrize(("kind", "name"), COUNTED.items(), ids=lambda value: str(value))
def test_event_is_counted(kind: EventKind, name: str) -> None:
    event = at(5, kind, step=7, member_id="w1", seconds=2.5)
    figures = after([event, event, event] if kind is EventKind.STRAGGLER else [event])
    assert figures.value(name) == (3 if kind is EventKind.STRAGGLER else 1)


def test_checkpoint_tells_step_and_time() -> None:
    figures = after([at(5, EventKind.CHECKPOINT_SAVED, step=100, seconds=2.5)])
    assert (figures.value("checkpoint_step"), figures.value("checkpoint_seconds")) == (100, 2.5)
    assert figures.value("checkpoint_timestamp_seconds") == 1e9 + 5
    figures = after([at(5, EventKind.CHECKPOINT_FAILED, step=200, error="disk full")])
    assert figures.value("checkpoint_step") is None


def begun(attempt: int = 1, **config: object) -> Event:
    return at(0, EventKind.RUN_STARTED, attempt=attempt, config=config)


def test_evaluation_is_told_in_the_units_in_which_people_compare() -> None:
    figures = after([*START, evaluated(9, 10)])
    told = {name: value for name, _, value in figures.values() if name.startswith("evaluation")}
    assert told == {
        "evaluation_step": 10,
        "evaluation_loss_nats": 2.0,
        "evaluation_loss_error_nats": 0.1,
        "evaluation_accuracy_ratio": 0.4,
        "evaluation_nats_per_byte": 2.0 * 100 / 400,
        "evaluations_total": 1,
    }


def test_step_that_was_left_out_counts_and_tells_no_loss() -> None:
    figures = after([*START, committed(4, 0, loss=3.0), committed(5, 1, loss=0.0, refused=7)])
    assert (figures.value("loss_nats"), figures.value("steps_total"), figures.value("steps_left_out_total")) == (
        3.0,
        2,
        1,
    )


def test_run_that_goes_back_counts_on_and_stands_at_an_earlier_step() -> None:
    events = [*START, *(committed(4 + step, step) for step in range(5)), rewound(10, 2, num_steps=3)]
    figures = after(events)
    told = [figures.value(name) for name in ("step", "steps_total", "rewinds_total", "steps_given_up_total")]
    assert told == [2, 5, 1, 3]
    figures = after([*events, *(committed(20 + step, step, attempt=2) for step in (1, 2, 3))])  # step 1 as it was
    told = [figures.value(name) for name in ("step", "steps_total", "rewinds_total", "steps_given_up_total")]
    assert told == [4, 7, 1, 3]


def test_what_is_deleted_with_a_rewind_is_not_told_any_more() -> None:
    saved, start = (
        at(9, EventKind.CHECKPOINT_SAVED, step=60, seconds=1.0),
        at(10, EventKind.RUN_STARTED, attempt=2, config={}, resume_step=50),
    )
    figures = after([saved, evaluated(9, 60), start, rewound(11, 52)])
    assert (figures.value("checkpoint_step"), figures.value("evaluation_step")) == (50, None)
    assert figures.value("evaluation_loss_nats") is None
    assert figures.value("evaluations_total") == 1
    figures = after([saved, evaluated(9, 60), start, rewound(11, 60)])
    assert (figures.value("checkpoint_step"), figures.value("evaluation_step")) == (60, 60)


def test_step_of_another_version_that_tells_of_no_refusal_counts() -> None:
    event = committed(4, 0, loss=3.0)
    event.fields.pop("refused", None)
    figures = after([*START, event])
    assert (figures.value("loss_nats"), figures.value("steps_total"), figures.value("steps_left_out_total")) == (
        3.0,
        1,
        0,
    )


def test_what_an_evaluation_does_not_tell_is_absent() -> None:
    figures = after([*START, evaluated(9, 10), evaluated(9, 20, num_correct=None, num_bytes=None, loss_stderr=None)])
    told = {name for name, _, _ in figures.values() if name.startswith("evaluation_")}
    assert told == {"evaluation_step", "evaluation_loss_nats"}
    assert figures.value("evaluations_total") == 2


def test_configured_figures_are_those_of_the_newest_attempt() -> None:
    names = ("attempt", "steps_planned", "workers_min", "workers_max", "checkpoint_interval_steps")
    first = begun(training={"steps": 90}, workers={"min": 2, "max": 4}, checkpoint={"every_steps": 10})
    second = begun(2, training={"steps": 95}, workers={"min": 1, "max": 8}, checkpoint={"every_steps": None})
    assert [after([first]).value(name) for name in names] == [1, 90, 2, 4, 10]
    assert [after([first, second]).value(name) for name in names] == [2, 95, 1, 8, None]


def test_resize_changes_how_many_workers_are_wanted() -> None:
    resized = at(5, EventKind.RESIZED, min_workers=3, max_workers=5)
    figures = after([begun(workers={"min": 2, "max": 4}), resized])
    assert (figures.value("workers_min"), figures.value("workers_max")) == (3, 5)


@pytest.mark.parametrize(("verdict", "told"), [*((verdict, verdict) for verdict in VERDICTS), ("a new one", "other")])
def test_run_has_ended_from_its_verdict_to_the_next_attempt(verdict: str, told: str) -> None:
    def ended(*events: Event) -> dict[str, float | None]:
        figures = after(events)
        return {known: figures.value("run_ended", "a-run", known) for known in VERDICTS}

    finished = at(9, EventKind.RUN_FINISHED, step=5, verdict=verdict, reason="")
    going_on = dict.fromkeys(VERDICTS, 0.0)
    assert ended(begun()) == ended(begun(), finished, begun(2)) == going_on
    assert ended(begun(), finished) == going_on | {told: 1.0}


def test_held_worker_seconds_add_up_those_of_all_workers() -> None:
    figures = after([*START, committed(4, 0), lost(5, "w1"), committed(7, 1)])
    assert figures.value("held_worker_seconds_total") == 7 + 5


def test_recent_steps_are_told_by_their_median_and_the_time_that_95_of_100_do_not_exceed() -> None:
    # 150 steps, of which the first 50, slow ones, are not among the last 100; these last 1 s to 100 s in mixed order.
    times = [900.0] * 50 + [float(1 + 37 * number % 100) for number in range(100)]
    figures = after([*START, *(committed(1000 + step, step, step_s=step_s) for step, step_s in enumerate(times))])
    told = {statistic: figures.value("recent_step_seconds", statistic) for statistic in STEP_STATISTICS}
    assert told == {"median": 50.5, "p95": 95.0}


def test_recent_steps_are_told_from_the_first_one_on_and_each_counts_once() -> None:
    figures = after([*START, committed(4, 0, step_s=2.0)])
    assert [figures.value("recent_step_seconds", statistic) for statistic in STEP_STATISTICS] == [2.0, 2.0]
    told(figures, [committed(9, 0, step_s=5.0)] * 3)
    assert figures.value("recent_step_seconds", "p95") == 2.0


def test_workers_are_compared_by_what_they_need_for_a_micro_batch() -> None:
    paces = {"w0": [0.5, 3], "w1": [0.25, 3], "w2": [1.5, 1], "w3": [0.75, 2]}
    figures = after([*START, at(5, EventKind.WORKER_PACES, paces=paces)])
    compared = {statistic: figures.value("worker_micro_batch_seconds", statistic) for statistic in WORKER_STATISTICS}
    assert compared == {"fastest": 0.25, "median": 0.625, "slowest": 1.5}


def test_a_thousand_workers_make_no_more_series_than_one() -> None:
    one, many = (
        after([*START, at(5, EventKind.WORKER_PACES, paces={f"w{number}": [0.5, 1] for number in range(count)})])
        for count in (1, 1_000)
    )
    assert [(name, labels) for name, labels, _ in one.values()] == [(name, labels) for name, labels, _ in many.values()]


def test_held_members_are_those_that_live() -> None:
    assert after(START).value("members_held") == 2
    assert after([*START, left(9, "w0"), lost(9, "w1")]).value("members_held") == 0


def test_values_come_in_the_order_of_the_catalogue_with_its_labels() -> None:
    values = list(after([*START, committed(4, 0), lost(5, "w1")]).values())
    names = [name for name, _ in itertools.groupby(name for name, _, _ in values)]
    order = [metric.name for metric in CATALOGUE]
    assert names == sorted(names, key=order.index)
    assert all(len(labels) == len(by_name()[name].labels) for name, labels, _ in values)


def test_every_gauge_has_a_value_in_some_history() -> None:
    saved = at(9, EventKind.CHECKPOINT_SAVED, step=2, seconds=1.0)
    config = {
        "training": {"steps": 9, "precision": "bf16"},
        "workers": {"min": 2, "max": 4},
        "checkpoint": {"every_steps": 2},
    }
    start = at(0, EventKind.RUN_STARTED, config=config, flops_per_token=10**9)
    on_gpu = ready(2, "w2", environment={"gpu": "NVIDIA H100 80GB HBM3"})
    paces = at(6, EventKind.WORKER_PACES, paces={"w0": [0.5, 2]})
    figures = after([start, *START, on_gpu, committed(4, 0), committed(5, 1), paces, saved, evaluated(9, 2)])
    figures.tell_tasks(TASK_RESULTS)
    assert {name for name, _, _ in figures.values()} == {metric.name for metric in CATALOGUE}


def test_a_thousand_workers_have_the_series_of_three() -> None:
    few, many = (
        {(name, labels) for name, labels, _ in after(storm(num_workers), num_micro_batches=num_workers).values()}
        for num_workers in (3, 1_000)
    )
    assert few == many
    assert {name for name, _ in few} == by_name().keys() - set(TASK_METRICS)
    assert len(few) < 120


def test_results_of_tasks_are_told_as_they_are_and_none_of_before() -> None:
    figures = after(START)
    assert figures.value("task_step", "held_out") is None
    figures.tell_tasks(TASK_RESULTS)
    told = {(name, labels): value for name, labels, value in figures.values() if name in TASK_METRICS}
    accuracy, loss = ("capitals", "accuracy"), ("held_out", "loss")
    assert told == {
        ("task_figure", accuracy): 0.5, ("task_figure_low", accuracy): 0.25, ("task_figure_high", accuracy): 0.75,
        ("task_figure", ("capitals", "accuracy_per_byte")): 0.25,
        ("task_figure", loss): 2.5, ("task_figure_low", loss): 2.25, ("task_figure_high", loss): 2.75,
        ("task_step", ("capitals",)): 2, ("task_step", ("held_out",)): 4,
    }  # fmt: skip
    figures.tell_tasks(TASK_RESULTS[:1])
    assert figures.value("task_figure", "held_out", "loss") is None
    assert figures.value("task_figure", "capitals", "accuracy") == 0.5


# -- gauges that are no longer true ----------------------------------------------------------------------------------


def test_cause_that_lost_nothing_after_all_is_not_told_any_more() -> None:
    figures = told(Figures("r", "1", 4), [*START, committed(4, 0), committed(5, 1), committed(10, 2)])
    assert figures.value("lost_worker_seconds", "unnamed") == 8.0  # four of the last five seconds of two workers
    # A long history at half the pace shows that this is the workers' true speed.
    told(figures, [committed(15 + 5 * n, 3 + n, step_s=5.0) for n in range(40)])
    assert "unnamed" not in figures.goodput.lost_worker_s()
    assert figures.value("lost_worker_seconds", "unnamed") is None


def test_rate_of_an_earlier_attempt_is_not_told_as_todays() -> None:
    figures = told(Figures("r", "1", 4), [*START, committed(4, 0), committed(5, 1)])
    assert figures.value("tokens_per_second") == 400
    told(figures, [started(1, "w0", attempt=1)])
    assert figures.value("tokens_per_second") is None


# -- replay ----------------------------------------------------------------------------------------------------------

EVENTS = st.one_of(
    st.builds(committed, st.floats(0, 100), st.integers(0, 20), attempt=st.integers(0, 3)),
    st.builds(reformed, st.floats(0, 100), st.sampled_from([*CAUSES, "new"]), st.floats(0, 9)),
    st.builds(lost, st.floats(0, 100), st.sampled_from(["w0", "w1"]), st.sampled_from(["process died", "silent"])),
    st.builds(started, st.floats(0, 100), st.sampled_from(["w0", "w1"])),
    st.sampled_from([at(7, EventKind.CHECKPOINT_SAVED, step=5, seconds=1.0), *START]),
)


def counters(figures: Figures) -> dict[tuple[str, tuple[str, ...]], float]:
    return {(name, labels): value for name, labels, value in figures.values() if name in COUNTERS}


@given(st.lists(EVENTS, max_size=30))
@settings(max_examples=60)
def test_counters_never_go_back_whatever_comes(events: list[Event]) -> None:
    figures = Figures("r", "1", 4)
    before = counters(figures)
    for event in events:
        now = counters(told(figures, [event]))
        assert now.keys() >= before.keys()
        assert all(now[key] >= value for key, value in before.items())
        before = now


@given(st.lists(EVENTS, max_size=30))
@settings(max_examples=40)
def test_replayed_log_gives_the_same_values(events: list[Event]) -> None:
    replayed = after(Event.from_json(event.to_json()) for event in events)
    assert list(replayed.values()) == list(after(events).values())


def test_attempt_that_replays_its_log_goes_on_where_the_last_one_ended() -> None:
    first = [*START, *(committed(4 + number, number) for number in range(5)), lost(9, "w1")]
    second = [started(1, "w0", attempt=1), committed(3, 3, attempt=1), committed(4, 4, attempt=1)]
    third = [committed(5, 5, attempt=1), reformed(6, "failure", lost_s=1, attempt=1)]
    in_one_life = counters(after([*first, *second, *third]))
    figures = told(Figures("r", "1", 4), first)
    before = counters(figures)
    restarted = after([Event.from_json(event.to_json()) for event in first])
    assert counters(restarted) == before
    assert counters(told(figures, [*second, *third])) == in_one_life


# -- with control, and with a scraper --------------------------------------------------------------------------------


def test_every_cause_that_control_gives_is_in_the_catalogue() -> None:
    spec = ControlSpec(
        min_workers=1,
        max_workers=3,
        num_micro_batches=6,
        total_steps=400,
        checkpoint_every=100,
        evaluate_every=80,
        num_held_out_batches=4,
    )
    cluster = Cluster(spec, nodes={"n0": 2, "n1": 2})
    cluster.when_head_reaches(20, lambda: cluster.living()[0].die())
    cluster.when_head_reaches(120, lambda: cluster.freeze(cluster.living()[0], for_s=10.0))
    cluster.when_head_reaches(220, lambda: cluster.drain_node("n1"))
    cluster.when_head_reaches(300, lambda: cluster.tell(ev.Resized(1, 1)))
    cluster.run(limit_s=300)
    figures = after(cluster.events, num_micro_batches=6)
    kinds = Counter(event.kind for event in cluster.events)
    rescales = {cause: figures.value("rescales_total", cause) for cause in CAUSES}
    assert sum(count or 0 for count in rescales.values()) == kinds[EventKind.REFORMED]
    assert {cause for cause, count in rescales.items() if count} >= {"start", "failure", "hang", "drain", "evaluation"}
    assert rescales["other"] == 0
    losses = {cause: figures.value("members_lost_total", cause) for cause in LOSSES}
    assert losses["crash"] == losses["hang"] == 1
    assert sum(count or 0 for count in losses.values()) == kinds[EventKind.MEMBER_LOST]


def test_scrapes_while_events_come_in_never_fail() -> None:
    figures = told(Figures("r", "1", 4), START)
    interval_s = sys.getswitchinterval()
    done = threading.Event()

    def observe() -> None:
        told(figures, (committed(4 + number / 100, number) for number in range(6_000)))
        done.set()

    writer = threading.Thread(target=observe)
    sys.setswitchinterval(1e-6)  # the interpreter changes threads nearly everywhere
    try:
        writer.start()
        while not done.is_set():
            assert len(list(figures.values())) > 10
    finally:
        sys.setswitchinterval(interval_s)
        writer.join()
    assert figures.value("steps_total") == 6_000


def test_remaining_time_is_the_steps_left_at_the_present_rate() -> None:
    figures = after(
        [begun(training={"steps": 12}), *START, *(committed(4 + 0.5 * step, step, step_s=0.5) for step in range(5))]
    )
    assert figures.value("remaining_seconds") == 7 * 0.5
    assert after(START).value("remaining_seconds") is None


def test_gauges_are_those_without_labels_that_have_a_value() -> None:
    gauges = after([*START, committed(5, 0)]).gauges()
    assert (gauges["loss_nats"], gauges["world_size"], gauges["step"]) == (2.5, 2, 1)
    assert not gauges.keys() & (COUNTERS | {"run_info", "tokens_per_second", "lost_worker_seconds"})
