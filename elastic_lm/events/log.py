"""The event log in storage: append-only, in order, of one writer at a time, and never in the way of training.

Object storage cannot append, so events are buffered and written as segments `<number of the first event>.jsonl`, each
created once and never changed. Invariant: the log holds a prefix of what was appended, without gaps; `on_stored` says
how far it reaches. When storage fails the buffer waits and the next attempt takes all of it; beyond `MAX_BUFFERED` the
newest events are given up, and a note in their place says how many. `append` neither blocks nor raises.

A run's owner (ownership.py) may freeze before any line here and thaw when another has long taken over. The log is one all
the same, because a segment's name is the number at which the one before it ends: so there is one name at a time at which
the log can grow, and storage lets one writer have it.

- An owner begins by creating a segment with its `opening` at the end that it sees; when somebody was faster, at the next.
- Before an opening lies what earlier owners stored, all of which is read, as `on_stored` told them. Behind it they store
  nothing: the one name that they try is taken. It tells them that they are superseded, and they try no other.
- Nothing of the new owner is lost: a name that it tries can be taken by an owner with a higher epoch only, since nobody
  opens behind an event of a higher epoch than its own. So epochs never fall along the log.

That is why the epoch is in the events and not in the names. If it were in the names, both segments at one number would be
stored, and readers would have to leave out one whose writer was told that it is there, and has let members forget it.

Small segments that are old are joined now and then (compaction.py), by whoever has opened the log.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from elastic_lm.errors import AlreadyExistsError, ElasticLMError, NotFoundError, StorageError, SupersededError
from elastic_lm.events import segments
from elastic_lm.events.compaction import Compactor
from elastic_lm.events.segments import Segment
from elastic_lm.events.types import Event, EventKind
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

FLUSH_S = 2.0  # what a dead coordinator's successor may have to ask the workers for again
SEGMENT_EVENTS = 5_000
MAX_BUFFERED = 200_000  # about 100 MB; an hour without storage at 50 events a second
RETRY_S = 1.0


class EventLog:
    """Writes the events of one attempt behind those that are there. Safe to use from several threads.

    Args: `storage` is the run's `events` folder. `opening` makes the first event of this owner, from the newest one before it
    (None in an empty log); it is stored when the constructor returns. Without it, whoever writes first goes on with the log.
    `on_stored` gets all other events as soon as storage holds them, in order, on the log's own thread. So does
    `on_superseded` a sentence when another owner has opened the log; nothing is stored from then on.
    Raises (constructor only): SupersededError when one has already; StorageError when the folder cannot be read or written.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        owner_epoch: int = 0,
        opening: Callable[[Event | None], Event] | None = None,
        flush_s: float = FLUSH_S,
        on_stored: Callable[[list[Event]], None] = lambda events: None,
        on_superseded: Callable[[str], None] = lambda sentence: None,
        max_buffered: int = MAX_BUFFERED,
    ) -> None:
        self._storage = storage
        self._owner_epoch = owner_epoch
        self._flush_s = flush_s
        self._on_stored = on_stored
        self._on_superseded = on_superseded
        self._max_buffered = max_buffered
        self._compactor = Compactor(storage) if opening is not None else None
        self._first = self._open(opening)  # the number of the first buffered event
        self._buffer: list[Event] = []
        self._num_dropped = 0
        self._changed = threading.Condition()
        self._urgent = False
        self._ended = False  # closed, or superseded
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def _open(self, opening: Callable[[Event | None], Event] | None) -> int:
        """Returns: the number of the next event."""
        taken = -1
        while True:
            end, newest = _tail(self._storage)
            if newest is not None and newest.owner_epoch > self._owner_epoch:
                raise self._superseded_by(newest)
            if opening is None:
                return end
            if end == taken:
                raise StorageError(f"{self._storage.url}/{_name(end)} is neither in the folder's list nor free")
            try:
                self._storage.create(_name(end), segments.data([self._stamped(opening(newest)).to_json()]))
            except AlreadyExistsError:
                taken = end
            else:
                self._check_opening(end)
                return end + 1

    def _check_opening(self, first: int) -> None:
        """Whoever froze between the look and the write may have written into a place that was compacted long ago."""
        if segments.named(first) not in segments.listed(self._storage):
            _, newest = _tail(self._storage)
            assert newest is not None
            raise self._superseded_by(newest)

    def _superseded_by(self, newest: Event) -> SupersededError:
        return SupersededError(
            f"the event log {self._storage.url} is being written by owner {newest.owner_epoch} of the run; owner "
            f"{self._owner_epoch} has to end"
        )

    def _stamped(self, event: Event) -> Event:
        return replace(event, owner_epoch=self._owner_epoch)

    @property
    def problem(self) -> str | None:
        """Why events are waiting, in a sentence; None when all is well."""
        return self._problem

    def append(self, event: Event) -> None:
        """Take the event. It is in storage within `flush_s`, as long as storage works."""
        with self._changed:
            if self._ended:
                return
            if len(self._buffer) >= self._max_buffered:
                self._num_dropped += 1
                return
            self._buffer.append(self._stamped(event))
            if len(self._buffer) == 1 or len(self._buffer) >= SEGMENT_EVENTS:
                self._changed.notify_all()

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Store what is buffered now.    Returns: whether that was done within `timeout_s`."""
        with self._changed:
            target = self._first + len(self._buffer) + bool(self._num_dropped)
            self._urgent = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._first >= target or self._ended, timeout_s)
            return self._first >= target

    def keep_unstored(self, elsewhere: Storage) -> int:
        """Write what is buffered to another folder, under the name that it would have here.    Returns: how many events.

        Raises: StorageError.
        """
        with self._changed:
            first, events = self._first, list(self._buffer)
        if events:
            elsewhere.write(_name(first), segments.data(event.to_json() for event in events))
        return len(events)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Flush and end the log's thread.    Returns: whether everything is stored."""
        done = self.flush(timeout_s)
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._compactor is not None:
            self._compactor.close()
        self._thread.join(timeout_s)
        if not done:
            logger.error("The event log ends with %d events that are not stored: %s", len(self._buffer), self._problem)
        return done

    def _run(self) -> None:
        while self._wait_for_work():
            with self._changed:
                first, events = self._first, self._buffer[:SEGMENT_EVENTS]
            num_stored = self._store(_name(first), events) if events else 0
            with self._changed:
                if num_stored == 0 and events:
                    self._changed.wait_for(lambda: self._ended, RETRY_S)
                    continue
                del self._buffer[:num_stored]
                self._first += num_stored
                self._note_dropped(events)
                self._urgent = self._urgent and bool(self._buffer)
                self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Wait until a segment is due.    Returns: False when the log has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._buffer or self._urgent or self._ended)
            due = time.monotonic() + self._flush_s
            self._changed.wait_for(
                lambda: self._urgent or self._ended or len(self._buffer) >= SEGMENT_EVENTS,
                max(0.0, due - time.monotonic()),
            )
            return not self._ended

    def _store(self, name: str, events: list[Event]) -> int:
        """Returns: how many of the events, from the first on, the segment holds now; 0 when it could not be stored."""
        try:
            num_stored = self._create(name, [event.to_json() for event in events])
        except (ElasticLMError, OSError) as error:
            self._say(f"the event log cannot be written: {error}")
            return 0
        if num_stored == 0:
            self._end_superseded(name)
            return 0
        self._problem = None
        try:
            self._on_stored(events[:num_stored])
        except Exception:  # a watcher's bug must not end the log
            logger.exception("on_stored raised")
        if self._compactor is not None:
            self._compactor.stored()
        return num_stored

    def _create(self, name: str, lines: list[str]) -> int:
        """Returns: how many of the lines the segment holds; 0 when it is somebody else's."""
        try:
            self._storage.create(name, segments.data(lines))
            return len(lines)
        except AlreadyExistsError:
            there = segments.lines(self._storage, Segment(name, 0))
            # Stored by us, when fewer events were waiting, by a write whose answer was lost.
            return len(there) if there == lines[: len(there)] else 0

    def _end_superseded(self, name: str) -> None:
        problem = f"{self._storage.url}/{name} was written by somebody else, who owns the run now; nothing more is logged here"
        self._say(problem)
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        try:
            self._on_superseded(problem)
        except Exception:  # a watcher's bug
            logger.exception("on_superseded raised")

    def _note_dropped(self, before: list[Event]) -> None:
        """As soon as there is room: a note in the place of the events that were given up behind these."""
        if self._num_dropped and before and len(self._buffer) < self._max_buffered:
            message = (
                f"{self._num_dropped} events are missing here: storage was away for longer than they could be kept."
            )
            last = (self._buffer or before)[-1]
            note = Event(EventKind.NOTE, message, time_s=last.time_s, elapsed_s=last.elapsed_s, attempt=last.attempt)
            self._buffer.append(self._stamped(note))
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
    reading = _Reading(storage, on_problem or (lambda sentence: logger.warning("%s", sentence)))
    while True:
        yield from reading.rest()
        if reading.finished or poll_s is None:
            return
        time.sleep(poll_s)


class _Reading:
    """How far somebody has read a log that may grow and be compacted meanwhile."""

    def __init__(self, storage: Storage, tell: Callable[[str], None]) -> None:
        self._storage, self._tell = storage, tell
        self._expected = 0  # the number of the next event
        self._known: set[str] = set()  # segments never change, and none comes before one that is there
        self.finished = False  # the last event says so

    def rest(self) -> Iterator[Event]:
        """Whatever is there and has not been read. What is missing is looked for a second time before that is believed."""
        missed: object = None
        while True:
            new = [segment for segment in segments.listed(self._storage) if self._is_new(segment)]
            try:
                for segment, lines in segments.read(self._storage, new):
                    gap = (self._expected, segment)
                    if segment.first > self._expected and gap != missed:
                        missed = gap  # compacted between two pages of the list
                        break
                    self._known.add(segment.name)
                    yield from self._events(segment, lines)
                else:
                    return
            except NotFoundError:  # compacted since it was listed: what it became is listed now
                gone = next(segment for segment in new if segment.name not in self._known)
                if gone == missed:
                    raise
                missed = gone

    def _is_new(self, segment: Segment) -> bool:
        return segment.name not in self._known and (segment.end is None or segment.end > self._expected)

    def _events(self, segment: Segment, lines: list[str]) -> Iterator[Event]:
        if segment.first > self._expected:
            self._tell(f"events {self._expected} to {segment.first - 1} are missing before {segment.name}")
        elif segment.first < self._expected and segment.end is None:
            self._tell(
                f"{segment.name} begins before event {self._expected}, where the segment before it ends; the later copies "
                "are left out"
            )
        for number, line in enumerate(lines, start=segment.first):
            if number < self._expected:
                continue
            self._expected = number + 1
            event = segments.parse(line, number, self._tell)
            if event is not None:
                self.finished = event.kind is EventKind.RUN_FINISHED
                yield event


def last(storage: Storage, most: int) -> list[Event]:
    """The newest events of the run's `events` folder, at most about `most`, in order: for a look at a long run.

    Raises: StorageError.
    """
    with contextlib.suppress(NotFoundError):
        found, is_whole = _last(storage, most)
        if is_whole:
            return found
    return _last(storage, most)[0]  # compacted since it was listed; or there is damage


def _last(storage: Storage, most: int) -> tuple[list[Event], bool]:
    """And whether they are without a gap."""
    found: list[Event] = []
    begin: int | None = None
    is_whole = True
    for segment in reversed(segments.listed(storage)):
        lines = segments.lines(storage, segment)
        is_whole &= begin is None or segment.first + len(lines) >= begin
        found, begin = _events_of(segment, lines) + found, segment.first
        if len(found) >= most:
            break
    return found[-most:], is_whole


def _events_of(segment: Segment, lines: list[str]) -> list[Event]:
    parsed = (segments.parse(line, number, logger.warning) for number, line in enumerate(lines, start=segment.first))
    return [event for event in parsed if event is not None]


def _tail(storage: Storage) -> tuple[int, Event | None]:
    """The number of the next event, and the newest one that can be read."""
    end = 0
    for segment in reversed(segments.listed(storage)):
        lines = segments.lines(storage, segment)
        end = end or segment.first + max(1, len(lines))  # an empty one is damaged, and its name is taken
        if events := _events_of(segment, lines):
            return end, events[-1]
    return end, None


def _name(first: int) -> str:
    return segments.named(first).name
