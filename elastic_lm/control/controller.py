"""Control: everything the coordinator decides, as one object without I/O, threads or clock.

`handle(event, now)` returns the actions to take. Any event may come in any state, late, twice or never; whatever comes,
these hold:

- A lease is granted only when every living member of the last one has reported or is gone.
- A whole state is never overwritten under exact sums. The last one is given up on suspicion only when its holder has been
  still for as long as it would take to compute it again from the newest checkpoint, and for `progress_timeout_s`.
- A member that is gone stays gone: a sign of life from it is answered with another kill.
- Every decision is emitted as an event with a sentence that gives its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum
from typing import Any

from elastic_lm.control import actions as act
from elastic_lm.control import events as ev
from elastic_lm.control.balance import Balance
from elastic_lm.control.evaluating import Evaluating
from elastic_lm.control.health import Health
from elastic_lm.control.interruption import START, TAKEOVER, WAIT, Interruption
from elastic_lm.control.leases import Standing, catch_up_lease, common_lease, evaluation_lease, standing
from elastic_lm.control.membership import Member, MemberState
from elastic_lm.control.retries import Retries
from elastic_lm.control.saving import FINAL_TRIES, Saving
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import Event, EventKind
from elastic_lm.protocol import Generation, Lease, LeaseEnd, LeaseReport, Phase, ReadyReport, ReturnReport

MEMBER = "w"  # members are w0, w1, ... in the order in which they were asked for
SCAN_S = 0.1  # between two looks at everybody's deadlines: bounds the cost with a thousand members
WORKING = (Phase.DATA, Phase.COMPUTE, Phase.REDUCE, Phase.OPTIMIZER)
# Of a stop with who waits for tokens; a window that is not read ahead comes within a second or two.
STOP_PATIENCE_S = 5.0
NODE_LOSS_S = 60.0  # a node is known to be dead so long after its workers at the latest
STARTING_UP = -1  # the step under which exceptions of the warm-up are counted


class Mode(StrEnum):
    """What the current generation is doing."""

    IDLE = "idle"  # no lease is out
    LEASED = "leased"
    ENDING = "ending"  # members were asked to vote for the end
    FENCING = "fencing"  # members were told to drop everything


class Control:
    """State and decisions of one attempt of a run. Its first new member is number `first_number`: no two have one id.

    `evaluated`: the steps before which the log says that held-out text was measured.
    """

    def __init__(
        self,
        spec: ControlSpec,
        *,
        resume_step: int | None = None,
        owner_epoch: int = 0,
        first_number: int = 0,
        evaluated: Iterable[int] = (),
    ) -> None:
        self._spec = spec
        self._saving = Saving(spec, resume_step, self._do, self._tell)
        self._evaluating = Evaluating(spec, evaluated, self._emit)
        self._generation = Generation(owner_epoch, 0)
        self._members: dict[str, Member] = {}
        self._num_created = first_number
        self._lease: Lease | None = None
        self._agreed = False  # nobody has left the lease in disagreement
        self._settled: Lease | None = None  # the last one, if all its members came back in agreement
        self._mode = Mode.IDLE
        self._waiting: set[str] = set()  # members of the lease that owe a report
        self._catching_up = False  # the lease is only for those behind
        self._fenced_at = 0.0
        self._health = Health(spec)
        self._retries = Retries(spec)
        self._reference: ReadyReport | None = None
        self._ending_cause = "lease"  # why the lease ends early
        self._errors: dict[tuple[int, str], set[str]] = {}
        self._interruption: Interruption | None = None
        self._join_at: float | None = None
        self._balance = Balance(spec, self._emit)
        self._next_scan = 0.0
        self._stopping: str | None = None  # why the run ends before its last step
        self._stop_kind = "stopped"  # the verdict then
        self._draining_nodes: set[str] = set()
        self._lost_lately: list[tuple[float, str, str]] = []  # (when, node, member): its node may turn out to be dead
        self._verdict: act.Verdict | None = None
        self._actions: list[act.Action] = []

    # -- the outside -------------------------------------------------------------------------------------------------

    def handle(self, event: ev.Input, now: float) -> list[act.Action]:
        """Take in one event; returns what to do. After a verdict nothing more is decided, and little is told."""
        self._actions = []
        if self._verdict is None:
            self._dispatch(event, now)
        elif isinstance(event, ev.Published):  # its manifest was being written when the verdict fell
            self._saving.published(event, now)
        return self._actions

    def next_deadline(self, now: float) -> float:
        """When to call with `Tick` at the latest."""
        return self._next_scan if self._join_at is None else min(self._join_at, self._next_scan)

    def status(self) -> dict[str, Any]:
        """For people and tests: what there is at the moment."""
        members = {
            m.member_id: {"state": str(m.state), "node_id": m.node_id, "pid": m.pid, "leaving": m.leaving}
            for m in self._members.values()
        }
        return {
            "generation": str(self._generation),
            "mode": str(self._mode),
            "world_size": self._world_size(),
            "min_workers": self._spec.min_workers,
            "max_workers": self._spec.max_workers,
            "members": members,
        }

    def paces(self) -> dict[str, tuple[float, int]]:
        """(seconds per micro-batch, micro-batches per step) of every member that trains and has told its speed."""
        if self._mode is not Mode.LEASED or self._lease is None or not self._lease.trains:
            return {}
        members = (
            (self._members.get(m), part) for m, part in zip(self._lease.members, self._lease.assignments, strict=True)
        )
        return {m.member_id: (m.micro_batch_s, len(part)) for m, part in members if m is not None and m.micro_batch_s}

    def _dispatch(self, event: ev.Input, now: float) -> None:
        match event:
            case ev.Tick():
                self._on_tick(now)
            case ev.Beat(heartbeat):
                self._on_beat(heartbeat, now)
            case ev.Reported(report):
                self._on_report(report, now)
            case ev.MemberStarted(member_id, node_id, pid):
                self._on_started(member_id, node_id, pid, now)
            case ev.MemberReady(report):
                self._on_ready(report, now)
            case ev.MemberFound(member_id, node_id, pid):
                self._on_found(member_id, node_id, pid, now)
            case ev.MemberReturned(report):
                self._on_returned(report, now)
            case ev.MemberFailed():
                self._on_failed(event, now)
            case ev.ConnectionLost(member_id):
                if member_id in self._members:
                    self._members[member_id].lost_connection_at = now
                    self._next_scan = min(self._next_scan, now + self._spec.lost_connection_grace_s)
            case ev.ConnectionRestored(member_id):
                if member_id in self._members:
                    self._members[member_id].lost_connection_at = None
            case ev.Saved():
                if self._saving.share_ended(event):
                    self._decide(now)
            case ev.Published():
                if self._saving.published(event, now):
                    self._decide(now)
            case ev.CheckpointFound():
                self._on_found_checkpoint(event, now)
            case ev.NodeDraining(node_id):
                self._on_draining_node(node_id, now)
                if event.hosts_us:
                    self._on_draining_head()
            case ev.NodeLost(node_id):
                self._on_lost_node(node_id, now)
            case ev.DrainRequested(member_id, node_id):
                named = [m for m in self._members.values()
                         if m.member_id == member_id or (node_id is not None and m.node_id == node_id)]  # fmt: skip
                self._drain(named, "drain", now)
            case ev.Resized(low, high):
                self._on_resized(low, high, now)
            case ev.StopRequested(reason):
                self._on_stop(reason, now)
            case ev.Spoiled(verdict, message):
                if self._stopping is None:
                    self._stop_kind = verdict
                    self._on_stop(message, now)
            case ev.SpikeFound(to_step, reason):
                self._finish(act.REWOUND, reason, to_step)
            case ev.ReaderReplaced(reader, replacement, cause):
                self._emit(EventKind.READER_REPLACED, f"Reader {reader} is replaced by {replacement}: {cause}.",
                           reader_id=reader, replacement=replacement, cause=cause)  # fmt: skip
            case ev.CoordinatorSlept(seconds):
                self._fenced_at += seconds
                self._saving.slept(seconds)
                for member in self._members.values():
                    member.slept(seconds)

    # -- members come ------------------------------------------------------------------------------------------------

    def _fill_demand(self, now: float) -> None:
        """One demand per missing worker; while a lease is being given up, the survivors come first.

        A starting process takes a second of CPU: on two cores it made the survivors' running micro-batch three times
        as long, and they must finish that before they can go on.
        """
        if self._mode is Mode.FENCING:
            return
        staying = sum(m.leaving is None for m in self._members.values())
        missing = self._spec.max_workers - staying
        if missing <= 0 or now < self._retries.not_before or self._stopping:
            return
        for _ in range(missing):
            member = Member(f"{MEMBER}{self._num_created}", self._num_created, now)
            self._num_created += 1
            self._members[member.member_id] = member
            self._do(act.StartMember(member.member_id, self._retries.avoided))

    def _on_started(self, member_id: str, node_id: str, pid: int, now: float) -> None:
        member = self._members.get(member_id)
        if member is None:
            self._do(act.KillMember(member_id))
            return
        member.node_id, member.pid = node_id, pid
        if member.state is MemberState.PENDING:
            member.enter(MemberState.STARTING, now)
        self._emit(EventKind.MEMBER_STARTED, f"{member_id} starts (process {pid}).",
                   member_id=member_id, node_id=node_id, pid=pid)  # fmt: skip
        if node_id in self._draining_nodes:
            self._drain([member], "preemption", now)

    def _on_ready(self, report: ReadyReport, now: float) -> None:
        member = self._admitted(report, now)
        if member is None:
            return
        member.node_id, member.pid, member.last_beat = report.node_id, report.pid, now
        member.enter(MemberState.READY, now)
        self._emit(EventKind.MEMBER_READY, f"{member.member_id} is ready after {report.startup_s:.1f} s.",
                   member_id=member.member_id, node_id=report.node_id, startup_s=report.startup_s,
                   environment=report.environment)  # fmt: skip
        self._welcome(now)

    def _on_found(self, member_id: str, node_id: str, pid: int, now: float) -> None:
        """Before the first tick, so that nobody is started in its place and no lease passes its state by."""
        number = number_of(member_id)
        self._num_created = max(self._num_created, number + 1)
        self._members[member_id] = Member(member_id, number, now, MemberState.RETURNING, node_id, pid)
        self._interrupt(TAKEOVER, "another one took over", now)

    def _on_returned(self, returned: ReturnReport, now: float) -> None:
        report = returned.ready
        if returned.whole and report.member_id in self._members:
            self._prefer(report, now)
        member = self._admitted(report, now)
        if member is None:
            return
        member.last_beat, member.micro_batch_s = now, returned.micro_batch_s
        member.whole, member.next_step = returned.whole, returned.next_step
        member.enter(MemberState.READY, now)
        held = f"the state before step {returned.next_step}" if returned.whole else "no state"
        self._emit(EventKind.MEMBER_RETURNED, f"{member.member_id} goes on under this coordinator with {held}.",
                   step=returned.next_step if returned.whole else None, member_id=member.member_id,
                   node_id=member.node_id, pid=member.pid, whole=returned.whole, environment=report.environment)  # fmt: skip
        self._evaluating.inherit(returned.evaluations)
        if returned.whole:
            self._saving.inherit(returned.next_step)
        self._welcome(now)

    def _admitted(self, report: ReadyReport, now: float) -> Member | None:
        """Who is ready for the first time, and computes the run's bits; None when nothing more is to be done."""
        member = self._members.get(report.member_id)
        if member is None:
            self._do(act.KillMember(report.member_id))
        elif not member.has_joined and not self._admits(report):
            self._refuse(member, report, now)
        elif not member.has_joined:
            return member
        return None

    def _welcome(self, now: float) -> None:
        """Somebody is ready: in at once if nobody trains, else with whoever becomes ready within a moment."""
        if self._lease is None:
            self._decide(now)
        elif self._join_at is None:
            self._join_at = now + self._spec.join_batch_s

    def _admits(self, report: ReadyReport) -> bool:
        """The first member's probe is the run's; with fast sums there is no promise to protect."""
        if self._reference is None:
            self._reference = report
        return report.probe == self._reference.probe or not self._spec.exact

    def _prefer(self, holder: ReadyReport, now: float) -> None:
        """The bits of the state in memory are the run's, not those of a newcomer that was ready before its holder was back."""
        first = self._reference
        if first is None or self._admits(holder) or any(m.whole for m in self._members.values()):
            return
        self._reference = holder
        for member in [m for m in self._members.values() if m.has_joined]:
            self._refuse(member, first, now)  # it was admitted because its bits are those of the first

    def _refuse(self, member: Member, report: ReadyReport, now: float) -> None:
        assert self._reference is not None
        expected = self._reference.environment
        differing = {k: (v, expected.get(k)) for k, v in report.environment.items() if v != expected.get(k)}
        told = ", ".join(f"{k}={mine} (the run: {runs})" for k, (mine, runs) in differing.items())
        self._emit(EventKind.MEMBER_REFUSED,
                   f"{member.member_id} computes other bits than the run and is refused: "
                   f"{told or 'no recorded difference in its environment'}.",
                   member_id=member.member_id, environment=report.environment, expected=expected)  # fmt: skip
        self._remove(member, "computes other bits", now, crash=True)

    # -- members go --------------------------------------------------------------------------------------------------

    def _on_failed(self, event: ev.MemberFailed, now: float) -> None:
        member = self._members.get(event.member_id)
        if member is None:
            return
        if not event.proof and self._is_last_whole(member):
            return  # suspicion: it may live; silence or proof will tell
        if event.raised and self._raised_again(STARTING_UP, event.cause, event.member_id):
            self._finish("failed_bug", f"workers cannot start: {event.cause} (twice)", member.next_step)
            return
        self._lose(member, event.cause, now)

    def _lose(self, member: Member, cause: str, now: float) -> None:
        """A member is gone, or is treated so for good."""
        preempted = member.leaving == "preemption" or member.node_id in self._draining_nodes
        left = self._count() - member.has_joined
        self._emit(EventKind.MEMBER_LOST,
                   f"{member.member_id} is lost ({cause}): {left} of {self._count()} workers left.",
                   member_id=member.member_id, node_id=member.node_id,
                   cause="preemption" if preempted else cause)  # fmt: skip
        if member.node_id is not None:
            self._lost_lately = [lost for lost in self._lost_lately if now - lost[0] < NODE_LOSS_S]
            self._lost_lately.append((now, member.node_id, member.member_id))
            self._do(act.AskAfterNode(member.node_id))
        self._remove(member, cause, now, crash=not preempted)

    def _remove(self, member: Member, cause: str, now: float, *, crash: bool) -> None:
        del self._members[member.member_id]
        self._do(act.KillMember(member.member_id))
        self._saving.abandon(member, "its worker was lost")
        if crash and self._retries.crashed(member.node_id, now):
            self._emit(EventKind.NODE_QUARANTINED,
                       f"Node {member.node_id} lost {self._spec.quarantine_failures} workers within "
                       f"{self._spec.quarantine_window_s:.0f} s: no worker is placed there for now.",
                       node_id=member.node_id, failures=self._spec.quarantine_failures)  # fmt: skip
            self._restart_pending()
        if self._lease is not None and member.member_id in self._lease.members:
            self._interrupt("hang" if cause.startswith(("silent", "no progress")) else "failure",
                            f"{member.member_id} {cause}", now)  # fmt: skip
            self._waiting.discard(member.member_id)
            self._fence(now)
        self._fill_demand(now)

    def _fence(self, now: float) -> None:
        """End the lease at once; every living member still reports."""
        assert self._lease is not None
        self._agreed = False
        if self._mode is not Mode.FENCING:
            self._mode = Mode.FENCING
            self._fenced_at = now
            self._do(act.Fence(tuple(sorted(self._waiting)), self._lease.generation))
        if not self._waiting:
            self._close_lease(now)

    def _drain(self, members: list[Member], cause: str, now: float) -> None:
        """Members leave between leases; those that do not train yet leave now."""
        for member in members:
            member.leaving = member.leaving or cause
            stays = member.state in (MemberState.ACTIVE, MemberState.RETURNING)
            if not stays and not (member.whole and self._is_last_whole(member)):
                self._retire(member)
        if self._lease is not None and any(m.leaving for m in self._active()):
            self._end_lease("resize" if cause == "resize" else "drain")
        self._fill_demand(now)
        if self._lease is None:
            self._decide(now)

    def _retire(self, member: Member) -> None:
        del self._members[member.member_id]
        self._saving.abandon(member, "its worker left")
        # Before it has joined, nothing runs there yet that could answer.
        self._do(act.Retire(member.member_id) if member.has_joined else act.KillMember(member.member_id))
        if member.state is not MemberState.PENDING:
            self._emit(EventKind.MEMBER_LEFT, f"{member.member_id} leaves ({member.leaving}): nothing is recomputed.",
                       member_id=member.member_id, cause=member.leaving)  # fmt: skip

    def _on_draining_node(self, node_id: str, now: float) -> None:
        self._draining_nodes.add(node_id)
        leaving = [m for m in self._members.values() if m.node_id == node_id]
        self._emit(EventKind.NODE_DRAINING, f"Node {node_id[:8]} is going away with {len(leaving)} of our workers.",
                   node_id=node_id)  # fmt: skip
        self._drain(leaving, "preemption", now)

    def _on_draining_head(self) -> None:
        """A run does not outlive its head: whoever begins it again begins with the newest checkpoint."""
        self._emit(
            EventKind.NOTE, "The node of the coordinator is going away, and the run with it: a checkpoint is written."
        )
        self._saving.ask()
        self._end_lease("checkpoint")

    def _on_lost_node(self, node_id: str, now: float) -> None:
        gone = [member_id for at, node, member_id in self._lost_lately if node == node_id and now - at < NODE_LOSS_S]
        self._emit(EventKind.NODE_LOST, f"Node {node_id[:8]} is lost: {', '.join(gone) or 'nobody'} went with it.",
                   node_id=node_id, members=gone)  # fmt: skip

    def _on_resized(self, low: int, high: int, now: float) -> None:
        if not 1 <= low <= high:
            self._emit(EventKind.NOTE, f"Ignored a resize to {low}..{high} workers: 1 <= min <= max must hold.")
            return
        self._spec = replace(self._spec, min_workers=low, max_workers=high)
        self._emit(EventKind.RESIZED, f"The run now wants {low} to {high} workers.", min_workers=low, max_workers=high)
        staying = sorted((m for m in self._members.values() if m.leaving is None), key=_keep_first)
        self._drain(staying[high:], "resize", now)

    # -- signs of life -----------------------------------------------------------------------------------------------

    def _on_beat(self, beat: Any, now: float) -> None:
        member = self._members.get(beat.member_id)
        if member is None:
            self._do(act.KillMember(beat.member_id))
            return
        self._health.saw_beat(member, now)
        member.last_beat = now
        member.lost_connection_at = None
        if beat.progress != member.progress or beat.phase is not member.phase:
            member.progress_at = now
        member.progress, member.phase = beat.progress, beat.phase
        member.micro_batch_s = beat.micro_batch_s or member.micro_batch_s
        lease = self._lease
        if lease is None or not lease.trains or beat.generation != lease.generation or beat.phase not in WORKING:
            return
        if member.member_id not in self._waiting:
            return  # its report, which is exact, came first: they travel separately
        member.whole = True  # it trains, so it has a state
        member.next_step = max(beat.next_step, lease.start_step)
        broken = self._interruption
        if broken is not None and lease.generation > broken.generation and not self._catching_up:
            self._resume(broken, member.next_step, now)

    def _resume(self, interruption: Interruption, step: int, now: float) -> None:
        lost_s = now - interruption.since
        why = f"{interruption.cause}: {interruption.detail}" if interruption.detail else interruption.cause
        self._interruption = None
        again = "" if interruption.cause == START else " again"
        self._emit(EventKind.REFORMED,
                   f"Training{again} after {lost_s:.2f} s with {_workers(self._world_size())} ({why}).",
                   step=step, cause=interruption.cause, lost_s=lost_s, world_size=self._world_size())  # fmt: skip

    def _on_tick(self, now: float) -> None:
        if self._join_at is not None and now >= self._join_at:
            self._join_at = None
            if self._lease is not None:
                self._end_lease("join")
        if now < self._next_scan:
            return
        self._next_scan = now + SCAN_S
        self._saving.expire(now)
        if self._retries.release(now):
            self._restart_pending()
        self._fill_demand(now)
        for member in list(self._members.values()):
            verdict = self._ailment(member, now)
            if verdict is not None and member.member_id in self._members:
                self._lose(member, verdict, now)
        self._end_stall(now)
        self._end_wait(now)
        trains = self._mode is Mode.LEASED and self._lease is not None and self._lease.trains
        if trains and self._balance.wants_another(self._lease, self._members, now):
            self._end_lease("straggler")
        if self._lease is None:
            self._decide(now)

    def _ailment(self, member: Member, now: float) -> str | None:
        return self._health.ailment(
            member,
            now,
            owes_report=member.member_id in self._waiting,
            fenced_at=self._fenced_at if self._mode is Mode.FENCING else None,
            worth_s=self._worth_s(member),
        )

    def _worth_s(self, member: Member) -> float:
        """How long a member is waited for on account of what it holds: the last state costs what it took to compute."""
        if not self._is_last_whole(member):
            return 0.0
        if member.last_beat is None or self._saving.restorable_at is None:
            return self._spec.progress_timeout_s
        return max(self._spec.progress_timeout_s, member.last_beat - self._saving.restorable_at)

    def _end_stall(self, now: float) -> None:
        """All live and all wait for each other: nobody's fault that could be told, so they form anew."""
        members = [self._members[m] for m in self._waiting]
        if self._mode not in (Mode.LEASED, Mode.ENDING) or any(m.phase is Phase.DATA for m in members):
            return
        still_s = now - max(max(m.progress_at, m.since) for m in members)
        if still_s > max(self._health.patience_s(m) for m in members):
            self._interrupt("hang", f"nobody made progress for {still_s:.0f} s", now)
            self._fence(now)

    def _end_wait(self, now: float) -> None:
        """Who stops does not wait for tokens that storage does not give: the running step is left undone."""
        members = [self._members[m] for m in self._waiting]
        if self._stopping is None or self._mode is not Mode.ENDING:
            return
        if any(m.phase is Phase.DATA and now - max(m.progress_at, m.since) > STOP_PATIENCE_S for m in members):
            self._fence(now)

    def _is_last_whole(self, member: Member) -> bool:
        """Whether giving this member up would give up the run's state in memory: of the others none has it for sure."""
        return member.may_hold_state and not any(
            m.has_state_for_sure for m in self._members.values() if m is not member
        )

    def _restart_pending(self) -> None:
        """Other nodes are to be avoided than when these demands were made: they are made anew."""
        for member in [m for m in self._members.values() if m.state is MemberState.PENDING]:
            del self._members[member.member_id]
            self._do(act.KillMember(member.member_id))

    # -- leases ------------------------------------------------------------------------------------------------------

    def _on_report(self, report: LeaseReport, now: float) -> None:
        member = self._members.get(report.member_id)
        if member is None:
            self._do(act.KillMember(report.member_id))
            return
        if self._lease is None or report.generation != self._lease.generation:
            return
        member.whole, member.next_step = report.whole, report.next_step
        member.micro_batch_s = report.micro_batch_s or member.micro_batch_s
        member.enter(MemberState.READY, now)
        self._waiting.discard(report.member_id)
        self._agreed &= report.end.agreed
        if self._lease.evaluates and self._evaluating.take_in(report, self._lease.start_step):
            self._fence(now)
            return
        match report.end:
            case LeaseEnd.POISONED | LeaseEnd.DATA_ERROR:
                self._finish(str(report.end), report.error or "", report.error_step or report.next_step)
                return
            case LeaseEnd.UNAVAILABLE:  # nothing is wrong with what was trained, so that is saved
                self._stopping, self._stop_kind = report.error or "", str(report.end)
                self._interrupt("error", f"{report.member_id} waited in vain", now)
                self._fence(now)
                return
            case LeaseEnd.UNRESTORABLE:
                if self._saving.is_beyond_help:
                    self._finish("failed", f"{report.error} (twice)", self._saving.newest_step or 0)
                    return
                self._emit(EventKind.NOTE, f"{report.member_id}: {report.error}.", member_id=report.member_id)
                self._saving.search()
                self._interrupt("error", f"{report.member_id} could not restore the checkpoint", now)
                self._fence(now)
                return
            case LeaseEnd.RAISED:
                if self._raised_again(report.error_step or 0, report.error or "", str(report.generation)):
                    self._finish("failed_bug", f"step {report.error_step}: {report.error} (twice)", report.next_step)
                    return
                self._emit(EventKind.NOTE, f"{report.member_id} raised at step {report.error_step}: {report.error}.",
                           step=report.error_step, member_id=report.member_id)  # fmt: skip
                self._interrupt("error", f"{report.member_id} raised", now)
                self._fence(now)
                return
            case LeaseEnd.BROKEN:
                self._interrupt("failure", f"{report.member_id} lost a peer", now)
                self._fence(now)
                return
        if self._interruption is None:
            self._interrupt("lease", "", now)
        if not self._waiting:
            self._close_lease(now)

    def _on_found_checkpoint(self, found: ev.CheckpointFound, now: float) -> None:
        if found.verdict is not None:
            self._saving.found_nothing_out()
            if any(m.may_hold_state for m in self._members.values()):
                self._emit(EventKind.NOTE, f"No checkpoint is known that can be restored: {found.error}.")
            else:
                self._finish(found.verdict, found.error, self._saving.newest_step or 0)
            return
        for sentence in found.skipped:
            self._emit(EventKind.NOTE, sentence)
        self._saving.found(found.step)
        if self._lease is None:
            self._decide(now)

    def _raised_again(self, step: int, error: str, occasion: str) -> bool:
        """The same exception at the same step on two occasions (generations, or members' starts) is a bug, not a fault."""
        seen = self._errors.setdefault((step, error), set())
        seen.add(occasion)
        return len(seen) >= self._spec.same_error_limit

    def _end_lease(self, cause: str) -> None:
        """Let the running step be the lease's last."""
        if self._mode is not Mode.LEASED:
            return
        assert self._lease is not None
        self._mode = Mode.ENDING
        self._ending_cause = cause
        self._do(act.EndLease(self._lease.generation, tuple(sorted(self._waiting))))

    def _close_lease(self, now: float) -> None:
        assert not self._waiting
        if self._interruption is not None and self._interruption.cause == "lease":
            self._interruption.cause = self._ending_cause
        self._ending_cause = "lease"
        assert self._lease is not None
        if not self._agreed:
            self._settled = None
        elif not self._lease.evaluates:  # whose members keep the group that they had before
            self._settled = self._lease
        self._lease = None
        self._mode = Mode.IDLE
        self._decide(now)

    def _decide(self, now: float) -> None:
        """No lease is out: let go of those who leave, save, and grant the next one."""
        if self._verdict is not None or self._lease is not None or any(m.is_awaited for m in self._members.values()):
            return
        now_standing = self._standing()
        is_last = now_standing.head == self._spec.total_steps
        if self._stopping is not None or (is_last and not self._evaluating.is_due(now_standing.head)):
            self._end_run(now_standing.whole, now_standing.head, now)
            return
        self._let_go()  # and what of a checkpoint goes with them is saved again below
        now_standing = self._standing()
        head = now_standing.head
        if head is not None and not now_standing.behind and self._saving.is_due(head, final=is_last):
            self._saving.begin(now_standing.whole, head, now, final=is_last)
        if now_standing.behind or not self._evaluating.is_due(now_standing.head):
            self._grant(now)
        elif now_standing.lacking:  # they help, and the state has more holders meanwhile
            self._grant(now, trains=False)
        else:
            self._grant_evaluation(now_standing, now)

    def _standing(self) -> Standing:
        return standing([m for m in self._members.values() if m.has_joined], exact=self._spec.exact)

    def _let_go(self) -> None:
        """Retire those who leave, unless one of them holds the last state."""
        keeps_state = any(m.has_state_for_sure and m.leaving is None for m in self._members.values())
        for member in [m for m in self._members.values() if m.leaving and m.has_joined]:
            if not member.whole or keeps_state:
                self._retire(member)

    def _grant(self, now: float, *, trains: bool = True) -> None:
        """The next lease. One that does not train brings its members to the newest state, and ends."""
        members = [m for m in self._members.values() if m.has_joined]
        if any(m.lost_connection_at is not None for m in members):
            return  # within the grace it is dead or back; a lease without it would pass its state by
        current = standing(members, exact=self._spec.exact)
        if not members or (current.head is None and len(members) < self._spec.min_workers):
            if self._interruption is None or not self._interruption.is_wait:
                self._interrupt_for_wait(len(members), now)
            return
        if current.head is None:
            self._evaluating.forget()
            if self._saving.holds_up_restore():
                return
        self._next_generation()
        self._join_at = None  # whoever waited to join is in, or comes in right after those behind
        self._catching_up = bool(current.behind)
        if self._catching_up:
            lease = catch_up_lease(current, self._generation, self._spec)
        else:
            restore = self._saving.newest_step
            trains &= current.head is not None or not self._evaluating.is_due(restore)
            lease = common_lease(members, current, self._generation, self._spec, restore=restore,
                                 settled=self._settled, trains=trains)  # fmt: skip
        self._settled = None
        self._balance.began(now)
        for rank in lease.receivers if lease.source is not None else ():
            self._members[lease.members[rank]].whole = False
        if self._saving.restorable_at is None:
            self._saving.restorable_at = now
        self._begin(lease, now)
        counts = [len(part) for part in lease.assignments]
        self._emit(EventKind.LEASE_GRANTED,
                   f"Generation {self._generation}: {len(counts)} workers "
                   f"{'train from' if lease.trains else 'get the state of'} step {lease.start_step}, "
                   f"micro-batches {counts}.",
                   step=lease.start_step, members=list(lease.members), start_step=lease.start_step,
                   stop_step=lease.stop_step, shares=counts, world_size=len(counts))  # fmt: skip
        if any(m.leaving for m in self._active()) and len(lease.members) > 1:
            self._end_lease("drain")  # the last state travels with this lease; its holder leaves after one step

    def _grant_evaluation(self, current: Standing, now: float) -> None:
        """All measure what is missing. Who is to leave and holds the last state measures on until somebody else comes."""
        assert current.head is not None
        if any(m.lost_connection_at is not None for m in current.whole):
            return  # within the grace it is dead or back
        self._next_generation()
        self._catching_up = False
        if self._interruption is not None and self._interruption.cause == "lease":
            self._interruption.cause = "evaluation"
        missing = self._evaluating.missing(current.head)
        self._begin(evaluation_lease(current, self._generation, missing), now)

    def _next_generation(self) -> None:
        self._generation = Generation(self._generation.owner_epoch, self._generation.number + 1)

    def _begin(self, lease: Lease, now: float) -> None:
        self._lease, self._mode, self._agreed = lease, Mode.LEASED, True
        self._waiting = set(lease.members)
        for member_id in lease.members:
            self._members[member_id].enter(MemberState.ACTIVE, now)
            self._members[member_id].progress_at = now
        self._do(act.Grant(lease))

    def _interrupt(self, cause: str, detail: str, now: float) -> None:
        """Training stands still from now on, if it does not already."""
        if self._interruption is None:
            self._interruption = Interruption(cause, now, detail, self._generation)
        else:
            self._interruption.add(cause, detail, self._generation)

    def _interrupt_for_wait(self, have: int, now: float) -> None:
        since = now if self._interruption is None else self._interruption.since
        wanted = self._spec.min_workers
        cause = START if self._generation.number == 0 else WAIT
        self._interruption = Interruption(cause, since, f"waited for {_workers(wanted)}", self._generation)
        self._emit(EventKind.NOTE, f"Waiting for {_workers(wanted)}; {have} ready.", have=have, wanted=wanted)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _end_run(self, whole: tuple[Member, ...], head: int | None, now: float) -> None:
        """Everything is trained, or the run was told to stop: save once more, then give the verdict."""
        newest_step = self._saving.newest_step
        if self._saving.under_way or (head is None and self._saving.is_searching):
            return  # its end calls us again
        if head is None or head == newest_step or not whole:
            step = head if head is not None else (newest_step or 0)
            if head is None and self._stopping is None:
                return
            if self._stopping is not None and (head != self._spec.total_steps or self._stop_kind in ev.SPOILED):
                self._finish(self._stop_kind, self._stopping, step)
            else:
                self._finish("done", f"trained {step} steps", step)
        elif self._saving.is_hopeless:
            tries = f"{FINAL_TRIES} tries: {self._saving.last_error}"
            unsaved = f"the checkpoint of step {head} could not be written in {tries}"
            if self._stopping is not None and self._stop_kind != "stopped":
                self._finish(self._stop_kind, f"{self._stopping}; and {unsaved}", head)
            else:
                self._finish("failed", unsaved, head)
        else:
            self._saving.begin([m for m in whole if m.next_step == head], head, now, final=True)

    def _on_stop(self, reason: str, now: float) -> None:
        self._stopping = self._stopping or reason
        self._emit(EventKind.NOTE, f"Stopping after the running step: {reason}.")
        if self._lease is None:
            self._decide(now)
        else:
            self._end_lease("stop")

    def _finish(self, kind: str, message: str, step: int) -> None:
        self._saving.end()
        if kind != act.REWOUND:  # of which the next attempt tells
            self._emit(EventKind.RUN_FINISHED, f"Run finished: {kind} ({message}).", step=step, verdict=kind,
                       reason=message)  # fmt: skip
        self._do(act.Finish(act.Verdict(kind, message, step)))
        self._verdict = act.Verdict(kind, message, step)

    # -- small things ------------------------------------------------------------------------------------------------

    def _active(self) -> list[Member]:
        return [m for m in self._members.values() if m.state is MemberState.ACTIVE]

    def _count(self) -> int:
        """Workers that are warmed up."""
        return sum(m.has_joined for m in self._members.values())

    def _world_size(self) -> int:
        return 0 if self._lease is None else len(self._lease.members)

    def _do(self, action: act.Action) -> None:
        if self._verdict is None:
            self._actions.append(action)

    def _emit(self, kind: EventKind, message: str, *, step: int | None = None, **fields: Any) -> None:
        if self._verdict is None:
            self._tell(kind, message, step=step, **fields)

    def _tell(self, kind: EventKind, message: str, *, step: int | None = None, **fields: Any) -> None:
        """Also after the verdict."""
        self._actions.append(act.Emit(Event(kind, message, step, str(self._generation), fields)))


def number_of(member_id: str) -> int:
    return int(member_id.removeprefix(MEMBER))


def _workers(number: int) -> str:
    return f"{number} worker{'s' if number != 1 else ''}"


def _keep_first(member: Member) -> tuple[bool, bool, int]:
    """Order of keeping when the run shrinks: those with a state, then those who are ready, then the eldest."""
    return not member.whole, not member.has_joined, member.number
