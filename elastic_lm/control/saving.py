"""Which checkpoint is being written, by whom, and which one is the newest that is complete.

A state is saved in shares, one for each member that holds it, and counts when all shares are stored and its manifest is.
Invariant: at most one checkpoint is under way; one of which a share's owner goes before its share is stored is given up at
once. Trade-off: training never waits for the store, so one that is slower than the interval has checkpoints left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from elastic_lm.control import actions as act
from elastic_lm.control.events import Published, Saved
from elastic_lm.control.membership import Member
from elastic_lm.events.types import EventKind

FINAL_TRIES = 3


class Emit(Protocol):
    """Tells an event: its kind, a sentence, and fields."""

    def __call__(self, kind: EventKind, message: str, *, step: int | None = None, **fields: object) -> None: ...


@dataclass
class _Save:
    number: int
    step: int
    began: float
    final: bool
    owing: set[str] = field(default_factory=set)  # members whose shares are not stored yet; none: being published


class Saving:
    """Keeps track of one attempt's checkpoints. `do` and `emit` take the actions and events that follow."""

    def __init__(
        self, every_steps: int | None, newest_step: int | None, do: Callable[[act.Action], None], emit: Emit
    ) -> None:
        self.newest_step = newest_step  # complete ones only
        self.restorable_at: float | None = None  # when what could be restored was the run's newest state
        self._every_steps = every_steps
        self._do, self._emit = do, emit
        self._num_begun = 0
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
        return bool(every and step % every == 0 and step > (self.newest_step or 0) and self._save is None)

    def begin(self, whole: Sequence[Member], step: int, now: float, *, final: bool = False) -> None:
        """Have it written, in shares by those of `whole` that are likely to stay until theirs are stored."""
        staying = [m for m in whole if m.leaving is None and m.lost_connection_at is None]
        owners = tuple(m.member_id for m in (staying or whole))
        self._num_begun += 1
        self._save = _Save(self._num_begun, step, now, final, set(owners))
        self._do(act.SaveCheckpoint(self._num_begun, owners, step))

    def share_ended(self, event: Saved) -> bool:
        """The upload of a share ended, well or not.    Returns: whether the checkpoint under way failed by it."""
        save = self._save
        if save is None or save.number != event.number or event.member_id not in save.owing:
            return False  # of one that was given up
        if not event.ok:
            self._fail(save, event.error, counts=not event.lost)
            return True
        save.owing.discard(event.member_id)
        if not save.owing:
            self._do(act.PublishCheckpoint(save.number))
        return False

    def published(self, event: Published, now: float) -> bool:
        """Its manifest is stored, or could not be.    Returns: whether it was that of the checkpoint under way."""
        save = self._save
        if save is None or save.number != event.number or save.owing:
            return False
        if not event.ok:
            self._fail(save, event.error)
            return True
        self._save = None
        self.newest_step, self.restorable_at = max(save.step, self.newest_step or 0), save.began
        seconds = now - save.began
        self._emit(EventKind.CHECKPOINT_SAVED, f"Checkpoint of step {save.step} saved in {seconds:.1f} s.",
                   step=save.step, seconds=seconds)  # fmt: skip
        return True

    def abandon(self, member: Member, why: str) -> None:
        """The member goes; a share of its that is not stored goes with it. That is no failure of the store."""
        if self._save is not None and member.member_id in self._save.owing:
            self._tell_failed(self._save.step, why)
            self._save = None

    def _fail(self, save: _Save, error: str | None, *, counts: bool = True) -> None:
        self._failed_final_tries += save.final and counts
        self._tell_failed(save.step, error)
        self._save = None

    def _tell_failed(self, step: int, error: str | None) -> None:
        self._emit(EventKind.CHECKPOINT_FAILED, f"Checkpoint of step {step} failed: {error}.", step=step, error=error)
