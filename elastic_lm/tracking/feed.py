"""A feed: one tracker on a thread of its own, which may be slow, raise, hang or be out of reach, and costs training nothing.

Invariant: `offer` neither blocks nor raises. A tracker that raises, or that lets more than `MAX_WAITING` events wait, is given
up for the rest of the attempt, with one sentence that says so: what it missed is in the log, and the next attempt or
`elastic-lm export` fills it in. It gets what earlier attempts logged first; while it catches up it rests as long as it
works, because the coordinator shares its interpreter.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from elastic_lm.events.types import Event, EventKind
from elastic_lm.tracking.sink import Sink, reason_of

logger = logging.getLogger(__name__)

MAX_WAITING = 20_000  # events; half an hour of ten steps a second, about 30 MB
WORK_S = 0.02  # between two rests
WANTED = (EventKind.STEP_COMMITTED, EventKind.EVALUATED, EventKind.RUN_FINISHED)


@contextlib.contextmanager
def opened(sink: Sink) -> Iterator[Sink]:
    """The tracker, from its begin to its end. After a failure it is closed as well as that goes, and the failure is told."""
    try:
        sink.open()
        yield sink
    except BaseException:
        with contextlib.suppress(BaseException):  # the first failure is the one to tell
            sink.close()
        raise
    sink.close()


def fill(sink: Sink, events: Iterable[Event], *, rest: Callable[[], None] = lambda: None) -> None:
    """Write a stored log into a tracker that is open."""
    for event in events:
        if event.kind in WANTED:
            sink.write(event)
            rest()
    sink.caught_up()
    sink.flush()


class Feed:
    """Feeds one sink from its start to `end`.

    Args: `past` gives what the log held before this attempt; `max_waiting` bounds what is offered and not yet written.
    """

    def __init__(
        self, sink: Sink, past: Callable[[], Iterable[Event]], *, advice: str = "", max_waiting: int = MAX_WAITING
    ) -> None:
        self._sink, self._past, self._advice, self._max_waiting = sink, past, advice, max_waiting
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self._problem: str | None = None
        self._rested_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"track-{sink.key}", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """Why the tracker was given up, in a sentence; None when all is well."""
        return self._problem

    def offer(self, events: list[Event]) -> None:
        """More of the log."""
        wanted = [event for event in events if event.kind in WANTED]
        with self._changed:
            if self._problem is not None or self._ending:
                return
            if len(self._waiting) + len(wanted) > self._max_waiting:
                self._give_up(f"it is too slow: {len(self._waiting):,} events wait for it")
                return
            self._waiting.extend(wanted)
            self._changed.notify_all()

    def end(self) -> None:
        """What was offered is still written, nothing more is taken. Returns at once."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def join(self, timeout_s: float) -> None:
        """Wait for the end; after `timeout_s` the tracker is given up where it hangs."""
        self._thread.join(timeout_s)
        with self._changed:
            if self._thread.is_alive() and self._problem is None:
                self._give_up("it did not end in time")

    def _give_up(self, reason: str) -> None:
        self._problem = f"{self._sink.title} gets nothing more: {reason}. Training goes on.{self._advice}"
        self._waiting.clear()
        self._changed.notify_all()
        logger.warning("%s", self._problem)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with opened(self._sink) as sink:
                fill(sink, self._past(), rest=self._rest)
                while batch := self._next():
                    for event in batch:
                        sink.write(event)
                    sink.flush()
        except BaseException as error:  # noqa: BLE001 - told; other people's code may even call sys.exit
            with self._changed:
                if self._problem is None:
                    self._give_up(reason_of(error))

    def _next(self) -> list[Event]:
        """What waits, as soon as something does; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending or self._problem is not None)
            batch = list(self._waiting)
            self._waiting.clear()
            return batch

    def _rest(self) -> None:
        """As long as was worked since the last rest, every `WORK_S`; the end of the feed ends it."""
        worked_s = time.monotonic() - self._rested_at
        if worked_s >= WORK_S:
            with self._changed:
                self._changed.wait_for(lambda: self._ending or self._problem is not None, worked_s)
            self._rested_at = time.monotonic()
