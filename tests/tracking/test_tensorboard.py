"""TensorBoard's files: every step once and in order, whatever attempts and exports there were, and other files left alone."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_lm.errors import ConfigError
from elastic_lm.events.types import Event, EventKind
from elastic_lm.tracking.feed import fill
from elastic_lm.tracking.sink import TAGS
from elastic_lm.tracking.tensorboard import TensorBoard
from tests.monitor.story import committed
from tests.monitor.test_history import begun
from tests.tracking.readers import tensorboard_records, tensorboard_scalars

ROOT = Path(__file__).parents[2]
EVENTS = [begun(), *(committed(float(step), step, loss=1 / (step + 1)) for step in range(5))]


def float32(value: float) -> float:
    """What TensorBoard's files keep of it."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def write(folder: Path, events: list[Event]) -> None:
    sink = TensorBoard(folder)
    sink.open()
    fill(sink, events)
    sink.close()


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != ".lock")


def test_scalars_are_those_of_the_log_with_its_steps_and_times(tmp_path: Path) -> None:
    write(tmp_path / "tb", EVENTS)
    shown = tensorboard_scalars(tmp_path / "tb")
    assert set(shown) == set(TAGS.values())
    assert shown["train/loss"] == [(step, 1e9 + step, float32(1 / (step + 1))) for step in range(5)]
    assert shown["workers/world_size"] == [(step, 1e9 + step, 2.0) for step in range(5)]


def held_out(step: int, **changes: object) -> Event:
    fields = {"loss": 0.0, "loss_stderr": 0.1, "num_targets": 8, "num_correct": 2, "num_bytes": None}
    return Event(EventKind.EVALUATED, "", step, fields={**fields, **changes}, time_s=1e9 + step)


def test_evaluation_is_shown_before_the_step_that_follows_it(tmp_path: Path) -> None:
    others = [Event(EventKind.EVALUATED, "of another version", 3, time_s=1.0)]
    write(tmp_path, [*EVENTS[:4], held_out(3), *others, *EVENTS[4:], held_out(5, num_correct=None)])
    shown = tensorboard_scalars(tmp_path)
    assert [step for step, _, _ in shown["train/loss"]] == list(range(5))
    assert shown["held_out/loss"] == [(3, 1e9 + 3, 0.0), (5, 1e9 + 5, 0.0)]
    assert shown["held_out/perplexity"] == [(3, 1e9 + 3, 1.0), (5, 1e9 + 5, 1.0)]
    assert shown["held_out/accuracy"] == [(3, 1e9 + 3, 0.25)]


def test_file_begins_as_tensorboard_wants_it(tmp_path: Path) -> None:
    write(tmp_path, EVENTS)
    (name,) = files(tmp_path)
    first, second, *rest = tensorboard_records(tmp_path / name)
    assert first.file_version == "brain.Event:2"
    assert (second.step, second.session_log.status) == (0, second.session_log.START)
    assert [record.step for record in rest] == list(range(5))


@pytest.mark.parametrize("times", [2, 3])  # within a second, too
def test_written_again_it_is_the_same(times: int, tmp_path: Path) -> None:
    for _ in range(times):
        write(tmp_path, EVENTS)
    assert len(files(tmp_path)) == 1
    assert [step for step, _, _ in tensorboard_scalars(tmp_path)["train/loss"]] == list(range(5))


def test_step_that_is_told_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    again = [committed(10.0 + step, step, loss=9.0) for step in (3, 4, 5)]
    write(tmp_path, [*EVENTS, *again])
    points = tensorboard_scalars(tmp_path)["train/loss"]
    assert [(step, value) for step, _, value in points] == [
        (0, 1.0), (1, 0.5), (2, float32(1 / 3)), (3, 9.0), (4, 9.0), (5, 9.0),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("caught_up", [True, False])
def test_what_a_killed_run_leaves_is_replaced_by_the_next_attempt(caught_up: bool, tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
from tests.tracking.test_tensorboard import EVENTS, TensorBoard
sink = TensorBoard(Path({str(tmp_path)!r}))
sink.open()
if {caught_up}:
    sink.caught_up()
for event in EVENTS[:4]:
    sink.write(event)
sink.flush()
os._exit(9)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=50)
    assert killed.returncode == 9
    (name,) = files(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-7])  # torn
    write(tmp_path, EVENTS)
    assert len(files(tmp_path)) == 1 and name not in files(tmp_path)
    assert [step for step, _, _ in tensorboard_scalars(tmp_path)["train/loss"]] == list(range(5))


def test_earlier_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    write(tmp_path, EVENTS)
    (before,) = files(tmp_path)
    sink = TensorBoard(tmp_path)
    sink.open()
    sink.write(EVENTS[1])
    assert before in files(tmp_path)
    assert len(tensorboard_scalars(tmp_path)["train/loss"]) == 5  # the half is not looked at
    sink.close()  # it failed before it had caught up
    assert files(tmp_path) == [before]


def test_others_files_are_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "events.out.tfevents.1.host"
    theirs.write_bytes(b"")
    for _ in range(2):
        write(tmp_path, EVENTS)
    assert theirs.exists() and len(files(tmp_path)) == 2


def test_two_writers_are_kept_apart_until_one_has_ended(tmp_path: Path) -> None:
    first, second = TensorBoard(tmp_path), TensorBoard(tmp_path)
    first.open()
    with pytest.raises(ConfigError, match="is being written by the run itself, or by another export"):
        second.open()
    second.close()  # harmless
    fill(first, EVENTS)
    first.close()
    write(tmp_path, EVENTS)
    assert len(files(tmp_path)) == 1


def test_figures_that_are_no_numbers_or_not_there_are_borne(tmp_path: Path) -> None:
    bare = committed(1, 0, loss=float("nan"))
    del bare.fields["step_s"]
    write(tmp_path, [bare])
    shown = tensorboard_scalars(tmp_path)
    assert "time/step_s" not in shown
    ((_, _, loss),) = shown["train/loss"]
    assert loss != loss
