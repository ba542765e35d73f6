"""One run of a rival from its start: a worker joins, then one is killed; and the figures that this gives.

Faults and newcomers come when a rival has trained for some steps; one that saves is always struck as long after a checkpoint.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import common
from jobs import MAX_WORKERS, Job
from timeline import Timeline
from workload import DEFAULT

START_S = 180.0
STEADY_STEPS = 4
SETTLE_S = 0.5  # whoever ended the same step a moment later has told of it


class Stuck(Exception):
    """A run that does not train, where nothing was done to it."""


@dataclass(frozen=True)
class Figures:
    """One measurement of one system: of a rate, a kill, a join, or a whole run. `failure`: why there are no values."""

    system: str
    what: str
    values: dict[str, float] = field(default_factory=dict)
    failure: str = ""


@dataclass(frozen=True)
class System:
    """How it is named in the table, and how it is begun with so many workers."""

    name: str
    begin: Callable[[int], Job]


class Trial:
    """One run of a rival from its start: a join, then a kill; or a kill alone where it does not grow."""

    def __init__(self, system: System, draw: random.Random, limit_s: float, into_interval: int) -> None:
        self._system, self._draw, self._limit_s, self._into_interval = system, draw, limit_s, into_interval

    def measure(self) -> Iterator[Figures]:
        try:
            grew = True
            with self._system.begin(1) as job:
                if job.max_workers == 1:
                    self._steady(job, 1, 2 * STEADY_STEPS)
                    yield from self._rates(job, 1)
                    return
                self._steady(job, 1, STEADY_STEPS)
                join = self._join(job)
                yield join
                if grew := not join.failure:
                    yield from self._rates_and_kill(job)
            if not grew:
                with self._system.begin(MAX_WORKERS) as job:
                    yield from self._rates_and_kill(job)
        except Stuck as stuck:
            yield Figures(self._system.name, "run", failure=str(stuck))

    def _rates_and_kill(self, job: Job) -> Iterator[Figures]:
        self._steady(job, MAX_WORKERS, STEADY_STEPS)
        if job.saves:
            self._await_interval(job)
        yield from self._rates(job, MAX_WORKERS)
        yield self._kill(job)

    def _rates(self, job: Job, num_workers: int) -> Iterator[Figures]:
        for seconds in job.timeline().stretches(num_workers):
            yield Figures(self._system.name, "rate", {"tokens_per_s": DEFAULT.tokens_per_step / seconds})

    def _join(self, job: Job) -> Figures:
        added = job.start_worker(1)
        failure = job.wait(lambda told: told.first(MAX_WORKERS, added), self._limit_s)
        failure = failure or job.wait(lambda told: told.beyond(told.first(MAX_WORKERS, added).ended), self._limit_s)
        if failure:
            return self._failed("join", failure, job)
        return Figures(self._system.name, "join", join_values(job.timeline(), added))

    def _kill(self, job: Job) -> Figures:
        time.sleep(self._draw.uniform(0.0, 1.5))
        victim = self._draw.choice(job.workers())
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        if failure := job.wait(lambda told: told.beyond(killed), self._limit_s):
            return self._failed("kill", failure, job)
        time.sleep(SETTLE_S)
        timeline = job.timeline()
        beyond = timeline.beyond(killed)
        values = {
            "stall_s": beyond.ended - killed,
            "again_s": timeline.again(killed).ended - killed,
            "beyond_work_s": beyond.ended - killed - timeline.usual(beyond.world_size),
            "repeated": timeline.repeated(killed, beyond.ended),
            "lost": job.discarded(killed, beyond.ended),
        }
        return Figures(self._system.name, "kill", values)

    def _steady(self, job: Job, num_workers: int, steps: int) -> None:
        """So many workers have done so many steps."""
        begin = job.timeline().newest()
        failure = job.wait(lambda told: told.world_size() == num_workers and told.newest() >= begin + steps, START_S)
        if failure:
            what = f"{steps} steps of {num_workers} workers"
            raise Stuck(f"{what}: {self._failed(what, failure, job).failure}")

    def _await_interval(self, job: Job) -> None:
        """The same number of steps after a checkpoint, every time: what is repeated depends on that alone."""
        interval, after = common.CHECKPOINT_STEPS, self._into_interval
        done = job.timeline().newest() + 1
        whole = max(1, -(-(done - after) // interval))
        self._steady(job, MAX_WORKERS, whole * interval + after - done)

    def _failed(self, what: str, failure: str, job: Job) -> Figures:
        print(f"{self._system.name}, {what}: {failure}\n{job.tail()}", file=sys.stderr, flush=True)
        return Figures(self._system.name, what, failure=failure)


def join_values(timeline: Timeline, added: float, calm: float | None = None) -> dict[str, float]:
    """Of a worker that had room from then on, and has contributed to two steps at least.

    `calm`: since when nothing else holds the others up, if that is later.
    """
    contributes = timeline.first(MAX_WORKERS, added)
    until = timeline.beyond(contributes.ended)
    return {
        "contributes_s": contributes.ended - added,
        "stall_s": timeline.longest_stall(calm or added, until.ended),
        "repeated": timeline.repeated(added, until.ended),
    }
