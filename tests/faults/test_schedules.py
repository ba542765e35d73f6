"""Faults at chosen and at random moments: the run ends with the bits of one that was left alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from elastic_lm.runtime.cluster import LocalCluster
from tests.faults.harness import AT_ONCE, Fault, HostedRun, Injector, Run, assert_same_bits

pytestmark = pytest.mark.ray

STEPS = 150
WHATS = (
    "kill", "kill", "freeze", "drain", "scale", "blink", "kill_reader", "kill_all", "kill_coordinator",
    "freeze_coordinator",
)  # fmt: skip


def random_schedule(seed: int) -> list[Fault]:
    """Two to five faults; some come within 100 ms of another."""
    draw = random.Random(seed)
    steps = sorted(draw.randrange(0, STEPS - 20) for _ in range(draw.randint(2, 5)))
    faults = []
    for step in steps:
        what = draw.choice(WHATS)
        faults.append(Fault(what, step, draw.randint(1, 4) if what == "scale" else draw.randrange(4)))
        if draw.random() < 0.3:
            faults.append(Fault("kill", step, draw.randrange(4), after_s=draw.choice([0.0, 0.03, 0.1])))
    return faults


CHOSEN = {
    "two at once": [Fault("kill", 30, 0), Fault("kill", 30, 1)],
    "two within 100 ms": [Fault("kill", 30, 0), Fault("kill", 30, 1, after_s=0.08)],
    "all at once": [Fault("kill_all", 60)],
    "first rank, then its successor": [Fault("kill", 20, 0), Fault("kill", 60, 0)],
    "freeze": [Fault("freeze", 30, 1)],
    "freeze and kill at once": [Fault("freeze", 30, 1), Fault("kill", 30, 0)],
    "short freeze": [Fault("blink", 30, 1)],
    "drain, then scale up": [Fault("drain", 20, 1), Fault("scale", 50, 4)],
    "node": [Fault("kill_node", 30, 1)],
    "node and a new one": [Fault("kill_node", 20, 0), Fault("add_node", 30)],
    "readers": [Fault("kill_reader", 20, 0), Fault("freeze_reader", 60, 1)],
}


OFTEN = ("all at once", "freeze and kill at once", "node and a new one")


@pytest.mark.parametrize(
    "name", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.thorough) for name in CHOSEN]
)
def test_chosen_schedule_keeps_the_bits(name: str, start: Callable[..., Run], cluster: LocalCluster) -> None:
    check(CHOSEN[name], start, cluster)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(10))
def test_random_schedule_keeps_the_bits(seed: int, start: Callable[..., Run], cluster: LocalCluster) -> None:
    collectives = "gloo" if seed % 2 else "auto"  # as on several machines, or in memory that all members share
    workers = {"min": 2, "max": 3, "collectives": collectives}
    check(random_schedule(seed), start, cluster, kind=HostedRun, steps=2 * STEPS, workers=workers)


def check(
    schedule: list[Fault], start: Callable[..., Run], cluster: LocalCluster, *, steps: int = STEPS, **changes: Any
) -> None:
    run = start(steps=steps, control=AT_ONCE, **changes)
    injector = Injector(cluster, run)
    injector.inject(schedule)
    result = run.result()
    print("\n".join(injector.told))  # shown when the test fails
    assert len(injector.told) == len(schedule), "the run ended before every fault was injected"
    assert_same_bits(run, result)
