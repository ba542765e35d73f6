"""What a run did, from the steps it told of: how fast it was, how long a fault or a newcomer held it up, what it did twice.

A step counts when it is beyond every earlier one; until then, whatever it is that the run does, it has not got further.
Any clock will do, as long as it is one.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

SHORTEST_STRETCH = 3  # gaps; a median of fewer is no rate


@dataclass(frozen=True)
class Done:
    """An optimizer step that was applied by `world_size` workers, and when it began and ended."""

    step: int
    began: float
    ended: float
    world_size: int


class Timeline:
    """Steps in the order in which they ended; several workers may tell of the same."""

    def __init__(self, told: Iterable[Done]) -> None:
        self.done = sorted(told, key=lambda done: done.ended)
        self.advances: list[Done] = []
        for done in self.done:
            if not self.advances or done.step > self.advances[-1].step:
                self.advances.append(done)

    def newest(self, at: float = float("inf")) -> int:
        """The last step that was complete then, -1 for none."""
        return max((done.step for done in self.advances if done.ended <= at), default=-1)

    def world_size(self) -> int:
        """Of the step that ended last."""
        return self.done[-1].world_size if self.done else 0

    def beyond(self, at: float) -> Done | None:
        """The first step beyond the last one that was complete then."""
        return next((done for done in self.advances if done.ended > at), None)

    def again(self, after: float) -> Done | None:
        """The first step that began later, a repeated one too."""
        return next((done for done in self.done if done.began > after), None)

    def first(self, world_size: int, after: float) -> Done | None:
        """The first step of so many workers, a repeated one too."""
        return next((done for done in self.done if done.ended > after and done.world_size == world_size), None)

    def repeated(self, after: float, until: float) -> int:
        """How many steps were begun in that time though they had been complete already."""
        begun = (done for done in self.done if after < done.began and done.ended <= until)
        return len({done.step for done in begun if done.step <= self.newest(done.began)})

    def usual(self, world_size: int) -> float:
        """Seconds that a step takes so many workers, the median."""
        return statistics.median(done.ended - done.began for done in self.done if done.world_size == world_size)

    def longest_stall(self, after: float, until: float) -> float:
        """The longest time without a step beyond the last one, less what a step takes; of the gaps that end in that time."""
        late = [
            gap - self.usual(ended.world_size)
            for ended, gap in self._gaps()
            if after < ended.ended and ended.ended <= until
        ]
        return max([0.0, *late])

    def stretches(self, world_size: int) -> Iterator[float]:
        """Median seconds per step in every stretch of time in which so many workers trained."""
        gaps = itertools.groupby(self._gaps(), key=lambda pair: pair[0].world_size)
        for size, group in gaps:
            seconds = [gap for _, gap in group][1:]  # the first one began at another size
            if size == world_size and len(seconds) >= SHORTEST_STRETCH:
                yield statistics.median(seconds)

    def _gaps(self) -> Iterator[tuple[Done, float]]:
        return ((later, later.ended - earlier.ended) for earlier, later in itertools.pairwise(self.advances))
