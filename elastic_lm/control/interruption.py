"""Why nobody trains, from the first cause on until somebody does again.

Invariant: of the time that training stands still each second is told once, under one cause.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_lm.control.emit import Emit
from elastic_lm.events.types import EventKind
from elastic_lm.protocol import Generation, Lease

START, WAIT = "start", "wait"  # for lack of workers: the first one, and any later
TAKEOVER = "coordinator"  # this coordinator took over from an earlier one
REWIND = "rewind"  # the run goes back, and all begin anew
LEASE = "lease"  # one ended, and nothing else is known yet
ROUTINE = (LEASE, "checkpoint", "evaluation")  # the elastic set stays as it is
PLANNED = (*ROUTINE, "join", "drain", "straggler", "resize")


@dataclass
class Interruption:
    """Training stands still. `generation` is the one that broke off; work in a later one ends the interruption."""

    cause: str
    since: float
    detail: str
    generation: Generation

    @property
    def is_wait(self) -> bool:
        return self.cause in (START, WAIT)

    def add(self, cause: str, detail: str, generation: Generation) -> None:
        """Something more came: the first cause is the one that counts, but a failure outranks a plan."""
        self.generation = generation
        if self.cause in PLANNED and cause not in PLANNED:
            self.cause, self.detail = cause, detail


class Standstill:
    """The interruption that lasts, if one does. `emit` takes the events that tell of it."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._interruption: Interruption | None = None

    @property
    def lasts(self) -> bool:
        return self._interruption is not None

    def begin(self, cause: str, detail: str, generation: Generation, now: float) -> None:
        """Training stands still from now on, if it does not already."""
        if self._interruption is None:
            self._interruption = Interruption(cause, now, detail, generation)
        else:
            self._interruption.add(cause, detail, generation)

    def attribute_to(self, cause: str) -> None:
        """What a lease was ended for, or the next one is for: the cause, where nothing else happened.

        A change of the elastic set outranks routine: whoever looks for it finds it, also if it came with an evaluation.
        """
        over = self._interruption
        if over is not None and (over.cause == LEASE or (over.cause in ROUTINE and cause not in ROUTINE)):
            over.cause = cause

    def wait(self, have: int, wanted: int, generation: Generation, now: float) -> None:
        """There are too few workers to begin with. Told once."""
        earlier = self._interruption
        if earlier is not None and earlier.is_wait:
            return
        since = now if earlier is None else earlier.since
        cause = START if generation.number == 0 else WAIT
        self._interruption = Interruption(cause, since, f"waited for {_workers(wanted)}", generation)
        self._emit(EventKind.NOTE, f"Waiting for {_workers(wanted)}; {have} ready.", have=have, wanted=wanted)

    def end(self, lease: Lease, step: int, now: float) -> None:
        """Somebody trains this step, in a lease for all: what broke off in an earlier one is over."""
        over = self._interruption
        if over is None or lease.generation <= over.generation:
            return
        self._interruption = None
        lost_s = now - over.since
        why = f"{over.cause}: {over.detail}" if over.detail else over.cause
        again = "" if over.cause == START else " again"
        self._emit(EventKind.REFORMED,
                   f"Training{again} after {lost_s:.2f} s with {_workers(lease.world_size)} ({why}).",
                   step=step, cause=over.cause, lost_s=lost_s, world_size=lease.world_size)  # fmt: skip


def _workers(number: int) -> str:
    return f"{number} worker{'s' if number != 1 else ''}"
