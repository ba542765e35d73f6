"""How long a silence may be. Short on a quiet machine, longer where heartbeats are seen to come late.

A frozen process must be found within two seconds; a process that waits for an overloaded CPU must not be taken for one.
The limit therefore follows the longest gap between two beats that any living member has shown lately.
"""

from __future__ import annotations

WINDOW_S = 60.0
USUAL_GAP_S = 0.3  # beats come every 0.2 s
MARGIN = 3.0
LONGEST_LIMIT_S = 30.0


class SilenceLimit:
    """`heartbeat_timeout_s`, plus three times the lateness seen in the last one to two minutes."""

    def __init__(self, heartbeat_timeout_s: float) -> None:
        self._timeout_s = heartbeat_timeout_s
        self._longest = [0.0, 0.0]  # this window's, the last window's
        self._window_began = 0.0

    def saw_gap(self, seconds: float, now: float) -> None:
        """Two beats of one member came this far apart."""
        if now - self._window_began > WINDOW_S:
            self._longest = [0.0, self._longest[0] if now - self._window_began < 2 * WINDOW_S else 0.0]
            self._window_began = now
        self._longest[0] = max(self._longest[0], seconds)

    def seconds(self) -> float:
        late = max(0.0, max(self._longest) - USUAL_GAP_S)
        return min(LONGEST_LIMIT_S, self._timeout_s + MARGIN * late)
