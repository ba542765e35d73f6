"""Documents, the chunks of files that they come out of, and what every format of files has to offer.

Invariant: a chunk gives the same documents in the same order on any machine and whenever it is asked, and every document
of a file begins in exactly one of its chunks. What cannot be read as text is replaced and counted; what is no document at
all is refused, with its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, Protocol

from elastic_lm.data.mixture import Source
from elastic_lm.data.stored_file import StoredFile
from elastic_lm.errors import DataError
from elastic_lm.storage import Storage

CHUNK_BYTES = 8 * 2**20  # a constant, because what the tokenizer is trained on depends on it
LARGEST_DOCUMENT_BYTES = 2**30


@dataclass(frozen=True)
class Document:
    """`replaced`: some bytes were no UTF-8 and stand as U+FFFD. `place`: where it begins in its file, in the format's unit."""

    text: str
    replaced: bool
    place: int = 0


@dataclass(frozen=True)
class File:
    """A file with text in it. `size_bytes` as it is stored. `source`: what it was named by."""

    storage: Storage
    path: str
    size_bytes: int
    source: Source

    @property
    def url(self) -> str:
        return f"{self.storage.url}/{self.path}"

    def open(self) -> StoredFile:
        """As a file object. Its reads are requests to storage."""
        return StoredFile(self.storage, self.path, self.size_bytes)

    def at(self, unit: str, place: int) -> str:
        """A place in words."""
        return f"{self.url}, {unit} {place}"


@dataclass(frozen=True)
class Chunk:
    """Documents that begin in [start, stop) of a file, in the format's unit. `num_bytes`: what reading it takes, about."""

    file: File
    format: Format
    start: int
    stop: int
    num_bytes: int

    def documents(self) -> Iterator[Document]:
        """In their order, empty ones included.    Raises: DataError with the place of what is no document; StorageError."""
        return self.format.documents(self)

    def at(self, place: int) -> str:
        """A place of the file in words."""
        return self.file.at(self.format.unit, place)


class Format(Protocol):
    """How documents lie in a file. Frozen and picklable."""

    @property
    def unit(self) -> Literal["byte", "row"]:
        """What places count: bytes of the text (of the unpacked one, where it is compressed), or rows."""

    @property
    def unpacks(self) -> bool:
        """Whether there is more text in a chunk than bytes that are read."""

    def cut(self, file: File) -> list[Chunk]:
        """The chunks of a file, in order.    Raises: DataError when it cannot hold documents."""

    def documents(self, chunk: Chunk) -> Iterator[Document]:
        """What `Chunk.documents` gives."""


class StreamFormat(Format, Protocol):
    """A format that can be read from its beginning to its end, so that the file may be a compressed one."""

    def parse(self, stream: BinaryIO, file: File, start: int = 0) -> Iterator[Document]:
        """The documents in a stream that begins at `start` of the file.    Raises: DataError with the place."""


def decoded(data: bytes, place: int = 0) -> Document:
    """Bytes as a document: UTF-8, a mark of byte order left out, what is no UTF-8 replaced."""
    try:
        return Document(data.decode("utf-8-sig"), False, place)
    except UnicodeDecodeError:
        return Document(data.decode("utf-8-sig", "replace"), True, place)


def check_size(size_bytes: int, where: str, what: str, remedy: str) -> None:
    """Raises: DataError when this is too large for one document."""
    if size_bytes > LARGEST_DOCUMENT_BYTES:
        raise DataError(f"{where}: {what} exceeds {LARGEST_DOCUMENT_BYTES} bytes; {remedy}")
