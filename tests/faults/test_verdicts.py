"""Faults that no elasticity helps against: the run ends by itself, at once, with a verdict that says what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_lm.data.manifest import Manifest
from elastic_lm.events.types import EventKind
from elastic_lm.storage import Storage
from tests.faults.harness import Run

pytestmark = pytest.mark.ray


@pytest.fixture
def damaged(corpus: str, tmp_path: Path) -> tuple[str, Path, str]:
    """A copy of the corpus to damage: its address, the first shard's file, and its path in the corpus."""
    folder = tmp_path / "damaged"
    shutil.copytree(corpus.removeprefix("file://"), folder)
    shard = Manifest.load(Storage.open(f"file://{folder}")).shards[0]
    return f"file://{folder}", folder / shard.path, shard.path


def test_bug_that_comes_again_ends_the_run_with_its_cause(start: Callable[..., Run]) -> None:
    run = start(steps=20, objective={"name": "tests.faults.objectives:buggy"})
    result = run.result()
    assert result.verdict == "failed_bug"
    assert "ZeroDivisionError: the bug in the user's objective" in result.message
    assert "(twice)" in result.message
    assert run.count(EventKind.MEMBER_LOST) == 0  # a bug is nobody's death: no restart storm


def test_bug_at_start_up_ends_the_run_with_its_cause(start: Callable[..., Run]) -> None:
    result = start(steps=20, objective={"name": "tests.faults.objectives:missing"}).result()
    assert result.verdict == "failed_bug"
    assert "objective.name='tests.faults.objectives:missing' cannot be imported" in result.message


def test_loss_that_is_not_finite_ends_the_run_before_anything_is_applied(start: Callable[..., Run]) -> None:
    run = start(steps=20, objective={"name": "tests.faults.objectives:infinite"})
    result = run.result()
    assert (result.verdict, result.last_step) == ("poisoned", 0)
    assert "lower optimizer.learning_rate" in result.message
    assert run.steps() == ()


def test_run_that_leaves_out_ten_steps_on_end_stops(start: Callable[..., Run]) -> None:
    run = start(
        steps=100_000, objective={"name": "tests.faults.objectives:infinite"}, training={"on_nonfinite": "skip"}
    )
    result = run.result()
    assert result.verdict == "poisoned"
    assert "were left out" in result.message and "lower optimizer.learning_rate" in result.message
    assert 10 <= len(run.steps()) == result.last_step < 100_000
    assert all(event.fields["refused"] for event in run.committed())


def test_flipped_byte_is_never_trained_on(start: Callable[..., Run], damaged: tuple[str, Path, str]) -> None:
    tokens, file, shard = damaged
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run = start(steps=200, tokens=tokens)
    result = run.result()
    assert result.verdict == "data_error"
    assert shard in result.message and "offset" in result.message and "checksum" in result.message
    assert len(run.steps()) == result.last_step < 200


def test_missing_shard_is_named(start: Callable[..., Run], damaged: tuple[str, Path, str]) -> None:
    tokens, file, shard = damaged
    file.unlink()
    result = start(steps=200, tokens=tokens).result()
    assert result.verdict == "data_error"
    assert shard in result.message


@pytest.mark.thorough
def test_truncated_shard_is_named(start: Callable[..., Run], damaged: tuple[str, Path, str]) -> None:
    tokens, file, shard = damaged
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    result = start(steps=200, tokens=tokens).result()
    assert result.verdict == "data_error"
    assert shard in result.message and "truncated" in result.message


def test_final_checkpoint_that_cannot_be_written_is_no_success(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start(steps=40, checkpoint={"every_steps": None})
    run.await_step(5)
    (tmp_path / "runs" / run.config.name / "checkpoints").write_text("a file where a folder should be")
    result = run.result()
    assert result.verdict == "failed"
    assert "the checkpoint of step 40 could not be written in 3 tries" in result.message
    assert result.checkpoint is None and result.digest == {}
    assert run.count(EventKind.CHECKPOINT_FAILED) == 3


def test_stop_saves_and_the_same_run_goes_on(start: Callable[..., Run]) -> None:
    run = start(steps=150, name="stopped-run", held_at=20)
    run.await_step(20)
    run.stop("a test wants it")
    result = run.result()
    assert (result.verdict, result.message) == ("stopped", "a test wants it")
    assert result.checkpoint is not None and 20 <= result.last_step < 150
