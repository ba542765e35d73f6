"""The run's readers: started by the coordinator, watched, and replaced when they die or fall silent.

A reader holds nothing that another cannot read again, so losing one costs a re-read and never a sample.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from elastic_lm.data.order import Order
from elastic_lm.runtime.window_client import reader_for

logger = logging.getLogger(__name__)

WATCH_S = 2.0
START_S = 60.0  # a process that starts on a busy machine answers late, and is not ill


@dataclass(frozen=True)
class ReaderNews:
    """A reader was replaced: `cause` says why, `readers` are the ones to ask from now on."""

    lost: str
    replacement: str
    cause: str
    readers: tuple[Any, ...]


@dataclass
class _Reader:
    reader_id: str
    handle: Any
    has_answered: bool = False
    seen_at: float = field(default_factory=time.monotonic)  # the last sign of life, or the start


class ReaderPool:
    """`num_readers` reader actors. `on_news` is called on the pool's own thread."""

    def __init__(
        self,
        start_reader: Callable[[], Any],
        num_readers: int,
        *,
        timeout_s: float,
        on_news: Callable[[ReaderNews], None] = lambda news: None,
    ) -> None:
        self._start_handle = start_reader
        self._timeout_s = timeout_s
        self.on_news = on_news
        self._num_started = 0
        self._readers = [self._start() for _ in range(num_readers)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reader-pool", daemon=True)
        self._thread.start()

    @property
    def readers(self) -> tuple[Any, ...]:
        return tuple(reader.handle for reader in self._readers)

    def warm_up(self, order: Order, step: int) -> None:
        """Have the windows of `step` read while nobody waits for them yet."""
        for window in order.windows_of(step):
            reader_for(window, order, self.readers).window.remote(*window, stride=len(self._readers))

    def close(self) -> None:
        """End every reader."""
        self._stop.set()
        self._thread.join(timeout=self._timeout_s + WATCH_S)
        for reader in self._readers:
            ray.kill(reader.handle)

    def _start(self) -> _Reader:
        reader = _Reader(f"r{self._num_started}", self._start_handle())
        self._num_started += 1
        return reader

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_S):
            pings = [reader.handle.ping.remote() for reader in self._readers]
            deadline = time.monotonic() + self._timeout_s
            for index, ping in enumerate(pings):
                cause = self._failure(self._readers[index], ping, deadline)
                if cause is not None and not self._stop.is_set():
                    self._replace(index, cause)

    def _failure(self, reader: _Reader, ping: ray.ObjectRef, deadline: float) -> str | None:
        try:
            ray.get(ping, timeout=max(0.0, deadline - time.monotonic()))
        except RayActorError:
            return "process died"
        except GetTimeoutError:
            silent_s = time.monotonic() - reader.seen_at
            return f"silent for {silent_s:.1f} s" if reader.has_answered or silent_s > START_S else None
        reader.has_answered, reader.seen_at = True, time.monotonic()
        return None

    def _replace(self, index: int, cause: str) -> None:
        lost = self._readers[index]
        ray.kill(lost.handle)
        self._readers[index] = self._start()
        self.on_news(ReaderNews(lost.reader_id, self._readers[index].reader_id, cause, self.readers))
