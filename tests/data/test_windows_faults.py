"""Reading from an S3 that misbehaves: the tokens are right, or it is said in time why there are none."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import boto3
import pytest

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.order import Order
from elastic_lm.data.windows import LocalTokens, read_block, read_window
from elastic_lm.errors import DataError, StorageError
from elastic_lm.storage import Storage
from tests.data.corpora import small_corpus
from tests.faults import proxy as p
from tests.faults.proxy import Exchange, FaultyProxy

pytestmark = [pytest.mark.s3, pytest.mark.slow]

WINDOW_BLOCKS = 4
SHARDS = "^GET .*/shards/"


@pytest.fixture(scope="module")
def corpora(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Storage, Manifest]:
    """A corpus on S3, the same in a folder, and its manifest."""
    here, manifest = small_corpus(tmp_path_factory.mktemp("corpus"), num_documents=80)
    boto3.client("s3").create_bucket(Bucket="windows")
    there = Storage.open("s3://windows/tokens", deadline_s=10)
    for path in here.list():
        there.write(path, here.read(path))
    return there, here, manifest


def order_of(manifest: Manifest) -> Order:
    shape = {"sequence_length": 15, "micro_batches": 2, "micro_batch_size": 3, "seed": 7}
    return manifest.order(**shape, window_blocks=WINDOW_BLOCKS)


@pytest.mark.parametrize("seed", range(2))
def test_tokens_come_right_through_a_storm(
    seed: int, proxy: FaultyProxy, corpora: tuple[Storage, Storage, Manifest]
) -> None:
    there, here, manifest = corpora
    order = order_of(manifest)
    proxy.calm(seed)
    storm = [p.status(503), p.status(500), p.reset, p.truncated, p.shortened, p.delayed(0.05)]
    rules = [proxy.inject(fault, on=SHARDS, probability=0.1) for fault in storm]
    disturbed, calm = LocalTokens(there, manifest, order), LocalTokens(here, manifest, order)
    for step in range(order.num_samples // 6):
        for micro_batch in range(2):
            assert disturbed.tokens(step, micro_batch).tolist() == calm.tokens(step, micro_batch).tolist()
    assert sum(len(rule.hits) for rule in rules) > 5


def test_block_that_comes_flipped_is_read_once_more(
    proxy: FaultyProxy, corpora: tuple[Storage, Storage, Manifest]
) -> None:
    there, here, manifest = corpora
    asked: Counter[str] = Counter()

    def flip_the_first_time(exchange: Exchange) -> None:
        asked[exchange.headers["Range"]] += 1
        (p.flipped if asked[exchange.headers["Range"]] == 1 else p.passed)(exchange)

    proxy.inject(flip_the_first_time, on=SHARDS)
    order = order_of(manifest)
    assert read_window(there, manifest, order, 0, 0).tolist() == read_window(here, manifest, order, 0, 0).tolist()
    assert list(asked.values()) == [2] * WINDOW_BLOCKS


def test_block_that_stays_flipped_is_refused_with_shard_and_offset(
    proxy: FaultyProxy, corpora: tuple[Storage, Storage, Manifest]
) -> None:
    there, _, manifest = corpora
    path, block = manifest.blocks[2]
    rule = proxy.inject(p.flipped, on=SHARDS)
    place = (
        rf"^s3://windows/tokens/{path}, offset {block.offset}, {block.length} bytes \(block 2\): checksum .* read twice"
    )
    with pytest.raises(DataError, match=place):
        read_block(there, manifest, 2)
    assert len(rule.hits) == 2


@pytest.mark.parametrize(("code", "told"), [(403, "access denied"), (404, "no such object")])
def test_shard_that_is_refused_or_missing_stops_at_once(
    code: int, told: str, proxy: FaultyProxy, corpora: tuple[Storage, Storage, Manifest]
) -> None:
    there, _, manifest = corpora
    rule = proxy.inject(p.status(code), on=SHARDS)
    with pytest.raises(DataError, match=f"^s3://windows/tokens/shards/.*{told}") as caught:
        LocalTokens(there, manifest, order_of(manifest)).tokens(0, 0)
    assert len(rule.hits) == WINDOW_BLOCKS  # asked for together, and each of them once
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(caught.value)


@pytest.mark.parametrize("fault", [p.status(503), p.stalled], ids=["503", "stalled"])
def test_storage_that_stays_away_is_no_fault_of_the_data(
    fault: Any, proxy: FaultyProxy, corpora: tuple[Storage, Storage, Manifest], tmp_path: Path
) -> None:
    there, _, manifest = corpora
    proxy.inject(fault, on=SHARDS)
    with pytest.raises(StorageError, match="read_range s3://windows/tokens/shards/.*gave up after"):
        LocalTokens(Storage.open(there.url, deadline_s=0.6), manifest, order_of(manifest)).tokens(0, 0)


def test_truncated_shard_is_told_from_a_cut_answer(
    proxy: FaultyProxy, corpora: tuple[Storage, Storage, Manifest]
) -> None:
    there, _, manifest = corpora
    path, block = manifest.blocks[-1]
    copy = there.child("truncated")
    copy.write(path, there.read(path)[: block.offset + 2])
    proxy.calm()
    with pytest.raises(DataError, match="the shard ends before; it was truncated, prepare the corpus again"):
        read_block(copy, manifest, len(manifest.blocks) - 1)
    # Of this object alone: threads of a test before may still be giving up on theirs.
    methods = [line.split()[0] for line in proxy.requests if "/truncated/" in line]
    assert methods == ["GET", "HEAD"], "the range, and how long the object is"
