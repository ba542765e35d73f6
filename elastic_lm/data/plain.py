"""Text as it is: a file that is one document, and files with a JSON object in every line.

Invariant: a line belongs to the chunk in which it begins, however long it is, so a file can be cut anywhere.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from elastic_lm.data import documents
from elastic_lm.data.documents import Chunk, Document, File, check_size, decoded
from elastic_lm.errors import DataError

READ_AHEAD_BYTES = 2**20
SPLIT = "split the document"


@dataclass(frozen=True)
class Text:
    """A file is one document."""

    unit: Literal["byte"] = "byte"
    unpacks: bool = False

    def cut(self, file: File) -> list[Chunk]:
        size = file.size_bytes
        if size > documents.LARGEST_DOCUMENT_BYTES:
            raise DataError(
                f"{file.url}: one document of {size} bytes exceeds {documents.LARGEST_DOCUMENT_BYTES}; split it, or use "
                ".jsonl"
            )
        return [Chunk(file, self, 0, size, size)]

    def documents(self, chunk: Chunk) -> Iterator[Document]:
        yield decoded(chunk.file.storage.read_range(chunk.file.path, 0, chunk.stop))

    def parse(self, stream: BinaryIO, file: File, start: int = 0) -> Iterator[Document]:
        data = bytearray()
        while piece := stream.read(READ_AHEAD_BYTES):
            data += piece
            check_size(len(data), file.url, "the document", "split it, or use .jsonl")
        yield decoded(bytes(data), start)


@dataclass(frozen=True)
class Lines:
    """A JSON object in every line that is not blank, its text under `text_column`."""

    text_column: str
    unit: Literal["byte"] = "byte"
    unpacks: bool = False

    def cut(self, file: File) -> list[Chunk]:
        size, step = file.size_bytes, documents.CHUNK_BYTES
        bounds = [(start, min(start + step, size)) for start in range(0, size, step)]
        return [Chunk(file, self, start, stop, stop - start) for start, stop in bounds]

    def documents(self, chunk: Chunk) -> Iterator[Document]:
        start, data = _whole_lines(chunk)
        yield from self.parse(io.BytesIO(data), chunk.file, start, named=chunk.start)

    def parse(self, stream: BinaryIO, file: File, start: int = 0, *, named: int | None = None) -> Iterator[Document]:
        """`named`: the place that refused lines are counted from."""
        place, number = start, 0
        while line := stream.readline(documents.LARGEST_DOCUMENT_BYTES + 1):
            check_size(len(line), file.at(self.unit, place), "a line", SPLIT)
            if line.strip():
                where = f"{file.at(self.unit, start if named is None else named)} plus {number} lines"
                yield self._document(line, place, where)
            place, number = place + len(line), number + 1

    def _document(self, line: bytes, place: int, where: str) -> Document:
        whole = decoded(line)
        try:
            value = json.loads(whole.text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}); fix or remove the line") from error
        text = value.get(self.text_column) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise DataError(f'{where}: not an object with a string "{self.text_column}"; fix or remove the line')
        clean = decoded(text.encode("utf-8", "surrogatepass"))  # JSON can hold half of a surrogate pair, UTF-8 cannot
        return Document(clean.text, whole.replaced or clean.replaced, place)


def _whole_lines(chunk: Chunk) -> tuple[int, bytes]:
    """The lines that begin in the chunk, and where the first of them begins."""
    storage, path = chunk.file.storage, chunk.file.path
    # One byte earlier: a newline there means that a line begins at `start`.
    begin = max(0, chunk.start - 1)
    data = storage.read_range(path, begin, chunk.stop - begin)
    if chunk.start > 0:
        cut, newline, data = data.partition(b"\n")
        if not newline:
            return chunk.stop, b""
        begin += len(cut) + 1
    at = chunk.stop
    pieces = [data]
    while data and not pieces[-1].endswith(b"\n") and at < chunk.file.size_bytes:
        more = storage.read_range(path, at, min(READ_AHEAD_BYTES, chunk.file.size_bytes - at))
        at += len(more)
        line, newline, _ = more.partition(b"\n")
        pieces.append(line + newline)
        check_size(at - chunk.start, chunk.at(chunk.start), "a line", SPLIT)
    return begin, b"".join(pieces)
