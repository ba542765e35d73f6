"""What a run has of checkpoints: the newest that can be used, and what is passed over and why."""

from __future__ import annotations

import json

import pytest

from elastic_lm.checkpoint import layout, registry, retention, store
from elastic_lm.checkpoint.retention import Retention
from elastic_lm.errors import CheckpointError, CheckpointVersionError, StorageError, SupersededError
from elastic_lm.storage import Storage
from tests.checkpoint.saved import assert_same, change_version, flip, parts_of, save, state


def test_newest_complete_of_an_empty_run_is_none(run: Storage) -> None:
    assert registry.newest_complete(run) is None


def test_newest_complete_is_the_highest_step(run: Storage) -> None:
    for step in (9, 100_000_000, 10):  # by number, not by text
        save(run, step)
    newest = registry.newest_complete(run)
    assert newest is not None
    assert newest.step == 100_000_000


def test_checkpoint_without_manifest_is_passed_over(run: Storage) -> None:
    save(run, 10)
    run.write("checkpoints/step-00000020/part-00000-0123456789abcdef.safetensors", b"")
    run.write("checkpoints/notes.txt", b"not ours")
    told: list[str] = []
    newest = registry.newest_complete(run, on_skipped=told.append)
    assert newest is not None
    assert newest.step == 10
    assert len(told) == 1
    assert "step-00000020: it has no manifest" in told[0]


@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"null", b"[]", b"7", b'{"sha256": "x"}', b"\xff\xfe"],
    ids=["empty", "cut", "null", "list", "number", "other", "not-text"],
)
def test_garbage_manifest_is_passed_over_and_set_aside(run: Storage, garbage: bytes) -> None:
    save(run, 10)
    run.write("checkpoints/step-00000020/manifest.json", garbage)
    told: list[str] = []
    for _ in range(2):
        newest = registry.newest_complete(run, on_skipped=told.append)
        assert newest is not None
        assert newest.step == 10
    assert "manifest" in told[0]
    assert run.read("checkpoints/step-00000020/manifest.damaged.json") == garbage
    assert not run.exists("checkpoints/step-00000020/manifest.json")


@pytest.mark.parametrize("index", [0, 40, -1], ids=["header-size", "header", "tensor"])
def test_flipped_byte_in_a_part_falls_back(run: Storage, index: int) -> None:
    save(run, 10)
    save(run, 20, seed=1)
    damaged = parts_of(run, 20)[1]
    flip(run, damaged, index)
    with pytest.raises(CheckpointError, match=damaged.rpartition("/")[2]):
        store.load(run, 20)
    told: list[str] = []
    newest = registry.newest_complete(run, on_skipped=told.append)
    assert newest is not None
    assert newest.step == 10
    assert "is damaged" in told[0]


def test_flipped_value_in_a_manifest_falls_back(run: Storage) -> None:
    save(run, 10)
    save(run, 20)
    path = "checkpoints/step-00000020/manifest.json"
    body = json.loads(run.read(path))
    body["meta"]["fingerprint"] = "g"
    run.write(path, json.dumps(body).encode())
    with pytest.raises(CheckpointError, match="hash"):
        store.load(run, 20)
    newest = registry.newest_complete(run)
    assert newest is not None
    assert newest.step == 10


def test_missing_or_cut_part_falls_back(run: Storage) -> None:
    for step in (10, 20, 30):
        save(run, step, seed=step)
    run.delete(parts_of(run, 30)[0])
    cut = parts_of(run, 20)[0]
    run.write(cut, run.read(cut)[:-1])
    newest = registry.newest_complete(run)
    assert newest is not None
    assert newest.step == 10


def test_manifest_of_another_step_is_not_believed(run: Storage) -> None:
    save(run, 10)
    for path in run.list("checkpoints/step-00000010"):
        run.write(path.replace("10/", "20/"), run.read(path))
    newest = registry.newest_complete(run)
    assert newest is not None
    assert newest.step == 10


def test_damaged_step_can_be_saved_again(run: Storage) -> None:
    save(run, 10)
    save(run, 20, seed=1)
    flip(run, parts_of(run, 20)[0])
    registry.newest_complete(run)
    save(run, 20, seed=1)
    assert_same(store.load(run, 20).tensors, state(1))
    assert retention.prune(run, Retention(1)) == [10]


def test_prune_looks_before_each_that_it_deletes(run: Storage) -> None:
    for step in (10, 20, 30, 40):
        save(run, step)
    left: list[list[int]] = []

    def check() -> None:
        left.append(sorted(layout.steps_in(run.list("checkpoints/"))))
        if len(left) == 3:
            raise SupersededError("run r was taken over")

    with pytest.raises(SupersededError):
        retention.prune(run, Retention(1), check=check)
    assert left == [[10, 20, 30, 40], [20, 30, 40], [30, 40]]
    assert sorted(layout.steps_in(run.list("checkpoints/"))) == [30, 40]


class _Unreachable(Storage):
    def child(self, path: str) -> Storage:
        return _Unreachable(super().child(path).url)

    def read(self, path: str) -> bytes:
        raise StorageError("503 for ever")


def test_unreachable_storage_is_not_taken_for_damage(run: Storage) -> None:
    save(run, 10)
    with pytest.raises(StorageError, match="503"):
        registry.newest_complete(_Unreachable(run.url))
    assert registry.newest_complete(run) is not None


def test_found_says_of_each_what_it_is_and_why(run: Storage) -> None:
    for step in (10, 20, 30, 40):
        save(run, step)
    run.delete(f"{layout.folder_of(10)}/{layout.MANIFEST}")
    run.write(f"{layout.folder_of(20)}/{layout.MANIFEST}", b"{}")
    run.delete(parts_of(run, 30)[1])
    unfinished, garbage, cut, whole = registry.found(run)
    assert (unfinished.state, garbage.state, cut.state, whole.state) == ("unfinished", "damaged", "damaged", "complete")
    assert "its writer did not finish" in str(unfinished.reason)
    assert "torn or not one" in str(garbage.reason)
    assert "is not there" in str(cut.reason)
    assert whole.size_bytes == sum(run.size(path) for path in parts_of(run, 40))


def test_what_was_set_aside_is_told_as_damaged(run: Storage) -> None:
    save(run, 10)
    flip(run, parts_of(run, 10)[0])
    assert registry.newest_complete(run) is None
    told: list[str] = []
    assert registry.newest_complete(run, on_skipped=told.append) is None
    assert "was found to be damaged before" in told[0]
    (found,) = registry.found(run)
    assert found.state == "damaged"


@pytest.mark.parametrize("version", [1, 3])
def test_checkpoint_of_another_version_is_refused_by_name_and_left_alone(run: Storage, version: int) -> None:
    for step in (10, 20, 30):
        save(run, step)
    path = change_version(run, 20, version)
    there = run.read(path)
    newest = registry.newest_complete(run)
    assert newest is not None and newest.step == 30  # nobody asks for that one
    run.delete(f"{layout.folder_of(30)}/{layout.MANIFEST}")
    for _ in range(2):
        with pytest.raises(CheckpointVersionError) as caught:
            registry.newest_complete(run)
        assert str(caught.value) == (
            f"checkpoint {run.url}/{layout.folder_of(20)} cannot be used: its manifest is of version {version} of the format, "
            "and this program reads version 2; train on with the version of elastic-lm that wrote it, or choose another name "
            "for a new run"
        )
    assert run.read(path) == there


def test_checkpoint_of_another_version_is_told_as_such(run: Storage) -> None:
    save(run, 10)
    change_version(run, 10, 3)
    (found,) = registry.found(run)
    assert (found.state, found.reason) == (
        "other version", "its manifest is of version 3 of the format, and this program reads version 2",
    )  # fmt: skip


def test_checkpoint_of_another_version_is_not_overwritten(run: Storage) -> None:
    save(run, 10)
    there = run.read(change_version(run, 10, 3))
    with pytest.raises(CheckpointError, match="version 3 of the format"):
        save(run, 10, seed=1)
    assert run.read(f"{layout.folder_of(10)}/{layout.MANIFEST}") == there


@pytest.mark.parametrize("version", [None, "3", 2.5, True])
def test_version_that_is_none_is_damage(run: Storage, version: object) -> None:
    save(run, 10)
    change_version(run, 10, version)
    assert registry.newest_complete(run) is None


def test_flipped_version_is_damage(run: Storage) -> None:
    """All else has the hash that it should have: nobody wrote another version."""
    save(run, 10)
    path = f"{layout.folder_of(10)}/{layout.MANIFEST}"
    run.write(path, run.read(path).replace(b'"version": 2', b'"version": 3'))
    assert registry.newest_complete(run) is None


def test_look_that_is_not_thorough_changes_nothing(run: Storage) -> None:
    save(run, 10)
    save(run, 20)
    flip(run, parts_of(run, 20)[0])
    before = run.list()
    found = registry.newest_complete(run, thorough=False)
    assert found is not None and found.step == 20  # its parts were not read
    run.delete(parts_of(run, 20)[0])
    told: list[str] = []
    found = registry.newest_complete(run, thorough=False, on_skipped=told.append)
    assert found is not None and found.step == 10
    assert "is not there" in told[0]
    assert len(run.list()) == len(before) - 1


def test_who_does_not_own_the_run_any_more_sets_nothing_aside(run: Storage) -> None:
    """It was frozen while it read: the manifest that is there by now may be its successor's."""
    save(run, 1)
    save(run, 2)
    flip(run, parts_of(run, 2)[0], -1)
    before = run.list()

    def superseded() -> None:
        raise SupersededError("by owner 2")

    with pytest.raises(SupersededError):
        registry.newest_complete(run, check=superseded)
    assert run.list() == before
    newest = registry.newest_complete(run)
    assert newest is not None and newest.step == 1
