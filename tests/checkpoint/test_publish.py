"""Whose manifest counts when two owners of a run, one of them superseded, write a checkpoint of one step."""

from __future__ import annotations

import json

import pytest

from elastic_lm.checkpoint import layout, registry, store
from elastic_lm.checkpoint.layout import Manifest
from elastic_lm.checkpoint.registry import CheckpointInfo
from elastic_lm.errors import CheckpointError, SupersededError
from elastic_lm.storage import Storage
from tests.checkpoint.saved import assert_same, flip, parts_of, state

PATH = f"{layout.folder_of(10)}/{layout.MANIFEST}"


class Check:
    """An owner's look at whether it is the owner: until the call of this number, it is."""

    def __init__(self, superseded_at: int | None = None) -> None:
        self.calls, self._superseded_at = 0, superseded_at

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self._superseded_at:
            raise SupersededError("run r was taken over")


def publish(run: Storage, seed: int, owner_epoch: int, check: Check | None = None) -> CheckpointInfo:
    parts = store.save_share(run, 10, state(seed))
    manifest = Manifest(10, parts, {"by": owner_epoch}, owner_epoch)
    return registry.publish(run, manifest, check=check or Check())


def test_manifest_says_whose_it_is(run: Storage) -> None:
    publish(run, 0, 7)
    assert registry.verified(run, 10).owner_epoch == 7
    assert json.loads(run.read(PATH))["owner_epoch"] == 7


def test_manifest_of_a_time_without_owners_is_read(run: Storage) -> None:
    manifest = Manifest(10, store.save_share(run, 10, state()))
    body = json.loads(manifest.to_json())
    del body["sha256"], body["owner_epoch"]
    old = json.dumps({**body, "sha256": layout.hash_of(body)}).encode()
    assert Manifest.from_json(old) == manifest
    run.write(PATH, old)
    assert registry.newest_complete(run) is not None


def test_superseded_owner_writes_no_manifest(run: Storage) -> None:
    with pytest.raises(SupersededError):
        publish(run, 0, 1, Check(superseded_at=1))
    assert not run.exists(PATH)


@pytest.mark.parametrize(("zombie", "owner"), [(0, 1), (1, 2), (2, 9)])
def test_other_state_of_a_superseded_owner_is_replaced(run: Storage, zombie: int, owner: int) -> None:
    publish(run, 0, zombie)
    check = Check()
    assert publish(run, 1, owner, check).meta == {"by": owner}
    assert check.calls == 2  # again before it is replaced
    assert_same(store.load(run, 10).tensors, state(1))


@pytest.mark.parametrize(("there", "writer"), [(0, 0), (3, 3), (3, 2), (3, 0)])
def test_other_state_of_an_owner_that_is_not_outranked_stays(run: Storage, there: int, writer: int) -> None:
    publish(run, 0, there)
    with pytest.raises(CheckpointError, match="complete already and holds another state"):
        publish(run, 1, writer)
    assert_same(store.load(run, 10).tensors, state(0))


@pytest.mark.parametrize(("there", "writer"), [(1, 2), (2, 2), (2, 1)])
def test_same_state_stays_whoever_wrote_it(run: Storage, there: int, writer: int) -> None:
    publish(run, 0, there)
    assert publish(run, 0, writer).meta == {"by": there}
    assert registry.verified(run, 10).owner_epoch == there


def test_owner_that_is_superseded_while_it_verifies_replaces_nothing(run: Storage) -> None:
    publish(run, 0, 1)
    before = run.read(PATH)
    with pytest.raises(SupersededError):
        publish(run, 1, 2, Check(superseded_at=2))
    assert run.read(PATH) == before


def test_damaged_one_is_replaced_by_whoever_owns_the_run(run: Storage) -> None:
    publish(run, 0, 5)
    flip(run, parts_of(run, 10)[0])
    with pytest.raises(SupersededError):
        publish(run, 1, 2, Check(superseded_at=2))
    assert publish(run, 1, 6).meta == {"by": 6}
