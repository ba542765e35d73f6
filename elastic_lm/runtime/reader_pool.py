"""The run's readers: started by the coordinator, watched, and replaced when they die or fall silent.

A reader holds nothing that another cannot read again, so losing one costs a re-read and never a sample.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

logger = logging.getLogger(__name__)

WATCH_S = 2.0


@dataclass(frozen=True)
class ReaderNews:
    """A reader was replaced: `cause` says why, `readers` are the ones to ask from now on."""

    lost: str
    replacement: str
    cause: str
    readers: tuple[Any, ...]


class ReaderPool:
    """`num_readers` reader actors. `on_news` is called on the pool's own thread."""

    def __init__(
        self,
        start_reader: Callable[[], Any],
        num_readers: int,
        *,
        timeout_s: float,
        on_news: Callable[[ReaderNews], None],
    ) -> None:
        self._start_reader = start_reader
        self._timeout_s = timeout_s
        self._on_news = on_news
        self._readers = [(f"r{n}", start_reader()) for n in range(num_readers)]
        self._num_started = num_readers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reader-pool", daemon=True)
        self._thread.start()

    @property
    def readers(self) -> tuple[Any, ...]:
        return tuple(handle for _, handle in self._readers)

    def close(self) -> None:
        """End every reader."""
        self._stop.set()
        self._thread.join(timeout=self._timeout_s + WATCH_S)
        for _, handle in self._readers:
            ray.kill(handle)

    def _watch(self) -> None:
        while not self._stop.wait(WATCH_S):
            pings = [handle.ping.remote() for handle in self.readers]
            deadline = time.monotonic() + self._timeout_s
            for index, ping in enumerate(pings):
                cause = self._failure(ping, deadline)
                if cause is not None and not self._stop.is_set():
                    self._replace(index, cause)

    def _failure(self, ping: ray.ObjectRef, deadline: float) -> str | None:
        try:
            ray.get(ping, timeout=max(0.0, deadline - time.monotonic()))
        except RayActorError:
            return "process died"
        except GetTimeoutError:
            return f"silent for {self._timeout_s:.1f} s"
        return None

    def _replace(self, index: int, cause: str) -> None:
        lost, handle = self._readers[index]
        ray.kill(handle)
        replacement = f"r{self._num_started}"
        self._num_started += 1
        self._readers[index] = (replacement, self._start_reader())
        self._on_news(ReaderNews(lost, replacement, cause, self.readers))
