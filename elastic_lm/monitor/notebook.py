"""The display of a run in a notebook: one output below the cell, replaced in place, with the newest news and the figures.

Invariant: however long the run, the cell holds one output of a few lines, and nothing is shown more often than once a
second; a notebook that shows nothing any more costs the display, never the run. It takes IPython alone: the live display of rich
would need ipywidgets, and without them shows nothing.
"""

from __future__ import annotations

import io
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from elastic_lm.monitor.live import STYLES, TRACE, frame
from elastic_lm.monitor.progress import News, Snapshot

logger = logging.getLogger(__name__)

WIDTH = 80  # columns of a cell that is not wide
KEPT_NEWS = 12  # lines; the log has all
PAUSE_S = 1.0  # between two drawings, however much happens
PAGE = '<pre style="white-space:pre-wrap;overflow-wrap:anywhere;margin:0;line-height:1.3">{code}</pre>'
# Black, red, green, yellow, blue, magenta, cyan, white: of middling brightness, for light notebooks and dark ones.
COLORS = [(128, 128, 128), (214, 69, 69), (42, 157, 74), (193, 132, 1), (64, 120, 242), (166, 38, 164), (1, 132, 188)]
THEME = TerminalTheme((255, 255, 255), (0, 0, 0), [*COLORS, (160, 160, 160)])


@dataclass(frozen=True)
class Cell:
    """What a notebook shows: HTML, or text where it shows none."""

    text: str
    html: str

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


class NotebookView:
    """A view for a notebook's cell; a context manager. What it has drawn last stays when it is left.

    Args: `display` is IPython's, or what does as it does.
    """

    tick_s = 1.0

    def __init__(self, display: Callable[..., Any], now: Callable[[], float] = time.monotonic) -> None:
        self._display, self._now = display, now
        self._handle: Any = None
        self._news: deque[News] = deque(maxlen=KEPT_NEWS)
        self._losses: deque[float] = deque(maxlen=TRACE)
        self._last: Snapshot | None = None
        self._last_at = 0.0
        self._next_drawing = 0.0
        self._gone = False

    def __enter__(self) -> NotebookView:
        return self

    def __exit__(self, *_: object) -> None:
        self._draw(at_once=True)

    def news(self, news: News) -> None:
        self._news.append(news)
        self._draw()

    def snapshot(self, snapshot: Snapshot) -> None:
        if snapshot != self._last:
            if snapshot.loss is not None and (self._last is None or snapshot.step != self._last.step):
                self._losses.append(snapshot.loss)
            self._last, self._last_at = snapshot, self._now()
        self._draw()

    def _draw(self, *, at_once: bool = False) -> None:
        now = self._now()
        if self._gone or (now < self._next_drawing and not at_once):
            return
        self._next_drawing = now + PAUSE_S
        try:
            if self._handle is None:
                self._handle = self._display(self._cell(), display_id=True)
            else:
                self._handle.update(self._cell())
        except Exception as error:  # noqa: BLE001 - a notebook that has gone away is no reason to stop training
            logger.warning("The notebook shows nothing any more: %r", error)
            self._gone = True

    def _cell(self) -> Cell:
        lines = [Text(news.text, STYLES[news.tone]) for news in self._news]
        if self._last is not None:
            lines += frame(self._last, WIDTH, since_s=self._now() - self._last_at, losses=self._losses)
        paper = Console(
            file=io.StringIO(), record=True, width=WIDTH, force_jupyter=False, color_system=None, highlight=False
        )
        for line in lines:
            paper.print(line, soft_wrap=True)
        return Cell(
            text=paper.export_text(clear=False).rstrip("\n"),
            html=paper.export_html(inline_styles=True, code_format=PAGE, theme=THEME),
        )
