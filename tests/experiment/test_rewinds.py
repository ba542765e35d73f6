"""Rewinds: which batches they leave out, which checkpoints stay the run's, and what of the others is left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import Manifest, folder_of
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest as Corpus
from elastic_lm.data.order import batch_of
from elastic_lm.errors import CheckpointError
from elastic_lm.experiment import rewinds
from elastic_lm.experiment.origin import Origin
from elastic_lm.experiment.rewinds import Rewind, Rewinds, retention_of
from elastic_lm.experiment.spikes import POISONED, Spike
from elastic_lm.run_address import RunAddress
from elastic_lm.runtime.plan import make_plan
from elastic_lm.sample_loss import SampleLoss
from elastic_lm.storage import Storage
from tests.experiment.gone_back import decided, late, spike
from tests.experiment.parents import address_of
from tests.solo import Solo, solo_config

SPIKES = {"policy": "rewind", "rewind_steps": 10, "skip_batches": 30, "steps_in_a_row": 3}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return solo_config(str(tmp_path / "tokens"), f"file://{tmp_path}", steps=1000, spikes=SPIKES,
                       checkpoint={"every_steps": 20})  # fmt: skip


def meta(config: RunConfig) -> dict[str, object]:
    return {"fingerprint": config.identity_fingerprint(), "config": config.model_dump(mode="json")}


def after(config: RunConfig, *made: Rewind) -> RunConfig:
    return Rewinds(made).applied(config)


def test_batches_are_left_out_from_before_the_spike_on(config: RunConfig) -> None:
    rewind = Rewind.of(spike(100), config, number=1)
    assert (rewind.to_step, rewind.before, rewind.after) == (90, (), ((90, 120),))
    assert rewind.left_out == [(90, 120)]
    assert str(rewind) == "Back to step 90, leaving out batches 90:120: the loss stands out"


def test_steps_that_stay_have_the_batches_that_they_had(config: RunConfig) -> None:
    """So any checkpoint of at most that many steps will do."""
    config = config.replace("training.skip=[[3, 5], [95, 97], [200, 210]]")
    rewind = Rewind.of(spike(100), config, number=1)
    before, now = config.training.skip, rewind.after
    steps = range(rewind.to_step)
    assert [batch_of(step, before) for step in steps] == [batch_of(step, now) for step in steps]
    gone = {batch_of(step, before) for step in range(rewind.to_step, rewind.to_step + 30)}
    trained = {batch_of(step, now) for step in range(1000)}
    assert not gone & trained
    assert {batch_of(step, before) for step in range(103)} - gone <= trained
    assert {batch for start, stop in rewind.left_out for batch in range(start, stop)} == gone


def test_skip_leaves_out_the_batches_of_the_spike_alone(config: RunConfig) -> None:
    config = config.replace("spikes.policy=skip", "training.skip=[[101, 103]]")
    rewind = Rewind.of(spike(99, 101), config, number=1)
    assert (rewind.to_step, rewind.left_out) == (99, [(99, 101), (103, 104)])
    poisoned = Rewind.of(Spike(99, 99, POISONED, "not finite"), config, number=1)
    assert (poisoned.to_step, poisoned.after) == (89, ((89, 121),))


def test_one_checkpoint_stays_as_far_back_as_the_run_may_go(config: RunConfig) -> None:
    def reach(*overrides: str) -> int | None:
        return retention_of(config.replace(*overrides)).reach_steps

    assert reach() == 13
    assert reach("spikes.policy=skip") == 3
    assert reach("spikes.policy=skip", "training.on_nonfinite=rewind") == 13
    assert reach("spikes.policy=stop") == 13  # it may be forked from there
    assert (
        reach("training.on_nonfinite=skip") == 13 + 2 * 9
    )  # nine steps on end may be left out in each gap of a streak
    assert reach("spikes.policy=ignore") is None


def test_rewind_never_goes_back_behind_the_beginning(config: RunConfig) -> None:
    assert Rewind.of(spike(4), config, number=1).after == ((0, 30),)
    forked = Rewind.of(spike(104), config, number=1, floor=100)
    assert (forked.to_step, forked.after) == (100, ((100, 130),))


def test_run_never_goes_back_behind_where_it_went_back_to(config: RunConfig) -> None:
    """A stretch of noise that is longer than what one rewind leaves out takes several, from the same state."""
    made = Rewinds()
    for number, gone in ((1, (90, 120)), (2, (90, 150)), (3, (90, 180))):
        floor = made.floor(begins_at=0)
        rewind = Rewind.of(spike(95 if number > 1 else 100), made.applied(config), number=number, floor=floor)
        made = Rewinds((*made.made, rewind))
        assert (rewind.to_step, rewind.after) == (90, (gone,))
    assert (Rewinds().floor(7), made.floor(7), made.floor(700)) == (7, 90, 700)
    assert Rewind.of(spike(300), made.applied(config), number=4, floor=made.floor(0)).to_step == 290


def test_skip_leaves_out_what_stands_out_behind_the_last_rewind(config: RunConfig) -> None:
    config = config.replace("spikes.policy=skip")
    rewind = Rewind.of(spike(98, 101), config, number=2, floor=100)  # steps 98 and 99 had been odd batches until then
    assert (rewind.to_step, rewind.left_out) == (100, [(100, 102)])


def test_second_one_counts_in_the_batches_that_the_first_has_left(config: RunConfig) -> None:
    first = Rewind.of(spike(100), config, number=1)
    second = Rewind.of(spike(95), after(config, first), number=2)  # it goes back further than the first
    assert (second.to_step, second.before, second.after) == (85, ((90, 120),), ((85, 145),))
    assert second.left_out == [(85, 90), (120, 145)]


def test_config_says_what_is_left_out(config: RunConfig) -> None:
    first = Rewind.of(spike(100), config, number=1)
    second = Rewind.of(spike(200), after(config, first), number=2)
    made = Rewinds((first, second))
    whole = config.replace("training.skip=[[90, 120], [220, 250]]")
    assert made.applied(config).identity_fingerprint() == whole.identity_fingerprint()
    for known in (config, after(config, first), whole):  # whichever of them was written down
        assert made.applied(known).training.skip == whole.training.skip
    other = config.replace("training.skip=[[1, 2]]")
    assert made.applied(other) == other


def test_runs_of_before_are_known_by_what_they_left_out(config: RunConfig) -> None:
    """Whose workers go on."""
    config = config.replace("training.skip=[[3, 5]]")
    first = Rewind.of(spike(100), config, number=1)
    second = Rewind.of(spike(300), after(config, first), number=2)
    made = Rewinds((first, second))
    ever = [config, after(config, first), after(config, first, second)]
    fingerprints = [each.identity_fingerprint() for each in ever]
    for number, now in enumerate(ever):
        assert [each.identity_fingerprint() for each in made.earlier_configs(now)] == fingerprints[:number]
    assert made.earlier_configs(config.replace("training.skip=[[7, 8]]")) == Rewinds().earlier_configs(config) == []


def test_checkpoints_of_what_stays_are_kept(config: RunConfig) -> None:
    first = Rewind.of(spike(100), config, number=1)  # back to 90
    second = Rewind.of(spike(95), after(config, first), number=2)  # back to 85
    made = Rewinds((first, second))
    was, middle, now = (meta(c) for c in (config, after(config, first), made.applied(config)))
    assert [made.keep(step, was) for step in (80, 85, 86, 100)] == [True, True, False, False]
    assert [made.keep(step, middle) for step in (85, 86, 90, 94)] == [True, False, False, False]
    assert all(made.keep(step, now) for step in (80, 90, 500))
    assert Rewinds((first,)).keep(90, was)
    assert not Rewinds((first,)).keep(91, was)
    assert Rewinds((first,)).keep(500, middle)
    assert made.keep(500, meta(config.replace("training.skip=[[1, 2]]")))  # another run's, which others refuse
    assert made.keep(500, {})
    assert Rewinds().keep(500, was)
    assert made.as_was(made.applied(config), was) == config
    assert made.as_was(config, {}) == config
    other = config.replace("training.skip=[[1, 2]]")
    assert made.as_was(other, was) == other


def test_record_is_read_as_it_was_written(config: RunConfig) -> None:
    rewind = Rewind.of(spike(100), config.replace("training.skip=[[3, 5]]"), number=1)
    assert Rewind.from_json(rewind.to_json()) == rewind


def test_decision_stands(config: RunConfig, tmp_path: Path) -> None:
    folder = Storage.open(config.run_url)
    rewind = Rewind.of(spike(100), config, number=1)
    rewinds.decide(folder, rewind)
    rewinds.decide(folder, dataclasses.replace(rewind, time_s=1.0))  # by one who did not live to see it
    assert Rewinds.load(folder).made == (rewind,)
    with pytest.raises(CheckpointError, match="is there already, and another one"):
        rewinds.decide(folder, Rewind.of(spike(300), config, number=1))
    assert Rewinds.load(folder).made == (rewind,)


@pytest.mark.parametrize("data", [b"{", b"{}", b"[]", b'{"format": "elastic-lm rewind", "version": 2}'])
def test_damaged_record_is_told_with_what_to_do(data: bytes, config: RunConfig) -> None:
    folder = Storage.open(config.run_url)
    folder.write("rewinds/0001.json", data)
    with pytest.raises(CheckpointError, match=r"rewinds/0001.json cannot be read: .*elastic-lm fork"):
        Rewinds.load(folder)


def test_run_without_any(config: RunConfig) -> None:
    made = Rewinds.load(Storage.open(config.run_url))
    assert (len(made), list(made)) == (0, [])
    assert made.applied(config) is config


def test_skip_in_the_record_is_what_a_fork_would_be_told(config: RunConfig) -> None:
    body = json.loads(Rewind.of(spike(100), config, number=3).to_json())
    assert (body["number"], body["after"], body["first_step"], body["last_step"]) == (3, [[90, 120]], 100, 102)


def test_rewind_that_does_not_follow_on_the_one_before_is_told(config: RunConfig) -> None:
    folder = Storage.open(config.run_url)
    first = Rewind.of(spike(100), config, number=1)
    rewinds.decide(folder, Rewind.of(spike(200), after(config, first), number=2))
    with pytest.raises(CheckpointError, match=r"rewinds/0002.json does not follow on the rewind before it"):
        Rewinds.load(folder)  # the first is missing
    rewinds.decide(folder, Rewind.of(spike(90), config, number=1))
    with pytest.raises(CheckpointError, match=r"rewinds/0002.json does not follow on the rewind before it"):
        Rewinds.load(folder)


# -- a run that went back ----------------------------------------------------------------------------------------------


@pytest.fixture
def went_back(small_corpus: str, tmp_path: Path) -> RunConfig:
    return decided(small_corpus, f"file://{tmp_path}")


def test_run_goes_on_from_before_the_spike(went_back: RunConfig) -> None:
    plan = make_plan(went_back)
    assert (plan.resume_step, plan.config.training.skip) == (2, ((2, 6),))
    assert plan.skipped == (
        f"Passing over checkpoint {went_back.run_url}/checkpoints/step-00000004: the run went back from its steps.",
    )
    assert make_plan(plan.config).config == plan.config  # by the config that is stored then


@pytest.mark.parametrize("change", ["training.skip=[[4, 6]]", "training.skip=[[2, 6], [9, 10]]", "training.seed=9"])
def test_other_settings_are_refused_as_before(change: str, went_back: RunConfig) -> None:
    with pytest.raises(CheckpointError, match=f"other settings: {change.partition('=')[0]}: "):
        make_plan(went_back.replace(change))


def test_other_settings_are_refused_where_no_checkpoint_is_left(went_back: RunConfig) -> None:
    folder = Storage.open(went_back.run_url)
    for path in folder.list(folder_of(2)):
        folder.delete(path)
    assert make_plan(went_back).resume_step is None
    with pytest.raises(
        CheckpointError, match=r"went back to step 2 and was trained with other settings: .*seed: 0 -> 9"
    ):
        make_plan(went_back.replace("training.seed=9"))


def test_what_was_gone_back_from_is_deleted(went_back: RunConfig) -> None:
    folder, made = Storage.open(went_back.run_url), Rewinds.load(Storage.open(went_back.run_url))
    for step in (2, 3, 4):
        folder.write(f"evaluations/step-{step:08d}/held_out.json", b"{}")
    asked: list[bool] = []
    assert rewinds.clear(folder, made, lambda: asked.append(True)) == [4]
    assert [found.step for found in registry.found(folder)] == [2]
    assert folder.list("evaluations/") == ["evaluations/step-00000002/held_out.json"]
    assert len(asked) == 3
    folder.write("evaluations/step-00000004/held_out.json", b"{}")  # of the weights that the run has there now
    assert rewinds.clear(folder, made, lambda: asked.append(True)) == []
    assert len(folder.list("evaluations/")) == 2
    assert len(asked) == 3


def test_checkpoint_that_is_stored_late_is_nobodys(went_back: RunConfig) -> None:
    folder = late(went_back)
    assert make_plan(went_back).resume_step == 2
    origin = Origin.of(address_of(went_back))
    assert (origin.step, origin.config.training.skip) == (2, ((2, 6),))
    assert rewinds.clear(folder, Rewinds.load(folder), lambda: None) == [4]


def test_checkpoint_that_is_stored_late_is_in_nobodys_way(went_back: RunConfig) -> None:
    folder = late(went_back)
    before, keep = registry.manifest_of(folder, 4), Rewinds.load(folder).keep
    (part, *others) = before.parts
    changed = dataclasses.replace(part, tensors=dict(list(part.tensors.items())[1:]))
    now = Manifest(4, (changed, *others), meta(make_plan(went_back).config), before.owner_epoch)
    with pytest.raises(CheckpointError, match="is complete already and holds another state"):
        registry.publish(folder, now)
    registry.publish(folder, now, wanted=keep)
    assert registry.manifest_of(folder, 4).meta == now.meta


def test_loss_of_a_step_as_it_was_takes_no_weights_of_another_order(went_back: RunConfig) -> None:
    folder, corpus = Storage.open(went_back.run_url), Corpus.load(Storage.open(went_back.data.tokens))
    rewinds.clear(folder, Rewinds.load(folder), lambda: None)
    Solo(went_back).train(3)
    config = RunAddress.at(went_back.run_url).stored_config()
    assert SampleLoss(folder, config, corpus, before=3).step == 3
    assert SampleLoss(folder, config, corpus, before=3, at_most=2).step == 2
    for path in folder.list(folder_of(2)):
        folder.delete(path)
    with pytest.raises(CheckpointError, match="has no checkpoint of step 2 or earlier any more"):
        SampleLoss(folder, config, corpus, before=3, at_most=2)
