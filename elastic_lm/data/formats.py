"""Which format a file is in: by the suffix of its name alone, so that folders can be listed without opening a file."""

from __future__ import annotations

from elastic_lm.data.documents import Format
from elastic_lm.data.plain import Lines, Text

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".tex", ".html", ".c", ".h", ".cpp", ".rs", ".go", ".js", ".ts", ".java")
LINES_SUFFIX = ".jsonl"
KNOWN = f"{LINES_SUFFIX} {' '.join(TEXT_SUFFIXES)}"  # for messages


def format_of(path: str, text_column: str) -> Format | None:
    """The format of a file of this name; None when it has none of ours."""
    if path.endswith(LINES_SUFFIX):
        return Lines(text_column)
    return Text() if path.endswith(TEXT_SUFFIXES) else None
