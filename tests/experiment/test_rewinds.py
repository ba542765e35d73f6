"""Rewinds: which batches they leave out, which checkpoints stay the run's, and what of the others is left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.data.order import batch_of
from elastic_lm.errors import CheckpointError
from elastic_lm.experiment import rewinds
from elastic_lm.experiment.rewinds import Rewind, Rewinds
from elastic_lm.experiment.spikes import Spike
from elastic_lm.storage import Storage
from tests.solo import solo_config

SPIKES = {"policy": "rewind", "rewind_steps": 10, "skip_batches": 30, "steps_in_a_row": 3}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return solo_config(str(tmp_path / "tokens"), f"file://{tmp_path}", steps=1000, spikes=SPIKES,
                       checkpoint={"every_steps": 20})  # fmt: skip


def spike(first: int, last: int | None = None) -> Spike:
    return Spike(first, first + 2 if last is None else last, "loss", "the loss stands out")


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


def test_rewind_never_goes_back_behind_the_beginning(config: RunConfig) -> None:
    assert Rewind.of(spike(4), config, number=1).after == ((0, 30),)
    forked = Rewind.of(spike(104), config, number=1, begins_at=100)
    assert (forked.to_step, forked.after) == (100, ((100, 130),))


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
