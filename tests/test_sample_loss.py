"""`data show RUN --step N --loss`: the mean over a step's samples is the step's own loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.run import Run
from tests.solo import Solo, solo_config
from tests.test_cli import run


def shown(*arguments: str) -> list[dict]:  # type: ignore[type-arg]
    told = run("data", "show", *arguments, "--json")
    assert told.exit_code == 0, told.stderr
    return [json.loads(line) for line in told.stdout.splitlines()]


def test_losses_of_a_steps_samples_come_to_the_steps_loss(small_corpus: str, tmp_path: Path) -> None:
    """The checkpoint of step 3 has the weights that step 3 was trained with."""
    config = solo_config(small_corpus, f"file://{tmp_path}", steps=3)
    assert Solo(config).train().ok
    longer = config.replace("training.steps=4", "schedule.total_steps=3")
    assert Solo(longer).train().ok
    url = longer.run_url
    samples = shown(url, "--step", "3", "--loss")
    (event,) = [e for e in Run.open(url).events() if e.kind is EventKind.STEP_COMMITTED and e.step == 3]
    assert {sample["weights_step"] for sample in samples} == {3}
    assert sum(sample["loss"] for sample in samples) / len(samples) == pytest.approx(event.fields["loss"], rel=1e-5)
    assert "; loss " in run("data", "show", url, "--step", "3", "--loss").stdout


def test_loss_without_a_run_or_a_step_is_refused(small_corpus: str, tmp_path: Path) -> None:
    told = run("data", "show", small_corpus, "--tokens", "0..10", "--loss")
    assert told.exit_code == 2 and "data show RUN --step N --loss" in told.stderr
