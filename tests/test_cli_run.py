"""Commands about a run that is there: from its log alone, each with its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pandas
import pytest

import elastic_lm.run
from elastic_lm import RunConfig
from elastic_lm.errors import ClusterError
from elastic_lm.events.log import EventLog
from elastic_lm.events.types import Event, EventKind
from elastic_lm.result import RunResult
from elastic_lm.runtime import remote
from elastic_lm.storage import Storage
from tests.conftest import Fake
from tests.monitor.story import at, committed, lost, reformed
from tests.monitor.test_history import begun, finished, granted
from tests.test_cli import process, run, write_config


def write_log(folder: Path, *events: Event) -> str:
    """The address of a run with these events."""
    url = f"{folder}/runs/mine"
    log = EventLog(Storage.open(f"file://{url}").child("events"), flush_s=0.05)
    for event in events:
        log.append(event)
    log.close()
    return url


STORY = [begun(), granted(1, 2), committed(2, 0), committed(4, 1), lost(5, "w1"), reformed(6, "failure", 0.25)]


def test_status_tells_people_and_programs_the_same(tmp_path: Path) -> None:
    url = write_log(tmp_path, *STORY)
    told = run("status", url, "--json")
    assert told.exit_code == 0
    facts = json.loads(told.stdout)
    assert facts.pop("seconds_ago") > 0
    assert facts == {
        "run": "mine", "verdict": "running", "message": None, "step": 2, "of": 10, "loss": 2.5, "workers": 2,
        "tokens_per_s": 200.0, "last_event": "reformed happened.",
    }  # fmt: skip
    text = run("status", url).stdout
    assert "          loss  2.5000\n" in text
    assert "last event  reformed happened." in text
    assert "None" not in text


def test_status_of_a_long_run_looks_at_its_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_lm.run, "LOOK_EVENTS", 3)
    url = write_log(tmp_path, *STORY)
    assert json.loads(run("status", url, "--json").stdout)["step"] == 2


def test_logs_are_the_lines_that_were_told(tmp_path: Path) -> None:
    told = run("logs", write_log(tmp_path, *STORY))
    assert told.exit_code == 0
    assert told.stdout.splitlines() == [
        "0:00:00  run_started happened.", "0:00:05  member_lost happened.", "0:00:06  reformed happened.",
    ]  # fmt: skip


def test_followed_logs_end_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_lm.run, "FOLLOW_S", 0.05)
    url = write_log(tmp_path, begun())
    later = threading.Timer(0.5, write_log, (tmp_path, lost(5, "w1"), finished(6, "done")))
    later.start()
    told = run("logs", "-f", url)
    later.join()
    assert told.stdout.splitlines() == [
        "0:00:00  run_started happened.", "0:00:05  member_lost happened.", "0:00:06  run_finished happened.",
    ]  # fmt: skip


def test_followed_logs_end_when_nobody_reads_them(tmp_path: Path) -> None:
    url = write_log(tmp_path, begun())  # and no end
    read, write = os.pipe()
    os.close(read)
    try:
        done = process("logs", "-f", url, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_report_goes_to_the_run_or_to_a_file(tmp_path: Path) -> None:
    url = write_log(tmp_path, *STORY)
    assert run("report", url).stdout == f"file://{url}/report.html\n"
    assert run("report", url, "--out", f"{tmp_path}/mine.html").exit_code == 0
    assert Path(url, "report.html").read_text() == Path(tmp_path, "mine.html").read_text()


def test_table_goes_to_the_run_or_to_a_file(tmp_path: Path) -> None:
    url = write_log(tmp_path, *STORY)
    assert run("export", url).stdout == f"file://{url}/metrics/steps.parquet\n"
    for name in ("mine.parquet", "mine.csv"):
        assert run("export", url, "--out", f"{tmp_path}/{name}").stdout == f"{tmp_path}/{name}\n"
    expected = pandas.read_parquet(Path(url, "metrics/steps.parquet"))
    assert expected["step"].tolist() == [0, 1]
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "mine.parquet"), expected)
    dtypes = {"generation": "str"}
    found = pandas.read_csv(tmp_path / "mine.csv", dtype=dtypes)
    pandas.testing.assert_frame_equal(found, expected, check_dtype=False)  # 2.0 is written as 2


def test_run_that_is_exported_while_it_trains_is_exported_as_far_as_it_is(tmp_path: Path) -> None:
    url = write_log(tmp_path, *STORY)
    assert run("export", url).exit_code == 0
    write_log(tmp_path, committed(8, 2))
    assert run("export", url).exit_code == 0
    assert pandas.read_parquet(Path(url, "metrics/steps.parquet"))["step"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere/runs/x"], "there is no run at"),
        (["export", "x"], "'x' alone does not say where the run is stored"),
        (["status", "nowhere/runs/x"], "there is no run at"),
        (["runs", "show", "nowhere/runs/x@3"], "about the whole run: leave @3 out"),
        (["logs", "x"], "'x' alone does not say where the run is stored"),
        (["report", "no.yaml"], "no.yaml"),
        (["scale", "x", "--workers", "6..2"], "write MIN..MAX with 1 <= MIN <= MAX"),
        (["scale", "x", "--workers", "two"], "'two' is no range of workers"),
        (["scale", "x", "--workers", "0"], "'0' is no range of workers"),
    ],
)
def test_mistakes_end_in_one_message_and_code_2(arguments: list[str], message: str) -> None:
    told = run(*arguments)
    assert told.exit_code == 2
    assert message in told.stderr
    assert told.stderr.startswith("elastic-lm: ")


def test_report_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    told = run("report", write_log(tmp_path, *STORY), "--out", f"{tmp_path}/no/folder.html")
    assert told.exit_code == 2
    assert told.stderr == f"elastic-lm: {tmp_path}/no/folder.html cannot be written: No such file or directory\n"


@pytest.mark.parametrize("name", ["no/folder.csv", "mine.xlsx"])
def test_table_that_cannot_be_written_says_why(name: str, tmp_path: Path) -> None:
    told = run("export", write_log(tmp_path, *STORY), "--out", f"{tmp_path}/{name}")
    assert (told.exit_code, told.stdout) == (2, "")
    assert told.stderr.startswith(f"elastic-lm: {tmp_path}/{name} ")


@pytest.mark.parametrize(
    ("arguments", "kind", "fields"),
    [
        (["scale", "--workers", "2..6"], "scale", {"min_workers": 2, "max_workers": 6}),
        (["scale", "--workers", "3"], "scale", {"min_workers": 3, "max_workers": 3}),
        (["stop"], "stop", {"reason": "asked by a person"}),
        (["drain", "abc"], "drain", {}),
    ],
)
def test_word_for_the_coordinator_is_left_under_the_runs_name(
    arguments: list[str], kind: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def command(name: str, kind: str, arguments: dict[str, Any], *, node: str | None = None) -> str:
        asked.append((name, kind, arguments, node))
        return "abcdef"

    monkeypatch.setattr(remote, "command", command)
    told = run(arguments[0], write_config(tmp_path), *arguments[1:])
    assert told.exit_code == 0
    assert told.stdout.startswith("Asked ")
    assert asked == [("first", kind, fields, "abc" if kind == "drain" else None)]


def test_bare_name_is_that_of_a_folder_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_log(tmp_path, *STORY)
    monkeypatch.chdir(tmp_path)
    assert json.loads(run("status", "mine", "--json").stdout)["step"] == 2


def test_bare_name_is_asked_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = write_log(tmp_path, *STORY)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(remote, "run_url", {"mine": f"file://{url}"}.__getitem__)
    assert json.loads(run("status", "mine", "--json").stdout)["step"] == 2


# -- resume ----------------------------------------------------------------------------------------------------------


def stored(folder: Path, **changes: object) -> tuple[RunConfig, str]:
    """A run that has been trained: its config, and its address."""
    config = RunConfig.load(write_config(folder, **changes))
    storage = Storage.open(config.run_url)
    storage.write("config.yaml", config.replace("training.steps=77").to_yaml().encode())
    return config, storage.url


def test_resume_trains_what_the_run_was_last_trained_with(fake_fit: Fake, tmp_path: Path) -> None:
    configs = fake_fit(RunResult("done", "all steps"))
    config, url = stored(tmp_path)
    assert run("resume", url).exit_code == 0
    assert run("resume", str(tmp_path / "run.yaml"), "--set", "workers.max=3").exit_code == 0
    assert configs == [config.replace("training.steps=77"), config.replace("training.steps=77", "workers.max=3")]


def test_resume_without_a_config_file_takes_the_newest_in_the_log(fake_fit: Fake, tmp_path: Path) -> None:
    configs = fake_fit(RunResult("done", "all steps"))
    config = RunConfig.load(write_config(tmp_path, name="mine"))
    starts = [config, config.replace("training.steps=9")]
    url = write_log(
        tmp_path, *(at(0, EventKind.RUN_STARTED, config=c.model_dump(mode="json"), resume_step=None) for c in starts)
    )
    assert run("resume", url).exit_code == 0
    assert configs == [starts[1]]


@pytest.mark.parametrize("text", ["name: [", "", "name: first\nunknown: 1"])
def test_damaged_config_of_a_run_is_refused_with_its_place(text: str, fake_fit: Fake, tmp_path: Path) -> None:
    configs = fake_fit(RunResult("done", "all steps"))
    _, url = stored(tmp_path)
    Storage.open(url).write("config.yaml", text.encode())
    told = run("resume", url)
    assert told.exit_code == 2 and told.stderr.startswith("elastic-lm: ")
    assert configs == []


def test_run_that_was_moved_is_not_resumed_in_its_old_place(fake_fit: Fake, tmp_path: Path) -> None:
    configs = fake_fit(RunResult("done", "all steps"))
    _, url = stored(tmp_path)
    moved = tmp_path / "elsewhere" / "runs" / "first"
    moved.parent.mkdir(parents=True)
    Path(url.removeprefix("file://")).rename(moved)
    told = run("resume", str(moved))
    assert told.exit_code == 2 and "--set storage=" in told.stderr
    assert run("resume", str(moved), "--set", f"storage={tmp_path}/elsewhere").exit_code == 0
    assert [config.run_url for config in configs] == [f"file://{moved}"]


@pytest.mark.parametrize("name", ["nowhere/runs/x", "x"])
def test_run_that_is_not_there_cannot_be_resumed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run("resume", name).exit_code == 2


def test_without_a_cluster_the_run_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = run("stop", "mine")
    assert told.exit_code == 4
    assert "set it to the head's address" in told.stderr


def test_error_of_the_cluster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(*_: Any, **__: Any) -> str:
        raise ClusterError("run mine is not being trained on this cluster")

    monkeypatch.setattr(remote, "command", command)
    assert run("stop", "mine").exit_code == 4
