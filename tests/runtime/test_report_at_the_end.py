"""The report at a run's end: an address, or a line that says why there is none; never the loss of the result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_lm.errors import StorageError
from elastic_lm.monitor import report
from elastic_lm.monitor.progress import Lines
from elastic_lm.runtime.trainer import write_report
from elastic_lm.storage import Storage


def plan_of(folder: Path) -> Any:
    """What the report needs of a plan."""
    return SimpleNamespace(config=SimpleNamespace(name="mine"), run_storage=Storage.open(f"file://{folder}/runs/mine"))


def test_report_is_written_and_named(tmp_path: Path) -> None:
    told: list[str] = []
    assert write_report(plan_of(tmp_path), Lines(told.append, 1.0)) == f"file://{tmp_path}/runs/mine/report.html"
    assert (tmp_path / "runs/mine/report.html").exists()
    assert told == []


@pytest.mark.parametrize("error", [StorageError("no answer"), KeyError("an event of another version")])
def test_report_that_fails_is_told_and_costs_nothing_else(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str, storage: Storage) -> str:
        raise error

    monkeypatch.setattr(report, "write", fails)
    told: list[str] = []
    assert write_report(plan_of(tmp_path), Lines(told.append, 1.0)) is None
    assert told == [f"The report could not be written: {type(error).__name__}: {error}"]
