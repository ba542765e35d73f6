"""The promise without Ray: real processes, real gloo, faults at every edge; the final digest is the undisturbed one's."""

from dataclasses import replace
from pathlib import Path

import pytest

from elastic_lm.engine.lease import Member, run_lease
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.errors import CheckpointError
from elastic_lm.protocol import Generation, Lease, LeaseEnd, Phase
from tests.engine.members import Cluster, EventControl, SyntheticTokens, tiny_spec

pytestmark = pytest.mark.slow

STEPS = 8


@pytest.fixture(params=["auto", "gloo"])
def cluster(request):
    """Members that share memory, as they are all on this machine, and members that talk over sockets."""
    cluster = Cluster(tiny_spec(collectives=request.param))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def undisturbed():
    """Digest and losses of one member alone."""
    cluster = Cluster(tiny_spec())
    cluster.start("w0")
    cluster.grant(["w0"], 0, STEPS)
    report = cluster.report("w0")
    assert report.end is LeaseEnd.COMPLETED
    digest = cluster.digest("w0")
    cluster.close()
    assert digest is not None
    return digest, report.records


def same_steps(records, expected):
    return len(records) == len(expected) and all(a.same_bits(b) for a, b in zip(records, expected, strict=True))


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_world_size_does_not_show_in_the_bits(cluster, undisturbed, world_size):
    names = [f"w{n}" for n in range(world_size)]
    cluster.start(*names)
    cluster.grant(names, 0, STEPS)
    reports = cluster.reports(*names)
    assert {report.end for report in reports.values()} == {LeaseEnd.COMPLETED}
    assert same_steps(reports["w0"].records, undisturbed[1])
    assert {cluster.digest(name) for name in names} == {undisturbed[0]}


def test_lease_without_a_step_brings_the_state_to_a_joiner(cluster, undisturbed):
    """The source stays until all of it is there: behind it the weights may change at once."""
    cluster.start("w0", "w1", "w2")
    cluster.grant(["w0", "w1"], 0, 3)
    assert {report.end for report in cluster.reports("w0", "w1").values()} == {LeaseEnd.COMPLETED}
    names = ["w0", "w1", "w2"]
    copying = cluster.grant(names, 3, 3, source="w0", joiners=("w2",))
    reports = cluster.reports(*names)
    assert {(report.end, report.next_step, report.whole) for report in reports.values()} == {
        (LeaseEnd.COMPLETED, 3, True)
    }
    assert len({cluster.digest(name) for name in names}) == 1
    cluster.grant(names, 3, STEPS, continues=copying.generation)
    assert {report.end for report in cluster.reports(*names).values()} == {LeaseEnd.COMPLETED}
    assert {cluster.digest(name) for name in names} == {undisturbed[0]}


def test_joiner_that_dies_in_a_lease_without_a_step_costs_nobody_a_state(cluster, undisturbed):
    cluster.start("w0", "w1")
    cluster.start("w2", armed=("w2:copy.receive@3=kill",))
    cluster.grant(["w0", "w1"], 0, 3)
    cluster.reports("w0", "w1")
    cluster.grant(["w0", "w1", "w2"], 3, 3, source="w0", joiners=("w2",))
    cluster.wait_dead("w2")
    cluster.fence("w0", "w1")
    reports = cluster.reports("w0", "w1")
    assert {(report.next_step, report.whole) for report in reports.values()} == {(3, True)}
    cluster.grant(["w0", "w1"], 3, STEPS)
    assert {report.end for report in cluster.reports("w0", "w1").values()} == {LeaseEnd.COMPLETED}
    assert {cluster.digest(name) for name in ("w0", "w1")} == {undisturbed[0]}


def test_steps_are_left_out_by_all_in_any_world():
    """Some batches have an infinite loss, in one micro-batch, which one member of several computes."""
    spec = tiny_spec(objective="tests.engine.user_code:infinite_now_and_then", on_nonfinite="skip")
    found = []
    for names in (["w0"], ["w0", "w1", "w2"]):
        cluster = Cluster(spec)
        cluster.start(*names)
        cluster.grant(names, 0, STEPS)
        reports = cluster.reports(*names)
        assert {report.end for report in reports.values()} == {LeaseEnd.COMPLETED}
        (digest,) = {cluster.digest(name) for name in names}
        found.append((digest, [(r.step, r.loss, r.refused, r.grad_norm) for r in reports["w0"].records]))
        cluster.close()
    assert found[0] == found[1]
    assert [step for step, _, refused, _ in found[0][1] if refused] == [1, 5]


# Every edge at which a member can die while it trains; step 3 of 8, members of three.
EDGES = ["lease.begin", "form.begin", "form.end", "step.begin", "micro_batch", "reduce.begin", "reduce.end",
         "optimizer.middle", "step.end"]  # fmt: skip


@pytest.mark.parametrize("victim", ["w0", "w2"])  # w0 is rank 0
@pytest.mark.parametrize("edge", EDGES)
def test_death_at_an_edge_leaves_the_same_bits(cluster, undisturbed, edge, victim):
    names = ["w0", "w1", "w2"]
    step = 0 if edge in ("lease.begin", "form.begin", "form.end") else 3
    cluster.start(*names, armed=(f"{victim}:{edge}@{step}=kill",))
    cluster.grant(names, 0, STEPS)
    cluster.wait_dead(victim)
    survivors = [name for name in names if name != victim]
    cluster.fence(*survivors)
    finish(cluster, survivors, undisturbed)


def finish(cluster, survivors, undisturbed):
    """What control does after a failure: those one step behind redo it among themselves, then everybody goes on."""
    reports = cluster.reports(*survivors)
    assert all(report.end in (LeaseEnd.FENCED, LeaseEnd.BROKEN) for report in reports.values())
    whole = {name: report.next_step for name, report in reports.items() if report.whole}
    fresh = [name for name in survivors if name not in whole]
    if not whole:
        cluster.grant(survivors, 0, STEPS)
    else:
        ahead = max(whole.values())
        behind = [name for name, step in whole.items() if step < ahead]
        assert all(whole[name] == ahead - 1 for name in behind)
        if behind:
            cluster.grant(behind, ahead - 1, ahead)
            assert all(r.end is LeaseEnd.COMPLETED for r in cluster.reports(*behind).values())
        source = next(iter(whole)) if fresh else None
        cluster.grant(survivors, ahead, STEPS, source=source, joiners=tuple(fresh))
    reports = cluster.reports(*survivors)
    assert {report.end for report in reports.values()} == {LeaseEnd.COMPLETED}, reports
    assert {cluster.digest(name) for name in survivors} == {undisturbed[0]}


@pytest.mark.parametrize("edge", ["reduce.end", "step.end"])
def test_survivors_one_step_apart_meet_again(cluster, undisturbed, edge):
    """w1 is held between the completed sum and its update while w0 goes on; then w2 dies."""
    names = ["w0", "w1", "w2"]
    cluster.start(*names, armed=("w1:reduce.end@3=delay:1.0", f"w2:{edge}@3=kill"))
    cluster.grant(names, 0, STEPS)
    cluster.wait_dead("w2")
    cluster.fence("w0", "w1")
    finish(cluster, ["w0", "w1"], undisturbed)


def test_joiner_receives_the_state_and_the_bits_stay(cluster, undisturbed):
    cluster.start("w0", "w1")
    cluster.grant(["w0"], 0, 4)
    first = cluster.report("w0")
    assert first.end is LeaseEnd.COMPLETED
    cluster.grant(["w0", "w1"], 4, STEPS, source="w0", joiners=("w1",), history=first.records)
    reports = cluster.reports("w0", "w1")
    assert {r.end for r in reports.values()} == {LeaseEnd.COMPLETED}
    assert [[r.step for r in report.records] for report in reports.values()] == [list(range(STEPS))] * 2
    assert cluster.digest("w0") == cluster.digest("w1") == undisturbed[0]


@pytest.mark.parametrize(
    "armed",
    [
        "w0:copy.send@4=kill",  # the source dies half way: the joiner is torn and starts again from another
        "w2:copy.receive@4=kill",  # the joiner dies half way: the source notices nothing but a broken group
        "w0:form.begin@4=kill",  # joiner and failure at once
    ],
)
def test_death_during_a_copy_leaves_the_same_bits(cluster, undisturbed, armed):
    names = ["w0", "w1", "w2"]
    victim = armed.split(":")[0]
    cluster.start(*names, armed=(armed,))
    cluster.grant(["w0", "w1"], 0, 4)
    assert {r.end for r in cluster.reports("w0", "w1").values()} == {LeaseEnd.COMPLETED}
    cluster.grant(names, 4, STEPS, source="w0", joiners=("w2",))
    cluster.wait_dead(victim)
    survivors = [name for name in names if name != victim]
    cluster.fence(*survivors)
    finish(cluster, survivors, undisturbed)


def test_vote_of_one_ends_the_lease_of_all_at_one_step(cluster, undisturbed):
    names = ["w0", "w1", "w2"]
    cluster.start(*names, armed=("w0:step.begin@2=delay:0.5",))
    cluster.grant(names, 0, STEPS)
    cluster.tell("end", "w2")
    reports = cluster.reports(*names)
    assert {report.end for report in reports.values()} == {LeaseEnd.ENDED_EARLY}
    (reached,) = {report.next_step for report in reports.values()}
    assert reached < STEPS
    cluster.grant(names, reached, STEPS)
    cluster.reports(*names)
    assert {cluster.digest(name) for name in names} == {undisturbed[0]}


def test_same_members_go_on_in_their_group(cluster, undisturbed):
    """Nobody is there to meet at: no store, and forming would time out."""
    names = ["w0", "w1", "w2"]
    cluster.start(*names)
    lease = cluster.grant(names, 0, 3)
    assert {report.end for report in cluster.reports(*names).values()} == {LeaseEnd.COMPLETED}
    lease = cluster.grant(names, 3, 6, continues=lease.generation)
    cluster.tell("end", "w1")  # a vote may end it early, which is an agreed end, too
    at = {report.next_step for report in cluster.reports(*names).values()}.pop()
    cluster.grant(names, at, STEPS, continues=lease.generation)
    reports = cluster.reports(*names)
    assert {report.end for report in reports.values()} == {LeaseEnd.COMPLETED}
    assert {cluster.digest(name) for name in names} == {undisturbed[0]}


@pytest.mark.parametrize("edge", ["lease.begin", "step.begin", "reduce.begin", "reduce.end", "optimizer.middle"])
def test_death_in_a_group_that_was_kept_leaves_the_same_bits(cluster, undisturbed, edge):
    names = ["w0", "w1", "w2"]
    cluster.start(*names, armed=(f"w1:{edge}@4=kill",))
    lease = cluster.grant(names, 0, 4)
    cluster.reports(*names)
    cluster.grant(names, 4, STEPS, continues=lease.generation)
    cluster.wait_dead("w1")
    cluster.fence("w0", "w2")
    finish(cluster, ["w0", "w2"], undisturbed)


def test_other_members_form_a_group_of_their_own_after_one_was_kept(cluster, undisturbed):
    names = ["w0", "w1", "w2"]
    cluster.start(*names)
    cluster.grant(names, 0, 4)
    cluster.reports(*names)
    cluster.grant(["w0", "w2"], 4, STEPS)
    cluster.reports("w0", "w2")
    assert {cluster.digest(name) for name in ("w0", "w2")} == {undisturbed[0]}


def test_member_without_the_group_that_it_is_to_go_on_in_says_so(cluster, undisturbed):
    names = ["w0", "w1"]
    cluster.start(*names)
    lease = cluster.grant(names, 0, 4)
    cluster.reports(*names)
    cluster.grant(names, 4, STEPS, continues=replace(lease.generation, number=77))
    reports = cluster.reports(*names)
    assert {report.end for report in reports.values()} == {LeaseEnd.BROKEN}
    assert all("has no group of generation 0.77" in report.error and report.whole for report in reports.values())
    cluster.grant(names, 4, STEPS)
    cluster.reports(*names)
    assert {cluster.digest(name) for name in names} == {undisturbed[0]}


def test_fence_during_forming_ends_at_once(cluster):
    """A member is missing for ever: the others must not wait for gloo's timeout."""
    cluster.start("w0", "w1", armed=("w1:form.begin@0=freeze",))
    cluster.grant(["w0", "w1"], 0, STEPS)
    cluster.fence("w0")
    report = cluster.report("w0")
    assert report.end in (LeaseEnd.FENCED, LeaseEnd.BROKEN)
    assert report.next_step == 0


def test_thawed_zombie_changes_nothing(cluster, undisturbed):
    """w1 freezes inside a step, is fenced out, and thaws while the others train: their bits stay."""
    import os
    import signal

    names = ["w0", "w1", "w2"]
    cluster.start(*names, armed=("w1:reduce.begin@3=freeze",))
    cluster.grant(names, 0, STEPS)
    process = cluster.members["w1"].process
    while Path(f"/proc/{process.pid}/stat").read_text().split()[2] != "T":
        pass
    cluster.fence("w0", "w2")
    reports = cluster.reports("w0", "w2")
    assert {r.next_step for r in reports.values()} == {3}
    cluster.grant(["w0", "w2"], 3, STEPS)
    os.kill(process.pid, signal.SIGCONT)
    assert {r.end for r in cluster.reports("w0", "w2").values()} == {LeaseEnd.COMPLETED}
    assert cluster.digest("w0") == cluster.digest("w2") == undisturbed[0]


def test_bug_is_reported_with_its_step_and_the_state_stays_whole(cluster):
    cluster.start("w0", armed=("w0:micro_batch@2=raise",))
    cluster.grant(["w0"], 0, STEPS)
    report = cluster.report("w0")
    assert (report.end, report.error_step, report.whole, report.next_step) == (LeaseEnd.RAISED, 2, True, 2)
    assert "injected at micro_batch" in report.error


def test_non_finite_loss_stops_every_member_before_the_update():
    from dataclasses import replace

    from elastic_lm.engine.spec import OptimizerSpec

    spec = tiny_spec()
    cluster = Cluster(replace(spec, optimizer=OptimizerSpec(learning_rate=1e30, clip_norm=None)))
    try:
        cluster.start("w0", "w1")
        cluster.grant(["w0", "w1"], 0, STEPS)
        reports = cluster.reports("w0", "w1")
        assert {r.end for r in reports.values()} == {LeaseEnd.POISONED}
        assert len({r.next_step for r in reports.values()}) == 1
        assert all(r.whole for r in reports.values())
        assert cluster.digest("w0") == cluster.digest("w1")
    finally:
        cluster.close()


class OtherTokens(SyntheticTokens):
    """What is trained when the run has gone back."""

    def tokens(self, step, micro_batch, cancelled=None):
        return super().tokens(step + 100, micro_batch, cancelled)


def train_alone(member, number, stop):
    lease = Lease(
        Generation(0, number), ("w0",), None, 0, stop, (tuple(range(member.runner.replica.spec.micro_batches)),)
    )
    report = run_lease(member, lease, EventControl())
    assert report.end is LeaseEnd.COMPLETED
    return [told.step for told in report.records]


def test_member_that_starts_over_is_as_a_new_one():
    new = Member("w0", StepRunner(Replica(tiny_spec()), OtherTokens()), restore=lambda step, on_part: {})
    train_alone(new, 1, 4)
    member = Member("w0", StepRunner(Replica(tiny_spec()), SyntheticTokens()), restore=lambda step, on_part: {})
    assert train_alone(member, 1, 6) == list(range(6))
    before = member.state.digest()
    member.start_over(OtherTokens())
    assert (member.state.torn, member.state.next_step, list(member.records)) == (True, 0, [])
    assert train_alone(member, 2, 4) == list(range(4))
    assert member.state.digest() == new.state.digest() != before


def test_member_that_starts_over_leaves_its_group():
    cluster = Cluster(tiny_spec())
    cluster.start("w0", "w1")
    first = cluster.grant(["w0", "w1"], 0, 3)
    cluster.reports("w0", "w1")
    cluster.tell("start over", "w0", "w1")
    cluster.grant(["w0", "w1"], 0, 3, continues=first.generation)
    assert {report.end for report in cluster.reports("w0", "w1").values()} == {LeaseEnd.BROKEN}
    cluster.grant(["w0", "w1"], 0, 3)
    assert {report.end for report in cluster.reports("w0", "w1").values()} == {LeaseEnd.COMPLETED}
    assert cluster.digest("w0") == cluster.digest("w1")
    cluster.close()


class Watch(EventControl):
    """Notes the phases that are reported, and fences after so many."""

    def __init__(self, fence_after: int | None = None) -> None:
        super().__init__()
        self.phases: list[Phase] = []
        self.fence_after = fence_after

    def report(self, phase: Phase) -> None:
        self.phases.append(phase)
        if len(self.phases) == self.fence_after:
            self.fenced.set()


def restoring(num_parts: int) -> Member:
    """A member whose checkpoint of step 3 is in so many parts."""
    saved = Replica(tiny_spec())
    saved.initialise()

    def restore(step, on_part):
        for _ in range(num_parts):
            on_part()
        return saved.state.tensors()

    return Member("w0", StepRunner(Replica(tiny_spec()), SyntheticTokens()), restore)


FROM_3 = Lease(Generation(0, 1), ("w0",), None, 3, 4, (tuple(range(6)),), restore=3)


def test_every_part_that_is_restored_is_progress():
    """And nobody is given up while it waits for storage, however long a large checkpoint takes."""
    watch = Watch()
    assert run_lease(restoring(5), FROM_3, watch).end is LeaseEnd.COMPLETED
    assert watch.phases[: 1 + 5] == [Phase.DATA] * (1 + 5)


def test_fence_ends_a_restore_between_two_parts():
    watch = Watch(fence_after=3)
    report = run_lease(restoring(1_000), FROM_3, watch)
    assert (report.end, report.whole) == (LeaseEnd.FENCED, False)
    assert watch.phases == [Phase.DATA] * 3


def test_checkpoint_that_cannot_be_read_is_told_by_name():
    def restore(step, on_part):
        raise CheckpointError("its part 3 is damaged")

    member = Member("w0", StepRunner(Replica(tiny_spec()), SyntheticTokens()), restore)
    report = run_lease(member, FROM_3, Watch())
    assert (report.end, report.whole) == (LeaseEnd.UNRESTORABLE, False)
    assert report.error == "CheckpointError: its part 3 is damaged"
