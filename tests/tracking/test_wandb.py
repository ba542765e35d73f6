"""Weights & Biases. Offline: a real run file with the log's numbers, by wandb's own messages; nothing outside its folder.

Online, against a stand-in for its server on this machine (wandb_server.py), with the real client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.events.types import Event
from elastic_lm.tracking.feed import fill
from elastic_lm.tracking.sink import TAGS
from elastic_lm.tracking.wandb import WeightsAndBiases, run_id_of
from tests.monitor.story import committed
from tests.monitor.test_history import begun, finished
from tests.solo import solo_config
from tests.tracking.readers import wandb_history, wandb_records
from tests.tracking.test_tensorboard import held_out
from tests.tracking.wandb_server import serving

ROOT = Path(__file__).parents[2]
EVENTS = [begun(), *(committed(float(step), step, loss=1 / (step + 3)) for step in range(5)), finished(9, "done")]
OFFLINE = {"wandb_project": "my-project", "wandb_mode": "offline"}


def config_in(folder: Path, **changes: Any) -> RunConfig:
    return solo_config("/tokens", f"file://{folder}", "my-run", tracking={**OFFLINE, **changes})


def write(config: RunConfig, folder: Path, events: list[Event]) -> None:
    sink = WeightsAndBiases(config, folder, finish_s=30)
    sink.open()
    fill(sink, events)
    sink.close()


def records(folder: Path, kind: str) -> list[Any]:
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    return [getattr(record, kind) for record in wandb_records(file) if record.HasField(kind)]


def test_history_is_that_of_the_log_to_the_bit(tmp_path: Path) -> None:
    write(config_in(tmp_path), tmp_path, EVENTS)
    rows = wandb_history(tmp_path / "wandb")
    assert [(row["_step"], row["train/loss"], row["_timestamp"]) for row in rows] == [
        (step, 1 / (step + 3), 1e9 + step) for step in range(5)
    ]
    assert all({tag for tag in row if not tag.startswith("_")} == set(TAGS.values()) for row in rows)


def test_evaluation_comes_with_the_step_that_follows_it_and_the_last_one_alone(tmp_path: Path) -> None:
    write(config_in(tmp_path), tmp_path, [*EVENTS[:4], held_out(3), *EVENTS[4:-1], held_out(5), EVENTS[-1]])
    rows = wandb_history(tmp_path / "wandb")
    assert [(row["_step"], row.get("train/loss"), row.get("held_out/accuracy")) for row in rows] == [
        (0, 1 / 3, None),
        (1, 1 / 4, None),
        (2, 1 / 5, None),
        (3, 1 / 6, 0.25),
        (4, 1 / 7, None),
        (5, None, 0.25),
    ]


def test_run_has_our_name_an_id_that_follows_from_it_and_the_config(tmp_path: Path) -> None:
    config = config_in(tmp_path, wandb_entity="my-team")
    write(config, tmp_path, EVENTS)
    run = records(tmp_path, "run")[0]
    assert (run.project, run.entity, run.display_name) == ("my-project", "my-team", "my-run")
    assert run.run_id == run_id_of(config)
    assert run_id_of(config) == run_id_of(config.replace("training.steps=99"))
    assert run_id_of(config) != run_id_of(config.replace("name=other"))
    assert run_id_of(config) != run_id_of(config.replace("storage=s3://bucket/x", "tracking.folder=/tmp/x"))
    told = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {name: told[name] for name in config.model_dump(mode="json")} == config.model_dump(mode="json")


@pytest.mark.parametrize(("verdict", "code"), [("done", 0), ("stopped", 0), ("poisoned", 1), (None, 1)])
def test_run_ends_as_ours_did(verdict: str | None, code: int, tmp_path: Path) -> None:
    ended = [] if verdict is None else [finished(9, verdict)]
    write(config_in(tmp_path), tmp_path, [*EVENTS[:3], finished(2, "stopped"), *EVENTS[3:-1], *ended])
    assert [record.exit_code for record in records(tmp_path, "exit")] == [code]
    summary = {item.key: item.value_json for record in records(tmp_path, "summary") for item in record.update}
    assert json.loads(summary["verdict"]) == (verdict or "stopped")


def test_written_again_it_is_one_run_with_every_step_once(tmp_path: Path) -> None:
    for _ in range(2):  # within a second, too
        write(config_in(tmp_path), tmp_path, EVENTS)
    assert [row["_step"] for row in wandb_history(tmp_path / "wandb")] == list(range(5))


def test_step_that_is_told_again_is_not_sent_again(tmp_path: Path) -> None:
    write(config_in(tmp_path), tmp_path, [*EVENTS[:-1], *EVENTS[3:]])
    assert [row["_step"] for row in wandb_history(tmp_path / "wandb")] == list(range(5))


def test_others_runs_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / "wandb" / "offline-run-20200101_000000-theirs"
    theirs.mkdir(parents=True)
    write(config_in(tmp_path), tmp_path, EVENTS)
    assert theirs.exists()


def process(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A new interpreter with a home, a folder for temporary files and a current one of its own."""
    for name in ("home", "tmp", "here", "run"):
        (folder / name).mkdir()
    own = {"HOME": f"{folder}/home", "TMPDIR": f"{folder}/tmp", "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder / "here",
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.slow
def test_nothing_is_written_outside_the_folder_or_said(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from tests.tracking.test_wandb import EVENTS, config_in, write
import os
before = dict(os.environ)
write(config_in(Path({str(tmp_path)!r})), Path({str(tmp_path / "run")!r}), EVENTS)
assert dict(os.environ) == before
"""
    done = process(script, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not [*(tmp_path / "home").iterdir(), *(tmp_path / "tmp").iterdir(), *(tmp_path / "here").iterdir()]
    assert len(wandb_history(tmp_path / "run" / "wandb")) == 5
    left = {path.name for path in (tmp_path / "run" / "wandb").rglob("*") if path.is_file()}
    assert not left & {"requirements.txt", "wandb-metadata.json", "output.log"}  # of this machine


TRY = """
import os, psutil
from pathlib import Path
from elastic_lm.tracking import wandb
from elastic_lm.tracking.feed import fill
from tests.tracking.test_wandb import EVENTS, config_in

def attempt(events, init_s=30.0):
    wandb.INIT_S = init_s
    sink = wandb.WeightsAndBiases(config_in(Path("/where"), wandb_mode="online"), None, finish_s=20.0)
    try:
        sink.open()
        fill(sink, events)
    finally:
        sink.close()
    assert not psutil.Process().children()

"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "error"),
    [("0" * 40, "wandb.errors.errors.CommError: "), ("", "wandb.errors.errors.UsageError: No API key")],
)
def test_server_that_cannot_be_used_is_an_error_in_time_and_leaves_nothing(
    key: str, error: str, tmp_path: Path
) -> None:
    """Nobody listens there, or there is no key."""
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9"} | ({"WANDB_API_KEY": key} if key else {})
    done = process(f"{TRY}attempt(EVENTS, 2.0)", tmp_path, **environment)
    assert done.returncode == 1 and error in done.stderr
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.slow
def test_server_that_has_some_steps_gets_the_others(tmp_path: Path) -> None:
    """Another attempt, and then an export of what is all there."""
    with serving() as server:
        script = f"{TRY}attempt(EVENTS[:4])\nattempt(EVENTS)\nattempt(EVENTS)"
        done = process(script, tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY="0" * 40)
    assert done.returncode == 0, done.stderr
    assert [(row["_step"], row["train/loss"]) for row in server.history] == [(s, 1 / (s + 3)) for s in range(5)]
    assert server.asked.count("RunResumeStatus") == 3
    assert not [path for path in server.paths if path.endswith(("requirements.txt", "metadata.json", "output.log"))]
    assert not list((tmp_path / "tmp").iterdir())
