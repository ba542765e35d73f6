"""A run replayed from its events: series for charts, facts for people. The report and `status` are made of it.

Invariant: computed from the log alone. Of a step that was trained again after a restart the last record counts, and of what a
run went back from nothing does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.goodput import Goodput
from elastic_lm.monitor.held_out import HeldOutScore
from elastic_lm.monitor.progress import news_of

SHORTEST_PART_S = 1.5  # steps are told by heartbeats, a fifth of a second apart: over less, a rate would jump
ROUTINE = ("lease", "checkpoint", "evaluation")  # causes of an interruption that nobody needs to be told of


@dataclass(frozen=True)
class Point:
    """One committed step. `time_s` is seconds since the run's first event, over all attempts and the pauses between them."""

    time_s: float
    step: int
    tokens: int
    fields: dict[str, Any]


@dataclass
class History:
    """What a run's log holds."""

    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    began_s: float = 0.0  # unix time of the first event
    ended_s: float = 0.0  # of the last one
    attempts: int = 0
    verdict: str | None = None
    message: str = ""
    points: list[Point] = field(default_factory=list)
    world_sizes: list[tuple[float, int]] = field(default_factory=list)
    news: list[Event] = field(default_factory=list)
    interruptions: list[Event] = field(default_factory=list)
    checkpoints: list[Event] = field(default_factory=list)
    evaluations: dict[int, HeldOutScore] = field(default_factory=dict)  # by step
    paces: dict[str, list[tuple[float, float, int]]] = field(
        default_factory=dict
    )  # (time, s per micro-batch, how many)
    num_lost: int = 0
    num_mismatches: int = 0
    goodput: Goodput = field(default_factory=lambda: Goodput(1))

    @classmethod
    def of(cls, events: Iterable[Event]) -> History:
        """Replay `events`, in the order of the log."""
        history = cls()
        steps: dict[int, Point] = {}
        for event in events:
            history._take(event, steps)
        history.points = [steps[step] for step in sorted(steps)]
        return history

    def _take(self, event: Event, steps: dict[int, Point]) -> None:
        self.began_s = self.began_s or event.time_s
        self.ended_s = max(self.ended_s, event.time_s)
        self.attempts = max(self.attempts, event.attempt)
        if event.kind is EventKind.RUN_STARTED:
            if not self.config:
                self.goodput = Goodput(event.fields["config"]["batch"]["micro_batches"])
            self.config, self.verdict = event.fields["config"], None
        self.goodput.observe(event)
        if news_of(event) is not None:
            self.news.append(event)
        match event.kind:
            case EventKind.STEP_COMMITTED:
                assert event.step is not None
                steps.pop(event.step, None)
                steps[event.step] = Point(
                    self.since_start(event), event.step, self.goodput.num_tokens(event), event.fields
                )
            case EventKind.MEMBER_READY | EventKind.MEMBER_RETURNED:
                self.environment = self.environment or event.fields.get("environment", {})
            case EventKind.LEASE_GRANTED:
                self.world_sizes.append((self.since_start(event), event.fields["world_size"]))
            case EventKind.REFORMED if event.fields["cause"] not in ROUTINE:
                self.interruptions.append(event)
            case EventKind.WORKER_PACES:
                for member_id, (seconds, count) in event.fields["paces"].items():
                    self.paces.setdefault(member_id, []).append((self.since_start(event), seconds, count))
            case EventKind.MEMBER_LOST:
                self.num_lost += 1
            case EventKind.STEP_MISMATCH:
                self.num_mismatches += 1
            case EventKind.CHECKPOINT_SAVED:
                self.checkpoints.append(event)
            case EventKind.EVALUATED:
                score = HeldOutScore.of(event)
                self.evaluations[score.step] = score
            case EventKind.REWOUND if event.step is not None:
                for step in [step for step in steps if step >= event.step]:
                    del steps[step]
                for step in [step for step in self.evaluations if step > event.step]:
                    del self.evaluations[step]
                self.checkpoints = [saved for saved in self.checkpoints if (saved.step or 0) <= event.step]
            case EventKind.RUN_FINISHED:
                self.verdict, self.message = event.fields["verdict"], event.message
            case _:
                pass

    def since_start(self, event: Event) -> float:
        """Seconds since the run's first event."""
        return event.time_s - self.began_s

    @property
    def num_tokens(self) -> int:
        return sum(point.tokens for point in self.points)

    def data_stall(self) -> float | None:
        """Share of the steps' time for which the member that told them waited for tokens; None before the first step."""
        step_s = sum(point.fields["step_s"] for point in self.points)
        return sum(point.fields["data_wait_s"] for point in self.points) / step_s if step_s > 0 else None

    def tokens_per_s(
        self, most_parts: int = 400, shortest_s: float = SHORTEST_PART_S
    ) -> tuple[list[float], list[float]]:
        """(times, rates): committed tokens per second of wall time, over parts of the run that last about equally long."""
        times: list[float] = []
        rates: list[float] = []
        if not self.points:
            return times, rates
        part_s = max(shortest_s, (self.points[-1].time_s - self.points[0].time_s) / most_parts)
        began_s, tokens = self.points[0].time_s, 0
        for point in self.points[1:]:
            tokens += point.tokens
            if point.time_s - began_s >= part_s:
                times.append(point.time_s)
                rates.append(tokens / (point.time_s - began_s))
                began_s, tokens = point.time_s, 0
        return times, rates
