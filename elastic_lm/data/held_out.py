"""The held-out part of a corpus in batches, the same for all runs that read samples of this length in batches of this size.

Invariant: no document in it is trained on by a run over the same corpus (parts.py), and every batch is a pure function of its
number: which samples come, and in which order, does not depend on the run's seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.order import Order
from elastic_lm.data.windows import LocalTokens, Tokens
from elastic_lm.errors import ConfigError
from elastic_lm.storage import Storage

SEED = 0


@dataclass(frozen=True)
class HeldOut:
    """`num_samples` samples of the held-out `part`, in batches of up to `order.micro_batch_size`."""

    part: Manifest
    order: Order
    num_samples: int

    @classmethod
    def of(
        cls, manifest: Manifest, *, sequence_length: int, batch_size: int, max_samples: int | None = None
    ) -> HeldOut:
        """All of a corpus's held-out samples, or the first `max_samples` in the order of all: of the first windows, shuffled.

        Raises: ConfigError when there is none.
        """
        part = manifest.held_out_part()
        if part.num_tokens <= sequence_length:
            raise ConfigError(
                f"the corpus holds {part.num_tokens:,} tokens out, and a sample takes {sequence_length:,} + 1: there is nothing "
                "to evaluate on; do without evaluation (evaluation.every: null), or prepare a corpus with a larger --held-out "
                "and train a run on it from its beginning: one that has trained on this corpus knows what that holds out"
            )
        order = part.order(sequence_length=sequence_length, micro_batches=1, micro_batch_size=batch_size, seed=SEED)
        return cls(part, order, order.num_samples if max_samples is None else min(max_samples, order.num_samples))

    @property
    def num_batches(self) -> int:
        return -(-self.num_samples // self.order.micro_batch_size)

    def num_rows(self, batch: int) -> int:
        """Samples in this batch: the last one may have fewer."""
        return min(self.order.micro_batch_size, self.num_samples - batch * self.order.micro_batch_size)

    def first_tokens(self, batch: int) -> list[int]:
        """Where its samples begin in the part, in their order."""
        found: list[int] = []
        for span in self.order.spans(batch, 0):
            blocks = self.order.window_blocks_of(span.epoch, span.window)
            slots, inside = np.divmod(span.offsets, self.order.span_tokens)
            found += [
                blocks[slot] * self.part.block_tokens + at for slot, at in zip(slots, inside.tolist(), strict=True)
            ]
        return found[: self.num_rows(batch)]


class HeldOutTokens:
    """Batches, read from storage by this process. Not safe to share by threads."""

    def __init__(self, storage: Storage, held_out: HeldOut) -> None:
        self._held_out = held_out
        self._tokens = LocalTokens(storage, held_out.part, held_out.order)

    def batch(self, number: int) -> Tokens:
        """Tokens [samples, sequence_length + 1].    Raises: DataError, StorageError."""
        return self._tokens.tokens(number, 0)[: self._held_out.num_rows(number)]

    def num_tokens(self, start: int, stop: int) -> int:
        """That a model reads in the batches [start, stop)."""
        rows = sum(self._held_out.num_rows(number) for number in range(start, stop))
        return rows * self._held_out.order.sequence_length
