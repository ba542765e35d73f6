"""From storage to token arrays: windows read by ranges and verified, and rows cut out of them.

Invariant: no token leaves here that was not covered by a matching checksum. A ranged read can return wrong bytes without
an error (measured: one flipped byte passes through two of three S3 clients), so every block is hashed, read once more
when its hash is wrong, and then refused with shard and offset. Whoever needs the tokens decides how long storage that gives
no answer is waited for (runtime/patience.py); here is only what one operation of `Storage` allows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import xxhash
from numpy.typing import NDArray

from elastic_lm.data.manifest import Block, Manifest
from elastic_lm.data.order import Order
from elastic_lm.errors import AccessDeniedError, DataError, NotFoundError, TooShortError
from elastic_lm.storage import Storage

Tokens = NDArray[np.unsignedinteger]

RANGES_IN_FLIGHT = 16
WINDOWS_KEPT = 3


def read_window(storage: Storage, manifest: Manifest, order: Order, epoch: int, window: int) -> Tokens:
    """The tokens of one window, `order.span_tokens` of each block in reading order, in the manifest's dtype.

    Raises: DataError when a block is damaged, missing or not accessible; StorageError when storage gave no answer in time.
    """
    block_ids = order.window_blocks_of(epoch, window)
    spans = [min(order.span_tokens, manifest.blocks[block_id][1].num_tokens) for block_id in block_ids]
    tokens = np.empty(sum(spans), dtype=manifest.dtype)

    def fill(slot: int) -> None:
        start = slot * order.span_tokens
        block = read_block(storage, manifest, block_ids[slot])
        tokens[start : start + spans[slot]] = block[: spans[slot]]

    with ThreadPoolExecutor(min(RANGES_IN_FLIGHT, len(block_ids)), thread_name_prefix="range") as pool:
        for future in [pool.submit(fill, slot) for slot in range(len(block_ids))]:
            future.result()
    return tokens


def read_block(storage: Storage, manifest: Manifest, block_id: int) -> Tokens:
    """One block, verified.    Raises: as `read_window`."""
    path, block = manifest.blocks[block_id]
    place = f"{storage.url}/{path}, offset {block.offset}, {block.length} bytes (block {block_id})"
    tokens = np.frombuffer(_verified(storage, path, block, place), dtype=np.dtype(manifest.dtype).newbyteorder("<"))
    highest = int(tokens.max())
    if highest >= manifest.vocab_size:
        raise DataError(f"{place}: token id {highest} is not below the vocabulary size {manifest.vocab_size}")
    return tokens


def _verified(storage: Storage, path: str, block: Block, place: str) -> bytes:
    found = ""
    for _ in range(2):
        try:
            data = storage.read_range(path, block.offset, block.length)
        except (NotFoundError, AccessDeniedError) as error:
            raise DataError(f"{place}: {error}") from error
        except TooShortError as error:
            raise DataError(f"{place}: the shard ends before; it was truncated, prepare the corpus again") from error
        found = xxhash.xxh3_64_hexdigest(data)
        if found == block.checksum:
            return data
    raise DataError(
        f"{place}: checksum {found} instead of {block.checksum}, read twice; restore the shard or prepare it again"
    )


def rows(order: Order, step: int, micro_batch: int, window_of: Callable[[int, int], Tokens]) -> Tokens:
    """A micro-batch as an array [micro_batch_size, sequence_length + 1]. `window_of(epoch, window)` gives whole windows."""
    length = order.sequence_length + 1
    pieces = []
    for span in order.spans(step, micro_batch):
        tokens = window_of(span.epoch, span.window)
        pieces += [tokens[start : start + length] for start in span.offsets.tolist()]
    return np.stack(pieces)


class LocalTokens:
    """Tokens for one process, read from storage in that process: no Ray, no prefetch. Not safe to share by threads."""

    def __init__(self, storage: Storage, manifest: Manifest, order: Order) -> None:
        self._storage, self._manifest, self._order = storage, manifest, order
        self._windows: OrderedDict[tuple[int, int], Tokens] = OrderedDict()

    def tokens(self, step: int, micro_batch: int, cancelled: Callable[[], bool] | None = None) -> Tokens:
        """Rows of the micro-batch, [micro_batch_size, sequence_length + 1].    Raises: DataError, StorageError."""
        return rows(self._order, step, micro_batch, self._window)

    def _window(self, epoch: int, window: int) -> Tokens:
        key = (epoch, window)
        if key not in self._windows:
            self._windows[key] = read_window(self._storage, self._manifest, self._order, epoch, window)
        self._windows.move_to_end(key)
        while len(self._windows) > WINDOWS_KEPT:
            self._windows.popitem(last=False)
        return self._windows[key]
