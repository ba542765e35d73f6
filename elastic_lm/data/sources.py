"""Which files a corpus is made of: those that files, folders and patterns name, local or on S3.

Invariant: the same files come in the same order on any machine: by order of the sources, then by path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

from elastic_lm.data.documents import Chunk, File
from elastic_lm.data.formats import KNOWN, format_of
from elastic_lm.data.mixture import Source
from elastic_lm.errors import ConfigError, DataError
from elastic_lm.storage import Storage


def find_files(sources: Sequence[str | Source]) -> Iterator[File]:
    """All files of files, folders and patterns (`*`, `?`, `**`), in order. One that is named twice comes once.

    Raises: ConfigError when a source matches nothing or has an unknown suffix, or a file has two weights; DataError when a
    link leads out of a folder.
    """
    if not sources:
        raise ConfigError("no sources; name files, folders or patterns, e.g. texts/ or s3://bucket/**/*.jsonl")
    seen: dict[str, Source] = {}
    for source in map(Source.of, sources):
        for storage, path in _find(source.address):
            url = f"{storage.url}/{path}"
            first = seen.get(url)
            if first is None:
                seen[url] = source
                yield File(storage, path, storage.size(path), source)
            elif first.weight != source.weight:
                raise ConfigError(
                    f"{url} is named by {first.address} with weight {first.weight:g} and by {source.address} with weight "
                    f"{source.weight:g}; name it once, or give both the same weight"
                )


def cut(file: File, text_column: str) -> list[Chunk]:
    """The chunks of a file.    Raises: DataError when it cannot hold documents."""
    format = format_of(file.path, text_column)
    assert format is not None, "only files of a known format are found"
    return format.cut(file)


def _find(source: str) -> list[tuple[Storage, str]]:
    if not source.startswith("s3://"):
        source = os.path.abspath(os.path.expanduser(source.removeprefix("file://")))
    parent, _, name = source.rstrip("/").rpartition("/")
    folder = Storage.open(parent or "/")
    if name and folder.exists(name):
        if not _is_known(name):
            raise ConfigError(f"{source}: unknown suffix; known: {KNOWN}")
        _check_is_file(folder, name)
        return [(folder, name)]
    root, pattern = _split_pattern(source)
    storage = Storage.open(root)
    names = [path for path in storage.list() if _is_wanted(path) and (pattern is None or pattern.fullmatch(path))]
    if not names:
        weight = "; a weight is a number, e.g. texts/=2.5" if "=" in source else ""
        raise ConfigError(
            f"{source}: no such file, or nothing in it ends in {KNOWN}; hidden files do not count{weight}"
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


def _is_known(path: str) -> bool:
    return format_of(path, "") is not None


def _is_wanted(path: str) -> bool:
    return _is_known(path) and not any(part.startswith(".") for part in path.split("/"))


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
