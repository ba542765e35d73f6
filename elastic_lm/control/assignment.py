"""Who computes which micro-batches: the slower a member, the fewer. The bits do not depend on it."""

from __future__ import annotations

import heapq
import statistics

SAME_SPEED = 1.25  # closer than this is noise


def shares(num_micro_batches: int, seconds: list[float | None]) -> list[int]:
    """Micro-batches per member, so that the slowest finishes as early as possible.

    `seconds` per micro-batch of each member, None when unknown (taken as the median). The sum is `num_micro_batches`.
    Greedy on the time of completion, which is optimal for equal jobs on machines of given speeds.
    """
    pace = _paces(seconds)
    queue = [(pace[rank], rank) for rank in range(len(seconds))]
    heapq.heapify(queue)
    counts = [0] * len(seconds)
    for _ in range(num_micro_batches):
        _, rank = heapq.heappop(queue)
        counts[rank] += 1
        heapq.heappush(queue, ((counts[rank] + 1) * pace[rank], rank))
    return counts


def assignments(num_micro_batches: int, seconds: list[float | None]) -> tuple[tuple[int, ...], ...]:
    """Consecutive micro-batches for each rank; together each of range(num_micro_batches) once."""
    found, start = [], 0
    for count in shares(num_micro_batches, seconds):
        found.append(tuple(range(start, start + count)))
        start += count
    return tuple(found)


def step_seconds(counts: list[int], seconds: list[float | None]) -> float:
    """Computing time of a step: the slowest member's."""
    return max(count * pace for count, pace in zip(counts, _paces(seconds), strict=True))


def _paces(seconds: list[float | None]) -> list[float]:
    known = [s for s in seconds if s]
    usual = statistics.median(known) if known else 1.0
    fastest = min(known, default=1.0)
    return [fastest if (s or usual) < SAME_SPEED * fastest else (s or usual) for s in seconds]
