"""The worker's own reader of held-out batches. They are few, read seldom, and by one worker each: no reader actor is asked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from elastic_lm.data.held_out import HeldOut, HeldOutTokens
from elastic_lm.data.windows import Tokens
from elastic_lm.engine.group import wait_until
from elastic_lm.engine.operations import Transfer
from elastic_lm.errors import DataError
from elastic_lm.runtime.patience import Patience
from elastic_lm.storage import Storage

KEPT_BYTES = 64 * 2**20  # of batches; those are the same at each evaluation


class HeldOutClient:
    """Implements the engine's HeldOutSource. One thread uses it. Args: `corpus`: its address; `is_all_text`: whether the
    targets of a sample are all of its tokens but the first, so that their bytes mean something.

    Invariant: a fence is heard at once, also while storage hangs: what is read then is left to its thread.
    """

    def __init__(self, corpus: str, held_out: HeldOut, storage_timeout_s: float, *, is_all_text: bool) -> None:
        self.held_out = held_out
        self._corpus, self._is_all_text = corpus, is_all_text
        self._patience = Patience(storage_timeout_s)
        self._kept: dict[int, Tokens] = {}
        self._token_bytes: NDArray[np.int64] | None = None
        self._tokens = self._opened()

    def _opened(self) -> HeldOutTokens:
        return HeldOutTokens(Storage.open(self._corpus), self.held_out)

    def rest(self) -> None:
        """The evaluation is over: only the batches themselves are kept."""
        self._tokens = self._opened()

    def batch(self, number: int, cancelled: Callable[[], bool]) -> Tokens:
        """Tokens [samples, sequence_length + 1].    Raises: Cancelled; DataError; UnavailableError."""
        if number not in self._kept:
            told = f"held-out tokens of {self._corpus}"
            found = self._patience.outlast(told, lambda _: self._read(number, cancelled), cancelled)
            if sum(tokens.nbytes for tokens in self._kept.values()) + found.nbytes > KEPT_BYTES:
                return found
            self._kept[number] = found
        return self._kept[number]

    def num_bytes(self, tokens: Tokens) -> int | None:
        """UTF-8 bytes of text that the targets stand for; None where they are not all of it, or the tokenizer is not known."""
        if self._token_bytes is None or not len(self._token_bytes):
            return None
        return int(self._token_bytes[tokens[:, 1:]].sum())

    def _read(self, number: int, cancelled: Callable[[], bool]) -> Tokens:
        found: list[Tokens] = []

        def read(tokens: HeldOutTokens) -> None:
            if self._is_all_text and self._token_bytes is None:
                self._token_bytes = _token_bytes(Storage.open(self._corpus), self.held_out)
            found.append(tokens.batch(number))

        tokens, self._tokens = self._tokens, self._opened()  # what is given up goes on with its own
        wait_until(Transfer(lambda: read(tokens), "held-out").done, cancelled)
        self._tokens = tokens
        return found[0]


def _token_bytes(corpus: Storage, held_out: HeldOut) -> NDArray[np.int64]:
    """By token; empty where the corpus has lost its tokenizer."""
    from elastic_lm.data.passages import encoder_of

    try:
        encoder = encoder_of(corpus, held_out.part)
    except DataError:
        return np.zeros(0, dtype=np.int64)
    return encoder.bytes_by_token(held_out.part.vocab_size)
