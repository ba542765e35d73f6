"""Trackers for tests: one that keeps what it gets, and those that behave as badly as other people's code may."""

from __future__ import annotations

import threading

from elastic_lm.events.types import Event


class Keeping:
    """Keeps what it gets, and the order of calls."""

    key, title = "keeping", "Keeping"

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.calls: list[str] = []
        self.closed = threading.Event()

    def open(self) -> None:
        self.calls.append("open")

    def write(self, event: Event) -> None:
        self.events.append(event)

    def caught_up(self) -> None:
        self.calls.append(f"caught up with {len(self.events)}")

    def flush(self) -> None:
        if self.calls[-1] != "flush":
            self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")
        self.closed.set()


class Raising(Keeping):
    """Raises `error` where it is told to."""

    key, title = "raising", "Raising"

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self.where, self._error = where, error

    def _meet(self, where: str) -> None:
        if where == self.where:
            raise self._error

    def open(self) -> None:
        self._meet("open")
        super().open()

    def write(self, event: Event) -> None:
        self._meet("write")
        super().write(event)

    def caught_up(self) -> None:
        self._meet("caught_up")

    def flush(self) -> None:
        self._meet("flush")

    def close(self) -> None:
        super().close()
        self._meet("close")


class Hanging(Keeping):
    """Never comes back from `where`, until the test is over."""

    key, title = "hanging", "Hanging"

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.reached, self.over = threading.Event(), threading.Event()

    def _meet(self, where: str) -> None:
        if where == self.where:
            self.reached.set()
            self.over.wait(60)

    def open(self) -> None:
        self._meet("open")
        super().open()

    def write(self, event: Event) -> None:
        self._meet("write")
        super().write(event)

    def close(self) -> None:
        self._meet("close")
        super().close()
