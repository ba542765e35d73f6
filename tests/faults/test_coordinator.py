"""The coordinator dies or freezes: workers keep what they have, a successor goes on with it, nothing is lost or trained twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from elastic_lm.events.types import Event, EventKind
from elastic_lm.runtime.cluster import LocalCluster
from tests.faults.harness import Fault, HostedRun, Injector, assert_same_bits

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

Start = Callable[..., HostedRun]


def returned(run: HostedRun) -> list[Event]:
    return [event for event in run.events() if event.kind is EventKind.MEMBER_RETURNED]


def assert_taken_over(run: HostedRun) -> None:
    """From memory: whoever was there went on, and nothing was restored."""
    assert run.num_coordinators > 1
    begun = [event for event in run.events() if event.kind is EventKind.RUN_STARTED]
    assert len(begun) == run.num_coordinators
    assert returned(run)


def test_killed_coordinator_costs_no_step_and_no_worker(start: Start, cluster: LocalCluster) -> None:
    run = start(steps=60, kind=HostedRun, checkpoint={"every_steps": 1000})
    Injector(cluster, run).inject([Fault("kill_coordinator", 20), Fault("kill_coordinator", 40)])
    assert_same_bits(run, run.result())
    assert_taken_over(run)
    assert [event.step is not None and event.step >= 20 for event in returned(run)] == [True] * 6
    assert run.count(EventKind.MEMBER_STARTED) == 3


@pytest.mark.parametrize(
    "place",
    [
        "c1:coordinator.grant@10",
        "c1:coordinator.granted@10",
        "c1:coordinator.fence@*",
        "c1:coordinator.save@10",
        "c1:coordinator.publish@*",
        "c1:coordinator.finish@30",
    ],
)
def test_coordinator_killed_at_a_failpoint(start: Start, cluster: LocalCluster, place: str) -> None:
    run = start(steps=30, kind=HostedRun, checkpoint={"every_steps": 10}, failpoints=[f"{place}=kill"])
    if "fence" in place:
        run.await_step(12)
        run.kill_a_worker()
    assert_same_bits(run, run.result())
    assert_taken_over(run)


@pytest.mark.parametrize("point", ["open", "adopted", "grant", "granted"])
def test_successor_killed_at_a_failpoint(start: Start, cluster: LocalCluster, point: str) -> None:
    run = start(steps=40, kind=HostedRun, failpoints=[f"c2:coordinator.{point}@*=kill"])
    Injector(cluster, run).inject([Fault("kill_coordinator", 15)])
    assert_same_bits(run, run.result())
    assert run.num_coordinators == 3
    assert run.count(EventKind.MEMBER_STARTED) == 3


def test_worker_that_dies_with_the_coordinator_is_replaced(start: Start, cluster: LocalCluster) -> None:
    run = start(steps=60, kind=HostedRun)
    Injector(cluster, run).inject([Fault("kill_coordinator", 20), Fault("kill", 20)])
    assert_same_bits(run, run.result())
    assert_taken_over(run)


def test_frozen_worker_does_not_keep_a_successor_waiting_for_ever(start: Start, cluster: LocalCluster) -> None:
    run = start(steps=60, kind=HostedRun)
    Injector(cluster, run).inject([Fault("freeze", 20, victim=1), Fault("kill_coordinator", 20)])
    assert_same_bits(run, run.result())
    assert_taken_over(run)


def test_run_whose_workers_all_die_with_the_coordinator_goes_on_from_its_checkpoint(
    start: Start, cluster: LocalCluster
) -> None:
    run = start(steps=60, kind=HostedRun, checkpoint={"every_steps": 10})
    run.await_status(lambda status: run.count(EventKind.CHECKPOINT_SAVED) > 1, "two checkpoints")
    Injector(cluster, run).inject([Fault("kill_coordinator", 20), Fault("kill_all", 20)])
    assert_same_bits(run, run.result())
    assert not returned(run)


def test_size_that_was_asked_for_holds_under_the_successor(start: Start, cluster: LocalCluster) -> None:
    run = start(steps=80, kind=HostedRun)
    run.await_step(10)
    run.command("scale", min_workers=1, max_workers=2)
    run.await_status(lambda status: status["max_workers"] == 2, "the new size")
    os.kill(run.coordinator_pid(), signal.SIGKILL)
    assert_same_bits(run, run.result())
    leases = [event for event in run.events() if event.kind is EventKind.LEASE_GRANTED]
    assert leases[-1].fields["world_size"] == 2
