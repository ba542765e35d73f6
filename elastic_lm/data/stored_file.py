"""A file in storage as Python's file objects are: for libraries that read files, wherever the bytes lie.

Invariant: only the ranges that are asked for are read, and a fault of storage comes out as the StorageError it is.
"""

from __future__ import annotations

import io
from typing import Any

from elastic_lm.storage import Storage


class StoredFile(io.RawIOBase):
    """Read-only and seekable. Every read is a request to storage: buffer it where reads are small."""

    def __init__(self, storage: Storage, path: str, size_bytes: int) -> None:
        self._storage, self._path, self._size_bytes = storage, path, size_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"place {base + offset} lies before the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size_bytes - self._at))
        if length:
            view[:length] = self._storage.read_range(self._path, self._at, length)
        self._at += length
        return length
