"""Arrays that grow, kept in storage as pieces of a fixed size: nothing in memory grows with them.

Invariant: the same items give the same pieces, however they arrive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_lm.storage import Storage

PIECE_BYTES = 16 * 2**20


class PieceWriter:
    """Takes items of one dtype and writes `<name>-<number>.bin`, PIECE_BYTES each but the last."""

    def __init__(self, folder: Storage, name: str, dtype: Any) -> None:
        self._folder, self._name = folder, name
        self._buffer = np.empty(_piece_items(np.dtype(dtype)), dtype)
        self._num_buffered = 0
        self._num_pieces = 0

    def add(self, items: NDArray[Any]) -> None:
        """Append; full pieces are written."""
        while len(items):
            fits = items[: len(self._buffer) - self._num_buffered]
            self._buffer[self._num_buffered : self._num_buffered + len(fits)] = fits
            self._num_buffered += len(fits)
            items = items[len(fits) :]
            if self._num_buffered == len(self._buffer):
                self._flush()

    def close(self) -> int:
        """Write what remains. Returns the number of items."""
        num_items = self._num_pieces * len(self._buffer) + self._num_buffered
        if self._num_buffered:
            self._flush()
        return num_items

    def _flush(self) -> None:
        data = self._buffer[: self._num_buffered].tobytes()
        self._folder.write(_piece_name(self._name, self._num_pieces), data)
        self._num_buffered = 0
        self._num_pieces += 1


def read_pieces(folder: Storage, name: str, dtype: Any, num_items: int) -> Iterator[NDArray[Any]]:
    """The items again, a piece at a time.    Raises: StorageError."""
    piece_items = _piece_items(np.dtype(dtype))
    for number in range(-(-num_items // piece_items)):
        yield np.frombuffer(folder.read(_piece_name(name, number)), dtype=dtype)


def _piece_items(dtype: np.dtype[Any]) -> int:
    return max(1, PIECE_BYTES // dtype.itemsize)


def _piece_name(name: str, number: int) -> str:
    return f"{name}-{number:05d}.bin"
