"""What a fork's own log does not hold: the steps of its ancestors up to where each was forked, to be shown before its own.

They are part of the curve that led to the fork's weights, and of no figure that says what the fork itself has cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elastic_lm.monitor.held_out import HeldOutScore
from elastic_lm.monitor.history import Point


@dataclass(frozen=True)
class Stretch:
    """Steps [start, stop) that the run `name` has trained on the way to a fork.

    `points`: those that its log tells, in order; `scores`: evaluations on held-out text behind the first of these steps.
    """

    name: str
    url: str
    start: int
    stop: int
    points: tuple[Point, ...]
    scores: tuple[HeldOutScore, ...] = ()

    @property
    def losses(self) -> list[float]:
        """Of the steps that were not left out."""
        return [float(point.fields["loss"]) for point in self.points if not point.fields.get("refused")]

    @property
    def num_tokens(self) -> int:
        return sum(point.tokens for point in self.points)


@dataclass(frozen=True)
class Fork:
    """`run` was made of `parent` when that had applied `step` steps."""

    run: str
    parent: str
    step: int

    def __str__(self) -> str:
        return f"{self.run} was forked here from {self.parent}"


@dataclass(frozen=True)
class Ancestors:
    """Of one run, the oldest first; of a run that is no fork there are none.

    `lacks`: a sentence when the steps before some fork are not known.
    """

    forks: tuple[Fork, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    lacks: str | None = None

    def points(self) -> Iterator[Point]:
        """Of all stretches, in the order of steps."""
        for stretch in self.stretches:
            yield from stretch.points

    @property
    def num_tokens(self) -> int:
        return sum(stretch.num_tokens for stretch in self.stretches)


NONE = Ancestors()
