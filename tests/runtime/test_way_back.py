"""Whether a run can go back is known before it is decided: with checkpoints that are missing, damaged, or of another policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_lm.checkpoint.layout import folder_of, is_part
from elastic_lm.config import RunConfig
from elastic_lm.experiment import rewinds
from elastic_lm.experiment.rewinds import Rewind, Rewinds
from elastic_lm.experiment.spikes import Spike
from elastic_lm.runtime import way_back
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.solo import Solo, solo_config

CHOSEN = {"policy": "rewind", "rewind_steps": 2, "skip_batches": 4, "steps_in_a_row": 1}


@pytest.fixture
def config(small_corpus: str, tmp_path: Path) -> RunConfig:
    """Trained with checkpoints of steps 2, 4 and 6."""
    saving = {"every_steps": 2, "keep": 3}
    config = solo_config(small_corpus, f"file://{tmp_path}", steps=8, spikes=CHOSEN, checkpoint=saving)
    for step in (2, 4, 6):
        Solo(config).train(step)
    return config


def obstacle(config: RunConfig, spike_at: int, *, begins_at: int = 0) -> str | None:
    planned = make_plan(config).config
    rewind = Rewind.of(Spike(spike_at, spike_at, "loss", "it stands out"), planned, number=1, floor=begins_at)
    folder = Storage.open(config.run_url)
    return way_back.obstacle(folder, planned, Rewinds((rewind,)), begins_at=begins_at, check=lambda: None)


def delete(config: RunConfig, *steps: int) -> None:
    folder = Storage.open(config.run_url)
    for step in steps:
        for path in folder.list(f"{folder_of(step)}/"):
            folder.delete(path)


def damage(config: RunConfig, step: int) -> None:
    folder = Storage.open(config.run_url)
    path = next(path for path in folder.list(f"{folder_of(step)}/") if is_part(path.rpartition("/")[2]))
    body = bytearray(folder.read(path))
    body[len(body) // 2] ^= 1
    folder.write(path, bytes(body))


def test_run_with_an_old_checkpoint_can(config: RunConfig) -> None:
    assert obstacle(config, 6) is None
    delete(config, 2)
    assert obstacle(config, 6) is None  # back to 4
    assert obstacle(config, 5) == "there is no checkpoint of step 3 or earlier to go back to"


def test_run_that_never_had_one_begins_anew(config: RunConfig) -> None:
    """Or has none yet: a first one that is late, or could not be stored. Nothing is given up that is stored."""
    delete(config, 2, 4, 6)
    assert obstacle(config, 3) is obstacle(config, 6) is None


def test_run_is_young_when_its_first_checkpoint_is_of_a_later_step(config: RunConfig) -> None:
    delete(config, 4, 6)
    assert obstacle(config, 3) is None  # back to 1
    delete(config, 2)
    Solo(config).train(4)
    delete(config, 2)
    assert obstacle(config, 3) is None
    assert obstacle(config, 5) == "there is no checkpoint of step 3 or earlier to go back to"
    # Nor does it get younger by saving less often from now on.
    assert obstacle(config.replace("checkpoint.every_steps=8"), 5) is not None


def test_fork_needs_a_state_of_its_own(config: RunConfig) -> None:
    delete(config, 2)
    assert obstacle(config, 5, begins_at=4) is None  # back to 4, where it begins
    delete(config, 4)
    assert obstacle(config, 5, begins_at=4) == "there is no checkpoint of step 4 or earlier to go back to"


@pytest.mark.parametrize(("damaged", "goes"), [((4,), True), ((2, 4), False)])
def test_damaged_one_is_found_before_newer_ones_are_given_up(
    damaged: tuple[int, ...], goes: bool, config: RunConfig
) -> None:
    for step in damaged:
        damage(config, step)
    told = obstacle(config, 6)
    assert (told is None) == goes
    if told is not None:
        assert told.startswith("there is no checkpoint of step 4 or earlier to go back to; Passing over checkpoint")
        assert "step-00000002" in told and "step-00000006" not in told
    assert make_plan(config).resume_step == 6


@pytest.mark.parametrize(
    ("gone", "begins_at", "overrides", "told"),
    [
        ((2, 4), 0, (), "a spike that begins before step 8 ends the run, unless it trains on by spikes.policy=ignore"),
        ((2, 4), 0, ("checkpoint.every_steps=8",), "before step 8 "),  # which makes it no younger
        ((2,), 0, (), "before step 6 "),
        ((2,), 0, ("spikes.policy=skip",), None),
        ((2, 4), 6, (), None),  # the first of a fork
        ((4, 6), 0, (), None),
        ((2, 6), 0, (), "before step 6 "),
        ((2, 4, 6), 0, (), None),
        ((), 0, (), None),
        ((2, 4), 0, ("spikes.policy=stop",), None),
        (
            (2, 4),
            0,
            ("spikes.policy=ignore", "training.on_nonfinite=rewind"),
            "before step 8 ends the run, unless it trains on by training.on_nonfinite=skip.",
        ),
    ],
)
def test_run_is_told_when_it_goes_on_with_nothing_to_go_back_to(
    gone: tuple[int, ...], begins_at: int, overrides: tuple[str, ...], told: str | None, config: RunConfig
) -> None:
    delete(config, *gone)
    planned = make_plan(config).config.replace(*overrides)
    found = way_back.lack(Storage.open(config.run_url), planned, Rewinds(), begins_at=begins_at)
    assert (found is None) == (told is None), found
    assert told is None or told in (found or "")


def test_plan_says_so_unless_the_run_has_just_gone_back(config: RunConfig) -> None:
    assert make_plan(config).skipped == ()
    delete(config, 2, 4)
    (told,) = make_plan(config).skipped
    assert told.startswith("No checkpoint is old enough to go back to: ")
    rewind = Rewind.of(Spike(3, 3, "loss", "it stands out"), make_plan(config).config, number=1)
    rewinds.decide(Storage.open(config.run_url), rewind)
    assert not any("old enough" in sentence for sentence in make_plan(config).skipped)


def test_weights_that_a_run_began_with_are_needed_to_begin_anew(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic_lm.errors import ConfigError
    from elastic_lm.huggingface import initial

    delete(config, 2, 4, 6)
    planned = make_plan(config).config
    begun = planned.replace("model.init=hf:/gone")
    rewind = Rewind.of(Spike(3, 3, "loss", "it stands out"), planned, number=1)

    def gone(*_: object) -> Callable[[], None]:
        raise ConfigError("/gone: there is nothing")

    monkeypatch.setattr(initial, "settled", gone)
    told = way_back.obstacle(Storage.open(config.run_url), begun, Rewinds((rewind,)), begins_at=0, check=lambda: None)
    assert told == "the weights that it began with are not there any more: /gone: there is nothing"
