"""Text and lines behind gzip or Zstandard: the file is read from its beginning to its end, as a stream.

Invariant: the documents are those of the unpacked file, and memory is bounded by the largest of them, never by the file.
Trade-off: such a file cannot be cut, so one task reads all of it; many files of some 100 MB are spread better than one.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

from elastic_lm.data.documents import Chunk, Document, File, StreamFormat
from elastic_lm.errors import DataError

PACKED_BUFFER_BYTES = 4 * 2**20
UNPACKED_BUFFER_BYTES = 2**20
Packing = Literal["gzip", "zstd"]


@dataclass(frozen=True)
class Compressed:
    """A compressed file of another format. Places count bytes of the unpacked text."""

    inner: StreamFormat
    packing: Packing

    unit: Literal["byte"] = "byte"
    unpacks: bool = True

    def cut(self, file: File) -> list[Chunk]:
        if file.size_bytes == 0:
            raise DataError(f"{file.url} is empty, which no {self.packing} file is; make it again, or remove it")
        return [Chunk(file, self, 0, file.size_bytes, file.size_bytes)]

    def documents(self, chunk: Chunk) -> Iterator[Document]:
        packed = io.BufferedReader(chunk.file.open(), PACKED_BUFFER_BYTES)
        stream = io.BufferedReader(_Unpacked(packed, self.packing, chunk.file), UNPACKED_BUFFER_BYTES)
        return self.inner.parse(stream, chunk.file)


class _Unpacked(io.RawIOBase):
    """The unpacked bytes.    Raises: DataError where they cannot be had."""

    def __init__(self, packed: BinaryIO, packing: Packing, file: File) -> None:
        self._stream = _open(packed, packing)
        self._packing, self._file = packing, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._stream.readinto(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{self._file.url}: a damaged or truncated {self._packing} file ({error}); copy or make it again, or remove it"
            ) from error


def _open(packed: BinaryIO, packing: Packing) -> Any:
    if packing == "gzip":
        return gzip.GzipFile(fileobj=cast(Any, packed))
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), packing)
