"""Text in a column of Parquet files: a document in every row, nothing but that column and the footer read.

Invariant: a value is the document that the same text is in a line of JSON, whatever type the column stores it in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from elastic_lm.data import documents
from elastic_lm.data.documents import Chunk, Document, File, check_size, decoded
from elastic_lm.errors import DataError

TEXT_TYPES = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}
BUFFER_BYTES = 4 * 2**20  # of a column, read at a time
BATCH_ROWS = 256
MOST_COLUMNS_TOLD = 20


@dataclass(frozen=True)
class Parquet:
    """A document in every row; one that is null is empty. A chunk is one row group, or several that are small."""

    text_column: str

    unit: Literal["row"] = "row"
    unpacks: bool = True

    def cut(self, file: File) -> list[Chunk]:
        metadata = self._open(file).metadata
        chunks: list[Chunk] = []
        row = start = num_bytes = 0
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            size = self._size_bytes(group)
            if row > start and num_bytes + size > documents.CHUNK_BYTES:
                chunks.append(Chunk(file, self, start, row, num_bytes))
                start, num_bytes = row, 0
            row, num_bytes = row + group.num_rows, num_bytes + size
        return [*chunks, Chunk(file, self, start, row, num_bytes)] if row > start else chunks

    def documents(self, chunk: Chunk) -> Iterator[Document]:
        file = self._open(chunk.file)
        batches = file.iter_batches(
            BATCH_ROWS, _row_groups(file.metadata, chunk), columns=[self.text_column], use_threads=False
        )
        place = chunk.start
        while True:
            with _damage_told(chunk.file):
                batch = next(batches, None)
                values = [] if batch is None else _values(batch.column(0))
            if batch is None:
                return
            for value in values:
                check_size(len(value), chunk.at(place), "the document", "split it")
                yield decoded(value, place)
                place += 1

    def _open(self, file: File) -> Any:
        """Raises: DataError when the file is none, or has no such column of text."""
        with _damage_told(file):
            opened = pq.ParquetFile(
                pa.PythonFile(file.open(), mode="r"), buffer_size=BUFFER_BYTES, page_checksum_verification=True
            )
            schema = opened.schema_arrow
        place = schema.get_field_index(self.text_column)
        if place < 0 or not _is_text(schema.types[place]):
            raise DataError(f"{file.url}: {self._wrong(schema, place)}")
        return opened

    def _wrong(self, schema: Any, place: int) -> str:
        columns = [f"{field.name} ({field.type})" for field in schema]
        more = len(columns) - MOST_COLUMNS_TOLD
        told = ", ".join(columns[:MOST_COLUMNS_TOLD]) + (f" and {more} more" if more > 0 else "")
        rule = (
            f"the column {self.text_column!r} is {schema.types[place]}, not string or binary"
            if place >= 0
            else f"there is no column {self.text_column!r}, or more than one"
        )
        return f"{rule}; choose another with --text-column: {told}"

    def _size_bytes(self, group: Any) -> int:
        columns = (group.column(number) for number in range(group.num_columns))
        return sum(column.total_compressed_size for column in columns if column.path_in_schema == self.text_column)


def _is_text(kind: Any) -> bool:
    return str(kind.value_type if pa.types.is_dictionary(kind) else kind) in TEXT_TYPES


def _row_groups(metadata: Any, chunk: Chunk) -> list[int]:
    """Those whose rows are the chunk's."""
    found, row = [], 0
    for number in range(metadata.num_row_groups):
        if chunk.start <= row < chunk.stop:
            found.append(number)
        row += metadata.row_group(number).num_rows
    return found


def _values(column: Any) -> list[bytes]:
    """As bytes, because Arrow lets through what is no UTF-8; nulls as none."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return [value or b"" for value in column.cast(pa.large_binary()).to_pylist()]


@contextlib.contextmanager
def _damage_told(file: File) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{file.url}: a damaged Parquet file, or one that cannot be read here ({reason}); copy or make it again, or "
            "remove it"
        ) from error
