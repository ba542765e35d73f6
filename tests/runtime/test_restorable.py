"""The search for a checkpoint that can be restored always answers: the run waits for it."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import torch

from elastic_lm.checkpoint import store
from elastic_lm.errors import StorageError, SupersededError
from elastic_lm.runtime.restorable import RestorableSearch
from elastic_lm.storage import Storage

LIMIT_S = 20.0


def search(storage: Storage, check: Callable[[], None] = lambda: None, timeout_s: float = LIMIT_S) -> tuple[Any, ...]:
    """What it answers."""
    told: queue.Queue[tuple[Any, ...]] = queue.Queue()
    RestorableSearch(
        storage, timeout_s, check, lambda *found: told.put(found), lambda *failed: told.put(failed)
    ).begin()
    return told.get(timeout=LIMIT_S)


def save(storage: Storage, step: int) -> None:
    store.save(storage, step, {"parameters/w": torch.full((3,), float(step))}, {})


def test_newest_whole_one_is_found_and_the_damaged_one_named(folder_url: str) -> None:
    storage = Storage.open(folder_url)
    save(storage, 1)
    save(storage, 2)
    (part,) = [name for name in storage.list("checkpoints/step-00000002/") if name.endswith(".safetensors")]
    storage.write(part, storage.read(part)[:-1] + b"?")
    newest, skipped = search(storage)
    assert newest.step == 1
    assert len(skipped) == 1 and "is damaged" in skipped[0]


def test_nothing_whole_is_an_answer(folder_url: str) -> None:
    assert search(Storage.open(folder_url)) == (None, [])


def test_storage_that_stays_away_ends_the_wait(folder_url: str) -> None:
    def away() -> None:
        raise StorageError("503 for ever")

    verdict, reason = search(Storage.open(folder_url), away, timeout_s=0.2)
    assert verdict == "unavailable" and "503 for ever" in reason


def test_bug_is_an_answer_too(folder_url: str) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    assert search(Storage.open(folder_url), broken) == ("failed", "a bug")


def test_owner_that_was_superseded_touches_nothing_and_says_nothing(folder_url: str) -> None:
    """The coordinator hears of it by itself."""
    storage, asked = Storage.open(folder_url), queue.Queue[bool]()
    save(storage, 2)
    (part,) = [name for name in storage.list("checkpoints/step-00000002/") if name.endswith(".safetensors")]
    storage.write(part, b"damaged")
    before = storage.list()

    def superseded() -> None:
        asked.put(True)
        raise SupersededError("by owner 2")

    told: list[Any] = []
    found = RestorableSearch(
        storage, LIMIT_S, superseded, lambda *_: told.append("found"), lambda *_: told.append("no")
    )
    found.begin()
    assert asked.get(timeout=LIMIT_S)
    assert storage.list() == before and told == []
