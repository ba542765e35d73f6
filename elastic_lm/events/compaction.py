"""Compaction: many small segments become one, so that a log of a month is read in seconds.

A segment is stored every two seconds: a million objects in a month, whose reading would take hours. Old ones are copied, line
by line, into one whose name says what it covers; only then are they deleted.

Invariant: compaction changes neither the log, whoever reads it and whenever, nor the one name at which a log of several
owners can grow (log.py). A frozen owner that thaws tries one name: that of the last segment it stored, when the answer was
lost, or the name after it, where its successor opened the log. Both stay taken: the last segment of an owner and the first
of the next are never deleted. (One that froze before it stored its opening looks again when that is stored.)
Trade-offs: a compaction that is cut short leaves segments that nobody reads any more, and nothing is joined across damage. It
is done one request after the other: nobody waits for it, and nothing of it is waited for when the process ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence

from elastic_lm.errors import AlreadyExistsError, ElasticLMError
from elastic_lm.events import segments
from elastic_lm.events.segments import Segment
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

BATCH = 256  # segments that become one
STAYING = 256  # of the newest, which are left alone: whoever follows a log reads these

Lines = dict[Segment, list[str]]


class Compactor:
    """Keeps one log compacted, on a thread of its own: a slow store delays no event."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._num_new = BATCH  # segments since the last look: for all we know there are many
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def stored(self) -> None:
        """One more segment is stored."""
        self._num_new += 1
        if self._num_new < BATCH or (self._thread is not None and self._thread.is_alive()):
            return
        self._num_new = 0
        self._thread = threading.Thread(target=self._run, name="compactor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Begin nothing more. What is under way is harmless at any point, so it is not waited for."""
        self._closed.set()

    def _run(self) -> None:
        try:
            compact(self._storage, self._closed.is_set)
        except (ElasticLMError, OSError) as error:
            logger.warning("Segments of the event log %s cannot be joined now: %s", self._storage.url, error)


def compact(storage: Storage, cancelled: Callable[[], bool] = lambda: False) -> int:
    """Join the old small segments of the folder, where there are enough side by side.    Returns: how many were joined.

    Raises: StorageError; NotFoundError when somebody else was at it.
    """
    listed = segments.listed(storage)
    num_joined = 0
    lines: Lines = {}
    for batch in _batches(listed):
        around = listed[max(0, batch.start - 1) : batch.stop + 1]
        lines = {
            segment: lines[segment] for segment in around if segment in lines
        }  # of which the first is deleted by now
        for segment in around:
            if cancelled():
                return num_joined
            if segment not in lines:
                lines[segment] = segments.lines(storage, segment)
        borders = _borders(around, lines)
        for run in _runs(listed[batch], listed[batch.stop], lines):
            _join(storage, run, lines)
            for segment in run:
                if segment not in borders and not cancelled():
                    storage.delete(segment.name)
            num_joined += len(run)
    return num_joined


def _batches(listed: Sequence[Segment]) -> Iterator[slice]:
    """BATCH small ones side by side, each time; none of the newest. What is left beside damage is too few."""
    small = [index for index, segment in enumerate(listed) if segment.end is None]
    for _, group in itertools.groupby(enumerate(small[:-STAYING]), lambda pair: pair[1] - pair[0]):
        first, *rest = (index for _, index in group)
        for begin in range(first, first + 1 + len(rest) - BATCH + 1, BATCH):
            yield slice(begin, begin + BATCH)


def _runs(batch: Sequence[Segment], behind: Segment, lines: Lines) -> list[list[Segment]]:
    """Those of which each begins where the one before it ends; none that reaches into the next, nor what it covers."""
    runs: list[list[Segment]] = [[]]
    end = batch[0].first
    for segment in (*batch, behind):
        if segment.first < end:
            del runs[-1][-1:]  # the one before, unless it is left alone already
        if segment.first != end:
            runs.append([])
        if segment.first >= end and lines[segment] and segment is not behind:
            runs[-1].append(segment)
        elif not lines[segment]:
            runs.append([])
        end = max(end, segment.first + len(lines[segment]))
    return [run for run in runs if len(run) > 1]


def _join(storage: Storage, run: Sequence[Segment], lines: Lines) -> None:
    joined = [line for segment in run for line in lines[segment]]
    with contextlib.suppress(AlreadyExistsError):  # of the same lines: they never change
        storage.create(segments.named(run[0].first, run[0].first + len(joined)).name, segments.data(joined))


def _borders(around: Sequence[Segment], lines: Lines) -> set[Segment]:
    """Those beside which another owner wrote, as far as anybody knows: the first and the last of them, too."""
    epochs = {segment: (_owner_epoch(lines[segment][:1]), _owner_epoch(lines[segment][-1:])) for segment in around}
    borders = {around[0], around[-1]}
    for before, after in itertools.pairwise(around):
        if epochs[before][1] != epochs[after][0] or epochs[after][0] is None:
            borders |= {before, after}
    return borders


def _owner_epoch(lines: Sequence[str]) -> int | None:
    """Of the one line's event; None when it cannot be read, or there is none."""
    try:
        epoch = json.loads(lines[0])["owner_epoch"]
    except (IndexError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return epoch if isinstance(epoch, int) else None
