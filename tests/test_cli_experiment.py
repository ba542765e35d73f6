"""`experiment` and `Experiment` with real runs, trained in this process: what is told, what is kept, and each exit code."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_lm import Experiment, Run, RunResult, fit
from elastic_lm.config import RunConfig
from elastic_lm.errors import StorageError
from elastic_lm.events.log import EventLog
from elastic_lm.events.types import Event, EventKind
from elastic_lm.experiment.account import Account
from elastic_lm.experiment.lineage import Lineage
from elastic_lm.runtime import remote
from elastic_lm.runtime.mailbox import Command
from elastic_lm.storage import Storage
from tests.solo import LocalMailbox, Solo, solo_config, without_ray
from tests.test_cli import run

STEPS = 60
GOOD = 0.05  # a learning rate, which comes to a perplexity of 11; ten times as much to 21, a hundred times to 24
TARGET = "perplexity <= 14"


@pytest.fixture
def mailboxes() -> Iterator[list[LocalMailbox]]:
    with without_ray() as made:
        yield made


@pytest.fixture
def base(held_out_corpus: str, tmp_path: Path) -> RunConfig:
    return solo_config(
        held_out_corpus, f"file://{tmp_path}", "base", steps=STEPS, optimizer={"learning_rate": 100 * GOOD}
    )


def written(base: RunConfig, folder: Path, **changes: Any) -> str:
    (folder / "base.yaml").write_text(base.to_yaml())
    plan = {"name": "lower", "base": "base.yaml", "samples": 16, "target": TARGET,
            "changes": [{"optimizer.learning_rate": 10 * GOOD}, {"optimizer.learning_rate": GOOD}]}  # fmt: skip
    (folder / "plan.yaml").write_text(yaml.safe_dump({**plan, **changes}))
    return str(folder / "plan.yaml")


def test_learning_rate_a_hundred_times_too_high_is_mended(
    base: RunConfig, tmp_path: Path, mailboxes: list[LocalMailbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = written(base, tmp_path)
    told = run("experiment", plan)
    assert told.exit_code == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines[0] == "Experiment lower: 3 attempts, held_out.perplexity <= 14 wanted, no budget given."
    assert lines[1] == "lower-00 begins: the base; from scratch; 3,840 tokens."
    assert any(line.startswith("lower-00 ends: perplexity ") and "does not reach" in line for line in lines)
    assert any(line.startswith("lower-02 ends: perplexity ") and "reaches held_out" in line for line in lines)
    assert lines[-5].startswith("lower-02") and "reaches it" in lines[-5]
    assert lines[-3].startswith("   verdict  reached: lower-02 reaches held_out.perplexity <= 14: perplexity ")
    assert len(mailboxes) == 3
    found = Run.open(f"{base.storage}/runs/lower-02")
    assert found.config.optimizer.learning_rate == GOOD
    assert Storage.open(found.url).exists(f"evaluations/step-{STEPS:08d}/held_out.json")

    again = run("experiment", plan)  # it has ended, so there is nothing to do
    assert again.exit_code == 0
    assert again.stdout.splitlines() == [lines[0], *lines[-9:]]
    assert len(mailboxes) == 3

    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.delenv("NO_COLOR", raising=False)
    on_terminal = run("experiment", plan)
    assert [line for line in on_terminal.stdout.splitlines() if line.startswith("\x1b[32mlower-02")]


def test_forks_of_a_plan_are_real_ones(base: RunConfig, tmp_path: Path, mailboxes: list[LocalMailbox]) -> None:
    base = base.replace(f"optimizer.learning_rate={GOOD}")
    changes = [{"optimizer.learning_rate": GOOD / 2, "skip": [[62, 64]]}, {"model.dropout": 0.1, "steps": 4}]
    plan = written(base, tmp_path, target="loss < 0.1", parent="last", steps=8, changes=changes)
    told = run("experiment", plan)
    assert told.exit_code == 1, told.stderr
    assert "exhausted: no attempt reaches held_out.loss < 0.1" in told.stdout
    lineage = Lineage.load(Storage.open(f"{base.storage}/runs/lower-02"))
    assert lineage is not None
    assert [(link.run, link.parent.name, link.parent.step) for link in lineage.chain()] == [
        ("lower-02", "lower-01", 68), ("lower-01", "lower-00", 60),
    ]  # fmt: skip
    config = Run.open(f"{base.storage}/runs/lower-02").config
    assert (config.training.steps, config.training.skip, config.model.dropout) == (72, ((62, 64),), 0.1)
    assert "└─ lower-01" in told.stdout and "   └─ lower-02" in told.stdout


def test_dry_run_tells_the_attempts_and_starts_nothing(base: RunConfig, tmp_path: Path) -> None:
    plan = written(base, tmp_path, budget={"tokens": 1e6, "hours": 12}, parent="best", steps=4)
    told = run("experiment", plan, "--dry-run")
    assert told.exit_code == 0, told.stderr
    assert told.stdout.splitlines() == [
        "Experiment lower: 3 attempts, held_out.perplexity <= 14 wanted, the budget 1,000,000 tokens, 12 hours.",
        "Attempts after the base begin as a fork of the best one before.",
        "",
        "run       tokens  state      changes",
        "lower-00   3,840  not begun  the base",
        "lower-01     256  not begun  optimizer.learning_rate: 5.0 -> 0.5",
        "lower-02     256  not begun  optimizer.learning_rate: 5.0 -> 0.05",
        "",
        "4,352 tokens in all, if none reaches it before. Nothing was started.",
    ]
    told = run("experiment", plan, "--dry-run", "--json")
    assert [attempt["tokens"] for attempt in json.loads(told.stdout)["attempts"]] == [3840, 256, 256]
    assert Storage.open(base.storage).child("runs").list() == []


def test_json_has_everything_and_stdout_nothing_else(
    base: RunConfig, tmp_path: Path, mailboxes: list[LocalMailbox]
) -> None:
    told = run("experiment", written(base, tmp_path, budget={"attempts": 1}), "--json")
    assert told.exit_code == 1
    found = json.loads(told.stdout)
    assert (found["verdict"], found["best"], found["tokens"]) == ("budget", "lower-00", 3840)
    first = found["attempts"][0]
    assert first["score"] == first["figures"]["held_out"]["perplexity"]
    assert set(first["figures"]["held_out"]) == {"loss", "perplexity", "accuracy", "bits_per_byte"}
    assert found["attempts"][1]["state"] == "not begun"
    assert "lower-00 begins: the base" in told.stderr


def test_run_that_is_stopped_stops_the_experiment_and_goes_on_with_the_same_command(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, names = Solo.train, []

    def train(solo: Solo, until: int | None = None) -> Any:
        names.append(solo.plan.config.name)
        return real(solo, 10 if names == ["lower-00", "lower-01"] else None)

    monkeypatch.setattr(Solo, "train", train)
    plan = written(base, tmp_path)
    with without_ray():
        told = run("experiment", plan)
        assert told.exit_code == 5, told.stderr
        assert "stopped: lower-01: enough; the same command goes on" in told.stdout
        told = run("experiment", plan)
    assert told.exit_code == 0, told.stderr
    assert "lower-01 goes on: optimizer.learning_rate=0.5; from scratch; 3,840 tokens." in told.stdout
    assert names == ["lower-00", "lower-01", "lower-01", "lower-02"]
    steps = [e.step for e in Run.open(f"{base.storage}/runs/lower-01").events() if e.kind is EventKind.STEP_COMMITTED]
    assert steps == list(range(STEPS))


def test_score_is_of_the_step_that_the_record_tells(
    base: RunConfig, tmp_path: Path, mailboxes: list[LocalMailbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base.replace("training.steps=8")
    plan = written(base, tmp_path, budget={"attempts": 1})
    real = Solo.train

    def train(solo: Solo, until: int | None = None) -> Any:
        real(solo, 4)
        return real(Solo(solo.plan.config))

    monkeypatch.setattr(Solo, "train", train)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", lambda *_, **__: (_ for _ in ()).throw(StorageError("away")))
        assert run("experiment", plan).exit_code == 4
    folder = Storage.open(f"{base.storage}/runs/lower-00")
    for path in [path for path in folder.list("checkpoints/") if "00000008" in path]:
        folder.delete(path)
    told = run("experiment", plan)
    assert told.exit_code != 0 and "step 8" in told.stderr
    assert folder.list("evaluations/") == []
    found = json.loads(run("experiment", plan, "--json").stdout)
    assert (found["verdict"], found["attempts"][0]["state"]) == ("budget", "bad_checkpoint")


def test_run_is_stopped_with_a_checkpoint_when_the_hours_are_over(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mailboxes: list[LocalMailbox]
) -> None:
    def command(name: str, kind: str, arguments: dict[str, Any], *, node: str | None = None) -> str:
        mailboxes[-1].post.remote(Command(kind, arguments))
        return ""

    monkeypatch.setattr(remote, "command", command)
    monkeypatch.setattr("elastic_lm.experiments.RETRY_S", 0.1)
    plan = written(base.replace("training.steps=1000000"), tmp_path, budget={"hours": 0.5 / 3600})
    told = run("experiment", plan)
    assert told.exit_code == 1, told.stderr
    assert "budget: the 0.0001388888888888889 hours of budget.hours are over" in told.stdout
    folder = Storage.open(f"{base.storage}/runs/lower-00")
    account = Account.of(folder)
    assert account.verdict == "stopped" and account.step is not None and 0 < account.step < 1_000_000
    assert [found for found in folder.list("checkpoints/") if f"step-{account.step:08d}" in found]


def test_experiment_from_python(base: RunConfig, tmp_path: Path, mailboxes: list[LocalMailbox]) -> None:
    told: list[str] = []
    experiment = Experiment.open(written(base, tmp_path), tell=told.append, quiet=True)
    assert [attempt.run for attempt in experiment.attempts] == ["lower-00", "lower-01", "lower-02"]
    result = experiment.run()
    assert result.ok and result.best is not None and result.best.run == "lower-02"
    assert len(told) == 6
    assert [attempt.state for attempt in experiment.attempts] == ["done"] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "perplexity = 30"}, "is no target"),
        ({"tasks": ["hold_out"]}, "is no task"),
        ({"changes": [{"optimizer.learnin_rate": 1}]}, "did you mean learning_rate?"),
    ],
)
def test_bad_plan_ends_in_one_message(changes: dict[str, Any], message: str, base: RunConfig, tmp_path: Path) -> None:
    told = run("experiment", written(base, tmp_path, **changes))
    assert told.exit_code == 2
    assert told.stderr.startswith("elastic-lm: ") and message in told.stderr
    assert told.stdout == ""


# -- what a run has taken --------------------------------------------------------------------------------------------


def test_account_of_a_run_that_was_cut_short(base: RunConfig) -> None:
    folder = Storage.open(base.run_url)
    assert Account.of(folder) == Account()
    solo = Solo(base)
    solo.train(until=10)
    stopped = Account.of(folder)
    assert (stopped.verdict, stopped.step, stopped.num_steps) == ("stopped", 10, 10)
    with without_ray():
        fit(base, quiet=True)
    done = Account.of(folder)
    assert (done.verdict, done.message, done.step, done.num_steps) == ("done", f"trained {STEPS} steps", STEPS, STEPS)
    events = list(Run.open(base).events())
    last = {event.attempt: event.elapsed_s for event in events}
    assert done.seconds == pytest.approx(sum(last.values()))
    assert done.seconds > stopped.seconds > 0


def test_account_counts_steps_that_were_given_up(base: RunConfig) -> None:
    folder = Storage.open(base.run_url)
    log = EventLog(folder.child("events"))
    committed = lambda *steps: [Event(EventKind.STEP_COMMITTED, "", step) for step in steps]  # noqa: E731
    rewound = lambda step, number: Event(EventKind.REWOUND, "", step, fields={"num_steps": number})  # noqa: E731
    for event in [Event(EventKind.RUN_STARTED, ""), *committed(4, 5, 6, 7, 8), rewound(6, 3), *committed(6, 7)]:
        log.append(event)
    log.flush()
    found = Account.of(folder)
    assert (found.step, found.num_steps) == (8, 7)
    for event in [
        rewound(4, 4),
        Event(EventKind.RUN_FINISHED, "", 4, fields={"verdict": "stopped", "reason": "asked"}),
    ]:
        log.append(event)
    log.flush()
    found = Account.of(folder)
    assert (found.verdict, found.step, found.num_steps) == ("stopped", 4, 7)
    log.close()


def test_signal_reaches_whoever_trains(base: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    real = Solo.train

    def train(solo: Solo, until: int | None = None) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        while not heard:  # the test has a time limit
            time.sleep(0.01)
        return real(solo, until)

    monkeypatch.setattr(Solo, "train", train)
    with without_ray():
        fit(base.replace("training.steps=1"), quiet=True, on_signal=heard.append)
    assert heard == ["SIGTERM"]


def test_account_takes_from_a_result_what_the_log_may_lack() -> None:
    found = Account(None, "", 5, 5, 9.0).concluded(RunResult("done", "trained 7 steps", 7))
    assert found == Account("done", "trained 7 steps", 7, 5, 9.0)
    assert Account(None, "", 5, 5, 9.0).concluded(RunResult("failed", "lost")).step == 5
