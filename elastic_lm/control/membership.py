"""Members as control sees them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_lm.protocol import Heartbeat, LeaseReport, Phase

PREFIX = "w"  # members are w0, w1, ... in the order in which they were asked for


def id_of(number: int) -> str:
    return f"{PREFIX}{number}"


def number_of(member_id: str) -> int:
    return int(member_id.removeprefix(PREFIX))


class MemberState(StrEnum):
    """pending -> starting -> ready -> active -> gone; a gone member is forgotten, and never comes back.

    A member of an earlier coordinator begins as returning, and is ready next.
    """

    PENDING = "pending"  # a demand; Ray has not placed it
    STARTING = "starting"  # its process warms up
    RETURNING = "returning"  # lives, or seems to; what it holds is not known yet
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
    begins_anew: bool = False  # it was found, and what it held then is of no use

    whole: bool = False
    next_step: int = 0

    returned_at: float | None = None  # to this coordinator, if it served an earlier one
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
        if self.returned_at is not None:
            self.returned_at += seconds
        if self.last_beat is not None:
            self.last_beat += seconds
        if self.lost_connection_at is not None:
            self.lost_connection_at += seconds

    def enter(self, state: MemberState, now: float) -> None:
        self.state, self.since = state, now

    def begin(self, now: float) -> None:
        """It gets a lease."""
        self.enter(MemberState.ACTIVE, now)
        self.progress_at = now

    def heard(self, beat: Heartbeat, now: float) -> None:
        """It lives. Whether it holds what the beat says depends on the lease that the beat is of."""
        self.last_beat, self.lost_connection_at = now, None
        if beat.progress != self.progress or beat.phase is not self.phase:
            self.progress_at = now
        self.progress, self.phase = beat.progress, beat.phase
        self.micro_batch_s = beat.micro_batch_s or self.micro_batch_s

    def reported(self, report: LeaseReport, now: float) -> None:
        """It came back from its lease, with what the report says."""
        self.whole, self.next_step = report.whole, report.next_step
        self.micro_batch_s = report.micro_batch_s or self.micro_batch_s
        self.enter(MemberState.READY, now)

    @property
    def has_joined(self) -> bool:
        """Warmed up and admitted."""
        return self.state in (MemberState.READY, MemberState.ACTIVE)

    @property
    def may_hold_state(self) -> bool:
        """It has a whole state, or comes back and has not said that it has none."""
        return self.whole or (self.is_awaited and not self.begins_anew)

    @property
    def is_awaited(self) -> bool:
        """It comes back. One that still warms up has no state, and may do that later."""
        warms_up = self.last_beat is not None and self.phase is Phase.STARTING
        return self.state is MemberState.RETURNING and not warms_up

    @property
    def has_state_for_sure(self) -> bool:
        """It has a whole state, and nothing says that its process has died."""
        return self.whole and self.lost_connection_at is None
