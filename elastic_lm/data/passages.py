"""Tokens of a corpus as text again, document by document, with where each came from.

Invariant: tokens are read as training reads them, block by block and verified; what is shown is what is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from elastic_lm.data.corpus import TOKENIZER_FILE
from elastic_lm.data.document_index import DocumentIndex, Origin
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.data.windows import Tokens, read_block
from elastic_lm.errors import ConfigError, DataError, NotFoundError
from elastic_lm.storage import Storage

KEPT_BLOCKS = 16


@dataclass(frozen=True)
class Passage:
    """What a range holds of one document: the tokens `ids` from `start` on. `ends`: its end is among them.

    `origin` None: there is no index of documents to say.
    """

    start: int
    ids: tuple[int, ...]
    text: str
    ends: bool
    origin: Origin | None


class Passages:
    """The tokens of a corpus, or of its held-out part.    Raises: DataError when it is damaged; StorageError."""

    def __init__(self, storage: Storage, manifest: Manifest, *, held_out: bool = False) -> None:
        self.part = manifest.held_out_part() if held_out else manifest
        self._storage = storage
        self._index = DocumentIndex.load(storage, manifest, held_out=held_out)
        self._encoder = encoder_of(storage, manifest)
        self._block = lru_cache(KEPT_BLOCKS)(self._read_block)

    @property
    def has_origins(self) -> bool:
        return self._index is not None

    def between(self, start: int, stop: int) -> Iterator[Passage]:
        """What tokens [start, stop) are.    Raises: ConfigError when there are none; DataError, StorageError."""
        if not 0 <= start < stop <= self.part.num_tokens:
            raise ConfigError(
                f"tokens {start}..{stop} are not in the corpus; it has {self.part.num_tokens} tokens, 0..{self.part.num_tokens}"
            )
        return self._by_index(start, stop) if self._index is not None else self._by_ends(start, stop)

    def _by_index(self, start: int, stop: int) -> Iterator[Passage]:
        assert self._index is not None
        for origin in self._index.between(start, stop):
            first, last = max(start, origin.first_token), min(stop, origin.stop)
            yield self._passage(first, np.concatenate(list(self._tokens(first, last))), origin)

    def _by_ends(self, start: int, stop: int) -> Iterator[Passage]:
        """Documents are told apart by the tokens that end them."""
        pending: list[Tokens] = []
        at = start
        for tokens in self._tokens(start, stop):
            ends = np.flatnonzero(tokens == self.part.special_ids["end_of_text"]) + 1
            *whole, rest = np.split(tokens, ends)
            for piece in whole:
                ids = np.concatenate([*pending, piece])
                yield self._passage(at, ids, None)
                at, pending = at + len(ids), []
            pending.append(rest)
        if at < stop:
            yield self._passage(at, np.concatenate(pending), None)

    def _passage(self, start: int, tokens: Tokens, origin: Origin | None) -> Passage:
        ids = tuple(tokens.tolist())
        return Passage(start, ids, self._encoder.decode(ids), ids[-1] == self.part.special_ids["end_of_text"], origin)

    def _tokens(self, start: int, stop: int) -> Iterator[Tokens]:
        """Tokens [start, stop), a block at a time."""
        while start < stop:
            number, first = divmod(start, self.part.block_tokens)
            tokens = self._block(number)[first : first + stop - start]
            yield tokens
            start += len(tokens)

    def _read_block(self, number: int) -> Tokens:
        return read_block(self._storage, self.part, number)


def encoder_of(storage: Storage, manifest: Manifest) -> TextEncoder:
    """The tokenizer that the corpus was made with.    Raises: DataError when it is lost, or is another."""
    try:
        data = storage.read(TOKENIZER_FILE)
    except NotFoundError as error:
        raise DataError(
            f"{storage.url}: the corpus has lost its {TOKENIZER_FILE}; prepare it again, or copy it back"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != manifest.tokenizer_hash:
        raise DataError(
            f"{storage.url}/{TOKENIZER_FILE} has the hash {found[:12]} instead of {manifest.tokenizer_hash[:12]}: it is not "
            "the one the corpus was made with; prepare the corpus again, or copy the right one back"
        )
    return TextEncoder(data.decode("utf-8", "replace"))
