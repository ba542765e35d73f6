"""Intervals: equal to hand-worked ones, and as wide as they should be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elastic_lm.evaluate.intervals import Metric, Z, bootstrap, ratio, wilson


def mean(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1])


@pytest.mark.parametrize(
    ("hits", "number", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),  # the plain formula would say 0 to 0
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (0.5, 1, 0.0546, 0.9454),  # a tie
    ],
)
def test_wilson_interval(hits: float, number: int, low: float, high: float) -> None:
    found = wilson(hits, number)
    assert found.value == hits / number
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_ratio_of_two_clusters_by_hand() -> None:
    """R = 6 / 2; residuals -1 and 1; √(2/1 · 2) / 2 = 1."""
    assert ratio([2, 4], [1, 1]) == Metric(3.0, pytest.approx(3 - Z), pytest.approx(3 + Z))


def test_ratio_of_unequal_clusters_by_hand() -> None:
    """R = 9 / 6 = 1.5; residuals 2 - 1.5, 3 - 3, 4 - 4.5; √(3/2 · 0.5) / 6."""
    error = math.sqrt(0.75) / 6
    assert ratio([2, 3, 4], [1, 2, 3]) == Metric(1.5, pytest.approx(1.5 - Z * error), pytest.approx(1.5 + Z * error))


def test_more_targets_that_say_the_same_make_nothing_surer() -> None:
    assert ratio([20, 40], [10, 10]) == ratio([2, 4], [1, 1])


def test_ratio_covers_the_truth_where_targets_of_a_cluster_are_alike() -> None:
    """40 clusters of 50 targets that share half of their variance. As independent targets they would cover it 3 times in 10."""
    draw = np.random.Generator(np.random.PCG64(1))
    covered = 0
    for _ in range(400):
        sizes = draw.integers(30, 70, 40)
        sums = [draw.normal(5 + draw.normal(), 1, size).sum() for size in sizes]
        found = ratio(sums, sizes.tolist())
        covered += found.low < 5 < found.high  # type: ignore[operator]
    assert 0.91 <= covered / 400 <= 0.98


def test_bootstrap_is_as_wide_as_the_formula_and_the_same_again() -> None:
    values = np.random.Generator(np.random.PCG64(2)).normal(3, 2, 200)
    rows = [[value, 1] for value in values]
    found = bootstrap(rows, mean)
    error = values.std(ddof=1) / math.sqrt(200)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - Z * error, abs=0.3 * error)
    assert found.high == pytest.approx(values.mean() + Z * error, abs=0.3 * error)
    assert bootstrap(rows, mean) == found


def test_too_little_says_nothing_of_how_sure() -> None:
    assert ratio([3], [2]) == Metric(1.5)
    assert bootstrap([[3, 1]], mean) == Metric(3.0)
    assert (ratio([], []), ratio([0], [0]), wilson(0, 0), bootstrap([], mean)) == (Metric(None),) * 4


def test_what_is_not_finite_is_none() -> None:
    assert ratio([math.nan, 1], [1, 1]) == Metric(None)
    assert Metric(800.0, 1.0, 900.0).through(math.exp) == Metric(None, math.e, None)
