"""A bar on a terminal: how much is done, and as many figures as there is room for.

Invariant: a terminal that is narrow, or knows no Unicode, costs a part of the display. `frame` is a pure function of figures and
width. Trade-off: parts take seconds, so the bar has a thread of its own that keeps its clock going.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from rich.console import Console
from rich.text import Text

from elastic_lm.monitor.drawing import Drawing, is_plain, line

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
        told = Text(words, no_wrap=True)
    else:
        told = line(figures.share, room, words, plain=plain)
    told.truncate(width)
    return told


class Bar(Generic[P]):
    """Shows progress to people at a terminal; a context manager. What it has drawn last is cleared when it is left.

    `figures_of` is asked at each drawing: while nothing happens, the clock goes on.
    """

    def __init__(
        self, console: Console, figures_of: Callable[[P], Figures], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._figures_of, self._now = console, figures_of, now
        self._drawing = Drawing(console)
        self._last: P | None = None
        self._drawn_s = -math.inf
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._tick, name="bar", daemon=True)

    def __enter__(self) -> Bar[P]:
        self._drawing.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        self._drawing.__exit__()

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
        width, plain = self._console.width, is_plain(self._console)
        self._drawing.show(frame(self._figures_of(progress), width, plain=plain))
