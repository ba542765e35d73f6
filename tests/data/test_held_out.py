"""Held-out batches: every sample once, whatever the run; and the bytes of text behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from elastic_lm.data.held_out import HeldOut, HeldOutTokens
from elastic_lm.data.passages import encoder_of
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.data.windows import read_block
from elastic_lm.errors import ConfigError
from tests.data.corpora import small_corpus

LENGTH, SIZE = 16, 3


def test_every_held_out_sample_comes_once(tmp_path: Path) -> None:
    storage, manifest = small_corpus(tmp_path)
    held_out = HeldOut.of(manifest, sequence_length=LENGTH, batch_size=SIZE)
    tokens = HeldOutTokens(storage, held_out)
    batches = [tokens.batch(number) for number in range(held_out.num_batches)]
    assert [len(batch) for batch in batches] == [held_out.num_rows(number) for number in range(held_out.num_batches)]
    assert all(len(batch) == SIZE for batch in batches[:-1]) and 0 < len(batches[-1]) <= SIZE
    expected = []
    for number in range(len(held_out.part.blocks)):
        block = read_block(storage, held_out.part, number)
        expected += [block[start : start + LENGTH + 1].tolist() for start in range(0, len(block) - LENGTH, LENGTH)]
    assert sorted(np.concatenate(batches).tolist()) == sorted(expected)


def test_fewer_samples_are_the_first_batches_of_all(tmp_path: Path) -> None:
    storage, manifest = small_corpus(tmp_path)
    few = HeldOut.of(manifest, sequence_length=LENGTH, batch_size=SIZE, max_samples=4)
    everything = HeldOutTokens(storage, HeldOut.of(manifest, sequence_length=LENGTH, batch_size=SIZE))
    tokens = HeldOutTokens(storage, few)
    assert (few.num_batches, few.num_rows(0), few.num_rows(1)) == (2, 3, 1)
    assert np.array_equal(tokens.batch(0), everything.batch(0))
    assert np.array_equal(tokens.batch(1), everything.batch(1)[:1])


def test_nothing_held_out_is_told(tmp_path: Path) -> None:
    _, manifest = small_corpus(tmp_path)
    with pytest.raises(ConfigError, match=r"holds [\d,]+ tokens out, and a sample takes 8,192 \+ 1.*--held-out"):
        HeldOut.of(manifest, sequence_length=8192, batch_size=1)


@pytest.mark.parametrize("text", ["plain words", "Käse – 数", "a\n\n  b\t"])
def test_bytes_of_a_text_add_up_over_its_tokens(text: str, tmp_path: Path) -> None:
    storage, manifest = small_corpus(tmp_path)
    encoder = encoder_of(storage, manifest)
    ids = encoder.encode(text)
    assert sum(encoder.num_bytes(token) for token in ids) == len(text.encode())
    assert encoder.bytes_by_token(max(ids) + 1)[list(ids)].tolist() == [encoder.num_bytes(token) for token in ids]


def test_bytes_of_a_tokenizer_that_spells_words() -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    words = ["the cat sleeps", "a cat runs over the river"]
    tokenizer.train_from_iterator(words, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"]))
    encoder = TextEncoder(tokenizer.to_str())
    ids = encoder.encode("the cat")[:-1]
    assert sum(encoder.num_bytes(token) for token in ids) == len(" the cat")  # with the space before each word


def test_bytes_of_a_tokenizer_that_falls_back_to_bytes() -> None:
    """As SentencePiece's: a character that has no token is spelled byte by byte."""
    vocabulary = {"<unk>": 0, "a": 1, " ": 2, **{f"<0x{number:02X}>": 3 + number for number in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    encoder = TextEncoder(tokenizer.to_str())
    text = "a é 中 a"
    assert sum(encoder.num_bytes(token) for token in encoder.encode(text)) == len(text.encode()) == 10


def test_bytes_of_added_tokens_and_of_decoders_in_a_row(tmp_path: Path) -> None:
    storage, manifest = small_corpus(tmp_path)
    tokenizer = Tokenizer.from_str(encoder_of(storage, manifest).json)
    tokenizer.add_tokens(["日本語"])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()])
    encoder = TextEncoder(tokenizer.to_str())
    for text in ("wörld 中文", "x日本語y"):
        assert sum(encoder.num_bytes(token) for token in encoder.encode(text)) == len(text.encode())


def test_bytes_without_a_decoder() -> None:
    tokenizer = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TextEncoder(tokenizer.to_str()).num_bytes(1) == len(" cat")
