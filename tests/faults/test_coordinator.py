"""The coordinator dies or freezes: workers keep what they have, a successor goes on with it, nothing is lost or trained twice."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from elastic_lm.errors import SupersededError
from elastic_lm.events.types import Event, EventKind
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.runtime.coordinator import AWAY_S
from elastic_lm.runtime.roster import Reassurance, Roster
from tests.faults.harness import AT_ONCE, WAIT_S, Fault, HostedRun, Injector, assert_same_bits

pytestmark = pytest.mark.ray

Start = Callable[..., HostedRun]
STEPS = 150  # of about 10 ms: nobody is done before a successor has begun


def returned(run: HostedRun) -> list[Event]:
    return [event for event in run.events() if event.kind is EventKind.MEMBER_RETURNED]


def num_attempts(run: HostedRun) -> int:
    return run.count(EventKind.RUN_STARTED)


@pytest.mark.thorough
def test_killed_coordinator_costs_no_step_and_no_worker(start: Start) -> None:
    run = start(steps=STEPS, kind=HostedRun, checkpoint={"every_steps": 1000})
    run.await_step(30)
    run.await_logged(EventKind.MEMBER_STARTED, 3)
    pid = run.coordinator_pid()
    os.kill(pid, signal.SIGKILL)
    run.await_successor(pid)
    run.await_step(60)
    run.await_logged(EventKind.MEMBER_RETURNED, 3)
    os.kill(run.coordinator_pid(), signal.SIGKILL)
    assert_same_bits(run, run.result())
    assert num_attempts(run) == run.num_coordinators == 3
    assert [event.step is not None and event.step >= 30 for event in returned(run)] == [True] * 6
    assert run.count(EventKind.MEMBER_STARTED) == 3 and run.count(EventKind.MEMBER_LOST) == 0


EDGES = (
    "coordinator.grant@0", "coordinator.granted@0", "coordinator.save@*", "coordinator.open@*", "coordinator.adopted@*",
    "coordinator.granted@*", "coordinator.publish@*", "coordinator.fence@*",
)  # fmt: skip

END = ("finish", "finished")  # before the verdict is in the log, and behind that


def test_coordinators_killed_one_after_the_other_at_every_edge(start: Start) -> None:
    failpoints = [f"c{number}:{edge}=kill" for number, edge in enumerate(EDGES, start=1)]
    failpoints += [f"c{len(EDGES) + 1 + number}:coordinator.{edge}@*=kill" for number, edge in enumerate(END)]
    run = start(steps=2 * STEPS, kind=HostedRun, checkpoint={"every_steps": 20}, failpoints=failpoints)
    last = f"{len(EDGES)}."

    def is_at_the_last_edge(status: dict[str, Any]) -> bool:
        """And nobody is about to end a lease, so that there is one to fence."""
        is_lease = status["generation"].startswith(last) and status["mode"] == "leased"
        return is_lease and status["step"] == 2 * STEPS - 1

    run.await_status(is_at_the_last_edge, "the last edge")
    run.kill_a_worker()
    assert_same_bits(run, run.result())
    assert run.num_coordinators == len(EDGES) + len(END) + 1
    assert run.count(EventKind.MEMBER_STARTED) <= 5  # three, and one in the place of the one that was killed


@contextlib.contextmanager
def without_a_coordinator(run: HostedRun) -> Iterator[None]:
    """It stands still, and is dead in the end: it sees nothing of what happens."""
    pid = run.coordinator_pid()
    os.kill(pid, signal.SIGSTOP)
    yield
    os.kill(pid, signal.SIGKILL)


def test_worker_that_dies_with_the_coordinator_and_one_that_freezes(start: Start, cluster: LocalCluster) -> None:
    run = start(steps=STEPS, kind=HostedRun, control=AT_ONCE)
    run.await_three_at_work(20)
    with without_a_coordinator(run):
        Injector(cluster, run).inject([Fault("freeze", 20, victim=1), Fault("kill", 20, victim=0)])
    assert_same_bits(run, run.result())
    assert len(returned(run)) == 1


def test_run_whose_workers_all_die_with_the_coordinator_goes_on_from_its_checkpoint(
    start: Start, cluster: LocalCluster
) -> None:
    run = start(steps=STEPS, kind=HostedRun, checkpoint={"every_steps": 10})
    run.await_three_at_work(20)
    run.await_logged(EventKind.CHECKPOINT_SAVED, 1)
    with without_a_coordinator(run):
        Injector(cluster, run).inject([Fault("kill_all", 20)])
    assert_same_bits(run, run.result())
    assert not returned(run)


def test_size_that_was_asked_for_holds_under_the_successor(start: Start) -> None:
    run = start(steps=STEPS, kind=HostedRun, held_at=20)
    run.await_step(20)
    run.command("scale", min_workers=1, max_workers=2)
    run.await_status(lambda status: status["max_workers"] == 2, "the new size")
    pid = run.coordinator_pid()
    os.kill(pid, signal.SIGKILL)
    run.await_successor(pid)
    run.await_status(lambda status: status["max_workers"] == 2, "the new size, again")
    assert_same_bits(run, run.result())
    leases = [event for event in run.events() if event.kind is EventKind.LEASE_GRANTED]
    assert leases[-1].fields["world_size"] == 2


def test_drain_that_reaches_a_coordinator_which_sees_to_nothing_any_more_is_its_successors(start: Start) -> None:
    run = start(steps=STEPS, kind=HostedRun, held_at=20, workers={"min": 3, "max": 3})
    leaving = min(run.await_three_at_work(20)["members"])
    with without_a_coordinator(run):
        run.command("drain", member_id=leaving)  # the frozen one waits for it, and gets it
    assert_same_bits(run, run.result())
    left = [event.fields["member_id"] for event in run.events() if event.kind is EventKind.MEMBER_LEFT]
    assert left == [leaving]


@pytest.mark.thorough
@pytest.mark.parametrize("edge", [*EDGES, f"coordinator.finish@{STEPS}"])
def test_coordinator_that_freezes_at_an_edge_is_succeeded(edge: str, start: Start) -> None:
    """The first one where it begins, the second one everywhere else; a worker's death has whoever leads fence."""
    number = 1 if edge.endswith("@0") else 2
    first = [] if number == 1 else ["c1:coordinator.save@20=kill"]
    run = start(
        steps=STEPS, kind=HostedRun, checkpoint={"every_steps": 20},
        failpoints=[*first, f"c{number}:{edge}=freeze", "w0:step.end@80=kill"],
    )  # fmt: skip
    if edge.startswith("coordinator.finish"):
        run.let_go_on()
    run.await_frozen(number)
    assert_same_bits(run, run.result())
    assert run.num_coordinators == number + 1


@pytest.mark.thorough
def test_coordinator_that_thaws_ends_and_touches_nothing(start: Start) -> None:
    run = start(steps=4 * STEPS, kind=HostedRun, checkpoint={"every_steps": 20})
    run.await_step(30)
    run.await_logged(EventKind.MEMBER_STARTED, 3)
    pid, frozen_at = run.freeze_coordinator(), time.monotonic()
    run.await_successor(pid)
    time.sleep(
        max(0.0, frozen_at + 2 * AWAY_S - time.monotonic())
    )  # Ray Train waits for longer before it has another one begin
    os.kill(pid, signal.SIGCONT)
    with pytest.raises(
        SupersededError, match=r"was taken over by owner 2|who owns the run now"
    ):  # whichever it sees first
        ray.get(run.given_up[0], timeout=WAIT_S)
    assert_same_bits(run, run.result())
    assert run.count(EventKind.MEMBER_LOST) == 0 and run.count(EventKind.MEMBER_STARTED) == 3
    assert len(returned(run)) == 3


@pytest.mark.thorough
def test_successor_that_takes_longer_than_workers_wait_finds_them_as_long_as_the_driver_lives(start: Start) -> None:
    run = start(
        steps=STEPS, kind=HostedRun, checkpoint={"every_steps": 1000}, failpoints=["c2:coordinator.open@*=delay:20"],
        control={"orphaned_after_s": 15.0},
    )  # fmt: skip
    run.await_step(20)
    run.await_logged(EventKind.MEMBER_STARTED, 3)
    with Reassurance(Roster(run.config.name)):
        os.kill(run.coordinator_pid(), signal.SIGKILL)
        assert_same_bits(run, run.result())
    assert len(returned(run)) == 3 and run.count(EventKind.MEMBER_STARTED) == 3
