"""Documents out of files: .jsonl (one {"text": ...} a line) and plain text (one file, one document), local or on S3.

Invariant: the same files give the same documents in the same order on any machine and whatever the number of readers:
by order of the sources, then by path, then by place in the file. What cannot be read as text is replaced and counted;
what is no document at all is refused, with its place.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elastic_lm.errors import ConfigError, DataError
from elastic_lm.storage import Storage

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".tex", ".html", ".c", ".h", ".cpp", ".rs", ".go", ".js", ".ts", ".java")
LINES_SUFFIX = ".jsonl"
CHUNK_BYTES = 8 * 2**20  # a constant, because what the tokenizer is trained on depends on it
LARGEST_DOCUMENT_BYTES = 2**30
READ_AHEAD_BYTES = 2**20


@dataclass(frozen=True)
class Chunk:
    """Documents that begin in bytes [start, stop) of a file. A plain text file is one chunk."""

    storage: Storage
    path: str
    start: int
    stop: int
    file_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start

    def place(self, offset: int = 0) -> str:
        return f"{self.storage.url}/{self.path}, byte {self.start + offset}"


@dataclass(frozen=True)
class Document:
    """`replaced`: some bytes were no UTF-8 and stand as U+FFFD."""

    text: str
    replaced: bool


# -- finding ---------------------------------------------------------------------------------------------------------


def find_chunks(sources: Sequence[str]) -> list[Chunk]:
    """All chunks of files, folders and patterns (`*`, `?`, `**`), in order. A file that is named twice comes once.

    Raises: ConfigError when a source matches nothing or has an unknown suffix; DataError when a link leads out of a folder.
    """
    if not sources:
        raise ConfigError("no sources; name files, folders or patterns, e.g. texts/ or s3://bucket/**/*.jsonl")
    chunks: list[Chunk] = []
    seen = set()
    for source in sources:
        for storage, path in _find(source):
            url = f"{storage.url}/{path}"
            if url not in seen:
                seen.add(url)
                chunks.extend(_chunks_of(storage, path))
    return chunks


def _find(source: str) -> list[tuple[Storage, str]]:
    if not source.startswith("s3://"):
        source = os.path.abspath(os.path.expanduser(source.removeprefix("file://")))
    parent, _, name = source.rstrip("/").rpartition("/")
    folder = Storage.open(parent or "/")
    if name and folder.exists(name):
        if not name.endswith((*TEXT_SUFFIXES, LINES_SUFFIX)):
            raise ConfigError(f"{source}: unknown suffix; known: {LINES_SUFFIX} {' '.join(TEXT_SUFFIXES)}")
        _check_is_file(folder, name)
        return [(folder, name)]
    root, pattern = _split_pattern(source)
    storage = Storage.open(root)
    names = [path for path in storage.list() if _is_wanted(path) and (pattern is None or pattern.fullmatch(path))]
    if not names:
        raise ConfigError(
            f"{source}: no such file, or nothing in it ends in {LINES_SUFFIX} {' '.join(TEXT_SUFFIXES)}; "
            f"hidden files do not count"
        )
    for path in names:
        _check_inside(storage, path)
        _check_is_file(storage, path)
    return [(storage, path) for path in names]


def _split_pattern(source: str) -> tuple[str, re.Pattern[str] | None]:
    """The folder before the first wildcard, and what follows as an expression for relative paths."""
    wildcard = re.search(r"[*?]", source)
    if wildcard is None:
        return source, None
    root, _, pattern = source[: wildcard.start()].rpartition("/")
    pattern += source[wildcard.start() :]
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return root or "/", re.compile("".join(words.get(part, re.escape(part)) for part in parts), re.DOTALL)


def _is_wanted(path: str) -> bool:
    hidden = any(part.startswith(".") for part in path.split("/"))
    return not hidden and path.endswith((*TEXT_SUFFIXES, LINES_SUFFIX))


def _check_inside(storage: Storage, path: str) -> None:
    if storage.url.startswith("file://"):
        root = os.path.realpath(storage.url[7:])
        if os.path.commonpath([root, os.path.realpath(os.path.join(root, path))]) != root:
            raise DataError(f"{storage.url}/{path} is a link that leads out of its folder; name its target as a source")


def _check_is_file(storage: Storage, path: str) -> None:
    if storage.url.startswith("file://") and not os.path.isfile(os.path.join(storage.url[7:], path)):
        raise DataError(
            f"{storage.url}/{path} is no file that can be read, but a link to nothing, a pipe or the like; remove it, or "
            "name the files you mean"
        )


def _chunks_of(storage: Storage, path: str) -> list[Chunk]:
    size = storage.size(path)
    if path.endswith(LINES_SUFFIX):
        return [Chunk(storage, path, at, min(at + CHUNK_BYTES, size), size) for at in range(0, size, CHUNK_BYTES)]
    if size > LARGEST_DOCUMENT_BYTES:
        raise DataError(
            f"{storage.url}/{path}: one document of {size} bytes exceeds {LARGEST_DOCUMENT_BYTES}; split it, or use "
            f"{LINES_SUFFIX}"
        )
    return [Chunk(storage, path, 0, size, size)]


# -- reading ---------------------------------------------------------------------------------------------------------


def read_chunk(chunk: Chunk) -> bytes:
    """The bytes of the chunk's documents: whole lines of a .jsonl file, or a whole text file."""
    if not chunk.path.endswith(LINES_SUFFIX):
        return chunk.storage.read_range(chunk.path, 0, chunk.file_bytes)
    # One byte earlier: a newline there means that a line begins at `start`.
    begin = max(0, chunk.start - 1)
    data = chunk.storage.read_range(chunk.path, begin, chunk.stop - begin)
    if chunk.start > 0:
        _, newline, data = data.partition(b"\n")
        if not newline:
            return b""
    at = chunk.stop
    pieces = [data]
    while data and not pieces[-1].endswith(b"\n") and at < chunk.file_bytes:
        more = chunk.storage.read_range(chunk.path, at, min(READ_AHEAD_BYTES, chunk.file_bytes - at))
        at += len(more)
        line, newline, _ = more.partition(b"\n")
        pieces.append(line + newline)
        if at - chunk.start > LARGEST_DOCUMENT_BYTES:
            raise DataError(f"{chunk.place()}: a line exceeds {LARGEST_DOCUMENT_BYTES} bytes; split the document")
    return b"".join(pieces)


def documents(chunk: Chunk, data: bytes) -> Iterator[Document]:
    """The documents in what `read_chunk` returned, empty ones included.    Raises: DataError with the place."""
    if not chunk.path.endswith(LINES_SUFFIX):
        yield _decoded(data)
        return
    for number, line in enumerate(data.split(b"\n")):
        if line.strip():
            yield _from_line(chunk, number, line)


def _from_line(chunk: Chunk, number: int, line: bytes) -> Document:
    decoded = _decoded(line)
    try:
        value = json.loads(decoded.text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{chunk.place()} plus {number} lines: not JSON ({error}); fix or remove the line") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise DataError(
            f'{chunk.place()} plus {number} lines: not an object with a string "text"; fix or remove the line'
        )
    clean = _decoded(text.encode("utf-8", "surrogatepass"))  # JSON can hold half of a surrogate pair, UTF-8 cannot
    return Document(clean.text, decoded.replaced or clean.replaced)


def _decoded(data: bytes) -> Document:
    try:
        return Document(data.decode("utf-8-sig"), replaced=False)
    except UnicodeDecodeError:
        return Document(data.decode("utf-8-sig", "replace"), replaced=True)
