"""What `Control` decides, one decision at a time: events in, actions out, a clock that the test moves."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from elastic_lm.control import actions as act
from elastic_lm.control import events as ev
from elastic_lm.control.controller import SCAN_S, Control
from elastic_lm.control.elastic_set import NODE_LOSS_S
from elastic_lm.control.health import RETURN_S, SETTLING_S, STOP_PATIENCE_S
from elastic_lm.control.saving import FINAL_TRIES
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import Event, EventKind
from elastic_lm.protocol import (
    Generation,
    Heartbeat,
    Lease,
    LeaseEnd,
    LeaseReport,
    Measure,
    Phase,
    ReadyReport,
    ReturnReport,
)

A = TypeVar("A")


def scans(seconds: float) -> int:
    """How many times control looks at everybody's deadlines in so long a time."""
    return round(seconds / SCAN_S)


class Run:
    """A `Control` and somebody who talks to it."""

    def __init__(
        self,
        *,
        resume_step: int | None = None,
        owner_epoch: int = 0,
        ticks: bool = True,
        begins_elsewhere: bool = False,
        after_rewind: bool = False,
        **fields: Any,
    ) -> None:
        usual = {"min_workers": 1, "max_workers": 3, "num_micro_batches": 8, "total_steps": 100}
        self.spec = ControlSpec(**{**usual, **fields})
        self.control = Control(
            self.spec,
            resume_step=resume_step,
            owner_epoch=owner_epoch,
            begins_elsewhere=begins_elsewhere,
            after_rewind=after_rewind,
        )
        self.now = 1_000.0
        self.said: list[act.Action] = []  # everything since `listen`
        if ticks:
            self.tick()

    def listen(self) -> Run:
        """Forget what was said so far."""
        self.said = []
        return self

    def tell(self, event: ev.Input) -> list[act.Action]:
        actions = self.control.handle(event, self.now)
        self.said += actions
        for action in actions:
            if isinstance(action, act.Grant):
                self.lease: Lease = action.lease
            if isinstance(action, act.SaveCheckpoint):
                self.save = action
        return actions

    def tick(self) -> list[act.Action]:
        return self.tell(ev.Tick())

    def wait(self, seconds: float, *, beating: str = "", phase: Phase = Phase.COMPUTE) -> list[act.Action]:
        """Time passes; those who beat make progress in `phase`."""
        before, end = len(self.said), self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + SCAN_S)
            for member_id in beating.split():
                self.beat(member_id, phase)
            self.tick()
        return self.said[before:]

    # -- what members say --------------------------------------------------------------------------------------------

    def start(self, member_id: str, node_id: str | None = None) -> list[act.Action]:
        return self.tell(ev.MemberStarted(member_id, node_id or f"node-of-{member_id}", 7))

    def ready(self, member_id: str, node_id: str | None = None, *, probe: str = "p", **environment: str) -> None:
        self.start(member_id, node_id)
        node = node_id or f"node-of-{member_id}"
        self.tell(ev.MemberReady(ReadyReport(member_id, node, 7, probe, environment, startup_s=1.0)))

    def beat(
        self, member_id: str, phase: Phase = Phase.COMPUTE, step: int = 0, *, progress: int | None = None,
        generation: Generation | None = None, micro_batch_s: float | None = None,
    ) -> list[act.Action]:  # fmt: skip
        if generation is None and hasattr(self, "lease"):
            generation = self.lease.generation
        count = round(self.now * 1_000) if progress is None else progress
        return self.tell(ev.Beat(Heartbeat(member_id, generation, phase, step, count, micro_batch_s)))

    def report(
        self, member_id: str, step: int, end: LeaseEnd = LeaseEnd.COMPLETED, *, whole: bool = True,
        generation: Generation | None = None, error: str | None = None, error_step: int | None = None,
    ) -> list[act.Action]:  # fmt: skip
        generation = generation or self.lease.generation
        report = LeaseReport(member_id, generation, end, step, whole, error=error, error_step=error_step)
        return self.tell(ev.Reported(report))

    def saved(self, *, error: str | None = None) -> None:
        """The newest checkpoint is stored, every share and its manifest; or the first share is not."""
        if error is not None:
            self.tell(ev.Saved(self.save.number, self.save.member_ids[0], ok=False, error=error))
            return
        for member_id in self.save.member_ids:
            self.tell(ev.Saved(self.save.number, member_id, ok=True))
        self.tell(ev.Published(self.save.number, ok=True))

    def dies(self, member_id: str, cause: str = "process died") -> list[act.Action]:
        return self.tell(ev.MemberFailed(member_id, cause, proof=True))

    # -- whole scenes ------------------------------------------------------------------------------------------------

    def training(self, *member_ids: str, step: int = 0) -> Run:
        """These members are whole and work in one lease from `step`; the rest is pending."""
        for member_id in member_ids:
            self.ready(member_id)
        if self.lease.members != member_ids:
            self.wait(self.spec.join_batch_s, beating=self.lease.members[0])
            self.report(self.lease.members[0], step, LeaseEnd.ENDED_EARLY)
        elif step:
            self.report(self.lease.members[0], step)
        assert (self.lease.members, self.lease.start_step) == (member_ids, step)
        for member_id in member_ids:
            self.beat(member_id, step=step)
        return self.listen()

    # -- what was said -----------------------------------------------------------------------------------------------

    def all(self, kind: type[A]) -> list[A]:
        return [action for action in self.said if isinstance(action, kind)]

    def one(self, kind: type[A]) -> A:
        (action,) = self.all(kind)
        return action

    def events(self, kind: EventKind) -> list[Event]:
        return [e.event for e in self.all(act.Emit) if e.event.kind is kind]

    @property
    def members(self) -> dict[str, dict[str, Any]]:
        return self.control.status()["members"]

    @property
    def granted(self) -> bool:
        return bool(self.all(act.Grant))


def killed(run: Run) -> list[str]:
    """Those who were killed, each once, in the order of the first kill."""
    return list(dict.fromkeys(action.member_id for action in run.all(act.KillMember)))


def started(run: Run) -> list[str]:
    return [action.member_id for action in run.all(act.StartMember)]


# -- the start ---------------------------------------------------------------------------------------------------------


def test_start_asks_for_every_worker_that_the_run_wants() -> None:
    run = Run(max_workers=3)
    assert run.all(act.StartMember) == [act.StartMember("w0"), act.StartMember("w1"), act.StartMember("w2")]


def test_first_lease_comes_with_the_last_of_min_workers() -> None:
    run = Run(min_workers=2)
    run.ready("w2")
    assert not run.granted
    run.ready("w0")
    assert run.lease.members == ("w0", "w2")
    assert (run.lease.start_step, run.lease.stop_step, run.lease.restore) == (0, 100, None)
    assert run.lease.generation == Generation(0, 1)


def test_run_that_waits_for_workers_says_so_once() -> None:
    run = Run(min_workers=2)
    run.ready("w0")
    run.wait(5.0, beating="w0", phase=Phase.WAITING)
    assert [e.fields["have"] for e in run.events(EventKind.NOTE)] == [0]


def test_first_lease_restores_the_checkpoint_that_the_run_resumes_from() -> None:
    run = Run(resume_step=40, owner_epoch=3)
    run.ready("w0")
    assert (run.lease.start_step, run.lease.restore, run.lease.source) == (40, 40, None)
    assert run.lease.generation == Generation(3, 1)


def test_run_resumed_at_its_end_is_done_without_a_step() -> None:
    run = Run(resume_step=100)
    run.ready("w0")
    assert (run.lease.start_step, run.lease.stop_step) == (100, 100)
    run.report("w0", 100)
    assert run.one(act.Finish).verdict == act.Verdict("done", "trained 100 steps", 100)
    assert run.all(act.SaveCheckpoint) == []


def test_worker_that_is_never_ready_is_given_up_after_the_start_timeout() -> None:
    run = Run(start_timeout_s=10.0)
    run.start("w0")
    run.wait(9.9)
    assert killed(run) == []
    run.wait(0.2)
    assert killed(run) == ["w0"]
    assert started(run)[-1] == "w3"


def test_pending_worker_may_wait_for_ever() -> None:
    run = Run(start_timeout_s=10.0)
    run.wait(1_000.0)
    assert killed(run) == []


# -- growing -----------------------------------------------------------------------------------------------------------


def test_joiners_close_together_enter_together() -> None:
    run = Run().training("w0")
    run.ready("w1")
    run.wait(0.05, beating="w0")
    run.ready("w2")
    assert run.all(act.EndLease) == []
    run.wait(0.06, beating="w0")
    assert run.one(act.EndLease) == act.EndLease(run.lease.generation, ("w0",))
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    assert run.lease.members == ("w0", "w1", "w2")
    assert (run.lease.start_step, run.lease.source, run.lease.receivers) == (5, 0, (1, 2))


def test_joiner_moves_the_next_deadline_nearer() -> None:
    run = Run(join_batch_s=0.03).training("w0")
    run.wait(SCAN_S, beating="w0")
    assert run.control.next_deadline(run.now) == pytest.approx(run.now + SCAN_S)
    run.ready("w1")
    assert run.control.next_deadline(run.now) == pytest.approx(run.now + 0.03)


def test_lease_is_asked_to_end_once_for_several_reasons() -> None:
    run = Run().training("w0", "w1")
    run.tell(ev.DrainRequested(member_id="w1"))
    run.ready("w2")
    run.wait(0.5, beating="w0 w1")
    run.tell(ev.StopRequested("ctrl-c"))
    assert len(run.all(act.EndLease)) == 1


def test_joiner_that_enters_with_a_reform_ends_no_lease_of_its_own() -> None:
    run = Run().training("w0", "w1")
    run.ready("w2")
    run.dies("w1")
    run.report("w0", 3, LeaseEnd.FENCED)
    assert run.lease.members == ("w0", "w2")
    run.wait(0.5, beating="w0 w2")
    assert run.all(act.EndLease) == []


def test_reform_for_a_joiner_is_told_when_work_begins() -> None:
    run = Run().training("w0")
    run.ready("w1")
    run.wait(0.2, beating="w0")
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    run.now += 0.25
    run.beat("w1", Phase.COPYING)
    assert run.events(EventKind.REFORMED) == []
    run.beat("w0", Phase.COMPUTE, 5)
    (event,) = run.events(EventKind.REFORMED)
    assert (event.fields["cause"], event.fields["world_size"], event.step) == ("join", 2, 5)
    assert event.fields["lost_s"] == pytest.approx(0.25)


# -- the same members go on --------------------------------------------------------------------------------------------


def test_lease_that_all_complete_is_continued_in_its_group() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1")
    first = run.lease.generation
    run.report("w0", 10)
    run.report("w1", 10)
    assert run.lease.continues == first
    second = run.lease.generation
    run.report("w0", 20)
    run.report("w1", 20)
    assert (run.lease.continues, run.lease.generation > second > first) == (second, True)


def test_lease_that_a_vote_ended_is_continued_in_its_group() -> None:
    run = Run(max_workers=3).training("w0", "w1")
    first = run.lease.generation
    run.tell(ev.DrainRequested(member_id="w2"))  # it only starts
    run.ready("w3")
    run.wait(run.spec.join_batch_s, beating="w0 w1")
    run.dies("w3")
    run.report("w0", 4, LeaseEnd.ENDED_EARLY)
    run.report("w1", 4, LeaseEnd.ENDED_EARLY)
    assert run.lease.continues == first


@pytest.mark.parametrize("end", [LeaseEnd.FENCED, LeaseEnd.BROKEN, LeaseEnd.RAISED])
def test_lease_that_one_left_in_disagreement_is_not_continued(end: LeaseEnd) -> None:
    run = Run(checkpoint_every=10).training("w0", "w1")
    run.report("w0", 10)
    run.report("w1", 10, end, error="x", error_step=9)
    assert run.lease.members == ("w0", "w1")
    assert run.lease.continues is None


def test_others_than_before_do_not_continue() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1", "w2")
    for member_id in ("w0", "w1", "w2"):
        run.report(member_id, 10)
    run.dies("w2")
    run.report("w0", 10, LeaseEnd.FENCED)
    run.report("w1", 10, LeaseEnd.FENCED)
    assert run.lease.members == ("w0", "w1")
    assert run.lease.continues is None


# -- failures ----------------------------------------------------------------------------------------------------------


def test_death_fences_the_survivors_and_waits_for_each_of_them() -> None:
    run = Run().training("w0", "w1", "w2")
    run.dies("w1")
    assert run.one(act.Fence) == act.Fence(("w0", "w2"), run.lease.generation)
    run.report("w0", 7, LeaseEnd.FENCED)
    run.wait(0.5, beating="w0 w2")
    assert not run.granted
    run.report("w2", 7, LeaseEnd.BROKEN)
    assert (run.lease.members, run.lease.start_step) == (("w0", "w2"), 7)
    assert (run.lease.source, run.lease.receivers) == (None, ())
    assert len(run.all(act.Fence)) == 1


def test_member_that_lost_a_peer_ends_the_lease_for_all() -> None:
    run = Run().training("w0", "w1", "w2")
    run.report("w1", 7, LeaseEnd.BROKEN)
    assert run.one(act.Fence) == act.Fence(("w0", "w2"), run.lease.generation)
    run.report("w0", 7, LeaseEnd.FENCED)
    run.report("w2", 7, LeaseEnd.FENCED)
    assert (run.lease.members, run.lease.start_step) == (("w0", "w1", "w2"), 7)
    assert killed(run) == []


def test_survivors_come_before_the_replacement() -> None:
    run = Run().training("w0", "w1", "w2")
    run.dies("w1")
    run.wait(0.2, beating="w0 w2")
    assert started(run) == []
    run.report("w0", 7, LeaseEnd.FENCED)
    run.report("w2", 7, LeaseEnd.FENCED)
    run.tick()
    run.wait(SCAN_S, beating="w0 w2")
    assert started(run) == ["w3"]
    order = [type(action) for action in run.said]
    assert order.index(act.Grant) < order.index(act.StartMember)


def test_survivor_one_step_behind_redoes_it_alone_before_all_go_on() -> None:
    run = Run().training("w0", "w1", "w2")
    run.dies("w2")
    run.report("w0", 8, LeaseEnd.FENCED)
    run.report("w1", 7, LeaseEnd.FENCED)
    assert (run.lease.members, run.lease.start_step, run.lease.stop_step) == (("w1",), 7, 8)
    assert run.lease.assignments == (tuple(range(8)),)
    run.beat("w1", step=7)
    assert run.events(EventKind.REFORMED) == []  # not everybody trains again yet
    run.report("w1", 8)
    assert (run.lease.members, run.lease.start_step, run.lease.receivers) == (("w0", "w1"), 8, ())
    run.beat("w0", step=8)
    assert [e.fields["cause"] for e in run.events(EventKind.REFORMED)] == ["failure"]


def test_fast_sums_overwrite_the_survivor_that_is_behind() -> None:
    run = Run(exact=False).training("w0", "w1", "w2")
    run.dies("w2")
    run.report("w0", 7, LeaseEnd.FENCED)
    run.report("w1", 8, LeaseEnd.FENCED)
    assert (run.lease.members, run.lease.start_step) == (("w0", "w1"), 8)
    assert (run.lease.source, run.lease.receivers) == (1, (0,))


def test_torn_survivor_gets_the_state_of_a_whole_one() -> None:
    run = Run().training("w0", "w1", "w2")
    run.dies("w2")
    run.report("w0", 7, LeaseEnd.BROKEN, whole=False)
    run.report("w1", 8, LeaseEnd.FENCED)
    assert (run.lease.start_step, run.lease.source, run.lease.receivers) == (8, 1, (0,))


def test_source_that_dies_in_the_copy_is_replaced_by_another_whole_member() -> None:
    run = Run().training("w0", "w1", step=4)
    run.ready("w2")
    run.wait(0.2, beating="w0 w1")
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    run.report("w1", 5, LeaseEnd.ENDED_EARLY)
    assert (run.lease.source, run.lease.receivers) == (0, (2,))
    run.dies("w0")
    run.report("w1", 5, LeaseEnd.BROKEN)
    run.report("w2", 0, LeaseEnd.BROKEN, whole=False)
    assert run.lease.members == ("w1", "w2")
    assert (run.lease.start_step, run.lease.source, run.lease.receivers) == (5, 0, (1,))


def test_two_deaths_make_one_reform() -> None:
    run = Run().training("w0", "w1", "w2")
    run.dies("w0")
    run.now += 0.05
    run.dies("w2")
    run.report("w1", 7, LeaseEnd.BROKEN)
    assert run.one(act.Grant).lease.members == ("w1",)
    assert len(run.all(act.Fence)) == 1


def test_death_of_a_joiner_that_has_not_entered_disturbs_nobody() -> None:
    run = Run().training("w0")
    run.ready("w1")
    run.dies("w1")
    assert run.all(act.Fence) == []
    assert killed(run) == ["w1"]
    assert started(run) == ["w3"]


def test_member_that_reported_and_died_is_not_waited_for() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1")
    run.report("w0", 10)
    run.dies("w0")
    run.report("w1", 10)
    assert run.lease.members == ("w1",)


def test_run_without_a_living_state_waits_for_min_workers_and_restores_the_checkpoint() -> None:
    run = Run(min_workers=2, checkpoint_every=10).training("w0", "w1")
    run.report("w0", 10)
    run.report("w1", 10)
    run.saved()
    run.dies("w0")
    run.dies("w1")
    run.listen().ready("w2")
    assert not run.granted
    run.wait(0.1, beating="w2", phase=Phase.WAITING)
    run.ready("w3")
    assert run.lease.members == ("w2", "w3")
    assert (run.lease.start_step, run.lease.restore, run.lease.source) == (10, 10, None)


def test_survivor_trains_on_below_min_workers() -> None:
    run = Run(min_workers=2).training("w0", "w1")
    run.dies("w1")
    run.report("w0", 7, LeaseEnd.FENCED)
    assert (run.lease.members, run.lease.start_step) == (("w0",), 7)


def test_failure_outranks_a_planned_end_as_the_cause() -> None:
    run = Run().training("w0", "w1")
    run.tell(ev.DrainRequested(member_id="w1"))
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    run.now += 0.5
    run.dies("w1")
    run.beat("w0", step=5)
    (event,) = run.events(EventKind.REFORMED)
    assert event.fields["cause"] == "failure"
    assert event.fields["lost_s"] == pytest.approx(0.5)


def test_work_of_the_broken_generation_does_not_end_its_interruption() -> None:
    run = Run().training("w0", "w1", "w2")
    run.dies("w2")
    run.beat("w0", Phase.COMPUTE, 6)
    assert run.events(EventKind.REFORMED) == []


def test_one_step_lease_of_everybody_ends_the_interruption_although_a_joiner_waits() -> None:
    run = Run(lease_steps=1).training("w0")
    run.report("w0", 1)
    run.ready("w1")
    run.now += 0.01
    run.beat("w0", step=1)
    assert [e.fields["cause"] for e in run.events(EventKind.REFORMED)] == ["lease"]


# -- leaving -----------------------------------------------------------------------------------------------------------


def test_drained_member_leaves_between_leases() -> None:
    run = Run().training("w0", "w1")
    run.tell(ev.DrainRequested(member_id="w1"))
    assert run.one(act.EndLease) == act.EndLease(run.lease.generation, ("w0", "w1"))
    assert started(run) == ["w3"]  # its replacement is asked for at once
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    assert run.all(act.Retire) == []
    run.report("w1", 5, LeaseEnd.ENDED_EARLY)
    assert run.one(act.Retire) == act.Retire("w1")
    assert (run.lease.members, run.lease.start_step) == (("w0",), 5)
    assert [e.fields for e in run.events(EventKind.MEMBER_LEFT)] == [{"member_id": "w1", "cause": "drain"}]
    run.beat("w0", step=5)
    assert [e.fields["cause"] for e in run.events(EventKind.REFORMED)] == ["drain"]


def test_drain_of_one_member_leaves_every_other_demand_alone() -> None:
    run = Run().training("w0")
    run.tell(ev.DrainRequested(member_id="w0"))
    assert killed(run) == []
    assert set(run.members) == {"w0", "w1", "w2", "w3"}


def test_head_that_is_going_away_has_a_checkpoint_written_between_two_steps() -> None:
    """Also of a run that saves at its end alone."""
    run = Run().training("w0", "w1")
    assert run.spec.checkpoint_every is None
    run.tell(ev.NodeDraining("node-of-the-head", 0.0, hosts_us=True))
    assert run.one(act.EndLease) == act.EndLease(run.lease.generation, ("w0", "w1"))
    assert run.all(act.SaveCheckpoint) == []
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    run.report("w1", 5, LeaseEnd.ENDED_EARLY)
    assert run.one(act.SaveCheckpoint).step == 5
    assert (run.lease.members, run.lease.start_step) == (("w0", "w1"), 5), "training goes on"
    assert run.all(act.Retire) == []


def test_node_without_the_coordinator_asks_for_no_checkpoint() -> None:
    run = Run().training("w0", "w1")
    run.tell(ev.NodeDraining("some-node", 0.0))
    assert run.all(act.EndLease) == run.all(act.SaveCheckpoint) == []


def test_drained_member_that_warms_up_goes_at_once() -> None:
    run = Run().training("w0")
    run.start("w1")
    run.tell(ev.DrainRequested(member_id="w1"))
    assert killed(run) == ["w1"]
    assert run.all(act.EndLease) == []
    assert started(run) == ["w3"]


def test_drained_holder_of_the_last_state_stays_until_it_is_copied() -> None:
    run = Run(max_workers=1).training("w0")
    run.tell(ev.DrainRequested(member_id="w0"))
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    assert run.lease.members == ("w0",)
    assert run.all(act.Retire) == []
    run.ready("w1")
    run.wait(0.2, beating="w0")
    run.report("w0", 9, LeaseEnd.ENDED_EARLY)
    assert (run.lease.members, run.lease.source, run.lease.receivers) == (("w0", "w1"), 0, (1,))
    assert run.all(act.EndLease)[-1] == act.EndLease(run.lease.generation, ("w0", "w1"))
    run.report("w0", 10, LeaseEnd.ENDED_EARLY)
    run.report("w1", 10, LeaseEnd.ENDED_EARLY)
    assert run.one(act.Retire) == act.Retire("w0")
    assert run.lease.members == ("w1",)


def test_drained_member_stays_while_the_connection_of_the_only_other_state_is_lost() -> None:
    run = Run(max_workers=2).training("w0", "w1")
    run.tell(ev.DrainRequested(member_id="w0"))
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    run.tell(ev.ConnectionLost("w1"))
    run.report("w1", 5, LeaseEnd.ENDED_EARLY)  # said before it died
    assert run.all(act.Retire) == []
    run.dies("w1")
    run.tick()
    run.wait(SCAN_S)
    assert (run.lease.members, run.lease.start_step) == (("w0",), 5)


def test_draining_node_takes_its_members_and_those_that_land_there() -> None:
    run = Run(max_workers=4)
    run.ready("w0", "n0")
    run.beat("w0")
    run.start("w1", "n1")
    run.start("w2", "n2")
    run.listen().tell(ev.NodeDraining("n1", 0.0))
    assert killed(run) == ["w1"]
    run.start("w3", "n1")
    assert killed(run) == ["w1", "w3"]
    assert set(run.members) == {"w0", "w2", "w4", "w5"}


def test_dead_node_is_told_with_the_workers_that_went_with_it() -> None:
    run = Run(max_workers=4)
    for member_id, node_id in (("w0", "n0"), ("w1", "n1"), ("w2", "n1"), ("w3", "n0")):
        run.ready(member_id, node_id)
    run.listen()
    for member_id in ("w1", "w2"):
        run.dies(member_id)
    assert [asked.node_id for asked in run.all(act.AskAfterNode)] == ["n1", "n1"]
    assert not run.events(EventKind.NODE_LOST)
    run.tell(ev.NodeLost("n1"))
    (event,) = run.events(EventKind.NODE_LOST)
    assert event.fields == {"node_id": "n1", "members": ["w1", "w2"]}
    assert event.message == "Node n1 is lost: w1, w2 went with it."


def test_worker_that_was_lost_long_before_its_node_did_not_go_with_it() -> None:
    run = Run(max_workers=3).training("w0")
    run.ready("w1", "n1")
    run.dies("w1")
    run.wait(NODE_LOSS_S, beating="w0")
    run.ready("w3", "n1")
    run.dies("w3")
    run.tell(ev.NodeLost("n1"))
    (event,) = run.events(EventKind.NODE_LOST)
    assert event.fields["members"] == ["w3"]


def test_member_that_was_never_placed_has_no_node_to_ask_after() -> None:
    run = Run(max_workers=3).training("w0")
    run.dies("w1")
    assert not run.all(act.AskAfterNode)


def test_preempted_members_that_die_early_are_no_crashes() -> None:
    run = Run(backoff_base_s=10.0)
    for member_id, node_id in (("w0", "n0"), ("w1", "n1"), ("w2", "n1")):
        run.ready(member_id, node_id)
    run.wait(0.2, beating="w0")
    run.report("w0", 3, LeaseEnd.ENDED_EARLY)
    run.tell(ev.NodeDraining("n1", 0.0))
    run.dies("w1")
    run.dies("w2")
    run.report("w0", 3, LeaseEnd.FENCED)
    run.tick()
    assert [e.fields["cause"] for e in run.events(EventKind.MEMBER_LOST)] == ["preemption", "preemption"]
    run.start("w3", "n3")
    run.dies("w3")
    assert set(run.members) == {"w0", "w4", "w5"}  # it was the first crash, which delays nothing


def test_second_crash_of_a_node_delays_the_replacement() -> None:
    run = Run(backoff_base_s=10.0, max_workers=2).training("w0")
    run.start("w1", "n1")
    run.dies("w1", "out of memory")
    run.start("w2", "n1")
    run.dies("w2", "out of memory")
    assert [e.fields["cause"] for e in run.events(EventKind.MEMBER_LOST)] == ["out of memory"] * 2
    assert started(run) == ["w2"]
    run.wait(9.9, beating="w0")
    assert started(run) == ["w2"]
    run.wait(0.2, beating="w0")
    assert started(run) == ["w2", "w3"]


# -- health ------------------------------------------------------------------------------------------------------------


def test_silent_member_is_given_up_as_hung() -> None:
    run = Run(heartbeat_timeout_s=1.0).training("w0", "w1")
    run.wait(0.95, beating="w0")
    assert killed(run) == []
    run.wait(0.15, beating="w0")
    assert killed(run) == ["w1"]
    assert run.one(act.Fence).member_ids == ("w0",)
    run.report("w0", 2, LeaseEnd.FENCED)
    run.beat("w0", step=2)
    assert [e.fields["cause"] for e in run.events(EventKind.REFORMED)] == ["hang"]


def test_beats_that_come_late_lengthen_the_patience() -> None:
    run = Run(heartbeat_timeout_s=1.0).training("w0", "w1")
    run.now += 0.8
    run.beat("w0")
    run.beat("w1")
    run.wait(2.0, beating="w0")  # 1 s + 3 * (0.8 s - 0.3 s)
    assert killed(run) == []
    run.wait(0.6, beating="w0")
    assert killed(run) == ["w1"]


def test_member_that_computes_without_progress_is_given_up() -> None:
    run = Run(progress_timeout_s=5.0).training("w0", "w1")
    for _ in range(scans(5.5)):
        run.beat("w1", Phase.COMPUTE, progress=1)
        run.wait(SCAN_S, beating="w0", phase=Phase.REDUCE)
    assert killed(run) == ["w1"]
    assert "no progress in compute" in run.events(EventKind.MEMBER_LOST)[0].message


def test_member_that_does_not_begin_its_lease_is_given_up() -> None:
    """In a lease that goes on in the group of the one before there is no forming that it could fail."""
    run = Run(progress_timeout_s=5.0, checkpoint_every=10).training("w0", "w1")
    for member_id in ("w0", "w1"):
        run.report(member_id, 10)
        run.beat(member_id, Phase.WAITING, progress=7)
    assert run.lease.continues is not None
    for _ in range(scans(5.5)):
        run.beat("w1", Phase.WAITING, progress=7)
        run.beat("w0", Phase.REDUCE, progress=8)
        run.wait(SCAN_S)
    assert killed(run) == ["w1"]
    assert "no progress in waiting" in run.events(EventKind.MEMBER_LOST)[0].message


def test_member_that_waits_for_others_owes_no_progress() -> None:
    run = Run(progress_timeout_s=5.0).training("w0", "w1")
    for _ in range(scans(10)):
        run.beat("w1", Phase.REDUCE, progress=1)
        run.wait(SCAN_S, beating="w0")
    assert killed(run) == []


def test_patience_follows_the_length_of_a_micro_batch() -> None:
    run = Run(progress_timeout_s=5.0).training("w0", "w1")
    run.beat("w1", micro_batch_s=1.0)
    for _ in range(scans(19)):
        run.beat("w1", Phase.COMPUTE, progress=1)
        run.wait(SCAN_S, beating="w0")
    assert killed(run) == []


def test_member_that_does_not_answer_a_fence_is_given_up() -> None:
    run = Run(progress_timeout_s=5.0).training("w0", "w1", "w2")
    run.dies("w0")
    run.report("w2", 3, LeaseEnd.FENCED)
    for _ in range(scans(4.9)):
        run.beat("w1", Phase.REDUCE, progress=1)
        run.wait(SCAN_S, beating="w2", phase=Phase.WAITING)
    assert killed(run) == ["w0"]
    for _ in range(scans(0.3)):
        run.beat("w1", Phase.REDUCE, progress=1)
        run.wait(SCAN_S, beating="w2", phase=Phase.WAITING)
    assert killed(run) == ["w0", "w1"]
    assert run.lease.members == ("w2",)


def test_fence_begins_a_new_patience() -> None:
    run = Run(progress_timeout_s=5.0).training("w0", "w1", "w2")
    for _ in range(scans(10)):
        run.beat("w1", Phase.REDUCE, progress=1)
        run.wait(SCAN_S, beating="w0 w2")
    run.dies("w0")
    run.beat("w1", Phase.REDUCE, progress=1)
    run.wait(SCAN_S, beating="w2")
    assert killed(run) == ["w0"]


def test_lost_connection_is_a_death_after_the_grace() -> None:
    run = Run(lost_connection_grace_s=0.1).training("w0", "w1")
    run.tell(ev.ConnectionLost("w1"))
    run.wait(0.09, beating="w0")
    assert killed(run) == []
    run.wait(0.06, beating="w0")
    assert killed(run) == ["w1"]


def test_lost_connection_moves_the_next_deadline_nearer() -> None:
    run = Run(lost_connection_grace_s=0.01).training("w0", "w1")
    run.wait(SCAN_S, beating="w0 w1")
    run.tell(ev.ConnectionLost("w1"))
    assert run.control.next_deadline(run.now) == pytest.approx(run.now + 0.01)


@pytest.mark.parametrize("by", ["connection", "beat"])
def test_restored_connection_is_no_death(by: str) -> None:
    run = Run(lost_connection_grace_s=0.1).training("w0", "w1")
    run.tell(ev.ConnectionLost("w1"))
    run.wait(0.05, beating="w0")
    if by == "connection":
        run.tell(ev.ConnectionRestored("w1"))
    else:
        run.beat("w1")
    run.wait(0.5, beating="w0")
    assert killed(run) == []


def test_lease_waits_until_a_lost_connection_is_explained() -> None:
    run = Run().training("w0", "w1")
    run.ready("w2")
    run.wait(0.2, beating="w0 w1")
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    run.tell(ev.ConnectionLost("w2"))
    run.report("w1", 5, LeaseEnd.ENDED_EARLY)
    assert not run.granted
    run.tell(ev.ConnectionRestored("w2"))
    run.wait(SCAN_S, beating="w0 w1 w2", phase=Phase.WAITING)
    assert run.lease.members == ("w0", "w1", "w2")


def test_no_checkpoint_is_restored_while_the_holder_of_the_state_may_reconnect() -> None:
    run = Run(min_workers=2).training("w0", "w1")
    run.dies("w1")
    run.report("w0", 5, LeaseEnd.FENCED)
    for member_id in ("w2", "w3"):
        run.wait(SCAN_S, beating="w0")
        run.ready(member_id)
    run.wait(0.2, beating="w0 w2 w3")
    run.listen().tell(ev.ConnectionLost("w0"))
    run.report("w0", 6, LeaseEnd.ENDED_EARLY)
    run.beat("w2", Phase.WAITING)
    assert not run.granted
    run.tell(ev.ConnectionRestored("w0"))
    run.wait(SCAN_S, beating="w0 w2 w3", phase=Phase.WAITING)
    assert (run.lease.members, run.lease.start_step, run.lease.source) == (("w0", "w2", "w3"), 6, 0)


def test_last_state_is_not_given_up_on_suspicion() -> None:
    run = Run().training("w0")
    run.wait(59.0)
    run.tell(ev.MemberFailed("w0", "process unreachable", proof=False))
    assert killed(run) == []
    run.beat("w0", step=50)
    run.report("w0", 60)
    assert run.lease.start_step == 60


def test_holder_of_the_last_state_is_given_up_after_the_progress_timeout() -> None:
    run = Run().training("w0")
    run.wait(61.0)
    assert killed(run) == ["w0"]


def test_holder_of_the_last_state_is_waited_for_as_long_as_its_work_took() -> None:
    run = Run().training("w0")
    run.wait(100.0, beating="w0")
    run.wait(98.0)
    assert killed(run) == []
    run.wait(4.0)
    assert killed(run) == ["w0"]


def test_after_a_checkpoint_only_the_work_since_then_is_waited_for() -> None:
    run = Run(checkpoint_every=10).training("w0")
    run.wait(100.0, beating="w0")
    run.report("w0", 10)
    run.saved()
    run.wait(1.0, beating="w0")
    run.wait(62.0)
    assert killed(run) == ["w0"]


def test_members_that_all_wait_for_each_other_form_anew() -> None:
    run = Run().training("w0", "w1")
    before = run.lease.generation
    for _ in range(61):
        for member_id in ("w0", "w1"):
            run.beat(member_id, Phase.REDUCE, progress=7)
        run.wait(1.0)
    assert [fence.generation for fence in run.all(act.Fence)] == [before]
    assert killed(run) == []


def test_members_that_wait_for_data_are_left_alone() -> None:
    run = Run().training("w0", "w1")
    for _ in range(200):
        run.beat("w0", Phase.REDUCE, progress=7)
        run.beat("w1", Phase.DATA, progress=7)
        run.wait(0.5)
    assert run.all(act.Fence) == []


def test_last_state_is_given_up_on_proof() -> None:
    run = Run().training("w0")
    run.dies("w0")
    assert killed(run) == ["w0"]


def test_one_of_two_silent_members_with_a_state_is_kept() -> None:
    run = Run().training("w0", "w1")
    run.wait(50.0)
    assert len(killed(run)) == 1


def test_silent_member_is_kept_while_the_connection_of_the_only_other_state_is_lost() -> None:
    run = Run().training("w0", "w1")
    run.wait(0.98, beating="w1")
    run.tell(ev.ConnectionLost("w1"))
    run.wait(5.0)
    assert killed(run) == ["w1"]


def test_unreachable_member_is_given_up_while_another_has_the_state() -> None:
    run = Run().training("w0", "w1")
    run.tell(ev.MemberFailed("w1", "process unreachable", proof=False))
    assert killed(run) == ["w1"]


def test_sleep_of_the_coordinator_is_nobodys_silence() -> None:
    run = Run(heartbeat_timeout_s=1.0).training("w0", "w1")
    run.now += 30.0
    run.tell(ev.CoordinatorSlept(30.0))
    run.wait(0.9, beating="w0")
    assert killed(run) == []
    run.wait(0.2, beating="w0")
    assert killed(run) == ["w1"]  # the limit is as long as it was


def test_sleep_of_the_coordinator_is_nobodys_slow_start() -> None:
    run = Run(start_timeout_s=10.0).training("w0")
    run.start("w1")
    run.now += 30.0
    run.tell(ev.CoordinatorSlept(30.0))
    run.wait(9.0, beating="w0")
    assert killed(run) == []
    run.wait(1.1, beating="w0")
    assert killed(run) == ["w1"]


def test_sleep_of_the_coordinator_ends_no_connection() -> None:
    run = Run().training("w0", "w1")
    run.tell(ev.ConnectionLost("w1"))
    run.now += 3.0
    run.tell(ev.CoordinatorSlept(3.0))
    run.tick()
    assert killed(run) == []
    run.wait(0.15, beating="w0")
    assert killed(run) == ["w1"]


def test_sleep_of_the_coordinator_is_no_lack_of_progress() -> None:
    run = Run(progress_timeout_s=5.0).training("w0", "w1", "w2")
    for _ in range(scans(4.9)):
        run.beat("w1", Phase.REDUCE, progress=1)
        run.wait(SCAN_S, beating="w0 w2")
    run.dies("w0")
    run.report("w2", 3, LeaseEnd.FENCED)
    run.now += 30.0
    run.tell(ev.CoordinatorSlept(30.0))
    for _ in range(scans(4.9)):
        run.beat("w1", Phase.REDUCE, progress=1)
        run.wait(SCAN_S, beating="w2", phase=Phase.WAITING)
    assert killed(run) == ["w0"]
    for _ in range(scans(0.3)):
        run.beat("w1", Phase.REDUCE, progress=1)
        run.wait(SCAN_S, beating="w2", phase=Phase.WAITING)
    assert killed(run) == ["w0", "w1"]


# -- bugs and bad data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "verdict"), [(LeaseEnd.POISONED, "poisoned"), (LeaseEnd.DATA_ERROR, "data_error")]
)  # fmt: skip
def test_step_that_must_not_be_trained_stops_the_run(end: LeaseEnd, verdict: str) -> None:
    run = Run().training("w0", "w1")
    run.report("w1", 7, end, error="3 refused elements", error_step=7)
    assert run.one(act.Finish).verdict == act.Verdict(verdict, "3 refused elements", 7)
    assert [e.fields["verdict"] for e in run.events(EventKind.RUN_FINISHED)] == [verdict]


def test_storage_that_gives_no_tokens_ends_the_run_with_a_checkpoint() -> None:
    run = Run().training("w0", "w1")
    run.report("w1", 7, LeaseEnd.UNAVAILABLE, error="no tokens of s3://a for an hour", error_step=7)
    assert run.one(act.Fence).member_ids == ("w0",)
    run.report("w0", 7, LeaseEnd.FENCED)
    assert run.save.step == 7 and not run.all(act.Finish)
    run.saved()
    assert run.one(act.Finish).verdict == act.Verdict("unavailable", "no tokens of s3://a for an hour", 7)


def test_storage_that_takes_no_checkpoint_either_is_told_of_both() -> None:
    run = Run().training("w0")
    run.report("w0", 7, LeaseEnd.UNAVAILABLE, error="no tokens", error_step=7)
    for _ in range(FINAL_TRIES):
        run.saved(error="503")
    told = "no tokens; and the checkpoint of step 7 could not be written in 3 tries: 503"
    assert run.one(act.Finish).verdict == act.Verdict("unavailable", told, 7)


def test_storage_that_gives_no_checkpoint_to_go_on_from_ends_the_run() -> None:
    run = Run(resume_step=30)
    run.ready("w0")
    run.report("w0", 0, LeaseEnd.UNAVAILABLE, whole=False, error="no checkpoint of step 30", error_step=0)
    assert run.one(act.Finish).verdict == act.Verdict("unavailable", "no checkpoint of step 30", 30)


def test_stop_does_not_wait_for_tokens_that_do_not_come() -> None:
    run = Run().training("w0", "w1")
    run.beat("w0", Phase.REDUCE, 7)
    run.beat("w1", Phase.DATA, 7)
    run.tell(ev.StopRequested("ctrl-c"))
    assert run.one(act.EndLease).member_ids == ("w0", "w1")
    still = {"w0": Phase.REDUCE, "w1": Phase.DATA}
    waited_s = 0.0
    while not run.all(act.Fence) and waited_s < 60:
        run.now += SCAN_S
        waited_s += SCAN_S
        for member_id, phase in still.items():
            run.beat(member_id, phase, 7, progress=3)
        run.tick()
    assert STOP_PATIENCE_S < waited_s < STOP_PATIENCE_S + 1
    run.report("w0", 7, LeaseEnd.FENCED)
    run.report("w1", 7, LeaseEnd.FENCED)
    run.saved()
    assert run.one(act.Finish).verdict == act.Verdict("stopped", "ctrl-c", 7)


def test_who_does_not_stop_waits_for_tokens() -> None:
    run = Run().training("w0")
    for _ in range(600):
        run.now += 1.0
        run.beat("w0", Phase.DATA, 7, progress=3)
        run.tick()
    assert not run.all(act.Fence) and not run.all(act.KillMember)


def test_exception_is_tried_again_once() -> None:
    run = Run().training("w0", "w1")
    run.report("w1", 7, LeaseEnd.RAISED, error="ValueError: x", error_step=7)
    assert run.one(act.Fence).member_ids == ("w0",)
    run.report("w0", 7, LeaseEnd.FENCED)
    assert (run.lease.members, run.lease.start_step) == (("w0", "w1"), 7)
    run.beat("w0", step=7)
    assert [e.fields["cause"] for e in run.events(EventKind.REFORMED)] == ["error"]
    run.report("w0", 7, LeaseEnd.RAISED, error="ValueError: x", error_step=7)
    assert run.one(act.Finish).verdict == act.Verdict("failed_bug", "step 7: ValueError: x (twice)", 7)


def test_exception_of_all_members_in_one_generation_counts_once() -> None:
    run = Run().training("w0", "w1")
    for member_id in ("w0", "w0", "w1"):  # the second is a duplicate
        run.report(member_id, 7, LeaseEnd.RAISED, error="ValueError: x", error_step=7)
    assert run.all(act.Finish) == []
    assert run.granted


def test_same_exception_at_another_step_is_not_the_same() -> None:
    run = Run().training("w0")
    for step in (7, 8, 9):
        run.report("w0", step, LeaseEnd.RAISED, error="OSError: flaky disk", error_step=step)
    assert run.all(act.Finish) == []
    assert run.lease.start_step == 9


def test_same_exception_of_two_starting_workers_stops_the_run() -> None:
    run = Run()
    for member_id in ("w0", "w1"):
        assert run.all(act.Finish) == []
        run.start(member_id)
        run.tell(ev.MemberFailed(member_id, "ImportError: no torch", proof=True, raised=True))
    assert run.one(act.Finish).verdict.kind == "failed_bug"
    assert "no torch" in run.one(act.Finish).verdict.message


# -- admission ---------------------------------------------------------------------------------------------------------


def test_member_that_computes_other_bits_is_refused_with_the_difference_named() -> None:
    run = Run()
    run.ready("w0", probe="a", torch="2.13", isa="avx512")
    run.listen().ready("w1", probe="b", torch="2.13", isa="avx2")
    assert killed(run) == ["w1"]
    (event,) = run.events(EventKind.MEMBER_REFUSED)
    assert "isa=avx2 (the run: avx512)" in event.message
    assert "torch" not in event.message
    assert event.fields["environment"] == {"torch": "2.13", "isa": "avx2"}
    assert event.fields["expected"] == {"torch": "2.13", "isa": "avx512"}
    run.wait(1.0, beating="w0")
    assert run.all(act.EndLease) == []


def test_refusal_without_a_recorded_difference_says_so() -> None:
    run = Run()
    run.ready("w0", probe="a", torch="2.13")
    run.ready("w1", probe="b", torch="2.13")
    assert "no recorded difference" in run.events(EventKind.MEMBER_REFUSED)[0].message


def test_other_environment_with_the_same_bits_is_admitted() -> None:
    run = Run()
    run.ready("w0", probe="a", isa="avx512")
    run.ready("w1", probe="a", isa="avx2")
    assert run.members["w1"]["state"] == "ready"


def test_fast_sums_admit_other_bits() -> None:
    run = Run(exact=False)
    run.ready("w0", probe="a")
    run.ready("w1", probe="b")
    assert run.members["w1"]["state"] == "ready"


# -- quarantine --------------------------------------------------------------------------------------------------------


def crash_on(run: Run, node_id: str, times: int) -> None:
    for _ in range(times):
        member_id = next(m for m, member in run.members.items() if member["state"] == "pending")
        run.start(member_id, node_id)
        run.dies(member_id)
        run.wait(0.1, beating="w0")


def test_flapping_node_is_avoided_until_its_quarantine_ends() -> None:
    run = Run(max_workers=2, backoff_base_s=0.01, quarantine_failures=3, quarantine_window_s=6.0).training("w0")
    crash_on(run, "bad", 3)
    (event,) = run.events(EventKind.NODE_QUARANTINED)
    assert (event.fields["node_id"], event.fields["failures"]) == ("bad", 3)
    assert run.all(act.StartMember)[-1].avoid_nodes == ("bad",)
    run.wait(59.0, beating="w0")
    assert run.all(act.StartMember)[-1].avoid_nodes == ("bad",)
    asked = run.all(act.StartMember)[-1].member_id
    run.wait(1.0, beating="w0")
    assert killed(run)[-1] == asked  # the demand is made anew, without the node to avoid
    assert run.all(act.StartMember)[-1].avoid_nodes == ()


def test_quarantine_holds_for_demands_that_were_made_before_it() -> None:
    run = Run(max_workers=4, backoff_base_s=0.01, quarantine_failures=3).training("w0")
    crash_on(run, "bad", 3)
    run.wait(0.1, beating="w0")
    pending = {m for m, member in run.members.items() if member["state"] == "pending"}
    assert len(pending) == 3
    assert {a.member_id for a in run.all(act.StartMember) if a.avoid_nodes == ("bad",)} == pending


# -- speed -------------------------------------------------------------------------------------------------------------


def test_slow_member_is_named_and_gets_less() -> None:
    run = Run(rebalance_every_s=5.0).training("w0", "w1")
    run.beat("w0", micro_batch_s=0.1)
    run.beat("w1", micro_batch_s=0.3)
    run.wait(4.9, beating="w0 w1")
    assert run.all(act.EndLease) == []
    run.wait(0.2, beating="w0 w1")
    (event,) = run.events(EventKind.STRAGGLER)
    assert event.fields == {"member_id": "w1", "micro_batch_s": 0.3, "median_s": 0.1}
    assert len(run.all(act.EndLease)) == 1
    run.report("w0", 9, LeaseEnd.ENDED_EARLY)
    run.report("w1", 9, LeaseEnd.ENDED_EARLY)
    assert [len(part) for part in run.lease.assignments] == [6, 2]
    run.beat("w0", step=9)
    assert [e.fields["cause"] for e in run.events(EventKind.REFORMED)] == ["straggler"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (0.1, 0.12),  # noise
        (0.1, None),  # unknown
        (0.1, 0.14),  # 5 + 3 would take 0.5 s instead of 0.56 s: not worth an interruption
    ],
)
def test_lease_is_not_ended_for_a_small_gain(first: float, second: float | None) -> None:
    run = Run(rebalance_every_s=5.0).training("w0", "w1")
    run.beat("w0", micro_batch_s=first)
    run.beat("w1", micro_batch_s=second)
    run.wait(20.0, beating="w0 w1")
    assert run.all(act.EndLease) == []
    assert run.events(EventKind.STRAGGLER) == []


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoint_is_saved_between_leases_and_training_does_not_wait_for_it() -> None:
    run = Run(checkpoint_every=10).training("w0")
    assert run.lease.stop_step == 10
    run.report("w0", 10)
    assert [type(a) for a in run.said if not isinstance(a, act.Emit)] == [act.SaveCheckpoint, act.Grant]
    assert run.one(act.SaveCheckpoint) == act.SaveCheckpoint(1, ("w0",), 10)
    assert (run.lease.start_step, run.lease.stop_step) == (10, 20)
    run.now += 3.0
    run.saved()
    (event,) = run.events(EventKind.CHECKPOINT_SAVED)
    assert (event.step, event.fields["seconds"]) == (10, 3.0)


def test_slow_store_delays_the_next_checkpoint() -> None:
    run = Run(checkpoint_every=10).training("w0")
    for step in (10, 20):
        run.report("w0", step)
    run.saved()
    run.report("w0", 30)
    assert [a.step for a in run.all(act.SaveCheckpoint)] == [10, 30]


def test_failed_checkpoint_is_told_and_training_goes_on() -> None:
    run = Run(checkpoint_every=10).training("w0")
    run.report("w0", 10)
    run.saved(error="disk full")
    (event,) = run.events(EventKind.CHECKPOINT_FAILED)
    assert (event.step, event.fields["error"]) == (10, "disk full")
    run.report("w0", 20)
    assert [a.step for a in run.all(act.SaveCheckpoint)] == [10, 20]
    assert run.all(act.Finish) == []


def test_every_member_writes_a_share_and_the_manifest_comes_last() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1")
    run.report("w0", 10)
    run.report("w1", 10)
    assert run.one(act.SaveCheckpoint) == act.SaveCheckpoint(1, ("w0", "w1"), 10)
    run.tell(ev.Saved(1, "w1", ok=True))
    run.tell(ev.Saved(1, "w1", ok=True))  # a message may come twice
    assert not run.all(act.PublishCheckpoint)
    run.tell(ev.Saved(1, "w0", ok=True))
    assert run.one(act.PublishCheckpoint) == act.PublishCheckpoint(1)
    assert not run.events(EventKind.CHECKPOINT_SAVED)
    run.tell(ev.Published(1, ok=True))
    assert [e.step for e in run.events(EventKind.CHECKPOINT_SAVED)] == [10]


def test_manifest_that_cannot_be_written_is_a_failed_checkpoint() -> None:
    run = Run(checkpoint_every=10).training("w0")
    run.report("w0", 10)
    run.tell(ev.Saved(1, "w0", ok=True))
    run.tell(ev.Published(1, ok=False, error="disk full"))
    assert [e.fields["error"] for e in run.events(EventKind.CHECKPOINT_FAILED)] == ["disk full"]


def test_checkpoint_is_given_up_with_a_worker_whose_share_is_not_stored() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1")
    run.report("w0", 10)
    run.report("w1", 10)
    run.dies("w0")
    assert [e.step for e in run.events(EventKind.CHECKPOINT_FAILED)] == [10]
    run.report("w1", 10, LeaseEnd.FENCED)
    assert [a.member_ids for a in run.all(act.SaveCheckpoint)] == [("w0", "w1"), ("w1",)]


def test_checkpoint_that_was_lost_with_an_owner_is_begun_again_at_the_end_of_a_lease() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1", "w2")
    for member_id in ("w0", "w1", "w2"):
        run.report(member_id, 10)
    run.tell(ev.Saved(1, "w1", ok=False, error="process died", lost=True))
    run.dies("w1")
    for member_id in ("w0", "w2"):
        run.report(member_id, 13, LeaseEnd.FENCED)
    assert [a.step for a in run.all(act.SaveCheckpoint)] == [10, 13]
    assert run.lease.stop_step == 20  # which stays a step to save at
    run.saved()
    run.dies("w2")
    run.report("w0", 14, LeaseEnd.FENCED)
    assert [a.step for a in run.all(act.SaveCheckpoint)] == [10, 13]  # it is owed no longer


def test_checkpoint_that_the_store_refused_waits_for_the_next_interval() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1")
    run.report("w0", 10)
    run.report("w1", 10)
    run.saved(error="disk full")
    run.dies("w1")
    run.report("w0", 13, LeaseEnd.FENCED)
    assert [a.step for a in run.all(act.SaveCheckpoint)] == [10]


def test_owners_are_the_eldest_and_fewer_after_each_loss_and_more_after_each_success() -> None:
    names = tuple(f"w{number}" for number in range(12))
    run = Run(max_workers=12, num_micro_batches=12, checkpoint_every=10).training(*names)
    report_all(run, 10)
    for lost in ("w0", "w1"):
        run.dies(lost)
        report_all(run, 10, LeaseEnd.FENCED, but=lost)
    for step in (20, 30, 40):
        run.saved()
        report_all(run, step)
    assert [a.member_ids for a in run.all(act.SaveCheckpoint)] == [
        names[0:8], names[1:5], names[2:4], names[2:6], names[2:10], names[2:10],
    ]  # fmt: skip


def test_with_fast_sums_one_member_writes_the_whole_state() -> None:
    """Replicas may differ in their last bits, so shares of several are not one state."""
    run = Run(checkpoint_every=10, exact=False).training("w0", "w1", "w2")
    for step in (10, 20):
        report_all(run, step)
        run.saved()
    assert [a.member_ids for a in run.all(act.SaveCheckpoint)] == [("w0",), ("w0",)]


def report_all(run: Run, step: int, end: LeaseEnd = LeaseEnd.COMPLETED, *, but: str = "") -> None:
    for member_id in run.lease.members:
        if member_id != but:
            run.report(member_id, step, end)


def test_worker_whose_share_is_stored_may_go() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1")
    run.report("w0", 10)
    run.report("w1", 10)
    run.tell(ev.Saved(1, "w0", ok=True))
    run.dies("w0")
    run.tell(ev.Saved(1, "w1", ok=True))
    run.tell(ev.Published(1, ok=True))
    assert [e.step for e in run.events(EventKind.CHECKPOINT_SAVED)] == [10]
    assert not run.events(EventKind.CHECKPOINT_FAILED)


def test_share_of_a_checkpoint_that_was_given_up_is_none_of_the_next_one() -> None:
    run = Run(total_steps=15).training("w0", "w1")
    run.report("w0", 15)
    run.report("w1", 15)
    run.dies("w1")
    run.wait(SCAN_S)
    assert run.save == act.SaveCheckpoint(2, ("w0",), 15)
    run.tell(ev.Saved(1, "w0", ok=True))
    assert not run.all(act.PublishCheckpoint)
    run.tell(ev.Saved(2, "w0", ok=True))
    run.tell(ev.Published(1, ok=True))
    assert not run.all(act.Finish)
    run.tell(ev.Published(2, ok=True))
    assert run.one(act.Finish).verdict.kind == "done"


def test_checkpoint_is_given_up_with_the_worker_that_leaves() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1")
    run.report("w0", 10)
    run.report("w1", 10)
    run.tell(ev.DrainRequested(member_id="w0"))
    run.report("w0", 11, LeaseEnd.ENDED_EARLY)
    run.report("w1", 11, LeaseEnd.ENDED_EARLY)
    assert [e.step for e in run.events(EventKind.CHECKPOINT_FAILED)] == [10]
    assert run.all(act.SaveCheckpoint)[-1] == act.SaveCheckpoint(2, ("w1",), 11)  # by those who stay, at once
    run.saved()
    run.report("w1", 20)
    assert run.all(act.SaveCheckpoint)[-1] == act.SaveCheckpoint(3, ("w1",), 20)


def test_checkpoint_is_written_by_workers_that_stay() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1", "w2")
    run.tell(ev.DrainRequested(member_id="w0"))
    for member_id in ("w0", "w1", "w2"):
        run.report(member_id, 10)
    assert run.one(act.Retire) == act.Retire("w0")
    assert run.one(act.SaveCheckpoint) == act.SaveCheckpoint(1, ("w1", "w2"), 10)


def test_checkpoint_whose_shares_were_stored_when_all_workers_died_counts() -> None:
    run = Run(checkpoint_every=10).training("w0", "w1")
    run.report("w0", 10)
    run.report("w1", 10)
    run.tell(ev.Saved(1, "w0", ok=True))
    run.tell(ev.Saved(1, "w1", ok=True))
    run.dies("w0")
    run.dies("w1")
    run.tell(ev.Published(1, ok=True))
    run.ready("w2")
    assert (run.lease.start_step, run.lease.restore) == (10, 10)


def test_checkpoint_that_takes_too_long_is_given_up_and_the_next_one_is_tried() -> None:
    run = Run(checkpoint_every=10, checkpoint_timeout_s=5.0).training("w0", "w1")
    run.report("w0", 10)
    run.report("w1", 10)
    run.tell(ev.Saved(1, "w0", ok=True))
    run.wait(4.8, beating="w0 w1")
    assert not run.events(EventKind.CHECKPOINT_FAILED)
    run.wait(0.3, beating="w0 w1")
    (event,) = run.events(EventKind.CHECKPOINT_FAILED)
    assert (event.step, event.fields["error"]) == (
        10,
        "it was not stored within 5 s (checkpoint.timeout_s): the share of w1 is missing",
    )
    assert run.one(act.AbandonCheckpoint) == act.AbandonCheckpoint(1, ("w1",))
    run.report("w0", 20)
    run.report("w1", 20)
    assert [a.step for a in run.all(act.SaveCheckpoint)] == [10, 20]


def test_worker_whose_upload_never_ended_is_spared_at_the_next_checkpoint() -> None:
    run = Run(checkpoint_every=10, checkpoint_timeout_s=5.0).training("w0", "w1")
    for step in (10, 20):
        run.report("w0", step)
        run.report("w1", step)
        run.tell(ev.Saved(run.save.number, "w1", ok=True))
        run.wait(5.1, beating="w0 w1")
    assert [a.member_ids for a in run.all(act.SaveCheckpoint)] == [("w0", "w1"), ("w1",)]


def test_upload_that_took_too_long_is_shared_by_more_the_next_time() -> None:
    run = Run(checkpoint_every=10, checkpoint_timeout_s=5.0).training("w0", "w1", "w2")
    report_all(run, 10)
    run.tell(ev.Saved(1, "w0", ok=False, error="process unreachable", lost=True))
    report_all(run, 11, LeaseEnd.ENDED_EARLY)
    run.wait(5.1, beating="w0 w1 w2")
    report_all(run, 20)
    assert [len(a.member_ids) for a in run.all(act.SaveCheckpoint)] == [3, 1, 2]


def test_manifest_that_takes_too_long_is_given_up_and_counts_when_it_comes_after_all() -> None:
    run = Run(checkpoint_every=10, checkpoint_timeout_s=5.0).training("w0")
    run.report("w0", 10)
    run.tell(ev.Saved(1, "w0", ok=True))
    run.wait(5.1, beating="w0")
    assert [e.fields["error"] for e in run.events(EventKind.CHECKPOINT_FAILED)] == [
        "it was not stored within 5 s (checkpoint.timeout_s): the manifest is missing"
    ]
    assert run.one(act.AbandonCheckpoint) == act.AbandonCheckpoint(1, ())
    run.report("w0", 20)
    run.tell(ev.Published(1, ok=True))
    run.tell(ev.Published(1, ok=True))  # a message may come twice
    assert [e.step for e in run.events(EventKind.CHECKPOINT_SAVED)] == [10]
    run.dies("w0")  # and with it the share of step 20
    run.ready("w1")
    assert run.lease.restore == 10


def test_manifest_that_failed_after_it_was_given_up_is_not_told_twice() -> None:
    run = Run(checkpoint_every=10, checkpoint_timeout_s=5.0).training("w0")
    run.report("w0", 10)
    run.tell(ev.Saved(1, "w0", ok=True))
    run.wait(5.1, beating="w0")
    run.tell(ev.Published(1, ok=False, error="disk full"))
    assert len(run.events(EventKind.CHECKPOINT_FAILED)) == 1


def test_time_for_which_the_coordinator_slept_counts_against_no_checkpoint() -> None:
    run = Run(checkpoint_every=10, checkpoint_timeout_s=5.0).training("w0")
    run.report("w0", 10)
    run.now += 20.0
    run.tell(ev.CoordinatorSlept(20.0))
    run.wait(4.8, beating="w0")
    assert not run.events(EventKind.CHECKPOINT_FAILED)


def test_final_checkpoint_that_never_ends_is_tried_three_times() -> None:
    run = Run(total_steps=15, checkpoint_timeout_s=5.0).training("w0")
    run.report("w0", 15)
    run.wait(15.3, beating="w0", phase=Phase.WAITING)
    assert len(run.all(act.SaveCheckpoint)) == 3
    assert run.one(act.Finish).verdict.kind == "failed"


def test_final_checkpoint_of_a_frozen_worker_is_no_fault_of_the_store() -> None:
    """It holds the only state, and so is waited for; a verdict after three tries would give that state up."""
    run = Run(total_steps=15, checkpoint_timeout_s=5.0).training("w0")
    run.report("w0", 15)
    run.beat("w0", Phase.WAITING)
    run.wait(40.0)
    assert not run.all(act.Finish)
    assert len(run.all(act.SaveCheckpoint)) > 3
    run.beat("w0", Phase.WAITING)
    run.saved()
    assert run.one(act.Finish).verdict.kind == "done"


def test_checkpoint_that_the_verdict_cuts_short_is_told() -> None:
    run = Run(checkpoint_every=10).training("w0")
    run.report("w0", 10)
    run.report("w0", 11, LeaseEnd.POISONED)
    (event,) = run.events(EventKind.CHECKPOINT_FAILED)
    assert (event.step, event.fields["error"]) == (10, "the run ended")
    kinds = [a.event.kind for a in run.all(act.Emit)]
    assert kinds.index(EventKind.CHECKPOINT_FAILED) < kinds.index(EventKind.RUN_FINISHED)


@pytest.mark.parametrize("ok", [True, False])
def test_manifest_that_is_being_written_when_the_verdict_falls_is_told(ok: bool) -> None:
    run = Run(checkpoint_every=10).training("w0")
    run.report("w0", 10)
    run.tell(ev.Saved(1, "w0", ok=True))
    run.report("w0", 11, LeaseEnd.POISONED)
    assert run.one(act.Finish).verdict.kind == "poisoned"
    (told,) = run.tell(ev.Published(1, ok, None if ok else "disk full"))
    assert isinstance(told, act.Emit)
    assert told.event.kind is (EventKind.CHECKPOINT_SAVED if ok else EventKind.CHECKPOINT_FAILED)
    assert run.tell(ev.Tick()) == []


def all_lost_while_the_manifest_of_20_is_written() -> Run:
    run = Run(checkpoint_every=10, checkpoint_timeout_s=5.0).training("w0", step=10)
    run.saved()
    run.report("w0", 20)
    run.tell(ev.Saved(run.save.number, "w0", ok=True))
    run.dies("w0")
    run.listen().ready("w1")
    return run


def test_restore_waits_for_the_manifest_of_a_newer_checkpoint() -> None:
    run = all_lost_while_the_manifest_of_20_is_written()
    run.wait(2.0, beating="w1", phase=Phase.WAITING)
    assert not run.granted
    (note,) = run.events(EventKind.NOTE)  # once
    assert "the manifest of step 20" in note.message
    run.tell(ev.Published(run.save.number, ok=True))
    assert (run.lease.start_step, run.lease.restore) == (20, 20)


@pytest.mark.parametrize("how", ["fails", "takes too long"])
def test_restore_takes_the_older_checkpoint_when_the_manifest_does_not_come(how: str) -> None:
    run = all_lost_while_the_manifest_of_20_is_written()
    if how == "fails":
        run.tell(ev.Published(run.save.number, ok=False, error="disk full"))
    else:
        run.wait(5.1, beating="w1", phase=Phase.WAITING)
    assert (run.lease.start_step, run.lease.restore) == (10, 10)


def test_stop_waits_for_the_manifest_that_is_being_written_though_all_are_lost() -> None:
    run = all_lost_while_the_manifest_of_20_is_written()
    run.tell(ev.StopRequested("ctrl-c"))
    assert not run.all(act.Finish)
    run.tell(ev.Published(run.save.number, ok=True))
    assert run.one(act.Finish).verdict == act.Verdict("stopped", "ctrl-c", 20)


def test_end_saves_once_more_and_then_gives_the_verdict() -> None:
    run = Run(total_steps=15).training("w0", "w1")
    run.report("w0", 15)
    assert run.all(act.SaveCheckpoint) == []
    run.report("w1", 15)
    assert run.one(act.SaveCheckpoint) == act.SaveCheckpoint(1, ("w0", "w1"), 15)
    assert run.all(act.Finish) == []
    run.saved()
    assert run.one(act.Finish).verdict == act.Verdict("done", "trained 15 steps", 15)
    assert not run.granted


def test_share_that_is_lost_with_its_owner_is_no_try_of_the_final_checkpoint() -> None:
    """A dead owner's upload fails at once, before its silence or its connection tell of its death."""
    names = ("w0", "w1", "w2", "w3", "w4")
    run = Run(total_steps=15, max_workers=5).training(*names)
    for member_id in names:
        run.report(member_id, 15)
    for _ in range(4):
        run.tell(ev.Saved(run.save.number, "w4", ok=False, error="process died", lost=True))
    assert not run.all(act.Finish)
    run.saved()
    assert run.one(act.Finish).verdict.kind == "done"


def test_manifest_told_late_leaves_the_newest_checkpoint_the_newest() -> None:
    run = Run(checkpoint_every=10).training("w0", step=20)
    late = run.save
    run.tell(ev.Saved(late.number, "w0", ok=True))
    run.dies("w0")
    run.ready("w1")
    run.tell(ev.Published(late.number, ok=True))
    run.beat("w1", step=0)
    run.report("w1", 10)
    assert run.save == late  # step 10 is older than what there is
    run.dies("w1")
    run.ready("w2")
    assert run.lease.restore == 20


def test_final_checkpoint_is_tried_three_times() -> None:
    run = Run(total_steps=15, checkpoint_every=10).training("w0")
    run.report("w0", 10)
    run.saved(error="disk full")  # no final one
    run.listen().report("w0", 15)
    for _ in range(3):
        assert run.all(act.Finish) == []
        run.saved(error="disk full")
    assert len(run.all(act.SaveCheckpoint)) == 3
    verdict = run.one(act.Finish).verdict
    assert (verdict.kind, verdict.step) == ("failed", 15)
    assert "3 tries" in verdict.message


def test_final_checkpoint_outlives_any_number_of_its_writers() -> None:
    names = ("w0", "w1", "w2", "w3", "w4")
    run = Run(total_steps=15, max_workers=5).training(*names)
    for member_id in names:
        run.report(member_id, 15)
    for member_id in ("w0", "w1", "w2", "w3"):
        run.dies(member_id)
        run.wait(SCAN_S)
    assert [a.member_ids for a in run.all(act.SaveCheckpoint)] == [names, names[1:3], names[2:3], names[3:4], names[4:]]
    run.saved()
    assert run.one(act.Finish).verdict.kind == "done"


def test_final_checkpoint_is_written_by_others_when_its_worker_is_drained() -> None:
    run = Run(total_steps=15).training("w0", "w1")
    run.report("w0", 15)
    run.report("w1", 15)
    run.tell(ev.DrainRequested(member_id="w0"))
    run.wait(SCAN_S)
    assert run.one(act.Retire) == act.Retire("w0")
    assert run.save == act.SaveCheckpoint(2, ("w1",), 15)
    run.saved()
    assert run.one(act.Finish).verdict.kind == "done"


def test_drained_holder_of_the_last_state_writes_the_final_checkpoint() -> None:
    run = Run(total_steps=15).training("w0")
    run.report("w0", 15)
    run.tell(ev.DrainRequested(member_id="w0"))
    assert run.all(act.Retire) == []
    run.saved()
    assert run.one(act.Finish).verdict.kind == "done"


# -- stop --------------------------------------------------------------------------------------------------------------


def test_stop_ends_the_lease_saves_and_finishes() -> None:
    run = Run().training("w0")
    run.tell(ev.StopRequested("ctrl-c"))
    assert run.one(act.EndLease).member_ids == ("w0",)
    run.report("w0", 7, LeaseEnd.ENDED_EARLY)
    assert run.one(act.SaveCheckpoint) == act.SaveCheckpoint(1, ("w0",), 7)
    run.saved()
    assert run.one(act.Finish).verdict == act.Verdict("stopped", "ctrl-c", 7)


@pytest.mark.parametrize("verdict", ev.SPOILED)
def test_run_that_is_spoiled_stops_with_a_checkpoint(verdict: str) -> None:
    run = Run().training("w0")
    for _ in range(3):  # told again as long as it goes on
        run.tell(ev.Spoiled(verdict, "there is no point"))
    assert run.one(act.EndLease).member_ids == ("w0",)
    run.report("w0", 7, LeaseEnd.ENDED_EARLY)
    run.saved()
    assert run.one(act.Finish).verdict == act.Verdict(verdict, "there is no point", 7)


def test_spike_ends_the_attempt_at_once_and_not_the_run() -> None:
    run = Run().training("w0")
    run.tell(ev.SpikeFound(40, "the loss stands out"))
    assert run.one(act.Finish).verdict == act.Verdict(act.REWOUND, "the loss stands out", 40)
    assert run.one(act.Fence).member_ids == ("w0",)  # whoever comes next goes on with it
    assert not [emit for emit in run.all(act.Emit) if emit.event.kind is EventKind.RUN_FINISHED]
    assert not run.all(act.SaveCheckpoint)  # of a state that is given up
    run.tell(ev.SpikeFound(40, "the loss stands out"))  # it stays in the log
    run.report("w0", 50, LeaseEnd.ENDED_EARLY)
    assert len(run.all(act.Finish)) == 1


# -- evaluation --------------------------------------------------------------------------------------------------------

EVALUATES = {"evaluate_every": 10, "num_held_out_batches": 4}


def measured(
    run: Run, member_id: str, step: int, *batches: int, end: LeaseEnd = LeaseEnd.COMPLETED, **more: Any
) -> None:
    measures = tuple(Measure(batch, 2.0 * batch, 4, 1) for batch in batches)
    generation = run.lease.generation
    run.tell(ev.Reported(LeaseReport(member_id, generation, end, step, whole=True, measures=measures, **more)))


def test_evaluation_goes_before_the_step_and_its_members_keep_their_group() -> None:
    run = Run(**EVALUATES).training("w0", "w1")
    training = run.lease
    assert training.stop_step == 10
    for name in ("w0", "w1"):
        run.report(name, 10)
    lease = run.lease
    assert (lease.evaluates, lease.start_step, lease.stop_step) == (True, 10, 10)
    assert sorted(sum(lease.assignments, ())) == [0, 1, 2, 3]
    measured(run, "w1", 10, *lease.assignments[1])
    assert not run.events(EventKind.EVALUATED)
    measured(run, "w0", 10, *lease.assignments[0])
    (told,) = run.events(EventKind.EVALUATED)
    assert (told.step, told.fields["loss"], told.fields["num_targets"], told.fields["num_correct"]) == (10, 0.75, 16, 4)
    assert (run.lease.evaluates, run.lease.start_step, run.lease.continues) == (False, 10, training.generation)


def test_joiner_gets_the_state_and_helps_to_evaluate() -> None:
    run = Run(**EVALUATES).training("w0", "w1")
    for name in ("w0", "w1"):
        run.report(name, 10)
    run.ready("w2")
    run.wait(run.spec.join_batch_s, beating="w0 w1 w2", phase=Phase.EVALUATING)
    assert run.one(act.EndLease).member_ids == ("w0", "w1")
    first = [batches[0] for batches in run.lease.assignments]
    measured(run, "w0", 10, first[0], end=LeaseEnd.ENDED_EARLY)
    measured(run, "w1", 10, first[1], end=LeaseEnd.ENDED_EARLY)
    copying = run.lease
    assert (copying.trains, copying.evaluates, copying.source, copying.receivers) == (False, False, 0, (2,))
    for name in ("w0", "w1", "w2"):
        run.beat(name, Phase.REDUCE, 10)
        run.report(name, 10)
    assert not run.events(EventKind.REFORMED)
    assert run.lease.evaluates and run.lease.members == ("w0", "w1", "w2")
    assert sorted(sum(run.lease.assignments, ())) == sorted({0, 1, 2, 3} - set(first))
    for name, batches in zip(run.lease.members, run.lease.assignments, strict=True):
        measured(run, name, 10, *batches)
    run.beat("w0", Phase.COMPUTE, 10)
    (reformed,) = run.events(EventKind.REFORMED)
    assert reformed.fields["cause"] == "join"  # not only an evaluation


def test_join_with_the_usual_renewal_of_a_lease_is_told_as_one() -> None:
    run = Run(max_workers=3, checkpoint_every=10).training("w0", "w1")
    run.ready("w2")
    for name in ("w0", "w1"):  # before those who become ready a moment later are waited for
        run.report(name, 10)
    assert run.lease.members == ("w0", "w1", "w2")
    run.beat("w0", Phase.COMPUTE, 10)
    assert [told.fields["cause"] for told in run.events(EventKind.REFORMED)] == ["join"]


def test_last_holders_that_leave_hand_the_state_on_before_an_evaluation() -> None:
    run = Run(**EVALUATES).training("w0", "w1")
    run.tell(ev.NodeDraining("node-of-w0", 0.0))
    run.tell(ev.NodeDraining("node-of-w1", 0.0))
    run.ready("w4")
    for name in ("w0", "w1"):
        run.report(name, 10)
    assert (run.lease.trains, run.lease.evaluates, run.lease.members) == (False, False, ("w0", "w1", "w4"))
    for name in ("w0", "w1", "w4"):
        run.report(name, 10)
    assert {action.member_id for action in run.all(act.Retire)} == {"w0", "w1"}
    assert run.lease.evaluates and run.lease.members == ("w4",)


def test_who_leaves_and_holds_the_last_state_evaluates_to_the_end() -> None:
    run = Run(max_workers=1, **EVALUATES).training("w0")
    run.tell(ev.NodeDraining("node-of-w0", 0.0))
    run.report("w0", 10)
    assert run.lease.evaluates
    measured(run, "w0", 10, 0, 1, 2, 3)
    assert run.events(EventKind.EVALUATED) and run.lease.trains


def test_loss_of_a_worker_in_the_last_step_costs_no_evaluation() -> None:
    run = Run(total_steps=15, **EVALUATES).training("w0", "w1", "w2", step=0)
    for name in ("w0", "w1", "w2"):
        run.report(name, 10)
    for rank, name in enumerate(("w0", "w1", "w2")):
        measured(run, name, 10, *run.lease.assignments[rank])
    run.dies("w2")
    run.report("w0", 15, LeaseEnd.FENCED)
    run.report("w1", 14, LeaseEnd.FENCED)
    assert (run.lease.members, run.lease.start_step, run.lease.stop_step) == (("w1",), 14, 15)
    run.report("w1", 15)
    assert run.lease.evaluates
    run.saved()
    for rank, name in enumerate(run.lease.members):
        measured(run, name, 15, *run.lease.assignments[rank])
    assert [event.step for event in run.events(EventKind.EVALUATED)] == [10, 15]
    assert run.one(act.Finish).verdict.kind == "done"


def test_final_checkpoint_that_fails_ends_the_run_however_often_an_evaluation_is_interrupted() -> None:
    run = Run(total_steps=10, **EVALUATES).training("w0", "w1")
    for name in ("w0", "w1"):
        run.report(name, 10)
    for batch in range(3):  # each interruption has the checkpoint tried once more
        run.saved(error="the store is full")
        measured(run, "w0", 10, batch, end=LeaseEnd.ENDED_EARLY)
        measured(run, "w1", 10, end=LeaseEnd.ENDED_EARLY)
    measured(run, "w0", 10, 3)
    measured(run, "w1", 10)
    assert run.one(act.Finish).verdict.kind == "failed"
    assert len(run.all(act.SaveCheckpoint)) == FINAL_TRIES


def test_evaluation_that_is_left_out_is_not_told_after_all() -> None:
    run = Run(**EVALUATES).training("w0", "w1")
    for name in ("w0", "w1"):
        run.report(name, 10)
    (mine, theirs), generation = run.lease.assignments, run.lease.generation
    spoilt = tuple(Measure(batch, float("inf"), 4, 1) for batch in mine)
    run.tell(ev.Reported(LeaseReport("w0", generation, LeaseEnd.COMPLETED, 10, whole=True, measures=spoilt)))
    measured(run, "w1", 10, *theirs)
    assert not run.events(EventKind.EVALUATED)
    assert run.lease.trains and run.lease.start_step == 10


def test_stop_does_not_wait_for_the_rest_of_an_evaluation() -> None:
    run = Run(**EVALUATES).training("w0")
    run.report("w0", 10)
    run.tell(ev.StopRequested("ctrl-c"))
    assert run.one(act.EndLease).member_ids == ("w0",)
    measured(run, "w0", 10, 0, end=LeaseEnd.ENDED_EARLY)
    run.saved()
    assert run.one(act.Finish).verdict == act.Verdict("stopped", "ctrl-c", 10)
    assert not run.events(EventKind.EVALUATED)


def test_last_evaluation_follows_the_last_checkpoint() -> None:
    run = Run(total_steps=15, **EVALUATES).training("w0")
    run.report("w0", 10)
    measured(run, "w0", 10, 0, 1, 2, 3)
    run.report("w0", 15)
    assert run.one(act.SaveCheckpoint).step == 15
    assert run.lease.evaluates and not run.all(act.Finish)
    run.saved()
    assert not run.all(act.Finish)
    measured(run, "w0", 15, 0, 1, 2, 3)
    assert run.one(act.Finish).verdict == act.Verdict("done", "trained 15 steps", 15)


@pytest.mark.parametrize(
    ("end", "loss"), [(LeaseEnd.DATA_ERROR, 1.0), (LeaseEnd.UNAVAILABLE, 1.0), (LeaseEnd.COMPLETED, float("nan"))]
)
def test_evaluation_that_cannot_be_is_left_out(end: LeaseEnd, loss: float) -> None:
    run = Run(**EVALUATES).training("w0")
    run.report("w0", 10)
    report = LeaseReport(
        "w0", run.lease.generation, end, 10, whole=True, error="no tokens", measures=(Measure(0, loss, 4, 1),)
    )
    run.tell(ev.Reported(report))
    assert not run.events(EventKind.EVALUATED) and not run.all(act.Finish)
    assert [event.step for event in run.events(EventKind.NOTE) if "is left out" in event.message] == [10]
    assert (run.lease.evaluates, run.lease.start_step) == (False, 10)


def test_stop_of_a_run_that_waits_is_immediate() -> None:
    run = Run(resume_step=40)
    run.tell(ev.StopRequested("ctrl-c"))
    assert run.one(act.Finish).verdict == act.Verdict("stopped", "ctrl-c", 40)


def test_stop_on_a_saved_step_saves_nothing_more() -> None:
    run = Run(checkpoint_every=10).training("w0")
    run.report("w0", 10)
    run.saved()
    run.tell(ev.StopRequested("ctrl-c"))
    run.report("w0", 10, LeaseEnd.FENCED)
    assert len(run.all(act.SaveCheckpoint)) == 1
    assert run.one(act.Finish).verdict == act.Verdict("stopped", "ctrl-c", 10)


def test_stop_waits_for_the_checkpoint_that_is_being_written() -> None:
    run = Run(checkpoint_every=10).training("w0")
    run.report("w0", 10)
    run.tell(ev.StopRequested("ctrl-c"))
    run.report("w0", 11, LeaseEnd.ENDED_EARLY)
    run.saved()
    assert [a.step for a in run.all(act.SaveCheckpoint)] == [10, 11]
    run.saved()
    assert run.one(act.Finish).verdict.step == 11


def test_stop_asks_for_no_more_workers() -> None:
    run = Run().training("w0", "w1")
    run.tell(ev.StopRequested("ctrl-c"))
    run.dies("w1")
    run.report("w0", 7, LeaseEnd.FENCED)
    run.wait(1.0)
    assert started(run) == []


def test_stop_at_the_last_step_is_done() -> None:
    run = Run(total_steps=15).training("w0")
    run.tell(ev.StopRequested("ctrl-c"))
    run.report("w0", 15)
    run.saved()
    assert run.one(act.Finish).verdict.kind == "done"


def test_nothing_is_decided_after_the_verdict() -> None:
    run = Run(total_steps=15).training("w0", "w1")
    run.report("w0", 15, LeaseEnd.POISONED, error="x")
    run.listen()
    run.dies("w1")
    run.beat("w9")
    run.wait(10.0)
    assert run.said == []


def test_verdict_is_the_last_action() -> None:
    run = Run().training("w0")
    run.start("w1")
    run.tell(ev.StopRequested("ctrl-c"))
    run.tell(ev.ConnectionLost("w0"))
    run.tell(ev.ConnectionLost("w1"))
    run.wait(0.2)  # both are found dead in one look
    assert run.one(act.Finish).verdict.kind == "stopped"
    assert isinstance(run.said[-1], act.Finish)


# -- resize ------------------------------------------------------------------------------------------------------------


def test_larger_run_asks_for_more_workers() -> None:
    run = Run(max_workers=2).training("w0", "w1")
    run.tell(ev.Resized(1, 4))
    assert started(run) == ["w2", "w3"]
    assert [e.fields for e in run.events(EventKind.RESIZED)] == [{"min_workers": 1, "max_workers": 4}]
    assert run.all(act.EndLease) == []


def test_smaller_run_gives_up_demands_before_workers_and_the_youngest_first() -> None:
    run = Run(max_workers=4).training("w0", "w1")
    run.ready("w2")
    run.tell(ev.Resized(1, 3))
    assert killed(run) == ["w3"]
    run.tell(ev.Resized(1, 2))
    assert run.one(act.Retire) == act.Retire("w2")
    assert run.all(act.EndLease) == []
    run.tell(ev.Resized(1, 1))
    run.report("w0", 5, LeaseEnd.ENDED_EARLY)
    run.report("w1", 5, LeaseEnd.ENDED_EARLY)
    assert run.lease.members == ("w0",)
    run.beat("w0", step=5)
    assert [e.fields["cause"] for e in run.events(EventKind.REFORMED)] == ["resize"]


def test_smaller_run_keeps_younger_workers_rather_than_older_demands() -> None:
    run = Run(max_workers=4).training("w0")
    run.ready("w3")
    run.tell(ev.Resized(1, 2))
    assert killed(run) == ["w1", "w2"]
    assert set(run.members) == {"w0", "w3"}


def test_lower_minimum_starts_a_run_that_waits() -> None:
    run = Run(min_workers=3)
    run.ready("w0")
    run.tell(ev.Resized(1, 3))
    assert run.lease.members == ("w0",)


@pytest.mark.parametrize(("low", "high"), [(0, 2), (3, 2), (-1, -1)])
def test_impossible_size_is_ignored_with_a_note(low: int, high: int) -> None:
    run = Run(max_workers=2).training("w0", "w1")
    actions = run.tell(ev.Resized(low, high))
    assert [type(a) for a in actions] == [act.Emit]
    assert f"{low}..{high}" in run.events(EventKind.NOTE)[0].message
    assert (run.control.status()["min_workers"], run.control.status()["max_workers"]) == (1, 2)


# -- strangers, late and repeated messages -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        ev.MemberStarted("zombie", "n0", 7),
        ev.MemberReady(ReadyReport("zombie", "n0", 7, "p")),
        ev.Beat(Heartbeat("zombie", None, Phase.COMPUTE, 3, 3)),
        ev.Reported(LeaseReport("zombie", Generation(0, 1), LeaseEnd.COMPLETED, 9, True)),
    ],
)
def test_sign_of_life_of_a_stranger_is_answered_with_a_kill(event: ev.Input) -> None:
    run = Run().training("w0")
    assert run.tell(event) == [act.KillMember("zombie")]


@pytest.mark.parametrize(
    "event",
    [
        ev.MemberFailed("zombie", "process died", proof=True),
        ev.ConnectionLost("zombie"),
        ev.ConnectionRestored("zombie"),
        ev.Saved(1, "zombie", ok=False),
        ev.DrainRequested(member_id="zombie"),
        ev.DrainRequested(node_id="nowhere"),
    ],
)
def test_other_news_of_a_stranger_changes_nothing(event: ev.Input) -> None:
    assert Run().training("w0").tell(event) == []


def test_member_that_is_gone_stays_gone() -> None:
    run = Run().training("w0", "w1")
    run.wait(1.2, beating="w0")
    run.report("w0", 5, LeaseEnd.FENCED)
    assert run.beat("w1") == [act.KillMember("w1")]
    assert "w1" not in run.members


def test_report_of_an_earlier_generation_is_ignored() -> None:
    run = Run().training("w0", "w1")
    earlier = run.lease.generation
    run.report("w0", 5)
    run.report("w1", 5)
    assert run.report("w0", 99, LeaseEnd.POISONED, generation=earlier) == []
    assert run.members["w0"]["state"] == "active"


def test_repeated_report_does_not_stand_for_another_members() -> None:
    run = Run().training("w0", "w1")
    run.report("w0", 5)
    run.report("w0", 5)
    assert not run.granted


def test_repeated_readiness_is_one_joiner() -> None:
    run = Run().training("w0")
    run.ready("w1")
    run.ready("w1")
    assert len(run.events(EventKind.MEMBER_READY)) == 1


def test_late_start_message_does_not_set_a_ready_member_back() -> None:
    run = Run()
    run.tell(ev.MemberReady(ReadyReport("w0", "n0", 7, "p")))
    run.start("w0", "n0")
    assert run.members["w0"]["state"] == "active"


def test_beat_that_a_report_has_overtaken_sets_nobody_back() -> None:
    run = Run().training("w0", "w1")
    run.report("w0", 8, LeaseEnd.BROKEN)
    run.beat("w0", Phase.REDUCE, 7)  # by the lifeline; the report came as the answer to a call
    run.report("w1", 8, LeaseEnd.FENCED)
    assert (run.lease.members, run.lease.start_step) == (("w0", "w1"), 8)


def test_beat_that_a_report_has_overtaken_makes_no_torn_state_whole() -> None:
    run = Run().training("w0", "w1")
    run.report("w0", 8, LeaseEnd.BROKEN, whole=False)
    run.beat("w0", Phase.OPTIMIZER, 7)
    run.report("w1", 8, LeaseEnd.FENCED)
    assert (run.lease.source, run.lease.receivers) == (1, (0,))


# -- for people --------------------------------------------------------------------------------------------------------


def test_status_tells_what_there_is() -> None:
    run = Run(max_workers=3).training("w0")
    run.start("w1", "n1")
    run.tell(ev.DrainRequested(member_id="w0"))
    status = run.control.status()
    members = status.pop("members")
    assert status == {
        "generation": "0.1", "mode": "ending", "world_size": 1, "min_workers": 1, "max_workers": 3,
    }  # fmt: skip
    assert members["w0"] == {"state": "active", "node_id": "node-of-w0", "pid": 7, "leaving": "drain"}
    assert members["w1"] == {"state": "starting", "node_id": "n1", "pid": 7, "leaving": None}
    assert members["w2"] == {"state": "pending", "node_id": None, "pid": None, "leaving": None}


def test_paces_are_those_of_members_that_train_and_have_told_theirs() -> None:
    run = Run(max_workers=2).training("w0", "w1")
    assert run.control.paces() == {}
    run.beat("w0", micro_batch_s=0.5)
    assert run.control.paces() == {"w0": (0.5, 4)}
    run.beat("w1", micro_batch_s=0.25)
    assert run.control.paces() == {"w0": (0.5, 4), "w1": (0.25, 4)}
    run.dies("w1")
    assert run.control.paces() == {}  # until there is a lease again


def test_lease_is_told_with_its_split() -> None:
    run = Run()
    run.ready("w0")
    (event,) = run.events(EventKind.LEASE_GRANTED)
    assert event.generation == "0.1"
    assert event.fields == {
        "members": ["w0"], "start_step": 0, "stop_step": 100, "shares": [8], "world_size": 1,
    }  # fmt: skip


def test_replaced_reader_is_told() -> None:
    run = Run().training("w0")
    run.tell(ev.ReaderReplaced("r0", "r1", "process died"))
    (event,) = run.events(EventKind.READER_REPLACED)
    assert event.fields == {"reader_id": "r0", "replacement": "r1", "cause": "process died"}


# -- taking over from an earlier coordinator ---------------------------------------------------------------------------


def found(*member_ids: str, **fields: Any) -> Run:
    """A successor that has called these, before its first tick."""
    run = Run(ticks=False, owner_epoch=2, **fields)
    for member_id in member_ids:
        run.tell(ev.MemberFound(member_id, f"node-of-{member_id}", 7))
    run.tick()
    return run


def returns(run: Run, member_id: str, step: int, *, whole: bool = True, probe: str = "p") -> list[act.Action]:
    ready = ReadyReport(member_id, f"node-of-{member_id}", 7, probe, {}, startup_s=1.0)
    return run.tell(ev.MemberReturned(ReturnReport(ready, step, whole, micro_batch_s=0.1)))


def test_fork_without_a_checkpoint_goes_on_with_what_a_worker_holds() -> None:
    run = found("w0", "w1", begins_elsewhere=True)
    returns(run, "w1", 0, whole=False)
    assert not run.all(act.Grant)
    returns(run, "w0", 40)
    assert (run.lease.start_step, run.lease.restore) == (40, None)
    assert not run.all(act.FindCheckpoint)


def test_fork_without_a_checkpoint_never_begins_anew() -> None:
    run = found("w0", "w1", begins_elsewhere=True)
    returns(run, "w1", 0, whole=False)
    run.dies("w0")
    run.wait(run.spec.join_batch_s, beating="w1")
    assert len(run.all(act.FindCheckpoint)) == 1
    assert not run.all(act.Grant)
    run.tell(ev.CheckpointFound(None, (), "failed", "the state it was forked with is not there"))
    assert run.one(act.Finish).verdict == act.Verdict("failed", "the state it was forked with is not there", 0)


def test_fork_whose_checkpoint_comes_back_goes_on_from_it() -> None:
    run = Run(begins_elsewhere=True)
    run.ready("w0")
    assert not run.all(act.Grant)
    run.tell(ev.CheckpointFound(20))
    assert run.one(act.GoBack) == act.GoBack(20)
    assert run.lease.restore == 20


def test_successor_asks_for_nobody_in_the_place_of_those_it_found() -> None:
    run = found("w2", "w5")
    assert [action.member_id for action in run.all(act.StartMember)] == ["w6"]  # three are wanted


def test_successor_waits_for_everybody_who_may_hold_a_state() -> None:
    run = found("w0", "w1")
    returns(run, "w0", 7)
    assert not run.all(act.Grant)
    returns(run, "w1", 7)
    assert run.lease == Lease(
        Generation(2, 1), ("w0", "w1"), None, 7, 100, ((0, 1, 2, 3), (4, 5, 6, 7)), source=None, restore=None
    )


def test_successor_does_not_wait_for_one_that_still_warms_up() -> None:
    run = found("w0", "w1")
    run.beat("w1", Phase.STARTING)
    returns(run, "w0", 7)
    assert run.lease.members == ("w0",) and run.lease.start_step == 7
    run.listen().wait(0.2, beating="w0")
    returns(run, "w1", 0, whole=False)
    run.wait(run.spec.join_batch_s, beating="w0")
    assert run.all(act.EndLease)


def test_member_that_is_one_step_behind_catches_up_with_those_ahead() -> None:
    run = found("w0", "w1")
    returns(run, "w0", 8)
    returns(run, "w1", 7)
    assert (run.lease.members, run.lease.start_step, run.lease.stop_step) == (("w1",), 7, 8)


@pytest.mark.parametrize(("step", "saved"), [(23, [23]), (20, [20]), (17, []), (10, [])])
def test_checkpoint_that_the_coordinator_before_did_not_finish_is_made_at_once(step: int, saved: list[int]) -> None:
    """Or a run whose coordinators die more often than checkpoints are due would have none."""
    run = found("w0", checkpoint_every=10, resume_step=10)
    returns(run, "w0", step)
    assert [a.step for a in run.all(act.SaveCheckpoint)] == saved
    assert run.lease.start_step == step


def test_member_that_does_not_answer_is_lost_and_the_others_go_on() -> None:
    run = found("w0", "w1")
    returns(run, "w0", 7)
    run.wait(RETURN_S + 2 * SCAN_S, beating="w0", phase=Phase.WAITING)
    assert [action.member_id for action in run.all(act.KillMember)] == ["w1"]
    assert run.lease.members == ("w0",)


def test_member_that_has_just_returned_is_waited_for_as_long_as_one_that_returns() -> None:
    """Its coordinator has yet to see how late beats come here."""
    run = found("w0", "w1")
    for member_id in ("w0", "w1"):
        returns(run, member_id, 7)
    run.wait(RETURN_S - 2 * SCAN_S, beating="w0", phase=Phase.REDUCE)
    assert not run.all(act.KillMember)
    run.wait(4 * SCAN_S, beating="w0", phase=Phase.REDUCE)
    assert [action.member_id for action in run.all(act.KillMember)] == ["w1"]


def test_member_that_returned_a_while_ago_is_waited_for_as_long_as_any() -> None:
    run = found("w0", "w1")
    for member_id in ("w0", "w1"):
        returns(run, member_id, 7)
    while run.now < 1_000.0 + SETTLING_S:
        run.beat("w1", Phase.REDUCE)
        run.wait(SCAN_S, beating="w0", phase=Phase.REDUCE)
    run.wait(run.spec.heartbeat_timeout_s + 2 * SCAN_S, beating="w0", phase=Phase.REDUCE)
    assert [action.member_id for action in run.all(act.KillMember)] == ["w1"]


def test_member_that_lives_and_does_not_leave_its_lease_is_lost_as_after_a_fence() -> None:
    run = found("w0", "w1", progress_timeout_s=20.0, start_timeout_s=600.0)
    returns(run, "w0", 7)
    while not run.all(act.KillMember):
        run.beat("w1", Phase.REDUCE, progress=5)
        run.wait(0.2, beating="w0", phase=Phase.WAITING)
        assert run.now < 1_021.0
    assert [action.member_id for action in run.all(act.KillMember)] == ["w1"]
    assert run.now > 1_020.0 and run.lease.members == ("w0",)


def test_nobody_that_may_hold_the_last_state_is_given_up_before_patience_ends() -> None:
    run = found("w0", progress_timeout_s=30.0)
    run.wait(29.0)
    assert not run.all(act.KillMember)
    run.wait(2.0)
    assert run.all(act.KillMember)


def test_returning_member_is_kept_when_its_node_goes_away_until_it_has_told_what_it_holds() -> None:
    run = found("w0", "w1")
    run.tell(ev.NodeDraining("node-of-w0", 0.0))
    assert not run.all(act.KillMember) and not run.all(act.Retire)
    returns(run, "w1", 7)
    returns(run, "w0", 7)
    assert [action.member_id for action in run.all(act.Retire)] == ["w0"]
    assert run.lease.members == ("w1",)


def test_returning_member_with_other_bits_is_refused() -> None:
    run = found("w0", "w1")
    returns(run, "w0", 7, probe="p")
    returns(run, "w1", 7, probe="q")
    assert [action.member_id for action in run.all(act.KillMember)] == ["w1"]


def test_newcomer_that_is_ready_before_the_state_is_back_does_not_outrank_its_holder() -> None:
    run = found("w0")
    run.ready("w1", probe="q")
    returns(run, "w0", 7, probe="p")
    assert [action.member_id for action in run.all(act.KillMember)] == ["w1"]
    assert (run.lease.members, run.lease.start_step) == (("w0",), 7)


def test_holder_of_a_state_with_other_bits_than_another_holder_is_refused() -> None:
    run = found("w0", "w1")
    run.ready("w2", probe="q")
    returns(run, "w0", 7, probe="p")
    returns(run, "w1", 7, probe="q")
    assert [action.member_id for action in run.all(act.KillMember)] == ["w2", "w1"]


def test_takeover_is_told_with_what_it_cost() -> None:
    run = found("w0")
    run.wait(0.5)
    returns(run, "w0", 7)
    run.beat("w0", step=7)
    (event,) = run.events(EventKind.REFORMED)
    assert (event.fields["cause"], round(event.fields["lost_s"], 1)) == ("coordinator", 0.5)
    (event,) = run.events(EventKind.MEMBER_RETURNED)
    assert (event.step, event.fields["whole"]) == (7, True)


def test_members_of_a_run_that_after_rewind_restore_its_checkpoint_together() -> None:
    run = found("w0", "w1", after_rewind=True, resume_step=40)
    returns(run, "w0", 0, whole=False)
    assert not run.all(act.Grant)
    run.wait(0.5)
    returns(run, "w1", 0, whole=False)
    assert (run.lease.members, run.lease.start_step, run.lease.restore) == (("w0", "w1"), 40, 40)
    run.beat("w0", step=40)
    (event,) = run.events(EventKind.REFORMED)
    assert (event.fields["cause"], round(event.fields["lost_s"], 1)) == ("rewind", 0.5)


def test_frozen_member_of_a_run_that_after_rewind_is_not_waited_for_as_the_last_holder_of_a_state() -> None:
    for after_rewind in (True, False):
        run = found("w0", "w1", after_rewind=after_rewind, resume_step=40, progress_timeout_s=100.0)
        returns(run, "w0", 0, whole=False)
        for _ in range(20):
            run.wait(1.0, beating="w0", phase=Phase.WAITING)
        assert bool(run.all(act.Grant)) == after_rewind


def test_answer_of_a_member_that_was_given_up_is_answered_with_another_kill() -> None:
    run = found("w0", "w1")
    run.dies("w1")
    assert [type(action) for action in returns(run.listen(), "w1", 7)] == [act.KillMember]


# -- a checkpoint that cannot be restored ------------------------------------------------------------------------------


def unrestorable(run: Run, member_id: str, step: int) -> None:
    error = f"CheckpointError: that of step {step} is damaged"
    run.report(member_id, 0, LeaseEnd.UNRESTORABLE, whole=False, error=error, error_step=0)


def test_damaged_checkpoint_is_passed_over_for_one_before_it() -> None:
    run = Run(resume_step=30)
    run.ready("w0")
    run.ready("w1")
    unrestorable(run, "w0", 30)
    run.one(act.FindCheckpoint)
    run.listen().wait(5.0, beating="w0 w1", phase=Phase.WAITING)
    assert not run.granted and not run.all(act.FindCheckpoint)
    run.tell(ev.CheckpointFound(20, ("passing over that of step 30",)))
    assert (run.lease.start_step, run.lease.restore) == (20, 20)
    told = [event.message for event in run.events(EventKind.NOTE)]
    assert told == [
        "passing over that of step 30",
        "The newest state that can be restored is the checkpoint of step 20.",
    ]


def test_without_any_that_can_be_restored_the_run_begins_again() -> None:
    run = Run(resume_step=30)
    run.ready("w0")
    unrestorable(run, "w0", 30)
    run.tell(ev.CheckpointFound(None))
    assert (run.lease.start_step, run.lease.restore) == (0, None)


def test_checkpoint_is_looked_for_once_though_all_report_it() -> None:
    run = Run(resume_step=30, min_workers=2)
    run.ready("w0")
    run.ready("w1")
    unrestorable(run, "w1", 30)
    unrestorable(run, "w0", 30)
    run.one(act.FindCheckpoint)
    assert not run.all(act.Finish)


def test_whole_checkpoint_that_one_worker_could_not_read_is_restored_again_and_once_only() -> None:
    run = Run(resume_step=30)
    run.ready("w0")
    unrestorable(run, "w0", 30)
    run.tell(ev.CheckpointFound(30))
    assert run.lease.restore == 30
    unrestorable(run, "w0", 30)
    verdict = act.Verdict("failed", "CheckpointError: that of step 30 is damaged (twice)", 30)
    assert run.one(act.Finish).verdict == verdict


def test_who_restored_it_after_all_goes_on_with_it() -> None:
    run = Run(resume_step=30, min_workers=2)
    run.ready("w0")
    run.ready("w1")
    unrestorable(run, "w1", 30)
    run.listen().report("w0", 30, LeaseEnd.FENCED)
    assert (run.lease.start_step, run.lease.restore, run.lease.source, run.lease.receivers) == (30, None, 0, (1,))
    assert run.tell(ev.CheckpointFound(20))
    assert not run.all(act.Finish)


def test_checkpoint_that_is_complete_while_another_is_looked_for_is_the_newest() -> None:
    run = Run(resume_step=None, min_workers=1, max_workers=1, checkpoint_every=10).training("w0")
    run.report("w0", 10)
    first = run.save
    run.saved()
    run.report("w0", 20)
    run.tell(ev.Saved(run.save.number, "w0", ok=True))  # its manifest is on its way
    run.tell(ev.Tick())
    second = run.save
    assert second.number != first.number
    run.dies("w0")
    run.listen().ready("w1")
    assert not run.granted  # it is waited for
    run.wait(run.spec.checkpoint_timeout_s + 1, beating="w1", phase=Phase.WAITING)  # and then it is not
    assert run.lease.restore == 10
    unrestorable(run, "w1", 10)
    run.tell(ev.Published(second.number, ok=True))
    run.listen().tell(ev.CheckpointFound(None))
    assert run.lease.restore == 20
    assert not run.all(act.GoBack)


@pytest.mark.parametrize("verdict", ["unavailable", "failed"])
def test_search_that_finds_nothing_out_ends_the_run(verdict: str) -> None:
    run = Run(resume_step=30)
    run.ready("w0")
    unrestorable(run, "w0", 30)
    run.tell(ev.CheckpointFound(None, (), verdict, "no answer"))
    assert run.one(act.Finish).verdict == act.Verdict(verdict, "no answer", 30)


def test_search_that_finds_nothing_out_ends_no_run_that_trains() -> None:
    """One worker restored what the other could not: there is a state, and nothing has to be restored."""
    run = Run(resume_step=30, min_workers=2)
    run.ready("w0")
    run.ready("w1")
    unrestorable(run, "w1", 30)
    run.report("w0", 30, LeaseEnd.FENCED)
    assert run.lease.source == 0
    run.listen().tell(ev.CheckpointFound(None, (), "unavailable", "no answer"))
    assert not run.all(act.Finish)
    (note,) = run.events(EventKind.NOTE)
    assert note.message == "No checkpoint is known that can be restored: no answer."
    run.dies("w0")
    run.listen().dies("w1")
    run.ready("w2")
    run.ready("w3")
    unrestorable(run, "w2", 30)
    run.one(act.FindCheckpoint)  # it is looked for again
    assert not run.all(act.Finish)


def test_stop_waits_for_the_step_that_can_be_restored() -> None:
    run = Run(resume_step=30)
    run.ready("w0")
    unrestorable(run, "w0", 30)
    run.listen().tell(ev.StopRequested("ctrl-c"))
    assert not run.all(act.Finish)
    run.tell(ev.CheckpointFound(20))
    assert run.one(act.GoBack).step == 20
    assert run.one(act.Finish).verdict == act.Verdict("stopped", "ctrl-c", 20)


def test_run_after_rewind_only_when_the_found_one_is_its_newest() -> None:
    run = Run(resume_step=30)
    run.ready("w0")
    unrestorable(run, "w0", 30)
    run.tell(ev.CheckpointFound(30))
    assert not run.all(act.GoBack)
