"""From raw text to a corpus: find documents, get a tokenizer, encode parts, write shards, and the manifest last.

Invariant: the same input and options give the same bytes, whatever the number of parts, the machine or the number of
interruptions. Parts are pure functions of their content and are kept under its hash until the manifest is written, so an
interrupted preparation goes on where it was. Trade-off: tokens are written twice (parts, then shards), because blocks cut
across parts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash

from elastic_lm.data.documents import Chunk, documents, find_chunks, read_chunk
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.shards import ShardWriter, block_tokens_for
from elastic_lm.data.tokenizer import TextEncoder, train
from elastic_lm.data.windows import Tokens
from elastic_lm.errors import ConfigError, DataError
from elastic_lm.storage import Storage

PARTS_VERSION = "1"  # change it when the same content is to be encoded differently
TOKENIZER_FILE = "tokenizer.json"
PIECE_BYTES = 16 * 2**20
COUNTS = ("documents", "held_out_documents", "empty_documents", "replaced_documents")


@dataclass(frozen=True)
class PrepareOptions:
    """`tokenizer`: address of a `tokenizer.json`, or None to train one of `vocab_size`. `held_out`: share of documents.

    `block_tokens` None: chosen from the size of the corpus. `part_bytes`: text per part, the unit of parallel work.
    `tokenizer_bytes`: about how much text a tokenizer is trained on, taken evenly from the whole.
    """

    vocab_size: int = 16_384
    tokenizer: str | None = None
    block_tokens: int | None = None
    held_out: float = 0.005
    part_bytes: int = 32 * 2**20
    tokenizer_bytes: int = 64 * 2**20

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


@dataclass(frozen=True)
class Part:
    """What one task encodes: neighbouring chunks."""

    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class PartResult:
    """A finished part: its folder's name, and how many tokens and documents it holds."""

    name: str
    train_tokens: int
    held_out_tokens: int
    counts: dict[str, int]


Map = Callable[[Callable[[Part], PartResult], Iterable[Part]], Iterable[PartResult]]


def prepare(sources: Sequence[str], out: Storage, options: PrepareOptions, map: Map = map) -> Manifest:
    """Prepare the corpus into `out`. `map` may run parts anywhere, in any order, if it returns them in order.

    Raises: ConfigError when nothing is found; DataError with the place of what is no document; StorageError.
    """
    chunks = find_chunks(sources)
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


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is kept from training: by its own hash, so copies of it are always on the same side."""
    return xxhash.xxh3_64_intdigest(text.encode()) < share * 2**64


# -- tokenizer -------------------------------------------------------------------------------------------------------


def _encoder(chunks: Sequence[Chunk], options: PrepareOptions) -> TextEncoder:
    if options.tokenizer is None:
        return train(_training_texts(chunks, options), options.vocab_size)
    folder, _, name = options.tokenizer.rpartition("/")
    return TextEncoder(Storage.open(folder or ".").read(name).decode("utf-8", "replace"))


def _training_texts(chunks: Sequence[Chunk], options: PrepareOptions) -> Iterator[str]:
    """Every n-th chunk's documents, without held-out ones."""
    total = sum(chunk.num_bytes for chunk in chunks)
    stride = max(1, -(-total // options.tokenizer_bytes))
    for chunk in chunks[:: min(stride, max(1, len(chunks) // 2))]:
        for document in documents(chunk, read_chunk(chunk)):
            if not is_held_out(document.text, options.held_out):
                yield document.text


# -- parts -----------------------------------------------------------------------------------------------------------


def encode_part(part: Part, *, out: Storage, tokenizer_json: str, held_out: float) -> PartResult:
    """Encode a part into `out`, or find it there. Safe to run twice, also at once.    Raises: as `prepare`."""
    texts = [read_chunk(chunk) for chunk in part.chunks]
    name = _part_name(part, texts, tokenizer_json, held_out)
    folder = out.child(f"parts/{name}")
    if folder.exists("done.json"):
        return PartResult(**json.loads(folder.read("done.json")))
    encoder = TextEncoder(tokenizer_json)
    sides: dict[bool, list[Tokens]] = {False: [], True: []}
    counts: Counter[str] = Counter()
    for chunk, data in zip(part.chunks, texts, strict=True):
        for document in documents(chunk, data):
            counts["replaced_documents"] += document.replaced
            if not document.text.strip():
                counts["empty_documents"] += 1
                continue
            is_held = is_held_out(document.text, held_out)
            counts["held_out_documents" if is_held else "documents"] += 1
            sides[is_held].append(_encoded(encoder, document.text, chunk))
    for is_held, pieces in sides.items():
        data = np.concatenate(pieces).tobytes() if pieces else b""
        folder.write("held_out.bin" if is_held else "train.bin", data)
    train_tokens, held_out_tokens = (sum(len(piece) for piece in sides[side]) for side in (False, True))
    result = PartResult(name, train_tokens, held_out_tokens, dict(counts))
    folder.write("done.json", json.dumps(asdict(result)).encode())
    return result


def _encoded(encoder: TextEncoder, text: str, chunk: Chunk) -> Tokens:
    try:
        return np.array(encoder.encode(text), dtype=encoder.dtype)
    except DataError as error:
        raise DataError(f"{chunk.place()}: {error}") from error


def _part_name(part: Part, texts: Sequence[bytes], tokenizer_json: str, held_out: float) -> str:
    """Hash of all that a part's tokens depend on."""
    digest = xxhash.xxh3_128()
    for word in (PARTS_VERSION, tokenizer_json, repr(held_out)):
        digest.update(word.encode() + b"\0")
    for chunk, data in zip(part.chunks, texts, strict=True):
        kind = chunk.path.rpartition(".")[2]
        digest.update(f"{kind} {len(data)}\0".encode() + data)
    return digest.hexdigest()


# -- shards ----------------------------------------------------------------------------------------------------------


def finish(results: Sequence[PartResult], out: Storage, encoder: TextEncoder, block_tokens: int | None) -> Manifest:
    """Cut the parts' tokens into blocks and shards, write the manifest, and remove the parts."""
    counts: Counter[str] = Counter()
    for result in results:
        counts.update(result.counts)
    num_tokens = sum(result.train_tokens for result in results)
    if num_tokens == 0:
        raise DataError(f"the sources hold no text to train on: {dict(counts)}; add documents or lower held_out")
    block_tokens = block_tokens or block_tokens_for(num_tokens, encoder.dtype)
    manifest = Manifest(
        dtype=encoder.dtype,
        vocab_size=encoder.vocab_size,
        tokenizer_hash=encoder.hash,
        special_ids=encoder.special_ids,
        block_tokens=block_tokens,
        shards=(),
        counts={name: counts[name] for name in COUNTS},
    )
    shards = _write_shards(manifest, out, "train", [(r.name, r.train_tokens) for r in results])
    held_out = _write_shards(manifest, out, "held_out", [(r.name, r.held_out_tokens) for r in results])
    out.write(TOKENIZER_FILE, encoder.json.encode())
    manifest = replace(manifest, shards=shards, held_out=held_out)
    manifest.save(out)
    for path in out.list("parts/"):
        out.delete(path)
    return manifest


def _write_shards(manifest: Manifest, out: Storage, kind: str, parts: Iterable[tuple[str, int]]) -> Any:
    writer = ShardWriter(out, kind, manifest.dtype, manifest.block_tokens)
    item_size = np.dtype(manifest.dtype).itemsize
    for name, num_tokens in parts:
        for start in range(0, num_tokens * item_size, PIECE_BYTES):
            length = min(PIECE_BYTES, num_tokens * item_size - start)
            data = out.read_range(f"parts/{name}/{kind}.bin", start, length)
            writer.add(np.frombuffer(data, dtype=manifest.dtype))
    return writer.close()
