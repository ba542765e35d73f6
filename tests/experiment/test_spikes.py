"""Spikes: what stands out is found, what does not is left alone, and whoever replays the steps finds the same."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

import pytest

from elastic_lm.experiment.spikes import (
    GRADIENT,
    LEAST_LOG_SIGMA,
    LEAST_SIGMA,
    LOSS,
    MAD_TO_SIGMA,
    Spike,
    SpikeDetector,
    SpikeRules,
)

RULES = SpikeRules(window_steps=20, loss_z=6.0, gradient_z=8.0, steps_in_a_row=3)


def smooth(num_steps: int, seed: int = 0) -> list[tuple[float, float]]:
    """(loss, gradient's norm) of a run that learns."""
    random_ = random.Random(seed)
    return [
        (2 + 6 / (1 + step / 30) + random_.gauss(0, 0.05), math.exp(random_.gauss(0, 0.2))) for step in range(num_steps)
    ]


def found(steps: Sequence[tuple[float, float]], rules: SpikeRules = RULES) -> list[Spike]:
    detector = SpikeDetector(rules)
    spikes = [detector.observe(step, loss, norm) for step, (loss, norm) in enumerate(steps)]
    return [spike for spike in spikes if spike is not None]


def with_losses(steps: list[tuple[float, float]], losses: dict[int, float]) -> list[tuple[float, float]]:
    return [(losses.get(step, loss), norm) for step, (loss, norm) in enumerate(steps)]


@pytest.mark.parametrize("seed", range(20))
def test_run_that_learns_has_none(seed: int) -> None:
    assert found(smooth(2_000, seed)) == []


def test_losses_that_stand_out_are_found_with_the_third_one() -> None:
    steps = with_losses(smooth(300), {200: 7.0, 201: 7.5, 202: 8.0})
    (spike,) = found(steps)
    assert (spike.first_step, spike.last_step, spike.cause) == (200, 202, LOSS)
    usual = [loss for loss, _ in steps[202 - 22 : 200]]  # the window ends two steps ago
    median = statistics.median(usual)
    mad = statistics.median(abs(loss - median) for loss in usual)
    z = (8.0 - median) / max(MAD_TO_SIGMA * mad, LEAST_SIGMA * median)
    assert spike.reason == (
        f"the loss stands out in steps 200 to 202: 8 where {median:.4g} was usual, {z:.1f} standard deviations more"
    )


def test_one_odd_batch_is_none() -> None:
    assert found(with_losses(smooth(300), {200: 9.0, 202: 9.0, 204: 9.0})) == []
    one = SpikeRules(20, 6.0, None, steps_in_a_row=1)
    assert [spike.first_step for spike in found(with_losses(smooth(300), {200: 9.0}), one)] == [200]


def test_loss_that_falls_is_none() -> None:
    assert found(with_losses(smooth(300), {200: 0.1, 201: 0.1, 202: 0.1})) == []


def test_gradients_that_stand_out_are_found() -> None:
    steps = smooth(300)
    for step in (150, 151, 152):
        steps[step] = (steps[step][0], 50.0)
    (spike,) = found(steps)
    assert (spike.first_step, spike.last_step, spike.cause) == (150, 152, GRADIENT)
    assert "50 where 1" in spike.reason or "50 where 0.9" in spike.reason
    assert found(steps, SpikeRules(20, 6.0, None, 3)) == []


def test_loss_and_gradient_make_one_streak() -> None:
    steps = with_losses(smooth(300), {100: 9.0, 102: 9.0})
    steps[101] = (steps[101][0], 80.0)
    assert [(spike.first_step, spike.last_step) for spike in found(steps)] == [(100, 102)]


def test_nothing_is_said_before_half_a_window() -> None:
    flat = [(3.0, 1.0)] * 11 + [(9.0, 1.0)] * 3
    assert found(flat) == []
    assert len(found([(3.0, 1.0)] * 12 + [(9.0, 1.0)] * 3)) == 1


def test_steps_that_were_left_out_neither_count_nor_end_a_streak() -> None:
    detector = SpikeDetector(RULES)
    for step, (loss, norm) in enumerate(smooth(100)):
        assert detector.observe(step, loss, norm) is None
    assert detector.observe(100, 9.0, 1.0) is None
    assert detector.observe(101, math.inf, 0.0, left_out=True) is None
    assert detector.observe(102, 9.0, 1.0) is None
    spike = detector.observe(103, 9.0, 1.0)
    assert spike is not None
    assert (spike.first_step, spike.last_step) == (100, 103)


def test_flat_curve_has_room() -> None:
    """Where the deviation is nothing, a hundredth of the loss counts as one."""
    assert found([(3.0, 1.0)] * 50 + [(3.17, 1.0)] * 3) == []
    assert len(found([(3.0, 1.0)] * 50 + [(3.19, 1.0)] * 3)) == 1
    log = LEAST_LOG_SIGMA * 8
    assert found([(3.0, 1.0)] * 50 + [(3.0, math.exp(0.99 * log))] * 3) == []
    assert len(found([(3.0, 1.0)] * 50 + [(3.0, math.exp(1.01 * log))] * 3)) == 1


def test_gradient_that_is_nothing_is_passed_over() -> None:
    assert found([(3.0, 0.0)] * 100) == []


def by_definition(steps: Sequence[tuple[float, float]], rules: SpikeRules) -> list[tuple[int, int]]:
    """(first, last) of every spike, without a thought for speed."""
    streak: list[int] = []
    spikes = []
    for step in range(len(steps)):
        stands_out = False
        for of, limit, floor in ((0, rules.loss_z, None), (1, rules.gradient_z, LEAST_LOG_SIGMA)):
            numbers = [pair[0] if of == 0 else math.log(pair[1]) for pair in steps]
            usual = numbers[: max(0, step - rules.steps_in_a_row + 1)][-rules.window_steps :]
            if limit is None or len(usual) < rules.window_steps // 2:
                continue
            median = statistics.median(usual)
            mad = statistics.median(abs(number - median) for number in usual)
            scale = max(MAD_TO_SIGMA * mad, LEAST_SIGMA * abs(median) if floor is None else floor)
            stands_out |= (numbers[step] - median) / scale >= limit
        streak = [*streak, step] if stands_out else []
        if len(streak) == rules.steps_in_a_row:
            spikes.append((streak[0], step))
            streak = []
    return spikes


@pytest.mark.parametrize("seed", range(5))
def test_fast_way_finds_what_the_definition_says(seed: int) -> None:
    random_ = random.Random(seed)
    rules = SpikeRules(20, 2.0, 2.5, steps_in_a_row=2)  # so low that there are many
    steps = [(random_.choice([3.0, 3.1, 3.3, 4.0, 9.0]), math.exp(random_.gauss(0, 1))) for _ in range(300)]
    expected = by_definition(steps, rules)
    assert len(expected) > 3
    assert [(spike.first_step, spike.last_step) for spike in found(steps, rules)] == expected


def test_loss_that_is_always_zero_has_no_spike() -> None:
    assert found([(0.0, 1.0)] * 50 + [(0.1, 1.0)] * 5) == []


def test_spike_that_is_known_is_not_found_again_until_it_is_over() -> None:
    detector = SpikeDetector(RULES)
    quiet, loud = (3.0, 1.0), (9.0, 1.0)

    def observe(steps: range, figures: tuple[float, float]) -> list[int]:
        return [step for step in steps if detector.observe(step, *figures) is not None]

    assert observe(range(30), quiet) == []
    assert observe(range(30, 33), loud) == [32]
    detector.pass_over()
    assert observe(range(33, 39), loud) == []
    assert observe(range(39, 40), quiet) == []
    assert observe(range(40, 43), loud) == [42]
