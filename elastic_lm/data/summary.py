"""What a prepared corpus holds, in figures for people: from where, how much of it, and what was left out.

Invariant: everything is added up from the records of documents that the parts left, and so the same whatever the number of
parts; the manifest's counts are these, too. Times are no part of it: preparing again gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.mixture import Source
from elastic_lm.data.parts import EMPTY, EXTRA, HELD_OUT, REPLACED, TRAIN, Part, Records
from elastic_lm.errors import DataError, NotFoundError
from elastic_lm.storage import Storage

FILE_NAME = "summary.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Figures:
    """`documents`, `tokens` and `text_bytes` (as UTF-8) of what is trained on, as often as it occurs in an epoch.

    All other documents count once: `read_documents` are all those that hold text, on either side or left out by a weight.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    held_out_documents: int = 0
    held_out_tokens: int = 0
    read_documents: int = 0
    empty_documents: int = 0
    replaced_documents: int = 0

    def __add__(self, other: Figures) -> Figures:
        return Figures(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text; the tokens that end documents count. None when there are no tokens."""
        return self.text_bytes / self.tokens if self.tokens else None

    @property
    def counts(self) -> dict[str, int]:
        """As the manifest has them."""
        names = ("documents", "held_out_documents", "empty_documents", "replaced_documents")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Summary:
    """The figures of a corpus, whole and by source. `sources`: (address, weight, figures) in the order they were named."""

    sources: tuple[tuple[str, float, Figures], ...]

    @property
    def total(self) -> Figures:
        return sum((figures for _, _, figures in self.sources), Figures())

    def save(self, out: Storage, manifest: Manifest) -> None:
        """Write it beside the manifest of this corpus."""
        rows = [{"source": address, "weight": weight, **asdict(figures)} for address, weight, figures in self.sources]
        whole = {"format_version": FORMAT_VERSION, "manifest": manifest.hash, **asdict(self.total), "sources": rows}
        out.write(FILE_NAME, json.dumps(whole, indent=1).encode())

    @classmethod
    def load(cls, storage: Storage, manifest: Manifest) -> Summary | None:
        """That of this very corpus; None when it has none.    Raises: DataError when it is damaged; StorageError."""
        try:
            text = storage.read(FILE_NAME)
        except NotFoundError:
            return None
        try:
            whole = json.loads(text)
            if whole["format_version"] != FORMAT_VERSION or whole["manifest"] != manifest.hash:
                return None
            return cls(tuple((row.pop("source"), row.pop("weight"), _figures(row)) for row in whole["sources"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{storage.url}/{FILE_NAME} is damaged ({type(error).__name__}: {error}); prepare the corpus again, or "
                "remove it to do without"
            ) from error


def _figures(row: dict[str, Any]) -> Figures:
    if not all(type(value) is int for value in row.values()):
        raise ValueError("a figure is no whole number")
    return Figures(**row)


class Tally:
    """Adds up records, by source."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._numbers = {source: number for number, source in enumerate(dict.fromkeys(sources))}
        self._sums = {field.name: np.zeros(len(self._numbers), dtype=np.int64) for field in fields(Figures)}

    def add(self, part: Part, records: Records) -> None:
        """Count documents of a part."""
        sources = np.array([self._numbers[chunk.file.source] for chunk in part.chunks])[records["chunk"]]
        fate, tokens = records["fate"], records["num_tokens"]
        trained = part.source.num_passes * (fate & TRAIN > 0) + (fate & EXTRA > 0)
        for name, values in (
            ("documents", trained),
            ("tokens", trained * tokens),
            ("text_bytes", trained * records["num_bytes"]),
            ("held_out_documents", fate & HELD_OUT > 0),
            ("held_out_tokens", (fate & HELD_OUT > 0) * tokens),
            ("read_documents", fate & EMPTY == 0),
            ("empty_documents", fate & EMPTY > 0),
            ("replaced_documents", fate & REPLACED > 0),
        ):
            np.add.at(self._sums[name], sources, values)

    def summary(self) -> Summary:
        rows = ({name: int(sums[number]) for name, sums in self._sums.items()} for number in self._numbers.values())
        return Summary(
            tuple((s.address, float(s.weight), Figures(**row)) for s, row in zip(self._numbers, rows, strict=True))
        )
