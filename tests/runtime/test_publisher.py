"""A checkpoint is published when all its shares are stored, and what comes of it is told; old ones go."""

from __future__ import annotations

import queue
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_lm.checkpoint import layout, registry, retention, store
from elastic_lm.checkpoint.layout import Part, shares
from elastic_lm.checkpoint.retention import Retention
from elastic_lm.control.events import Published
from elastic_lm.engine.state import digest_of
from elastic_lm.errors import StorageError, SupersededError
from elastic_lm.runtime.publisher import Publisher
from elastic_lm.storage import Storage
from tests.checkpoint.saved import parts_of, state

WAIT_S = 20


class Outbox:
    """A publisher of a run, and what it tells."""

    def __init__(self, storage: Storage, keep: int = 2, **owner: Any) -> None:
        self.told: queue.Queue[Published] = queue.Queue()
        self.storage = storage
        self.publisher = Publisher(storage, Retention(keep), {"fingerprint": "f"}, self.told.put, **owner)

    def save(self, number: int, step: int, num_shares: int = 2, loss: float | None = None) -> Published:
        self.publisher.begin(number, step, loss)
        for share in range(num_shares):
            self.publisher.add(number, stored(self.storage, step, share, num_shares))
        self.publisher.publish(number)
        return self.told.get(timeout=WAIT_S)


STALLED_STEP = 10


class Stalling(Storage):
    """A store that does not answer who creates the manifest of one step, until its gate is opened; it may be full then."""

    def __init__(self, url: str, gate: threading.Event, is_full: threading.Event | None = None) -> None:
        super().__init__(url)
        self.gate, self.is_full = gate, is_full or threading.Event()

    def child(self, path: str) -> Storage:
        return Stalling(super().child(path).url, self.gate, self.is_full)

    def create(self, path: str, data: bytes) -> None:
        if path == layout.MANIFEST and self.url.endswith(layout.folder_of(STALLED_STEP)):
            assert self.gate.wait(10 * WAIT_S)
            if self.is_full.is_set():
                raise StorageError("the bucket is full")
        super().create(path, data)


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


@pytest.mark.parametrize("step", [None, 10, 30])
def test_what_cannot_be_restored_is_nobodys_newest_any_more(step: int | None, outbox: Outbox) -> None:
    """Also where the one that can be is newer: its answer was lost."""
    outbox.save(1, 10)
    outbox.save(2, 20)
    outbox.publisher.go_back(step)
    assert (outbox.publisher.newest_step, outbox.publisher.newest) == (-1, {})
    outbox.save(3, 25)
    assert outbox.publisher.newest_step == 25


def test_newest_that_can_be_restored_stays_the_newest(outbox: Outbox) -> None:
    outbox.save(1, 10)
    before = outbox.publisher.newest
    outbox.publisher.go_back(10)
    assert (outbox.publisher.newest_step, outbox.publisher.newest) == (10, before)


def test_share_of_an_attempt_that_was_given_up_is_left_out(outbox: Outbox) -> None:
    outbox.publisher.begin(1, 10)
    outbox.publisher.begin(2, 10)
    outbox.publisher.add(1, stored(outbox.storage, 10, 1, 2))
    for share in (0, 1):
        outbox.publisher.add(2, stored(outbox.storage, 10, share, 2))
    outbox.publisher.publish(2)
    assert outbox.told.get(timeout=WAIT_S) == Published(2, True)
    assert len(registry.verified(outbox.storage, 10).parts) == 2


def test_loss_goes_into_the_manifest(outbox: Outbox) -> None:
    outbox.save(1, 10, loss=2.5)
    outbox.save(2, 20)
    assert [found.loss for found in registry.found(outbox.storage)] == [2.5, None]
    assert "loss" not in registry.found(outbox.storage)[1].meta


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
    def refuse(storage: Storage, rule: Retention, **more: object) -> None:
        raise StorageError("no right to delete")

    monkeypatch.setattr(retention, "prune", refuse)
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

    def check(step: int | None) -> None:
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

    def check(step: int | None) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # the first two are those of the two manifests
            raise SupersededError("run r was taken over by owner 2")

    outbox = Outbox(Storage.open(folder_url), keep=1, owner_epoch=1, check=check)
    assert outbox.save(1, 10).ok
    assert outbox.save(2, 20).ok
    outbox.publisher.close()
    assert [found.step for found in registry.found(outbox.storage)] == [10, 20]


@pytest.fixture
def stalled(folder_url: str) -> Iterator[Outbox]:
    """Whose store takes no manifest of `STALLED_STEP` until its gate is opened."""
    gate = threading.Event()
    yield Outbox(Stalling(folder_url, gate), keep=1)
    gate.set()


def begin(outbox: Outbox, number: int, step: int) -> None:
    outbox.publisher.begin(number, step)
    outbox.publisher.add(number, stored(outbox.storage, step, 0, 1))
    outbox.publisher.publish(number)


def open_gate(outbox: Outbox) -> None:
    assert isinstance(outbox.storage, Stalling)
    outbox.storage.gate.set()


def test_end_waits_no_longer_than_it_may_for_a_manifest(stalled: Outbox) -> None:
    begin(stalled, 1, STALLED_STEP)
    stalled.publisher.close(limit_s=0.1)
    assert stalled.told.get_nowait() == Published(
        1, False, "its manifest was not stored within 0.1 s of the run's end, and may be stored yet"
    )
    open_gate(stalled)
    stalled.publisher.close()  # waits for the thread
    assert stalled.told.empty()  # what was told is the last word
    assert stalled.publisher.newest == {}


def test_manifest_that_never_ends_keeps_none_of_the_later_ones_back(stalled: Outbox) -> None:
    begin(stalled, 1, STALLED_STEP)
    stalled.publisher.abandon(1)
    begin(stalled, 2, 20)
    assert stalled.told.get(timeout=WAIT_S) == Published(2, True)
    open_gate(stalled)
    assert stalled.told.get(timeout=WAIT_S) == Published(1, True)
    assert stalled.publisher.newest["url"].endswith("step-00000020")


def test_late_manifest_deletes_nothing_that_the_run_may_be_restoring(stalled: Outbox) -> None:
    store.save(Storage.open(stalled.storage.url), 5, state(5), {})
    begin(stalled, 1, STALLED_STEP)
    (thread,) = (thread for thread in threading.enumerate() if thread.name == f"publish-{STALLED_STEP}")
    stalled.publisher.abandon(1)
    stalled.publisher.begin(2, 20)
    open_gate(stalled)
    assert stalled.told.get(timeout=WAIT_S) == Published(1, True)
    thread.join(WAIT_S)
    assert [found.step for found in registry.found(stalled.storage)] == [5, STALLED_STEP]


def join_threads(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(WAIT_S)


def test_parts_stay_as_long_as_their_manifest_may_come(stalled: Outbox) -> None:
    begin(stalled, 1, STALLED_STEP)
    stalled.publisher.abandon(1)
    stalled.publisher.begin(2, 20)
    join_threads("leftovers")
    open_gate(stalled)
    assert stalled.told.get(timeout=WAIT_S) == Published(1, True)
    registry.verified(stalled.storage, STALLED_STEP)


def test_parts_go_when_their_manifest_was_given_up_and_failed(stalled: Outbox) -> None:
    begin(stalled, 1, STALLED_STEP)
    stalled.publisher.abandon(1)
    assert isinstance(stalled.storage, Stalling)
    stalled.storage.is_full.set()
    open_gate(stalled)
    assert not stalled.told.get(timeout=WAIT_S).ok
    join_threads(f"publish-{STALLED_STEP}")
    stalled.publisher.begin(2, 20)
    await_no_parts(stalled.storage, STALLED_STEP)


def test_stalled_store_keeps_no_process_from_ending(tmp_path: Path) -> None:
    """At the interpreter's exit every thread that is no daemon is waited for."""
    script = textwrap.dedent(f"""
        import threading
        from elastic_lm.checkpoint.retention import Retention
        from elastic_lm.runtime.publisher import Publisher
        from tests.runtime.test_publisher import Stalling

        publisher = Publisher(Stalling({str(tmp_path)!r}, threading.Event()), Retention(1), {{}}, print)
        publisher.begin(1, {STALLED_STEP})
        publisher.publish(1)
        publisher.close(limit_s=0.1)
    """)
    ended = subprocess.run([sys.executable, "-c", script], timeout=2 * WAIT_S, capture_output=True, text=True)
    assert ended.returncode == 0
    assert "Published(number=1, ok=False" in ended.stdout


def await_no_parts(storage: Storage, step: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while parts_of(storage, step):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_parts_of_a_given_up_attempt_go_when_the_next_one_begins(outbox: Outbox) -> None:
    outbox.publisher.begin(1, 10)
    stored(outbox.storage, 10, 0, 2)
    outbox.publisher.abandon(1)
    outbox.publisher.begin(2, 20)
    await_no_parts(outbox.storage, 10)


def test_parts_of_a_given_up_attempt_stay_while_their_step_is_written_again(outbox: Outbox) -> None:
    outbox.publisher.begin(1, 10)
    of_three = stored(outbox.storage, 10, 0, 3)
    outbox.publisher.abandon(1)
    assert outbox.save(2, 10, num_shares=1).ok
    outbox.publisher.close()  # they go after the news
    assert of_three[0].name not in outbox.storage.child(layout.folder_of(10)).list()
    registry.verified(outbox.storage, 10)


def test_parts_that_a_manifest_names_outlive_an_attempt_that_was_given_up_too_soon(outbox: Outbox) -> None:
    assert outbox.save(1, 10).ok
    outbox.publisher.close()
    outbox.publisher.begin(2, 10)  # a run that went back
    stored(outbox.storage, 10, 0, 2)
    outbox.publisher.abandon(2)
    assert outbox.save(3, 20).ok
    outbox.publisher.close()
    registry.verified(outbox.storage, 10)


def test_leftovers_that_cannot_be_deleted_are_tried_again(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(storage: Storage, step: int) -> None:
        raise StorageError("no right to delete")

    outbox.publisher.begin(1, 20)
    stored(outbox.storage, 20, 0, 2)
    outbox.publisher.abandon(1)
    with monkeypatch.context() as patch:
        patch.setattr(retention, "collect", refuse)
        assert outbox.save(2, 10).ok
        outbox.publisher.close()
        assert parts_of(outbox.storage, 20)
    outbox.publisher.begin(3, 30)
    await_no_parts(outbox.storage, 20)
