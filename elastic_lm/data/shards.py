"""Writing token streams as shards: blocks of a fixed number of tokens in uncompressed Arrow IPC files.

Invariant: the same tokens give the same files, however they arrive. A shard's name holds a hash of its content, so a
corpus that is prepared anew never changes a file that an older manifest names.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash

from elastic_lm.data.manifest import ITEM_SIZES, Block, Shard
from elastic_lm.data.windows import Tokens
from elastic_lm.storage import Storage

SHARD_BYTES = 64 * 2**20
SMALL_BLOCK_BYTES = 2**20
LARGE_BLOCK_BYTES = 4 * 2**20  # 1 MiB ranges are read at 139 M tokens/s, 4 MiB at 206 M, 16 MiB no faster
LARGE_CORPUS_BYTES = 10 * 10**9
SMALLEST_BLOCK_TOKENS = 2**12
BLOCKS_WANTED = 64


def block_tokens_for(num_tokens: int, dtype: str) -> int:
    """Tokens per block where nobody chose: 2^k + 1, of which samples of any power of two waste none.

    4 MiB, or 1 MiB for corpora below 10 GB, or less for those so small that there would be too few blocks to shuffle.
    """
    size = ITEM_SIZES[dtype]
    largest = LARGE_BLOCK_BYTES if num_tokens * size >= LARGE_CORPUS_BYTES else SMALL_BLOCK_BYTES
    tokens = largest // size
    while tokens > SMALLEST_BLOCK_TOKENS and num_tokens // tokens < BLOCKS_WANTED:
        tokens //= 2
    return tokens + 1


class ShardWriter:
    """Takes tokens in pieces of any size and writes shards named `<kind>-<number>-<hash>.arrow`."""

    def __init__(self, out: Storage, kind: str, dtype: str, block_tokens: int) -> None:
        self._out, self._kind, self._block_tokens = out, kind, block_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = block_tokens * max(1, SHARD_BYTES // (block_tokens * self._dtype.itemsize))
        self._buffer: list[Tokens] = []
        self._num_buffered = 0
        self._shards: list[Shard] = []

    def add(self, tokens: Tokens) -> None:
        """Append tokens to the stream; full shards are written."""
        while len(tokens):
            piece = tokens[: self._shard_tokens - self._num_buffered]
            self._buffer.append(piece)
            self._num_buffered += len(piece)
            tokens = tokens[len(piece) :]
            if self._num_buffered == self._shard_tokens:
                self._flush()

    def close(self) -> tuple[Shard, ...]:
        """Write what remains. Returns all shards in order."""
        if self._num_buffered:
            self._flush()
        return tuple(self._shards)

    def _flush(self) -> None:
        tokens = np.concatenate(self._buffer).astype(self._dtype, copy=False)
        self._buffer, self._num_buffered = [], 0
        data, blocks = _arrow_file(tokens, self._block_tokens)
        path = f"shards/{self._kind}-{len(self._shards):05d}-{xxhash.xxh3_64_hexdigest(data)}.arrow"
        self._out.write(path, data)  # also where it is there already: preparing again is what repairs a damaged one
        self._shards.append(Shard(path, len(tokens), blocks))


def _arrow_file(tokens: Tokens, block_tokens: int) -> tuple[bytes, tuple[Block, ...]]:
    """The file, and where each block's raw ids lie in it."""
    column = pa.array(tokens)
    schema = pa.schema([pa.field("tokens", column.type, nullable=False)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(tokens), block_tokens):
            writer.write_batch(pa.record_batch([column[start : start + block_tokens]], schema=schema))
    file = sink.getvalue()
    reader = pa.ipc.open_file(file)
    blocks = []
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number).column(0)
        buffer = batch.buffers()[1]
        offset, length = buffer.address - file.address, len(batch) * tokens.dtype.itemsize
        checksum = xxhash.xxh3_64_hexdigest(memoryview(file)[offset : offset + length])
        blocks.append(Block(offset, length, len(batch), checksum))
    return file.to_pybytes(), tuple(blocks)
