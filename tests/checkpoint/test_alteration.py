"""A checkpoint in another run's folder with some tensors made anew: what stays is copied, what is made fits in few parts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from elastic_lm.checkpoint import registry, store
from elastic_lm.checkpoint.alteration import Recipe, alter_parts
from elastic_lm.checkpoint.layout import Manifest
from elastic_lm.errors import CheckpointError, NotFoundError
from elastic_lm.storage import Storage
from tests.checkpoint.saved import assert_same, flip, parts_of

STEP = 3
PART_BYTES = 400  # a tensor of 100 elements, or two of 50


@pytest.fixture
def target(tmp_path: Path) -> Storage:
    return Storage.open(f"{tmp_path}/target")


def state() -> dict[str, Tensor]:
    """Six tensors in three parts: ab, cd, ef."""
    return {name: torch.full((50,), float(number)) for number, name in enumerate("abcdef")}


def saved(run: Storage) -> Manifest:
    store.save(run, STEP, state(), {}, part_bytes=PART_BYTES)
    return registry.manifest_of(run, STEP)


def doubled(old: Tensor | None) -> Tensor:
    assert old is not None
    return torch.cat((old, 2 * old))


RECIPES = {
    "c": Recipe((100,), "c", doubled),
    "g": Recipe((100,), "a", doubled),  # of a part that stays
    "h": Recipe((3,), None, lambda old: torch.ones(3)),
}


def altered(run: Storage, target: Storage) -> Manifest:
    parts = alter_parts(run, saved(run), target, RECIPES, {"f"}, part_bytes=PART_BYTES)
    return Manifest(STEP, parts)


def test_state_is_the_old_one_with_what_was_made_of_it(run: Storage, target: Storage) -> None:
    registry.publish(target, altered(run, target))
    was = state()
    made = {"c": torch.cat((was["c"], 2 * was["c"])), "g": torch.cat((was["a"], 2 * was["a"])), "h": torch.ones(3)}
    assert_same(store.load(target, STEP).tensors, {**{name: was[name] for name in "abde"}, **made})
    registry.verified(target, STEP)


def test_parts_are_copied_or_cut_to_size(run: Storage, target: Storage) -> None:
    manifest = altered(run, target)
    assert [sorted(part.tensors) for part in manifest.parts] == [["a", "b"], ["c"], ["d"], ["e"], ["g"], ["h"]]
    assert manifest.parts[0] == saved(run).parts[0]
    assert len({part.name for part in manifest.parts}) == 6


def test_parts_of_what_is_added_are_made_beside_each_other(run: Storage, target: Storage) -> None:
    both = threading.Barrier(2)

    def made(old: Tensor | None) -> Tensor:
        both.wait(timeout=30.0)
        return torch.ones(100)

    added = {name: Recipe((100,), None, made) for name in "gh"}
    parts = alter_parts(run, saved(run), target, added, (), part_bytes=PART_BYTES)
    assert [sorted(part.tensors) for part in parts[3:]] == [["g"], ["h"]]
    assert [part.name[:14] for part in parts[3:]] == ["part-00003-000", "part-00003-001"]


def test_part_of_which_nothing_stays_is_none(run: Storage, target: Storage) -> None:
    parts = alter_parts(run, saved(run), target, {}, {"a", "b"}, part_bytes=PART_BYTES)
    assert [sorted(part.tensors) for part in parts] == [["c", "d"], ["e", "f"]]


def test_same_call_comes_to_the_same_parts_and_overwrites_none(run: Storage, target: Storage) -> None:
    first = altered(run, target)
    there = {path: target.read(path) for path in target.list()}
    assert altered(run, target) == first
    assert {path: target.read(path) for path in target.list()} == there


@pytest.mark.parametrize("number", range(3))
def test_damaged_part_is_told_whether_it_is_copied_or_altered(number: int, run: Storage, target: Storage) -> None:
    manifest = saved(run)
    flip(run, parts_of(run, STEP)[number])
    with pytest.raises(CheckpointError, match="is damaged"):
        alter_parts(run, manifest, target, RECIPES, {"f"}, part_bytes=PART_BYTES)


@pytest.mark.parametrize("number", range(3))
def test_part_that_is_gone_is_told_as_such(number: int, run: Storage, target: Storage) -> None:
    manifest = saved(run)
    run.delete(parts_of(run, STEP)[number])
    with pytest.raises(NotFoundError):
        alter_parts(run, manifest, target, RECIPES, {"f"}, part_bytes=PART_BYTES)
