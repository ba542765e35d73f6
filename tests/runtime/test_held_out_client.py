"""The worker's reader of held-out text: each batch once, a fence at once, bytes where they mean something."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from elastic_lm.data import windows
from elastic_lm.data.corpus import TOKENIZER_FILE
from elastic_lm.data.held_out import HeldOut, HeldOutTokens
from elastic_lm.data.passages import encoder_of
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.errors import DataError
from elastic_lm.runtime.held_out_client import HeldOutClient
from elastic_lm.storage import Storage
from tests.data.corpora import small_corpus


def never() -> bool:
    return False


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Storage, HeldOut]:
    storage, manifest = small_corpus(tmp_path)
    return storage, HeldOut.of(manifest, sequence_length=16, batch_size=3)


def client(corpus: tuple[Storage, HeldOut], *, is_all_text: bool = True) -> HeldOutClient:
    storage, held_out = corpus
    return HeldOutClient(storage.url, held_out, 60.0, is_all_text=is_all_text)


def test_batches_are_those_of_the_corpus_and_read_once(
    corpus: tuple[Storage, HeldOut], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, expected = client(corpus), HeldOutTokens(*corpus)
    for number in range(corpus[1].num_batches):
        assert np.array_equal(mine.batch(number, never), expected.batch(number))
    mine.rest()
    monkeypatch.setattr(windows, "read_block", lambda *arguments: pytest.fail("it was read before"))
    for number in range(corpus[1].num_batches):
        mine.batch(number, never)


def test_bytes_are_those_of_the_targets(corpus: tuple[Storage, HeldOut]) -> None:
    mine = client(corpus)
    encoder = encoder_of(corpus[0], corpus[1].part)
    for number in range(corpus[1].num_batches):
        tokens = mine.batch(number, never)
        texts = [encoder.decode(row[1:].tolist()) for row in tokens]
        assert mine.num_bytes(tokens) == sum(len(text.encode()) for text in texts)  # of ASCII alone


@pytest.mark.parametrize("is_all_text", [True, False])
def test_no_bytes_where_targets_are_not_all_text_or_the_tokenizer_is_lost(
    is_all_text: bool, corpus: tuple[Storage, HeldOut]
) -> None:
    if is_all_text:
        Path(corpus[0].url.removeprefix("file://"), TOKENIZER_FILE).unlink()
    mine = client(corpus, is_all_text=is_all_text)
    assert mine.num_bytes(mine.batch(0, never)) is None


def test_fence_is_heard_while_storage_hangs(corpus: tuple[Storage, HeldOut], monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, goes_on, read_block = threading.Event(), threading.Event(), windows.read_block

    def slow(*arguments: object) -> windows.Tokens:
        hangs.set()
        goes_on.wait(60)
        return read_block(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(windows, "read_block", slow)
    mine = client(corpus)
    with pytest.raises(Cancelled):
        mine.batch(0, hangs.is_set)
    monkeypatch.setattr(windows, "read_block", read_block)
    assert np.array_equal(mine.batch(1, never), HeldOutTokens(*corpus).batch(1))  # while the first still hangs
    goes_on.set()


def test_damage_is_told(corpus: tuple[Storage, HeldOut]) -> None:
    path, block = corpus[1].part.blocks[0]
    with open(f"{corpus[0].url.removeprefix('file://')}/{path}", "r+b") as shard:
        shard.seek(block.offset)
        shard.write(b"\xff\xff")
    mine = client(corpus)
    with pytest.raises(DataError, match="checksum"):
        mine.batch(0, never)
