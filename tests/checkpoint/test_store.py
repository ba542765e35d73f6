"""Saving and loading: whole or not there, whoever died when."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from elastic_lm.checkpoint import layout, registry, retention, store
from elastic_lm.checkpoint.retention import Retention
from elastic_lm.errors import CheckpointError, CheckpointVersionError
from elastic_lm.storage import Storage
from tests.checkpoint.saved import PART_BYTES, assert_same, flip, parts_of, save, state


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


def test_later_format_is_refused_with_both_versions() -> None:
    later = {"format": layout.FORMAT, "version": 99, "whatever": "else is in it"}
    with pytest.raises(CheckpointVersionError, match=r"version 99.*version 2"):
        layout.Manifest.from_json(json.dumps(later).encode())


def test_manifest_cannot_point_outside_its_folder() -> None:
    evil = layout.Manifest(1, (layout.Part("../../secret", 1, {}),))
    with pytest.raises(CheckpointError, match="not a name of ours"):
        layout.Manifest.from_json(evil.to_json())


def test_damage_found_while_saving_again_is_repaired(run: Storage) -> None:
    save(run, 20)
    flip(run, parts_of(run, 20)[1])
    save(run, 20, seed=0)
    assert_same(store.load(run, 20).tensors, state(0))


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
    assert 1 <= len(parts_of(run, 20)) <= store.AT_ONCE
    assert f"{layout.folder_of(20)}/{layout.MANIFEST}" not in run.list()
    newest = registry.newest_complete(run)
    assert newest is not None
    assert newest.step == 10
    save(run, 20, seed=1)
    assert_same(store.load(run, 20).tensors, state(1))


def test_load_of_a_missing_checkpoint_names_it(run: Storage) -> None:
    with pytest.raises(CheckpointError, match="step-00000007 cannot be used"):
        store.load(run, 7)


@pytest.mark.s3
def test_checkpoint_round_trip_on_s3(s3_url: str) -> None:
    run = Storage.open(f"{s3_url}/runs/r")
    for step in (10, 20):
        save(run, step, seed=step)
    assert_same(store.load(run, 20).tensors, state(20))
    run.delete("checkpoints/step-00000020/manifest.json")
    newest = registry.newest_complete(run)
    assert newest is not None
    assert newest.step == 10
    save(run, 20, seed=20)
    assert retention.prune(run, Retention(1)) == [10]


def test_shares_of_two_members_are_one_checkpoint(run: Storage) -> None:
    tensors = state()
    cut = layout.shares({name: tensor.numel() for name, tensor in tensors.items()}, 2)
    parts = [
        part
        for share, names in enumerate(cut)
        for part in store.save_share(run, 10, {name: tensors[name] for name in names}, share=share)
    ]
    assert registry.newest_complete(run) is None  # not before its manifest is there
    registry.publish(run, layout.Manifest(10, tuple(parts)))
    assert_same(store.load(run, 10).tensors, state())
    save(run, 10)  # the same state by one member alone is no other state
    save_of_other_cut = registry.verified(run, 10)
    assert len(save_of_other_cut.parts) == 2


def test_manifest_is_not_written_without_its_parts(run: Storage) -> None:
    parts = store.save_share(run, 10, state(), part_bytes=PART_BYTES)
    run.delete(missing := parts_of(run, 10)[1])
    with pytest.raises(CheckpointError, match=missing.rpartition("/")[2]):
        registry.publish(run, layout.Manifest(10, parts))
    assert not run.exists(f"{layout.folder_of(10)}/{layout.MANIFEST}")


def test_empty_share_and_empty_tensor_are_stored(run: Storage) -> None:
    assert store.save_share(run, 10, {}) == ()
    store.save(run, 10, {"a": torch.empty(0, 3), "b": torch.tensor(2.0)}, {})
    assert_same(store.load(run, 10).tensors, {"a": torch.empty(0, 3), "b": torch.tensor(2.0)})


def test_load_tells_of_every_part(run: Storage) -> None:
    save(run, 10)
    told: list[str] = []
    store.load(run, 10, on_part=lambda: told.append("a part"))
    assert len(told) == len(parts_of(run, 10)) == 2
