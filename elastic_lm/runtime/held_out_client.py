"""The worker's own reader of held-out batches. They are few, read seldom, and by one worker each: no reader actor is asked."""

from __future__ import annotations

from collections.abc import Callable

from elastic_lm.data.held_out import HeldOut, HeldOutTokens
from elastic_lm.data.windows import Tokens
from elastic_lm.runtime.patience import Patience
from elastic_lm.storage import Storage


class HeldOutClient:
    """Implements the engine's HeldOutSource. One thread uses it. Args: `corpus`: its address."""

    def __init__(self, corpus: str, held_out: HeldOut, storage_timeout_s: float) -> None:
        self._corpus = corpus
        self._tokens = HeldOutTokens(Storage.open(corpus), held_out)
        self._patience = Patience(storage_timeout_s)

    def batch(self, number: int, cancelled: Callable[[], bool]) -> Tokens:
        """Tokens [samples, sequence_length + 1].    Raises: Cancelled; DataError; UnavailableError."""
        told = f"held-out tokens of {self._corpus}"
        return self._patience.outlast(told, lambda _: self._tokens.batch(number), cancelled)
