"""What an experiment came to, for whoever ran it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elastic_lm.experiment.attempt import Attempt, best
from elastic_lm.experiment.target import Target

REACHED, EXHAUSTED, BUDGET = "reached", "exhausted", "budget"


@dataclass(frozen=True)
class Verdict:
    """How an experiment ended, or why it waits to be gone on with."""

    kind: str
    message: str


@dataclass(frozen=True)
class ExperimentResult:
    """What an experiment came to.

    `verdict`: reached, exhausted (no attempt is left), budget (it is spent), or that of the run which ended it for now: stopped,
    failed, unavailable, data_error, superseded. `best`: the attempt with the best score; `tokens` and `hours`: of all together.
    """

    name: str
    target: Target
    verdict: str
    message: str
    attempts: tuple[Attempt, ...]
    tokens: int
    hours: float
    url: str
    page: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the target is reached."""
        return self.verdict == REACHED

    @property
    def best(self) -> Attempt | None:
        return best(self.attempts, self.target)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        found = self.best
        return {
            "name": self.name,
            "target": str(self.target),
            "verdict": self.verdict,
            "message": self.message,
            "best": None if found is None else found.run,
            "tokens": self.tokens,
            "hours": self.hours,
            "url": self.url,
            "page": self.page,
            "attempts": [each.as_json() for each in self.attempts],
        }
