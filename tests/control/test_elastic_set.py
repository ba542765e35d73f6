"""Members come and go: whom the run asks for, keeps, and lets go, with nothing said of leases."""

from __future__ import annotations

from typing import Any

from elastic_lm.control import actions as act
from elastic_lm.control.admission import Admission
from elastic_lm.control.elastic_set import NODE_LOSS_S, ElasticSet
from elastic_lm.control.membership import MemberState
from elastic_lm.control.saving import Saving
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import EventKind
from elastic_lm.protocol import ReadyReport
from tests.control.told import Told

NOW = 1_000.0


class Scene:
    """An elastic set, and what it said."""

    def __init__(self, *, first_number: int = 0, **fields: Any) -> None:
        usual = {"min_workers": 1, "max_workers": 3, "num_micro_batches": 8, "total_steps": 100}
        spec = ControlSpec(**{**usual, **fields})
        self.done: list[act.Action] = []
        self.told = Told()
        self.saving = Saving(spec, None, self.done.append, self.told)
        self.members = ElasticSet(spec, first_number, self.saving, self.done.append, self.told)
        self.members.ask_for_missing(NOW)

    def ready(self, *member_ids: str, node_id: str = "n0") -> Scene:
        for member_id in member_ids:
            self.members.started(self.members[member_id], node_id, 7, NOW)
            self.members.ready(self.members[member_id], ReadyReport(member_id, node_id, 7, "p", startup_s=1.0), NOW)
        return self.listen()

    def listen(self) -> Scene:
        self.done.clear()
        self.told.clear()
        return self


def test_one_demand_for_each_missing_worker_under_ids_that_were_never_used() -> None:
    scene = Scene(first_number=2)
    assert scene.done == [act.StartMember("w2"), act.StartMember("w3"), act.StartMember("w4")]
    scene.ready("w2", "w3", "w4")
    scene.members.ask_for_missing(NOW)
    assert scene.done == []
    scene.members.remove(scene.members["w3"], NOW, crash=True)
    scene.members.ask_for_missing(NOW)
    assert scene.done == [act.KillMember("w3"), act.StartMember("w5")]


def test_member_of_an_earlier_coordinator_keeps_its_id_and_its_place() -> None:
    scene = Scene(max_workers=1)
    scene.members.found("w7", "n0", 7, NOW, begins_anew=False)
    assert scene.members["w7"].state is MemberState.RETURNING
    scene.listen().members.resize(1, 3)
    scene.members.ask_for_missing(NOW)
    assert scene.done == [act.StartMember("w8")]


def test_sign_of_life_from_one_that_is_gone_is_answered_with_another_kill() -> None:
    scene = Scene().ready("w0")
    member = scene.members.heard_from("w0")
    assert member is not None and not scene.done
    scene.members.remove(member, NOW, crash=False)
    assert scene.listen().members.heard_from("w0") is None
    assert scene.done == [act.KillMember("w0")]


def test_who_drains_leaves_at_once_unless_it_trains_or_holds_the_last_state() -> None:
    scene = Scene().ready("w0", "w1")
    active, holder, pending = (scene.members[name] for name in ("w0", "w1", "w2"))
    active.begin(NOW)
    holder.whole = True
    scene.members.drain([active, holder, pending], "drain")
    assert list(scene.members) == ["w0", "w1"] and scene.done == [act.KillMember("w2")] and not scene.told
    active.whole = True
    scene.members.let_go()
    assert list(scene.members) == ["w0", "w1"], "nobody stays with the state"
    active.leaving = None
    scene.members.let_go()
    assert list(scene.members) == ["w0"] and scene.done[1:] == [act.Retire("w1")]
    assert scene.told.kinds() == [EventKind.MEMBER_LEFT]


def test_state_is_the_last_while_the_other_holder_may_be_dead() -> None:
    scene = Scene().ready("w0", "w1")
    first, second = scene.members["w0"], scene.members["w1"]
    assert not scene.members.is_last_whole(first)
    first.whole = second.whole = True
    assert not scene.members.is_last_whole(first)
    second.lost_connection_at = NOW
    assert scene.members.is_last_whole(first)


def test_loss_is_told_with_who_is_left_and_its_node_is_asked_after() -> None:
    scene = Scene().ready("w0", "w1")
    scene.members.lose(scene.members["w1"], "process died", NOW)
    assert scene.done == [act.AskAfterNode("n0"), act.KillMember("w1")]
    assert scene.told[0].message == "w1 is lost (process died): 1 of 2 workers left."
    scene.members.node_lost("n0", NOW + NODE_LOSS_S - 1)
    scene.members.node_lost("n0", NOW + NODE_LOSS_S)
    assert [event.fields["members"] for event in scene.told[1:]] == [["w1"], []]


def test_loss_on_a_node_that_goes_away_is_a_preemption_and_no_crash() -> None:
    scene = Scene(quarantine_failures=1).ready("w0", "w1")
    leaving = scene.members.node_drains("n0")
    assert [m.member_id for m in leaving] == ["w0", "w1"]
    scene.members.lose(leaving[0], "process died", NOW)
    assert scene.told.kinds() == [EventKind.NODE_DRAINING, EventKind.MEMBER_LOST]
    assert scene.told[1].fields["cause"] == "preemption"
    assert scene.members.started(scene.members["w2"], "n0", 7, NOW)


def test_quarantine_makes_demands_anew_elsewhere_and_back_when_it_is_over() -> None:
    scene = Scene(quarantine_failures=1).ready("w0")
    scene.members.lose(scene.members["w0"], "process died", NOW)
    assert scene.told.kinds() == [EventKind.MEMBER_LOST, EventKind.NODE_QUARANTINED]
    assert scene.done[2:] == [act.KillMember("w1"), act.KillMember("w2")]
    scene.listen().members.ask_for_missing(NOW)
    assert scene.done == [act.StartMember(f"w{number}", ("n0",)) for number in (3, 4, 5)]
    scene.listen().members.release_nodes(NOW)
    assert not scene.done
    scene.members.release_nodes(NOW + 1e6)
    scene.members.ask_for_missing(NOW + 1e6)
    assert scene.done[3:] == [act.StartMember(f"w{number}") for number in (6, 7, 8)]


def test_smaller_run_keeps_who_holds_a_state_then_the_eldest() -> None:
    scene = Scene().ready("w0", "w1")
    scene.members["w1"].whole = True
    assert [m.member_id for m in scene.members.resize(1, 1)] == ["w0", "w2"]
    assert (scene.members.min_workers, scene.members.max_workers) == (1, 1)


def test_share_of_a_checkpoint_goes_with_its_owner() -> None:
    scene = Scene().ready("w0", "w1")
    scene.saving.begin([scene.members["w0"]], 7, NOW)
    scene.listen().members.remove(scene.members["w0"], NOW, crash=False)
    assert scene.done == [act.KillMember("w0"), act.AbandonCheckpoint(1, ())]
    assert scene.told[0].message == "Checkpoint of step 7 failed: its worker was lost."


# -- admission ---------------------------------------------------------------------------------------------------------


def report(member_id: str, probe: str, torch: str) -> ReadyReport:
    return ReadyReport(member_id, "n0", 7, probe, {"torch": torch})


def test_first_probe_is_the_runs_and_another_is_refused_with_what_differs() -> None:
    told = Told()
    admission = Admission(ControlSpec(1, 3, 8, 100), told)
    assert admission.admits(report("w0", "p", "2"))
    assert admission.admits(report("w1", "p", "2"))
    other = report("w2", "q", "3")
    assert not admission.admits(other)
    admission.refuse("w2", other)
    assert told[0].message == "w2 computes other bits than the run and is refused: torch=3 (the run: 2)."
    assert Admission(ControlSpec(1, 3, 8, 100, exact=False), told).admits(other)


def test_bits_of_the_state_in_memory_outrank_those_of_a_newcomer() -> None:
    admission = Admission(ControlSpec(1, 3, 8, 100), Told())
    newcomer, holder = report("w1", "q", "3"), report("w0", "p", "2")
    assert admission.prefer(holder) is None  # nobody else was admitted yet
    assert admission.admits(newcomer)
    assert admission.prefer(newcomer) is None
    assert admission.prefer(holder) == newcomer
    assert admission.admits(holder) and not admission.admits(newcomer)
