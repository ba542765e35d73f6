"""Report and table at a run's end: an address, or a line that says why there is none; never the loss of the result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_lm.errors import StorageError
from elastic_lm.experiment.lineage import FILE, Lineage, Parent
from elastic_lm.monitor import report, table
from elastic_lm.monitor.progress import Lines
from elastic_lm.result import RunResult
from elastic_lm.runtime.trainer import with_files
from elastic_lm.storage import Storage

DONE = RunResult("done", "trained 2 steps", 2, {"loss": 2.5}, "s3://b/step-2")


def plan_of(folder: Path) -> Any:
    """What the files need of a plan."""
    return SimpleNamespace(config=SimpleNamespace(name="mine"), run_storage=Storage.open(f"file://{folder}/runs/mine"))


def test_files_are_written_and_named(tmp_path: Path) -> None:
    told: list[str] = []
    result = with_files(DONE, plan_of(tmp_path), Lines(told.append, 1.0))
    assert result.report == f"file://{tmp_path}/runs/mine/report.html"
    assert result.table == f"file://{tmp_path}/runs/mine/metrics/steps.parquet"
    assert (tmp_path / "runs/mine/report.html").exists() and (tmp_path / "runs/mine/metrics/steps.parquet").exists()
    assert told == []
    assert (result.verdict, result.metrics, result.checkpoint) == ("done", {"loss": 2.5}, "s3://b/step-2")


def test_report_of_a_fork_says_where_it_is_from(tmp_path: Path) -> None:
    parent = Parent(f"file://{tmp_path}/runs/gone", "gone", 4, {}, "f" * 64)
    plan = plan_of(tmp_path)
    plan.run_storage.write(FILE, Lineage("mine", parent, "f" * 64).to_json())
    with_files(DONE, plan, Lines(lambda line: None, 1.0))
    assert "mine was forked from gone at step 4." in (tmp_path / "runs/mine/report.html").read_text()


@pytest.mark.parametrize("error", [StorageError("no answer"), KeyError("an event of another version")])
@pytest.mark.parametrize(("module", "what"), [(report, "report"), (table, "table of steps")])
def test_file_that_fails_is_told_and_costs_nothing_else(
    module: Any, what: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> str:
        raise error

    monkeypatch.setattr(module, "write", fails)
    told: list[str] = []
    result = with_files(DONE, plan_of(tmp_path), Lines(told.append, 1.0))
    assert told == [f"The {what} could not be written: {type(error).__name__}: {error}"]
    assert (result.report is None) == (module is report) and (result.table is None) == (module is table)
    assert result.verdict == "done"
