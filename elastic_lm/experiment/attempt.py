"""One attempt of an experiment as it was made: how it began, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_lm.experiment.plan import Planned
from elastic_lm.experiment.target import Target

DONE = "done"
# Verdicts of a run that are a result: it came to nothing, and would again. With any other but `done` it may go on.
FAILURES = ("poisoned", "spiked", "failed_bug", "refused")
# Verdicts that may pass: a result when the run comes to one of them at the same step again.
PASSING = ("failed", "unavailable", "data_error")

Figures = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Begun:
    """What was decided when an attempt began. `parent`: number of the attempt that it forks, with the step; None: from scratch.

    `note`: why it is not what the plan says, if so. `time_s`: unix time.
    """

    number: int
    parent: int | None = None
    parent_step: int | None = None
    note: str | None = None
    time_s: float = 0.0


@dataclass(frozen=True)
class Trouble:
    """What interrupted an attempt, and may pass. `verdict`: its run's, or what an error is called; `step`: where that was."""

    number: int
    verdict: str
    message: str
    step: int | None = None
    time_s: float = 0.0

    def is_like(self, other: Trouble) -> bool:
        """Whether it came to the same at the same place."""
        return (self.verdict, self.step) == (other.verdict, other.step)


@dataclass(frozen=True)
class Ended:
    """What came of an attempt. `verdict`: its run's, or that of a trouble that came twice; `refused` when its changes do not fit
    its parent.

    `score`: the target's figure; None when it has none, or none that is finite. `figures`: all, by task. `tokens` and
    `seconds`: what it has trained on and how long its run was trained, without evaluation.
    """

    number: int
    verdict: str
    message: str
    score: float | None = None
    step: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)
    time_s: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """One of a plan's attempts, and how far it is. `same_as`: an earlier one that it would only repeat; it is not made then."""

    planned: Planned
    run: str
    begun: Begun | None = None
    ended: Ended | None = None
    same_as: int | None = None

    @property
    def number(self) -> int:
        return self.planned.number

    @property
    def score(self) -> float | None:
        return None if self.ended is None else self.ended.score

    @property
    def parent(self) -> int | None:
        """Number of the attempt that it is a fork of."""
        return None if self.begun is None else self.begun.parent

    @property
    def is_under_way(self) -> bool:
        return self.begun is not None and self.ended is None

    @property
    def is_waiting(self) -> bool:
        """Whether it is still to be made."""
        return self.begun is None and self.same_as is None

    @property
    def state(self) -> str:
        """In a word or two: the verdict, once there is one."""
        if self.ended is not None:
            return self.ended.verdict
        if self.same_as is not None:
            return f"as attempt {self.same_as}"
        return "not begun" if self.begun is None else "under way"

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        ended = {} if self.ended is None else asdict(self.ended)
        begun = {"parent": None, "parent_step": None, "note": None}
        if self.begun is not None:
            begun = {name: getattr(self.begun, name) for name in begun}
        told = {"number": self.number, "run": self.run, "state": self.state, **begun}
        changed = {"changes": self.planned.changes, "skip": [list(each) for each in self.planned.skip]}
        return {**told, **changed, **{name: ended.get(name) for name in ENDS}}


ENDS = ("score", "step", "tokens", "seconds", "figures", "message")


def best(attempts: Sequence[Attempt], target: Target) -> Attempt | None:
    """That with the best score, of equal ones the first; None when none has any."""
    scored = [(target.order(each.score), each.number, each) for each in attempts if each.score is not None]
    return min(scored, key=lambda each: each[:2])[2] if scored else None


def parent_of(how: str, earlier: Sequence[Attempt], target: Target) -> Attempt | None:
    """The attempt to fork; None when there is none that has a score. `how`: as in the plan, but not scratch."""
    scored = [each for each in earlier if each.score is not None]
    if how == "best":
        return best(scored, target)
    if how == "base":
        return next((each for each in scored if each.number == 0), None)
    return scored[-1] if scored else None


def tokens_of(attempts: Sequence[Attempt]) -> int:
    return sum(each.ended.tokens for each in attempts if each.ended is not None)


def seconds_of(attempts: Sequence[Attempt]) -> float:
    return math.fsum(each.ended.seconds for each in attempts if each.ended is not None)
