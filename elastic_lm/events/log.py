"""The event log in storage: append-only, in order, and never in the way of training.

Object storage cannot append, so events are buffered and written as segments `<number of the first event>.jsonl`, each
created once and never changed. Invariant: the log holds a prefix of what was appended, without gaps; `on_stored` says
how far it reaches. When storage fails the buffer waits and the next attempt takes all of it; beyond `MAX_BUFFERED` the
newest events are given up, and the gap in the numbers tells every reader. `append` neither blocks nor raises.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator

from elastic_lm.errors import AlreadyExistsError, ElasticLMError
from elastic_lm.events.types import Event, EventKind
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

FLUSH_S = 2.0  # what a dead coordinator's successor may have to ask the workers for again
SEGMENT_EVENTS = 5_000
MAX_BUFFERED = 200_000  # about 100 MB; an hour without storage at 50 events a second
RETRY_S = 1.0
_SEGMENT = re.compile(r"(\d{12})\.jsonl")


class EventLog:
    """Writes the events of one attempt behind those that are there. Safe to use from several threads.

    Args: `storage` is the run's `events` folder. `on_stored` gets events as soon as storage holds them, in order, on the
    log's own thread.    Raises (constructor only): StorageError when the folder cannot be read.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        flush_s: float = FLUSH_S,
        on_stored: Callable[[list[Event]], None] | None = None,
        max_buffered: int = MAX_BUFFERED,
    ) -> None:
        self._storage = storage
        self._flush_s = flush_s
        self._on_stored = on_stored or (lambda events: None)
        self._max_buffered = max_buffered
        self._first = _end(storage)  # the number of the first buffered event
        self._buffer: list[Event] = []
        self._num_dropped = 0
        self._changed = threading.Condition()
        self._urgent = False
        self._closing = False
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    @property
    def problem(self) -> str | None:
        """Why events are waiting, in a sentence; None when all is well."""
        return self._problem

    def append(self, event: Event) -> None:
        """Take the event. It is in storage within `flush_s`, as long as storage works."""
        with self._changed:
            if len(self._buffer) >= self._max_buffered:
                self._num_dropped += 1
                return
            self._buffer.append(event)
            if len(self._buffer) == 1 or len(self._buffer) >= SEGMENT_EVENTS:
                self._changed.notify_all()

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Store what is buffered now.    Returns: whether that was done within `timeout_s`."""
        with self._changed:
            target = self._first + len(self._buffer)
            self._urgent = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._first >= target, timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Flush and end the log's thread.    Returns: whether everything is stored."""
        done = self.flush(timeout_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        if not done:
            logger.error("The event log ends with %d events that are not stored: %s", len(self._buffer), self._problem)
        return done

    def _run(self) -> None:
        while self._wait_for_work():
            with self._changed:
                first, events = self._first, self._buffer[:SEGMENT_EVENTS]
            stored = not events or self._store(first, events)
            with self._changed:
                if stored:
                    del self._buffer[: len(events)]
                    self._first += len(events)
                    self._urgent = self._urgent and bool(self._buffer)
                    self._skip_dropped()
                    self._changed.notify_all()
                elif not self._closing:
                    self._changed.wait_for(lambda: self._closing, RETRY_S)

    def _wait_for_work(self) -> bool:
        """Wait until a segment is due.    Returns: False when the log is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._buffer or self._urgent or self._closing)
            due = time.monotonic() + self._flush_s
            self._changed.wait_for(
                lambda: self._urgent or self._closing or len(self._buffer) >= SEGMENT_EVENTS,
                max(0.0, due - time.monotonic()),
            )
            return not self._closing

    def _store(self, first: int, events: list[Event]) -> bool:
        data = "".join(event.to_json() + "\n" for event in events).encode()
        try:
            self._storage.create(f"{first:012d}.jsonl", data)
        except AlreadyExistsError:
            self._say(f"{self._storage.url}/{first:012d}.jsonl was written by somebody else; this log is not the run's")
            return False
        except (ElasticLMError, OSError) as error:
            self._say(f"the event log cannot be written: {error}")
            return False
        self._problem = None
        try:
            self._on_stored(events)
        except Exception:  # a watcher's bug must not end the log
            logger.exception("on_stored raised")
        return True

    def _skip_dropped(self) -> None:
        """Leave a gap in the numbers for events that were given up, once those before them are stored."""
        if self._num_dropped and not self._buffer:
            self._first += self._num_dropped
            self._num_dropped = 0

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            logger.error("%s", problem)
        self._problem = problem


def read(
    storage: Storage, *, on_problem: Callable[[str], None] | None = None, poll_s: float | None = None
) -> Iterator[Event]:
    """All events of the run's `events` folder, in order. Gaps, overlaps and unreadable lines are told to `on_problem`.

    With `poll_s`, goes on looking for new ones every so many seconds, until the last of all says that the run has
    finished.    Raises: StorageError.
    """
    tell = on_problem or (lambda sentence: logger.warning("%s", sentence))
    expected, finished = 0, False
    known: set[str] = set()  # segments never change, and none comes before one that is there
    while True:
        new = [(name, first) for name, first in _segments(storage) if name not in known]
        for event, end in _read_segments(storage, new, expected, tell):
            expected = end
            if event is not None:
                finished = event.kind is EventKind.RUN_FINISHED
                yield event
        known.update(name for name, _ in new)
        if finished or poll_s is None:
            return
        time.sleep(poll_s)


def _read_segments(
    storage: Storage, segments: list[tuple[str, int]], expected: int, tell: Callable[[str], None]
) -> Iterator[tuple[Event | None, int]]:
    """(event, number of the next one) of these segments; None for a line that cannot be read."""
    for name, first in segments:
        lines = storage.read(name).decode(errors="replace").splitlines()
        if first > expected:
            tell(f"events {expected} to {first - 1} are missing before {name}")
        elif first < expected:
            tell(
                f"{name} begins before event {expected}, where the segment before it ends; the later copies are left out"
            )
        for number, line in enumerate(lines, start=first):
            if number >= expected:
                yield _parse(line, number, tell), number + 1
        expected = max(expected, first + len(lines))


def last(storage: Storage, most: int) -> list[Event]:
    """The newest events of the run's `events` folder, at most about `most`, in order: for a look at a long run.

    Raises: StorageError.
    """
    found: list[Event] = []
    for name, first in reversed(_segments(storage)):
        lines = storage.read(name).decode(errors="replace").splitlines()
        parsed = (_parse(line, number, logger.warning) for number, line in enumerate(lines, start=first))
        found = [event for event in parsed if event is not None] + found
        if len(found) >= most:
            break
    return found[-most:]


def _parse(line: str, number: int, tell: Callable[[str], None]) -> Event | None:
    try:
        return Event.from_json(line)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        tell(f"event {number} cannot be read: {type(error).__name__}: {error}")
        return None


def _segments(storage: Storage) -> list[tuple[str, int]]:
    names = [(name, match) for name in storage.list() if (match := _SEGMENT.fullmatch(name))]
    return sorted((name, int(match[1])) for name, match in names)


def _end(storage: Storage) -> int:
    """The number of the next event."""
    segments = _segments(storage)
    if not segments:
        return 0
    name, first = segments[-1]
    return first + len(storage.read(name).decode(errors="replace").splitlines())
