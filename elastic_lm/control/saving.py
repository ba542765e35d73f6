"""Which checkpoint is being written, by whom, and which one is the newest that is complete.

A state is saved in shares, one for each of some members that hold it, and counts when all shares are stored and its manifest
is. Invariant: at most one checkpoint is under way, and none for longer than `checkpoint_timeout_s`; one of which a share's
owner goes before its share is stored is given up at once. A manifest that is stored after all is the checkpoint that it is,
whatever was said of it before.

Trade-offs: Training never waits for the store, so one that is slower than the interval has checkpoints left out. Many owners
make shares small, quick to copy and to upload; but whoever of them goes takes the checkpoint along. So there are `MAX_OWNERS`
at most, those who have lived longest, half as many after each loss and twice as many after each success: where workers go all
the time the whole state is soon one member's, which must find room for the copy. (With fast sums it always is: replicas may
differ in their last bits, so shares of several are not one state.) A checkpoint that was lost with an owner is begun again
at the next end of a lease, which that loss has mostly brought about: so the newest one is never older than the interval and
a few uploads, and where workers go all the time a state is copied more often than the interval says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic_lm.control import actions as act
from elastic_lm.control.emit import Emit
from elastic_lm.control.events import Published, Saved
from elastic_lm.control.membership import Member
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import EventKind

FINAL_TRIES = 3
# A machine's usual number of GPUs: each then copies an eighth of the state, and with more it would be little less.
MAX_OWNERS = 8


@dataclass
class _Save:
    number: int
    step: int
    began: float
    deadline: float
    final: bool
    owners: Sequence[Member]
    owing: set[str]  # owners whose shares are not stored yet; none: being published
    is_awaited: bool = False  # by a run that has nothing else


class Saving:
    """Keeps track of one attempt's checkpoints. `do` and `emit` take the actions and events that follow."""

    def __init__(
        self,
        spec: ControlSpec,
        newest_step: int | None,
        do: Callable[[act.Action], None],
        emit: Emit,
        *,
        begins_elsewhere: bool = False,
    ) -> None:
        self.newest_step = newest_step  # complete ones only
        self.restorable_at: float | None = None  # when what could be restored was the run's newest state
        self._spec = spec
        self._do, self._emit = do, emit
        self._num_begun = 0
        self._save: _Save | None = None
        self._in_publication: dict[int, _Save] = {}  # what became of their manifests is not known, given up or not
        self._max_owners = MAX_OWNERS if spec.exact else 1
        self._num_owners = self._max_owners  # of the next one, at most
        self._is_owed = False  # one was lost with an owner or an earlier coordinator
        self._is_asked = False  # for one more, whatever the interval
        self._unlucky: set[str] = set()  # members that could not store a share
        self._failed_final_tries = 0
        self.last_error: str | None = None
        self._begins_elsewhere = begins_elsewhere  # so that without any there is nothing to begin with
        self.is_searching = False
        self._unrestorable: int | None = None  # the newest one, while another is looked for
        self._vouched: int | None = None  # one that was read whole although a worker could not restore it

    @property
    def under_way(self) -> bool:
        return self._save is not None

    @property
    def is_hopeless(self) -> bool:
        """The last checkpoint of the run was tried often enough."""
        return self._failed_final_tries >= FINAL_TRIES

    def is_due(self, step: int, *, final: bool = False) -> bool:
        """`final`: the run ends with this step."""
        every = self._spec.checkpoint_every
        is_time = final or self._is_asked or (every is not None and (self._is_owed or step % every == 0))
        is_in_vain = final and self.is_hopeless
        return is_time and not is_in_vain and step > (self.newest_step or 0) and self._save is None

    def ask(self) -> None:
        """For a checkpoint at the next end of a lease, or at the one after it where one is under way."""
        self._is_asked = True

    def inherit(self, step: int) -> None:
        """A member comes back from an earlier coordinator, at this step: a checkpoint that was due by then is owed."""
        every = self._spec.checkpoint_every
        self._is_owed |= bool(every and step // every > (self.newest_step or 0) // every)

    @property
    def is_beyond_help(self) -> bool:
        """Whether the newest one cannot be restored again, although every byte of it was read."""
        return self.newest_step is not None and self._vouched == self.newest_step

    def search(self) -> None:
        """The newest one cannot be restored: find out which one can. Whatever is asked for meanwhile is the same question."""
        if not self.is_searching:
            self.is_searching, self._unrestorable = True, self.newest_step
            self._do(act.FindCheckpoint())

    def found(self, step: int | None) -> None:
        """Which one can. Steps after it are trained again, unless a newer one was completed meanwhile."""
        self.is_searching = False
        if self.newest_step != self._unrestorable:
            return
        if step is not None and step == self._unrestorable:
            self._vouched = step
            return
        self.newest_step = step
        self._do(act.GoBack(step))
        told = "the initial state" if step is None else f"the checkpoint of step {step}"
        self._emit(EventKind.NOTE, f"The newest state that can be restored is {told}.", step=step or 0)

    def found_nothing_out(self) -> None:
        """It is looked for again when it is needed again."""
        self.is_searching = False

    def holds_up_restore(self) -> bool:
        """Whether one is looked for, or one that is newer than any that can be restored lacks only its manifest. Told once."""
        if self.newest_step is None and self._begins_elsewhere:
            self.search()
        if self.is_searching:
            return True
        save = self._save
        if save is None or save.owing or save.step <= (self.newest_step or 0):
            return False
        if not save.is_awaited:
            save.is_awaited = True
            self._emit(EventKind.NOTE, f"Nobody holds a state; waiting for the manifest of step {save.step}, which is being "
                       f"written, rather than go back to step {self.newest_step or 0}.")  # fmt: skip
        return True

    def begin(self, whole: Sequence[Member], step: int, now: float, *, final: bool = False) -> None:
        """Have it written, in shares by those of `whole` that are likely to stay until theirs are stored."""
        owners = self._owners(whole)
        names = tuple(m.member_id for m in owners)
        self._num_begun += 1
        deadline = now + self._spec.checkpoint_timeout_s
        self._save = _Save(self._num_begun, step, now, deadline, final, owners, set(names))
        self._is_owed = self._is_asked = False
        self._do(act.SaveCheckpoint(self._num_begun, names, step))

    def _owners(self, whole: Sequence[Member]) -> Sequence[Member]:
        staying = [m for m in whole if m.leaving is None and m.lost_connection_at is None]
        lucky = [m for m in staying if m.member_id not in self._unlucky]
        return sorted(lucky or staying or whole, key=lambda m: m.number)[: self._num_owners]

    def share_ended(self, event: Saved) -> bool:
        """The upload of a share ended, well or not.    Returns: whether the checkpoint under way failed by it."""
        save = self._save
        if save is None or save.number != event.number or event.member_id not in save.owing:
            return False  # of one that was given up
        if event.ok:
            save.owing.discard(event.member_id)
            if not save.owing:
                self._in_publication[save.number] = save
                self._do(act.PublishCheckpoint(save.number))
            return False
        if event.lost:
            self._lose(save, event.member_id, event.error)
        else:
            self._unlucky.add(event.member_id)
            self._give_up(save, event.error)
        return True

    def published(self, event: Published, now: float) -> bool:
        """Its manifest is stored, or could not be.    Returns: whether it was that of the checkpoint under way."""
        save = self._in_publication.pop(event.number, None)
        if save is None:
            return False
        was_under_way = save is self._save
        if event.ok:
            self._complete(save, now)
        elif was_under_way:
            self._give_up(save, event.error)
        return was_under_way

    def abandon(self, member: Member, why: str) -> None:
        """The member goes; a share of its that is not stored goes with it."""
        if self._save is not None and member.member_id in self._save.owing:
            self._lose(self._save, member.member_id, why)

    def slept(self, seconds: float) -> None:
        """The coordinator did: nobody's upload is late for that."""
        if self._save is not None:
            self._save.deadline += seconds

    def expire(self, now: float) -> None:
        """Give up the checkpoint under way once it has taken too long."""
        save = self._save
        if save is None or now < save.deadline:
            return
        self._unlucky |= save.owing
        missing = f"the share of {', '.join(sorted(save.owing))}" if save.owing else "the manifest"
        limit_s = self._spec.checkpoint_timeout_s
        self._num_owners = min(self._max_owners, 2 * self._num_owners)  # whose shares are smaller
        why = f"it was not stored within {limit_s:g} s (checkpoint.timeout_s): {missing} is missing"
        late = [m for m in save.owners if m.member_id in save.owing]
        silent = any(now - (m.last_beat or now) > self._spec.heartbeat_timeout_s for m in late)
        self._give_up(save, why, counts=not silent)  # one that is frozen may be waited for, for its state

    def end(self) -> None:
        """The run ends: what is not stored never will be. A manifest that is being written may be, and is waited for."""
        if self._save is not None and self._save.owing:
            self._give_up(self._save, "the run ended")

    def _complete(self, save: _Save, now: float) -> None:
        if save is self._save:
            self._save = None
        if save.step > (self.newest_step or 0):
            self.newest_step = save.step
        self.restorable_at = max(save.began, self.restorable_at or save.began)
        self._num_owners = min(self._max_owners, 2 * self._num_owners)
        seconds = now - save.began
        self._emit(EventKind.CHECKPOINT_SAVED, f"Checkpoint of step {save.step} saved in {seconds:.1f} s.",
                   step=save.step, seconds=seconds)  # fmt: skip

    def _lose(self, save: _Save, member_id: str, why: str | None) -> None:
        """With an owner: no failure of the store."""
        save.owing.discard(member_id)  # which cannot be told any more
        self._num_owners, self._is_owed = max(1, len(save.owners) // 2), True
        self._give_up(save, why, counts=False)

    def _give_up(self, save: _Save, error: str | None, *, counts: bool = True) -> None:
        """`counts`: of the tries of a final one."""
        self._failed_final_tries += save.final and counts
        self.last_error = error
        self._save = None
        self._do(act.AbandonCheckpoint(save.number, tuple(sorted(save.owing))))
        self._emit(EventKind.CHECKPOINT_FAILED, f"Checkpoint of step {save.step} failed: {error}.",
                   step=save.step, error=error)  # fmt: skip
