"""The display of an evaluation: a bar on standard error while it computes, where that is a terminal; else nothing.

Invariant: between two results nothing is drawn, so that they can be printed wherever they go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console

from elastic_lm.evaluate.progress import Progress
from elastic_lm.monitor.bar import Bar
from elastic_lm.monitor.drawing import suits
from elastic_lm.monitor.progress import clock

LEAST_RATE_S = 1.0  # before a rate means anything
BEGINNING = Progress("the evaluation", 0, None, 0, doing="starting")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Pace:
    """How far it has come after `elapsed_s`. Rates are None where they mean nothing yet."""

    progress: Progress
    elapsed_s: float
    pieces_per_s: float | None = None
    tokens_per_s: float | None = None

    @property
    def title(self) -> str:
        return f"{self.progress.doing} {self.progress.stage}"

    @property
    def share(self) -> float | None:
        return self.progress.done / self.progress.total if self.progress.total else None

    def parts(self) -> Iterator[str]:
        """Figures in words; the most wanted first."""
        progress = self.progress
        left = None if progress.total is None else progress.total - progress.done
        if left is not None:
            yield f"{progress.done:,}/{progress.total:,} {progress.unit}"
        yield clock(self.elapsed_s)
        if self.pieces_per_s and left:
            yield f"{clock(left / self.pieces_per_s)} left"
        if self.tokens_per_s is not None:
            yield f"{self.tokens_per_s:,.0f} tokens/s"


class Paces:
    """Keeps the time, of the whole and since the first piece: what comes before, as loading the model, has no rate.

    Where another number is wanted, the count has begun anew.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._began_s = now, now()
        self._total: int | None = None
        self._first: tuple[float, Progress] | None = None

    def pace(self, progress: Progress) -> Pace:
        now_s = self._now()
        if progress.total != self._total:
            self._total, self._first = progress.total, None
        if self._first is None and progress.done:
            self._first = now_s, progress
        pace = Pace(progress, now_s - self._began_s)
        if self._first is None or now_s - self._first[0] < LEAST_RATE_S or progress.done == self._first[1].done:
            return pace
        since_s, first = now_s - self._first[0], self._first[1]
        pieces, tokens = progress.done - first.done, progress.tokens - first.tokens
        return Pace(progress, pace.elapsed_s, pieces / since_s, tokens / since_s)


class Display:
    """A view, and what waits for results with it."""

    def __init__(self, console: Console | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._now, self._paces = now, Paces(now)
        self._bar: Bar[Progress] | None = None
        self._last = BEGINNING

    def show(self, progress: Progress) -> None:
        self._last = progress
        if self._bar is not None:
            self._bar.show(progress)

    def waiting_for(self, results: Iterator[Result]) -> Iterator[Result]:
        """The same results. The bar is there while the next one is computed."""
        if not suits(self._console):
            yield from results
            return
        while True:
            with Bar(self._console, self._paces.pace, self._now) as self._bar:
                self._bar.show(self._last)
                try:
                    result = next(results)
                except StopIteration:
                    return
                finally:
                    self._bar = None
            yield result
