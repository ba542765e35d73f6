"""The learning rate: hand-worked steps of each kind, and what holds for every schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_lm.engine.schedule import learning_rate
from elastic_lm.engine.spec import ScheduleSpec

PEAK = 0.8

COSINE = ScheduleSpec(kind="cosine", warmup_steps=4, total_steps=12, final_ratio=0.25)
WSD = ScheduleSpec(kind="wsd", warmup_steps=4, total_steps=12, decay_steps=4, final_ratio=0.25)
CONSTANT = ScheduleSpec(kind="constant", warmup_steps=4, total_steps=12)


@st.composite
def schedules(draw: st.DrawFn) -> ScheduleSpec:
    """What the config accepts: warm-up and decay fit into the steps."""
    total = draw(st.integers(1, 10_000))
    warmup = draw(st.integers(0, total))
    kinds = ["cosine", "constant"] + ["wsd"] * (warmup < total)
    kind: Any = draw(st.sampled_from(kinds))
    decay = draw(st.integers(1, total - warmup)) if kind == "wsd" else 0
    return ScheduleSpec(kind, warmup, total, decay, draw(st.floats(0, 1)))


steps = st.integers(0, 20_000)


@pytest.mark.parametrize("spec", [COSINE, WSD, CONSTANT], ids=lambda spec: spec.kind)
def test_warm_up_rises_in_equal_parts_and_reaches_the_peak(spec: ScheduleSpec) -> None:
    assert [learning_rate(spec, PEAK, step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("spec", "step", "expected"),
    [
        (COSINE, 4, 0.8),
        (COSINE, 6, 0.2 + 0.6 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos 45°
        (COSINE, 8, 0.5),  # half way between 0.8 and 0.2
        (COSINE, 10, 0.2 + 0.6 * (1 - math.sqrt(0.5)) / 2),
        (COSINE, 12, 0.2),
        (WSD, 4, 0.8),
        (WSD, 8, 0.8),  # the last at the peak
        (WSD, 9, 0.65),
        (WSD, 10, 0.5),
        (WSD, 11, 0.35),
        (WSD, 12, 0.2),
        (CONSTANT, 4, 0.8),
        (CONSTANT, 11, 0.8),
    ],
)
def test_steps_worked_by_hand(spec: ScheduleSpec, step: int, expected: float) -> None:
    assert learning_rate(spec, PEAK, step) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spec", "last"), [(COSINE, 0.2), (WSD, 0.2), (CONSTANT, 0.8)], ids=["cosine", "wsd", "constant"]
)
def test_past_the_end_it_stays(spec: ScheduleSpec, last: float) -> None:
    (rate,) = {learning_rate(spec, PEAK, step) for step in (12, 13, 1000, 2**40)}
    assert rate == pytest.approx(last)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_without_warm_up_it_begins_at_the_peak(kind: Any) -> None:
    assert learning_rate(ScheduleSpec(kind, total_steps=10, decay_steps=5), PEAK, 0) == PEAK


@given(spec=schedules(), step=steps)
def test_it_is_positive_in_warm_up_and_within_bounds_after(spec: ScheduleSpec, step: int) -> None:
    rate = learning_rate(spec, PEAK, step)
    slack = 1e-12
    if step < spec.warmup_steps:
        assert 0 < rate <= PEAK
    elif spec.kind == "constant":
        assert rate == PEAK
    else:
        assert PEAK * spec.final_ratio - slack <= rate <= PEAK + slack


@given(spec=schedules(), step=steps)
def test_it_rises_in_warm_up_and_never_after(spec: ScheduleSpec, step: int) -> None:
    here, after = learning_rate(spec, PEAK, step), learning_rate(spec, PEAK, step + 1)
    if step + 1 < spec.warmup_steps:
        assert here < after
    else:
        assert after <= here + 1e-12


@given(spec=schedules(), step=steps)
def test_it_makes_no_jump(spec: ScheduleSpec, step: int) -> None:
    """One step is at most one part of the warm-up or of the decay; a cosine is steepest, pi/2, in its middle."""
    here, after = learning_rate(spec, PEAK, step), learning_rate(spec, PEAK, step + 1)
    decay = spec.decay_steps if spec.kind == "wsd" else (spec.total_steps - spec.warmup_steps) / (math.pi / 2)
    steepest = max(1 / max(1, spec.warmup_steps), 1 / max(1, decay))
    assert abs(after - here) <= PEAK * steepest + 1e-12


@given(spec=schedules(), step=steps, factor=st.floats(0.001, 1000))
def test_it_is_proportional_to_the_peak(spec: ScheduleSpec, step: int, factor: float) -> None:
    assert learning_rate(spec, factor * PEAK, step) == pytest.approx(
        factor * learning_rate(spec, PEAK, step), rel=1e-12
    )
