"""Segments: the objects that an event log consists of, one JSON object a line.

A segment is named by the number of its first event, `NNNNNNNNNNNN.jsonl`. A compacted one (compaction.py) holds what several
held, and its name says where it ends, `NNNNNNNNNNNN-NNNNNNNNNNNN.jsonl`. Neither ever changes. Invariant: where a compacted
one reaches, it counts, and what else begins there is left out.
"""

from __future__ import annotations

import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from elastic_lm.events.types import Event
from elastic_lm.storage import Storage

AT_ONCE = 16  # segments that are read ahead: each is a request of some ten milliseconds for a few kilobytes
_NAME = re.compile(r"(\d{12})(?:-(\d{12}))?\.jsonl")


@dataclass(frozen=True)
class Segment:
    """One object. `end`: the number of the event after its last, if its name says so."""

    name: str
    first: int
    end: int | None = None


def named(first: int, end: int | None = None) -> Segment:
    """The segment that begins with event number `first`, and if it is a compacted one, ends before `end`."""
    name = f"{first:012d}.jsonl" if end is None else f"{first:012d}-{end:012d}.jsonl"
    return Segment(name, first, end)


def listed(storage: Storage) -> list[Segment]:
    """Those of the folder that count, in order.    Raises: StorageError."""
    matches = [match for name in storage.list() if (match := _NAME.fullmatch(name))]
    there = [Segment(match.string, int(match[1]), int(match[2]) if match[2] else None) for match in matches]
    counting, reached = [], 0
    for segment in sorted(there, key=lambda segment: (segment.first, -(segment.end or 0))):
        if (segment.first if segment.end is None else segment.end - 1) >= reached:
            counting.append(segment)
        reached = max(reached, segment.end or 0)
    return counting


def data(lines: Iterable[str]) -> bytes:
    """What a segment of these lines is, byte by byte."""
    return "".join(line + "\n" for line in lines).encode()


def lines(storage: Storage, segment: Segment) -> list[str]:
    """Raises: NotFoundError when it was compacted since it was listed; StorageError."""
    return storage.read(segment.name).decode(errors="replace").splitlines()


def read(storage: Storage, segments: Sequence[Segment]) -> Iterator[tuple[Segment, list[str]]]:
    """Each with its lines, in order, some read ahead.    Raises: what `lines` raises."""
    if len(segments) < 2:
        yield from ((segment, lines(storage, segment)) for segment in segments)
        return
    pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="segments")
    rest = iter(segments)
    ahead = deque((each, pool.submit(lines, storage, each)) for each in itertools.islice(rest, AT_ONCE))
    try:
        while ahead:
            segment, future = ahead.popleft()
            yield segment, future.result()
            ahead.extend((each, pool.submit(lines, storage, each)) for each in itertools.islice(rest, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def parse(line: str, number: int, tell: Callable[[str], None]) -> Event | None:
    """The event; None, with a sentence, for a line that cannot be read."""
    try:
        return Event.from_json(line)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        tell(f"event {number} cannot be read: {type(error).__name__}: {error}")
        return None
