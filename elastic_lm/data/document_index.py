"""Where tokens came from: for every document of a corpus its file, its place there, and its tokens.

Invariant: the index describes the corpus whose manifest's hash it holds, and no other; it is no part of that hash, so the
same text has the same identity wherever it was read from. Trade-off: it is written beside the shards and read for looking
at data only. About 5 bytes a document, in Parquet files of a bounded size, of which a look reads some ten kilobytes.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.parts import Part, Records
from elastic_lm.data.stored_file import StoredFile
from elastic_lm.errors import DataError, NotFoundError
from elastic_lm.storage import Storage

FILE_NAME = "documents.json"
FORMAT_VERSION = 1
FILE_DOCUMENTS = 2**18
ROW_GROUP_DOCUMENTS = 2**14
KEPT_ROW_GROUPS = 64
SCHEMA = pa.schema(
    [("file", pa.string()), ("place", pa.int64()), ("first_token", pa.int64()), ("num_tokens", pa.int64())]
)
DELTAS = dict.fromkeys(("place", "first_token", "num_tokens"), "DELTA_BINARY_PACKED")


@dataclass(frozen=True)
class Origin:
    """A document: `place` in `file`, in the unit of its format; tokens [first_token, first_token + num_tokens)."""

    file: str
    place: int
    first_token: int
    num_tokens: int

    @property
    def stop(self) -> int:
        return self.first_token + self.num_tokens


@dataclass(frozen=True)
class IndexFile:
    """One Parquet file of the index. `path` is relative to the corpus."""

    path: str
    first_token: int
    num_documents: int


# -- writing ---------------------------------------------------------------------------------------------------------


class IndexWriter:
    """Takes documents in the order of their tokens and writes `documents/<kind>-<number>-<hash>.parquet`."""

    def __init__(self, out: Storage, kind: str) -> None:
        self._out, self._kind = out, kind
        self._buffer: list[Any] = []
        self._num_buffered = 0
        self._num_tokens = 0
        self._files: list[IndexFile] = []

    def add(self, part: Part, records: Records) -> None:
        """Append documents of a part; full files are written."""
        stops = self._num_tokens + np.cumsum(records["num_tokens"])
        urls = pa.array([_spelled(chunk.file.url) for chunk in part.chunks])
        columns = [
            urls.take(pa.array(records["chunk"])),
            records["place"],
            stops - records["num_tokens"],
            records["num_tokens"],
        ]
        self._num_tokens = int(stops[-1]) if len(stops) else self._num_tokens
        rows = pa.table([pa.array(column) for column in columns], schema=SCHEMA)
        while rows.num_rows:
            fits = rows.slice(0, FILE_DOCUMENTS - self._num_buffered)
            self._buffer.append(fits)
            self._num_buffered += fits.num_rows
            rows = rows.slice(fits.num_rows)
            if self._num_buffered == FILE_DOCUMENTS:
                self._flush()

    def close(self) -> tuple[IndexFile, ...]:
        """Write what remains. Returns all files in order."""
        if self._num_buffered:
            self._flush()
        return tuple(self._files)

    def _flush(self) -> None:
        rows = pa.concat_tables(self._buffer).combine_chunks()
        self._buffer, self._num_buffered = [], 0
        sink = pa.BufferOutputStream()
        pq.write_table(
            rows,
            sink,
            row_group_size=ROW_GROUP_DOCUMENTS,
            compression="zstd",
            use_dictionary=["file"],
            column_encoding=DELTAS,
            write_page_checksum=True,
        )
        data = sink.getvalue().to_pybytes()
        path = f"documents/{self._kind}-{len(self._files):05d}-{xxhash.xxh3_64_hexdigest(data)}.parquet"
        self._out.write(path, data)
        self._files.append(IndexFile(path, rows["first_token"][0].as_py(), rows.num_rows))


def save(out: Storage, manifest: Manifest, train: Sequence[IndexFile], held_out: Sequence[IndexFile]) -> None:
    """Name the files of the index of a corpus."""
    fields = {
        "format_version": FORMAT_VERSION,
        "manifest": manifest.hash,
        "train": [asdict(file) for file in train],
        "held_out": [asdict(file) for file in held_out],
    }
    out.write(FILE_NAME, json.dumps(fields, indent=1).encode())


def _spelled(url: str) -> str:
    """Names of files are bytes; what is no UTF-8 in them is spelled with backslashes."""
    return url.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# -- reading ---------------------------------------------------------------------------------------------------------


class DocumentIndex:
    """The documents of a corpus, or of its held-out part, by their tokens."""

    def __init__(self, storage: Storage, files: Sequence[IndexFile]) -> None:
        self._storage, self._files = storage, files
        self._firsts = [file.first_token for file in files]
        self._opened = lru_cache(KEPT_ROW_GROUPS)(self._open)
        self._rows = lru_cache(KEPT_ROW_GROUPS)(self._read)

    @classmethod
    def load(cls, storage: Storage, manifest: Manifest, *, held_out: bool = False) -> DocumentIndex | None:
        """The index of this very corpus; None when it has none.    Raises: DataError when it is damaged; StorageError."""
        try:
            text = storage.read(FILE_NAME)
        except NotFoundError:
            return None
        try:
            fields = json.loads(text)
            if fields["format_version"] != FORMAT_VERSION or fields["manifest"] != manifest.hash:
                return None
            files = [IndexFile(**file) for file in fields["held_out" if held_out else "train"]]
            return cls(storage, sorted(files, key=lambda file: int(file.first_token)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{storage.url}/{FILE_NAME} is damaged ({type(error).__name__}: {error}); prepare the corpus again, or "
                "remove it to do without sources"
            ) from error

    def between(self, start: int, stop: int) -> Iterator[Origin]:
        """The documents that have tokens in [start, stop), in order.    Raises: DataError, StorageError."""
        number = max(0, bisect_right(self._firsts, start) - 1)
        while number < len(self._files) and self._firsts[number] < stop:
            yield from self._in_file(number, start, stop)
            number += 1

    def first_tokens(self) -> NDArray[np.int64]:
        """Of every document, in order, where its tokens begin.    Raises: DataError, StorageError."""
        found = [np.empty(0, dtype=np.int64)]
        for number, file in enumerate(self._files):
            with self._damage_told(file.path):
                column = self._opened(number)[0].read(columns=["first_token"], use_threads=False)["first_token"]
                found.append(column.to_numpy())
        return np.concatenate(found)

    def _in_file(self, number: int, start: int, stop: int) -> Iterator[Origin]:
        firsts = self._opened(number)[1]
        group = max(0, bisect_right(firsts, start) - 1)
        while group < len(firsts) and firsts[group] < stop:
            for row in self._rows(number, group):
                origin = Origin(**row)
                if origin.first_token < stop and origin.stop > start:
                    yield origin
            group += 1

    def _open(self, number: int) -> tuple[Any, list[int]]:
        """The file, and the first token of each of its row groups."""
        path = self._files[number].path
        with self._damage_told(path):
            file = StoredFile(self._storage, path, self._storage.size(path))
            opened = pq.ParquetFile(pa.PythonFile(file, mode="r"), page_checksum_verification=True)
            metadata, column = opened.metadata, opened.schema_arrow.get_field_index("first_token")
            groups = (metadata.row_group(group) for group in range(metadata.num_row_groups))
            return opened, [group.column(column).statistics.min for group in groups]

    def _read(self, number: int, group: int) -> list[dict[str, Any]]:
        with self._damage_told(self._files[number].path):
            rows: list[dict[str, Any]] = self._opened(number)[0].read_row_group(group, use_threads=False).to_pylist()
            return rows

    @contextlib.contextmanager
    def _damage_told(self, path: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, NotFoundError, AttributeError) as error:
            raise DataError(
                f"{self._storage.url}/{path}: this part of the index of documents is missing or damaged ({error}); prepare the "
                f"corpus again, or remove {FILE_NAME} to do without sources"
            ) from error
