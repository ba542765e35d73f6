"""Which checkpoint is being written, by whom, and which one is the newest that is complete.

Invariant: at most one checkpoint is under way; one whose writer goes is given up at once, and may still turn out to be
complete. Trade-off: training never waits for the store, so one that is slower than the interval has checkpoints left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from elastic_lm.control import actions as act
from elastic_lm.control.events import Saved
from elastic_lm.control.membership import Member
from elastic_lm.events.types import EventKind

FINAL_TRIES = 3


class Emit(Protocol):
    """Tells an event: its kind, a sentence, and fields."""

    def __call__(self, kind: EventKind, message: str, *, step: int | None = None, **fields: object) -> None: ...


@dataclass(frozen=True)
class _Save:
    member_id: str
    step: int
    began: float
    final: bool


class Saving:
    """Keeps track of one attempt's checkpoints. `do` and `emit` take the actions and events that follow."""

    def __init__(
        self, every_steps: int | None, newest_step: int | None, do: Callable[[act.Action], None], emit: Emit
    ) -> None:
        self.newest_step = newest_step  # complete ones only
        self.restorable_at: float | None = None  # when what could be restored was the run's newest state
        self._every_steps = every_steps
        self._do, self._emit = do, emit
        self._save: _Save | None = None
        self._failed_final_tries = 0

    @property
    def under_way(self) -> bool:
        return self._save is not None

    @property
    def is_hopeless(self) -> bool:
        """The last checkpoint of the run was tried often enough."""
        return self._failed_final_tries == FINAL_TRIES

    def is_due(self, step: int) -> bool:
        every = self._every_steps
        return bool(every and step and step % every == 0 and step != self.newest_step and self._save is None)

    def begin(self, whole: Sequence[Member], step: int, now: float, *, final: bool = False) -> None:
        """Have it written, by a member of `whole` that is likely to stay until the upload is complete."""
        member = min(whole, key=lambda m: (m.leaving is not None, m.lost_connection_at is not None))
        self._save = _Save(member.member_id, step, now, final)
        self._do(act.SaveCheckpoint(member.member_id, step))

    def ended(self, event: Saved, now: float) -> bool:
        """An upload ended, well or not.    Returns: whether it was the one that is under way."""
        save = self._save
        if save is None or (save.member_id, save.step) != (event.member_id, event.step):
            if event.ok:  # its worker was given up, but the checkpoint is there
                self.newest_step = max(event.step, self.newest_step or 0)
            return False
        self._save = None
        seconds = now - save.began
        if event.ok:
            self.newest_step, self.restorable_at = event.step, save.began
            self._emit(EventKind.CHECKPOINT_SAVED, f"Checkpoint of step {event.step} saved in {seconds:.1f} s.",
                       step=event.step, seconds=seconds)  # fmt: skip
        else:
            self._failed_final_tries += save.final
            self._tell_failed(event.step, event.error)
        return True

    def abandon(self, member: Member, why: str) -> None:
        """The member goes; so does what it was writing. That is no failure of the store: final tries are not counted."""
        if self._save is not None and self._save.member_id == member.member_id:
            self._tell_failed(self._save.step, why)
            self._save = None

    def _tell_failed(self, step: int, error: str | None) -> None:
        self._emit(EventKind.CHECKPOINT_FAILED, f"Checkpoint of step {step} failed: {error}.", step=step, error=error)
