"""Random faults at random roles, run after run, for as long as SOAK_SECONDS says: `make soak`.

Every run ends with the bits of one that was left alone, with every step logged once, and leaves nothing behind. A run that
does not names the seed to repeat it with. One seed is part of every test run.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from elastic_lm.runtime.cluster import LocalCluster
from tests.faults import proxy as p
from tests.faults.harness import AT_ONCE, Fault, HostedRun, Injector, assert_nothing_left, assert_same_bits
from tests.faults.proxy import FaultyProxy

STEPS = 400
RUN_S = 300.0
SLICE = 220
NODES = 3

# By role; a role is drawn first, so that none is rare because others have more ways to fail.
ROLES: dict[str, tuple[str, ...]] = {
    "worker": ("kill", "freeze", "blink", "kill_all"),
    "reader": ("kill_reader", "freeze_reader"),
    "coordinator": ("kill_coordinator", "freeze_coordinator"),
    "node": ("kill_node", "drain"),
    "saver": ("saver",),
    "store": ("store",),
}
STORE_FAULTS = {
    "refuses all": (p.status(503), ""),
    "refuses checkpoints": (p.status(500), "^PUT .*/checkpoints/"),
    "refuses events": (p.status(503), "^PUT .*/events/"),
    "resets": (p.reset, ""),
    "loses answers": (p.answer_lost, "^PUT "),
    "cuts bodies": (p.truncated, "^GET "),
    "flips a byte of tokens": (
        p.flipped,
        "^GET .*/shards/",
    ),  # once: what is read wrong twice is damaged, and ends a run
}


def schedule_of(seed: int) -> tuple[list[Fault], list[str]]:
    """Four to eight faults with their steps, and the failpoints that stand for those of the savers."""
    draw = random.Random(seed)
    faults, failpoints = [], []
    for step in sorted(draw.randrange(0, STEPS - 60) for _ in range(draw.randint(4, 8))):
        what = draw.choice(ROLES[draw.choice(list(ROLES))])
        if what == "saver":
            failpoints.append(f"w{draw.randrange(5)}:save@*=kill")
        else:
            faults.append(Fault(what, step, draw.randrange(100), after_s=draw.choice([0.0, 0.0, 0.03, 0.1, 0.5])))
    return faults, failpoints


class Soaker(Injector):
    """Has the store fail, too, and replaces nodes."""

    def __init__(self, cluster: LocalCluster, run: HostedRun, proxy: FaultyProxy) -> None:
        super().__init__(cluster, run)
        self._proxy = proxy

    def store(self, fault: Fault, status: dict[str, Any]) -> str:
        name = list(STORE_FAULTS)[fault.victim % len(STORE_FAULTS)]
        what, line = STORE_FAULTS[name]
        once = 1 if what is p.flipped else None
        self._proxy.inject(what, on=line, times=once, seconds=1.0 + fault.victim % 3)
        return f"the store {name}"


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_slice_of_a_soak(
    start: Callable[..., HostedRun], cluster: LocalCluster, proxy: FaultyProxy, on_s3: str
) -> None:
    """A seed with a worker, a reader, a node and the store."""
    done = soak_one(SLICE, start, cluster, proxy, on_s3)
    assert {"kill", "kill_node", "store"} <= set(done)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_soak(start: Callable[..., HostedRun], cluster: LocalCluster, proxy: FaultyProxy, on_s3: str) -> None:
    ends_at = time.monotonic() + float(os.environ["SOAK_SECONDS"])
    total: Counter[str] = Counter()
    for seed in itertools.count(int(os.environ.get("SOAK_SEED", "0"))):
        if time.monotonic() > ends_at:
            break
        done = soak_one(seed, start, cluster, proxy, on_s3)
        total.update(done)
        print(f"seed {seed}: {', '.join(done)}; {sum(total.values())} faults in all; the bits are the same", flush=True)
    print(f"{sum(total.values())} faults: {dict(total.most_common())}", flush=True)
    assert total


def soak_one(
    seed: int, start: Callable[..., HostedRun], cluster: LocalCluster, proxy: FaultyProxy, on_s3: str
) -> list[str]:
    """Returns: the kinds of the faults that were injected; savers that die at their failpoint are not counted."""
    while len(cluster.nodes) < NODES:
        cluster.add_node()
    proxy.calm()
    faults, failpoints = schedule_of(seed)
    run = start(
        kind=HostedRun, steps=STEPS, name=f"soak-{seed}", storage=on_s3, tokens=f"{on_s3}/tokens", failpoints=failpoints,
        checkpoint={"every_steps": 25}, control=AT_ONCE,
        workers={"min": 2, "max": 3, "collectives": "gloo" if seed % 2 else "auto"},
    )  # fmt: skip
    soaker = Soaker(cluster, run, proxy)
    try:
        soaker.inject(faults)
        assert_same_bits(run, run.result(RUN_S))
        assert_nothing_left(cluster)
    except BaseException:
        print(f"seed {seed} failed: {soaker.told}, failpoints {failpoints}; repeat with SOAK_SEED={seed}", flush=True)
        raise
    return [fault.what for fault in faults[: len(soaker.told)]]
