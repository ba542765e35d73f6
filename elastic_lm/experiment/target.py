"""What an experiment wants: a figure of one task, on the right side of a number.

Invariant: whatever is not finite, or was not measured, reaches nothing and is better than nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic_lm.config_text import hint
from elastic_lm.errors import ConfigError

HELD_OUT = "held_out"  # the task that a figure alone is of
FORM = "TASK.FIGURE <= NUMBER, e.g. held_out.perplexity <= 30; with <=, <, >= or >"
_TARGET = re.compile(
    r"\s*(?:(?P<task>[\w.-]+)\.)?(?P<figure>[A-Za-z_]\w*)\s*(?P<sign><=|>=|<|>)\s*(?P<bound>[^\s=<>]\S*)\s*"
)


def exact(number: float) -> str:
    """In as few digits as no other number has."""
    return repr(float(number)).removesuffix(".0")


@dataclass(frozen=True)
class Target:
    """`sign`: <=, <, >= or >. The first two want less of the figure, the others more."""

    task: str
    figure: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """From `TASK.FIGURE SIGN NUMBER`; a figure alone is of the task held_out.    Raises: ConfigError."""
        match = _TARGET.fullmatch(text)
        if match is None:
            raise ConfigError(f"target={text!r} is no target; write {FORM}")
        try:
            bound = float(match["bound"])
        except ValueError:
            bound = math.nan
        if not math.isfinite(bound):
            raise ConfigError(f"target={text!r}: {match['bound']} is no finite number; write {FORM}")
        return cls(match["task"] or HELD_OUT, match["figure"], match["sign"], bound)

    def __str__(self) -> str:
        return f"{self.task}.{self.figure} {self.sign} {exact(self.bound)}"

    @property
    def wants_less(self) -> bool:
        return self.sign.startswith("<")

    def check(self, produced: Mapping[str, Sequence[str]]) -> None:
        """Args: `produced`: the figures of each task that is asked.    Raises: ConfigError when mine is none of them."""
        if self.task not in produced:
            raise ConfigError(
                f"target={str(self)!r} is of the task {self.task}, which is not among tasks: {', '.join(produced)}"
                f"{hint(self.task, produced)}; add it there, or name one of them"
            )
        figures = produced[self.task]
        if self.figure not in figures:
            raise ConfigError(
                f"target={str(self)!r}: {self.task} tells no {self.figure}{hint(self.figure, figures)}; it tells "
                f"{', '.join(figures)}"
            )

    def score(self, figures: Mapping[str, Mapping[str, float | None]]) -> float | None:
        """Mine of these, by task and name; None when it is not there or not finite."""
        value = figures.get(self.task, {}).get(self.figure)
        return value if value is not None and math.isfinite(value) else None

    def lacks(self, figures: Mapping[str, Mapping[str, float | None]]) -> str:
        """Why these have no score, in a word or two."""
        return "not finite" if self.figure in figures.get(self.task, {}) else "not told"

    def is_reached(self, score: float | None) -> bool:
        if score is None:
            return False
        match self.sign:
            case "<=":
                return score <= self.bound
            case "<":
                return score < self.bound
            case ">=":
                return score >= self.bound
            case _:
                return score > self.bound

    def shown(self, score: float) -> str:
        """With four decimals, or as many more as tell on which side of my number it is."""
        for decimals in range(4, 18):
            text = f"{score:.{decimals}f}"
            if self.is_reached(float(text)) == self.is_reached(score):
                return f"{score:,.{decimals}f}"
        return exact(score)

    def order(self, score: float) -> float:
        """The smaller, the better."""
        return score if self.wants_less else -score
