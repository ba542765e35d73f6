"""Batches that a run leaves out: half-open ranges of their indices, as `training.skip` has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Skip = tuple[tuple[int, int], ...]


def skip_of(ranges: Any) -> Skip:
    """Of what JSON has.    Raises: TypeError, ValueError when that is no list of pairs of numbers."""
    return tuple((int(start), int(stop)) for start, stop in ranges)


def ranges_told(ranges: Iterable[tuple[int, int]]) -> str:
    """As `--skip` takes them."""
    return ", ".join(f"{start}:{stop}" for start, stop in ranges)
