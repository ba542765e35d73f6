"""Forks: the same bits where nothing is changed, exactly the batches that are left out, and no half of a run whatever happens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.checkpoint import registry, transfer
from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.errors import (
    CheckpointError,
    CheckpointVersionError,
    ConfigError,
    DataError,
    ElasticLMError,
    UnfitError,
)
from elastic_lm.events.log import read
from elastic_lm.experiment import changes
from elastic_lm.experiment.fork import Draft, Request, fork
from elastic_lm.experiment.lineage import Lineage, Parent, Skip, WentBack
from elastic_lm.experiment.rewinds import Rewind, decide, with_skip
from elastic_lm.experiment.spikes import Spike
from elastic_lm.run import Run
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.checkpoint.saved import change_version, flip, parts_of
from tests.experiment.parents import address_of, batches, cut_small, forked, step_fields, trained
from tests.runtime.test_restorable import search
from tests.solo import Solo, solo_config

STEPS, AT = 10, 4


@pytest.fixture(scope="module")
def trained_once(small_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of ten steps, with checkpoints at steps 4 and 10."""
    config = solo_config(small_corpus, f"file://{tmp_path_factory.mktemp('parent')}", "parent", steps=STEPS)
    trained(config, AT)
    cut_small(config, AT)
    return config


@pytest.fixture
def parent(trained_once: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of it that a test may spoil."""
    config = trained_once.replace(f"storage=file://{tmp_path}")
    here, there = Storage.open(trained_once.run_url), Storage.open(config.run_url)
    for path in here.list():
        there.write(path, here.read(path))
    there.write(
        "config.yaml", address_of(config).stored_config().replace(f"storage=file://{tmp_path}").to_yaml().encode()
    )
    return config


def contents(url: str) -> dict[str, bytes]:
    folder = Storage.open(url)
    return {path: folder.read(path) for path in folder.list()}


# -- the state and what follows from it ---------------------------------------------------------------------------------


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
        assert changes.with_skip(config, tuple(skip), 6).training.skip == left_out
        return
    with pytest.raises(UnfitError, match=rf"begins before batch 10, .*: batch {left_out} is in the state"):
        changes.with_skip(config, tuple(skip), 6)


def test_last_batch_may_be_left_out_and_the_one_that_takes_its_place(parent: RunConfig) -> None:
    made = forked(parent, "last", step=AT, skip=((9, 10), (10, 11)))
    trained(made.config)
    assert list(batches(made.config).items())[-1] == (9, 11)
    assert forked(parent, "both", step=AT, overrides=["training.skip=[[10, 12]]"], skip=((9, 10),)).lineage.skip


def test_batches_that_the_parent_never_came_to_stay_left_out(small_corpus: str) -> None:
    """Those that it names for steps beyond its own are no mistake of who forks it."""
    config = solo_config(small_corpus, "file:///nowhere", steps=STEPS).replace("training.skip=[[20, 30]]")
    after = changes.with_skip(config, ((5, 6),), AT)
    changes.check_reach(config, after, ((5, 6),))
    with pytest.raises(UnfitError, match="--skip 40:50 begins behind batch 10"):
        changes.check_reach(config, changes.with_skip(after, ((40, 50),), AT), ((40, 50),))


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


def test_log_of_a_fork_says_that_it_begins_later(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    trained(made.config)
    messages = [event.message for event in read(Storage.open(made.url).child("events"))]
    assert any(f"begins at step {AT}" in message for message in messages)
    assert not any("missing" in message for message in messages)


# -- lineage -----------------------------------------------------------------------------------------------------------


def test_lineage_names_the_state_and_the_ancestors(parent: RunConfig) -> None:
    first = forked(parent, "first", step=AT, overrides=["optimizer.weight_decay=0.2"])
    trained(first.config, 6)
    second = forked(first.config, "second", step=6, skip=((8, 9),))
    lineage = Lineage.load(Storage.open(second.url))
    assert lineage is not None and lineage == second.lineage
    links = [(link.run, link.parent.name, link.parent.step, [str(c) for c in link.changes]) for link in lineage.chain()]
    assert links == [
        ("second", "first", 6, ["training.skip: [] -> [[8, 9]]"]),
        ("first", "parent", AT, ["optimizer.weight_decay: 0.1 -> 0.2"]),
    ]
    assert lineage.skip == ((8, 9),)
    told = {found.step: found.meta for found in registry.found(Storage.open(first.url))}
    assert lineage.parent.digest == told[6]["digest"]
    assert lineage.parent.fingerprint == told[6]["fingerprint"]
    assert lineage.parent.url == first.url


def test_lineage_may_be_as_deep_as_a_plan_is_long() -> None:
    link: Lineage | None = None
    sizes = []
    for number in range(1_000):
        told = Parent(f"file:///runs/r-{number}", f"r-{number}", number, {"state": "a" * 64}, "f" * 64, link)
        link = Lineage(f"r-{number + 1}", told, "f" * 64, skip=((3, 5),))
        sizes.append(len(link.to_json()) if number in (499, 999) else 0)
    assert link is not None and sizes[999] < 2.1 * sizes[499]
    again = Lineage.from_json(link.to_json())
    assert again.to_json() == link.to_json()
    assert [each.run for each in again.chain()] == [f"r-{number}" for number in range(1_000, 0, -1)]


def test_lineage_of_an_earlier_version_is_read() -> None:
    """In which each link held the one before it, and told no rewinds."""
    nested: dict[str, Any] | None = None
    for number in range(3):
        told = {
            "url": "file:///r",
            "name": f"r-{number}",
            "step": number,
            "digest": {},
            "fingerprint": "f",
            "lineage": nested,
        }
        nested = {"run": f"r-{number + 1}", "parent": told, "fingerprint": "f", "changes": [], "skip": [[number, 5]],
                  "time_s": 1.0, "versions": {}, "surgery": None}  # fmt: skip
    found = Lineage.from_json(json.dumps({"format": "elastic-lm lineage", "version": 1, **(nested or {})}).encode())
    assert [(each.run, each.parent.name, each.skip) for each in found.chain()] == [
        ("r-3", "r-2", ((2, 5),)), ("r-2", "r-1", ((1, 5),)), ("r-1", "r-0", ((0, 5),)),
    ]  # fmt: skip
    assert found.parent.rewinds == ()


def test_rewinds_of_the_parent_are_told_and_kept_also_where_the_state_is_older(parent: RunConfig) -> None:
    folder = Storage.open(parent.run_url)
    stored = address_of(parent).stored_config()
    chosen = stored.replace("checkpoint.every_steps=2", "spikes={policy: rewind, rewind_steps: 2, skip_batches: 6}")
    decide(folder, Rewind.of(Spike(8, 10, "loss", "the loss stands out"), chosen, number=1))
    made = forked(parent, step=AT)
    assert made.config.training.skip == ((6, 12),)
    assert made.lineage.parent.rewinds == (WentBack(1, "loss", 6, ((6, 12),)),)
    assert str(made.lineage.parent.rewinds[0]) == "rewind 1: back to step 6, leaving out batches 6:12 (loss)"
    trained(made.config)
    second = forked(made.config, "second", overrides=["training.steps=20"])
    assert [len(link.parent.rewinds) for link in second.lineage.chain()] == [0, 1]  # what its own parent made


@pytest.mark.parametrize(("policy", "is_told"), [
    ("spikes.policy=ignore", False), ("spikes.policy=stop", True), ("spikes.policy=rewind", True),
    ("training.on_nonfinite=rewind", True), ("training.on_nonfinite=skip", False),
])  # fmt: skip
def test_fork_says_where_it_may_not_do_about_a_spike_what_its_parent_does(
    policy: str, is_told: bool, parent: RunConfig
) -> None:
    draft = Draft.of(Request(address_of(parent), "new", AT, overrides=["checkpoint.every_steps=5", policy]), AT)
    assert ("it does not go back behind step 4" in (draft.note or "")) == is_told


def test_manifest_of_the_fork_is_of_its_own_identity(parent: RunConfig) -> None:
    made = forked(parent, step=AT, overrides=["training.seed=7"])
    (found,) = registry.found(Storage.open(made.url))
    assert (
        found.meta["fingerprint"]
        == made.config.identity_fingerprint()
        != address_of(parent).stored_config().identity_fingerprint()
    )
    assert RunConfig(**found.meta["config"]) == made.config == address_of(made.config).stored_config()


def test_damaged_lineage_is_told(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    Storage.open(made.url).write("lineage.json", b"{}")
    with pytest.raises(CheckpointError, match=r"lineage\.json cannot be read"):
        forked(made.config, "second")


# -- a beginning that is lost ------------------------------------------------------------------------------------------


def test_fork_whose_state_is_lost_does_not_begin_anew(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    folder = Storage.open(made.url)
    folder.delete(parts_of(folder, AT)[0])
    told = rf"is a fork of parent at step {AT}, and no checkpoint can be used: .* fork again: elastic-lm fork .*runs/parent@{AT} "
    with pytest.raises(
        CheckpointError, match=rf"{told}--name new, .*after deleting {folder.url}\. Passing over .* is not there"
    ):
        make_plan(made.config)
    forget(made.config, AT)
    with pytest.raises(CheckpointError, match=told):
        make_plan(made.config)
    folder.write("lineage.json", b"{}")
    with pytest.raises(CheckpointError, match=r"lineage\.json cannot be read"):
        make_plan(made.config)


def test_fork_does_not_go_on_from_a_state_that_is_older_than_its_parents(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    folder, kept = Storage.open(made.url), contents(made.url)
    for path in folder.list():
        folder.delete(path)
    trained_anew = Solo(made.config)
    trained_anew.train(until=2)
    folder.write("lineage.json", kept["lineage.json"])
    with pytest.raises(CheckpointError, match=r"the newest checkpoint is of step 2"):
        make_plan(made.config)


def test_fork_that_has_trained_needs_its_beginning_no_more(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    trained(made.config, 6)
    forget(made.config, AT)
    assert make_plan(made.config).resume_step == STEPS
    Storage.open(made.url).write("lineage.json", b"{}")
    assert make_plan(made.config).resume_step == STEPS


def test_search_for_a_state_ends_where_a_fork_has_none(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    folder = Storage.open(made.url)
    flip(folder, parts_of(folder, AT)[1])
    assert make_plan(made.config).resume_step == AT  # which reads no parts
    verdict, error = search(folder)
    assert verdict == "failed"
    assert f"is a fork of parent at step {AT}, and no checkpoint can be used" in error and "is damaged" in error


# -- what is refused, before anything is written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"overrides": ["model.width=32"]}, r"cannot take model\.width: 16 -> 32: .* \[48, 16\] is stored, and \[96, 32\]"),
        ({"overrides": ["model.num_layers=2", "optimizer.kind=muon"]}, r"optimizer\.kind.*exp_avg_sq/.* none is wanted"),
        ({"overrides": ["model.num_layers=2", "training.precision=fp16"]}, r"num_layers.*loss_scale none is stored"),
        ({"overrides": ["model.activation=gelu"]}, r"cannot take model\.activation: 'swiglu' -> 'gelu': blocks\.0\.feed_forward"),
        ({"overrides": ["optimizer.kind=muon"]}, r"optimizer\.kind.*exp_avg_sq/.* none is wanted"),
        ({"overrides": ["training.precision=fp16"]}, r"loss_scale none is stored"),
        ({"overrides": ["model.vocab_size=512"]}, r"model\.vocab_size: 300 -> 512: .*embedding"),
        ({"overrides": ["model.num_heads=2"]}, r"model\.num_heads: 1 -> 2: .* would mean something else"),
        ({"overrides": ["model.norm=layernorm"]}, r"model\.norm: 'rmsnorm' -> 'layernorm': .* would mean something else"),
        ({"overrides": ["model.norm=layernorm", "model.bias=true"]}, r"cannot take model\.norm: .* would mean something else"),
        ({"overrides": ["model.init=hf:/nowhere", "model.init_hash=" + "f" * 64]}, "begins from its parent's state"),
        ({"overrides": ["optimizer.lr=1"]}, r"optimizer\.lr is not a field"),
        ({"overrides": ["name=other"]}, "--name and --storage"),
        ({"overrides": ["training.steps=4"]}, "nothing would be trained"),
        ({"overrides": ["batch.micro_batches=0"]}, r"micro_batches=0"),
        ({"skip": ((3, 6),)}, r"--skip 3:6 begins before batch 4"),
        ({"skip": ((6, 6),)}, "--skip 6:6 is no range"),
        ({"skip": ((1000, 1010),)}, "--skip 1000:1010 begins behind batch 9, the last that is trained, in step 9"),
        ({"skip": ((10, 11),)}, "--skip 10:11 begins behind batch 9"),
        ({"skip": ((5, 7), (12, 13))}, "--skip 12:13 begins behind batch 11"),  # skipping moves the last one
        ({"overrides": ["training.skip=[[5, 7], [100, 200]]"]}, r"training\.skip=\[\.\.\., \[100, 200\], .* behind batch 11"),
        ({"step": 5}, "no checkpoint of step 5; the nearest are 4 and 10"),
        ({"step": 3}, "no checkpoint of step 3; the nearest are 4 and 10$"),
        ({"step": 10}, "10 steps and training.steps=10.*add steps"),
        ({"name": "parent"}, "holds a run already; choose another --name"),
        ({"name": "no/name"}, "name='no/name'"),
        ({"name": ""}, "name='' is no run's name; choose"),  # the folder of all runs
        ({"name": "parent/events"}, "name='parent/events' is no run's name; choose"),
        ({"storage": "gs://bucket"}, "gs://"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(request_: dict[str, Any], reason: str, parent: RunConfig) -> None:
    before = contents(parent.storage)
    with pytest.raises(ElasticLMError, match=reason):
        forked(parent, **{"step": AT, "name": "new", **request_})
    assert contents(parent.storage) == before


def test_parent_without_a_checkpoint_is_told_when_it_gets_one(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}")
    with pytest.raises(ConfigError, match="there is no run at"):
        forked(config)
    Solo(config).die()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint yet; it gets one every checkpoint\.every_steps"):
        forked(config)
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        forked(config, step=3)


def test_checkpoint_of_another_version_is_refused_by_name(parent: RunConfig) -> None:
    change_version(Storage.open(parent.run_url), STEPS, 3)
    for step in (None, STEPS):
        with pytest.raises(CheckpointVersionError, match="version 3 of the format.*fork with the version"):
            forked(parent, step=step)
    assert forked(parent, step=AT).lineage.parent.step == AT


def test_checkpoint_that_is_damaged_makes_no_run(parent: RunConfig) -> None:
    folder = Storage.open(parent.run_url)
    flip(folder, parts_of(folder, AT)[1])
    told = rf"checkpoint {folder.url}/{folder_of(AT)} of run parent cannot be forked: part .* is damaged: .*; fork another step"
    with pytest.raises(CheckpointError, match=rf"{told}: RUN@STEP \(there is {STEPS}\)"):
        forked(parent, step=AT)
    with pytest.raises(ElasticLMError):
        _ = Run.open(f"{parent.storage}/runs/new").address.config()
    folder.delete(f"{folder_of(STEPS)}/manifest.json")
    with pytest.raises(CheckpointError, match="unfinished"):
        forked(parent, step=STEPS)


def test_corpus_of_another_vocabulary_is_refused_and_a_moved_one_is_none(
    parent: RunConfig, small_corpus: str, tmp_path: Path
) -> None:
    tokens = Storage.open(small_corpus)
    moved = Storage.open(f"{tmp_path}/moved")
    for path in tokens.list():
        moved.write(path, tokens.read(path))
    made = forked(parent, "moved", step=AT, overrides=[f"data.tokens={moved.url}"])
    assert [change.name for change in made.lineage.changes] == ["data.tokens"]
    other = json.loads(moved.read("manifest.json"))
    moved.write("manifest.json", json.dumps({**other, "tokenizer_hash": "f" * 64}).encode())
    with pytest.raises(ConfigError, match="was made with another tokenizer"):
        forked(parent, "other", step=AT, overrides=[f"data.tokens={moved.url}"])


def copied(corpus: str, tmp_path: Path) -> Storage:
    """The same corpus at a place of its own."""
    tokens, place = Storage.open(corpus), Storage.open(f"file://{tmp_path}/tokens")
    for path in tokens.list():
        place.write(path, tokens.read(path))
    return place


def test_corpus_that_is_not_there_any_more_is_told_before_anything_is_written(
    small_corpus: str, tmp_path: Path
) -> None:
    place = copied(small_corpus, tmp_path)
    parent = solo_config(place.url, f"file://{tmp_path}", "parent", steps=STEPS)
    trained(parent, AT)
    manifest = json.loads(place.read("manifest.json"))
    before = contents(f"{tmp_path}/runs")
    place.write("manifest.json", json.dumps({**manifest, "counts": {}}).encode())
    remedy = "; or fork to where the corpus is now: --set data.tokens=URL"
    with pytest.raises(ConfigError, match=f"is not the corpus at data.tokens=.*{remedy}"):
        forked(parent, step=AT)
    place.delete("manifest.json")
    with pytest.raises(DataError, match=rf"there is no manifest\.json in {place.url}.*{remedy}"):
        forked(parent, step=AT)
    assert contents(f"{tmp_path}/runs") == before
    assert forked(parent, step=AT, overrides=[f"data.tokens={small_corpus}"]).config.data.tokens == small_corpus


def test_place_of_the_first_weights_is_not_changed_either(parent: RunConfig) -> None:
    """The hash is the same, and so is the run's identity."""
    begun = address_of(parent).stored_config().replace("model.init=hf:/there", f"model.init_hash={'f' * 64}")
    changed = changes.changed(begun, ["model.init=hf:/elsewhere"], name="new", storage=parent.storage)
    found = changes.changes(begun, changed)
    assert [(change.name, change.identity) for change in found] == [("model.init", False)]
    with pytest.raises(
        ConfigError, match=r"model\.init: 'hf:.*/there' -> 'hf:.*/elsewhere': a fork begins from its parent's"
    ):
        changes.check_beginning(found)


def test_corpus_that_took_the_place_of_the_parents_is_not_compared_with_itself(
    small_corpus: str, tmp_path: Path
) -> None:
    place = copied(small_corpus, tmp_path)
    parent = solo_config(place.url, f"file://{tmp_path}", "parent", steps=STEPS)
    trained(parent, AT)
    kept = Manifest.load(place).hash
    with pytest.raises(ConfigError, match="is not the corpus at data.tokens"):
        forked(parent, step=AT, overrides=["data.manifest=" + "f" * 64])
    other = json.loads(place.read("manifest.json"))
    place.write("manifest.json", json.dumps({**other, "tokenizer_hash": "f" * 64}).encode())
    told = f"it cannot be known whether .*is not the parent's any more: .*the parent's has {kept}"
    for overrides in (["data.manifest=null"], [f"data.manifest={Manifest.load(place).hash}"]):
        with pytest.raises(ConfigError, match=told):
            forked(parent, step=AT, overrides=overrides)
    # The parent's, where it is now.
    assert forked(parent, step=AT, overrides=[f"data.tokens={small_corpus}"]).config.data.manifest == kept


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


def test_run_that_was_moved_says_where_its_fork_goes(parent: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "runs/parent").rename(tmp_path / "elsewhere")
    address = Run.open(tmp_path / "elsewhere").address
    with pytest.raises(ConfigError, match="say --storage URL"):
        fork(Request(address, "new", AT))
    assert fork(Request(address, "new", AT, str(tmp_path))).url == f"file://{tmp_path}/runs/new"


@pytest.mark.s3
def test_place_and_what_it_needs_are_changed_at_once(parent: RunConfig, tmp_path: Path, s3_url: str) -> None:
    """A run in object storage says where its trackers write files."""
    files = address_of(parent).stored_config().replace("tracking.tensorboard=true")
    Storage.open(parent.run_url).write("config.yaml", files.to_yaml().encode())
    with pytest.raises(ConfigError, match=r"set tracking\.folder"):
        forked(parent, step=AT, storage=s3_url)
    made = forked(parent, step=AT, storage=s3_url, overrides=[f"tracking.folder={tmp_path}/files"])
    assert made.config.tracking.folder == f"{tmp_path}/files"


# -- a parent that trains ----------------------------------------------------------------------------------------------


def forget(config: RunConfig, step: int) -> None:
    """As its owner does."""
    folder = Storage.open(config.run_url)
    for path in sorted(folder.list(folder_of(step)), key=lambda path: not path.endswith("manifest.json")):
        folder.delete(path)


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


@pytest.mark.s3
def test_fork_goes_from_a_folder_to_object_storage_and_back(parent: RunConfig, s3_url: str) -> None:
    away = forked(parent, "away", step=AT, storage=f"{s3_url}/experiments")
    assert away.url == f"{s3_url}/experiments/runs/away"
    trained(away.config, 6)
    back = forked(away.config, "back", step=6, storage=parent.storage)
    whole = Run.open(parent).result
    assert whole is not None
    assert Solo(back.config).train().digest == whole.digest


# -- cut short at any moment -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


class Mortal:
    """Lets so many writing operations on a folder happen, and then none any more: as if the process had been killed.

    `late`: after the operation, and not before it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
        self.left, self.late, self.count = 10**9, False, 0
        for verb in ("create", "write", "delete"):
            monkeypatch.setattr(Storage, verb, self._mortal(getattr(Storage, verb), below))

    def _mortal(self, real: Callable[..., None], below: str) -> Callable[..., None]:
        def operation(storage: Storage, path: str, *data: bytes) -> None:
            if not storage.url.startswith(below):
                return real(storage, path, *data)
            self.count += 1
            self.left -= 1
            if self.left < 0 and (self.left < -1 or not self.late):
                raise Killed
            real(storage, path, *data)
            if self.left < 0:
                raise Killed

        return operation


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_fork_that_is_killed_at_any_moment_is_no_run_and_is_finished_by_the_same_command(
    late: bool, parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/new")
    forked(parent, "new-whole", step=AT)
    needed = mortal.count
    assert needed >= 7  # several parts, what finishes it, lineage, manifest, config, and what finishes it away
    for allowed in range(needed):
        name = f"new-{allowed}"
        mortal.left, mortal.late = allowed, late
        with pytest.raises(Killed):
            forked(parent, name, step=AT)
        mortal.left = 10**9
        folder = Storage.open(f"{parent.storage}/runs/{name}")
        is_whole = folder.exists("config.yaml")
        assert is_whole == (allowed >= needed - 1 - late)
        if is_whole:
            with pytest.raises(ConfigError, match="holds a run already"):
                forked(parent, name, step=AT)
        else:
            with pytest.raises(ElasticLMError, match="no run at"):
                Run.open(folder.url).address.config()
            if folder.exists("lineage.json") and not folder.exists(f"{folder_of(AT)}/manifest.json"):
                with pytest.raises(
                    CheckpointError, match=f"not finished; give the command .*: elastic-lm fork .*{name}, "
                ):
                    make_plan(parent.replace(f"name={name}"))
            forked(parent, name, step=AT)
        assert Run.open(folder.url).address.config().name == name
        assert registry.newest_complete(folder) is not None
        whole = contents(f"{parent.storage}/runs/new-whole")
        mine = contents(folder.url)
        assert {path for path in mine if "/fork-" not in path or not is_whole} == whole.keys()
        assert all(mine[path] == whole[path] for path in mine if path.endswith(".safetensors"))


def test_beginning_of_another_fork_is_not_finished_by_a_wrong_command(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/new")
    forked(parent, "new-whole", step=AT)
    mortal.left = mortal.count - 2  # all but config.yaml
    with pytest.raises(Killed):
        forked(parent, step=AT)
    mortal.left = 10**9
    for other in ({"step": STEPS}, {"step": AT, "overrides": ["training.seed=1"]}):
        with pytest.raises(
            ConfigError, match="holds a fork of parent at step 4 that is not finished, and this is another"
        ):
            forked(parent, **other)
    assert forked(parent).lineage.parent.step == AT  # the newest when it was begun, as far as anybody knows


def cut_short(parent: RunConfig, monkeypatch: pytest.MonkeyPatch, missing: int, **more: Any) -> Storage:
    """A fork whose last `missing` writing operations have not happened.    Returns: its folder."""
    mortal = Mortal(monkeypatch, f"{parent.storage}/runs/new")
    forked(parent, f"new-whole-{missing}", step=AT, **more)
    mortal.left = mortal.count - missing
    with pytest.raises(Killed):
        forked(parent, step=AT, **more)
    mortal.left = 10**9
    return Storage.open(f"{parent.storage}/runs/new")


BEFORE_CONFIG, BEFORE_MANIFEST, BEFORE_LINEAGE = 2, 3, 4  # operations that are missing


def change_operational(parent: RunConfig) -> None:
    changed = address_of(parent).stored_config().replace("checkpoint.keep=9")
    Storage.open(parent.run_url).write("config.yaml", changed.to_yaml().encode())


def go_back(parent: RunConfig) -> None:
    """To before the step of the fork, as far as the parent is concerned."""
    left_out = ((3, 5),)
    fingerprint = with_skip(parent, left_out).identity_fingerprint()
    decide(Storage.open(parent.run_url), Rewind(1, "loss", "a spike", AT, AT, 3, (), left_out, fingerprint))


def lose(parent: RunConfig) -> None:
    folder = Storage.open(parent.run_url)
    for path in folder.list():
        folder.delete(path)


def lose_the_step(parent: RunConfig) -> None:
    forget(parent, AT)


@pytest.mark.parametrize("happens", [lose, lose_the_step, change_operational, go_back])
@pytest.mark.parametrize("missing", [BEFORE_CONFIG, BEFORE_MANIFEST])
def test_beginning_is_finished_whatever_the_parent_has_become(
    missing: int, happens: Callable[[RunConfig], None], parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"overrides": ["checkpoint.keep=4", "optimizer.weight_decay=0.2"], "skip": ((6, 7),)}
    folder = cut_short(parent, monkeypatch, missing, **asked)
    happens(parent)
    for other in ({}, {**asked, "skip": ()}, {**asked, "overrides": ["checkpoint.keep=4"]}):
        with pytest.raises(
            ConfigError, match="not finished, and this is another; give that command again .*, or choose"
        ) as told:
            forked(parent, step=AT, **other)
        assert "delete" not in str(told.value)
    made = forked(parent, step=AT, **asked)
    whole, mine = contents(f"{folder.url}-whole-{missing}"), contents(folder.url)
    assert mine.keys() == whole.keys()
    assert all(mine[path] == whole[path] for path in mine if path.endswith(".safetensors"))
    assert made.config == RunConfig.from_yaml(whole["config.yaml"].decode(), "").replace("name=new")
    assert Solo(made.config).train().last_step == STEPS


def test_beginning_whose_state_is_damaged_is_finished_from_the_parent(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"step": AT, "overrides": ["checkpoint.keep=4"]}
    folder = cut_short(parent, monkeypatch, BEFORE_MANIFEST, overrides=["checkpoint.keep=4"])
    flip(folder, parts_of(folder, AT)[1])
    stored = Storage.open(parent.run_url).read("config.yaml")
    change_operational(parent)
    with pytest.raises(CheckpointError, match="cannot be: parent has changed since; delete that folder, and fork"):
        forked(parent, **asked)
    Storage.open(parent.run_url).write("config.yaml", stored)
    forked(parent, **asked)
    assert contents(folder.url).keys() == contents(f"{folder.url}-whole-{BEFORE_MANIFEST}").keys()
    assert registry.is_whole(folder, AT)


def test_beginning_of_an_earlier_version_tells_another_request_from_another_parent(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing but its lineage."""
    asked = ["checkpoint.keep=4", "optimizer.weight_decay=0.2"]
    folder = cut_short(parent, monkeypatch, BEFORE_MANIFEST, overrides=asked)
    (needed,) = (path for path in folder.list() if "/fork-" in path)
    folder.delete(needed)
    with pytest.raises(ConfigError, match="this is another"):
        forked(parent, step=AT, overrides=["checkpoint.keep=4", "optimizer.weight_decay=0.3"])
    change_operational(parent)
    with pytest.raises(CheckpointError, match="cannot be: parent has changed since"):
        forked(parent, step=AT, overrides=asked)
    stored = address_of(parent).stored_config().replace("checkpoint.keep=2")
    Storage.open(parent.run_url).write("config.yaml", stored.to_yaml().encode())
    assert forked(parent, step=AT, overrides=asked).config.checkpoint.keep == 4


def test_beginning_that_cannot_be_finished_says_what_to_do(parent: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cut_short(parent, monkeypatch, BEFORE_CONFIG)
    (needed,) = (path for path in folder.list() if "/fork-" in path)
    folder.write(needed, b"{}")
    forget(parent, AT)
    with pytest.raises(
        CheckpointError, match=r"cannot be: .*no checkpoint of step 4.*; choose another --name, and keep"
    ):
        forked(parent, step=AT)
    folder.delete(parts_of(folder, AT)[0])
    with pytest.raises(CheckpointError, match=r"cannot be: .*no checkpoint of step 4.*; delete that folder"):
        forked(parent, step=AT)


def test_what_finishes_one_fork_does_not_finish_another(parent: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lineage of a second fork comes into a folder where a first one was cut short before its own."""
    folder = cut_short(parent, monkeypatch, BEFORE_LINEAGE, overrides=["training.seed=1"])
    assert any("/fork-" in path for path in folder.list())
    made = forked(parent, step=AT)
    assert made.config.training.seed != 1
    assert not any("/fork-" in path for path in folder.list())
    assert registry.manifest_of(folder, AT).meta["fingerprint"] == made.lineage.fingerprint


def test_forks_of_one_name_that_are_made_at_once_do_not_mix(parent: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one's lineage comes right before this one's."""
    asked = ["training.seed=1", "model.num_layers=2"]
    folder = cut_short(parent, monkeypatch, BEFORE_MANIFEST, overrides=asked)
    others = contents(folder.url)
    for path in others:
        folder.delete(path)
    before_each(
        monkeypatch, "create", "lineage.json", lambda there: [there.write(*each) for each in others.items()] and None
    )
    with pytest.raises(ConfigError, match="not finished, and this is another"):
        forked(parent, step=AT)
    assert len([path for path in folder.list() if "/fork-" in path]) == 2
    lose(parent)
    made = forked(parent, step=AT, overrides=asked)
    assert (made.config.training.seed, made.config.model.num_layers) == (1, 2)
    assert contents(folder.url).keys() == contents(f"{folder.url}-whole-{BEFORE_MANIFEST}").keys()
    assert registry.verified(folder, AT).meta["fingerprint"] == made.config.identity_fingerprint()


def test_parts_of_an_earlier_attempt_are_swept(parent: RunConfig) -> None:
    folder = Storage.open(f"{parent.storage}/runs/new")
    folder.write(f"{folder_of(7)}/part-00000-000-{'0' * 16}.safetensors", b"x")
    made = forked(parent, step=AT)
    assert [found.step for found in registry.found(Storage.open(made.url))] == [AT]


def before_each(monkeypatch: pytest.MonkeyPatch, verb: str, path: str, act: Callable[[Storage], None]) -> None:
    """Somebody else acts on the folder right before its next `verb` on this path, once."""
    real, waiting = getattr(Storage, verb), [act]

    def operation(storage: Storage, name: str, *data: bytes) -> None:
        if name == path and waiting:
            waiting.pop()(storage)
        return real(storage, name, *data)

    monkeypatch.setattr(Storage, verb, operation)


def test_checkpoints_of_a_run_that_trains_at_once_are_not_swept(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = f"{folder_of(7)}/manifest.json"
    before_each(monkeypatch, "create", "config.yaml", lambda folder: folder.write(later, b"of step 7"))
    real = registry.publish

    def publish(folder: Storage, *given: Any, **more: Any) -> Any:
        info = real(folder, *given, **more)
        folder.write(f"{folder_of(6)}/part", b"of step 6")
        return info

    monkeypatch.setattr(registry, "publish", publish)
    made = forked(parent, step=AT)
    assert {later, f"{folder_of(6)}/part"} <= contents(made.url).keys()


def test_run_that_begins_before_the_lineage_is_written_is_not_claimed(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = transfer.copy_parts

    def copy_parts(origin: Storage, manifest: Any, folder: Storage) -> None:
        real(origin, manifest, folder)
        folder.write("owner/00000001.json", b"somebody")

    monkeypatch.setattr(transfer, "copy_parts", copy_parts)
    created: list[bytes] = []
    before_each(monkeypatch, "create", "lineage.json", lambda folder: created.append(b""))
    with pytest.raises(ConfigError, match="holds a run already"):
        forked(parent, step=AT)
    assert not created and not Storage.open(f"{parent.storage}/runs/new").exists("lineage.json")


def test_lineage_is_taken_back_where_a_run_has_begun_meanwhile(
    parent: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_each(monkeypatch, "create", "lineage.json", lambda folder: folder.write("owner/00000001.json", b"somebody"))
    with pytest.raises(ConfigError, match="holds a run already"):
        forked(parent, step=AT)
    there = contents(f"{parent.storage}/runs/new").keys()
    assert "owner/00000001.json" in there and "lineage.json" not in there
    assert not any(path.endswith("manifest.json") for path in there)


def test_same_fork_made_twice_at_once_keeps_its_lineage(parent: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other command finishes as soon as this one has written the lineage."""
    real, waiting = Storage.create, [True]

    def create(storage: Storage, name: str, data: bytes) -> None:
        real(storage, name, data)
        if name == "lineage.json" and waiting:
            waiting.pop()
            forked(parent, step=AT)

    monkeypatch.setattr(Storage, "create", create)
    with pytest.raises(ConfigError, match="holds a run already"):
        forked(parent, step=AT)
    assert make_plan(parent.replace("name=new")).resume_step == AT
    assert Lineage.load(Storage.open(f"{parent.storage}/runs/new")) is not None


@pytest.mark.parametrize("path", ["config.yaml", "events/000000000000.jsonl", "owner/00000001.json", "notes.txt",
                                  f"{folder_of(7)}/manifest.json"])  # fmt: skip
def test_folder_that_is_somebodys_is_left_alone(path: str, parent: RunConfig) -> None:
    folder = Storage.open(f"{parent.storage}/runs/new")
    folder.write(path, b"mine")
    with pytest.raises(ConfigError, match=re.escape("holds a run already")):
        forked(parent, step=AT)
    assert contents(folder.url) == {path: b"mine"}


def test_fork_that_lost_its_first_state_still_begins_where_it_did(parent: RunConfig) -> None:
    """Whoever takes it over with its workers must not send it back behind that step."""
    made = forked(parent, step=AT)
    for path in Storage.open(made.url).list("checkpoints/"):
        Storage.open(made.url).delete(path)
    plan = make_plan(made.config, may_be_held=True)
    assert plan.problem is not None and (plan.resume_step, plan.begins_at) == (None, AT)
