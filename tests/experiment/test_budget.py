"""The hours of a budget end a run whatever comes between."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from ray.exceptions import GetTimeoutError

from elastic_lm import experiments
from elastic_lm.errors import ClusterError
from elastic_lm.experiment.plan import Plan
from elastic_lm.experiment.trainer import OUT_OF_TIME
from elastic_lm.result import RunResult
from elastic_lm.run import Run
from elastic_lm.runtime import trainer
from tests.solo import solo_config


def test_run_that_does_not_hear_at_first_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    obstacles: Iterator[Exception] = iter(
        [ClusterError("just starting"), GetTimeoutError("slow"), OSError("away"), ValueError("a bug")]
    )
    unreadable = iter([OSError("away")])
    heard = threading.Event()

    def status(_run: Run) -> SimpleNamespace:
        for error in unreadable:
            raise error
        return SimpleNamespace(verdict="running", seconds_ago=-1.0)

    def stop(_run: Run, _reason: str) -> None:
        for error in obstacles:
            raise error
        heard.set()

    def fit(*_: object, **__: object) -> RunResult:
        return RunResult("stopped" if heard.wait(60) else "done", "", 7)

    monkeypatch.setattr(experiments, "RETRY_S", 0.01)
    monkeypatch.setattr(Run, "status", status)
    monkeypatch.setattr(Run, "stop", stop)
    monkeypatch.setattr(trainer, "fit", fit)
    trains = experiments._Trainer(cast("Plan", None), None, quiet=True)
    result = trains.train(solo_config("/tokens", str(tmp_path)), 0.01)
    assert (result.verdict, result.last_step) == (OUT_OF_TIME, 7)
