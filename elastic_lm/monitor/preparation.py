"""The display of a preparation: a bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console

from elastic_lm.data.progress import Progress, View
from elastic_lm.monitor.bar import Bar
from elastic_lm.monitor.drawing import suits
from elastic_lm.monitor.progress import clock

WORDS = {
    "find": "finding files",
    "tokenizer": "tokenizer: reading",
    "encode": "encoding",
    "shards": "writing shards",
}
LEARNING = "tokenizer: learning"  # once its text is read
LINE_S = 5.0  # between two plain lines
LEAST_RATE_S = 1.0  # before a rate means anything


@contextlib.contextmanager
def watching(tell: Callable[[str], None], console: Console | None = None) -> Iterator[View]:
    """The view that suits where standard output goes: a bar on a terminal, else lines through `tell`."""
    console = console or Console(highlight=False)
    if suits(console):
        with bar(console) as view:
            yield view
    else:
        yield Lines(tell)


def bar(console: Console, now: Callable[[], float] = time.monotonic) -> Bar[Progress]:
    """A view for people at a terminal; a context manager."""
    return Bar(console, _Paces(now).pace, now)


@dataclass(frozen=True)
class Pace:
    """How far it has come after `elapsed_s` in all. `per_s`: of what is done now, None where that means nothing yet."""

    progress: Progress
    elapsed_s: float
    per_s: float | None = None

    @property
    def left_s(self) -> float | None:
        if self.progress.total is None or self.per_s is None:
            return None
        return max(0.0, (self.progress.total - self.progress.done) / self.per_s)

    @property
    def share(self) -> float | None:
        """Done, from 0 to 1; None where nobody knows."""
        progress = self.progress
        if progress.total is None:
            return None
        return min(1.0, progress.done / progress.total) if progress.total else 1.0

    @property
    def title(self) -> str:
        return LEARNING if self.progress.stage == "tokenizer" and self.share == 1.0 else WORDS[self.progress.stage]

    @property
    def amount(self) -> str:
        """How much is done, of how much."""
        done, total = self.progress.done, self.progress.total
        if self.progress.stage == "find":
            return f"{done:,}"
        if self.progress.stage == "shards":
            return f"{done:,} tokens" if total is None else f"{done:,}/{total:,} tokens"
        return size(done) if total is None else f"{size(done)} of {size(total)}"

    def parts(self) -> Iterator[str]:
        """Figures in words; the most wanted first."""
        yield self.amount
        if self.share is not None:
            yield f"{self.share:.0%}"
        yield clock(self.elapsed_s)
        if self.left_s is not None and self.share != 1.0:
            yield f"{clock(self.left_s)} left"
        if self.per_s is not None and self.progress.stage == "encode":
            yield f"{size(self.per_s)}/s"


def size(num_bytes: float) -> str:
    """Bytes in words, three digits or so."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


class _Paces:
    """Keeps the time, of the whole and since the stage first got somewhere: what comes before that has no rate."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._began_s = now()
        self._stage = ""
        self._first: tuple[float, int] | None = None

    def pace(self, progress: Progress) -> Pace:
        now_s, fresh = self._now(), progress.done - progress.kept
        if progress.stage != self._stage:
            self._stage, self._first = progress.stage, None
        if self._first is None and fresh > 0:
            self._first = now_s, fresh
        rate = None
        if self._first is not None and now_s - self._first[0] >= LEAST_RATE_S and fresh > self._first[1]:
            rate = (fresh - self._first[1]) / (now_s - self._first[0])
        return Pace(progress, now_s - self._began_s, rate)


class Lines:
    """A view of plain lines, one every LINE_S at most."""

    def __init__(self, tell: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._now = tell, now
        self._paces = _Paces(now)
        self._told_s = now()

    def show(self, progress: Progress) -> None:
        pace = self._paces.pace(progress)
        if self._now() - self._told_s >= LINE_S:
            self._told_s = self._now()
            self._tell(f"{pace.title} {', '.join(pace.parts())}")
