"""Those who scrape regularly are waited for at the end, for as long as they are due and no longer."""

from __future__ import annotations

import threading
import time

from elastic_lm.monitor.visitors import MOST, Visitors


def visited(*intervals: tuple[str, float]) -> Visitors:
    """Everybody has just come for the third time, each so many seconds after the one before."""
    visitors, now_s = Visitors(), time.monotonic()
    for who, interval_s in intervals:
        for visit in (2, 1, 0):
            visitors.came(who, now_s - visit * interval_s)
    return visitors


def test_nobody_is_waited_for_where_nobody_came() -> None:
    assert Visitors().await_all(60)


def test_who_came_once_is_not_waited_for() -> None:
    visitors = Visitors()
    visitors.came("a person", time.monotonic())
    assert visitors.await_all(60)


def test_who_came_twice_is_not_waited_for() -> None:
    visitors, now_s = Visitors(), time.monotonic()
    visitors.came("a person", now_s - 10)
    visitors.came("a person", now_s)
    assert visitors.longest_wait_s(60) == 0
    assert visitors.await_all(60)


def test_who_comes_too_seldom_is_not_waited_for() -> None:
    assert visited(("hourly", 3_600)).await_all(60)


def test_who_missed_his_turn_is_not_waited_for() -> None:
    visitors, now_s = Visitors(), time.monotonic()
    for ago_s in (160, 130, 100):
        visitors.came("gone", now_s - ago_s)
    assert visitors.await_all(60)


def test_all_regular_visitors_are_waited_for() -> None:
    visitors = visited(("one", 30), ("another", 30), ("hourly", 3_600))
    told: list[bool] = []
    waiting = threading.Thread(target=lambda: told.append(visitors.await_all(60)))
    waiting.start()
    visitors.came("one", time.monotonic() + 1)
    waiting.join(0.05)
    assert waiting.is_alive()
    visitors.came("another", time.monotonic() + 1)
    waiting.join(30)
    assert told == [True]


def test_scrape_that_began_before_the_end_does_not_count() -> None:
    visitors = visited(("one", 0.01))
    began_s = time.monotonic()
    threading.Timer(0.05, visitors.came, ("one", began_s - 0.001)).start()
    assert not visitors.await_all(60)


def test_who_does_not_come_is_given_up() -> None:
    assert not visited(("one", 0.01)).await_all(60)


def test_many_visitors_are_forgotten() -> None:
    visitors = visited(*((f"v{number}", 30) for number in range(3 * MOST)))
    waiting = threading.Thread(target=visitors.await_all, args=(60,))
    waiting.start()
    for number in range(2 * MOST, 3 * MOST):
        visitors.came(f"v{number}", time.monotonic() + 1)
    waiting.join(30)
    assert not waiting.is_alive()
