"""The lease that is out: who owes a report on it, and how it is brought to an end.

Invariants: there is at most one, and the next begins only when everybody in it has reported or is gone. No lease is out
exactly when the mode is idle. A generation is used once, and each is higher than the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum

from elastic_lm.control import actions as act
from elastic_lm.control.interruption import LEASE
from elastic_lm.protocol import Generation, Lease, LeaseEnd


class Mode(StrEnum):
    """What the current generation is doing."""

    IDLE = "idle"  # no lease is out
    LEASED = "leased"
    ENDING = "ending"  # members were asked to vote for the end
    FENCING = "fencing"  # members were told to drop everything


class CurrentLease:
    """One after the other, from its grant to its last report. `do` takes the actions that follow."""

    def __init__(self, owner_epoch: int, do: Callable[[act.Action], None]) -> None:
        self.generation = Generation(owner_epoch, 0)
        self.lease: Lease | None = None
        self.mode = Mode.IDLE
        self.is_for_all = True  # not only for those behind
        self.settled: Lease | None = None  # the last that was no evaluation, if all its members came back in agreement
        self._do = do
        self._owing: set[str] = set()
        self._agreed = False  # nobody has left it in disagreement
        self._fenced_at = 0.0
        self._cause = LEASE  # why it ends early

    @property
    def is_out(self) -> bool:
        return self.lease is not None

    @property
    def trains(self) -> bool:
        """Nothing was done yet to end it, and there are steps in it."""
        return self.mode is Mode.LEASED and self.lease is not None and self.lease.trains

    @property
    def world_size(self) -> int:
        return 0 if self.lease is None else self.lease.world_size

    @property
    def owing(self) -> Collection[str]:
        """Members that owe a report."""
        return self._owing

    @property
    def is_over(self) -> bool:
        """Everybody in it has reported, or is gone."""
        return self.lease is not None and not self._owing

    @property
    def fenced_at(self) -> float | None:
        """When its members were told to drop it, if they were."""
        return self._fenced_at if self.mode is Mode.FENCING else None

    def includes(self, member_id: str) -> bool:
        return self.lease is not None and member_id in self.lease.members

    def next_generation(self) -> Generation:
        self.generation = Generation(self.generation.owner_epoch, self.generation.number + 1)
        return self.generation

    def begin(self, lease: Lease, *, is_for_all: bool = True) -> None:
        assert self.lease is None and lease.generation == self.generation
        self.lease, self.mode, self.is_for_all = lease, Mode.LEASED, is_for_all
        self._owing, self._agreed = set(lease.members), True
        if not lease.evaluates:  # whose members keep the group that they had before
            self.settled = None
        self._do(act.Grant(lease))

    def end_after_step(self, cause: str) -> None:
        """Let the running step be its last, for this cause; the first one counts."""
        if self.mode is Mode.LEASED:
            self.mode, self._cause = Mode.ENDING, cause
            self._do(act.EndLease(self.generation, tuple(sorted(self._owing))))

    def fence(self, now: float) -> None:
        """End it at once; every living member still reports."""
        assert self.lease is not None
        self._agreed = False
        if self.mode is not Mode.FENCING:
            self.mode, self._fenced_at = Mode.FENCING, now
            self._do(act.Fence(tuple(sorted(self._owing)), self.generation))

    def reported(self, member_id: str, end: LeaseEnd) -> None:
        self._owing.discard(member_id)
        self._agreed &= end.agreed

    def left(self, member_id: str) -> None:
        """The member is gone, and reports no more."""
        self._owing.discard(member_id)

    def slept(self, seconds: float) -> None:
        """The coordinator did: nobody is late for that."""
        self._fenced_at += seconds

    def close(self) -> str:
        """It is over.    Returns: why it ended."""
        assert self.lease is not None and not self._owing
        cause, self._cause = self._cause, LEASE
        if not self._agreed:
            self.settled = None
        elif not self.lease.evaluates:
            self.settled = self.lease
        self.lease, self.mode = None, Mode.IDLE
        return cause
