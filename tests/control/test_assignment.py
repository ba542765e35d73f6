"""Who computes what: every micro-batch exactly once, and nobody finishes later than any other split would allow."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.control.assignment import SAME_SPEED, assignments, shares, step_seconds

# Paces of real members lie within a few orders of magnitude; closer ones than SAME_SPEED are noise to `shares`.
PACES = st.lists(st.none() | st.floats(0.01, 10.0), min_size=1, max_size=12)


def splits(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to give `total` equal jobs to `parts` members."""
    return [counts for counts in itertools.product(range(total + 1), repeat=parts) if sum(counts) == total]


@pytest.mark.parametrize(
    ("num_micro_batches", "seconds", "expected"),
    [
        (8, [1.0], [8]),
        (8, [1.0, 1.0], [4, 4]),
        (9, [1.0, 1.0], [5, 4]),  # the rest goes to the lower rank
        (8, [None, None], [4, 4]),
        (8, [1.0, 3.0], [6, 2]),
        (2, [1.0, 1.0, 1.0], [1, 1, 0]),  # more members than work
        (2, [5.0, 1.0, 1.0], [0, 1, 1]),  # and the slow one gets none
        (8, [1.0, 1.2], [4, 4]),  # noise
        (8, [1.0, None, 4.0], [5, 2, 1]),  # unknown counts as the median, 2.5 s
        (0, [1.0, 2.0], [0, 0]),
        (6, [0.0, 1.0], [3, 3]),  # a clock that told zero says nothing
    ],
)
def test_shares_of_known_cases(num_micro_batches: int, seconds: list[float | None], expected: list[int]) -> None:
    assert shares(num_micro_batches, seconds) == expected


@given(num_micro_batches=st.integers(0, 200), seconds=PACES)
def test_shares_sum_to_the_number_of_micro_batches(num_micro_batches: int, seconds: list[float | None]) -> None:
    counts = shares(num_micro_batches, seconds)
    assert len(counts) == len(seconds)
    assert sum(counts) == num_micro_batches
    assert min(counts) >= 0


@given(num_micro_batches=st.integers(0, 200), seconds=PACES)
def test_assignments_partition_the_step_in_rank_order(num_micro_batches: int, seconds: list[float | None]) -> None:
    parts = assignments(num_micro_batches, seconds)
    assert [len(part) for part in parts] == shares(num_micro_batches, seconds)
    assert list(itertools.chain.from_iterable(parts)) == list(range(num_micro_batches))


@settings(max_examples=60)
@given(num_micro_batches=st.integers(1, 7), seconds=st.lists(st.none() | st.floats(0.05, 5.0), min_size=1, max_size=3))
def test_no_split_lets_the_slowest_finish_earlier(num_micro_batches: int, seconds: list[float | None]) -> None:
    best = min(step_seconds(list(counts), seconds) for counts in splits(num_micro_batches, len(seconds)))
    assert step_seconds(shares(num_micro_batches, seconds), seconds) == pytest.approx(best, rel=1e-12)


@given(num_micro_batches=st.integers(1, 100), seconds=st.lists(st.floats(0.05, 5.0), min_size=2, max_size=8))
def test_a_slower_member_never_gets_more(num_micro_batches: int, seconds: list[float]) -> None:
    counts = shares(num_micro_batches, list(seconds))
    for (mine, my_pace), (other, other_pace) in itertools.permutations(zip(counts, seconds, strict=True), 2):
        if my_pace > other_pace * SAME_SPEED:
            assert mine <= other


@given(num_micro_batches=st.integers(0, 100), num_members=st.integers(1, 20), pace=st.floats(0.01, 10.0))
def test_members_of_one_speed_differ_by_one_at_most(num_micro_batches: int, num_members: int, pace: float) -> None:
    counts = shares(num_micro_batches, [pace] * num_members)
    assert max(counts) - min(counts) <= 1


def test_step_takes_as_long_as_its_slowest_member() -> None:
    assert step_seconds([6, 2], [1.0, 4.0]) == 8.0
    assert step_seconds([1, 6], [1.0, 4.0]) == 24.0
    assert step_seconds([3, 3], [None, None]) == 3.0  # paces that nobody knows count as one second


def test_counts_and_paces_must_belong_together() -> None:
    with pytest.raises(ValueError, match="shorter|longer"):
        step_seconds([1, 2], [1.0])
