"""The limit on silence: the configured one on a quiet machine, longer for a while where beats were seen to come late."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_lm.control.health import LONGEST_LIMIT_S, MARGIN, USUAL_GAP_S, WINDOW_S, SilenceLimit

START_S = 1_000.0


def test_limit_is_the_timeout_while_nothing_was_seen() -> None:
    assert SilenceLimit(1.0).seconds() == 1.0


@pytest.mark.parametrize("gap_s", [0.0, 0.2, USUAL_GAP_S])
def test_limit_is_the_timeout_while_beats_come_as_usual(gap_s: float) -> None:
    limit = SilenceLimit(1.0)
    limit.saw_gap(gap_s, START_S)
    assert limit.seconds() == 1.0


def test_limit_grows_by_three_times_the_lateness() -> None:
    limit = SilenceLimit(1.0)
    limit.saw_gap(0.8, START_S)
    assert limit.seconds() == pytest.approx(1.0 + 3.0 * 0.5)


def test_limit_follows_the_longest_gap_not_the_last() -> None:
    limit = SilenceLimit(1.0)
    for gap_s in (0.2, 1.3, 0.4):
        limit.saw_gap(gap_s, START_S)
    assert limit.seconds() == pytest.approx(4.0)


def test_limit_is_never_longer_than_the_longest() -> None:
    limit = SilenceLimit(1.0)
    limit.saw_gap(1_000.0, START_S)
    assert limit.seconds() == LONGEST_LIMIT_S


def test_limit_remembers_a_late_beat_for_at_least_one_window() -> None:
    limit = SilenceLimit(1.0)
    limit.saw_gap(0.2, START_S)  # the window begins
    limit.saw_gap(1.3, START_S + WINDOW_S)  # late in the window
    limit.saw_gap(0.2, START_S + WINDOW_S + 1)  # the next one begins
    assert limit.seconds() == pytest.approx(4.0)


def test_limit_forgets_a_late_beat_after_two_windows() -> None:
    limit = SilenceLimit(1.0)
    limit.saw_gap(1.3, START_S)
    for beat in range(1, int(2 * WINDOW_S) + 3):
        limit.saw_gap(0.2, START_S + beat)
    assert limit.seconds() == 1.0


def test_limit_forgets_a_late_beat_over_a_long_quiet_time() -> None:
    limit = SilenceLimit(1.0)
    limit.saw_gap(1.3, START_S)
    limit.saw_gap(0.2, START_S + 2 * WINDOW_S + 1)  # nobody was there to beat in between
    assert limit.seconds() == 1.0


@given(
    timeout_s=st.floats(0.1, 20.0),
    gaps=st.lists(st.tuples(st.floats(0.0, 40.0), st.floats(0.0, 200.0)), max_size=30),
)
def test_limit_lies_between_the_timeout_and_what_the_longest_gap_allows(
    timeout_s: float, gaps: list[tuple[float, float]]
) -> None:
    limit, now, longest = SilenceLimit(timeout_s), START_S, 0.0
    for gap_s, pause_s in gaps:
        now += pause_s
        limit.saw_gap(gap_s, now)
        longest = max(longest, gap_s)
        assert limit.seconds() >= min(LONGEST_LIMIT_S, timeout_s + MARGIN * max(0.0, gap_s - USUAL_GAP_S))
    allowed = timeout_s + MARGIN * max(0.0, longest - USUAL_GAP_S)
    assert timeout_s <= limit.seconds() <= min(LONGEST_LIMIT_S, allowed)
