"""Checkpoints on an S3 that misbehaves: what is published is whole, and what is loaded is what was saved."""

from __future__ import annotations

import pytest
import torch

from elastic_lm.checkpoint import registry, store
from elastic_lm.errors import CheckpointError
from elastic_lm.storage import Storage
from tests.faults import proxy as p
from tests.faults.proxy import FaultyProxy

pytestmark = [pytest.mark.s3, pytest.mark.slow]

PART_BYTES = 40_000


def state(seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"parameters/{number}": torch.randn(100, 100, generator=draw) for number in range(6)}


@pytest.mark.parametrize("seed", range(2))
def test_checkpoint_comes_through_a_storm(seed: int, proxy: FaultyProxy, s3_url: str) -> None:
    run = Storage.open(f"{s3_url}/runs/r")
    assert run.list() == []
    proxy.calm(seed)
    storm = [p.status(503), p.reset, p.answer_lost, p.truncated, p.shortened, p.delayed(0.05)]
    rules = [proxy.inject(fault, on="checkpoints/", probability=0.1) for fault in storm]
    saved = state(seed)
    for step in (10, 20):
        store.save(run, step, saved, {}, part_bytes=PART_BYTES)
    newest = registry.newest_complete(run)
    assert newest is not None and newest.step == 20
    loaded = store.load(run, 20).tensors
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert sum(len(rule.hits) for rule in rules) > 3


def test_manifest_whose_answer_was_lost_is_published(proxy: FaultyProxy, s3_url: str) -> None:
    run = Storage.open(f"{s3_url}/runs/r")
    lost = proxy.inject(p.answer_lost, on="^PUT .*manifest", times=1)
    store.save(run, 10, state(0), {}, part_bytes=PART_BYTES)
    assert len(lost.hits) == 1
    with pytest.raises(CheckpointError, match="another"):
        store.save(run, 10, state(1), {}, part_bytes=PART_BYTES)
