"""Results of stand-alone evaluations in a run's folder: of each task the newest, few of them, and nothing that is none."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.errors import StorageError
from elastic_lm.evaluate.intervals import Metric
from elastic_lm.evaluate.result import Outcome, Result
from elastic_lm.evaluation_file import Figure
from elastic_lm.experiment import evaluations
from elastic_lm.monitor import task_results
from elastic_lm.monitor.metrics import MOST_FIGURES, MOST_TASKS
from elastic_lm.monitor.scraping import SAMPLE_LIMIT
from elastic_lm.monitor.task_results import Rank, TaskResult, TaskWatcher, foremost, newest
from elastic_lm.runtime.cluster import wait_for
from elastic_lm.storage import Storage


def store(folder: Storage, step: int, task: str, **metrics: Any) -> None:
    folder.write(f"evaluations/step-{step:08d}/{task}.json", json.dumps({"task": task, "metrics": metrics}).encode())


def test_result_of_an_evaluation_is_read_as_it_was_stored(tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    outcome = Outcome({"loss": Metric(2.5, 2.25, 2.75), "accuracy": Metric(None)}, {"samples": 3})
    Result("a-run", 4, "0" * 64, "held_out", "held_out", "1" * 64, outcome).store(folder)
    loss, accuracy = Figure("loss", 2.5, 2.25, 2.75), Figure("accuracy", None, None, None)
    assert newest(folder) == [TaskResult("held_out", 4, (loss, accuracy))]
    assert foremost(newest(folder)) == [TaskResult("held_out", 4, (loss,))]


def test_numbers_alone_and_such_that_json_has_not_are_told_as_in_a_comparison(tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    store(folder, 4, "mine", loss=2, accuracy={"value": math.nan}, bleu=-math.inf)
    loss, *others = newest(folder)[0].figures
    assert (loss, others) == (Figure("loss", 2.0), [Figure("accuracy", None), Figure("bleu", None)])
    assert [(one.metric, one.value) for one in evaluations.found(folder)] == [
        ("accuracy", None),
        ("bleu", None),
        ("loss", 2.0),
    ]
    assert foremost(newest(folder)) == [TaskResult("mine", 4, (loss,))]


def test_of_each_task_the_newest_step_counts(tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    for step in (2, 100_000_000, 30):  # longer names come before shorter ones in a listing
        store(folder, step, "mine", accuracy={"value": step / 1e9})
    store(folder, 2, "other-12345678", accuracy={"value": 0.5})
    assert [(result.task, result.step) for result in newest(folder)] == [("mine", 100_000_000), ("other-12345678", 2)]


def test_of_many_tasks_and_figures_a_few_are_told(tmp_path: Path) -> None:
    """So that an endpoint stays below what Prometheus takes of it; those that were asked last."""
    folder = Storage.open(str(tmp_path))
    for number in range(MOST_TASKS + 3):
        store(folder, number, f"task-{number:02}", **{f"figure_{n}": {"value": n} for n in range(MOST_FIGURES + 1)})
    assert [len(result.figures) for result in newest(folder)] == [MOST_FIGURES + 1] * (MOST_TASKS + 3)
    found = foremost(newest(folder))
    assert [result.task for result in found] == [f"task-{number:02}" for number in range(3, MOST_TASKS + 3)]
    assert {len(result.figures) for result in found} == {MOST_FIGURES}
    assert MOST_TASKS * (3 * MOST_FIGURES + 1) + 120 < SAMPLE_LIMIT


def test_tasks_of_ones_own_come_before_groups_and_these_before_their_members(tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))

    def put(task: str, step: int, kind: str, value: float | None = 0.5, **counts: int) -> None:
        Result("r", step, "0" * 64, task, kind, "1" * 64, Outcome({"acc": Metric(value)}, counts)).store(folder)

    for number in range(57):
        put(f"harness-mmlu_{number:02}", 9, "harness", items=3)
    put("harness-mmlu", 9, "harness", items=171, tasks=57)
    put("capitals", 3, "choices")
    put("lost", 10, "pairs", value=None)
    everything = newest(folder)
    assert len(everything) == 60
    told = foremost(everything)
    assert [result.task for result in told][:3] == ["capitals", "harness-mmlu", "harness-mmlu_00"]
    assert len(told) == MOST_TASKS and all(result.task != "lost" for result in told)
    ranks = {result.task: result.rank for result in told}
    assert [ranks[task] for task in ("capitals", "harness-mmlu", "harness-mmlu_00")] == list(Rank)


@pytest.mark.parametrize(
    "content",
    ["", "no JSON", "[1]", "[" * 100_000, "{}", '{"metrics": 1}', '{"metrics": {"loss": {"value": "2"}}}',
     '{"metrics": {"loss": true}}'],
    ids=["empty", "text", "a list", "deep", "no metrics", "a number", "a text as value", "no number"],
)  # fmt: skip
def test_what_is_no_result_is_passed_over(content: str, tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    folder.write("evaluations/step-00000009/bad.json", content.encode())
    folder.write("evaluations/notes.json", b"{}")
    store(folder, 4, "good", loss={"value": 2})
    assert newest(folder) == [TaskResult("good", 4, (Figure("loss", 2.0, None, None),))]


def test_watcher_goes_on_looking_when_storage_was_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_results, "LOOK_S", 0.01)
    looks: list[int] = []

    class Flaky(Storage):
        def list(self, prefix: str = "") -> list[str]:
            looks.append(1)
            if len(looks) < 3:
                raise StorageError("no answer")
            return super().list(prefix)

    folder, found = Flaky(str(tmp_path)), list[list[TaskResult]]()
    store(folder, 4, "mine", loss={"value": 2})
    watcher = TaskWatcher(folder, found.append)
    wait_for(lambda: found, timeout_s=20, what="a look")
    store(folder, 6, "mine", loss={"value": 1})
    wait_for(lambda: found[-1][0].step == 6, timeout_s=20, what="a later look")
    watcher.close()
    wait_for(
        lambda: "task-results" not in {thread.name for thread in threading.enumerate()}, timeout_s=20, what="its end"
    )
