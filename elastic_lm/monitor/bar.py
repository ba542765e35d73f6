"""A bar on a terminal: how much is done, and as many figures as there is room for.

Invariant: a terminal that is narrow, knows no Unicode or goes away costs the display, never the work. `frame` is a pure function
of figures and width. Trade-off: parts take seconds, so the bar has a thread of its own that keeps its clock going.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from elastic_lm.monitor.live import NARROWEST

FRAME_S = 0.1  # between two drawings, whatever happens
TICK_S = 1.0  # between two drawings when nothing happens


class Staged(Protocol):
    """Progress of some work. A new stage is drawn at once."""

    @property
    def stage(self) -> str: ...


class Figures(Protocol):
    """What a bar tells. `share`: done, from 0 to 1; None where nobody knows. `parts`: in words, the most wanted first."""

    @property
    def title(self) -> str: ...

    @property
    def share(self) -> float | None: ...

    def parts(self) -> Iterator[str]: ...


P = TypeVar("P", bound=Staged)


def suits(console: Console) -> bool:
    """Whether a bar can be drawn there."""
    return console.is_terminal and not console.is_dumb_terminal and console.width >= NARROWEST


def frame(figures: Figures, width: int, *, plain: bool = False) -> Text:
    """One line of at most `width` columns, with as many of the figures as fit. `plain`: ASCII only."""
    words = figures.title
    for number, part in enumerate(figures.parts()):
        longer = f"{words}{', ' if number else ' '}{part}"
        if len(longer) > width - 1:
            break
        words = longer
    room = min(40, width - len(words) - 2)
    if figures.share is None or room < 4:
        line = Text(words, no_wrap=True)
    else:
        full = math.floor(figures.share * room)
        full_mark, rest_mark = ("#", "-") if plain else ("━", "─")
        line = Text.assemble((full_mark * full, "cyan"), (rest_mark * (room - full), "dim"), f" {words}", no_wrap=True)
    line.truncate(width)
    return line


class Bar(Generic[P]):
    """Shows progress to people at a terminal; a context manager. What it has drawn last is cleared when it is left.

    `figures_of` is asked at each drawing: while nothing happens, the clock goes on.
    """

    def __init__(
        self, console: Console, figures_of: Callable[[P], Figures], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._figures_of, self._now = console, figures_of, now
        # Of a bar on standard error, standard output is none of its business: it may be a file.
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=not console.stderr)
        self._last: P | None = None
        self._drawn_s = -math.inf
        self._gone = False
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="bar", daemon=True)

    def __enter__(self) -> Bar[P]:
        self._draw(self._live.start)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        self._gone = False  # whatever became of the terminal: what `start` put in the place of standard output goes
        self._draw(self._live.stop)

    def show(self, progress: P) -> None:
        with self._lock:
            is_new = self._last is None or progress.stage != self._last.stage
            self._last = progress
            if is_new or self._now() - self._drawn_s >= FRAME_S:
                self._refresh(progress)

    def _tick(self) -> None:
        while not self._left.wait(TICK_S):
            with self._lock:
                if self._last is not None:
                    self._refresh(self._last)

    def _refresh(self, progress: P) -> None:
        self._drawn_s = self._now()
        plain = not self._console.encoding.startswith("utf")
        line = frame(self._figures_of(progress), self._console.width, plain=plain)
        self._draw(self._live.update, line, refresh=True)

    def _draw(self, act: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """A terminal that has gone away is no reason to stop."""
        if self._gone:
            return
        try:
            act(*arguments, **options)
        except (OSError, ValueError):
            self._gone = True
