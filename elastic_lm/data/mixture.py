"""Mixtures: text from several sources, and how often a document of each occurs in one epoch.

Invariant: what occurs how often depends on the document's text and its source's weight alone. Repeats come in passes: first
all sources once, then again those of which more is wanted, so that two occurrences of a document are as far apart as they
can be. Next to each other they would share a block or a window, and so a few neighbouring batches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import xxhash

from elastic_lm.errors import ConfigError, StorageError
from elastic_lm.storage import Storage

LARGEST_WEIGHT = 100.0
SALT = 1  # not that of what is held out, or a source of weight 0.5 would lose its held-out documents with the same draw

Item = TypeVar("Item")


@dataclass(frozen=True)
class Source:
    """Files, a folder or a pattern. `weight`: how often each document occurs in an epoch; 0.3: three in ten occur, once."""

    address: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        try:
            Storage.open(self.address)  # first, because what cannot be an address may hold a secret
        except StorageError as error:
            raise ConfigError(str(error)) from error
        if not 0 < self.weight <= LARGEST_WEIGHT:
            raise ConfigError(
                f"{self.address}: weight={self.weight:g} is not how often a document can occur in an epoch; use more than 0 "
                f"and at most {LARGEST_WEIGHT:g}"
            )

    @classmethod
    def parse(cls, text: str) -> Source:
        """From `SOURCE` or `SOURCE=WEIGHT`. A file or folder of that very name wins.    Raises: ConfigError."""
        address, sign, weight = text.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            return cls(text)
        return cls(address, number) if sign and not _is_there(text) else cls(text)

    @classmethod
    def of(cls, source: str | Source) -> Source:
        return source if isinstance(source, Source) else cls(source)

    @property
    def num_passes(self) -> int:
        """How often all documents occur."""
        return math.floor(self.weight)

    @property
    def share(self) -> float:
        """Of the documents, those that occur once more."""
        return self.weight - self.num_passes


def is_chosen(text: str, share: float) -> bool:
    """Whether a document is among the `share` that occurs once more: by its own hash."""
    return xxhash.xxh3_64_intdigest(text.encode(), seed=SALT) < share * 2**64


def passes(items: Sequence[Item], sources: Sequence[Source]) -> Iterator[tuple[Item, bool]]:
    """The items, each from its source, as often as it occurs; whether with all of its documents or with the chosen ones."""
    for number in range(max((math.ceil(source.weight) for source in sources), default=0)):
        for item, source in zip(items, sources, strict=True):
            if number < source.num_passes:
                yield item, True
            elif number == source.num_passes and source.share:
                yield item, False


def _is_there(address: str) -> bool:
    if not address.startswith("s3://"):
        return os.path.exists(os.path.expanduser(address.removeprefix("file://")))
    folder, _, name = Source(address).address.rstrip("/").rpartition("/")
    if folder == "s3:/":
        return False  # no bucket has such a name
    return Storage.open(folder).exists(name) or bool(Storage.open(f"{folder}/{name}").list())
