"""Which checkpoints of a run are deleted, and which are not."""

from __future__ import annotations

import pytest

from elastic_lm.checkpoint import layout, registry, retention
from elastic_lm.checkpoint.registry import Found
from elastic_lm.checkpoint.retention import Retention
from elastic_lm.storage import Storage
from tests.checkpoint.saved import change_version, parts_of, save


def test_prune_keeps_the_newest_and_collects_leftovers(run: Storage) -> None:
    run.write("checkpoints/step-00000005/part-00000-0123456789abcdef.safetensors", b"left by a dead writer")
    for step in (10, 20, 30):
        save(run, step)
    run.write("checkpoints/step-00000040/part-00000-0123456789abcdef.safetensors", b"being written")
    assert retention.prune(run, Retention(2)) == [5, 10]
    assert sorted(layout.steps_in(run.list("checkpoints/"))) == [20, 30, 40]
    assert retention.prune(run, Retention(2)) == []


def test_prune_without_a_complete_checkpoint_deletes_nothing(run: Storage) -> None:
    run.write("checkpoints/step-00000005/part-00000-0123456789abcdef.safetensors", b"being written")
    assert retention.prune(run, Retention(1)) == []


def test_milestones_stay_for_good(run: Storage) -> None:
    for step in (10, 20, 30, 40, 50):
        save(run, step)
    assert retention.prune(run, Retention(1, every_steps=20), dry_run=True) == [10, 30]
    assert len(registry.found(run)) == 5
    assert retention.prune(run, Retention(1, every_steps=20)) == [10, 30]
    assert [found.step for found in registry.found(run)] == [20, 40, 50]


def test_damaged_one_is_none_of_those_that_stay(run: Storage) -> None:
    for step in (10, 20, 30):
        save(run, step)
    run.write(f"{layout.folder_of(20)}/{layout.MANIFEST}", b"{}")
    assert retention.prune(run, Retention(2)) == [20]
    assert [found.step for found in registry.found(run)] == [10, 30]


class Counting(Storage):
    """Counts the reads of manifests."""

    num_reads = 0

    def child(self, path: str) -> Storage:
        return Counting(super().child(path).url)

    def read(self, path: str) -> bytes:
        Counting.num_reads += path.endswith(layout.MANIFEST)
        return super().read(path)


def test_manifest_that_was_seen_is_not_read_again(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Milestones stay for good: a long run would read them all after every checkpoint."""
    monkeypatch.setattr(Counting, "num_reads", 0)
    counting = Counting(run.url)
    seen: dict[int, Found] = {}
    for step in range(10, 110, 10):
        save(run, step)
        retention.prune(counting, Retention(1, every_steps=20), seen=seen)
    assert Counting.num_reads == 10
    assert [found.step for found in registry.found(run)] == [20, 40, 60, 80, 100]


def test_manifest_that_was_seen_and_is_gone_counts_for_none(run: Storage) -> None:
    seen: dict[int, Found] = {}
    for step in (10, 20, 30):
        save(run, step)
    retention.prune(run, Retention(3), seen=seen)
    run.delete(f"{layout.folder_of(30)}/{layout.MANIFEST}")
    assert retention.prune(run, Retention(1), seen=seen) == [10]


PART = "part-00000-000-0123456789abcdef.safetensors"


def test_parts_of_given_up_attempts_are_collected(run: Storage) -> None:
    save(run, 10)
    run.write(f"{layout.folder_of(20)}/{PART}", b"of an attempt")
    run.write(f"{layout.folder_of(20)}/notes.txt", b"not ours")
    retention.collect(run, 20)
    assert run.list(layout.folder_of(20)) == [f"{layout.folder_of(20)}/notes.txt"]
    assert registry.newest_complete(run) is not None


def test_collecting_spares_what_a_manifest_names(run: Storage) -> None:
    save(run, 10)
    named = parts_of(run, 10)
    run.write(f"{layout.folder_of(10)}/{PART}", b"of an attempt with another cut")
    retention.collect(run, 10)
    assert parts_of(run, 10) == named
    registry.verified(run, 10)


def test_collecting_leaves_a_damaged_checkpoint_to_people(run: Storage) -> None:
    save(run, 10)
    named = parts_of(run, 10)
    run.write(f"{layout.folder_of(10)}/{layout.MANIFEST}", b"{}")
    retention.collect(run, 10)
    assert registry.newest_complete(run) is None  # and sets it aside
    retention.collect(run, 10)
    assert parts_of(run, 10) == named


def test_checkpoint_of_another_version_stays_and_counts_for_none(run: Storage) -> None:
    for step in (10, 20, 30, 40):
        save(run, step)
    change_version(run, 20, 3)
    everything = run.list(layout.folder_of(20))
    assert retention.prune(run, Retention(2)) == [10]
    retention.collect(run, 20)
    assert run.list(layout.folder_of(20)) == everything
    assert [found.step for found in registry.found(run)] == [20, 30, 40]


LOSSES = {10: 3.0, 20: 2.0, 30: 2.5, 40: None, 50: 2.2, 60: 4.0}  # of 40 nobody knows


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Retention(1, best=0), {60}),
        (Retention(1, best=1), {20, 60}),
        (Retention(2, best=2), {20, 50, 60}),  # one of the best is one of the newest
        (Retention(1, every_steps=30, best=1), {20, 30, 60}),
        (Retention(1, best=100), {10, 20, 30, 50, 60}),
    ],
)
def test_best_are_kept_beside_the_newest_and_the_milestones(rule: Retention, kept: set[int]) -> None:
    assert rule.keeps(LOSSES) == kept


def test_of_equal_losses_the_newer_is_the_better() -> None:
    assert Retention(1, best=1).keeps({10: 2.0, 20: 2.0, 30: 3.0}) == {20, 30}


def test_best_checkpoints_stay_by_the_loss_in_their_manifests(run: Storage) -> None:
    for step, loss in LOSSES.items():
        save(run, step, loss=loss)
    seen: dict[int, Found] = {}
    assert retention.prune(run, Retention(1, best=2), seen=seen) == [10, 30, 40]
    save(run, 70, loss=1.0)
    assert retention.prune(run, Retention(1, best=2), seen=seen) == [50, 60]


@pytest.mark.parametrize("loss", ["2.0", float("nan"), float("inf"), True, [1]])
def test_loss_that_is_no_number_is_none(run: Storage, loss: object) -> None:
    save(run, 10, loss=loss)
    (found,) = registry.found(run)
    assert found.loss is None


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([100, 200, 300, 400], {200, 300, 400}),  # 400 - 150 or earlier, and the next one
        ([200, 250, 251], {200, 250, 251}),  # none is old enough yet: the oldest
        ([100, 240, 250, 251, 252], {100, 240, 252}),  # whatever the others are; and the next one
        ([100, 102, 252], {102, 252}),
        ([300], {300}),
    ],
)
def test_one_to_go_back_to_stays(steps: list[int], kept: set[int]) -> None:
    assert Retention(1, reach_steps=150).keeps(dict.fromkeys(steps)) == kept


@pytest.mark.parametrize("newest", [1, 2, 3])
@pytest.mark.parametrize("every", [10, 20, 50, 100, 300])
def test_one_to_go_back_to_stays_young(every: int, newest: int) -> None:
    """However long the run is, and however few are kept: a rewind costs about as much in its last month as in its first hour."""
    retention, reach = Retention(newest, reach_steps=103), 103
    kept: set[int] = set()
    for step in range(every, 10_000, every):
        kept = retention.keeps(dict.fromkeys({*kept, step}))
        assert len(kept) <= newest + 2
        old_enough = [each for each in kept if each <= step - reach]
        if step >= every + reach:
            assert max(old_enough) > step - 2 * (reach + every)


def test_what_the_run_went_back_from_goes_and_counts_for_nothing(run: Storage) -> None:
    for step in (10, 20, 30):
        save(run, step)
    assert retention.prune(run, Retention(1), wanted=lambda step, meta: step != 30) == [10, 30]
    assert [found.step for found in registry.found(run)] == [20]
