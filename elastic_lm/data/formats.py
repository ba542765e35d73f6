"""Which format a file is in: by the suffix of its name alone, so that folders can be listed without opening a file."""

from __future__ import annotations

from elastic_lm.data.compressed import Compressed, Packing
from elastic_lm.data.documents import Format, StreamFormat
from elastic_lm.data.plain import Lines, Text

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".tex", ".html", ".c", ".h", ".cpp", ".rs", ".go", ".js", ".ts", ".java")
LINES_SUFFIX = ".jsonl"
PACKINGS: dict[str, Packing] = {".gz": "gzip", ".zst": "zstd"}
TABLE_SUFFIX = ".parquet"
# For messages.
KNOWN = (
    f"{LINES_SUFFIX} {' '.join(TEXT_SUFFIXES)}, any of these with {' or '.join(PACKINGS)} behind it, or {TABLE_SUFFIX}"
)


def format_of(path: str, text_column: str) -> Format | None:
    """The format of a file of this name; None when it has none of ours. `text_column`: where formats with names have text."""
    for suffix, packing in PACKINGS.items():
        if path.endswith(suffix):
            inner = _plain(path.removesuffix(suffix), text_column)
            return None if inner is None else Compressed(inner, packing)
    if path.endswith(TABLE_SUFFIX):
        from elastic_lm.data.parquet import Parquet

        return Parquet(text_column)
    return _plain(path, text_column)


def _plain(path: str, text_column: str) -> StreamFormat | None:
    if path.endswith(LINES_SUFFIX):
        return Lines(text_column)
    return Text() if path.endswith(TEXT_SUFFIXES) else None
