"""The coordinator's hold on its members: Ray actors started or found, called, and ended for certain.

Everything asynchronous comes back as a control event through one callback; nothing here waits for a member.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

from elastic_lm import failpoints
from elastic_lm.checkpoint.layout import Part
from elastic_lm.control.actions import SaveCheckpoint
from elastic_lm.control.events import (
    Input,
    MemberFailed,
    MemberFound,
    MemberReady,
    MemberReturned,
    MemberStarted,
    Reported,
    Saved,
)
from elastic_lm.protocol import Generation, Lease, ReadyReport, ReturnReport
from elastic_lm.runtime.roster import Found, Roster, reap
from elastic_lm.runtime.worker import WorkerBoot, start_worker

logger = logging.getLogger(__name__)

POLL_S = 0.01
ASK_AGAIN_S = 1.0
REAP_AFTER_S = 1.0  # a reaper is a process of its own: it comes when the survivors are at work again

Deliver = Callable[[Input], None]


@dataclass
class _Member:
    handle: Any
    node_id: str | None = None
    pid: int | None = None
    is_dead: bool = False  # Ray has seen its process end


class Members:
    """Every member that was started and is not known to be dead."""

    def __init__(
        self,
        boot: WorkerBoot,
        roster: Roster,
        options: dict[str, Any],
        deliver: Deliver,
        *,
        retire_timeout_s: float,
    ) -> None:
        self._boot = boot
        self._roster = roster
        self._owner_epoch = boot.summons.owner_epoch
        self._options = options
        self._deliver = deliver
        self._retire_timeout_s = retire_timeout_s
        self._members: dict[str, _Member] = {}
        self._to_reap: list[tuple[float, _Member]] = []  # (when, whom)
        self._to_ask: dict[str, float] = {}  # who was called and could not be reached -> when to call again
        self._logged_step = 0

    def __contains__(self, member_id: str) -> bool:
        return member_id in self._members

    # -- starting ----------------------------------------------------------------------------------------------------

    def adopt(self, everybody: Sequence[Found], logged_step: int) -> None:
        """Call everybody who served an earlier coordinator of this run and may live; the others are ended.

        All are told to be found before anybody is called: an answer may come at once, and control waits for those it knows of.
        Args: `logged_step`: the event log holds every step before this one.
        """
        for found in everybody:
            if found.place is None or not found.fits or found.member_id in self._members:
                self._end(_Member(found.handle, *(found.place or ())))
                continue
            self._members[found.member_id] = _Member(found.handle, *found.place)
            self._deliver(MemberFound(found.member_id, *found.place))
        self._logged_step = logged_step
        for member_id in self._members:
            self._ask_back(member_id)

    def _ask_back(self, member_id: str) -> None:
        """Again when the connection broke: it may never have heard, and to hear it twice changes nothing."""
        handle = self._members[member_id].handle

        def failed(error: BaseException) -> None:
            if isinstance(error, ActorUnavailableError):
                self._to_ask[member_id] = time.monotonic() + ASK_AGAIN_S
            else:
                self._failed(member_id, error)

        _when_done(handle.adopt.remote(self._boot.summons), lambda _: None, failed)
        _when_done(handle.come_back.remote(self._boot.summons, self._logged_step), self._returned, failed)

    def _returned(self, report: ReturnReport) -> None:
        self._deliver(MemberReturned(report))

    def start(self, member_id: str, avoid_nodes: tuple[str, ...]) -> None:
        """One plain pending actor: a demand of its own that the autoscaler sees."""
        options = dict(self._options)
        if avoid_nodes:
            options["label_selector"] = {"ray.io/node-id": f"!in({','.join(avoid_nodes)})"}
        else:
            options["scheduling_strategy"] = "SPREAD"
        handle = start_worker(
            replace(self._boot, member_id=member_id), self._roster.name(member_id, self._owner_epoch), options
        )
        self._members[member_id] = _Member(handle)
        self._call(member_id, handle.locate.remote(), lambda place: self._located(member_id, place))
        self._call(member_id, handle.warm_up.remote(), self._ready)

    def _located(self, member_id: str, place: tuple[str, int]) -> None:
        member = self._members.get(member_id)
        if member is not None:
            member.node_id, member.pid = place
        self._deliver(MemberStarted(member_id, *place))

    def _ready(self, report: ReadyReport) -> None:
        self._deliver(MemberReady(report))

    # -- working -----------------------------------------------------------------------------------------------------

    def grant(self, lease: Lease) -> None:
        for rank, member_id in enumerate(lease.members):
            if rank == 1:
                failpoints.hit("coordinator.granted", lease.start_step)
            if member_id in self._members:
                ref = self._members[member_id].handle.run_lease.remote(lease)
                self._call(member_id, ref, lambda report: self._deliver(Reported(report)))

    def fence(self, member_ids: tuple[str, ...], generation: Generation) -> None:
        for handle in self._handles(member_ids):
            handle.fence.remote(generation)

    def end_lease(self, member_ids: tuple[str, ...], generation: Generation) -> None:
        for handle in self._handles(member_ids):
            handle.end_lease.remote(generation)

    def set_readers(self, readers: tuple[Any, ...]) -> None:
        """Who serves tokens from now on, to members that are here and to those to come."""
        self._boot = replace(self._boot, summons=replace(self._boot.summons, readers=readers))
        for member in self._members.values():
            member.handle.set_readers.remote(self._owner_epoch, readers)

    def save(self, action: SaveCheckpoint, on_stored: Callable[[int, tuple[Part, ...]], None]) -> None:
        """Copy now, upload in the background; `on_stored` gets the parts of a share, before control hears of it."""
        for share, member_id in enumerate(action.member_ids):
            self._save_share(action, share, member_id, on_stored)

    def _save_share(
        self, action: SaveCheckpoint, share: int, member_id: str, on_stored: Callable[[int, tuple[Part, ...]], None]
    ) -> None:
        handle, number = self._members[member_id].handle, action.number
        attempt = (self._owner_epoch, number)

        def done(parts: tuple[Part, ...]) -> None:
            on_stored(number, parts)
            self._deliver(Saved(number, member_id, True, None))

        def failed(error: BaseException) -> None:
            lost = not isinstance(error, RayTaskError)
            if lost:  # told first, so that nobody asks it for another share
                self._deliver(MemberFailed(member_id, _cause(error), proof=isinstance(error, ActorDiedError)))
            self._deliver(Saved(number, member_id, False, _cause(error), lost))

        def copied(_: None) -> None:
            _when_done(handle.saved.remote(attempt), done, failed)

        # The copy is ordered before the member's next lease; the upload is waited for in another group.
        _when_done(handle.snapshot.remote(attempt, action.step, share, len(action.member_ids)), copied, failed)

    def handles(self) -> list[Any]:
        """Of everybody."""
        return [member.handle for member in self._members.values()]

    def cancel_save(self, number: int, member_ids: tuple[str, ...]) -> None:
        for handle in self._handles(member_ids):
            handle.cancel_save.remote((self._owner_epoch, number))

    # -- ending ------------------------------------------------------------------------------------------------------

    def retire(self, member_id: str) -> None:
        """Ask a member to end itself, and forget it. Its process is ended for certain after `retire_timeout_s`."""
        member = self._members.pop(member_id, None)
        if member is not None:
            self._ask_to_leave(member)
            self._to_reap.append((time.monotonic() + self._retire_timeout_s, member))

    def _ask_to_leave(self, member: _Member) -> None:
        def failed(error: BaseException) -> None:
            member.is_dead = isinstance(error, ActorDiedError)

        _when_done(member.handle.leave.remote(self._owner_epoch), lambda _: None, failed)

    def kill(self, member_id: str) -> None:
        """End a member for certain, also one that is frozen and hears nothing."""
        member = self._members.pop(member_id, None)
        if member is not None:
            self._end(member)

    def _end(self, member: _Member) -> None:
        ray.kill(member.handle, no_restart=True)
        if not member.is_dead:  # from now on Ray calls it dead whether or not its process is
            self._to_reap.append((time.monotonic() + REAP_AFTER_S, replace(member)))

    def end_all(self) -> None:
        """The run is over: ask everybody to leave, end those who have not after a moment."""
        asked = list(self._members.values())
        for member in asked:
            self._ask_to_leave(member)
        deadline = time.monotonic() + REAP_AFTER_S
        while not all(member.is_dead for member in asked) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        for member_id in list(self._members):
            self.kill(member_id)
        self.reap(at_once=True)

    def hand_on(self) -> None:
        """Somebody comes who goes on with all that are left, and knows nothing of those that were told to end."""
        self.reap(at_once=True)

    def tend(self) -> None:
        """What is due: called now and then."""
        self.reap()
        now = time.monotonic()
        for member_id in [member_id for member_id, when in list(self._to_ask.items()) if when <= now]:
            del self._to_ask[member_id]
            if member_id in self._members:
                self._ask_back(member_id)

    def reap(self, *, at_once: bool = False) -> None:
        """SIGKILL those that were told to end a while ago and have not been seen to."""
        now = time.monotonic()
        due = [member for when, member in self._to_reap if at_once or when <= now]
        self._to_reap = [(when, member) for when, member in self._to_reap if member not in due]
        for member in due:
            if not member.is_dead and member.node_id is not None and member.pid is not None:
                reap(member.node_id, member.pid)

    # -- plumbing ----------------------------------------------------------------------------------------------------

    def _handles(self, member_ids: tuple[str, ...]) -> list[Any]:
        return [self._members[m].handle for m in member_ids if m in self._members]

    def _call(self, member_id: str, ref: ray.ObjectRef, on_result: Callable[[Any], None]) -> None:
        _when_done(ref, on_result, lambda error: self._failed(member_id, error))

    def _failed(self, member_id: str, error: BaseException) -> None:
        raised, died = isinstance(error, RayTaskError), isinstance(error, ActorDiedError)
        member = self._members.get(member_id)
        if died and member is not None:
            member.is_dead = True
        self._deliver(MemberFailed(member_id, _cause(error), raised or died, raised))


def _when_done(ref: ray.ObjectRef, on_result: Callable[[Any], None], on_error: Callable[[BaseException], None]) -> None:
    """Call back on one of Ray's threads; no polling, no thread of ours."""

    def done(future: Any) -> None:
        error = future.exception()
        if error is None:
            on_result(future.result())
        else:
            on_error(error)

    ref.future().add_done_callback(done)


def _cause(error: BaseException) -> str:
    """One line that says why a call to a member failed."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ActorDiedError):
        return "process died"
    if isinstance(error, (ActorUnavailableError, RayActorError)):
        return "process unreachable"
    return f"{type(error).__name__}: {error}".splitlines()[0]
