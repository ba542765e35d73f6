"""The elastic set: who is in the run. It asks for workers, follows their nodes, and lets members go.

Invariants: no two members of an attempt have one id. A member that is gone stays gone: a sign of life from it is answered with
another kill. Nothing here knows of leases: whoever removes a member of one has that lease ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from elastic_lm.control import actions as act
from elastic_lm.control.emit import Emit
from elastic_lm.control.membership import Member, MemberState, id_of, number_of
from elastic_lm.control.retries import Retries
from elastic_lm.control.saving import Saving
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import EventKind
from elastic_lm.protocol import ReadyReport, ReturnReport

NODE_LOSS_S = 60.0  # a node is known to be dead so long after its workers at the latest


class ElasticSet(Mapping[str, Member]):
    """Members by id, in the order in which they came. `do` and `emit` take the actions and events that follow.

    `first_number`: of the first new member. `saving` is told of all who go.
    """

    def __init__(
        self,
        spec: ControlSpec,
        first_number: int,
        saving: Saving,
        do: Callable[[act.Action], None],
        emit: Emit,
    ) -> None:
        self.min_workers, self.max_workers = spec.min_workers, spec.max_workers
        self._spec, self._saving, self._do, self._emit = spec, saving, do, emit
        self._members: dict[str, Member] = {}
        self._next_number = first_number
        self._retries = Retries(spec)
        self._draining_nodes: set[str] = set()
        self._lost_lately: list[tuple[float, str, str]] = []  # (when, node, member): its node may turn out to be dead

    # -- who is there ------------------------------------------------------------------------------------------------

    def __getitem__(self, member_id: str) -> Member:
        return self._members[member_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def heard_from(self, member_id: str) -> Member | None:
        """Who gives this sign of life. One that is gone, which is None, is killed once more."""
        member = self._members.get(member_id)
        if member is None:
            self._do(act.KillMember(member_id))
        return member

    def joined(self) -> list[Member]:
        """Those who are warmed up and admitted."""
        return [m for m in self._members.values() if m.has_joined]

    def is_last_whole(self, member: Member) -> bool:
        """Whether giving this member up would give up the run's state in memory: of the others none has it for sure."""
        return member.may_hold_state and not any(
            m.has_state_for_sure for m in self._members.values() if m is not member
        )

    # -- members come ------------------------------------------------------------------------------------------------

    def ask_for_missing(self, now: float) -> None:
        """One demand per missing worker, unless a back-off lasts."""
        staying = sum(m.leaving is None for m in self._members.values())
        if now < self._retries.not_before:
            return
        for _ in range(self.max_workers - staying):
            member = Member(id_of(self._next_number), self._next_number, now)
            self._next_number += 1
            self._members[member.member_id] = member
            self._do(act.StartMember(member.member_id, self._retries.avoided))

    def started(self, member: Member, node_id: str, pid: int, now: float) -> bool:
        """Its process runs there.    Returns: whether that node is going away."""
        member.node_id, member.pid = node_id, pid
        if member.state is MemberState.PENDING:
            member.enter(MemberState.STARTING, now)
        self._emit(EventKind.MEMBER_STARTED, f"{member.member_id} starts (process {pid}).",
                   member_id=member.member_id, node_id=node_id, pid=pid)  # fmt: skip
        return node_id in self._draining_nodes

    def ready(self, member: Member, report: ReadyReport, now: float) -> None:
        member.node_id, member.pid, member.last_beat = report.node_id, report.pid, now
        member.enter(MemberState.READY, now)
        self._emit(EventKind.MEMBER_READY, f"{member.member_id} is ready after {report.startup_s:.1f} s.",
                   member_id=member.member_id, node_id=report.node_id, startup_s=report.startup_s,
                   environment=report.environment)  # fmt: skip

    def found(self, member_id: str, node_id: str, pid: int, now: float, *, begins_anew: bool) -> None:
        """It served an earlier coordinator, and returns or fails. `begins_anew`: what it holds is of no use."""
        number = number_of(member_id)
        self._next_number = max(self._next_number, number + 1)
        member = Member(member_id, number, now, MemberState.RETURNING, node_id, pid, begins_anew=begins_anew)
        self._members[member_id] = member

    def returned(self, member: Member, report: ReturnReport, now: float) -> None:
        member.returned_at = member.last_beat = now
        member.micro_batch_s = report.micro_batch_s
        member.whole, member.next_step = report.whole, report.next_step
        member.enter(MemberState.READY, now)
        held = f"the state before step {report.next_step}" if report.whole else "no state"
        self._emit(EventKind.MEMBER_RETURNED, f"{member.member_id} goes on under this coordinator with {held}.",
                   step=report.next_step if report.whole else None, member_id=member.member_id, node_id=member.node_id,
                   pid=member.pid, whole=report.whole, environment=report.ready.environment)  # fmt: skip

    # -- members go --------------------------------------------------------------------------------------------------

    def drain(self, members: Sequence[Member], cause: str) -> None:
        """They leave: now, where they do not train yet; else, or with the last state, when they are let go."""
        for member in members:
            member.leaving = member.leaving or cause
            stays = member.state in (MemberState.ACTIVE, MemberState.RETURNING)
            if not stays and not (member.whole and self.is_last_whole(member)):
                self._retire(member)

    def let_go(self) -> None:
        """No lease is out: retire those who leave, unless one of them holds the last state."""
        keeps_state = any(m.has_state_for_sure and m.leaving is None for m in self._members.values())
        for member in [m for m in self.joined() if m.leaving]:
            if not member.whole or keeps_state:
                self._retire(member)

    def _retire(self, member: Member) -> None:
        del self._members[member.member_id]
        self._saving.abandon(member, "its worker left")
        # Before it has joined, nothing runs there yet that could answer.
        self._do(act.Retire(member.member_id) if member.has_joined else act.KillMember(member.member_id))
        if member.state is not MemberState.PENDING:
            self._emit(EventKind.MEMBER_LEFT, f"{member.member_id} leaves ({member.leaving}): nothing is recomputed.",
                       member_id=member.member_id, cause=member.leaving)  # fmt: skip

    def lose(self, member: Member, cause: str, now: float) -> None:
        """A member is gone, or is treated so for good."""
        preempted = member.leaving == "preemption" or member.node_id in self._draining_nodes
        count = len(self.joined())
        self._emit(EventKind.MEMBER_LOST,
                   f"{member.member_id} is lost ({cause}): {count - member.has_joined} of {count} workers left.",
                   member_id=member.member_id, node_id=member.node_id,
                   cause="preemption" if preempted else cause)  # fmt: skip
        if member.node_id is not None:
            self._lost_lately = [lost for lost in self._lost_lately if now - lost[0] < NODE_LOSS_S]
            self._lost_lately.append((now, member.node_id, member.member_id))
            self._do(act.AskAfterNode(member.node_id))
        self.remove(member, now, crash=not preempted)

    def remove(self, member: Member, now: float, *, crash: bool) -> None:
        """End it for certain. `crash`: it speaks against its node."""
        del self._members[member.member_id]
        self._do(act.KillMember(member.member_id))
        self._saving.abandon(member, "its worker was lost")
        if crash and self._retries.crashed(member.node_id, now):
            self._emit(EventKind.NODE_QUARANTINED,
                       f"Node {member.node_id} lost {self._spec.quarantine_failures} workers within "
                       f"{self._spec.quarantine_window_s:.0f} s: no worker is placed there for now.",
                       node_id=member.node_id, failures=self._spec.quarantine_failures)  # fmt: skip
            self._renew_demands()

    def _renew_demands(self) -> None:
        """Other nodes are to be avoided than when these were made: they are to be made anew."""
        for member in [m for m in self._members.values() if m.state is MemberState.PENDING]:
            del self._members[member.member_id]
            self._do(act.KillMember(member.member_id))

    # -- nodes and sizes ---------------------------------------------------------------------------------------------

    def node_drains(self, node_id: str) -> list[Member]:
        """The node is going away.    Returns: those who have to leave it."""
        self._draining_nodes.add(node_id)
        leaving = [m for m in self._members.values() if m.node_id == node_id]
        self._emit(EventKind.NODE_DRAINING, f"Node {node_id[:8]} is going away with {len(leaving)} of our workers.",
                   node_id=node_id)  # fmt: skip
        return leaving

    def node_lost(self, node_id: str, now: float) -> None:
        """The node is dead. Its workers were told of one by one."""
        gone = [member_id for at, node, member_id in self._lost_lately if node == node_id and now - at < NODE_LOSS_S]
        self._emit(EventKind.NODE_LOST, f"Node {node_id[:8]} is lost: {', '.join(gone) or 'nobody'} went with it.",
                   node_id=node_id, members=gone)  # fmt: skip

    def release_nodes(self, now: float) -> None:
        """Those whose quarantine is over."""
        if self._retries.release(now):
            self._renew_demands()

    def resize(self, low: int, high: int) -> list[Member]:
        """Want as many from now on.    Returns: those who are too many."""
        self.min_workers, self.max_workers = low, high
        self._emit(EventKind.RESIZED, f"The run now wants {low} to {high} workers.", min_workers=low, max_workers=high)
        return sorted((m for m in self._members.values() if m.leaving is None), key=_keep_first)[high:]


def _keep_first(member: Member) -> tuple[bool, bool, int]:
    """Order of keeping when the run shrinks: those with a state, then those who are ready, then the eldest."""
    return not member.whole, not member.has_joined, member.number
