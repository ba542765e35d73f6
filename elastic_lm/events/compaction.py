"""Compaction: many small segments become one, so that a log of a month is read in seconds.

A segment is stored every two seconds: a million objects in a month, whose reading would take hours. The oldest ones are
copied, line by line, into one whose name says what it covers; only then are they deleted.

Invariant: compaction changes neither the log, whoever reads it and whenever, nor the one name at which a log of several
owners can grow (log.py). A frozen owner that thaws tries one name: that of the last segment it stored, when the answer was
lost, or the name after it, where its successor opened the log. Both stay taken: the last segment of an owner and the first
of the next are never deleted. Trade-off: a compaction that is cut short leaves segments that nobody reads any more.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

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
        self._thread: threading.Thread | None = None

    def stored(self) -> None:
        """One more segment is stored."""
        self._num_new += 1
        if self._num_new < BATCH or (self._thread is not None and self._thread.is_alive()):
            return
        self._num_new = 0
        self._thread = threading.Thread(target=self._run, name="compactor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while compact(self._storage):
                pass
        except (ElasticLMError, OSError) as error:
            logger.warning("Segments of the event log %s cannot be joined now: %s", self._storage.url, error)


def compact(storage: Storage) -> bool:
    """Join the oldest small segments of the folder, if there are enough.    Returns: whether any were.

    Raises: StorageError; NotFoundError when somebody else was at it.
    """
    listed = segments.listed(storage)
    small = [index for index, segment in enumerate(listed) if segment.end is None]
    if len(small) < BATCH + STAYING:
        return False
    begin = small[0]
    around = listed[max(0, begin - 1) : begin + BATCH + 1]
    lines = dict(segments.read(storage, around))
    runs = _runs(listed[begin : begin + BATCH + 1], lines)
    for run in runs:
        _join(storage, run, lines)
        _delete(storage, run, _borders(around, lines))
    return bool(runs)


def _runs(batch: Sequence[Segment], lines: Lines) -> list[list[Segment]]:
    """Small ones of which each begins where the one before it ends: nothing is joined across damage. Not the last."""
    runs: list[list[Segment]] = [[]]
    end = batch[0].first
    for segment in batch:
        if segment.first < end:
            runs[-1] = []  # it reaches further than the next one's beginning, and has to be seen to
        if segment.first != end or segment.end is not None:
            runs.append([])
        if segment.end is None and lines[segment] and segment is not batch[-1]:
            runs[-1].append(segment)
        end = segment.first + len(lines[segment])
    return [run for run in runs if len(run) > 1]


def _join(storage: Storage, run: Sequence[Segment], lines: Lines) -> None:
    joined = [line for segment in run for line in lines[segment]]
    with contextlib.suppress(AlreadyExistsError):  # of the same lines: they never change
        storage.create(segments.named(run[0].first, run[0].first + len(joined)).name, segments.data(joined))


def _delete(storage: Storage, run: Sequence[Segment], staying: set[Segment]) -> None:
    with ThreadPoolExecutor(segments.AT_ONCE, thread_name_prefix="compaction") as pool:
        list(pool.map(storage.delete, [segment.name for segment in run if segment not in staying]))


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
