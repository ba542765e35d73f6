"""Control: everything the coordinator decides, as one object without I/O, threads or clock.

`handle(event, now)` returns the actions to take. Any event may come in any state, late, twice or never; whatever comes,
these hold:

- A lease is granted only when every living member of the last one has reported or is gone.
- A whole state is never overwritten under exact sums. The last one is given up on suspicion only when its holder has been
  still for as long as it would take to compute it again from the newest checkpoint, and for `progress_timeout_s`.
- A member that is gone stays gone: a sign of life from it is answered with another kill.
- Every decision is emitted as an event with a sentence that gives its numbers.

What is known is kept by nouns: the elastic set, the lease that is out, checkpoints, evaluations, the standstill, the run's end.
None of them decides for another: here is what follows in one from what happened in another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from elastic_lm.control import actions as act
from elastic_lm.control import events as ev
from elastic_lm.control.admission import Admission
from elastic_lm.control.balance import Balance
from elastic_lm.control.current_lease import CurrentLease, Mode
from elastic_lm.control.elastic_set import ElasticSet
from elastic_lm.control.ending import Ending
from elastic_lm.control.evaluating import Evaluating
from elastic_lm.control.health import Health
from elastic_lm.control.interruption import LEASE, REWIND, TAKEOVER, Standstill
from elastic_lm.control.leases import Standing, catch_up_lease, common_lease, evaluation_lease, standing
from elastic_lm.control.membership import Member, MemberState
from elastic_lm.control.saving import FINAL_TRIES, Saving
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import Event, EventKind
from elastic_lm.protocol import Heartbeat, Lease, LeaseEnd, LeaseReport, Phase, ReadyReport, ReturnReport

SCAN_S = 0.1  # between two looks at everybody's deadlines: bounds the cost with a thousand members
WORKING = (Phase.DATA, Phase.COMPUTE, Phase.REDUCE, Phase.OPTIMIZER)
STARTING_UP = -1  # the step under which exceptions of the warm-up are counted


class Control:
    """State and decisions of one attempt of a run. Its first new member is number `first_number`: no two have one id.

    `evaluated`: the steps before which the log says that held-out text was measured. `begins_elsewhere`: the run is a fork, whose
    first state is its parent's: without a checkpoint it is lost with the last member that holds one. `after_rewind`: the attempt
    before has decided that, and left its members.
    """

    def __init__(
        self,
        spec: ControlSpec,
        *,
        resume_step: int | None = None,
        owner_epoch: int = 0,
        first_number: int = 0,
        evaluated: Iterable[int] = (),
        begins_elsewhere: bool = False,
        after_rewind: bool = False,
    ) -> None:
        self._spec = spec
        self._after_rewind = after_rewind
        self._saving = Saving(spec, resume_step, self._do, self._tell, begins_elsewhere=begins_elsewhere)
        self._evaluating = Evaluating(spec, evaluated, self._emit)
        self._current = CurrentLease(owner_epoch, self._do)
        self._members = ElasticSet(spec, first_number, self._saving, self._do, self._emit)
        self._admission = Admission(spec, self._emit)
        self._health = Health(spec)
        self._errors: dict[tuple[int, str], set[str]] = {}
        self._standstill = Standstill(self._emit)
        self._join_at: float | None = None
        self._balance = Balance(spec, self._emit)
        self._next_scan = 0.0
        self._ending = Ending(spec.total_steps)
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
            "generation": str(self._current.generation),
            "mode": str(self._current.mode),
            "world_size": self._current.world_size,
            "min_workers": self._members.min_workers,
            "max_workers": self._members.max_workers,
            "members": members,
        }

    def paces(self) -> dict[str, tuple[float, int]]:
        """(seconds per micro-batch, micro-batches per step) of every member that trains and has told its speed."""
        lease = self._current.lease
        if lease is None or not self._current.trains:
            return {}
        members = ((self._members.get(m), part) for m, part in zip(lease.members, lease.assignments, strict=True))
        return {m.member_id: (m.micro_batch_s, len(part)) for m, part in members if m is not None and m.micro_batch_s}

    def heeds(self, report: LeaseReport) -> bool:
        """Whether it is of a member, and of the lease that is out; any other changes nothing."""
        lease = self._current.lease
        return report.member_id in self._members and lease is not None and report.generation == lease.generation

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
                # Before the first tick, so that nobody is started in its place and no lease passes its state by.
                self._members.found(member_id, node_id, pid, now, begins_anew=self._after_rewind)
                if self._after_rewind:
                    self._interrupt(REWIND, "the run goes back", now)
                else:
                    self._interrupt(TAKEOVER, "another one took over", now)
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
                self._drain(self._members.node_drains(node_id), "preemption", now)
                if event.hosts_us:
                    self._on_draining_head()
            case ev.NodeLost(node_id):
                self._members.node_lost(node_id, now)
            case ev.DrainRequested(member_id, node_id):
                named = [m for m in self._members.values()
                         if m.member_id == member_id or (node_id is not None and m.node_id == node_id)]  # fmt: skip
                self._drain(named, "drain", now)
            case ev.Resized(low, high):
                self._on_resized(low, high, now)
            case ev.StopRequested(reason):
                self._on_stop(reason, now)
            case ev.Spoiled(verdict, message):
                if not self._ending.is_wanted:
                    self._ending.fail(verdict, message)
                    self._on_stop(message, now)
            case ev.SpikeFound(to_step, reason):
                if self._current.is_out:  # what it trains is given up
                    self._current.fence(now)
                self._finish(act.Verdict(act.REWOUND, reason, to_step))
            case ev.ReaderReplaced(reader, replacement, cause):
                self._emit(EventKind.READER_REPLACED, f"Reader {reader} is replaced by {replacement}: {cause}.",
                           reader_id=reader, replacement=replacement, cause=cause)  # fmt: skip
            case ev.CoordinatorSlept(seconds):
                self._current.slept(seconds)
                self._saving.slept(seconds)
                for member in self._members.values():
                    member.slept(seconds)

    # -- members come ------------------------------------------------------------------------------------------------

    def _fill_demand(self, now: float) -> None:
        """One demand per missing worker; while a lease is being given up, the survivors come first.

        A starting process takes a second of CPU: on two cores it made the survivors' running micro-batch three times
        as long, and they must finish that before they can go on.
        """
        if self._current.mode is not Mode.FENCING and not self._ending.reason:
            self._members.ask_for_missing(now)

    def _on_started(self, member_id: str, node_id: str, pid: int, now: float) -> None:
        member = self._members.heard_from(member_id)
        if member is not None and self._members.started(member, node_id, pid, now):
            self._drain([member], "preemption", now)

    def _on_ready(self, report: ReadyReport, now: float) -> None:
        member = self._admitted(report, now)
        if member is not None:
            self._members.ready(member, report, now)
            self._welcome(now)

    def _on_returned(self, report: ReturnReport, now: float) -> None:
        if report.whole and report.ready.member_id in self._members:
            self._prefer(report.ready, now)
        member = self._admitted(report.ready, now)
        if member is None:
            return
        self._members.returned(member, report, now)
        self._evaluating.inherit(report.evaluations)
        if report.whole:
            self._saving.inherit(report.next_step)
        self._welcome(now)

    def _admitted(self, report: ReadyReport, now: float) -> Member | None:
        """Who is ready for the first time, and computes the run's bits; None when nothing more is to be done."""
        member = self._members.heard_from(report.member_id)
        if member is None or member.has_joined:
            return None
        if not self._admission.admits(report):
            self._refuse(member, report, now)
            return None
        return member

    def _welcome(self, now: float) -> None:
        """Somebody is ready: in at once if nobody trains, else with whoever becomes ready within a moment."""
        if not self._current.is_out:
            self._decide(now)
        elif self._join_at is None:
            self._join_at = now + self._spec.join_batch_s

    def _prefer(self, holder: ReadyReport, now: float) -> None:
        """The first whole state that comes back is the run's: whoever was admitted with other bits is not."""
        if any(m.whole for m in self._members.values()):
            return
        newcomer = self._admission.prefer(holder)
        if newcomer is not None:
            for member in self._members.joined():
                self._refuse(member, newcomer, now)

    def _refuse(self, member: Member, report: ReadyReport, now: float) -> None:
        self._admission.refuse(member.member_id, report)
        self._members.remove(member, now, crash=True)
        self._do_without(member, "computes other bits", now)

    # -- members go --------------------------------------------------------------------------------------------------

    def _on_failed(self, event: ev.MemberFailed, now: float) -> None:
        member = self._members.get(event.member_id)
        if member is None:
            return
        if not event.proof and self._members.is_last_whole(member):
            return  # suspicion: it may live; silence or proof will tell
        if event.raised and self._raised_again(STARTING_UP, event.cause, event.member_id):
            self._finish(act.Verdict("failed_bug", f"workers cannot start: {event.cause} (twice)", member.next_step))
        else:
            self._lose(member, event.cause, now)

    def _lose(self, member: Member, cause: str, now: float) -> None:
        self._members.lose(member, cause, now)
        self._do_without(member, cause, now)

    def _do_without(self, member: Member, cause: str, now: float) -> None:
        """It was removed: its lease ends at once, and somebody takes its place."""
        if self._current.includes(member.member_id):
            self._current.left(member.member_id)
            kind = "hang" if cause.startswith(("silent", "no progress")) else "failure"
            self._break_off(kind, f"{member.member_id} {cause}", now)
        self._fill_demand(now)

    def _drain(self, members: list[Member], cause: str, now: float) -> None:
        """Members leave between leases; those that do not train yet leave now."""
        self._members.drain(members, cause)
        if self._current.is_out and any(m.leaving for m in self._active()):
            self._current.end_after_step("resize" if cause == "resize" else "drain")
        self._fill_demand(now)
        if not self._current.is_out:
            self._decide(now)

    def _on_draining_head(self) -> None:
        """A run does not outlive its head: whoever begins it again begins with the newest checkpoint."""
        self._emit(
            EventKind.NOTE, "The node of the coordinator is going away, and the run with it: a checkpoint is written."
        )
        self._saving.ask()
        self._current.end_after_step("checkpoint")

    def _on_resized(self, low: int, high: int, now: float) -> None:
        if not 1 <= low <= high:
            self._emit(EventKind.NOTE, f"Ignored a resize to {low}..{high} workers: 1 <= min <= max must hold.")
            return
        self._drain(self._members.resize(low, high), "resize", now)

    # -- signs of life -----------------------------------------------------------------------------------------------

    def _on_beat(self, beat: Heartbeat, now: float) -> None:
        member = self._members.heard_from(beat.member_id)
        if member is None:
            return
        self._health.saw_beat(member, now)
        member.heard(beat, now)
        lease = self._current.lease
        if lease is None or not lease.trains or beat.generation != lease.generation or beat.phase not in WORKING:
            return
        if member.member_id not in self._current.owing:
            return  # its report, which is exact, came first: they travel separately
        member.whole = True  # it trains, so it has a state
        member.next_step = max(beat.next_step, lease.start_step)
        if self._current.is_for_all:
            self._standstill.end(lease, member.next_step, now)

    def _on_tick(self, now: float) -> None:
        if self._join_at is not None and now >= self._join_at:
            self._join_at = None
            self._current.end_after_step("join")
        if now < self._next_scan:
            return
        self._next_scan = now + SCAN_S
        self._saving.expire(now)
        self._members.release_nodes(now)
        self._fill_demand(now)
        for member in list(self._members.values()):
            verdict = self._ailment(member, now)
            if verdict is not None and member.member_id in self._members:
                self._lose(member, verdict, now)
        self._end_stall(now)
        self._end_wait(now)
        if self._current.trains and self._balance.wants_another(self._current.lease, self._members, now):
            self._current.end_after_step("straggler")
        if not self._current.is_out:
            self._decide(now)

    def _ailment(self, member: Member, now: float) -> str | None:
        return self._health.ailment(
            member,
            now,
            owes_report=member.member_id in self._current.owing,
            fenced_at=self._current.fenced_at,
            worth_s=self._worth_s(member),
        )

    def _worth_s(self, member: Member) -> float:
        """How long a member is waited for on account of what it holds: the last state costs what it took to compute."""
        if not self._members.is_last_whole(member):
            return 0.0
        if member.last_beat is None or self._saving.restorable_at is None:
            return self._spec.progress_timeout_s
        return max(self._spec.progress_timeout_s, member.last_beat - self._saving.restorable_at)

    def _end_stall(self, now: float) -> None:
        """All live and all wait for each other: nobody's fault that could be told, so they form anew."""
        if self._current.mode not in (Mode.LEASED, Mode.ENDING):
            return
        still_s = self._health.stalled_s(self._owing(), now)
        if still_s is not None:
            self._break_off("hang", f"nobody made progress for {still_s:.0f} s", now)

    def _end_wait(self, now: float) -> None:
        """Who stops does not wait for tokens that storage does not give: the running step is left undone."""
        if (
            self._ending.is_wanted
            and self._current.mode is Mode.ENDING
            and self._health.lack_tokens(self._owing(), now)
        ):
            self._fence(now)

    def _owing(self) -> list[Member]:
        return [self._members[m] for m in self._current.owing]

    # -- leases ------------------------------------------------------------------------------------------------------

    def _on_report(self, report: LeaseReport, now: float) -> None:
        member = self._members.heard_from(report.member_id)
        if member is None:
            return
        lease = self._current.lease
        if lease is None or report.generation != lease.generation:
            return
        member.reported(report, now)
        self._current.reported(report.member_id, report.end)
        if lease.evaluates and self._evaluating.take_in(report, lease.start_step):
            self._fence(now)
            return
        match report.end:
            case LeaseEnd.COMPLETED | LeaseEnd.ENDED_EARLY | LeaseEnd.FENCED:
                if not self._standstill.lasts:
                    self._interrupt(LEASE, "", now)
                if self._current.is_over:
                    self._close_lease(now)
            case LeaseEnd.POISONED | LeaseEnd.DATA_ERROR:
                self._finish(act.Verdict(str(report.end), report.error or "", report.error_step or report.next_step))
            case LeaseEnd.UNAVAILABLE:  # nothing is wrong with what was trained, so that is saved
                self._ending.fail(str(report.end), report.error or "")
                self._break_off("error", f"{report.member_id} waited in vain", now)
            case LeaseEnd.UNRESTORABLE:
                self._on_unrestorable(report, now)
            case LeaseEnd.RAISED:
                self._on_raised(report, now)
            case LeaseEnd.BROKEN:
                self._break_off("failure", f"{report.member_id} lost a peer", now)

    def _on_unrestorable(self, report: LeaseReport, now: float) -> None:
        """A checkpoint that cannot be restored is not tried again, unless it was read whole."""
        if self._saving.is_beyond_help:
            self._finish(act.Verdict("failed", f"{report.error} (twice)", self._saving.newest_step or 0))
            return
        self._emit(EventKind.NOTE, f"{report.member_id}: {report.error}.", member_id=report.member_id)
        self._saving.search()
        self._break_off("error", f"{report.member_id} could not restore the checkpoint", now)

    def _on_raised(self, report: LeaseReport, now: float) -> None:
        if self._raised_again(report.error_step or 0, report.error or "", str(report.generation)):
            told = f"step {report.error_step}: {report.error} (twice)"
            self._finish(act.Verdict("failed_bug", told, report.next_step))
            return
        self._emit(EventKind.NOTE, f"{report.member_id} raised at step {report.error_step}: {report.error}.",
                   step=report.error_step, member_id=report.member_id)  # fmt: skip
        self._break_off("error", f"{report.member_id} raised", now)

    def _on_found_checkpoint(self, found: ev.CheckpointFound, now: float) -> None:
        if found.verdict is not None:
            self._saving.found_nothing_out()
            if any(m.may_hold_state for m in self._members.values()):
                self._emit(EventKind.NOTE, f"No checkpoint is known that can be restored: {found.error}.")
            else:
                self._finish(act.Verdict(found.verdict, found.error, self._saving.newest_step or 0))
            return
        for sentence in found.skipped:
            self._emit(EventKind.NOTE, sentence)
        self._saving.found(found.step)
        if not self._current.is_out:
            self._decide(now)

    def _raised_again(self, step: int, error: str, occasion: str) -> bool:
        """The same exception at the same step on two occasions (generations, or members' starts) is a bug, not a fault."""
        seen = self._errors.setdefault((step, error), set())
        seen.add(occasion)
        return len(seen) >= self._spec.same_error_limit

    def _interrupt(self, cause: str, detail: str, now: float) -> None:
        self._standstill.begin(cause, detail, self._current.generation, now)

    def _break_off(self, cause: str, detail: str, now: float) -> None:
        """Something went wrong: the lease ends at once."""
        self._interrupt(cause, detail, now)
        self._fence(now)

    def _fence(self, now: float) -> None:
        """End the lease at once; every living member still reports."""
        self._current.fence(now)
        if self._current.is_over:
            self._close_lease(now)

    def _close_lease(self, now: float) -> None:
        self._standstill.attribute_to(self._current.close())
        self._decide(now)

    def _decide(self, now: float) -> None:
        """No lease is out: let go of those who leave, save, and grant the next one."""
        if self._verdict is not None or self._current.is_out or any(m.is_awaited for m in self._members.values()):
            return
        now_standing = self._standing()
        is_last = now_standing.head == self._spec.total_steps
        if self._ending.is_wanted or (is_last and not self._evaluating.is_due(now_standing.head)):
            self._end_run(now_standing.whole, now_standing.head, now)
            return
        self._members.let_go()  # and what of a checkpoint goes with them is saved again below
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
        return standing(self._members.joined(), exact=self._spec.exact)

    def _grant(self, now: float, *, trains: bool = True) -> None:
        """The next lease. One that does not train brings its members to the newest state, and ends."""
        members = self._members.joined()
        if any(m.lost_connection_at is not None for m in members):
            return  # within the grace it is dead or back; a lease without it would pass its state by
        current = standing(members, exact=self._spec.exact)
        if not members or (current.head is None and len(members) < self._members.min_workers):
            self._standstill.wait(len(members), self._members.min_workers, self._current.generation, now)
            return
        if current.head is None:
            self._evaluating.forget()
            if self._saving.holds_up_restore():
                return
        generation = self._current.next_generation()
        self._join_at = None  # whoever waited to join is in, or comes in right after those behind
        if current.behind:
            lease = catch_up_lease(current, generation, self._spec)
        else:
            restore = self._saving.newest_step
            trains &= current.head is not None or not self._evaluating.is_due(restore)
            lease = common_lease(members, current, generation, self._spec, restore=restore,
                                 settled=self._current.settled, trains=trains)  # fmt: skip
        self._balance.began(now)
        if lease.source is not None:
            self._standstill.attribute_to("join")  # of whoever lacks the state, if nothing else tells why
            for rank in lease.receivers:
                self._members[lease.members[rank]].whole = False
        if self._saving.restorable_at is None:
            self._saving.restorable_at = now
        self._begin(lease, now, is_for_all=not current.behind)
        counts = [len(part) for part in lease.assignments]
        self._emit(EventKind.LEASE_GRANTED,
                   f"Generation {generation}: {len(counts)} workers "
                   f"{'train from' if lease.trains else 'get the state of'} step {lease.start_step}, "
                   f"micro-batches {counts}.",
                   step=lease.start_step, members=list(lease.members), start_step=lease.start_step,
                   stop_step=lease.stop_step, shares=counts, world_size=len(counts))  # fmt: skip
        if any(m.leaving for m in self._active()) and len(lease.members) > 1:
            # The last state travels with this lease; its holder leaves after one step.
            self._current.end_after_step("drain")

    def _grant_evaluation(self, current: Standing, now: float) -> None:
        """All measure what is missing. Who is to leave and holds the last state measures on until somebody else comes."""
        assert current.head is not None
        if any(m.lost_connection_at is not None for m in current.whole):
            return  # within the grace it is dead or back
        self._standstill.attribute_to("evaluation")
        missing = self._evaluating.missing(current.head)
        self._begin(evaluation_lease(current, self._current.next_generation(), missing), now)

    def _begin(self, lease: Lease, now: float, *, is_for_all: bool = True) -> None:
        for member_id in lease.members:
            self._members[member_id].begin(now)
        self._current.begin(lease, is_for_all=is_for_all)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _end_run(self, whole: tuple[Member, ...], head: int | None, now: float) -> None:
        """Everything is trained, or the run was told to stop: save once more, then give the verdict."""
        newest_step = self._saving.newest_step
        if self._saving.under_way or (head is None and self._saving.is_searching):
            return  # its end calls us again
        if head is None or head == newest_step or not whole:
            if head is not None or self._ending.is_wanted:
                lacks_evaluation = self._evaluating.is_due(head)
                self._finish(self._ending.verdict(head, newest_step, lacks_evaluation=lacks_evaluation))
        elif self._saving.is_hopeless:
            self._finish(self._ending.verdict_unsaved(head, f"{FINAL_TRIES} tries: {self._saving.last_error}"))
        else:
            self._saving.begin([m for m in whole if m.next_step == head], head, now, final=True)

    def _on_stop(self, reason: str, now: float) -> None:
        self._ending.stop(reason)
        self._emit(EventKind.NOTE, f"Stopping after the running step: {reason}.")
        if not self._current.is_out:
            self._decide(now)
        else:
            self._current.end_after_step("stop")

    def _finish(self, verdict: act.Verdict) -> None:
        self._saving.end()
        if verdict.kind != act.REWOUND:  # of which the next attempt tells
            self._do(act.Emit(verdict.event(str(self._current.generation))))
        self._do(act.Finish(verdict))
        self._verdict = verdict

    # -- small things ------------------------------------------------------------------------------------------------

    def _active(self) -> list[Member]:
        return [m for m in self._members.values() if m.state is MemberState.ACTIVE]

    def _do(self, action: act.Action) -> None:
        if self._verdict is None:
            self._actions.append(action)

    def _emit(self, kind: EventKind, message: str, *, step: int | None = None, **fields: Any) -> None:
        if self._verdict is None:
            self._tell(kind, message, step=step, **fields)

    def _tell(self, kind: EventKind, message: str, *, step: int | None = None, **fields: Any) -> None:
        """Also after the verdict."""
        self._actions.append(act.Emit(Event(kind, message, step, str(self._current.generation), fields)))
