"""From raw text to a corpus: find documents, get a tokenizer, encode parts, write shards, and the manifest last.

Invariant: the same input and options give the same bytes, whatever the number of parts, the machine or the number of
interruptions. Parts are pure functions of their content and are kept under its hash until the manifest is written, so an
interrupted preparation goes on where it was. Trade-off: tokens are written twice (parts, then shards), because blocks cut
across parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from elastic_lm.data.documents import CHUNK_BYTES, Chunk
from elastic_lm.data.manifest import Manifest, Shard
from elastic_lm.data.parts import (
    EMPTY,
    HELD_OUT,
    REPLACED,
    STREAMS,
    TRAIN,
    Part,
    PartResult,
    encode_part,
    is_held_out,
)
from elastic_lm.data.shards import ShardWriter, block_tokens_for
from elastic_lm.data.sources import find_chunks
from elastic_lm.data.tokenizer import TextEncoder, train
from elastic_lm.errors import ConfigError, DataError
from elastic_lm.storage import Storage

TOKENIZER_FILE = "tokenizer.json"
COUNTS = {
    "documents": TRAIN,
    "held_out_documents": HELD_OUT,
    "empty_documents": EMPTY,
    "replaced_documents": REPLACED,
}  # fmt: skip


@dataclass(frozen=True)
class PrepareOptions:
    """`tokenizer`: address of a `tokenizer.json`, or None to train one of `vocab_size`. `held_out`: share of documents.

    `block_tokens` None: chosen from the size of the corpus. `part_bytes`: text per part, the unit of parallel work.
    `tokenizer_bytes`: about how much text a tokenizer is trained on, taken evenly from the whole. `text_column`: where
    the text is in formats with names.
    """

    vocab_size: int = 16_384
    tokenizer: str | None = None
    block_tokens: int | None = None
    held_out: float = 0.005
    part_bytes: int = 32 * 2**20
    tokenizer_bytes: int = 64 * 2**20
    text_column: str = "text"

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} is not a share of the documents; use 0 to below 1, e.g. 0.005")
        if self.block_tokens is not None and self.block_tokens < 2:
            raise ConfigError(
                f"block_tokens={self.block_tokens} holds no sample; use a power of two plus one, e.g. 524289"
            )
        if self.part_bytes < 1 or self.tokenizer_bytes < 1:
            raise ConfigError(
                f"part_bytes={self.part_bytes} and tokenizer_bytes={self.tokenizer_bytes} must be positive"
            )


Map = Callable[[Callable[[Part], PartResult], Iterable[Part]], Iterable[PartResult]]


def prepare(sources: Sequence[str], out: Storage, options: PrepareOptions, map: Map = map) -> Manifest:
    """Prepare the corpus into `out`. `map` may run parts anywhere, in any order, if it returns them in order.

    Raises: ConfigError when nothing is found; DataError with the place of what is no document; StorageError.
    """
    chunks = find_chunks(sources, options.text_column)
    encoder = _encoder(chunks, options)
    encode = partial(encode_part, out=out, tokenizer_json=encoder.json, held_out=options.held_out)
    results = list(map(encode, plan(chunks, options.part_bytes)))
    return finish(results, out, encoder, options.block_tokens)


def plan(chunks: Sequence[Chunk], part_bytes: int) -> list[Part]:
    """Neighbouring chunks in parts of about `part_bytes`."""
    parts: list[Part] = []
    group: list[Chunk] = []
    group_bytes = 0
    for chunk in chunks:
        if group and group_bytes + chunk.num_bytes > part_bytes:
            parts.append(Part(tuple(group)))
            group, group_bytes = [], 0
        group.append(chunk)
        group_bytes += chunk.num_bytes
    return [*parts, Part(tuple(group))] if group else parts


# -- tokenizer -------------------------------------------------------------------------------------------------------


def _encoder(chunks: Sequence[Chunk], options: PrepareOptions) -> TextEncoder:
    if options.tokenizer is None:
        return train(_training_texts(chunks, options), options.vocab_size)
    folder, _, name = options.tokenizer.rpartition("/")
    return TextEncoder(Storage.open(folder or ".").read(name).decode("utf-8", "replace"))


def _training_texts(chunks: Sequence[Chunk], options: PrepareOptions) -> Iterator[str]:
    """Every n-th chunk's documents, without held-out ones; of a chunk that unpacks, only as many as are its share."""
    total = sum(min(chunk.num_bytes, CHUNK_BYTES) if chunk.format.unpacks else chunk.num_bytes for chunk in chunks)
    stride = max(1, -(-total // options.tokenizer_bytes))
    chosen = chunks[:: min(stride, max(1, len(chunks) // 2))]
    share = max(CHUNK_BYTES, options.tokenizer_bytes // max(1, len(chosen)))
    for chunk in chosen:
        num_characters = 0
        for document in chunk.documents():
            if chunk.format.unpacks and num_characters >= share:
                break
            num_characters += len(document.text)
            if not is_held_out(document.text, options.held_out):
                yield document.text


# -- shards ----------------------------------------------------------------------------------------------------------


def finish(results: Sequence[PartResult], out: Storage, encoder: TextEncoder, block_tokens: int | None) -> Manifest:
    """Cut the parts' tokens into blocks and shards, write the manifest, and remove the parts."""
    counts = _counts(results, out)
    num_tokens = sum(result.num_tokens["train"] for result in results)
    if num_tokens == 0:
        raise DataError(f"the sources hold no text to train on: {counts}; add documents or lower held_out")
    manifest = Manifest(
        dtype=encoder.dtype,
        vocab_size=encoder.vocab_size,
        tokenizer_hash=encoder.hash,
        special_ids=encoder.special_ids,
        block_tokens=block_tokens or block_tokens_for(num_tokens, encoder.dtype),
        shards=(),
        counts=counts,
    )
    train, held_out = (_write_shards(manifest, out, stream, results) for stream in STREAMS)
    out.write(TOKENIZER_FILE, encoder.json.encode())
    manifest = replace(manifest, shards=train, held_out=held_out)
    manifest.save(out)
    for path in out.list("parts/"):
        out.delete(path)
    return manifest


def _counts(results: Sequence[PartResult], out: Storage) -> dict[str, int]:
    """How many documents met which fate."""
    counts = dict.fromkeys(COUNTS, 0)
    for result in results:
        for records in result.records(out):
            for name, bit in COUNTS.items():
                counts[name] += int(np.count_nonzero(records["fate"] & bit))
    return counts


def _write_shards(manifest: Manifest, out: Storage, stream: str, results: Sequence[PartResult]) -> tuple[Shard, ...]:
    writer = ShardWriter(out, stream, manifest.dtype, manifest.block_tokens)
    for result in results:
        for tokens in result.tokens(out, stream, manifest.dtype):
            writer.add(tokens)
    return writer.close()
