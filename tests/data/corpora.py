"""Small corpora for tests."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from elastic_lm.config import RunConfig
from elastic_lm.data.documents import Chunk
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.mixture import Source
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.shards import ShardWriter
from elastic_lm.data.sources import cut, find_files
from elastic_lm.storage import Storage

WORDS = ["the", "a", "cat", "dog", "runs", "sleeps", "over", "under", "quick", "lazy", "river", "and", "then", "slowly"]


def texts(num_documents: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(num_documents)]


def write_lines(path: Path, documents: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def small_corpus(folder: Path, *, num_documents: int = 60, block_tokens: int = 65) -> tuple[Storage, Manifest]:
    """About 15 tokens a document in blocks of `block_tokens`."""
    out = Storage.open(str(folder / "tokens"))
    source = write_lines(folder / "text.jsonl", texts(num_documents))
    return out, prepare([source], out, PrepareOptions(vocab_size=300, block_tokens=block_tokens, held_out=0.1))


def find_chunks(sources: Sequence[str | Source], text_column: str = "text") -> list[Chunk]:
    """All chunks of the sources, in order."""
    return [chunk for file in find_files(sources) for chunk in cut(file, text_column)]


def contents(storage: Storage) -> dict[str, bytes]:
    """All that a corpus consists of."""
    return {path: storage.read(path) for path in storage.list()}


def identity(storage: Storage) -> dict[str, bytes]:
    """All that does not say where the text was read from: what is the same for the same documents."""
    return {path: data for path, data in contents(storage).items() if not path.startswith(("documents", "summary"))}


def with_noise(tokens: str, folder: Path, config: RunConfig, batches: Iterable[int]) -> str:
    """The address of the same corpus with random bytes in the place of the text of these batches of `config`'s order."""
    source, out = Storage.open(tokens), Storage.open(f"file://{folder}/tokens")
    manifest = Manifest.load(source)
    order = manifest.order(**{**config.order_fields(), "skip": ()})
    ids = np.concatenate([_ids(source.read(shard.path)) for shard in manifest.shards])
    noise = np.random.default_rng(0)
    length = order.sequence_length + 1
    for batch in batches:
        for micro_batch in range(order.micro_batches):
            for sample in order.micro_batch(batch, micro_batch):
                begin = sample.block * manifest.block_tokens + sample.index_in_block * order.sequence_length
                ids[begin : begin + length] = noise.integers(10, 256, length)
    writer = ShardWriter(out, "train", manifest.dtype, manifest.block_tokens)
    writer.add(ids)
    noisy = dataclasses.replace(manifest, shards=writer.close())
    for path in source.list():
        if not path.endswith(".arrow"):
            out.write(path, source.read(path))
    for shard in manifest.held_out:
        out.write(shard.path, source.read(shard.path))
    out.write("manifest.json", noisy.to_json().encode())
    return out.url


def _ids(arrow: bytes) -> np.ndarray:
    return pa.ipc.open_file(arrow).read_all()["tokens"].to_numpy().copy()
