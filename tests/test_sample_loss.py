"""`data show RUN --step N --loss`: the mean over a step's samples is the step's own loss."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from elastic_lm.checkpoint import store
from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.events.types import EventKind
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from tests.experiment.parents import forked, trained
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


def test_losses_are_of_the_run_that_was_named(small_corpus: str, tmp_path: Path) -> None:
    """A copy of it, while its config names the original's place."""
    config = solo_config(small_corpus, f"file://{tmp_path}", steps=2)
    assert Solo(config).train().ok
    shutil.copytree(tmp_path / "runs", tmp_path / "moved")
    shutil.rmtree(tmp_path / "runs")
    assert {sample["weights_step"] for sample in shown(f"{tmp_path}/moved/{config.name}", "--step", "1", "--loss")} == {
        2
    }


def test_step_that_a_run_never_comes_to_is_refused(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}", steps=2)
    assert Solo(config).train().ok
    assert shown(config.run_url, "--step", "1")
    for more in ([], ["--loss"]):
        told = run("data", "show", config.run_url, "--step", "2", *more)
        assert (told.exit_code, told.stdout) == (2, "")
        assert "--step 2: the run ends at step 2 (training.steps), and its last one is step 1; choose" in told.stderr


def test_loss_that_is_not_finite_is_null_and_said(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}", steps=2)
    assert Solo(config).train().ok
    folder = Storage.open(config.run_url)
    loaded = store.load(folder, 2)
    for path in folder.list(folder_of(2)):
        folder.delete(path)
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in loaded.tensors.items()}
    store.save(folder, 2, broken, {name: told for name, told in loaded.info.meta.items() if name != "digest"})
    told = run("data", "show", config.run_url, "--step", "1", "--loss", "--json")
    assert (told.exit_code, "NaN" in told.stdout) == (0, False), told.stderr
    assert {json.loads(line)["loss"] for line in told.stdout.splitlines()} == {None}
    text = run("data", "show", config.run_url, "--step", "1", "--loss").stdout
    assert "; loss not finite with the weights of step 2" in text


def test_steps_that_a_fork_has_not_trained_are_told_by_who_has(small_corpus: str, tmp_path: Path) -> None:
    parent = solo_config(small_corpus, f"file://{tmp_path}", "parent", steps=6)
    trained(parent, 2, 4)
    seed = forked(parent, "seed", step=4, overrides=["training.seed=7"])
    refused = run("data", "show", seed.url, "--step", "3")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"trained by parent: data show {parent.run_url} --step 3" in refused.stderr
    assert "(training.seed)" in refused.stderr
    assert shown(seed.url, "--step", "4") != shown(parent.run_url, "--step", "4")
    plain = forked(parent, "plain", step=4, overrides=["optimizer.learning_rate=1e-3"], skip=((4, 5),))
    assert shown(plain.url, "--step", "3") == shown(parent.run_url, "--step", "3")  # the same samples
    assert {sample["batch"] for sample in shown(plain.url, "--step", "4")} == {5}
    assert trained(seed.config).ok
    child = forked(seed.config, "child", step=6, overrides=["training.steps=9", "schedule.total_steps=6"])
    assert (
        f"trained by parent: data show {parent.run_url} --step 3"
        in run("data", "show", child.url, "--step", "3").stderr
    )
    assert shown(child.url, "--step", "5") == shown(seed.url, "--step", "5")
    again = forked(
        seed.config, "again", step=6, overrides=["training.seed=8", "training.steps=9", "schedule.total_steps=6"]
    )
    assert f"trained by seed: data show {seed.url} --step 5" in run("data", "show", again.url, "--step", "5").stderr


def test_loss_without_a_run_or_a_step_is_refused(small_corpus: str, tmp_path: Path) -> None:
    told = run("data", "show", small_corpus, "--tokens", "0..10", "--loss")
    assert told.exit_code == 2 and "data show RUN --step N --loss" in told.stderr
