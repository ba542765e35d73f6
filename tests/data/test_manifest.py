"""The manifest: what was read is consistent, or it was refused; and it is the same text wherever it was written."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.data.manifest import FILE_NAME, Block, Manifest, Shard
from elastic_lm.errors import ConfigError, DataError, ElasticLMError
from elastic_lm.storage import Storage

SPECIAL_IDS = {"pad": 0, "cls": 1, "sep": 2, "mask": 3, "end_of_text": 4}


def shard(path: str, *sizes: int, item_bytes: int = 2) -> Shard:
    blocks = tuple(Block(64 * number, size * item_bytes, size, "0" * 16) for number, size in enumerate(sizes))
    return Shard(path, sum(sizes), blocks)


def manifest(*shards: Shard, **fields: Any) -> Manifest:
    usual = {"dtype": "uint16", "vocab_size": 300, "tokenizer_hash": "f" * 64, "special_ids": SPECIAL_IDS}
    return Manifest(**{**usual, "block_tokens": 10, "shards": shards, **fields})


GOOD = manifest(
    shard("shards/a.arrow", 10, 10), shard("shards/b.arrow", 10, 7), held_out=(shard("shards/c.arrow", 10, 1),)
)


def test_json_comes_back_equal() -> None:
    assert Manifest.from_json(GOOD.to_json()) == GOOD
    assert Manifest.from_json(GOOD.to_json().encode()).hash == GOOD.hash


def test_hash_follows_everything_that_names_the_corpus() -> None:
    others = [
        dataclasses.replace(GOOD, tokenizer_hash="e" * 64),
        dataclasses.replace(GOOD, shards=GOOD.shards[::-1][1:]),
        dataclasses.replace(GOOD, held_out=()),
    ]
    assert len({GOOD.hash, *(other.hash for other in others)}) == 4


def test_blocks_are_numbered_through_the_shards() -> None:
    assert [path for path, _ in GOOD.blocks] == ["shards/a.arrow"] * 2 + ["shards/b.arrow"] * 2
    assert [block.num_tokens for _, block in GOOD.blocks] == [10, 10, 10, 7]
    assert GOOD.num_tokens == 37


def test_held_out_part_is_a_corpus_of_its_own() -> None:
    part = GOOD.held_out_part()
    assert (part.num_tokens, len(part.blocks), part.held_out) == (11, 2, ())
    assert part.block_tokens == GOOD.block_tokens


def test_order_counts_the_samples_that_fit() -> None:
    order = GOOD.order(sequence_length=4, micro_batches=1, micro_batch_size=1, seed=0)
    # A block of 10 holds [0, 5) and [4, 9); the tail of 7 holds [0, 5) alone.
    assert (order.num_full_blocks, order.samples_per_block, order.tail_samples) == (3, 2, 1)


def test_order_over_a_corpus_without_a_tail() -> None:
    order = manifest(shard("a", 10, 10)).order(sequence_length=9, micro_batches=1, micro_batch_size=1, seed=0)
    assert (order.num_full_blocks, order.samples_per_block, order.tail_samples, order.num_samples) == (2, 1, 0, 2)


@pytest.mark.parametrize("empty", [manifest(), GOOD.held_out_part().held_out_part()])
def test_corpus_without_blocks_has_no_order(empty: Manifest) -> None:
    assert empty.num_tokens == 0
    with pytest.raises(ConfigError, match="no block of the corpus holds a sample"):
        empty.order(sequence_length=4, micro_batches=1, micro_batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("block_tokens", "num_blocks", "expected"),
    [
        (10, 4, 4),  # never more than there are
        (1_000, 20_000, 32 * 2**20 // 2_000),  # 32 MiB of tiny blocks
        (524_289, 1_000, 31),  # 32 MiB of 1 MiB blocks, which are two bytes larger
        (2_097_153, 1_000, 16),  # 4 MiB blocks: the least that mixes well
    ],
)
def test_windows_hold_32_mib_or_16_blocks(block_tokens: int, num_blocks: int, expected: int) -> None:
    block = Block(0, block_tokens * 2, block_tokens, "0" * 16)
    whole = Shard("a", block_tokens * num_blocks, (block,) * num_blocks)
    assert manifest(whole, block_tokens=block_tokens).window_blocks == expected


def test_saved_manifest_is_loaded_again(tmp_path: Path) -> None:
    storage = Storage.open(str(tmp_path))
    GOOD.save(storage)
    assert Manifest.load(storage) == GOOD


def test_damage_is_told_with_the_place(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(GOOD.to_json()[:-20])
    with pytest.raises(DataError, match=f"{tmp_path}/{FILE_NAME}: the manifest is damaged"):
        Manifest.load(Storage.open(str(tmp_path)))


# -- what does not fit together --------------------------------------------------------------------------------------


def changed(place: str, value: Any) -> str:
    """GOOD's JSON with one value replaced, e.g. at shards.0.blocks.1.offset."""
    root = json.loads(GOOD.to_json())
    *path, last = [int(word) if word.isdigit() else word for word in place.split(".")]
    target = root
    for word in path:
        target = target[word]
    target[last] = value
    return json.dumps(root)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("dtype", "int64", "dtype='int64' is not one of uint16, uint32"),
        ("dtype", "uint32", "bytes at offset"),  # the blocks are half as long as they would be
        ("dtype", None, "dtype=None"),
        ("vocab_size", 0, "vocab_size=0"),
        ("vocab_size", -1, "vocab_size=-1"),
        ("vocab_size", 2**16 + 1, "vocab_size=65537"),  # ids that uint16 cannot hold
        ("vocab_size", 300.5, "300.5"),
        ("vocab_size", True, "True"),
        ("block_tokens", 1, "block_tokens=1"),
        ("block_tokens", 2**29 + 1, "makes blocks of more than 1073741824 bytes"),  # nobody allocates that on its word
        ("block_tokens", 9, "has 10 tokens, not 9"),
        ("block_tokens", 11, "has 10 tokens, not 11"),
        ("block_tokens", 10.0, "10.0"),
        ("shards.0.num_tokens", 19, "do not add up to 19"),
        ("shards.0.blocks.0.num_tokens", 9, "block 0 in shards/a.arrow has 9 tokens, not 10"),
        ("shards.1.blocks.1.num_tokens", 0, "block 3 in shards/b.arrow has 0 tokens"),
        ("shards.1.blocks.1.num_tokens", 11, "block 3 in shards/b.arrow has 11 tokens"),
        ("shards.0.blocks.0.length", 19, "19 bytes at offset 0 are no block"),
        ("shards.0.blocks.0.offset", -1, "at offset -1"),
        ("shards.0.blocks.0.offset", 0.5, "0.5"),
        ("shards.0.blocks.0.offset", "0", "at offset '0' are no block"),
        ("shards.0.blocks.0.checksum", 7, "checksum"),
        ("held_out.0.blocks.1.num_tokens", 3, "block 1 in shards/c.arrow"),
        ("shards.0.path", "/etc/passwd", "leads out of the corpus"),
        ("shards.0.path", "../other/a.arrow", "leads out of the corpus"),
        ("shards.0.path", "shards/../../a.arrow", "leads out of the corpus"),
        ("shards.0.path", "shards/a\0.arrow", "leads out of the corpus"),
        ("shards.0.path", "", "leads out of the corpus"),
        ("shards.0.path", 5, "damaged"),
        ("held_out.0.path", "..", "leads out of the corpus"),
        ("special_ids", {}, "special_ids"),
        ("special_ids", [0, 1, 2, 3, 4], "special_ids"),
        ("special_ids.mask", 300, "special_ids"),  # beyond the vocabulary
        ("special_ids.mask", -1, "special_ids"),
        ("special_ids.mask", "3", "special_ids"),
        ("format_version", 2, "format version 2, this release reads 1"),
        ("shards.0.blocks.0.surprise", 1, "damaged"),
        ("shards", None, "damaged"),
        ("shards", {"a": 1}, "damaged"),
        ("shards.0.blocks", 3, "damaged"),
    ],
    ids=str,
)
def test_manifest_that_does_not_fit_together_is_refused(place: str, value: Any, message: str) -> None:
    with pytest.raises(DataError) as refusal:
        Manifest.from_json(changed(place, value))
    assert message in str(refusal.value)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"null", b"[]", b"3", b'"x"', b"{}", b"NaN", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(DataError, match="the manifest is damaged"):
        Manifest.from_json(text)


@pytest.mark.parametrize("name", sorted(json.loads(GOOD.to_json()).keys() - {"counts"}))
def test_manifest_without_a_field_is_refused(name: str) -> None:
    fields = json.loads(GOOD.to_json())
    del fields[name]
    with pytest.raises(DataError, match="damaged"):
        Manifest.from_json(json.dumps(fields))


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 70_000), st.floats(), st.text(max_size=3), st.just([]))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in [(*path, key), *_places(child, (*path, key))]]


PLACES = _places(json.loads(GOOD.to_json()))


@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES), min_size=1, max_size=3))
@settings(max_examples=200)
def test_damage_anywhere_is_refused_or_harmless(damages: list[tuple[tuple[Any, ...], Any]]) -> None:
    """Nothing but our own errors comes out, and what passes is consistent."""
    root = copy.deepcopy(json.loads(GOOD.to_json()))
    for (*path, last), value in damages:
        target = root
        for word in path:
            target = target[word] if isinstance(target, (dict, list)) and _has(target, word) else None
        if isinstance(target, dict) or (isinstance(target, list) and _has(target, last)):
            target[last] = value
    try:
        found = Manifest.from_json(json.dumps(root))
    except ElasticLMError:
        return
    assert all(isinstance(block.offset, int) and block.length == 2 * block.num_tokens for _, block in found.blocks)
    assert all(0 <= number < found.vocab_size for number in found.special_ids.values())


def _has(target: Any, key: Any) -> bool:
    return key in target if isinstance(target, dict) else isinstance(key, int) and key < len(target)
