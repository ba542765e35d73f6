"""The live display of a run in a terminal: news scrolls by, the figures stay below and are drawn over and over.

Invariant: a terminal that is narrow, has no colours, knows no Unicode or goes away costs the display a part of itself, never
the run. `frame` is a pure function of figures and width.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, Group
from rich.text import Text

from elastic_lm.monitor.drawing import Drawing, is_plain, line, suits
from elastic_lm.monitor.progress import Lines, News, Snapshot, View, clock

WIDE = 70  # from here on the workers have a line
MOST_DOTS = 24  # workers that are drawn one by one
TRACE = 24  # losses in the small curve
STYLES = {"good": "green", "bad": "red", "plain": ""}
BARS = "▁▂▃▄▅▆▇█"


@contextlib.contextmanager
def watching(tell: Callable[[str], None], interval_s: float, console: Console | None = None) -> Iterator[View]:
    """The view that suits where output goes: a live display on a terminal or in a notebook, else lines through `tell`."""
    console = console or Console(highlight=False)
    if console.is_jupyter:
        from IPython.display import display

        from elastic_lm.monitor.notebook import NotebookView

        with NotebookView(display) as cell:
            yield cell
        return
    if suits(console):
        with LiveView(console) as view:
            yield view
    else:
        yield Lines(tell, interval_s)


class LiveView:
    """A view for people at a terminal; a context manager. What it has drawn last is cleared when it is left."""

    tick_s = 1.0

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now = console, now
        self._drawing = Drawing(console)
        self._losses: deque[float] = deque(maxlen=TRACE)
        self._last: Snapshot | None = None
        self._last_at = 0.0

    def __enter__(self) -> LiveView:
        self._drawing.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._drawing.__exit__()

    def news(self, news: News) -> None:
        encoding = self._console.encoding
        text = news.text.encode(encoding, "replace").decode(encoding)
        self._drawing.print(Text(text, STYLES[news.tone]))

    def snapshot(self, snapshot: Snapshot) -> None:
        if snapshot != self._last:
            if snapshot.loss is not None and (self._last is None or snapshot.step != self._last.step):
                self._losses.append(snapshot.loss)
            self._last, self._last_at = snapshot, self._now()
        lines = frame(
            snapshot,
            self._console.width,
            since_s=self._now() - self._last_at,
            losses=self._losses,
            plain=is_plain(self._console),
        )
        self._drawing.show(Group(*lines))


def frame(
    snapshot: Snapshot, width: int, *, since_s: float = 0.0, losses: Sequence[float] = (), plain: bool = False
) -> list[Text]:
    """Two or three lines of at most `width` columns. `since_s`: age of the snapshot; `plain`: ASCII only."""
    lines = [_bar(snapshot, width, since_s, plain), _figures(snapshot, width, plain)]
    if width >= WIDE:
        lines.append(_workers(snapshot, width, since_s, losses, plain))
    for each in lines:  # a terminal that was made narrower than `NARROWEST` meanwhile
        each.truncate(width)
    return lines


def _bar(snapshot: Snapshot, width: int, since_s: float, plain: bool) -> Text:
    done = snapshot.step / snapshot.total_steps if snapshot.total_steps else 1.0
    words = f"{snapshot.step:,}/{snapshot.total_steps:,}  {done:.0%}"
    times = f"  {clock(snapshot.elapsed_s + since_s)}"
    if snapshot.eta_s is not None:
        times += f", {clock(max(0.0, snapshot.eta_s - since_s))} left"
    if len(words) + len(times) + 13 <= width:
        words += times
    return line(done, max(4, width - len(words) - 2), words, plain=plain)


def _figures(snapshot: Snapshot, width: int, plain: bool) -> Text:
    """As many of the figures as fit."""
    between = " | " if plain else " · "
    told = ""
    for part in snapshot.parts():
        longer = f"{told}{between}{part}" if told else part
        if len(longer) > width - 1:
            break
        told = longer
    return Text(told, "bold", no_wrap=True)


def _workers(snapshot: Snapshot, width: int, since_s: float, losses: Sequence[float], plain: bool) -> Text:
    """What the workers do, one mark for each that may be there, and the way of the loss."""
    busy, warm, missing = ("*", "o", ".") if plain else ("●", "◐", "○")
    told = Text(no_wrap=True)
    if snapshot.max_workers <= MOST_DOTS:
        num_missing = max(0, snapshot.max_workers - snapshot.world_size - snapshot.num_starting)
        told.append(busy * snapshot.world_size, "green")
        told.append(warm * snapshot.num_starting, "yellow")
        told.append(missing * num_missing, "dim")
        told.append(" ")
    told.append(snapshot.state, "" if snapshot.state == "training" else "yellow")
    if snapshot.num_starting:
        told.append(f", {snapshot.num_starting} starting")
    if snapshot.state != "training" and since_s >= 1:
        told.append(f" for {since_s:.0f} s")
    curve = "" if plain else _curve(losses)
    if curve and len(told) + len(curve) + 8 < width:
        told.append(f"   loss {curve}", "dim")
    return told


def _curve(values: Sequence[float]) -> str:
    """Values as a row of blocks, from their lowest to their highest."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2 or min(finite) == max(finite):
        return ""
    low, high = min(finite), max(finite)
    return "".join(BARS[min(len(BARS) - 1, int((value - low) / (high - low) * len(BARS)))] for value in finite)
