"""A checkpoint is published when all its shares are stored, and what comes of it is told; old ones go."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from elastic_lm.checkpoint import registry, store
from elastic_lm.checkpoint.layout import Part, shares
from elastic_lm.checkpoint.registry import Retention
from elastic_lm.control.events import Published
from elastic_lm.engine.state import digest_of
from elastic_lm.errors import StorageError, SupersededError
from elastic_lm.runtime.publisher import Publisher
from elastic_lm.storage import Storage
from tests.checkpoint.saved import state

WAIT_S = 20


class Outbox:
    """A publisher of a run, and what it tells."""

    def __init__(self, storage: Storage, keep: int = 2, **owner: Any) -> None:
        self.told: queue.Queue[Published] = queue.Queue()
        self.storage = storage
        self.publisher = Publisher(storage, Retention(keep), {"fingerprint": "f"}, self.told.put, **owner)

    def save(self, number: int, step: int, num_shares: int = 2) -> Published:
        self.publisher.begin(number, step)
        for share in range(num_shares):
            self.publisher.add(number, stored(self.storage, step, share, num_shares))
        self.publisher.publish(number)
        return self.told.get(timeout=WAIT_S)


def stored(storage: Storage, step: int, share: int, num_shares: int) -> tuple[Part, ...]:
    tensors = state(step)
    names = shares({name: tensor.numel() for name, tensor in tensors.items()}, num_shares)[share]
    return store.save_share(storage, step, {name: tensors[name] for name in names}, share=share)


@pytest.fixture
def outbox(folder_url: str) -> Iterator[Outbox]:
    outbox = Outbox(Storage.open(folder_url))
    yield outbox
    outbox.publisher.close()


def test_shares_become_a_checkpoint_with_the_digests_of_the_whole_state(outbox: Outbox) -> None:
    assert outbox.save(1, 10) == Published(1, True)
    info = registry.newest_complete(outbox.storage)
    assert info is not None
    weights = {name: tensor for name, tensor in state(10).items() if name.startswith("parameters/")}
    assert info.meta == {
        "fingerprint": "f", "digest": {"state": digest_of(state(10), 10), "weights": digest_of(weights, 10)},
    }  # fmt: skip
    assert outbox.publisher.newest == {"url": info.url, **info.meta["digest"]}
    assert all(torch.equal(tensor, state(10)[name]) for name, tensor in store.load(outbox.storage, 10).tensors.items())


def test_digests_do_not_depend_on_the_number_of_shares(outbox: Outbox) -> None:
    outbox.save(1, 10, num_shares=1)
    first = dict(outbox.publisher.newest)
    outbox.save(2, 10, num_shares=3)  # the step again, by others
    assert outbox.publisher.newest == first


def test_share_of_an_attempt_that_was_given_up_is_left_out(outbox: Outbox) -> None:
    outbox.publisher.begin(1, 10)
    outbox.publisher.begin(2, 10)
    outbox.publisher.add(1, stored(outbox.storage, 10, 1, 2))
    for share in (0, 1):
        outbox.publisher.add(2, stored(outbox.storage, 10, share, 2))
    outbox.publisher.publish(2)
    assert outbox.told.get(timeout=WAIT_S) == Published(2, True)
    assert len(registry.verified(outbox.storage, 10).parts) == 2


def test_old_checkpoints_go(outbox: Outbox) -> None:
    for number, step in enumerate((10, 20, 30), 1):
        assert outbox.save(number, step).ok
    outbox.publisher.close()  # they go after the news
    assert [found.step for found in registry.found(outbox.storage)] == [20, 30]


def test_refusal_of_storage_is_told(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(storage: Storage, manifest: object, **more: object) -> None:
        raise StorageError("the bucket is full")

    monkeypatch.setattr(registry, "publish", refuse)
    assert outbox.save(1, 10) == Published(1, False, "StorageError: the bucket is full")
    assert outbox.publisher.newest == {}


def test_old_checkpoints_that_cannot_be_deleted_are_no_failure(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(storage: Storage, retention: Retention, **more: object) -> None:
        raise StorageError("no right to delete")

    monkeypatch.setattr(registry, "prune", refuse)
    assert outbox.save(1, 10) == Published(1, True)


def test_step_that_is_being_written_is_spared(outbox: Outbox) -> None:
    """A run that went back may save a step below the newest complete one."""
    assert outbox.save(1, 40).ok
    stored(outbox.storage, 10, 0, 2)  # of the next attempt, as long as it is not complete
    outbox.publisher.begin(2, 10)
    for share in (0, 1):
        outbox.publisher.add(2, stored(outbox.storage, 10, share, 2))
    outbox.publisher.publish(2)
    assert outbox.told.get(timeout=WAIT_S) == Published(2, True)
    outbox.publisher.close()
    assert [found.state for found in registry.found(outbox.storage)] == ["complete", "complete"]


def test_manifest_has_the_epoch_of_its_owner(folder_url: str) -> None:
    outbox = Outbox(Storage.open(folder_url), owner_epoch=3)
    assert outbox.save(1, 10).ok
    outbox.publisher.close()
    assert registry.verified(outbox.storage, 10).owner_epoch == 3


def test_superseded_owner_publishes_and_deletes_nothing(folder_url: str) -> None:
    superseded = False

    def check() -> None:
        if superseded:
            raise SupersededError("run r was taken over by owner 2")

    outbox = Outbox(Storage.open(folder_url), keep=1, owner_epoch=1, check=check)
    assert outbox.save(1, 10).ok
    superseded = True
    assert outbox.save(2, 20) == Published(2, False, "SupersededError: run r was taken over by owner 2")
    outbox.publisher.close()
    assert [(found.step, found.state) for found in registry.found(outbox.storage)] == [
        (10, "complete"),
        (20, "unfinished"),
    ]


def test_owner_that_is_superseded_once_it_has_published_deletes_nothing(folder_url: str) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first two are those of the two manifests
            raise SupersededError("run r was taken over by owner 2")

    outbox = Outbox(Storage.open(folder_url), keep=1, owner_epoch=1, check=check)
    assert outbox.save(1, 10).ok
    assert outbox.save(2, 20).ok
    outbox.publisher.close()
    assert [found.step for found in registry.found(outbox.storage)] == [10, 20]
