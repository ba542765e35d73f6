"""Members as control sees them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_lm.protocol import Phase


class MemberState(StrEnum):
    """pending -> starting -> ready -> active -> gone; a gone member is forgotten, and never comes back."""

    PENDING = "pending"  # a demand; Ray has not placed it
    STARTING = "starting"  # its process warms up
    READY = "ready"  # may enter the next lease
    ACTIVE = "active"  # holds a lease


@dataclass
class Member:
    """One member and what is known about it. Times are monotonic seconds."""

    member_id: str
    number: int  # counts up over the run: seniority
    since: float  # when the present state began
    state: MemberState = MemberState.PENDING
    node_id: str | None = None
    pid: int | None = None
    leaving: str | None = None  # why it is drained, if it is

    whole: bool = False
    next_step: int = 0

    last_beat: float | None = None
    lost_connection_at: float | None = None
    phase: Phase = Phase.STARTING
    progress: int = -1
    progress_at: float = 0.0
    micro_batch_s: float | None = None

    def slept(self, seconds: float) -> None:
        """The coordinator slept: every deadline of this member moves by as much."""
        self.since += seconds
        self.progress_at += seconds
        if self.last_beat is not None:
            self.last_beat += seconds
        if self.lost_connection_at is not None:
            self.lost_connection_at += seconds

    def enter(self, state: MemberState, now: float) -> None:
        self.state, self.since = state, now

    @property
    def has_joined(self) -> bool:
        """Warmed up and admitted."""
        return self.state in (MemberState.READY, MemberState.ACTIVE)

    @property
    def has_state_for_sure(self) -> bool:
        """It has a whole state, and nothing says that its process has died."""
        return self.whole and self.lost_connection_at is None
