"""Who scrapes the endpoint and how often, so that those who come regularly see how the run ended before it is gone.

Invariant: nobody is waited for longer than his own interval and a little more, and nobody who has missed his last one. A
person who looked once or twice is not waited for.
"""

from __future__ import annotations

import threading
import time
from itertools import pairwise

REGULAR = 3  # visits, after which somebody comes regularly; a person who looks twice does not
MOST = 16  # who came lately; more are forgotten, the longest away first
LATE = 1.2  # of his interval, after which a visitor is given up
LATE_S = 2.0  # and this: on a busy machine, who comes every second is late by more than a share of it


class Visitors:
    """Told of every scrape, from any thread."""

    def __init__(self) -> None:
        self._visits: dict[str, tuple[float, ...]] = {}  # who -> the last three, in seconds
        self._changed = threading.Condition()

    def came(self, who: str, at_s: float) -> None:
        """A scrape that began at this monotonic time was served."""
        with self._changed:
            self._visits[who] = (*self._visits.pop(who, ()), at_s)[-REGULAR:]
            if len(self._visits) > MOST:
                del self._visits[next(iter(self._visits))]
            self._changed.notify_all()

    def longest_wait_s(self, longest_s: float) -> float:
        """For which `await_all` would wait now at the most."""
        now_s = time.monotonic()
        with self._changed:
            return max([0.0, *(self._due_s(who, longest_s) - now_s for who in self._visits)])

    def await_all(self, longest_s: float) -> bool:
        """Until everybody who comes more often than every `longest_s` seconds has come again.    Returns: whether they did."""
        now_s = time.monotonic()
        with self._changed:
            awaited = {who: due_s for who in self._visits if now_s < (due_s := self._due_s(who, longest_s))}
            deadline_s = max(awaited.values(), default=now_s)
            return self._changed.wait_for(
                lambda: all(who not in self._visits or self._visits[who][-1] >= now_s for who in awaited),
                deadline_s - now_s,
            )

    def _due_s(self, who: str, longest_s: float) -> float:
        """Until when the next visit is expected; 0 when none is."""
        visits = self._visits[who]
        interval_s = max((later - earlier for earlier, later in pairwise(visits)), default=0.0)
        if len(visits) < REGULAR or interval_s > longest_s:
            return 0.0
        return visits[-1] + LATE * interval_s + LATE_S
