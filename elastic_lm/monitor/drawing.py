"""A part of a terminal that is drawn over and over, by `Live` of rich; and the line in it that shows how much is done.

Invariant: a terminal that goes away costs the display, never the work. What was drawn last is cleared at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

NARROWEST = 40  # columns; below, lines are easier to read


def suits(console: Console) -> bool:
    """Whether it can be drawn on."""
    return console.is_terminal and not console.is_dumb_terminal and console.width >= NARROWEST


def is_plain(console: Console) -> bool:
    """Whether it knows no more than ASCII, as far as one can tell."""
    return not console.encoding.startswith("utf")


def line(share: float, room: int, words: str, *, plain: bool) -> Text:
    """A bar of `room` columns with words behind it. `share`: done, from 0 to 1."""
    full = math.floor(share * room)
    full_mark, rest_mark = ("#", "-") if plain else ("━", "─")
    return Text.assemble((full_mark * full, "cyan"), (rest_mark * (room - full), "dim"), f" {words}", no_wrap=True)


class Drawing:
    """Of one thread at a time; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        # Of a display on standard error, standard output is none of its business: it may be a file.
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=not console.stderr)
        self._gone = False

    def __enter__(self) -> Drawing:
        self._try(self._live.start)
        return self

    def __exit__(self, *_: object) -> None:
        self._gone = False  # whatever became of the terminal: what `start` put in the place of standard output goes
        self._try(self._live.stop)

    def show(self, drawn: RenderableType) -> None:
        """In the place of what was shown before."""
        self._try(self._live.update, drawn, refresh=True)

    def print(self, text: Text) -> None:
        """Above it, for good."""
        self._try(self._console.print, text, soft_wrap=True)

    def _try(self, act: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if self._gone:
            return
        try:
            act(*arguments, **options)
        except (OSError, ValueError):
            self._gone = True
