"""Which samples make up which micro-batch: arithmetic without state, without tables, without a corpus in memory.

Invariant: micro-batch (step, j) depends on this object's fields alone, never on who asks, how many ask, or what was asked
before; and every sample of the corpus comes exactly once per epoch. (The permutation of the windows in use is kept, as a
cache of a pure function: computed at once it costs a hundredth.) Trade-off: the shuffle has two levels (blocks over
the corpus, samples inside a window of blocks), so that a window can be read once and kept, against a full shuffle's
scattered reads.

Terms: a *block* is the unit that storage reads and verifies. A *full* block holds `samples_per_block` samples; the last
one of the corpus, the *tail*, may hold fewer. A *window* is `window_blocks` blocks that are shuffled together; the last
window of an epoch takes what remains of the full blocks, and the tail. Sample i of a block is its tokens
[i T, i T + T + 1): neighbours share one token, which is the target of one and the first input of the next.
Source: docs/order.md; cycle-walking Feistel permutation (Black and Rogaway, 2002).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from elastic_lm.errors import ConfigError

NUM_ROUNDS = 6  # 4 make a strong permutation of a large domain; small ones (a few blocks) look better with more
MASK_64 = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SampleAt:
    """Where one sample lies: in block `block`, which is the `slot`-th of its window in reading order."""

    epoch: int
    window: int
    slot: int
    block: int
    index_in_block: int


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring rows of a micro-batch that lie in one window: indices of their first tokens in the window's array."""

    epoch: int
    window: int
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The order of one run over one corpus. `skip`: half-open ranges of batch indices, ascending, left out.

    Raises: ConfigError when a number is out of range or there is not a single sample.
    """

    num_full_blocks: int
    samples_per_block: int
    tail_samples: int
    window_blocks: int
    seed: int
    micro_batches: int
    micro_batch_size: int
    sequence_length: int
    skip: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("window_blocks", "micro_batches", "micro_batch_size", "sequence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"order: {name}={getattr(self, name)} must be at least 1")
        for name in ("num_full_blocks", "samples_per_block", "tail_samples"):
            if getattr(self, name) < 0:
                raise ConfigError(f"order: {name}={getattr(self, name)} must not be negative")
        if self.samples_per_block == 0 or self.num_samples == 0:
            raise ConfigError(
                f"no block of the corpus holds a sample of {self.sequence_length} + 1 tokens; use a smaller "
                f"batch.sequence_length, or prepare more text or larger blocks"
            )
        if self.tail_samples > self.samples_per_block:
            raise ConfigError(
                f"order: the tail's {self.tail_samples} samples exceed a block's {self.samples_per_block}"
            )
        _check_skip(self.skip)

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """Samples per epoch."""
        return self.num_full_blocks * self.samples_per_block + self.tail_samples

    @property
    def num_blocks(self) -> int:
        """Blocks that hold at least one sample."""
        return self.num_full_blocks + (self.tail_samples > 0)

    @property
    def num_windows(self) -> int:
        """Windows per epoch. A tail joins the last window; alone it is one."""
        return max(1, -(-self.num_full_blocks // self.window_blocks))

    @property
    def span_tokens(self) -> int:
        """Tokens of a block that samples use: a window's array holds this many per block, one after the other."""
        return self.samples_per_block * self.sequence_length + 1

    # -- blocks and windows ------------------------------------------------------------------------------------------

    def window_blocks_of(self, epoch: int, window: int) -> tuple[int, ...]:
        """Ids of the blocks of a window, in reading order. The tail's id is `num_full_blocks`."""
        if not 0 <= window < self.num_windows:
            raise ValueError(f"window {window} is not in [0, {self.num_windows})")
        start = window * self.window_blocks
        stop = min(start + self.window_blocks, self.num_full_blocks)
        key = _key(self.seed, epoch)
        blocks = tuple(permute(place, self.num_full_blocks, key) for place in range(start, stop))
        has_tail = self.tail_samples > 0 and window == self.num_windows - 1
        return (*blocks, self.num_full_blocks) if has_tail else blocks

    def window_samples(self, window: int) -> int:
        """Samples in a window."""
        full = min(self.window_blocks, self.num_full_blocks - window * self.window_blocks)
        return full * self.samples_per_block + (self.tail_samples if window == self.num_windows - 1 else 0)

    def locate(self, position: int) -> SampleAt:
        """The sample at `position` of the endless sequence epoch 0, epoch 1, ..."""
        epoch, window, place = self._place(position)
        index = permute(place, self.window_samples(window), _key(self.seed, epoch, window))
        slot, index_in_block = divmod(index, self.samples_per_block)
        place_of_block = window * self.window_blocks + slot
        if place_of_block < self.num_full_blocks:
            block = permute(place_of_block, self.num_full_blocks, _key(self.seed, epoch))
        else:
            block = self.num_full_blocks  # the tail
        return SampleAt(epoch, window, slot, block, index_in_block)

    def _place(self, position: int) -> tuple[int, int, int]:
        """Epoch, window, and place in that window before it is shuffled."""
        epoch, place = divmod(position, self.num_samples)
        window_size = self.window_blocks * self.samples_per_block
        window = min(place // window_size, self.num_windows - 1)
        return epoch, window, place - window * window_size

    def offset_in_window(self, sample: SampleAt) -> int:
        """Index of the sample's first token in its window's array."""
        return sample.slot * self.span_tokens + sample.index_in_block * self.sequence_length

    # -- batches -----------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> int:
        """Batch index that `step` trains on: the step-th of those that are not skipped."""
        return batch_of(step, self.skip)

    def micro_batch(self, step: int, micro_batch: int) -> list[SampleAt]:
        """The samples of one micro-batch, in the order of its rows."""
        if not 0 <= micro_batch < self.micro_batches:
            raise ValueError(f"micro-batch {micro_batch} is not in [0, {self.micro_batches})")
        first = (self.batch(step) * self.micro_batches + micro_batch) * self.micro_batch_size
        return [self.locate(first + row) for row in range(self.micro_batch_size)]

    def spans(self, step: int, micro_batch: int) -> list[Span]:
        """Where the rows of one micro-batch begin, window by window: `micro_batch` for those who only want the tokens."""
        if not 0 <= micro_batch < self.micro_batches:
            raise ValueError(f"micro-batch {micro_batch} is not in [0, {self.micro_batches})")
        position = (self.batch(step) * self.micro_batches + micro_batch) * self.micro_batch_size
        missing, found = self.micro_batch_size, []
        while missing:
            epoch, window, place = self._place(position)
            indices = permutation(self.window_samples(window), _key(self.seed, epoch, window))[place : place + missing]
            slots, inside = np.divmod(indices, self.samples_per_block)
            found.append(Span(epoch, window, slots * self.span_tokens + inside * self.sequence_length))
            position, missing = position + len(indices), missing - len(indices)
        return found

    def windows_of(self, step: int) -> list[tuple[int, int]]:
        """(epoch, window) of all windows that the batch of `step` touches, in order."""
        size = self.micro_batches * self.micro_batch_size
        first = self.batch(step) * size
        windows = []
        window = self._place(first)[:2]
        last = self._place(first + size - 1)[:2]
        while window <= last:
            windows.append(window)
            window = self.window_after(window)
        return windows

    def window_after(self, window: tuple[int, int]) -> tuple[int, int]:
        """The window that follows (epoch, window)."""
        epoch, index = window
        return (epoch, index + 1) if index + 1 < self.num_windows else (epoch + 1, 0)


def batch_of(step: int, skip: Sequence[tuple[int, int]]) -> int:
    """The step-th batch index that is in none of these half-open, ascending ranges."""
    index = step
    for start, stop in skip:
        if index < start:
            break
        index += stop - start
    return index


def merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same batches in as few half-open ranges as possible, ascending. Empty ranges are dropped."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return tuple(found)


# -- permutation -----------------------------------------------------------------------------------------------------


def permute(index: int, size: int, key: int) -> int:
    """The image of `index` under the permutation of [0, size) that `key` chooses. O(1) time, no memory.

    A balanced Feistel network permutes the next power of four; walking its cycle from a value inside [0, size) until it
    is inside again makes that a permutation of [0, size). Less than four steps are expected.
    """
    if size <= 1:
        return 0
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_number in range(NUM_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + round_number)) & half_mask)
        index = (left << half_bits) | right
        if index < size:
            return index


@lru_cache(maxsize=8)
def permutation(size: int, key: int) -> NDArray[np.int64]:
    """`permute` of all of [0, size) at once, about 100 times as fast; read-only, kept for the last few windows."""
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    keys = [np.uint64(_mix(key + round_number)) for round_number in range(NUM_ROUNDS)]
    images = np.arange(size, dtype=np.uint64)
    outside = np.arange(size if size > 1 else 0)  # places whose image is not inside yet
    while len(outside):
        left, right = images[outside] >> half_bits, images[outside] & half_mask
        for round_key in keys:
            left, right = right, left ^ (_mix_all(right ^ round_key) & half_mask)
        images[outside] = (left << half_bits) | right
        outside = outside[images[outside] >= size]
    images.flags.writeable = False
    return images.view(np.int64)


def _mix_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` of every element."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


@lru_cache(maxsize=1024)
def _key(*parts: int) -> int:
    """64 bits that the parts determine; a cache of a pure function."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _check_skip(skip: tuple[tuple[int, int], ...]) -> None:
    end = 0
    for start, stop in skip:
        if not end <= start < stop:
            raise ConfigError(
                f"training.skip holds [{start}, {stop}): ranges are half-open, not empty and ascending; "
                f"this one must begin at {end} or later and end after it begins"
            )
        end = stop
