"""Lost members are replaced at once, then later and later, and not on a node that keeps losing them."""

from typing import Any

import pytest

from elastic_lm.control.retries import QUARANTINE_WINDOWS, Retries
from elastic_lm.control.spec import ControlSpec

START_S = 1_000.0


def make_retries(**fields: Any) -> Retries:
    sizes = {"min_workers": 1, "max_workers": 4, "num_micro_batches": 8, "total_steps": 100}
    return Retries(ControlSpec(**{**sizes, **fields}))


def test_first_crash_delays_nothing() -> None:
    retries = make_retries()
    assert retries.not_before == 0.0
    assert not retries.crashed("n0", START_S)
    assert retries.not_before == 0.0


def test_pauses_double_and_stop_growing_at_the_limit() -> None:
    retries = make_retries(backoff_base_s=1.0, backoff_limit_s=10.0, quarantine_window_s=1_000.0)
    pauses, now = [], START_S
    retries.crashed("n0", now)
    for _ in range(6):
        now = max(now, retries.not_before)
        retries.crashed("n0", now)
        pauses.append(retries.not_before - now)
    assert pauses == pytest.approx([1.0, 2.0, 4.0, 8.0, 10.0, 10.0])


def test_crashes_of_different_nodes_do_not_add_up() -> None:
    retries = make_retries()
    for node in range(50):
        assert not retries.crashed(f"n{node}", START_S)
    assert retries.not_before == 0.0
    assert retries.avoided == ()


def test_crash_is_forgotten_after_the_window() -> None:
    retries = make_retries(quarantine_window_s=60.0, quarantine_failures=2)
    retries.crashed("n0", START_S)
    assert not retries.crashed("n0", START_S + 60.0)  # the window is half-open
    assert retries.not_before == 0.0
    assert retries.crashed("n0", START_S + 60.0 + 59.9)


def test_a_later_short_pause_does_not_cut_a_longer_one() -> None:
    retries = make_retries(backoff_base_s=4.0, quarantine_failures=100)
    for _ in range(4):
        retries.crashed("n0", START_S)  # up to START_S + 16
    for _ in range(2):
        retries.crashed("n1", START_S)  # only START_S + 4
    assert retries.not_before == START_S + 16.0


@pytest.mark.parametrize("failures", [1, 2, 4])
def test_node_is_quarantined_at_the_limit_and_told_once(failures: int) -> None:
    retries = make_retries(quarantine_failures=failures)
    told = [retries.crashed("n0", START_S + crash) for crash in range(failures + 2)]
    assert told == [crash == failures - 1 for crash in range(failures + 2)]
    assert retries.avoided == ("n0",)


def test_nodes_in_quarantine_are_named_in_order() -> None:
    retries = make_retries(quarantine_failures=1)
    for node in ("n2", "n0", "n1"):
        retries.crashed(node, START_S)
    assert retries.avoided == ("n0", "n1", "n2")


def test_members_without_a_node_cause_pauses_and_no_quarantine() -> None:
    retries = make_retries(quarantine_failures=2)
    assert not any(retries.crashed(None, START_S) for _ in range(4))
    assert retries.avoided == ()
    assert retries.not_before == START_S + 4.0


def test_quarantine_ends_after_ten_windows_and_not_before() -> None:
    retries = make_retries(quarantine_failures=1, quarantine_window_s=60.0)
    retries.crashed("n0", START_S)
    over = START_S + QUARANTINE_WINDOWS * 60.0
    assert retries.release(over - 0.001) == []
    assert retries.avoided == ("n0",)
    assert retries.release(over) == ["n0"]
    assert retries.avoided == ()
    assert retries.release(over) == []


def test_released_node_starts_with_a_clean_record() -> None:
    retries = make_retries(quarantine_failures=2, quarantine_window_s=60.0)
    retries.crashed("n0", START_S)
    retries.crashed("n0", START_S)
    over = START_S + QUARANTINE_WINDOWS * 60.0
    retries.crashed("n0", over - 1.0)  # a straggling member of the node, while it is in quarantine
    retries.release(over)
    assert not retries.crashed("n0", over)


def test_pause_keeps_its_limit_after_thousands_of_crashes() -> None:
    retries = make_retries()
    for _ in range(
        2_000
    ):  # pending members have no node: a cluster that cannot start any counts them all as one node's
        retries.crashed(None, START_S)
    assert retries.not_before == START_S + 60.0
