"""Reading: rows are what the order says, and no damaged byte gets through."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.order import Order
from elastic_lm.data.windows import LocalTokens, read_block, read_window
from elastic_lm.errors import ConfigError, DataError
from elastic_lm.storage import Storage
from tests.data.corpora import small_corpus


def order_over(manifest: Manifest, **fields: Any) -> Order:
    shape = {"sequence_length": 15, "micro_batches": 2, "micro_batch_size": 3, "seed": 7, "window_blocks": 3}
    return manifest.order(**{**shape, **fields})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Manifest]:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("sequence_length", [15, 16, 63])  # waste of several tokens, of none, of one
def test_rows_are_slices_of_the_corpus(corpus: tuple[Storage, Manifest], sequence_length: int) -> None:
    storage, manifest = corpus
    order = order_over(manifest, sequence_length=sequence_length)
    source = LocalTokens(storage, manifest, order)
    for step in range(order.num_samples // 6 + 2):
        for micro_batch in range(2):
            found = source.tokens(step, micro_batch)
            assert found.shape == (3, sequence_length + 1)
            assert found.dtype == np.uint16
            for row, sample in zip(found, order.micro_batch(step, micro_batch), strict=True):
                start = sample.index_in_block * sequence_length
                block = read_block(storage, manifest, sample.block)
                assert row.tolist() == block[start : start + sequence_length + 1].tolist()


def test_tail_is_part_of_an_epoch(corpus: tuple[Storage, Manifest]) -> None:
    storage, manifest = corpus
    order = order_over(manifest)
    assert order.tail_samples > 0
    assert order.num_full_blocks == len(manifest.blocks) - 1
    last = order.num_windows - 1
    assert order.window_blocks_of(0, last)[-1] == order.num_full_blocks
    full = len(order.window_blocks_of(0, last)) - 1
    tail_tokens = min(order.span_tokens, manifest.blocks[-1][1].num_tokens)
    assert len(read_window(storage, manifest, order, 0, last)) == full * order.span_tokens + tail_tokens


class Flipping(Storage):
    """Flips a byte in the first `num_flips` ranges that are read."""

    num_flips = 0

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        data = super().read_range(path, offset, length)
        if self.num_flips > 0:
            self.num_flips -= 1
            data = bytes([data[0] ^ 1]) + data[1:]
        return data


def test_flipped_byte_is_read_again(corpus: tuple[Storage, Manifest]) -> None:
    storage, manifest = corpus
    flipping = Flipping(storage.url)
    flipping.num_flips = 1
    assert read_block(flipping, manifest, 0).tolist() == read_block(storage, manifest, 0).tolist()


def test_damage_that_stays_is_refused_with_shard_and_offset(corpus: tuple[Storage, Manifest]) -> None:
    storage, manifest = corpus
    flipping = Flipping(storage.url)
    flipping.num_flips = 2
    path, block = manifest.blocks[1]
    with pytest.raises(DataError, match=rf"{path}, offset {block.offset}.*checksum"):
        read_block(flipping, manifest, 1)


def test_missing_and_truncated_shards_are_refused(tmp_path: Path) -> None:
    storage, manifest = small_corpus(tmp_path)
    path, block = manifest.blocks[-1]
    storage.write(path, storage.read(path)[: block.offset + 2])
    with pytest.raises(DataError, match="truncated"):
        read_block(storage, manifest, len(manifest.blocks) - 1)
    storage.delete(path)
    with pytest.raises(DataError, match="no such object"):
        read_window(storage, manifest, order_over(manifest), 0, 0)


def test_id_beyond_the_vocabulary_is_refused(corpus: tuple[Storage, Manifest]) -> None:
    storage, manifest = corpus
    with pytest.raises(DataError, match="not below the vocabulary size 50"):
        read_block(storage, dataclasses.replace(manifest, vocab_size=50), 0)


def test_order_without_a_sample_is_refused(corpus: tuple[Storage, Manifest]) -> None:
    with pytest.raises(ConfigError, match="sequence_length"):
        order_over(corpus[1], sequence_length=65)


def damaged(manifest: Manifest, **changes: Any) -> str:
    return json.dumps({**json.loads(manifest.to_json()), **changes})


def test_damaged_manifest_is_refused(corpus: tuple[Storage, Manifest]) -> None:
    _, manifest = corpus
    shards = json.loads(manifest.to_json())["shards"]
    cases = [
        ("not json", "damaged"),
        ("[]", "damaged"),
        (damaged(manifest, format_version=99), "version 99"),
        (damaged(manifest, dtype="int64"), "dtype"),
        (damaged(manifest, vocab_size=10**6), "vocab_size"),
        (damaged(manifest, block_tokens=64), "65 tokens"),
        (damaged(manifest, shards=[{**shards[0], "path": "../x"}]), "leads out"),
        (damaged(manifest, shards=[{**shards[0], "num_tokens": 1}]), "add up"),
        (damaged(manifest, surprise=1), "damaged"),
    ]
    for text, message in cases:
        with pytest.raises(DataError, match=message):
            Manifest.from_json(text)


def test_missing_corpus_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="elastic-lm prepare"):
        Manifest.load(Storage.open(str(tmp_path)))


def test_manifest_hash_is_the_same_wherever_the_corpus_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert small_corpus(tmp_path / "a")[1].hash == small_corpus(tmp_path / "b")[1].hash
