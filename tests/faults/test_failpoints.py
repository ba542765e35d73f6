"""A fault at every edge of the protocol, on a real cluster: by name, at a step, with whatever member is there.

The same edges are walked without Ray in tests/engine/test_lease.py; here the whole control path answers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from elastic_lm.engine.rendezvous import RendezvousServer
from elastic_lm.events.types import EventKind
from elastic_lm.runtime import coordinator
from elastic_lm.runtime.cluster import LocalCluster
from tests.faults.harness import AT_ONCE, Run, assert_same_bits

pytestmark = pytest.mark.ray

STEPS = 40

CASES = [
    ["w1:step.begin@12=kill"],
    ["w0:micro_batch@12=kill"],  # w0 hosts nothing: rank 0 is a rank like any other
    ["w1:reduce.begin@12=kill"],
    ["w2:reduce.end@12=kill"],  # the sum is complete: others have applied it, or are about to
    ["w0:optimizer.middle@12=kill"],
    ["w1:step.end@12=kill"],
    ["w1:reduce.end@12=freeze"],
    ["w1:optimizer.middle@12=freeze"],
    ["w0:reduce.end@12=kill", "w1:reduce.end@12=kill"],  # the last survivor may be a step behind both
    ["w0:optimizer.middle@12=kill", "w1:reduce.begin@12=kill"],
    ["w1:lease.begin@0=kill"],
    ["w1:form.begin@0=kill"],
    ["w2:form.begin@0=freeze"],  # the others wait for it while they form
    ["w1:form.end@0=kill"],
    ["w1:warm_up@*=kill"],
    ["w1:warm_up@*=freeze"],  # placed, but never ready
    ["w2:micro_batch@10=exit"],
    ["w1:micro_batch@10=raise"],  # once: no bug, so the run goes on
    ["w0:lease.end@40=kill"],  # the last step is applied, but not told
    ["w0:save@20=kill"],
    ["w1:micro_batch@8=hold:2.5"],  # a thread keeps the interpreter: no heartbeat, no progress, and then both
]


OFTEN = [CASES[number] for number in (4, 6, 8, 12, 18, 19)]  # tests/engine/test_lease.py walks the edges without Ray


@pytest.mark.parametrize(
    "failpoints",
    [pytest.param(case, id="+".join(case), marks=() if case in OFTEN else pytest.mark.thorough) for case in CASES],
)
def test_fault_at_an_edge_keeps_the_bits(
    failpoints: list[str], start: Callable[..., Run], cluster: LocalCluster
) -> None:
    run = start(
        steps=STEPS,
        failpoints=failpoints,
        workers={"min": 3, "max": 3},
        checkpoint={"every_steps": 20},
        control={"backoff_base_s": 0.1, "start_timeout_s": 15.0, **AT_ONCE},
    )
    assert_same_bits(run, run.result())
    assert_lost(failpoints, run)


@pytest.mark.parametrize(
    "failpoints",
    [
        pytest.param(
            ["w0:copy.send@*=kill"], marks=pytest.mark.thorough
        ),  # the source dies with half of the state sent
        pytest.param(["w0:copy.send@*=freeze"], marks=pytest.mark.thorough),
        ["w3:copy.receive@*=kill"],  # the joiner dies with half of it received
        pytest.param(["w3:copy.receive@*=freeze"], marks=pytest.mark.thorough),
        pytest.param(["w3:form.begin@*=kill"], marks=pytest.mark.thorough),
        ["w3:form.end@*=kill", "w1:form.end@*=delay:0.05"],
    ],
    ids="+".join,
)
def test_fault_while_joining_keeps_the_bits(
    failpoints: list[str], start: Callable[..., Run], cluster: LocalCluster
) -> None:
    """w3 joins the three that train; it or its source fails on the way in."""
    run = start(steps=STEPS, failpoints=failpoints, workers={"min": 3, "max": 3}, control=AT_ONCE, held_at=10)
    run.await_step(10)
    run.command("scale", min_workers=1, max_workers=4)
    run.await_status(lambda status: status["members"].get("w3", {}).get("state") == "ready", "w3 ready to join")
    assert_same_bits(run, run.result())
    assert_lost(failpoints, run)


@pytest.mark.parametrize("lives_s", [0.0, pytest.param(0.005, marks=pytest.mark.thorough)])
def test_store_that_dies_while_members_form_costs_no_member(
    lives_s: float, start: Callable[..., Run], cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed before they have come, or while they meet: they report it, and form again around another store."""
    dying: list[RendezvousServer] = []

    class DyingServer(RendezvousServer):
        def __init__(self, host: str) -> None:
            super().__init__(host)
            if len(dying) < 2:
                dying.append(self)
                threading.Timer(lives_s, self.close).start()

    monkeypatch.setattr(coordinator, "RendezvousServer", DyingServer)
    # Who comes too late knocks at a closed port until forming is over.
    run = start(steps=STEPS, workers={"min": 3, "max": 3}, control={"form_timeout_s": 2.0})
    assert_same_bits(run, run.result())
    assert len(dying) == 2
    assert run.count(EventKind.MEMBER_LOST) == 0


def assert_lost(failpoints: list[str], run: Run) -> None:
    """Every member that a failpoint was to end was lost, so the fault did happen."""
    expected = {text.split(":")[0] for text in failpoints if text.endswith(("=kill", "=freeze", "=exit"))}
    lost = {event.fields["member_id"] for event in run.events() if event.kind is EventKind.MEMBER_LOST}
    assert expected <= lost
