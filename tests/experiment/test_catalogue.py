"""All runs of a store: each with its state, cheaply, and none lost for one that cannot be read."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from pathlib import Path

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.events.log import EventLog
from elastic_lm.experiment.catalogue import Listed, listed
from elastic_lm.storage import Storage
from tests.experiment.parents import forked, trained
from tests.monitor.story import committed, lost, rewound
from tests.monitor.test_history import begun, finished
from tests.solo import Solo, solo_config
from tests.test_cli import run


@pytest.fixture
def config(small_corpus: str, tmp_path: Path) -> RunConfig:
    return solo_config(small_corpus, f"file://{tmp_path}", "parent")


def by_name(storage: str) -> dict[str, Listed]:
    return {run.name: run for run in listed(Storage.open(storage))}


def test_every_run_is_told_with_its_state(config: RunConfig, tmp_path: Path) -> None:
    result = trained(config, 4)
    forked(config, "new", step=4)
    Solo(config.replace("name=dying")).die()
    Storage.open(f"{tmp_path}/runs/half").write(
        "checkpoints/step-00000004/part-00000-000-0123456789abcdef.safetensors", b""
    )
    Storage.open(f"{tmp_path}/runs/tokens").write("manifest.json", b"{}")
    found = by_name(config.storage)
    assert found.keys() == {"parent", "new", "dying"}
    parent, new, dying = found["parent"], found["new"], found["dying"]
    assert (parent.state, parent.step, parent.of, parent.checkpoint, parent.parent) == ("done", 6, 6, 6, None)
    assert parent.loss == result.metrics["loss"]
    assert (new.state, new.step, new.of, new.loss, new.checkpoint) == ("not begun", 4, 6, None, 4)
    assert (new.parent, new.parent_step) == ("parent", 4)
    assert (dying.state, dying.step, dying.of, dying.checkpoint) == ("running", None, 6, None)
    assert all(run.last_s and time.time() - run.last_s < 60 for run in found.values())


def test_folder_of_the_runs_itself_may_be_named(config: RunConfig, tmp_path: Path) -> None:
    Solo(config).die()
    assert by_name(f"{tmp_path}/runs") == by_name(f"{tmp_path}")
    assert listed(Storage.open(f"{tmp_path}/nothing")) == []


def test_the_last_active_run_is_first(config: RunConfig) -> None:
    for name in ("one", "two", "three"):
        Solo(config.replace(f"name={name}")).die()
    assert [run.name for run in listed(Storage.open(config.storage))] == ["three", "two", "one"]


def write(folder: Storage, *events: object) -> None:
    log = EventLog(folder.child("events"), flush_s=0.01)
    for event in events:
        log.append(event)  # type: ignore[arg-type]
    log.close()


def test_run_without_a_sign_of_life_is_interrupted(tmp_path: Path) -> None:
    folder = Storage.open(f"{tmp_path}/runs/mine")
    write(folder, begun(), committed(1, 0), committed(2, 1))  # long ago
    assert by_name(f"{tmp_path}")["mine"].state == "interrupted"
    folder.write("owner/00000001.json", b"{}")
    folder.write("owner/00000001.renewed", b"7")  # its owner lives, in a step that takes long
    assert by_name(f"{tmp_path}")["mine"].state == "running"
    folder.write("owner/00000001.released", b"")
    assert by_name(f"{tmp_path}")["mine"].state == "interrupted"


def test_run_that_went_back_stands_where_it_went_back_to(tmp_path: Path) -> None:
    folder = Storage.open(f"{tmp_path}/runs/mine")
    write(folder, begun(), *(committed(1 + s, s, loss=3.0 + s) for s in range(5)), begun(8, attempt=2), rewound(9, 2))
    run = by_name(f"{tmp_path}")["mine"]
    assert (run.step, run.loss) == (2, 4.0)
    write(folder, committed(10, 2, loss=2.5, attempt=2))
    run = by_name(f"{tmp_path}")["mine"]
    assert (run.step, run.loss) == (3, 2.5)


def test_verdict_of_an_earlier_attempt_counts_no_more(tmp_path: Path) -> None:
    folder = Storage.open(f"{tmp_path}/runs/mine")
    write(folder, begun(), committed(1, 0, loss=3.5), finished(2, "stopped"))
    assert (run := by_name(f"{tmp_path}")["mine"]).state == "stopped"
    assert (run.step, run.loss) == (1, 3.5)
    write(folder, begun(5, attempt=2), lost(6, "w0"))
    run = by_name(f"{tmp_path}")["mine"]
    assert (run.state, run.step, run.loss, run.last_s) == ("interrupted", 1, 3.5, 1e9 + 6)


def test_run_that_cannot_be_read_keeps_nobody_from_the_others(config: RunConfig, tmp_path: Path) -> None:
    trained(config)
    forked(config, "new", step=6, overrides=["training.steps=9", "schedule.total_steps=6"])
    Storage.open(f"{tmp_path}/runs/new").write("lineage.json", b"{")
    found = by_name(config.storage)
    assert found["parent"].state == "done"
    assert found["new"].state == "unreadable" and "lineage.json" in (found["new"].problem or "")


def test_long_runs_are_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Storage.open(f"{tmp_path}/runs/mine")
    for number in range(300):
        folder.write(f"events/{number:012d}.jsonl", f"{committed(number, number).to_json()}\n".encode())
    reads: Counter[str] = Counter()
    real = Storage.read

    def read(storage: Storage, path: str) -> bytes:
        reads[path] += 1
        return real(storage, path)

    monkeypatch.setattr(Storage, "read", read)
    assert by_name(f"{tmp_path}")["mine"].step == 300
    assert sum(reads.values()) == 1


def test_loss_is_that_of_the_last_step_that_was_not_left_out(tmp_path: Path) -> None:
    folder = Storage.open(f"{tmp_path}/runs/mine")
    left_out = {"refused": 3, "loss": math.nan}
    write(folder, begun(), committed(1, 0, loss=3.5), committed(2, 1, **left_out), committed(3, 2, **left_out))
    found = by_name(f"{tmp_path}")["mine"]
    assert (found.step, found.loss) == (3, 3.5)


@pytest.mark.parametrize("time_s", ["NaN", "-1e308", str(10**400)])
@pytest.mark.parametrize("loss", ["NaN", "Infinity", '"x"', "[1]", "true", str(10**400)])
def test_garbage_in_a_log_is_told_as_unknown(loss: str, time_s: str, config: RunConfig, tmp_path: Path) -> None:
    step = committed(1, 0).to_json().replace('"loss":2.5', f'"loss":{loss}')
    step = step.replace('"time_s":1000000001.0', f'"time_s":{time_s}')
    assert loss in step and time_s in step
    over = finished(2, "done").to_json().replace('"verdict":"done"', '"verdict":{"a":1}')
    Storage.open(f"{tmp_path}/runs/bad").write("events/000000000000.jsonl", f"{step}\n{over}\n".encode())
    Solo(config).die()
    found = by_name(f"{tmp_path}")
    assert found["parent"].state == "running"
    assert (found["bad"].step, found["bad"].loss) == (1, None)
    told = run("runs", "list", str(tmp_path))
    assert told.exit_code == 0 and "bad" in told.stdout and "parent" in told.stdout
    told = run("runs", "list", str(tmp_path), "--json")
    assert told.exit_code == 0 and "NaN" not in told.stdout and "Infinity" not in told.stdout


@pytest.mark.parametrize(
    ("field", "value"),
    [("step", '"x"'), ("step", "1.5"), ("step", "null"), ("step", "true"), ("name", "[]"), ("name", "7"),
     ("time_s", '"x"'), ("time_s", "NaN"), ("time_s", "1e400"), ("time_s", "[]")],
)  # fmt: skip
def test_garbage_in_a_lineage_is_told_as_unknown(field: str, value: str, config: RunConfig, tmp_path: Path) -> None:
    trained(config, 4)
    forked(config, "new", step=4)
    folder = Storage.open(f"{tmp_path}/runs/new")
    body = json.loads(folder.read("lineage.json"))
    (body if field == "time_s" else body["parent"])[field] = json.loads(value)
    folder.write("lineage.json", json.dumps(body).encode())
    found = by_name(config.storage)
    assert found["parent"].state == "done" and found["new"].state == "not begun"
    known = {"step": found["new"].parent_step, "name": found["new"].parent, "time_s": found["new"].last_s}
    assert known.pop(field) is None and None not in known.values()
    assert run("runs", "list", config.storage).exit_code == 0
    assert "NaN" not in run("runs", "list", config.storage, "--json").stdout


def test_run_that_breaks_the_reader_keeps_nobody_from_the_others(config: RunConfig, tmp_path: Path) -> None:
    Solo(config).die()
    Storage.open(f"{tmp_path}/runs/bad").write("config.yaml", f"training:\n  steps: {'9' * 5000}\n".encode())
    found = by_name(f"{tmp_path}")
    assert (found["parent"].state, found["bad"].state) == ("running", "unreadable")
