"""Forks: the same bits where nothing is changed, exactly the batches that are left out, and what is told of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError, ConfigError, UnfitError
from elastic_lm.events.log import read
from elastic_lm.experiment import changes
from elastic_lm.experiment.fork import Draft, Request, fork
from elastic_lm.experiment.rewinds import Rewind, Rewinds, decide
from elastic_lm.experiment.skip import Skip
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from tests.experiment.conftest import AT, STEPS
from tests.experiment.parents import address_of, batches, forget, forked, step_fields, trained
from tests.solo import Solo, solo_config

# -- the state and what follows from it --------------------------------------------------------------------------------


def test_fork_that_changes_nothing_comes_to_the_same_bits(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    result = Solo(made.config).train()
    whole = Run.open(parent).result
    assert whole is not None and whole.digest
    assert result.digest == whole.digest
    mine, theirs = step_fields(made.config), step_fields(parent)
    assert mine == {step: theirs[step] for step in range(AT, STEPS)}


def test_fork_is_made_from_python(parent: RunConfig) -> None:
    child = Run.open(parent).fork("child", step=AT, overrides=["optimizer.learning_rate=1e-3"], skip=[(5, 7)])
    assert (child.name, child.config.optimizer.learning_rate, child.config.training.skip) == ("child", 1e-3, ((5, 7),))
    trained(child.config)
    assert list(batches(child.config)) == [4, 5, 6, 7, 8, 9]
    with pytest.raises(ConfigError, match="holds a run already"):
        Run.open(parent).fork("child")


def test_fork_begins_with_its_parents_newest_checkpoint(parent: RunConfig) -> None:
    made = forked(parent, overrides=["training.steps=12", "schedule.total_steps=10"])
    assert made.lineage.parent.step == STEPS
    assert sorted(made.config.training) == sorted(parent.replace("training.steps=12").training)
    Solo(made.config).train()
    assert sorted(step_fields(made.config)) == [10, 11]


def test_change_takes_effect_from_the_fork_on(parent: RunConfig) -> None:
    made = forked(parent, step=AT, overrides=["optimizer.learning_rate=1e-3", "checkpoint.keep=7"])
    assert [str(change) for change in made.lineage.changes] == [
        "optimizer.learning_rate: 0.0003 -> 0.001", "checkpoint.keep: 2 -> 7",
    ]  # fmt: skip
    assert [change.identity for change in made.lineage.changes] == [True, False]
    Solo(made.config).train()
    mine, theirs = step_fields(made.config), step_fields(parent)
    assert mine[AT]["loss"] == theirs[AT]["loss"]  # of the same state
    assert mine[AT]["learning_rate"] == pytest.approx(theirs[AT]["learning_rate"] * 10 / 3)
    assert mine[AT + 1]["loss"] != theirs[AT + 1]["loss"]


@pytest.mark.parametrize("kept", ["model.dropout=0.1", "model.max_tokens=64", "objective.z_loss=1e-4", "reduction.kind=fast",
                                  "optimizer.betas=[0.9, 0.99]", "training.precision=bf16"])  # fmt: skip
def test_state_takes_what_keeps_its_shape(kept: str, parent: RunConfig) -> None:
    made = forked(parent, step=AT, overrides=[kept])
    assert Solo(made.config).train().last_step == STEPS


@pytest.mark.s3
def test_fork_goes_from_a_folder_to_object_storage_and_back(parent: RunConfig, s3_url: str) -> None:
    away = forked(parent, "away", step=AT, storage=f"{s3_url}/experiments")
    assert away.url == f"{s3_url}/experiments/runs/away"
    trained(away.config, 6)
    back = forked(away.config, "back", step=6, storage=parent.storage)
    whole = Run.open(parent).result
    assert whole is not None
    assert Solo(back.config).train().digest == whole.digest


# -- batches that are left out -----------------------------------------------------------------------------------------


def test_batches_that_are_left_out_are_the_ones_that_are_missing(parent: RunConfig, small_corpus: str) -> None:
    made = forked(parent, step=AT, skip=((5, 7), (9, 10)))
    result = Solo(made.config).train()
    assert batches(parent) == {step: step for step in range(STEPS)}
    assert list(batches(made.config).items()) == [(4, 4), (5, 7), (6, 8), (7, 10), (8, 11), (9, 12)]
    # It is the run that had left them out from its beginning.
    fresh = solo_config(small_corpus, parent.storage, "fresh", steps=STEPS).replace("training.skip=[[5, 7], [9, 10]]")
    assert trained(fresh).digest == result.digest
    assert {**step_fields(fresh)} | step_fields(made.config) == step_fields(fresh)


def test_ranges_are_left_out_beside_the_parents_own(parent: RunConfig) -> None:
    first = forked(parent, "first", step=AT, skip=((5, 7),))
    trained(first.config, 6)  # on batches 4 and 7
    second = forked(first.config, "second", step=6, skip=((8, 9), (9, 10)))
    assert second.config.training.skip == ((5, 7), (8, 10))
    trained(second.config)
    assert list(batches(second.config).items()) == [(6, 10), (7, 11), (8, 12), (9, 13)]
    with pytest.raises(
        ConfigError, match=r"--skip 7:9 begins before batch 8, the first that the fork trains, in step 6"
    ):
        forked(first.config, "third", step=6, skip=((7, 9),))
    assert forked(first.config, "same", step=6, skip=((5, 7),)).lineage.changes == ()  # they are left out already


@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        ([(3, 5)], ((2, 6), (12, 14))),  # all of it is left out
        ([(2, 6)], ((2, 6), (12, 14))),
        ([(11, 13)], ((2, 6), (11, 14))),
        ([(10, 16), (3, 4)], ((2, 6), (10, 16))),
        ([(4, 12)], 6),  # the first batch of it that is trained
        ([(1, 3)], 1),
        ([(2, 7)], 6),
        ([(3, 4), (9, 10)], 9),
    ],
)
def test_batches_that_are_left_out_already_may_be_named_again(
    skip: list[tuple[int, int]], left_out: Skip | int, small_corpus: str
) -> None:
    """Of a run that has trained batches 0, 1, 6, 7, 8 and 9 in its six steps."""
    config = solo_config(small_corpus, "file:///nowhere", steps=STEPS).replace("training.skip=[[2, 6], [12, 14]]")
    if not isinstance(left_out, int):
        assert changes.leaving_out_more(config, tuple(skip), 6).training.skip == left_out
        return
    with pytest.raises(UnfitError, match=rf"begins before batch 10, .*: batch {left_out} is in the state"):
        changes.leaving_out_more(config, tuple(skip), 6)


def test_last_batch_may_be_left_out_and_the_one_that_takes_its_place(parent: RunConfig) -> None:
    made = forked(parent, "last", step=AT, skip=((9, 10), (10, 11)))
    trained(made.config)
    assert list(batches(made.config).items())[-1] == (9, 11)
    assert forked(parent, "both", step=AT, overrides=["training.skip=[[10, 12]]"], skip=((9, 10),)).lineage.skip


def test_batches_that_the_parent_never_came_to_stay_left_out(small_corpus: str) -> None:
    """Those that it names for steps beyond its own are no mistake of who forks it."""
    config = solo_config(small_corpus, "file:///nowhere", steps=STEPS).replace("training.skip=[[20, 30]]")
    after = changes.leaving_out_more(config, ((5, 6),), AT)
    changes.check_reach(config, after, ((5, 6),))
    with pytest.raises(UnfitError, match="--skip 40:50 begins behind batch 10"):
        changes.check_reach(config, changes.leaving_out_more(after, ((40, 50),), AT), ((40, 50),))


def test_order_before_the_fork_cannot_be_rewritten(parent: RunConfig) -> None:
    first = forked(parent, "first", step=AT, overrides=["training.skip=[[4, 6]]"])
    trained(first.config, 6)  # on batches 6 and 7
    for skip in ("[]", "[[3, 6]]", "[[4, 7]]", "[[4, 6], [7, 8]]"):
        with pytest.raises(ConfigError, match=r"does not agree with what the 6 steps .* have trained; below batch 8"):
            forked(first.config, "no", step=6, overrides=[f"training.skip={skip}"])
    made = forked(first.config, "yes", step=6, overrides=["training.skip=[[4, 5], [5, 6], [8, 9]]"])
    trained(made.config)
    assert list(batches(made.config).items()) == [(6, 9), (7, 10), (8, 11), (9, 12)]


def test_batches_that_the_parent_was_to_leave_out_can_be_trained(parent: RunConfig) -> None:
    first = forked(parent, "first", step=AT, skip=((4, 6),))
    made = forked(first.config, "second", step=AT, overrides=["training.skip=[]"])
    trained(made.config)
    assert list(batches(made.config).items()) == [(step, step) for step in range(AT, STEPS)]


# -- a parent that trains ----------------------------------------------------------------------------------------------


def test_checkpoint_that_is_deleted_meanwhile_is_replaced_by_the_newest_then(parent: RunConfig) -> None:
    drafts: list[int] = []

    def on_draft(draft: Draft) -> None:
        drafts.append(draft.origin.step)
        if draft.origin.step == STEPS:
            forget(parent, STEPS)

    made = fork(
        Request(address_of(parent), "new", overrides=["training.steps=20", "schedule.total_steps=10"]), on_draft
    )
    assert drafts == [STEPS, AT]
    assert made.lineage.parent.step == AT
    assert not [path for path in Storage.open(made.url).list() if folder_of(STEPS) in path]


def test_step_that_is_deleted_meanwhile_is_told_with_the_nearest(parent: RunConfig) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 4; the only one is of step 10"):
        fork(Request(address_of(parent), "new", AT), lambda draft: forget(parent, AT))


# -- what is told ------------------------------------------------------------------------------------------------------


def test_log_of_a_fork_says_that_it_begins_later(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    trained(made.config)
    messages = [event.message for event in read(Storage.open(made.url).child("events"))]
    assert any(f"begins at step {AT}" in message for message in messages)
    assert not any("missing" in message for message in messages)


@pytest.mark.parametrize(("policy", "is_told"), [
    ("spikes.policy=ignore", False), ("spikes.policy=stop", True), ("spikes.policy=rewind", True),
    ("training.on_nonfinite=rewind", True), ("training.on_nonfinite=skip", False),
])  # fmt: skip
def test_fork_says_where_it_may_not_do_about_a_spike_what_its_parent_does(
    policy: str, is_told: bool, parent: RunConfig
) -> None:
    draft = Draft.of(Request(address_of(parent), "new", AT, overrides=["checkpoint.every_steps=5", policy]), AT)
    assert ("it does not go back behind step 4" in (draft.note or "")) == is_told


def test_rewind_that_the_parent_decides_meanwhile_leaves_out_nothing_that_the_state_has_trained(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there behind the first look at what the run went back from."""
    listed = Storage.list

    def decide_behind(storage: Storage, prefix: str = "") -> list[str]:
        names = listed(storage, prefix)
        if prefix == "rewinds/" and not names and storage.url == parent.run_url:
            decide(storage, Rewind(1, "loss", "a spike", AT, AT, 3, (), ((3, 5),), "f" * 64))
        return names

    monkeypatch.setattr(Storage, "list", decide_behind)
    made = forked(parent, step=AT)
    assert Rewinds.load(Storage.open(parent.run_url)).made
    assert made.config.training.skip == ()
    assert made.lineage.parent.rewinds == ()
    assert made.lineage.parent.fingerprint == made.lineage.fingerprint


def test_batches_that_are_left_out_of_another_order_are_told(parent: RunConfig) -> None:
    notes: list[str | None] = []
    for number, (overrides, skip) in enumerate(
        [(["training.seed=3"], ((5, 7),)), (["training.seed=3"], ()), ([], ((5, 7),))]
    ):
        request = Request(address_of(parent), f"new-{number}", AT, None, overrides, skip)
        fork(request, lambda draft: notes.append(draft.note))
    both, seed, skipped = notes
    assert both is not None and "training.skip=[[5, 7]] counts batches in that order" in both
    assert seed is not None and "training.skip" not in seed
    assert skipped is None


def test_other_text_of_the_same_vocabulary_goes_on_from_its_step(
    parent: RunConfig, small_corpus: str, tmp_path: Path
) -> None:
    from elastic_lm.data.prepare import PrepareOptions, prepare
    from tests.data.corpora import texts, write_lines

    source = write_lines(tmp_path / "other.jsonl", texts(300, seed=5))
    options = PrepareOptions(tokenizer=f"{small_corpus}/tokenizer.json", block_tokens=257)
    prepare([source], Storage.open(f"{tmp_path}/other"), options)
    drafts: list[Draft] = []
    made = fork(Request(address_of(parent), "other", AT, None, [f"data.tokens={tmp_path}/other"]), drafts.append)
    assert drafts[0].note is not None and "another order (data.manifest" in drafts[0].note
    assert "may be text that the state was trained on" in drafts[0].note
    assert Solo(made.config).train().last_step == STEPS
