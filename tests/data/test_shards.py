"""Shards: the same tokens give the same files however they arrive, and every block lies where the manifest says."""

from __future__ import annotations

import itertools
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.data import shards as shards_module
from elastic_lm.data.manifest import ITEM_SIZES, Manifest
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.shards import ShardWriter, block_tokens_for
from elastic_lm.data.windows import Tokens, read_block
from elastic_lm.errors import DataError
from elastic_lm.storage import Storage
from tests.data.corpora import small_corpus

SPECIAL_IDS = {"pad": 0, "cls": 1, "sep": 2, "mask": 3, "end_of_text": 4}
BLOCK_TOKENS = 7
folders = itertools.count()


def stream(num_tokens: int, dtype: str = "uint16") -> Tokens:
    return np.random.default_rng(num_tokens).integers(0, 300, num_tokens).astype(dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


def written(folder: Path, tokens: Tokens, cuts: list[int], shard_bytes: int = 40) -> tuple[Storage, Manifest]:
    """The tokens, added in pieces that end at `cuts`. A shard of 40 bytes holds two blocks of 7 short tokens."""
    out = Storage.open(str(folder / str(next(folders))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "SHARD_BYTES", shard_bytes)
        writer = ShardWriter(out, "train", str(tokens.dtype), BLOCK_TOKENS)
    for start, stop in pairwise([0, *sorted(cuts), len(tokens)]):
        writer.add(tokens[start:stop])
    shards = writer.close()
    return out, Manifest(str(tokens.dtype), 300, "f" * 64, SPECIAL_IDS, BLOCK_TOKENS, shards)


def contents(out: Storage) -> dict[str, bytes]:
    return {path: out.read(path) for path in out.list()}


@given(num_tokens=st.integers(0, 60), dtype=st.sampled_from(sorted(ITEM_SIZES)), data=st.data())
@settings(max_examples=30)
def test_files_do_not_depend_on_how_tokens_arrive(
    folder: Path, num_tokens: int, dtype: str, data: st.DataObject
) -> None:
    tokens = stream(num_tokens, dtype)
    cuts = data.draw(st.lists(st.integers(0, num_tokens), max_size=6))
    (out, manifest), (whole, expected) = written(folder, tokens, cuts), written(folder, tokens, [])
    assert manifest == expected
    assert contents(out) == contents(whole)


@given(num_tokens=st.integers(1, 60), dtype=st.sampled_from(sorted(ITEM_SIZES)), shard_bytes=st.integers(1, 300))
@settings(max_examples=30)
def test_blocks_are_the_tokens_in_order(folder: Path, num_tokens: int, dtype: str, shard_bytes: int) -> None:
    tokens = stream(num_tokens, dtype)
    out, manifest = written(folder, tokens, [], shard_bytes)
    found = [read_block(out, manifest, block_id) for block_id in range(len(manifest.blocks))]
    assert np.concatenate(found).tolist() == tokens.tolist()
    assert [len(block) for block in found[:-1]] == [BLOCK_TOKENS] * (len(found) - 1)
    assert manifest.num_tokens == num_tokens


def test_offsets_and_checksums_are_those_of_the_raw_little_endian_ids(folder: Path) -> None:
    tokens = stream(10, "uint32")
    out, manifest = written(folder, tokens, [])
    for (path, block), piece in zip(manifest.blocks, (tokens[:7], tokens[7:]), strict=True):
        raw = out.read(path)[block.offset : block.offset + block.length]
        assert raw == piece.astype("<u4").tobytes()
        assert block.checksum == xxhash.xxh3_64_hexdigest(raw)
        assert block.offset % 8 == 0  # arrow's alignment: a mapped file can be used as it lies


def test_file_is_arrow_that_any_reader_opens(folder: Path) -> None:
    tokens = stream(14)
    out, manifest = written(folder, tokens, [])
    (shard,) = manifest.shards
    reader = pa.ipc.open_file(out.read(shard.path))
    assert reader.schema == pa.schema([pa.field("tokens", pa.uint16(), nullable=False)])
    assert [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)] == [7, 7]
    assert reader.read_all().column("tokens").to_pylist() == tokens.tolist()


def test_shards_hold_whole_blocks_and_are_named_by_number_and_content(folder: Path) -> None:
    out, manifest = written(folder, stream(37), [])
    assert [shard.num_tokens for shard in manifest.shards] == [14, 14, 9]
    for number, shard in enumerate(manifest.shards):
        assert shard.path == f"shards/train-{number:05d}-{xxhash.xxh3_64_hexdigest(out.read(shard.path))}.arrow"
    assert out.list() == [shard.path for shard in manifest.shards]


def test_block_larger_than_a_shard_is_a_shard_of_its_own(folder: Path) -> None:
    assert [shard.num_tokens for shard in written(folder, stream(20), [], shard_bytes=1)[1].shards] == [7, 7, 6]


def test_no_tokens_are_no_shards(folder: Path) -> None:
    out, manifest = written(folder, stream(0), [])
    assert (manifest.shards, out.list()) == ((), [])


def test_other_content_never_changes_a_file_that_is_there(folder: Path) -> None:
    out, _ = written(folder, stream(14), [])
    before = contents(out)
    writer = ShardWriter(out, "train", "uint16", BLOCK_TOKENS)
    writer.add(stream(13))
    writer.close()
    assert before.items() < contents(out).items()


def test_damaged_shard_is_repaired_by_preparing_again(tmp_path: Path) -> None:
    """That is what the refusal of a damaged block advises."""
    out, manifest = small_corpus(tmp_path)
    path, block = manifest.blocks[0]
    content = bytearray(out.read(path))
    content[block.offset] ^= 1
    out.write(path, bytes(content))
    with pytest.raises(DataError, match="prepare it again"):
        read_block(out, manifest, 0)
    assert small_corpus(tmp_path)[1] == manifest
    assert len(read_block(out, manifest, 0)) == 65


@given(st.integers(1, 10**13), st.sampled_from(sorted(ITEM_SIZES)))
def test_block_size_wastes_nothing_and_leaves_blocks_to_shuffle(num_tokens: int, dtype: str) -> None:
    block_tokens = block_tokens_for(num_tokens, dtype)
    targets = block_tokens - 1
    assert targets & (targets - 1) == 0  # samples of any power of two fill a block
    assert 4_096 <= targets <= 4 * 2**20 // ITEM_SIZES[dtype]
    assert targets == 4_096 or num_tokens // targets >= 64


@pytest.mark.parametrize("dtype", sorted(ITEM_SIZES))
def test_prepared_corpus_has_the_dtype_of_its_vocabulary(tmp_path: Path, dtype: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(10 if dtype == "uint16" else 2**16)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    (tmp_path / "a.txt").write_text(f"w1 w2 w{len(words) - 1} what")
    out = Storage.open(str(tmp_path / "out"))
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer.json"), held_out=0.0)
    manifest = prepare([str(tmp_path / "a.txt")], out, options)
    assert manifest.dtype == dtype
    assert read_block(out, manifest, 0).tolist() == [1, 2, len(words) - 1, 0, manifest.special_ids["end_of_text"]]
