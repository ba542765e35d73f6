"""Checkpoints: whole or not there, whoever died when and whatever lies around."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from elastic_lm.checkpoint import layout, store
from elastic_lm.errors import CheckpointError, StorageError
from elastic_lm.storage import Storage

PART_BYTES = 64  # two of the tensors below


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("parameters/a.weight", "parameters/b.bias", "exp_avg/a.weight", "exp_avg/b.bias")
    return {name: torch.randn(2, 4, generator=generator) for name in names}


@pytest.fixture
def run(folder_url: str) -> Storage:
    return Storage.open(folder_url)


def save(run: Storage, step: int, seed: int = 0) -> store.CheckpointInfo:
    return store.save(run, step, state(seed), {"fingerprint": "f"}, part_bytes=PART_BYTES)


def parts_of(run: Storage, step: int) -> list[str]:
    return [path for path in run.list(layout.folder_of(step)) if path.endswith(".safetensors")]


def flip(run: Storage, path: str, index: int = -1) -> None:
    data = bytearray(run.read(path))
    data[index] ^= 1
    run.write(path, bytes(data))


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_load_returns_what_was_saved(run: Storage) -> None:
    info = save(run, 10)
    assert len(parts_of(run, 10)) == 2
    checkpoint = store.load(run, 10)
    assert_same(checkpoint.tensors, state())
    assert checkpoint.info == info
    assert info.meta == {"fingerprint": "f"}
    assert info.url.endswith("/checkpoints/step-00000010")
    assert info.size_bytes == sum(run.size(path) for path in parts_of(run, 10))


def test_save_takes_views_into_one_buffer(run: Storage) -> None:
    flat = torch.arange(16.0)
    store.save(run, 1, {"a": flat[:8].view(2, 4), "b": flat[8:]}, {})
    assert_same(store.load(run, 1).tensors, {"a": flat[:8].view(2, 4), "b": flat[8:]})


def test_tensor_larger_than_a_part_is_a_part_of_its_own(run: Storage) -> None:
    store.save(run, 1, {"a": torch.ones(100), "b": torch.ones(2)}, {}, part_bytes=PART_BYTES)
    assert len(parts_of(run, 1)) == 2


def test_saving_the_same_state_twice_is_harmless(run: Storage) -> None:
    assert save(run, 10) == save(run, 10)


def test_saving_another_state_over_a_complete_one_is_refused(run: Storage) -> None:
    save(run, 10)
    with pytest.raises(CheckpointError, match="complete already and holds another state"):
        save(run, 10, seed=1)
    assert_same(store.load(run, 10).tensors, state())


def test_newest_complete_of_an_empty_run_is_none(run: Storage) -> None:
    assert store.newest_complete(run) is None


def test_newest_complete_is_the_highest_step(run: Storage) -> None:
    for step in (9, 100_000_000, 10):  # by number, not by text
        save(run, step)
    newest = store.newest_complete(run)
    assert newest is not None
    assert newest.step == 100_000_000


def test_checkpoint_without_manifest_is_passed_over(run: Storage) -> None:
    save(run, 10)
    run.write("checkpoints/step-00000020/part-00000-0123456789abcdef.safetensors", b"")
    run.write("checkpoints/notes.txt", b"not ours")
    told: list[str] = []
    newest = store.newest_complete(run, on_skipped=told.append)
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
        newest = store.newest_complete(run, on_skipped=told.append)
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
    newest = store.newest_complete(run, on_skipped=told.append)
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
    newest = store.newest_complete(run)
    assert newest is not None
    assert newest.step == 10


def test_missing_or_cut_part_falls_back(run: Storage) -> None:
    for step in (10, 20, 30):
        save(run, step, seed=step)
    run.delete(parts_of(run, 30)[0])
    cut = parts_of(run, 20)[0]
    run.write(cut, run.read(cut)[:-1])
    newest = store.newest_complete(run)
    assert newest is not None
    assert newest.step == 10


def test_manifest_of_another_step_is_not_believed(run: Storage) -> None:
    save(run, 10)
    for path in run.list("checkpoints/step-00000010"):
        run.write(path.replace("10/", "20/"), run.read(path))
    newest = store.newest_complete(run)
    assert newest is not None
    assert newest.step == 10


def test_later_format_is_refused_with_both_versions() -> None:
    body = json.loads(layout.Manifest(1, ()).to_json())
    with pytest.raises(CheckpointError, match=r"version 99.*version 1"):
        layout.Manifest.from_json(json.dumps({**body, "version": 99}).encode())


def test_manifest_cannot_point_outside_its_folder() -> None:
    evil = layout.Manifest(1, (layout.Part("../../secret", 1, "0" * 64, ()),))
    with pytest.raises(CheckpointError, match="not a name of ours"):
        layout.Manifest.from_json(evil.to_json())


def test_damaged_step_can_be_saved_again(run: Storage) -> None:
    save(run, 10)
    save(run, 20, seed=1)
    flip(run, parts_of(run, 20)[0])
    store.newest_complete(run)
    save(run, 20, seed=1)
    assert_same(store.load(run, 20).tensors, state(1))
    assert store.prune(run, keep=1) == [10]


def test_damage_found_while_saving_again_is_repaired(run: Storage) -> None:
    save(run, 20)
    flip(run, parts_of(run, 20)[1])
    save(run, 20, seed=0)
    assert_same(store.load(run, 20).tensors, state(0))


def test_prune_keeps_the_newest_and_collects_leftovers(run: Storage) -> None:
    run.write("checkpoints/step-00000005/part-00000-0123456789abcdef.safetensors", b"left by a dead writer")
    for step in (10, 20, 30):
        save(run, step)
    run.write("checkpoints/step-00000040/part-00000-0123456789abcdef.safetensors", b"being written")
    assert store.prune(run, keep=2) == [5, 10]
    assert sorted(layout.steps_in(run.list("checkpoints/"))) == [20, 30, 40]
    assert store.prune(run, keep=2) == []


def test_prune_without_a_complete_checkpoint_deletes_nothing(run: Storage) -> None:
    run.write("checkpoints/step-00000005/part-00000-0123456789abcdef.safetensors", b"being written")
    assert store.prune(run, keep=1) == []


def test_writer_killed_before_the_manifest_leaves_the_previous_checkpoint(run: Storage) -> None:
    save(run, 10)
    script = textwrap.dedent(f"""
        import torch
        from elastic_lm import failpoints
        from elastic_lm.checkpoint import store
        from elastic_lm.storage import Storage
        failpoints.arm(["w0:save@20=kill"], "w0")
        tensors = {{"a": torch.zeros(32), "b": torch.zeros(32)}}
        store.save(Storage.open({run.url!r}), 20, tensors, {{}}, part_bytes={PART_BYTES})
    """)
    assert subprocess.run([sys.executable, "-c", script], timeout=50).returncode == -9
    assert len(parts_of(run, 20)) == 1
    newest = store.newest_complete(run)
    assert newest is not None
    assert newest.step == 10
    save(run, 20, seed=1)
    assert_same(store.load(run, 20).tensors, state(1))


def test_load_of_a_missing_checkpoint_names_it(run: Storage) -> None:
    with pytest.raises(CheckpointError, match="step-00000007 cannot be used"):
        store.load(run, 7)


class _Unreachable(Storage):
    def child(self, path: str) -> Storage:
        return _Unreachable(super().child(path).url)

    def read(self, path: str) -> bytes:
        raise StorageError("503 for ever")


def test_unreachable_storage_is_not_taken_for_damage(run: Storage) -> None:
    save(run, 10)
    with pytest.raises(StorageError, match="503"):
        store.newest_complete(_Unreachable(run.url))
    assert store.newest_complete(run) is not None


@pytest.mark.s3
def test_checkpoint_round_trip_on_s3(s3_url: str) -> None:
    run = Storage.open(f"{s3_url}/runs/r")
    for step in (10, 20):
        save(run, step, seed=step)
    assert_same(store.load(run, 20).tensors, state(20))
    run.delete("checkpoints/step-00000020/manifest.json")
    newest = store.newest_complete(run)
    assert newest is not None
    assert newest.step == 10
    save(run, 20, seed=20)
    assert store.prune(run, keep=1) == [10]
