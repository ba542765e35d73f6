"""Intervals: equal to hand-worked ones, and as wide as they should be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from elastic_lm.evaluate.intervals import Metric, Z, bootstrap, ratio, student_t, wilson


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
        (50, 50, 0.9287, 1.0),
    ],
)
def test_wilson_interval(hits: float, number: int, low: float, high: float) -> None:
    found = wilson(hits, number)
    assert found.value == hits / number
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_wilson_interval_of_none_and_of_all_ends_exactly() -> None:
    for number in range(1, 200):
        assert (wilson(0, number).low, wilson(number, number).high) == (0.0, 1.0)


def test_ratio_of_two_clusters_by_hand() -> None:
    """R = 6 / 2; residuals -1 and 1; √(2/1 · 2) / 2 = 1, and t of one degree of freedom."""
    assert ratio([2, 4], [1, 1]) == Metric(3.0, pytest.approx(3 - 12.7062), pytest.approx(3 + 12.7062))


def test_ratio_of_unequal_clusters_by_hand() -> None:
    """R = 9 / 6 = 1.5; residuals 2 - 1.5, 3 - 3, 4 - 4.5; √(3/2 · 0.5) / 6."""
    half = 4.3027 * math.sqrt(0.75) / 6
    assert ratio([2, 3, 4], [1, 2, 3]) == Metric(1.5, pytest.approx(1.5 - half), pytest.approx(1.5 + half))


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (9, 2.2622), (10, 2.2281), (12, 2.1788), (20, 2.0860), (30, 2.0423), (120, 1.9799)],
)
def test_students_t_is_that_of_the_tables(degrees: int, expected: float) -> None:
    assert student_t(degrees) == pytest.approx(expected, abs=2e-4)  # the expansion, at ten degrees


def test_share_stays_one() -> None:
    """One right of 2,400, all of a document: the plain formula would say from -0.0004."""
    found = ratio([1] + [0] * 74, [32] * 75, is_share=True)
    assert found.low == 0.0 and found.value == 1 / 2400 and 0.0004 < (found.high or 0) < 0.002
    assert ratio([31] + [32] * 74, [32] * 75, is_share=True).high == 1.0
    assert (ratio([1] + [0] * 74, [32] * 75).low or 0) < 0


def test_no_spread_is_no_sign_of_being_sure() -> None:
    assert ratio([0] * 75, [32] * 75, is_share=True) == Metric(0.0)
    assert ratio([32] * 75, [32] * 75, is_share=True) == Metric(1.0)
    assert ratio([0.3, 0.1, 0.7], [3, 1, 7]) == Metric(pytest.approx(0.1))  # the same but for rounding
    assert bootstrap([[0.1, 1]] * 40, mean) == Metric(pytest.approx(0.1))
    assert bootstrap([[number, 1] for number in range(40)], lambda sums: 0.0) == Metric(0.0)


@pytest.mark.parametrize("number", [2, 3, 5, 9])
def test_ratio_covers_the_truth_of_few_clusters(number: int) -> None:
    """With 1.96 standard errors two clusters cover it 7 times in 10."""
    draw = np.random.Generator(np.random.PCG64(4))
    found = [ratio(draw.normal(5, 1, number).tolist(), [1] * number) for _ in range(2000)]
    assert sum(each.low < 5 < each.high for each in found) / 2000 == pytest.approx(0.95, abs=0.015)  # type: ignore[operator]


def test_bootstrap_of_few_has_no_interval() -> None:
    rows = [[value, 1] for value in range(9)]
    assert bootstrap(rows, mean) == Metric(4.0)
    found = bootstrap([*rows, [9, 1]], mean)
    assert found.low is not None and found.high is not None and 2 < found.low < 4.5 < found.high < 7


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
